"""How a report looks, in light and dark, on a phone and on paper. Nothing is loaded from elsewhere.

A test computes from this text that every color can be read on its ground (WCAG 2.2, AA).
"""

STYLE = """
:root {
  color-scheme: light dark;
  --ground: #ffffff; --raised: #f4f6f8; --text: #1a2027; --quiet: #4d5866; --rule: #d5dbe2;
  --link: #00618f; --focus: #00618f; --bad: #b3261e; --good: #00694f; --in-cell: #ffffff;
  --look0: #0067a5; --look1: #b8470b; --look2: #00785a; --look3: #8e3b8a; --look4: #6b5b00;
  --look5: #4b5563; --mode-a: #0067a5; --mode-b: #a8510a; --mode-ab: #00785a; --mode-none: #6b7280;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #12171d; --raised: #1c232b; --text: #e8ecf1; --quiet: #a9b4c0; --rule: #3a444f;
    --link: #7cc4f5; --focus: #7cc4f5; --bad: #ff9d94; --good: #5fd6ae; --in-cell: #10151a;
    --look0: #6cb8f0; --look1: #ff9e64; --look2: #4fd1a5; --look3: #e59be0; --look4: #e0cb52;
    --look5: #aeb8c4; --mode-a: #6cb8f0; --mode-b: #ffb45c; --mode-ab: #4fd1a5;
    --mode-none: #9aa4b0;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--ground); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  overflow-wrap: anywhere;
}
main, body > header, footer { max-width: 68rem; margin: 0 auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 1.5rem 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem; }
p { margin: .4rem 0; max-width: 46rem; }
a { color: var(--link); }
footer { color: var(--quiet); font-size: .875rem; padding: 2rem 1rem; }
.quiet { color: var(--quiet); }
.bad { color: var(--bad); font-weight: 600; }
.good { color: var(--good); font-weight: 600; }
.skip { position: absolute; left: -99rem; }
.skip:focus { left: 1rem; top: .5rem; background: var(--ground); padding: .3rem; }
:focus-visible { outline: 3px solid var(--focus); outline-offset: 2px; border-radius: 3px; }
nav ul { display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; list-style: none; padding: 0; }
nav a { display: inline-block; padding: .3rem 0; }
.tiles { display: grid; gap: .7rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); }
.tiles div { background: var(--raised); border-radius: 8px; padding: .6rem .8rem; }
.tiles dt { color: var(--quiet); font-size: .875rem; }
.tiles dd { margin: 0; font-size: 1.15rem; font-weight: 600; }
.charts { display: grid; gap: 1.2rem; margin: .8rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 23rem), 1fr)); align-items: start; }
.charts > * { min-width: 0; }
figure { margin: 0; background: var(--raised); border-radius: 8px; padding: .8rem; }
figcaption { font-weight: 600; margin-bottom: .4rem; }
.stage { position: relative; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--text); font-size: 13px; }
svg text.name { fill: var(--quiet); }
svg text.in { fill: var(--in-cell); font-weight: 600; text-anchor: middle; pointer-events: none; }
.cells { min-width: 46rem; }
.rule { stroke: var(--rule); stroke-width: 1; }
.axis { stroke: var(--quiet); stroke-width: 1; }
.guide { stroke: var(--quiet); stroke-width: 1; stroke-dasharray: 2 2; }
.limit { stroke: var(--bad); stroke-width: 1.5; stroke-dasharray: 7 4; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.dot { stroke: none; }
.dot.many { opacity: 0; }
.dot.on { stroke: var(--text); stroke-width: 2; opacity: 1; }
.band { stroke: none; opacity: .18; }
.line.look0 { stroke: var(--look0); } .dot.look0, .band.look0 { fill: var(--look0); }
.line.look1 { stroke: var(--look1); stroke-dasharray: 8 3; }
.dot.look1, .band.look1 { fill: var(--look1); }
.line.look2 { stroke: var(--look2); stroke-dasharray: 2 3; }
.dot.look2, .band.look2 { fill: var(--look2); }
.line.look3 { stroke: var(--look3); stroke-dasharray: 9 3 2 3; }
.dot.look3, .band.look3 { fill: var(--look3); }
.line.look4 { stroke: var(--look4); stroke-dasharray: 5 5; }
.dot.look4, .band.look4 { fill: var(--look4); }
.line.look5 { stroke: var(--look5); stroke-dasharray: 12 4; }
.dot.look5, .band.look5 { fill: var(--look5); }
.mode-A { fill: var(--mode-a); } .mode-B { fill: var(--mode-b); }
.mode-AB { fill: var(--mode-ab); } .mode-none { fill: var(--mode-none); }
.mode.on, .disk.on { stroke: var(--text); stroke-width: 2.5; }
.disk { fill: var(--look0); }
.bar { fill: var(--look0); } .bar-ground { fill: var(--rule); }
.figure { display: inline-block; min-width: 3rem; font-weight: 400; }
svg.share { width: 8rem; height: .8rem; display: inline-block; vertical-align: middle; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; list-style: none; padding: 0;
  margin: .5rem 0 0; font-size: .875rem; }
.legend li { display: flex; align-items: center; gap: .4rem; }
svg.mark { width: 26px; height: 12px; flex: none; }
.tip { position: absolute; top: 0; max-width: 90%; background: var(--text); color: var(--ground);
  font-size: .8125rem; line-height: 1.35; padding: .25rem .5rem; border-radius: 5px;
  pointer-events: none; white-space: pre-line; z-index: 1; }
.tip[hidden] { display: none; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; min-width: min(100%, 24rem); font-size: .875rem;
  margin: .6rem 0; }
caption { text-align: left; font-weight: 600; padding: .2rem 0; }
th, td { text-align: left; padding: .25rem 1rem .25rem 0; border-bottom: 1px solid var(--rule);
  vertical-align: top; font-variant-numeric: tabular-nums; unicode-bidi: isolate;
  overflow-wrap: normal; }
td:last-child { overflow-wrap: anywhere; }
thead th { color: var(--quiet); white-space: nowrap; }
tbody th { font-weight: 400; min-width: 5rem; overflow-wrap: anywhere; }
.numbers td, .numbers thead th + th { text-align: right; white-space: nowrap; }
.texts th, .texts td { white-space: pre-wrap; min-width: 12rem; max-width: 22rem;
  overflow-wrap: anywhere; padding-right: 1.2rem; }
details { margin: .5rem 0; }
summary { cursor: pointer; padding: .2rem 0; color: var(--link); }
@media (max-width: 30rem) {
  svg.plot text { font-size: 16px; }
  svg.share { width: 5rem; }
}
@media print {
  :root { color-scheme: light; }
  body { font-size: 10pt; }
  nav, .skip, figure details { display: none; }
  figure, tr, .tiles div { break-inside: avoid; }
  figure, .tiles div { border: 1px solid var(--rule); }
  h2 { break-after: avoid; }
  .scroll { overflow: visible; }
  .charts { grid-template-columns: 1fr 1fr; }
  .cells { min-width: 0; }
  figure.wide { grid-column: 1 / -1; }
}
"""
