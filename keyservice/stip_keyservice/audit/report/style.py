"""The page's looks: light and dark, for a screen, a phone and paper. No font, image or script from elsewhere."""

from __future__ import annotations

CSS = """
:root { color-scheme: light dark;
  --page: light-dark(#ffffff, #12161b); --panel: light-dark(#f5f7f9, #1a2027);
  --text: light-dark(#1a2027, #e7ebef); --soft: light-dark(#515c68, #a5b0bb); --rule: light-dark(#d5dbe1, #343d47);
  --link: light-dark(#0b5394, #8cc4ff); --mark: light-dark(#000000, #ffffff);
  --guess: light-dark(#1f6f8b, #5fb8d6); --guess-tint: light-dark(#e6f3f7, #14303a);
  --uncompared: light-dark(#5f6b77, #a5b0bb); --uncompared-tint: light-dark(#f0f2f4, #222a32);
  --unclear: light-dark(#5f6b77, #a5b0bb); --unclear-tint: light-dark(#f0f2f4, #222a32);
  --some: light-dark(#a86a00, #e6b04d); --some-tint: light-dark(#fff4d9, #3a2e12);
  --much: light-dark(#b9480a, #f58b4c); --much-tint: light-dark(#ffe7d6, #432413);
  --all: light-dark(#a3123a, #ff7d93); --all-tint: light-dark(#fde2e7, #481722); }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-padding-top: 4.5rem; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", "DejaVu Sans", sans-serif; }
main, header, footer { max-width: 84rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 1.5rem; }
section { margin: 2.5rem 0; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.4rem; line-height: 1.25; margin: 0 0 .75rem; padding-top: .75rem; border-top: 2px solid var(--text); }
h3 { font-size: 1.1rem; line-height: 1.3; margin: 1.25rem 0 .4rem; }
p { margin: .4rem 0; }
.prose, .prose li { max-width: 75ch; }
a { color: var(--link); }
a:focus-visible, button:focus-visible, summary:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
code { font: .875em ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
pre { background: var(--panel); border: 1px solid var(--rule); border-radius: 6px; padding: .75rem 1rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
small { font-size: .8125rem; }
.muted { color: var(--soft); }
nav ul, .legend, .key { list-style: none; padding: 0; margin: .5rem 0;
  display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; }
.legend li { padding: .1rem .6rem; border-left: 4px solid; }
.sign { font-family: "DejaVu Sans", "Segoe UI Symbol", "Apple Symbols", "Noto Sans Symbols 2", sans-serif; }

.readings { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 1rem; }
.reading { background: var(--panel); border: 1px solid var(--rule); border-radius: 8px; padding: .25rem 1.1rem .9rem; }
.reading ul { list-style: none; padding: 0; margin: .6rem 0 0; }
.reading li { padding: .35rem 0 .35rem 1.6rem; text-indent: -1.6rem; font-size: .9375rem;
  border-top: 1px solid var(--rule); }
.reading li .sign { display: inline-block; width: 1.6rem; text-indent: 0; }
.facts { font-size: .875rem; }
h3 small { font-weight: 400; color: var(--soft); }
.headline { font-weight: 600; margin: 0; }

table { border-collapse: collapse; width: 100%; font-size: .9375rem; }
caption { text-align: left; font-weight: 600; padding: .4rem 0; }
th, td { text-align: left; vertical-align: top; padding: .5rem .6rem; border-bottom: 1px solid var(--rule);
  overflow-wrap: break-word; }
th { font-weight: 600; }
th span, th small { font-weight: 400; }
td p { margin: 0 0 .15rem; }
thead th { background: var(--page); border-bottom: 2px solid var(--text); vertical-align: bottom; }
thead th span { display: block; color: var(--soft); font-size: .8125rem; }
.matrix, .glance { table-layout: fixed; }
.matrix thead th, .glance thead th { position: sticky; top: 0; z-index: 2; }
.matrix thead th:first-child, .glance thead th:first-child { width: 15rem; }
.glance tbody th span { display: block; font-size: .875rem; color: var(--soft); }
.matrix .group th { background: var(--panel); border-bottom: 1px solid var(--rule); padding-top: .8rem; }
.matrix tbody th { background: var(--page); position: sticky; left: 0; }
.matrix td, .glance td { border-left: 1px solid var(--rule); }
.guess { --level: var(--guess); background: var(--guess-tint); }
.uncompared { --level: var(--uncompared); background: var(--uncompared-tint); }
.unclear { --level: var(--unclear); background: var(--unclear-tint); }
.some { --level: var(--some); background: var(--some-tint); }
.much { --level: var(--much); background: var(--much-tint); }
.all { --level: var(--all); background: var(--all-tint); }
.legend li { border-color: var(--level); }
.bar { display: block; width: 100%; height: 12px; margin: .15rem 0 .25rem; overflow: visible; }
.bar .track { fill: light-dark(#ffffffb0, #00000055); stroke: var(--rule); vector-effect: non-scaling-stroke; }
.bar .fill { fill: var(--level); }
.bar path { fill: none; vector-effect: non-scaling-stroke; }
.bar .whisker { stroke: var(--mark); stroke-width: 1.5; opacity: .75; }
.bar .prior { stroke: var(--mark); stroke-width: 3; }
.ends, .besides { font-size: .8125rem; }
.ends span { white-space: nowrap; }
.heard { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
.besides { border-top: 1px dotted var(--rule); padding-top: .15rem; }
td button { font: inherit; font-size: .8125rem; color: var(--soft); background: none; border: 0; padding: .35rem 0;
  text-decoration: underline dotted; text-underline-offset: 3px; cursor: help; }
[popover] { max-width: min(30rem, 90vw); background: var(--panel); color: var(--text); border: 2px solid var(--text);
  border-radius: 8px; padding: .5rem 1rem; }

.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(340px, 100%), 1fr)); gap: 1.5rem 2rem; }
figure { margin: 0; }
figcaption { font-weight: 600; margin-bottom: .4rem; }
.plot { display: block; max-width: 100%; height: auto; font: 13px system-ui, Roboto, "DejaVu Sans", sans-serif; }
.plot text { fill: var(--text); }
.plot .tick, .plot .muted { fill: var(--soft); font-size: 12px; }
.plot path { fill: none; }
.plot .grid { stroke: var(--rule); }
.plot .band { fill: var(--soft); opacity: .3; }
.plot .prior { stroke: var(--mark); stroke-width: 2.5; }
.plot .whisker { stroke: var(--level); stroke-width: 2.5; }
.plot .dot { fill: var(--level); stroke: var(--page); }
.line-0 { --level: light-dark(#0b5394, #8cc4ff); } .line-1 { --level: light-dark(#a3123a, #ff7d93); }
.line-2 { --level: light-dark(#8a5a00, #e6b04d); } .line-3 { --level: light-dark(#5b3f9e, #b9a2f5); }
.line-4 { --level: light-dark(#1d6b45, #63c795); }
.plot .line { stroke: var(--level); stroke-width: 2; }
path.mark { fill: var(--level); stroke: var(--page); }

.attacks { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1rem; }
.attack { border: 1px solid var(--rule); border-radius: 8px; padding: .1rem 1.1rem .8rem; }
dl { margin: 0; display: grid; grid-template-columns: 6rem 1fr; gap: .3rem .8rem; font-size: .9375rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; min-width: 0; }
dd ul { margin: 0; padding-left: 1.1rem; }
.comparison ul { margin: 0; padding-left: 1.1rem; }
.comparison thead th:nth-child(1) { width: 22%; } .comparison thead th:nth-child(2) { width: 30%; }
.comparison th small { display: block; color: var(--soft); }
summary { cursor: pointer; padding: .3rem 0; }

@media (max-width: $breakpointrem) {
  main, header, footer { padding: 0 1rem; }
  h1 { font-size: 1.5rem; } h2 { font-size: 1.25rem; }
  .cards, .cards tbody, .cards tr, .cards th, .cards td, .cards caption { display: block; width: auto; }
  .cards thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  .cards tbody tr { border: 1px solid var(--rule); border-radius: 8px; margin: 0 0 .75rem; overflow: clip; }
  .cards tbody th { border: 0; background: var(--panel); position: static; }
  .cards td { display: grid; grid-template-columns: 6.5rem minmax(0, 1fr); column-gap: .75rem; border-left: 0;
    border-bottom: 0; border-top: 1px solid var(--rule); }
  .cards td::before { content: attr(data-label); grid-row: 1 / span 6; font-weight: 600; font-size: .875rem; }
  .cards td > * { grid-column: 2; }
  .cards td button { text-align: left; min-height: 2rem; }
  .matrix tbody .group { border: 0; border-radius: 0; margin: 1rem 0 .5rem; position: sticky; top: 0; z-index: 2; }
  .matrix .group th { background: var(--page); border-bottom: 2px solid var(--text); padding: .5rem 0; }
  dl { grid-template-columns: 1fr; } dt { margin-top: .3rem; }
}
@media print {
  :root { color-scheme: light; }
  body { font-size: 10pt; } nav, [popover] { display: none; }
  section, table, .plots { break-inside: auto; } tr, figure, .attack, .reading, h2, h3 { break-inside: avoid; }
  h2, h3, caption { break-after: avoid; }
  .matrix thead th, .glance thead th, .matrix tbody th { position: static; }
  details::details-content { content-visibility: visible; block-size: auto; }
  * { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
}
"""


def style_sheet(columns: int) -> str:
    """For tables of so many instances: where they no longer fit beside each other, tables become cards."""
    return CSS.replace("$breakpoint", str(max(52, 18 + 9 * columns)))
