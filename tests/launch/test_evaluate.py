"""The command `launch.evaluate`, and the configs that it takes."""

import pathlib
import sys

from absl import flags
import pytest

from configs import defaults, ppo
from configs import evaluate as evaluate_config
from launch import app, evaluate
from rlhf_jax import errors
from rlhf_jax.settings import validate

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def parse(name, *arguments):
  # The loader executes the next config in the same module, over the last one.
  sys.modules.pop("config_config", None)
  values = flags.FlagValues()
  app.define_flags(values)
  line = ["program", f"--config={CONFIGS / name}", "--workdir=w", *arguments]
  app.parse(line, values, check=evaluate.check)
  return values.config


def refusal(config, *overrides):
  config = config.copy_and_resolve_references()
  defaults.apply_overrides(config, overrides)
  with pytest.raises(errors.UserError) as caught:
    validate.validate_fields(config)
  assert len(str(caught.value).splitlines()) == 1
  return str(caught.value)


@pytest.mark.parametrize("preset", ["toy", "stories"])
def test_presets_can_be_run(preset, tmp_path):
  config = evaluate_config.get_config(preset)
  defaults.check_complete(config)
  with config.unlocked():
    config.policy.path = str(tmp_path)
  validate.validate(config, device_count=8)


def test_stories_are_drawn_as_in_training():
  config = evaluate_config.get_config("stories")
  assert config.rollout == ppo.get_config("stories").rollout


def test_another_stage_is_refused():
  assert parse("evaluate.py").stage == "evaluate"
  with pytest.raises(errors.UserError, match="wanted 'evaluate'"):
    parse("sft.py")
  with pytest.raises(errors.UserError, match=r"config\.stage: 'ppo'"):
    parse("evaluate.py", "--config.stage=ppo")


def test_refusals(tmp_path):
  """Without JAX, before anything is loaded."""
  config = evaluate_config.get_config()
  assert refusal(config).startswith("config.policy.path: ''; wanted the policy")
  with config.unlocked():
    config.policy.path = str(tmp_path)
  validate.validate_fields(config)
  for override, complaint in (
    ("evaluate.prompts=1", "config.evaluate.prompts: 1; wanted at least 2"),
    ("evaluate.best_of=-1", "config.evaluate.best_of: -1; wanted at least 0"),
    ("evaluate.against=no/such", "config.evaluate.against: 'no/such'"),
    ("evaluate.corpora='no.txt'", "config.evaluate.corpora: 'no.txt'"),
    ("sweep.betas=0.1", "config.sweep.betas: (0.1,); wanted ()"),
  ):
    assert refusal(config, override).startswith(complaint)


def test_corpora_of_one_name(tmp_path):
  """Their figures would have one name."""
  config = evaluate_config.get_config()
  paths = [tmp_path / folder / "wiki.txt" for folder in ("a", "b")]
  for path in paths:
    path.parent.mkdir()
    path.write_text("text")
  override = f"evaluate.corpora='{paths[0]}','{paths[1]}'"
  message = refusal(config, f"policy.path={tmp_path}", override)
  assert "wanted files of different names" in message
