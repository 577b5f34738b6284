"""Stage `sft`: next-token training on prompts with their responses."""

from typing import Any

import jax
from ml_collections import ConfigDict
from rich import console as rich_console

from rlhf_jax import types
from rlhf_jax.data import sampling, texts
from rlhf_jax.settings import static
from rlhf_jax.stages import training
from rlhf_jax.steps import sft
from rlhf_jax.storage import pretrained as pretrained_lib
from rlhf_jax.storage import workdir as workdir_lib
from rlhf_jax.text import toy_language

GOLD_PROMPTS = 512  # responses that the SFT policy's own gold is measured on


def run(
  config: ConfigDict,
  workdir: workdir_lib.Workdir,
  *,
  console: rich_console.Console,
) -> dict[str, Any]:
  """Trains, leaves the policy in the workdir and returns the summary."""
  stage = training.begin(config, workdir, console)
  train, heldout = _texts(stage)
  settings = sft.SFTConfig(stage.start.model, static.logits_per_chunk(config))
  optimizer = stage.optimizer()
  state = stage.drive(
    sft.make_step(settings, optimizer),
    stage.state(stage.start.params, optimizer),
    arguments=lambda index: (stage.batch(train, index),),
    record=stage.recorder({"loss": "sft/loss"}),
    metadata={},
  )
  policy = stage.trained(state.params)
  evaluate = jax.jit(sft.row_logprobs, static_argnums=2)
  sums, counts = stage.measured(
    lambda batch: evaluate(state.params, batch, settings), heldout
  )
  measured = {"sft/heldout_loss": float(-sums.sum() / counts.sum())}
  if not config.data.path:
    measured |= _gold(policy, config)
  return stage.finish(policy, measured)


def _texts(stage: training.Stage) -> list[types.PackedTexts]:
  """Rows to train on, and rows that are held out."""
  of = stage.config, stage.start, stage.console
  path, opening = stage.config.data.path, stage.config.data.opening
  sides = texts.read(*of, stage="sft", path=path, opening=opening)
  return [texts.pack(*of, side, stage="sft", path=path) for side in sides]


def own_responses(
  policy: pretrained_lib.Pretrained, config: ConfigDict
) -> types.Sequences:
  """What a policy of the built-in language writes to prompts not trained on."""
  prompts = toy_language.of(config).sample_prompts(
    config.seed + 1, GOLD_PROMPTS, config.data.opening
  )
  prompts, _ = sampling.prompts_array(prompts, config, policy, "prompts")
  return sampling.sample(policy, prompts, config, seed=config.seed)


def _gold(policy, config):
  """The SFT policy's own gold, with which a later policy is compared."""
  gold_reward = jax.jit(toy_language.of(config).gold_reward)
  gold = gold_reward(own_responses(policy, config))
  error = gold.std() / GOLD_PROMPTS**0.5
  return {"reward/gold": float(gold.mean()), "reward/gold_se": float(error)}
