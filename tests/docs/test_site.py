"""The site builds without a warning and asks the network for nothing.

Mutants that were tried and fail here: `theme.font` and the plugin `offline`,
each of which brings a stylesheet or a script from elsewhere; an image by its
address; a page that is not in the navigation; an anchor that is not there.
"""

from html import parser
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
LOADED = {  # Tag → the attribute that a browser follows by itself.
  "script": "src",
  "link": "href",
  "img": "src",
  "source": "src",
  "iframe": "src",
}
UNASKED = {"canonical", "next", "prev"}  # Links that nothing is loaded from.
LARGEST = 200_000  # bytes of a picture of docs/images


class Loads(parser.HTMLParser):
  """What a page makes the browser load, and the text of its styles."""

  def __init__(self):
    super().__init__()
    self.addresses = []

  def handle_starttag(self, tag, attributes):
    found = dict(attributes)
    if tag == "link" and found.get("rel") in UNASKED:
      return
    if address := found.get(LOADED.get(tag, "")):
      self.addresses.append(address)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
  pytest.importorskip("mkdocs", reason="mkdocs-material is not installed")
  directory = tmp_path_factory.mktemp("site")
  # Not --quiet: warnings that are not logged are no errors to --strict.
  command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
  done = subprocess.run(
    [*command, "--site-dir", str(directory)],
    cwd=ROOT,
    env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert "WARNING" not in done.stderr
  return directory


def test_every_page_is_there(site):
  pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
  assert pages <= {path.stem for path in site.glob("*.html")}


def test_nothing_is_asked_of_the_network(site):
  pages = list(site.rglob("*.html"))
  assert pages
  for page in pages:
    loads = Loads()
    text = page.read_text()
    loads.feed(text)
    assert len(loads.addresses) > 2
    for address in loads.addresses:
      assert not re.match(r"(?:\w+:)?//", address), (page.name, address)
      folder = site if address.startswith("/") else page.parent  # 404.html
      assert (folder / address.split("?")[0].lstrip("/")).exists(), address
    # Maths and diagrams that a script would fetch a library for.
    assert not re.search('class="(arithmatex|mermaid)', text)
  for sheet in site.rglob("*.css"):
    addresses = re.findall(
      r"(?:url\(|@import)\s*['\"]?([^'\")]+)", sheet.read_text()
    )
    assert not [a for a in addresses if re.match(r"(?:\w+:)?//", a)]


def test_the_optimum_keeps_its_star(site):
  """An asterisk behind π or J begins no emphasis, as Markdown would have it."""
  pages = {path.stem: path.read_text() for path in site.glob("*.html")}
  for path in (ROOT / "docs").glob("*.md"):
    stars = len(re.findall(r"[πJ]\\?\*", path.read_text()))
    assert len(re.findall(r"[πJ]\*", pages[path.stem])) == stars, path.name


def test_pictures_are_of_a_sensible_size():
  pictures = list((ROOT / "docs" / "images").iterdir())
  assert pictures
  for picture in pictures:
    assert picture.stat().st_size < LARGEST, picture.name
