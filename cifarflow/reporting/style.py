"""How a report looks: its one style sheet, for light and dark, screens of any width, and paper.

    tag("style", Markup(STYLE))

Colours of lines follow Okabe and Ito, lighter on dark ground; whatever a colour says, a letter, a
dash or a number says too.  Fonts are the system's own.
"""

from __future__ import annotations

# How many lines have a colour of their own, s0, s1, ...; later ones take them again, with other
# dashes.
COLOURS = 6
# Cells have one of so many strengths, from h0 to h10 and e0 to e10.
STRENGTHS = 10

_LIGHT = """
  --ground: #fcfcfb; --card: #ffffff; --ink: #1c1e21; --soft: #5a6068; --line: #dfe1e4;
  --grid: #e9ebed; --link: #0059a0; --heat: 0 114 178; --error: 213 94 0;
  --mark: #fff1cf; --mark-edge: #c98a00; --alarm: #a31515; --alarm-ground: #fdeceb;
  --s0: #0072b2; --s1: #d55e00; --s2: #00795a; --s3: #aa4499; --s4: #8a6a00; --s5: #2f8fc4;
"""
_DARK = """
  --ground: #14161a; --card: #1b1e23; --ink: #e8eaed; --soft: #a2a9b2; --line: #343941;
  --grid: #292d34; --link: #7cc0f5; --heat: 86 180 233; --error: 240 130 50;
  --mark: #3d3213; --mark-edge: #e0a526; --alarm: #ff9b90; --alarm-ground: #3a1a18;
  --s0: #56b4e9; --s1: #f58a3c; --s2: #3cc49a; --s3: #dd8fd0; --s4: #e0c04a; --s5: #a9b8ff;
"""

_SHEET = """
*, *::before, *::after { box-sizing: border-box; }
html { color-scheme: light dark; -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body {
  margin: 0 auto; padding: 2.5rem clamp(1rem, 4vw, 3rem) 4rem; max-width: 72rem;
  background: var(--ground); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans",
    Arial, sans-serif;
  overflow-wrap: break-word;
}
h1, h2, h3 { line-height: 1.2; text-wrap: balance; }
h1 { margin: 0; font-size: clamp(1.7rem, 5vw, 2.4rem); font-weight: 650; letter-spacing: -.02em; }
h2 { margin: 3.2rem 0 1rem; padding-top: 1.2rem; border-top: 1px solid var(--line);
  font-size: 1.3rem; font-weight: 620; letter-spacing: -.01em; }
h3 { margin: 0 0 .3rem; font-size: 1rem; font-weight: 620; }
p { margin: .6rem 0; max-width: 46rem; }
a { color: var(--link); text-underline-offset: .15em; }
a:focus-visible, summary:focus-visible, .scroll:focus-visible {
  outline: 2px solid var(--link); outline-offset: 3px; border-radius: 3px;
}
code { font: .88em/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; }
.over { margin: 0 0 .35rem; color: var(--soft); font-size: .85rem; letter-spacing: .04em; }
.under { margin: .5rem 0 0; color: var(--soft); }
.note { color: var(--soft); font-size: .9rem; }
nav ul { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; margin: 1.4rem 0 0; padding: 0;
  list-style: none; font-size: .92rem; }

.banner { margin: 1.4rem 0; padding: .9rem 1.1rem; max-width: none; border-radius: 8px;
  border: 1px solid var(--mark-edge); background: var(--mark); }
.banner strong { display: block; }
.alarm { border: 3px solid var(--alarm); background: var(--alarm-ground); color: var(--alarm);
  font-size: 1.1rem; }
.alarm strong { font-size: 1.5rem; line-height: 1.25; letter-spacing: .01em; }

.tiles { display: flex; flex-wrap: wrap; margin: 1.8rem 0 0; border: 1px solid var(--line);
  border-radius: 10px; overflow: hidden; background: var(--card); }
.tiles div { flex: 1 1 8.6rem; margin: 0 -1px -1px 0; padding: .85rem 1rem;
  border: solid var(--line); border-width: 0 1px 1px 0; }
.tiles dt { color: var(--soft); font-size: .82rem; }
.tiles dd { margin: .1rem 0 0; font-size: 1.4rem; font-weight: 600; line-height: 1.25;
  letter-spacing: -.01em; font-variant-numeric: tabular-nums; }
.tiles small { display: block; color: var(--soft); font-size: .8rem; font-weight: 400;
  letter-spacing: 0; }

.grid { display: grid; gap: 1.4rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.halves { display: grid; gap: 1.4rem 2.2rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }
.beside { display: flex; flex-wrap: wrap; gap: 0 1.6rem; align-items: flex-start; }
.beside > * { max-width: 100%; }
.beside table { font-size: .82rem; }
.beside th, .beside td { padding: .38rem .5rem; }
figure { margin: 0; }
.chart { padding: 1rem 1rem .6rem; border: 1px solid var(--line); border-radius: 10px;
  background: var(--card); }
.chart svg { display: block; width: 100%; height: auto; }
.square { max-width: 27rem; }
figcaption { font-size: .92rem; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; margin: 0 0 .5rem; padding: 0;
  list-style: none; color: var(--soft); font-size: .82rem; }
.legend li { display: flex; align-items: center; gap: .4rem; min-width: 0; }
.legend .swatch { margin: 0; }
.legend svg { flex: none; width: 1.8rem; height: .7rem; }

svg text { fill: var(--soft); font-size: 12.5px; font-variant-numeric: tabular-nums; }
svg .gridline { stroke: var(--grid); }
svg .axis { stroke: var(--soft); }
svg .ideal { stroke: var(--soft); stroke-dasharray: 3 4; }
svg .curve { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
svg .thin { stroke-width: 1.5; stroke-dasharray: 1.5 4; }
svg .dashed { stroke-dasharray: 9 4; }
svg .end { stroke: var(--card); stroke-width: 1.5; }
svg .hover { fill: transparent; stroke: none; }
svg .hover:hover { fill: currentColor; fill-opacity: .35; }

.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { padding: 0 0 .5rem; color: var(--soft); text-align: left; font-size: .9rem; }
th, td { padding: .38rem .75rem; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; }
th { font-weight: 560; }
thead th { color: var(--soft); font-weight: 500; vertical-align: bottom; }
.number { text-align: right; }
.number, tbody th { white-space: nowrap; }
.sentence { min-width: 16rem; }
.facts th { color: var(--soft); font-weight: 450; }
.facts td { overflow-wrap: anywhere; }
td.mark, th.mark { background: var(--mark); box-shadow: inset 3px 0 var(--mark-edge); }
td b { font-weight: 650; }
.swatch { display: inline-block; width: .7rem; height: .7rem; margin-right: .4rem;
  border-radius: 2px; background: currentColor; }

.matrix { font-size: .82rem; }
.matrix td, .matrix thead th:not(:first-child) { min-width: 3.1rem; padding: .5rem .35rem;
  border: 1px solid var(--ground); text-align: center; }
.matrix th { border: 0; vertical-align: middle; white-space: nowrap; }
.matrix thead th { padding: .2rem .3rem; font-size: .78rem; }
.matrix tbody th { position: sticky; left: 0; padding-left: 0; background: var(--ground); }
.matrix td.diagonal { font-weight: 650; }
.matrix td.none { color: var(--soft); }
.heat { width: min(100%, 34rem); height: auto; border: 1px solid var(--line);
  background: var(--card); image-rendering: pixelated; }

.bar { display: inline-block; width: 5rem; height: .55rem; margin-left: .6rem;
  vertical-align: 1px; }
.bar .track { fill: var(--grid); }

.mistakes { display: grid; gap: 1.2rem 1rem; margin: 1rem 0 0; padding: 0; list-style: none;
  grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); }
.mistakes img { display: block; width: 100%; height: auto; aspect-ratio: 1; object-fit: contain;
  border-radius: 6px; background: var(--grid); image-rendering: pixelated; }
.mistakes figcaption { margin-top: .4rem; font-size: .84rem; line-height: 1.4; }
.mistakes figcaption span { display: block; }
.mistakes .said { font-weight: 600; }
.mistakes .note { font-size: inherit; }

details { margin: 1rem 0; }
summary { cursor: pointer; width: fit-content; color: var(--link); }
.run { margin: 1.2rem 0; padding: .9rem 1.2rem; border: 1px solid var(--line);
  border-radius: 10px; }
.run > summary { width: auto; color: var(--ink); font-size: 1.1rem; font-weight: 600; }
footer { margin-top: 4rem; padding-top: 1rem; border-top: 1px solid var(--line);
  color: var(--soft); font-size: .85rem; }

@media (max-width: 34rem) {
  body { padding-top: 1.5rem; }
  .chart { padding: .8rem .6rem .4rem; }
  svg text { font-size: 15px; }
  .tiles div { flex-basis: 45%; }
  .mistakes { grid-template-columns: repeat(3, 1fr); }
  .facts th { white-space: normal; }
}
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
@media print {
  html { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  body { padding: 0; max-width: none; font-size: 10pt; }
  nav { display: none; }
  h2 { break-after: avoid; }
  figure, tr, .tiles, .mistakes li, .banner { break-inside: avoid; }
  .scroll { overflow: visible; }
  details::details-content { content-visibility: visible; height: auto; }
}
"""


def _strengths() -> str:
    """The backgrounds of cells: blue for what is right, orange for what is not."""
    lines = []
    for name, colour in (("h", "heat"), ("e", "error")):
        for strength in range(STRENGTHS + 1):
            opacity = f"{0.62 * strength / STRENGTHS:.3g}"
            lines.append(f".{name}{strength} {{ background: rgb(var(--{colour}) / {opacity}); }}")
    return "\n".join(lines)


def _colours() -> str:
    return "\n".join(
        f".s{index} {{ color: var(--s{index}); }}\n"
        f"svg .s{index}.curve {{ stroke: var(--s{index}); }}\n"
        f"svg .s{index}.fill {{ fill: var(--s{index}); }}"
        for index in range(COLOURS)
    )


STYLE = (
    f"\n:root {{{_LIGHT}}}\n"
    f"@media screen and (prefers-color-scheme: dark) {{ :root {{{_DARK}}} }}"
    f"{_SHEET}{_strengths()}\n{_colours()}\n"
)
