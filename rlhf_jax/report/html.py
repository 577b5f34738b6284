"""Elements of the report's page, and figures as text.

`tag` is the one way into the page. It makes control characters and marks of
writing direction visible, and `ElementTree` escapes the rest, so that a text of
a model is never more than text.
"""

import base64
from collections.abc import Iterable, Mapping, Sequence
import math
from typing import Any
import unicodedata
from xml.etree import ElementTree

Node = ElementTree.Element | str
_HIDDEN = {"Cc", "Cf", "Co", "Cs", "Zl", "Zp"}  # Categories of Unicode.


def tag(
  name: str, /, *children: Node, **attributes: str
) -> ElementTree.Element:
  """An element; `class_` is `class`, `http_equiv` is `http-equiv`."""
  element = ElementTree.Element(name)
  for attribute, text in attributes.items():
    element.set(attribute.rstrip("_").replace("_", "-"), visible(text))
  for child in children:
    if not isinstance(child, str):
      element.append(child)
    elif len(element):
      element[-1].tail = (element[-1].tail or "") + visible(child)
    else:
      element.text = (element.text or "") + visible(child)
  return element


def visible(text: str) -> str:
  r"""The text with characters that one cannot see as `\x1b`, `\u202e`, …."""
  return "".join(
    c.encode("unicode_escape").decode()
    if c != "\n" and unicodedata.category(c) in _HIDDEN
    else c
    for c in text
  )


def table(
  columns: Sequence[str], rows: Iterable[Sequence[Node]], *, caption: str = ""
) -> ElementTree.Element:
  """A table in a box of its own, which scrolls where the page is narrow.

  Its caption stands before it: one in it would be as narrow as its columns.
  """
  head = tag("thead", tag("tr", *(tag("th", column) for column in columns)))
  body = tag("tbody", *(tag("tr", *(tag("td", c) for c in r)) for r in rows))
  notes = [tag("p", caption, class_="faint")] if caption else []
  return tag("div", *notes, tag("table", head, body), class_="scroll")


def records(
  rows: Sequence[Mapping[str, Any]], *, caption: str
) -> ElementTree.Element:
  """Records with the same names as a table; errors beside their figures."""
  names = [name for name in rows[0] if not name.endswith("_se")]
  cells = ([_entry(row, name) for name in names] for row in rows)
  columns = [name.replace("_", " ") for name in names]
  return table(columns, cells, caption=caption)


def image(content: bytes, kind: str, alt: str) -> ElementTree.Element:
  """A picture that is within the page."""
  data = base64.b64encode(content).decode()
  return tag("img", src=f"data:image/{kind};base64,{data}", alt=alt)


def details(
  summary: str, *children: Node, is_open: bool = False
) -> ElementTree.Element:
  """What can be folded away."""
  state = {"open": ""} if is_open else {}
  return tag("details", tag("summary", summary), *children, **state)


def figure(metrics: Mapping[str, float], name: str) -> str:
  """`1.23 ± 0.04`: as many digits as show two of the error's."""
  if name not in metrics:
    return "–"
  value, error = metrics[name], metrics.get(f"{name}_se")
  if error is None or not (math.isfinite(value + error) and error > 0):
    return cell(float(value))
  digits = min(max(1 - math.floor(math.log10(error)), 0), 6)
  text = f"{value:,.{digits}f}\u00a0±\u00a0{error:.{digits}f}"
  return text.replace("-", "−")


def cell(value: Any) -> str:
  """A value that was read, for a table."""
  if value is None:
    return "–"
  if isinstance(value, bool):
    return "yes" if value else "no"
  if isinstance(value, list):
    return ", ".join(map(cell, value))
  if isinstance(value, float):
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return text.replace("-", "−")
  return str(value)


def _entry(row: Mapping[str, Any], name: str) -> str:
  """A cell of `records`; intervals are {"mean", "low", "high"}."""
  value = row.get(name)
  if isinstance(value, Mapping) and value.keys() == {"mean", "low", "high"}:
    mean, low, high = (cell(value[part]) for part in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})".replace(" ", "\u00a0")
  if isinstance(value, float) and name != "beta":
    return figure(row, name)
  return cell(value)
