"""Shows the values under the pointer, and moves through them by the arrow keys.

Without it a report has all of its content; only this convenience is missing. It writes text alone,
never markup. It has neither "less than" nor an ampersand, so that a document stays XML as well.
"""

SCRIPT = """
"use strict";
const modulo = (n, count) => (n + count) % count;
for (const plot of document.querySelectorAll("svg.plot, svg.cells")) {
  const tip = plot.parentElement.querySelector(".tip");
  const guide = plot.querySelector(".guide");
  const marks = [...plot.querySelectorAll("circle, rect, path")];
  const middle = mark => {
    const box = mark.getBBox();
    return box.x + box.width / 2;
  };
  const stops = new Map();
  const words = new Map();
  marks.forEach((mark, number) => {
    const title = mark.querySelector("title");
    words.set(mark, title.textContent);
    title.remove();
    const key = guide ? mark.getAttribute("cx") : number;
    stops.set(key, [...(stops.get(key) || []), mark]);
  });
  const groups = [...stops.values()];
  if (guide) groups.sort((a, b) => middle(a[0]) - middle(b[0]));
  let at = -1;
  const hide = () => {
    at = -1;
    tip.hidden = true;
    marks.forEach(mark => mark.classList.remove("on"));
    if (guide) guide.setAttribute("transform", "translate(-99 0)");
  };
  const show = number => {
    if (number === at) return;
    hide();
    at = number;
    const group = groups[at];
    group.forEach(mark => mark.classList.add("on"));
    const place = middle(group[0]);
    const size = plot.viewBox.baseVal;
    const texts = group.map(mark => words.get(mark));
    const rest = texts.slice(1).map(text => text.slice(text.indexOf(": ") + 2));
    tip.textContent = [texts[0], ...rest].join("\\n");
    tip.hidden = false;
    const share = place / size.width;
    tip.style.left = share > .5 ? "auto" : (100 * share + 2) + "%";
    tip.style.right = share > .5 ? (100 - 100 * share + 2) + "%" : "auto";
    const low = guide ? 0 : group[0].getBBox().y / size.height;
    tip.style.top = low > .5 ? "auto" : (guide ? "0" : (100 * low + 12) + "%");
    tip.style.bottom = low > .5 ? (100 - 100 * low + 2) + "%" : "auto";
    if (guide) guide.setAttribute("transform", "translate(" + (place + 9) + " 0)");
  };
  plot.addEventListener("pointermove", event => {
    if (!guide) {
      const found = marks.indexOf(event.target);
      return found === -1 ? hide() : show(found);
    }
    const box = plot.getBoundingClientRect();
    const place = (event.clientX - box.left) / box.width * plot.viewBox.baseVal.width;
    const far = groups.map(group => Math.abs(middle(group[0]) - place));
    show(far.indexOf(Math.min(...far)));
  });
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", event => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (event.key === "Escape") hide();
    if (!step) return;
    event.preventDefault();
    show(at === -1 ? (step === 1 ? 0 : groups.length - 1) : modulo(at + step, groups.length));
  });
}
addEventListener("beforeprint", () => {
  document.querySelectorAll("details").forEach(one => { one.open = true; });
});
"""
