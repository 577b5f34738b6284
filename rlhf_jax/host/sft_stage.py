"""Stage `sft`: next-token training on prompts with their responses."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from rich import console as rich_console

from rlhf_jax import types
from rlhf_jax.host import (
  batches,
  checkpoint,
  data,
  loop,
  readers,
  sampling,
  settings,
  toy_language,
  validate,
)
from rlhf_jax.host import pretrained as pretrained_lib
from rlhf_jax.host import tokenizer as tokenizer_lib
from rlhf_jax.host import workdir as workdir_lib
from rlhf_jax.steps import optimizer as optimizer_lib
from rlhf_jax.steps import sft, sharding

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
  train, heldout = _texts(config, start, console)
  mesh = settings.mesh(config)
  step_config = sft.SFTConfig(start.model, settings.logits_per_chunk(config))
  optimizer = optimizer_lib.make(settings.optimizer_config(config))
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


def _texts(config, start, console):
  """Packed rows to train on, and held-out rows."""
  if path := config.data.path:
    texts, counts = readers.read_texts(path)
    # A response ends with the first stop id, or the policy never learns to.
    stop = list(settings.rollout_config(config, start).stop_ids[:1])
    pairs = (tokenizer_lib.encode_pair(start.tokenizer, *t) for t in texts)
    texts = [(prompt, response + stop) for prompt, response in pairs]
    console.print(f"sft: {path}: {counts}", markup=False, highlight=False)
  else:
    pretrained_lib.check_speaks_the_built_in_language(start, config)
    texts = toy_language.of(config).sample_texts(
      config.seed, config.data.size, config.data.opening
    )
  sides = batches.split_heldout(
    texts, config.data.heldout_fraction, config.seed
  )
  packed = []
  for side in sides:
    rows, cut = data.pack(
      side,
      sequence_length=config.data.sequence_length,
      pad_id=start.pad_id,
      vocab_size=start.model.vocab_size,
      where=path or "the built-in language",
    )
    packed.append(rows)
    if cut.rows:
      console.print(
        f"sft: {cut.rows} texts are longer than data.sequence_length="
        f"{config.data.sequence_length} and lost {cut.tokens} tokens",
        highlight=False,
      )
  return packed


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
