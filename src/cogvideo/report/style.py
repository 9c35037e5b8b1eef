"""The style sheet of the report's page: light and dark, narrow and wide, on screen and on paper."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fbfaf7; --card: #ffffff; --ink: #1f2429; --muted: #5d6873; --line: #e3e1da;
  --accent: #1f6f8b; --fill: #5aa2ba; --track: #eceae3; --unused: #cf9a4b;
  --warn: #8a4b08; --warn-paper: #fdf3e1; --warn-line: #efd3a3;
  --line-0: #0b6fa8; --line-1: #d1570a; --line-2: #16896a; --line-3: #b0479a;
  --line-4: #b98100; --line-5: #5a55b5; --line-6: #c23b4e; --line-7: #6b747d;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --card: #1b1f24; --ink: #e4e7ea; --muted: #9aa5b0; --line: #2c3239;
    --accent: #7cc4dc; --fill: #3f8aa5; --track: #262c32; --unused: #b58643;
    --warn: #f3c581; --warn-paper: #2a2114; --warn-line: #5a4420;
    --line-0: #56b1e6; --line-1: #f28b4b; --line-2: #45c79f; --line-3: #df8bcd;
    --line-4: #e3b23c; --line-5: #a5a1f0; --line-6: #f07f8d; --line-7: #a3adb7;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink); overflow-wrap: anywhere;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif;
}
.page { max-width: 74rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1, h2, h3 { line-height: 1.2; letter-spacing: -0.012em; font-weight: 650; text-wrap: balance; }
h1 { font-size: clamp(1.7rem, 4vw, 2.4rem); margin: 0 0 0.4rem; }
h2 { font-size: 1.35rem; margin: 0 0 0.6rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 0.5rem; }
p { margin: 0 0 0.9rem; max-width: 46rem; }
a { color: var(--accent); text-underline-offset: 0.15em; }
.lead, .note, figcaption, caption { color: var(--muted); }
.note, figcaption, caption { font-size: 0.875rem; }
code, .mono { font: 0.86em/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
header { border-bottom: 1px solid var(--line); padding-bottom: 1.2rem; }
nav ul { display: flex; flex-wrap: wrap; gap: 0.2rem 1.2rem; list-style: none; margin: 0.9rem 0 0; padding: 0; }
nav { font-size: 0.9rem; }
section { padding-top: 2.6rem; }
.tiles { display: grid; grid-template-columns: repeat(4, 1fr); gap: 0.8rem; margin: 1rem 0 0; }
.tile, .card { background: var(--card); border: 1px solid var(--line); border-radius: 0.6rem; }
.tile { padding: 0.8rem 1rem 0.75rem; }
.tile dt { color: var(--muted); font-size: 0.82rem; }
.tile dd { margin: 0; }
.tile .value { font-size: 1.55rem; font-weight: 650; letter-spacing: -0.02em; font-variant-numeric: tabular-nums; }
.tile .more { display: block; color: var(--muted); font-size: 0.8rem; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); gap: 1.2rem; }
.many { columns: 21rem 3; column-gap: 1.2rem; }
.many > .card { break-inside: avoid; margin-bottom: 1.2rem; }
.card { padding: 1rem 1.2rem 1.1rem; margin: 0; min-width: 0; }
.card > h3:first-child { margin-top: 0; }
.card > .note:last-child { margin: 0.7rem 0 0; }
.stack > * + * { margin-top: 1.2rem; }
.missing {
  background: var(--warn-paper); border: 1px solid var(--warn-line); color: var(--warn);
  border-radius: 0.6rem; padding: 0.8rem 1.2rem; margin: 0.8rem 0 1.2rem;
}
.missing ul { margin: 0.2rem 0 0; padding-left: 1.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.92rem; }
caption { text-align: left; padding-bottom: 0.4rem; }
th, td { padding: 0.32rem 0.9rem 0.32rem 0; text-align: left; vertical-align: baseline; }
th:last-child, td:last-child { padding-right: 0; }
tr + tr > *, thead + tbody > tr:first-child > * { border-top: 1px solid var(--line); }
thead th { vertical-align: bottom; color: var(--muted); font-weight: 500; font-size: 0.82rem; }
tbody th { font-weight: 500; min-width: 7.5rem; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.number { width: 1%; }
td.wide { width: 45%; min-width: 3rem; }
.bar { display: block; height: 0.7rem; border-radius: 0.2rem; background: var(--track); overflow: hidden; }
.bar > span { display: block; height: 100%; min-width: 1px; background: var(--fill); }
figure { margin: 0; }
.columns { display: flex; align-items: stretch; gap: 2px; height: 13rem; margin: 1.2rem 0 2.1rem; }
.columns { border-bottom: 1px solid var(--muted); }
.column { flex: 1 1 0; min-width: 0; max-width: 6rem; position: relative; }
.column { display: flex; flex-direction: column; justify-content: end; }
.column > .fill { background: var(--fill); border-radius: 2px 2px 0 0; min-height: 0; }
.column.marked > .fill { background: var(--unused); }
.column:hover > .fill { background: var(--accent); }
.column > .top, .column > .tick {
  position: absolute; left: 50%; transform: translateX(-50%); white-space: nowrap;
  color: var(--muted); font-size: 0.72rem; line-height: 1.2; font-variant-numeric: tabular-nums;
}
.column > .tick { top: 100%; margin-top: 0.35rem; }
.column > .top { margin-bottom: 0.2rem; }
.runs td, .runs thead th { white-space: nowrap; padding-right: 0.8rem; }
.sheets { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); gap: 1.2rem; }
.curves { position: relative; height: 15rem; margin: 1rem 0 1.9rem 3.4rem; border-bottom: 1px solid var(--muted); }
.stack > .card > figure > .curves { height: 20rem; }
.curves svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.curves polyline, .curves path {
  fill: none; stroke: currentColor; stroke-width: 1.8px; stroke-linejoin: round; stroke-linecap: round;
  vector-effect: non-scaling-stroke;
}
.curves .grid { stroke: var(--line); stroke-width: 1px; }
.curves .thin { stroke-width: 1px; opacity: 0.3; }
.curves .dots { stroke-width: 6px; }
.curves .dashed .thick { stroke-dasharray: 6 4; }
.curves .tick {
  position: absolute; white-space: nowrap; color: var(--muted);
  font-size: 0.75rem; line-height: 1.2; font-variant-numeric: tabular-nums;
}
.curves .x { top: 100%; margin-top: 0.35rem; transform: translateX(-50%); }
.curves .y { right: 100%; margin-right: 0.5rem; transform: translateY(50%); }
.line-0 { color: var(--line-0); } .line-1 { color: var(--line-1); } .line-2 { color: var(--line-2); }
.line-3 { color: var(--line-3); } .line-4 { color: var(--line-4); } .line-5 { color: var(--line-5); }
.line-6 { color: var(--line-6); } .line-7 { color: var(--line-7); }
.swatch { display: inline-block; width: 1.1rem; margin-right: 0.45rem; vertical-align: middle; }
.swatch { border-top: 3px solid currentColor; border-radius: 2px; }
.swatch.dashed { border-top-style: dashed; border-radius: 0; }
.legend { display: flex; flex-wrap: wrap; gap: 0.1rem 1.2rem; list-style: none; margin: 0 0 0.4rem; padding: 0; }
.legend { font-size: 0.85rem; }
.legend b { margin-left: 0.45rem; font-weight: 600; font-variant-numeric: tabular-nums; }
details { margin-top: 0.6rem; font-size: 0.92rem; }
summary { cursor: pointer; color: var(--accent); font-size: 0.875rem; }
summary:focus-visible, a:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; border-radius: 2px; }
.words { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 11rem), 1fr)); gap: 0.3rem 1rem; }
.words { list-style: none; margin: 0.6rem 0 0; padding: 0; font-size: 0.92rem; }
.words li { position: relative; display: flex; justify-content: space-between; gap: 0.6rem; padding: 0.1rem 0.4rem; }
.words li > * { position: relative; }
.words .share { position: absolute; inset: 0 auto 0 0; background: var(--fill); opacity: 0.28; border-radius: 0.2rem; }
.words .count { color: var(--muted); font-variant-numeric: tabular-nums; }
.clips { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1.2rem; }
.clip img { display: block; width: 100%; height: auto; border-radius: 0.25rem; }
.clip figcaption { color: var(--ink); font-size: 0.95rem; margin-top: 0.7rem; }
.clip figcaption p { margin: 0 0 0.35rem; }
.clip .meta { display: flex; flex-wrap: wrap; gap: 0.1rem 0.9rem; color: var(--muted); font-size: 0.82rem; }
.clip .meta .mono { font-size: 0.95em; line-height: inherit; }
.clip .meta b { color: var(--ink); font-weight: 600; }
.chips { display: flex; flex-wrap: wrap; gap: 0.3rem; list-style: none; margin: 0.5rem 0 0; padding: 0; }
.chips li { border: 1px solid var(--line); border-radius: 0.9rem; padding: 0 0.6rem; }
.chips li { font-size: 0.78rem; color: var(--muted); }
.chips bdi { color: var(--ink); }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--line); }
footer { color: var(--muted); font-size: 0.85rem; }
@media (max-width: 40rem) {
  .page { padding: 1.4rem 1rem 3rem; }
  .column > .top { display: none; }
  td.wide { width: 30%; min-width: 2.5rem; }
  th, td { padding-right: 0.6rem; }
  tbody th { min-width: 5.5rem; }
  thead .number { white-space: normal; overflow-wrap: normal; }
  .words { grid-template-columns: repeat(auto-fill, minmax(min(100%, 9rem), 1fr)); }
  .card { padding: 0.8rem 0.9rem 0.9rem; }
}
@media (max-width: 56rem) { .tiles { grid-template-columns: repeat(2, 1fr); gap: 0.6rem; } }
@media print {
  .page { max-width: none; padding: 0; }
  .card, .tile, figure { break-inside: avoid; }
  nav { display: none; }
}
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
"""
"""No font, picture or script comes from elsewhere."""
