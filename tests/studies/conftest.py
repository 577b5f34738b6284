"""What the tests of all studies share: the reduced run, and two questions.

`tests/studies/test_NAME.py` tests the study NAME.
"""

from collections.abc import Callable
import importlib
import json
import pathlib
from typing import Any

import pytest

from rlhf_jax import errors
from rlhf_jax.settings import devices
from rlhf_jax.stages import pipeline
from rlhf_jax.studies import study


@pytest.fixture(autouse=True, scope="module")
def _divided():
  """Devices are cores, as in `launch.study`: a run has one, a sweep all."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(devices, "_divided", True)
    yield


def _config(request: pytest.FixtureRequest, arg: str):
  name = request.path.stem.removeprefix("test_")
  return importlib.import_module(f"configs.studies.{name}").get_config(arg)


@pytest.fixture(scope="module")
def workdir(request, tmp_path_factory) -> pathlib.Path:
  """The workdir of the file's study, after a run of its preset `reduced`."""
  path = tmp_path_factory.mktemp(request.path.stem) / "run"
  study.run(_config(request, "reduced"), str(path), resume=False)
  assert (path / "figure.png").stat().st_size > 10_000
  return path


@pytest.fixture
def tables(workdir) -> dict[str, Any]:
  """The tables of the reduced run's record, by name."""
  return study.read(workdir)["tables"]


@pytest.fixture
def resume(request, workdir, monkeypatch) -> Callable[[], None]:
  """Goes on with a study that lacks its record alone: nothing is trained."""

  def of():
    fail = lambda *_, **__: pytest.fail("trained again")
    monkeypatch.setattr(pipeline, "run_stage", fail)
    before = study.read(workdir)
    (workdir / "study.json").unlink()
    study.run(_config(request, "reduced"), str(workdir), resume=True)
    timeless = lambda record: json.dumps(record | {"wall_s": 0})
    assert timeless(study.read(workdir)) == timeless(before)

  return of


@pytest.fixture
def refusal(request) -> Callable[[str], str]:
  """The line that refuses the reduced preset with other values in fields."""

  def of(changes: str) -> str:
    with pytest.raises(errors.UserError) as caught:
      study.check(_config(request, f"reduced,{changes}"))
    (line,) = str(caught.value).splitlines()
    return line

  return of
