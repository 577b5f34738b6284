"""One self-contained HTML file about the runs in one or several workdirs."""

from collections.abc import Callable, Sequence
import datetime
import os
import pathlib

from rlhf_jax import errors
from rlhf_jax.report import found, page


def run(
  workdirs: Sequence[str],
  output: str | None,
  *,
  defaults: Callable[[found.Config], found.Config],
) -> str:
  """Writes the report and says where it is.

  Args:
    workdirs: Each a workdir, or a folder of them.
    output: The HTML file; None: report.html in the first workdir.
    defaults: The config that a run's config started from, by that config.

  Raises:
    UserError: A path holds no run, or a file in it is damaged; nothing is
      written then. The report cannot be written.
  """
  places = [_place(workdir) for workdir in dict.fromkeys(workdirs)]
  file = pathlib.Path(output) if output else places[0] / "report.html"
  if file.suffix != ".html":
    raise errors.UserError(
      f"--output: {file}; the name of an .html file is wanted"
    )
  runs = [run for place in places for run in found.read(place, defaults)]
  now = datetime.datetime.now().astimezone()
  title = f"rlhf_jax report: {', '.join(map(str, places))}"
  _write(file, page.render(runs, title=title, made=now))
  count = f"{len(runs)} runs" if len(runs) > 1 else "1 run"
  return f"{file}: {count}; open it in a browser"


def _place(workdir: str) -> pathlib.Path:
  place = pathlib.Path(workdir)
  if not workdir or not workdir.isprintable() or not place.is_dir():
    raise errors.UserError(
      f"--workdir: {workdir!r} is no directory; wanted is one that a run has "
      "written, or several with commas between"
    )
  return place


def _write(file: pathlib.Path, text: str) -> None:
  """Replaces the report, so that a kill leaves the old one or the new one."""
  temporary = file.with_name(f".{file.name}.writing")
  try:
    with temporary.open("w", encoding="utf-8") as opened:
      opened.write(text)
      opened.flush()
      os.fsync(opened.fileno())
    temporary.replace(file)
  except OSError as error:
    raise errors.UserError(
      f"{file}: cannot be written: {error.strerror}; free space, change its "
      "mode, or give another --output"
    ) from error
