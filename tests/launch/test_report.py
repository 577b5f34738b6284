"""The command line of the report."""

import pathlib
import subprocess
import sys

from absl import flags

from configs import defaults
from configs.studies import kl_gradients
from launch import app, report
from rlhf_jax.storage import workdir as workdir_lib

ROOT = pathlib.Path(__file__).parents[2]


def make(path):
  config = defaults.get_config().to_dict()
  workdir_lib.Workdir.open(path, config, resume=False).close()
  return path


def call(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "launch.report", *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )


def test_the_defaults_of_a_config():
  """A study that is no longer here has none; no name leads elsewhere."""
  assert report.default_config({"stage": "ppo"}) == (
    defaults.get_config().to_dict()
  )
  assert report.default_config({"study": "kl_gradients"}) == (
    kl_gradients.get_config().to_dict()
  )
  for name in ("forgotten", "__init__", "../defaults", ""):
    assert report.default_config({"study": name}) == {}


def test_several_workdirs_and_an_output(tmp_path):
  """From a shell."""
  a, b = make(tmp_path / "a"), make(tmp_path / "b")
  output = tmp_path / "both.html"
  done = call(f"--workdir={a},{b}", f"--output={output}")
  assert (done.returncode, done.stderr) == (0, "")
  assert done.stdout == f"{output}: 2 runs; open it in a browser\n"
  assert output.read_text().startswith("<!DOCTYPE html>")


def test_a_workdir_with_a_comma_in_its_name(tmp_path):
  """A sweep over seeds names its members so."""
  member = make(tmp_path / "beta=0.1,seed=2")
  values = flags.FlagValues()
  app.define_flags(values)
  flags.DEFINE_string("output", None, "", flag_values=values)
  app.parse(["report", f"--workdir={member}"], values, required=["workdir"])
  report.main(values)
  assert (member / "report.html").exists()


def test_a_mistake_ends_in_one_line(tmp_path):
  """Bad input 52, from a shell."""
  done = call(f"--workdir={tmp_path}")
  assert done.returncode == 2 and done.stdout == ""
  assert done.stderr.startswith(f"{tmp_path}: no run in it")
  assert len(done.stderr.splitlines()) == 1
  assert not list(tmp_path.iterdir())
  done = call()
  assert done.returncode == 2
  assert done.stderr == "--workdir: missing; wanted --workdir=VALUE\n"
