"""Stage `sft`: next-token training on prompts with their responses."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from rich import console as rich_console

from rlhf_jax import types
from rlhf_jax.data import batches, sampling, texts
from rlhf_jax.settings import static, validate
from rlhf_jax.stages import loop
from rlhf_jax.steps import optimizer as optimizer_lib
from rlhf_jax.steps import sft, sharding
from rlhf_jax.storage import checkpoint
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
  began = time.monotonic()
  start = pretrained_lib.load_policy(config)
  validate.validate_model(config, start.model)
  path = config.data.path
  sides = texts.read(
    config,
    start,
    console,
    stage="sft",
    path=path,
    opening=config.data.opening,
  )
  train, heldout = (
    texts.pack(config, start, console, side, stage="sft", path=path)
    for side in sides
  )
  mesh = static.mesh(config)
  step_config = sft.SFTConfig(start.model, static.logits_per_chunk(config))
  optimizer = optimizer_lib.make(static.optimizer_config(config))
  params = jax.tree.map(jnp.asarray, start.params)
  state = types.TrainState(jnp.int32(0), params, optimizer.init(params), ())
  size = config.train.batch_size

  def arguments(index):
    rows = batches.batch_at(
      train, seed=config.seed, step=index, batch_size=size
    )
    return (sharding.place_batch(rows, mesh),)

  def record(index, metrics, seconds):
    loop.check_finite("sft", index, metrics)
    workdir.append_metrics(index, metrics | {"time/step_s": seconds})
    return {"": {"loss": metrics["sft/loss"]}}

  state = loop.drive(
    loop.Run(
      name="sft",
      steps=config.train.steps,
      mesh=mesh,
      checkpoints=checkpoint.Checkpoints(
        workdir.path / "checkpoints", **config.checkpoint
      ),
      metadata={},
    ),
    state,
    sft.make_step(step_config, optimizer),
    arguments=arguments,
    rewind=workdir.rewind,
    record=record,
    console=console,
  )
  policy = dataclasses.replace(
    start, params=state.params, where=str(workdir.path)
  )
  pretrained_lib.save(workdir, policy)
  metrics = workdir.mean_of_last()
  evaluate = jax.jit(sft.row_logprobs, static_argnums=2)
  sums, counts = batches.map_rows(
    lambda batch, _: evaluate(state.params, batch, step_config),
    heldout,
    mesh=mesh,
    batch_size=size,
  )
  metrics["sft/heldout_loss"] = float(-sums.sum() / counts.sum())
  if not config.data.path:
    metrics |= _gold(policy, config)
  summary = {
    "stage": "sft",
    "seed": config.seed,
    "steps": config.train.steps,
    "wall_s": time.monotonic() - began,
    "metrics": metrics,
  }
  workdir.write_summary(summary)
  return summary


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
