"""The command line of sweeps."""

import pathlib
import sys

from absl import flags
import pytest

from launch import app, sweep, train
from rlhf_jax import errors

ROOT = pathlib.Path(__file__).parents[2]


def config_of(monkeypatch, *words, config="configs/ppo.py"):
  """The config that training gets."""
  sys.modules.pop("config_config", None)
  values = flags.FlagValues()
  app.define_flags(values)
  for name in ("betas", "seeds"):
    flags.DEFINE_string(name, "", "", flag_values=values)
  app.parse(["program", f"--config={ROOT / config}", *words], values)
  got = []
  monkeypatch.setattr(train, "main", lambda values: got.append(values.config))
  sweep.main(values)
  return got[0]


def test_flags_set_the_members(monkeypatch):
  config = config_of(monkeypatch, "--workdir=w", "--betas=0,0.1", "--seeds=3,4")
  assert config.sweep.betas == (0, 0.1) and config.sweep.seeds == (3, 4)


def test_the_config_may_have_them(monkeypatch):
  config = config_of(
    monkeypatch, "--workdir=w", "--seeds=3", config="configs/quickstart.py"
  )
  assert len(config.sweep.betas) == 4 and config.sweep.seeds == (3,)


@pytest.mark.parametrize(
  ("words", "message"),
  [
    ((), "--betas: missing; wanted the penalties of the members"),
    (("--seeds=1,2",), "--betas: missing"),
    (("--betas=0,,1",), "--betas: '0,,1'; wanted numbers with commas"),
    (("--betas=0;1",), "--betas: '0;1'; wanted numbers with commas"),
    (("--betas=0,1", "--seeds=x"), "--seeds: 'x'; wanted numbers with commas"),
  ],
)
def test_mistakes(monkeypatch, words, message):
  with pytest.raises(errors.UserError) as caught:
    config_of(monkeypatch, "--workdir=w", *words)
  assert message in str(caught.value)
  assert len(str(caught.value).splitlines()) == 1


def test_a_repeated_beta_is_refused(monkeypatch, tmp_path):
  monkeypatch.setattr(sys, "argv", ["program"])
  values = flags.FlagValues()
  app.define_flags(values)
  for name in ("betas", "seeds"):
    flags.DEFINE_string(name, "", "", flag_values=values)
  sys.modules.pop("config_config", None)
  app.parse(
    [
      "program",
      f"--config={ROOT / 'configs/ppo.py'}",
      f"--workdir={tmp_path / 'run'}",
      "--betas=0.1,0.1",
    ],
    values,
  )
  with pytest.raises(errors.UserError, match="wanted each β once"):
    sweep.main(values)
  assert not (tmp_path / "run").exists()
