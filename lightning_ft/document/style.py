"""Style sheet of the HTML page, for wide screens, phones, dark mode and print."""

CSS = """\
:root { --text: #1b1f24; --soft: #57606a; --background: #ffffff; --card: #f6f8fa; --line: #d0d7de;
  --pass: #00664b; --fail: #a33b00; --warn: #fff4d6; --warn-line: #d9a400; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6edf3; --soft: #9aa5b1; --background: #14181d; --card: #1e242b; --line: #3a434d;
    --pass: #3fcf9f; --fail: #ff9b5e; --warn: #3a2f10; --warn-line: #b38b00; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--background); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { font-size: 1.7rem; margin: 0 0 .8rem; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .8rem; padding-top: .8rem; border-top: 1px solid var(--line); }
h1, h2, p, li, dd, dt, summary, figcaption, caption { overflow-wrap: anywhere; }
.headline { font-size: 1.12rem; padding: .9rem 1.1rem; margin: .6rem 0; background: var(--card);
  border-left: 6px solid var(--line); border-radius: 4px; }
.advice { display: block; font-size: 1.3rem; margin: 0 0 .4rem; }
.about { color: var(--soft); margin: -.4rem 0 1rem; overflow-wrap: anywhere; }
.about span { display: inline-block; margin-right: 1.6rem; }
.about b { color: var(--text); font-weight: 600; }
.headline.pass { border-color: var(--pass); }
.headline.fail { border-color: var(--fail); }
.headline.void { border-color: var(--warn-line); }
.badge { color: var(--background); padding: .1rem .55rem; border-radius: 4px; margin-right: .25rem; }
.pass .badge { background: var(--pass); }
.fail .badge { background: var(--fail); }
.void .badge { background: var(--text); }
.warnings { background: var(--warn); border: 1px solid var(--warn-line); border-radius: 4px; padding: .7rem 1.1rem;
  margin: 1rem 0; }
.warnings h2 { font-size: 1rem; margin: 0; padding: 0; border: 0; }
.warnings ul { margin: .3rem 0 0; padding-left: 1.2rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(185px, 1fr)); gap: 12px; margin: 1.2rem 0 0; }
.facts > div { background: var(--card); border-radius: 4px; padding: .8rem 1rem; }
.facts dt { color: var(--soft); font-size: .9rem; }
.facts dd { margin: 0; }
.facts b { display: block; font-size: 1.6rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.facts span { color: var(--soft); font-size: .88rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 20px;
  align-items: start; }
figure { margin: 0; }
figure:only-child { max-width: 720px; }
figure img { width: 100%; height: auto; display: block; background: #fff; border-radius: 4px; padding: 6px; }
figcaption { color: var(--soft); font-size: .9rem; margin: .4rem 0 1rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .94rem; }
caption { text-align: left; color: var(--soft); padding-bottom: .4rem; }
th, td { text-align: left; padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th[scope="row"] { font-weight: 400; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; padding: .35rem 0 .35rem 1.4rem; }
th.number { white-space: normal; vertical-align: bottom; }
.wide .number { white-space: normal; min-width: 6.6rem; }
.changes { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 0 24px; }
details { border: 1px solid var(--line); border-radius: 4px; margin: .5rem 0; padding: .5rem .8rem; }
summary { cursor: pointer; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 240px), 1fr)); gap: 12px;
  margin-top: .6rem; }
.answers h3 { font-size: .85rem; color: var(--soft); margin: 0 0 .2rem; font-weight: 600; }
.answers pre { margin: 0; padding: .6rem; background: var(--card); border-radius: 4px; white-space: pre-wrap;
  overflow-wrap: anywhere; max-height: 22rem; overflow-y: auto; font-size: .86rem; }
.missing { color: var(--soft); font-style: italic; }
@media (max-width: 640px) {
  main { padding: 16px 14px 48px; }
  .number { white-space: normal; padding-left: .8rem; }
  th[scope="row"] { min-width: 7rem; }
  .text { min-width: 9rem; }
}
@media print {
  :root { --text: #000; --soft: #444; --background: #fff; --card: #f4f4f4; --line: #bbb; --pass: #00664b;
    --fail: #a33b00; --warn: #fff; }
  body { font-size: 11pt; }
  main { max-width: none; padding: 0; }
  figure, details, tr, .facts > div { break-inside: avoid; }
  h2 { break-after: avoid; }
  .scroll { overflow: visible; }
  .number { white-space: normal; }
  .answers pre { max-height: none; }
  .badge { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
  details::details-content { content-visibility: visible; height: auto; } /* print collapsed answers too */
}
"""
"""Style sheet of the page; in dark mode, plots keep a white background."""
