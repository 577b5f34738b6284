"""The presets, and the argument that picks and changes one."""

import importlib
import json
import pathlib
import shlex
import subprocess
import sys

import ml_collections
import pytest

from configs import defaults, dpo, ppo, quickstart, reward_model, sft

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("[a-z]*.py"))

PRESETS = [
  (sft, "toy"),
  (sft, "stories"),
  (reward_model, "toy"),
  (reward_model, "hh"),
  (ppo, "toy"),
  (ppo, "stories"),
  (ppo, "1b"),
  (ppo, "8b"),
  (dpo, "toy"),
  (dpo, "hh"),
  (quickstart, "toy"),
]


def make(**sections):
  """A config of two presets, small enough to read."""
  config = ml_collections.ConfigDict(
    {"name": "a", "on": False, "size": 1, "rate": 0.5, "ids": (1,), "kl": {}}
  )
  config.kl.beta = 0.1
  config.update(sections)
  return config


def parse(argument):
  presets = {"first": make, "second": lambda: make(name="b")}
  return defaults.parse(argument, presets)


@pytest.mark.parametrize(
  "module, preset",
  PRESETS,
  ids=[f"{m.__name__}:{p}" for m, p in PRESETS],
)
def test_presets_are_complete(module, preset):
  config = module.get_config(preset)
  defaults.check_complete(config)
  assert json.loads(config.to_json_best_effort())["stage"] == config.stage
  with pytest.raises(AttributeError, match="beta"):
    config.kl.betta = 1.0


@pytest.mark.parametrize("name", [path.stem for path in CONFIGS])
def test_commands_in_a_docstring_parse(name):
  """Each override is of a field, and of its type."""
  module = importlib.import_module(f"configs.{name}")
  for line in (module.__doc__ or "").replace("\\\n", " ").splitlines():
    if not line.startswith("    python -m launch."):
      continue
    words = [word.lstrip("-") for word in shlex.split(line)]
    (config,) = [w for w in words if w.startswith("config=")]
    preset = config.partition(":")[2]
    overrides = [
      word.removeprefix("config.") for word in words if word[:7] == "config."
    ]
    defaults.apply_overrides(module.get_config(preset), overrides)


def test_no_argument_is_the_first_preset():
  assert parse("").name == "a"
  assert parse("kl.beta=0.2").kl.beta == 0.2
  assert parse("second").name == "b"
  assert sft.get_config() == sft.toy()


def test_values_are_read_by_the_type_of_their_field():
  config = parse("second,on=true,size=3,rate=1,ids=4,5,name=x=y,kl.beta=1e-3")
  assert (config.on, config.size, config.name) == (True, 3, "x=y")
  assert isinstance(config.rate, float) and config.rate == 1.0
  assert config.ids == (4, 5)
  assert config.kl.beta == 1e-3
  assert parse("ids=()").ids == ()
  assert parse("ids=(2,3),size=2").ids == (2, 3)
  assert parse("ids=7").ids == (7,)
  # Paths are quoted within a tuple, and may hold what divides overrides.
  assert parse("ids='a/beta=0','b',size=2").ids == ("a/beta=0", "b")
  assert parse("on=False,name=").name == ""


@pytest.mark.parametrize(
  "argument, message",
  [
    ("third", "no preset 'third'; the presets are first, second"),
    ("kl.betta=1", r"config\.kl\.betta: .*Did you mean 'kl\.beta'\?"),
    ("beta=1", r"config\.beta: .*Did you mean 'kl\.beta'\?"),
    ("nothing_alike=1", "no such field; configs/defaults.py lists"),
    ("kl=1", "config.kl: no such field"),
    ("size=1.5", "config.size: '1.5' .* wanted int, such as 1"),
    ("rate=fast", "config.rate: 'fast' .* wanted float"),
    ("on=yes", "config.on: 'yes' .* wanted bool"),
    ("ids=(1", r"config.ids: '\(1' .* wanted tuple"),
  ],
)
def test_mistakes_in_an_argument(argument, message):
  """Bad inputs 1 and 2."""
  with pytest.raises(ValueError, match=message):
    parse(argument)


def _without(config, name):
  del config[name]


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda c: c.update(stge="ppo"), r"config\.stge: .*Did you mean 'stage'"),
    (lambda c: _without(c, "seed"), r"config\.seed: missing"),
    (lambda c: _without(c.kl, "beta"), r"config\.kl\.beta: missing"),
    (lambda c: _without(c, "pipeline"), r"config\.pipeline: missing"),
    (lambda c: c.update(pipeline={"sft": {}}), r"config\.pipeline\.sft\."),
    (
      lambda c: c.update_from_flattened_dict({"seed": True}),
      "config.seed: True; wanted int, such as 0",
    ),
  ],
)
def test_a_config_from_elsewhere_must_have_the_same_fields(change, message):
  """Bad inputs 1 and 2."""
  config = defaults.get_config()
  config.unlock()
  change(config)
  with pytest.raises(ValueError, match=message):
    defaults.check_complete(config)


@pytest.mark.parametrize("module", [ppo, quickstart])
def test_a_pipelines_stages_follow_its_seed_and_network(module):
  config = module.get_config("seed=4,model.width=32,pipeline.sft.seed=9")
  stages = config.pipeline
  assert list(stages) == ["reward_model", "sft"]
  assert [stages[name].stage for name in stages] == list(stages)
  assert not any(stages[name].pipeline for name in stages)
  assert (config.seed, stages.reward_model.seed, stages.sft.seed) == (4, 4, 9)
  assert stages.sft.model.width == stages.reward_model.model.width == 32
  assert stages.sft.train.steps == sft.toy().train.steps


def test_a_pipelines_stages_have_its_language_and_judge():
  """Not its opening: narrow PPO on prompts that a broad policy knows."""
  config = ppo.get_config(
    "data.language=notes,data.judge_temperature=2,data.opening=person,"
    "pipeline.reward_model.data.judge_temperature=0.5"
  )
  for name, temperature in (("sft", 2.0), ("reward_model", 0.5)):
    data = config.pipeline[name].data
    found = data.language, data.judge_temperature, data.opening
    assert found == ("notes", temperature, "")


def test_full_sizes_have_the_published_parameter_counts():
  """Of the released checkpoints: 1,235,814,400 and 8,030,261,248."""
  counts = []
  for preset in ("1b", "8b"):
    m = ppo.get_config(preset).model
    attention = 2 * m.width * m.head_size * (m.heads + m.kv_heads)
    layer = attention + 3 * m.width * m.mlp_width + 2 * m.width
    embeddings = (1 if m.tie_embeddings else 2) * m.vocab_size * m.width
    counts.append(embeddings + m.layers * layer + m.width)
  assert counts == [1_235_814_400, 8_030_261_248]


def test_configs_and_their_checks_load_without_jax():
  program = "\n".join(
    [
      "import sys",
      "from configs import ppo, quickstart, reward_model, sft",
      "from launch import train",
      "from rlhf_jax.settings import validate",
      "validate.validate(quickstart.get_config(), device_count=1)",
      "assert 'jax' not in sys.modules",
    ]
  )
  subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
