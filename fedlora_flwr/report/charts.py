"""Charts as SVG, with labeled axes, a value for each point, and a table of the same numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from fedlora_flwr.report.html import Markup, element, folded, joined, table
from fedlora_flwr.report.scales import Format, plain, thinned, ticks

WIDTH, HEIGHT = 460, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 14, 12, 46
_DOTS = 30
LOOKS = 6
"""Colors and strokes that the style has for lines."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Parameters
    ----------
    name : str
        What it shows.
    points : Sequence[tuple[float, float]]
        Its points, from left to right.
    band : Sequence[tuple[float, float, float]] (default: ())
        Where an interval is known: x, and its lower and upper end.
    """

    name: str
    points: Sequence[Point]
    band: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class Chart:
    """A chart of lines.

    Parameters
    ----------
    title : str
        What it shows.
    x, y : str
        Names of the axes, with their units.
    lines : Sequence[Line]
        The lines.
    shown : Format (default: four digits)
        How a value is written.
    limit : tuple[float, str], optional
        A level that is marked, and its name.
    zero : bool (default: False)
        Whether the vertical axis begins at zero.
    whole : bool (default: True)
        Whether x counts something, e.g. rounds.
    """

    title: str
    x: str
    y: str
    lines: Sequence[Line]
    shown: Format = plain
    limit: tuple[float, str] | None = None
    zero: bool = False
    whole: bool = True
    _range: tuple[list[float], list[float]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        xs = [x for line in self.lines for x, _ in line.points]
        ys = [y for line in self.lines for _, y in line.points]
        ys += [end for line in self.lines for _, *ends in line.band for end in ends]
        ys += [self.limit[0]] if self.limit else []
        ys += [0.0] if self.zero else []
        across = ticks(min(xs), max(xs), 7, self.whole)
        object.__setattr__(self, "_range", (across, ticks(min(ys), max(ys))))

    def figure(self) -> Markup:
        """Return the chart with its title, its legend and the table of its numbers."""
        drawing = element(
            "svg",
            self._axes(),
            self._limit(),
            (self._line(number, line) for number, line in enumerate(self.lines)),
            element("line", class_="guide", y1=_TOP, y2=HEIGHT - _BOTTOM, x1=-9, x2=-9),
            class_="plot", viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", tabindex=0,
            aria_label=self.text,
        )  # fmt: skip
        return framed(self.title, drawing, self._legend(), self._table())

    @property
    def text(self) -> str:
        """What the chart shows, in words."""
        ends = (
            f"{line.name} goes from {self.shown(line.points[0][1])} to "
            f"{self.shown(line.points[-1][1])}"
            for line in self.lines[:LOOKS]
        )
        marked = f" {self.limit[1]}: {self.shown(self.limit[0])}." if self.limit else ""
        return f"{self.title}, {self.y} by {self.x}. {'; '.join(ends)}.{marked}"

    def _at(self, x: float, y: float) -> tuple[float, float]:
        across, up = self._range
        right = (x - across[0]) / (across[-1] - across[0])
        high = (y - up[0]) / (up[-1] - up[0])
        return (
            round(_LEFT + right * (WIDTH - _LEFT - _RIGHT), 1),
            round(HEIGHT - _BOTTOM - high * (HEIGHT - _TOP - _BOTTOM), 1),
        )

    def _axes(self) -> Markup:
        across, up = self._range
        left, bottom = self._at(across[0], up[0])
        right, top = self._at(across[-1], up[-1])
        parts = []
        for value in up:
            y = self._at(across[0], value)[1]
            parts += [
                element("line", class_="rule", x1=left, x2=right, y1=y, y2=y),
                label(left - 6, y + 4, self.shown(value), "end"),
            ]
        for value in across:
            x = self._at(value, up[0])[0]
            parts += [
                element("line", class_="axis", x1=x, x2=x, y1=bottom, y2=bottom + 4),
                label(x, bottom + 18, plain(value)),
            ]
        middle = (top + bottom) / 2
        parts += [
            element("line", class_="axis", x1=left, x2=right, y1=bottom, y2=bottom),
            label((left + right) / 2, HEIGHT - 6, self.x, class_="name"),
            label(14, middle, self.y, class_="name", transform=f"rotate(-90 14 {middle:.1f})"),
        ]
        return joined(parts)

    def _limit(self) -> Markup:
        if self.limit is None:
            return Markup()
        across = self._range[0]
        (left, y), (right, _) = (self._at(x, self.limit[0]) for x in (across[0], across[-1]))
        return joined(
            element("line", class_="limit", x1=left, x2=right, y1=y, y2=y),
            label(left + 4, y + 15, self.limit[1], "start"),
        )

    def _line(self, number: int, line: Line) -> Markup:
        look = f"look{number % LOOKS}"
        parts = []
        if line.band:
            there = [self._at(x, low) for x, low, _ in line.band]
            back = [self._at(x, high) for x, _, high in reversed(line.band)]
            parts.append(element("polygon", class_=f"band {look}", points=_path(there + back)))
        placed = [self._at(*point) for point in line.points]
        parts.append(element("polyline", class_=f"line {look}", points=_path(placed)))
        # Many dots would hide the strokes by which lines can be told apart without their color.
        mark = "dot" if len(placed) <= _DOTS else "dot many"
        for (x, y), (cx, cy) in thinned([*zip(line.points, placed, strict=True)]):
            text = f"{self.x} {plain(x)}: {self._value(line, x, y)}"
            dot = {"class_": f"{mark} {look}", "cx": cx, "cy": cy, "r": 3}
            parts.append(element("circle", element("title", text), **dot))
        return joined(parts)

    def _value(self, line: Line, x: float, y: float) -> str:
        found = ((low, high) for place, low, high in line.band if place == x)
        ends = (f" ({self.shown(low)} to {self.shown(high)})" for low, high in found)
        return f"{line.name} {self.shown(y)}{next(ends, '')}"

    def _legend(self) -> Markup:
        if len(self.lines) < 2:
            return Markup()
        return legend((f"line look{n % LOOKS}", one.name) for n, one in enumerate(self.lines))

    def _table(self) -> Markup:
        values = [dict(line.points) for line in self.lines]
        xs = sorted({x for line in values for x in line})
        few = thinned(xs)
        rows = [
            [plain(x), *(self.shown(line[x]) if x in line else "–" for line in values)] for x in few
        ]
        note = "" if len(few) == len(xs) else f" ({len(few)} of {len(xs)} points)"
        head = [self.x, *(line.name for line in self.lines)]
        return folded("Numbers", table(f"{self.title}{note}", head, rows))


def framed(title: str, drawing: Markup, *below: Markup, wide: bool = False) -> Markup:
    """Return a figure: title, drawing, the place for the value under the pointer, and the rest."""
    place = element("output", class_="tip", aria_live="polite", hidden=True)
    inner = element("div", drawing, place, class_="stage")
    if wide:  # It keeps its size, and scrolls on a narrow screen.
        inner = element(
            "div", inner, class_="scroll", tabindex=0, role="region", aria_label=f"{title}, chart"
        )
    return element(
        "figure", element("figcaption", title), inner, *below, class_="wide" if wide else None
    )


def legend(entries: Iterable[tuple[str, str]]) -> Markup:
    """Return a legend from the class of each mark and its name."""
    items = []
    for look, name in entries:
        mark = (
            element("line", class_=look, x1=0, x2=26, y1=6, y2=6)
            if "line" in look
            else element("rect", class_=look, width=14, height=12, x=6)
        )
        shown = element("svg", mark, viewBox="0 0 26 12", class_="mark", aria_hidden="true")
        items.append(element("li", shown, name))
    return element("ul", items, class_="legend")


def label(x: float, y: float, text: str, anchor: str = "middle", **more: object) -> Markup:
    """Return a text in a drawing."""
    return element("text", text, x=round(x, 1), y=round(y, 1), text_anchor=anchor, **more)


def runs_of(values: Sequence[str]) -> list[tuple[int, int, str]]:
    """Return where equal neighbors begin and end, and their value, e.g. ``(0, 3, "A")``."""
    cuts = [n for n, (a, b) in enumerate(pairwise(values), 1) if a != b]
    ends = pairwise([0, *cuts, len(values)])
    return [(begin, end, values[begin]) for begin, end in ends if values]


def _path(places: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in places)
