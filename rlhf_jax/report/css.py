"""The report's style sheet: light and dark, no font or image from elsewhere."""

CSS = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --text: #1c2128; --faint: #5d6673; --line: #d9dee5;
  --panel: #f5f7f9; --link: #1f5fa8;
  --good: #1a7f42; --middle: #8f5a00; --bad: #b3262e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #15181d; --text: #e3e7ec; --faint: #9aa4b1; --line: #363d47;
    --panel: #1e2228; --link: #7db4f0;
    --good: #5cc887; --middle: #e2b04e; --bad: #f2858b;
  }
  /* Pictures are drawn on white; their hues stay. */
  img, .swatch { filter: invert(0.915) hue-rotate(180deg); }
}
body {
  margin: 2rem auto; padding: 0 1.2rem; max-width: 72rem;
  background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
h1 { font-size: 1.6rem; line-height: 1.25; overflow-wrap: anywhere; }
h2, h3, h4 { margin: 2.2rem 0 0.3rem; overflow-wrap: anywhere; }
h2, h3 { padding-top: 1.2rem; border-top: 1px solid var(--line); }
h2 { font-size: 1.3rem; border-top-width: 3px; }
h3 { font-size: 1.15rem; }
h4 { font-size: 1rem; margin-top: 1.4rem; }
a { color: var(--link); text-decoration: none; }
a:hover { text-decoration: underline; }
code { font: 0.9em ui-monospace, "DejaVu Sans Mono", monospace; }
.faint, blockquote footer { color: var(--faint); font-size: 0.9rem; }
.text { max-width: 48rem; }
blockquote {
  margin: 0.8rem 0; padding: 0.2rem 1rem; max-width: 46rem;
  border-left: 4px solid var(--line); font-size: 1.05rem;
}
.badge {
  display: inline-block; padding: 0 0.55em;
  border: 1px solid; border-radius: 1em;
  font-size: 0.85rem; white-space: nowrap;
}
.ended { color: var(--faint); }
.unfinished, .when { color: var(--middle); }
.holds { color: var(--good); }
.not { color: var(--bad); }
.holds, .when, .not { font-weight: 600; white-space: normal; }
.verdict .badge { font-size: 1rem; padding: 0.1em 0.7em; }
.scroll { overflow-x: auto; margin: 0.8rem 0; }
table { border-collapse: collapse; font-size: 0.9rem; }
.scroll > p { margin: 0 0 0.3rem; }
th, td {
  padding: 0.25rem 0.9rem 0.25rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line);
}
th { color: var(--faint); font-weight: 600; white-space: nowrap; }
td { font-variant-numeric: tabular-nums; }
.depth-1 { padding-left: 1.2em; }
.depth-2 { padding-left: 2.4em; }
details {
  margin: 0.7rem 0; padding: 0.4rem 0.8rem;
  background: var(--panel); border-radius: 6px;
}
summary { cursor: pointer; }
img { max-width: 100%; height: auto; background: #ffffff; border-radius: 4px; }
.curves {
  display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr));
}
figure { margin: 0; }
figcaption {
  display: flex; align-items: end; min-height: 2.8em;
  font-size: 0.85rem; line-height: 1.35; color: var(--faint);
}
figcaption code { color: var(--text); }
.curves img { width: 100%; }
.swatch {
  display: inline-block; width: 0.8em; height: 0.8em; border-radius: 2px;
}
.entry { margin-right: 1em; white-space: nowrap; }
.words { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 9rem; }
.tokens span { padding: 0 1px; margin-right: 2px; border-radius: 2px; }
.strip { display: block; margin-top: 3px; line-height: 0.7; }
.strip span { display: inline-block; width: 0.7em; height: 0.7em; }
.legend span { padding: 0 0.4em; color: var(--text); }
.same { background: rgba(128, 128, 128, 0.12); }
.more-1 { background: rgba(230, 110, 20, 0.2); }
.more-2 { background: rgba(230, 110, 20, 0.38); }
.more-3 { background: rgba(230, 110, 20, 0.56); }
.more-4 { background: rgba(230, 110, 20, 0.75); }
.less-1 { background: rgba(40, 110, 220, 0.2); }
.less-2 { background: rgba(40, 110, 220, 0.38); }
.less-3 { background: rgba(40, 110, 220, 0.56); }
.less-4 { background: rgba(40, 110, 220, 0.75); }
.nan { outline: 1px solid var(--bad); }
"""
