"""The report as one HTML page.

There is no script in it; a content security policy allows none, and nothing
from elsewhere; and every link goes to a place in the page whose name is a
number.
"""

from collections.abc import Iterator, Sequence
import datetime
import json
import math
from typing import Any
from xml.etree import ElementTree

from rlhf_jax.report import css, found, html, training

_POLICY = (
  "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
  "base-uri 'none'; form-action 'none'"
)
_WIDTH = "width=device-width, initial-scale=1"
_VERDICTS = {"holds": ("holds", "✓"), "does not hold here": ("not", "✗")}


def render(
  runs: Sequence[found.Run], *, title: str, made: datetime.datetime
) -> str:
  """The whole page."""
  shown = [entry for run in runs for entry in _with_stages(run)]
  style = html.tag("style")
  style.text = css.CSS  # The one text that is not escaped.
  head = html.tag(
    "head",
    html.tag("meta", charset="utf-8"),
    html.tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
    html.tag("meta", name="viewport", content=_WIDTH),
    html.tag("title", title),
    style,
  )
  body = html.tag(
    "body",
    html.tag("h1", title),
    html.tag("p", f"Made {made:%Y-%m-%d %H:%M %Z}.", class_="faint"),
    *([_contents(shown)] if len(shown) > 1 else []),
    *(_section(run, i, depth) for i, (depth, run) in enumerate(shown)),
  )
  page = html.tag("html", head, body, lang="en")
  text = ElementTree.tostring(page, encoding="unicode", method="html")
  return f"<!DOCTYPE html>\n{text}\n"


def _with_stages(
  run: found.Run, depth: int = 0
) -> Iterator[tuple[int, found.Run]]:
  """The run and those below it, in the order of the page."""
  yield depth, run
  for stage in run.stages:
    yield from _with_stages(stage, depth + 1)


def _contents(shown: Sequence[tuple[int, found.Run]]) -> html.Node:
  """Links to all sections, with what came of them."""
  rows = []
  for i, (depth, run) in enumerate(shown):
    name = html.tag("a", run.name, href=f"#run-{i}")
    about = [name]
    outcome = training.state(run)
    if run.study:
      about.append(html.tag("div", run.study["claim"], class_="faint"))
      outcome = _verdict(run.study["verdict"])
    about = html.tag("div", *about, class_=f"depth-{min(depth, 2)}")
    rows.append([about, run.kind.replace("_", " "), outcome])
  return html.tag("nav", html.table(["run", "kind", "outcome"], rows))


def _section(run: found.Run, index: int, depth: int) -> html.Node:
  show = _study if run.kind == "study" else training.show
  return html.tag(
    "section",
    html.tag(f"h{min(depth, 1) + 2}", run.name, id=f"run-{index}"),
    _facts(run),
    *show(run),
    _configuration(run),
  )


def _facts(run: found.Run) -> html.Node:
  """State, kind, seed, seconds, notes and date in a line."""
  kind = run.kind.replace("_", " ")
  if run.members:
    kind += f" of {len(run.members)} members"
  facts = [f" {kind}", f"seed {run.seed}"]
  if math.isfinite(run.wall_s):
    facts.append(f"took {run.wall_s:,.0f} s")
  facts += [f"{name} {value}" for name, value in run.notes.items()]
  facts.append(f"last written {run.written:%Y-%m-%d %H:%M}")
  state = training.state(run)
  return html.tag("p", state, " · ".join(facts), class_="faint")


def _study(run: found.Run) -> Iterator[html.Node]:
  """Claim, verdict, finding, figure, tables."""
  if run.study is None:
    yield html.tag("p", "The study has not ended; --resume goes on with it.")
    return
  study = run.study
  source = html.tag("footer", f"Source: {study['source']}")
  yield html.tag("blockquote", study["claim"], source)
  verdict = _verdict(study["verdict"])
  yield html.tag("p", "Verdict: ", verdict, class_="verdict")
  yield html.tag("p", study["paragraph"], class_="text")
  if run.figure:
    alt = f"The figure of the study {study['study']}"
    yield html.image(run.figure, "png", alt)
  for table in study["tables"].values():
    if table["shown"]:
      columns, *rows = [
        [html.cell(cell) for cell in row]
        for row in (table["columns"], *table["rows"])
      ]
      yield html.table(columns, rows, caption=table["caption"])


def _verdict(verdict: str) -> html.Node:
  """Green, amber or red, and a mark for those who do not see that."""
  kind, mark = _VERDICTS.get(verdict, ("when", "◐"))
  return html.tag("span", f"{mark} {verdict}", class_=f"badge {kind}")


def _configuration(run: found.Run) -> html.Node:
  """All fields, those that differ from the defaults first."""
  fields, defaults = dict(_fields(run.config)), dict(_fields(run.defaults))
  differ, same = [], []
  for name, value in fields.items():
    # A pipeline's stages have the defaults of a single one.
    plain = name.split(".", 2)[-1] if name.startswith("pipeline.") else name
    default = defaults.get(name, defaults.get(plain, "none"))
    row = [html.tag("code", name), value, default]
    (same if value == default else differ).append(row)
  return html.details(
    f"Configuration: {len(differ)} of {len(fields)} fields differ from the "
    "defaults",
    html.table(["field", "value", "default"], differ),
    html.details(
      f"{len(same)} fields as by default",
      html.table(["field", "value"], [row[:2] for row in same]),
    ),
  )


def _fields(config: dict[str, Any], prefix: str = "") -> Iterator:
  """Dotted names of the leaves, and their values as JSON."""
  for name, value in config.items():
    if isinstance(value, dict):
      yield from _fields(value, f"{prefix}{name}.")
    else:
      yield f"{prefix}{name}", json.dumps(value, ensure_ascii=False)
