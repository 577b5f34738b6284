"""The command line of studies."""

import pathlib
import subprocess
import sys

from absl import flags
import pytest

from configs.studies import kl_gradients
from launch import app, study
from rlhf_jax import errors
from rlhf_jax import studies as studies_lib

ROOT = pathlib.Path(__file__).parents[2]
STUDY = str(ROOT / "configs/studies/kl_gradients.py")


def parse(*arguments, config=STUDY):
  # The loader executes the next config in the same module, over the last one.
  sys.modules.pop("config_config", None)
  values = flags.FlagValues()
  app.define_flags(values)
  flags.DEFINE_bool("all", False, "", flag_values=values)
  flags.DEFINE_string("preset", "full", "", flag_values=values)
  words = ["program", f"--config={config}", "--workdir=w", *arguments]
  app.parse(words, values, check=study.check)
  return values


def test_fields_are_those_of_the_study():
  values = parse(
    "--config.seed=3",
    "--config.distances=0.5,1",
    "--config.ppo.beta=1",
    "--config.estimates.top_k=2",
    config=f"{STUDY}:reduced,responses=500",
  )
  config = values.config
  assert (config.study, config.seed) == ("kl_gradients", 3)
  assert config.distances == (0.5, 1)
  assert (config.ppo.beta, config.estimates.top_k) == (1.0, 2)
  assert config.responses == 500


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    (
      "--config.respones=1",
      "--config.respones: no such field. Did you mean 'responses'?",
    ),
    ("--config.ppo.bta=1", "Did you mean 'ppo.beta'?"),
    ("--config.kl.beta=1", "--config.kl.beta: no such field"),
    ("--config.responses=x", "wanted int, such as 50000"),
    (
      "--config.study=nothing",
      "--config.study: 'nothing'; wanted ",
    ),
    ("--config.study=../x", "--config.study: '../x'; wanted "),
  ],
)
def test_mistakes_on_the_command_line(argument, message):
  """Bad inputs 1 and 2."""
  with pytest.raises(errors.UserError) as caught:
    parse(argument)
  assert message in str(caught.value)
  assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
  ("line", "message"),
  [
    (
      "c.respones = 1",
      "config.respones: no such field. Did you mean 'resp",
    ),
    ("del c['responses']", "config.responses: missing; start from configs."),
    ("c.ppo = 1", "config.ppo: no such field"),
    ("c.unlock(); c.study = 'kl'", "config.study: 'kl'; wanted "),
    ("del c['study']", "config.study: missing; start from a file in configs"),
    (
      "c.update_from_flattened_dict({'seed': True})",
      "config.seed: True; wanted int, such as 0",
    ),
  ],
)
def test_a_config_of_another_shape(tmp_path, line, message):
  """Bad inputs 1, 2 and 14."""
  path = tmp_path / "mine.py"
  lines = [
    "from configs.studies import kl_gradients",
    "def get_config():",
    "  c = kl_gradients.get_config()",
    "  c.unlock()",
    "  c.ppo.unlock()",
    *(["  del c['ppo']"] if "c.ppo =" in line else []),
    f"  {line}",
    "  return c",
  ]
  path.write_text("\n".join(lines) + "\n")
  with pytest.raises(errors.UserError) as caught:
    parse(config=str(path))
  assert str(caught.value).startswith(f"{path}: ")
  assert message in str(caught.value)


def test_an_unknown_study_is_answered_with_those_that_exist():
  with pytest.raises(errors.UserError, match=r"wanted .*\bkl_gradients\b"):
    parse("--config.study=kl_gradient")


def test_a_config_of_another_command():
  with pytest.raises(errors.UserError, match=r"config\.study: missing"):
    parse(config=str(ROOT / "configs/ppo.py"))


def test_presets_have_the_same_fields():
  for preset in ("full", "reduced"):
    study.check(kl_gradients.get_config(preset))


def test_main_runs_the_study(monkeypatch):
  calls = []

  class Framework:
    @staticmethod
    def run(config, workdir, *, resume):
      calls.append((config.seed, workdir, resume))

  monkeypatch.setattr(studies_lib, "study", Framework, raising=False)
  study.main(parse("--config.seed=5", "--resume"))
  assert calls == [(5, "w", True)]


def test_the_command_ends_in_one_line(tmp_path):
  """From a shell: exit code 2, a line on stderr, nothing on disk."""
  workdir = tmp_path / "run"
  command = [sys.executable, "-m", "launch.study", f"--workdir={workdir}"]
  done = subprocess.run(
    [*command, f"--config={STUDY}", "--config.batches=1"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 2
  assert done.stderr == "config.batches: 1; wanted 2 to 25000\n"
  assert done.stdout == "" and not workdir.exists()


@pytest.mark.parametrize(
  ("words", "message"),
  [
    ((), "--config: missing; wanted --config=configs/studies/NAME.py, or"),
    (("--all", f"--config={STUDY}"), "--config: beside --all"),
    (("--all", "--preset=small"), "--preset: 'small'; wanted full or reduced"),
    (("--all", "--config.seed=1"), "--config.seed=1: sets a field of no conf"),
  ],
)
def test_one_study_or_all(words, message, tmp_path):
  workdir = tmp_path / "run"
  done = subprocess.run(
    [sys.executable, "-m", "launch.study", f"--workdir={workdir}", *words],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
  assert message in done.stderr
  assert not workdir.exists()
