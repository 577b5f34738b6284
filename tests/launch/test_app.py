"""The command line: what it accepts, and how it refuses the rest."""

import pathlib
import subprocess
import sys
import types

from absl import flags
import pytest

from launch import app, train
from rlhf_jax import errors, stages

ROOT = pathlib.Path(__file__).parents[2]
PPO = str(ROOT / "configs/ppo.py")


def parse(*arguments, required=("config", "workdir"), **options):
  # The loader executes the next config in the same module, over the last one.
  sys.modules.pop("config_config", None)
  values = flags.FlagValues()
  app.define_flags(values)
  app.parse(["program", *arguments], values, required=required, **options)
  return values


def refusal(*arguments):
  with pytest.raises(errors.UserError) as caught:
    parse(*arguments)
  assert caught.value.exit_code == 2
  assert len(str(caught.value).splitlines()) == 1
  return str(caught.value)


@pytest.fixture
def config_file(tmp_path):
  def write(*lines):
    path = tmp_path / "mine.py"
    path.write_text("\n".join(lines) + "\n")
    return str(path)

  return write


def test_flags_and_overrides():
  values = parse(
    f"--config={PPO}:toy,kl.beta=0.2,train.steps=7",
    "--workdir=runs/a",
    "--config.kl.beta=0.3",
    "--config.optimizer.learning_rate",
    "1e-5",
    "--config.rollout.stop_ids",
    "-1",
    "--config.sweep.betas=0,0.1",
    "--config.policy.path=a=b",
    "--resume",
  )
  config = values.config
  assert config.is_locked and config.pipeline.sft.is_locked
  assert (config.kl.beta, config.train.steps) == (0.3, 7)
  assert config.optimizer.learning_rate == 1e-5
  assert config.sweep.betas == (0, 0.1)
  assert config.rollout.stop_ids == (-1,)
  assert config.policy.path == "a=b"
  assert (values.workdir, values.resume, values.verbose) == (
    "runs/a",
    True,
    False,
  )


def test_a_command_without_a_config():
  values = parse("--workdir=w", required=["workdir"])
  assert values.config is None


@pytest.mark.parametrize(
  "arguments, message",
  [
    ([], "--config: missing; wanted --config=VALUE"),
    (["--config="], "--workdir: missing"),
    (["--workdir="], "--workdir: missing"),
    (["--config.learning_rate=1"], "Did you mean 'optimizer.learning_rate'"),
    (["--config.kl.betta=1"], "--config.kl.betta: no such field. Did you mean"),
    (["--config.kll.beta=1"], "Did you mean 'kl.beta'?"),
    (["--config.kl.beta=x"], "--config.kl.beta: 'x' is not of its type"),
    (["--config.train.steps=1.5"], "wanted int, such as 200"),
    (["--config.kl={}"], "--config.kl: no such field"),
    (["--config.kl.beta"], "--config.kl.beta: '' is not of its type"),
    (["--wrokdir=a"], "--wrokdir=a: unknown flag. Did you mean 'workdir'?"),
    (["--confg.kl.beta=1"], "unknown flag. Did you mean 'config'?"),
    (["stray"], "stray: unknown argument"),
    (["--resume=maybe"], "flag --resume=maybe"),
  ],
)
def test_bad_flags(arguments, message):
  """Bad inputs 1 and 2."""
  given = "".join(arguments)
  if arguments and "workdir=" not in given and given != "--config=":
    arguments = ["--workdir=w", *arguments]
  if arguments and given != "--config=":
    arguments = [f"--config={PPO}", *arguments]
  assert message in refusal(*arguments)


def test_an_override_of_no_config():
  with pytest.raises(
    errors.UserError, match=r"--config\.kl\.beta=1: .*no config"
  ):
    parse("--config.kl.beta=1", required=[])


FROM_DEFAULTS = ("from configs import defaults", "def get_config():")


@pytest.mark.parametrize(
  "lines, message",
  [
    (["import nothing_here"], ":1: ModuleNotFoundError: No module named"),
    (["", "x = ("], ":2: '(' was never closed"),
    (["x = 1"], ": no get_config() in it"),
    (["def get_config():", "  return {}"], "returned no ConfigDict"),
    (["def get_config():", "  return {}['x']"], ":2: KeyError: x"),
    (["def get_config():", "  raise ValueError('q\\nr')"], ": r"),
    (["def get_config():", "  open('/nowhere')"], "No such file"),
    (
      [
        "from ml_collections import ConfigDict",
        "def get_config():",
        "  return ConfigDict({'stage': 'ppo'})",
      ],
      ".checkpoint.every: missing; start from",
    ),
    (
      [*FROM_DEFAULTS, "  c = defaults.get_config()", "  c.kl.betta = 1"],
      ':4: AttributeError: Did you mean "beta" instead of "betta"?',
    ),
    (
      [*FROM_DEFAULTS, "  c = defaults.get_config()", "  c.seed = 'x'"],
      "TypeError: Could not override field 'seed'",
    ),
  ],
)
def test_bad_config_files(config_file, lines, message):
  """Bad inputs 1, 2 and 14."""
  path = config_file(*lines)
  found = refusal(f"--config={path}", "--workdir=w")
  assert path in found or "/nowhere" in found
  assert message in found


@pytest.mark.parametrize("more", [[], ["--config.kl.beta=1"]])
def test_a_config_file_that_is_not_there(tmp_path, more):
  """Bad input 14."""
  for path in (tmp_path / "no.py", tmp_path):
    found = refusal(f"--config={path}", "--workdir=w", *more)
    assert found.startswith(f"{path}: [Errno ")


def test_a_command_may_have_a_config_of_its_own(config_file):
  """Checked as it is in its file, and again with its overrides."""

  def check(config):
    if config.size > 3:
      raise ValueError(f"config.size: {config.size}; wanted at most 3")

  line = "  return ConfigDict({'size': %d})"
  lines = ["from ml_collections import ConfigDict", "def get_config():"]
  path = config_file(*lines, line % 2)
  given = [f"--config={path}", "--workdir=w"]
  assert parse(*given, "--config.size=3", check=check).config.size == 3
  with pytest.raises(errors.UserError, match=r"^--config\.size: 4; wanted"):
    parse(*given, "--config.size=4", check=check)
  with pytest.raises(errors.UserError, match=r"^--config\.sise: no such field"):
    parse(*given, "--config.sise=4", check=check)
  config_file(*lines, line % 5)
  with pytest.raises(errors.UserError, match=r"mine\.py: config\.size: 5;"):
    parse(*given, check=check)


def test_bad_presets():
  found = refusal(f"--config={PPO}:toi", "--workdir=w")
  assert "no preset 'toi'; the presets are toy, stories, 1b, 8b" in found
  found = refusal(f"--config={PPO}:toy,kl.betta=1", "--workdir=w")
  assert f"{PPO}:toy,kl.betta=1: config.kl.betta: no such field" in found


class Preempted(errors.UserError):
  exit_code = 42


def raise_(error):
  raise error


def test_exit_codes(capsys, monkeypatch):
  monkeypatch.setattr(sys, "argv", ["program"])
  assert app.exit_code(lambda: None) == 0
  assert app.exit_code(lambda: raise_(errors.UserError("a\nb"))) == 2
  assert capsys.readouterr().err == "a b\n"
  assert app.exit_code(lambda: raise_(Preempted("c"))) == 42
  assert capsys.readouterr().err == "c\n"
  assert app.exit_code(lambda: raise_(KeyboardInterrupt())) == 130
  assert capsys.readouterr().err.startswith("interrupted; ")
  with pytest.raises(ZeroDivisionError):
    app.exit_code(lambda: raise_(ZeroDivisionError()))


def test_verbose_shows_the_traceback(capsys, monkeypatch):
  monkeypatch.setattr(sys, "argv", ["program", "--verbose"])
  app.exit_code(lambda: raise_(errors.UserError("message")))
  lines = capsys.readouterr().err.splitlines()
  assert lines[0].startswith("Traceback") and lines[-1] == "message"


def test_train_checks_and_then_runs_the_stages(monkeypatch):
  calls = []
  pipeline = types.SimpleNamespace(
    run=lambda config, workdir, *, resume: calls.append(
      (config.train.steps, workdir, resume)
    )
  )
  monkeypatch.setattr(stages, "pipeline", pipeline, raising=False)
  arguments = [f"--config={PPO}:toy,train.steps=3", "--workdir=w", "--resume"]
  train.main(parse(*arguments))
  assert calls == [(3, "w", True)]
  for bad in ("--config.kl.beta=-1", "--config.mesh.data=64"):
    with pytest.raises(errors.UserError, match=r"config\.(kl\.beta|mesh): "):
      train.main(parse(*arguments, bad))
  assert len(calls) == 1


@pytest.mark.parametrize(
  "bad, message",
  [
    ("--config.kl.betta=1", "--config.kl.betta: no such field."),
    ("--config.rollout.temperature=0", "config.rollout.temperature: 0.0;"),
  ],
)
def test_the_command_ends_in_one_line(tmp_path, bad, message):
  """From a shell: exit code 2, a line on stderr, nothing on disk."""
  workdir = tmp_path / "run"
  command = [sys.executable, "-m", "launch.train", "--config=configs/ppo.py"]
  done = subprocess.run(
    [*command, f"--workdir={workdir}", bad],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 2
  assert done.stderr.startswith(message) and done.stderr.count("\n") == 1
  assert done.stdout == "" and not workdir.exists()
