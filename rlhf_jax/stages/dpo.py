"""Stage `dpo`: a policy straight from preference pairs, by DPO or its family.

The pairs are those of the reward model's stage: of a file, or two responses
of the policy judged by noisy gold. The reference's logprobs of them are made
once and kept in the workdir. What the training does not see, the ledger does:
every `train.samples_every` steps and at the end the policy writes to held-out
prompts, and its KL to the reference is measured on that. A row of
metrics.jsonl is of the policy before its step, the last one of the finished
policy, on `FINAL_PROMPTS` responses.
"""

import dataclasses
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from rich import console as rich_console

from rlhf_jax import types
from rlhf_jax.data import batches
from rlhf_jax.data import preferences as preference_data
from rlhf_jax.settings import roles, static, validate
from rlhf_jax.stages import alarms, loop, sample_records
from rlhf_jax.steps import dpo, sharding
from rlhf_jax.steps import evaluate as evaluate_lib
from rlhf_jax.steps import ledger as ledger_lib
from rlhf_jax.steps import optimizer as optimizer_lib
from rlhf_jax.steps import reference as reference_lib
from rlhf_jax.storage import checkpoint, reference_cache
from rlhf_jax.storage import pretrained as pretrained_lib
from rlhf_jax.storage import workdir as workdir_lib
from rlhf_jax.text import toy_language

SAMPLES = 4  # responses of a look that are recorded
FINAL_PROMPTS = 512  # responses that the finished policy is measured on


class _Settings(NamedTuple):
  """What the step and the ledger are compiled with."""

  step: dpo.DPOConfig
  ledger: evaluate_lib.LedgerConfig


def run(
  config: ConfigDict,
  workdir: workdir_lib.Workdir,
  *,
  console: rich_console.Console,
) -> dict[str, Any]:
  """Trains, leaves the policy in the workdir and returns the summary."""
  began = time.monotonic()
  policy = pretrained_lib.load_policy(config)
  validate.validate_model(config, policy.model)
  held = roles.reference(config, policy)
  pairs = preference_data.read(config, policy, console, stage="dpo")
  sides = preference_data.split(config, pairs)
  prompts = preference_data.prompts_of(sides[1])
  mesh = static.mesh(config)
  reference = reference_lib.freeze(held.params)
  reference = jax.device_put(reference, sharding.shardings(reference, mesh))
  identity = checkpoint.tree_hash(reference)
  compiled = _settings(config, policy, held)
  train, heldout = _with_reference(
    config, workdir, sides, held, reference, identity, mesh
  )
  optimizer = optimizer_lib.make(static.optimizer_config(config))
  step = evaluate_lib.with_ledger(
    dpo.make_step(compiled.step, optimizer), compiled.ledger
  )
  key = jax.random.key(config.seed)
  size = config.train.batch_size

  def arguments(index):
    rows = [
      batches.batch_at(x, seed=config.seed, step=index, batch_size=size)
      for x in (train, prompts)
    ]
    batch, asked = sharding.place_batch(rows, mesh)
    return batch, reference, asked, key

  record = _Record(config, workdir, policy, console)
  state = loop.drive(
    loop.Run(
      name="dpo",
      steps=config.train.steps,
      mesh=mesh,
      checkpoints=checkpoint.Checkpoints(
        workdir.path / "checkpoints", **config.checkpoint
      ),
      metadata={"reference": identity},
    ),
    dpo.init_state(
      {"transformer": jax.tree.map(jnp.asarray, policy.params["transformer"])},
      beta=config.kl.beta,
      optimizer=optimizer,
    ),
    step,
    arguments=arguments,
    rewind=workdir.rewind,
    record=record.step,
    console=console,
  )
  looked = _finished(config, state, reference, prompts, mesh, compiled.ledger)
  metrics = workdir.mean_of_last()
  record.finished(looked)
  metrics |= {name: float(x) for name, x in looked.scalars.items()}
  metrics |= _heldout(config, state, heldout, mesh, compiled.step)
  final = dataclasses.replace(
    policy, params=state.params, where=str(workdir.path)
  )
  pretrained_lib.save(workdir, final)
  summary = {
    "stage": "dpo",
    "seed": config.seed,
    "steps": config.train.steps,
    "wall_s": time.monotonic() - began,
    "metrics": metrics,
  }
  workdir.write_summary(summary)
  return summary


class _Record:
  """Writes the steps; keeps the figures of the last look for the display."""

  def __init__(self, config, workdir, policy, console):
    self._config = config
    self._workdir = workdir
    self._policy = policy
    self._console = console
    self._watch = alarms.Watch(config.model.compute_dtype)
    self._shown = {}

  def step(self, index, metrics, seconds):
    """Writes a step, with the ledger where there was a look."""
    scalars, looked = metrics
    loop.check_finite("dpo", index, scalars)
    names = {"loss": "dpo/loss", "accuracy": "dpo/accuracy"}
    shown = {name: scalars[metric] for name, metric in names.items()}
    if index % self._config.train.samples_every == 0:
      self._look(index, looked)
      scalars = scalars | looked.scalars
    self._workdir.append_metrics(index, scalars | {"time/step_s": seconds})
    return {"": shown | self._shown}

  def finished(self, looked):
    """Writes what the finished policy wrote."""
    steps = self._config.train.steps
    self._look(steps, looked)
    self._workdir.append_metrics(steps, looked.scalars)
    figures = " ".join(f"{n} {float(x):.3g}" for n, x in self._shown.items())
    self._console.print(f"dpo: the finished policy: {figures}")

  def _look(self, index, looked):
    loop.check_finite("dpo", index, looked.scalars)
    for alarm in self._watch.alarms(index, looked.scalars):
      self._console.print(
        f"dpo step {index} {alarm}", style="yellow", markup=False
      )
    self._workdir.append_samples(
      sample_records.of_step(index, self._policy, looked, most=SAMPLES)
    )
    names = {"KL": "kl/reverse_exact", "gold": "reward/gold"}
    self._shown = {
      name: looked.scalars[metric]
      for name, metric in names.items()
      if metric in looked.scalars
    }


def _settings(config, policy, held) -> _Settings:
  """The static settings of step and ledger."""
  per_chunk = static.logits_per_chunk(config)
  step = dpo.DPOConfig(
    policy.model,
    temperature=config.rollout.temperature,
    logits_per_chunk=per_chunk,
    **config.dpo.to_dict(),
  )
  ledger = evaluate_lib.LedgerConfig(
    model=policy.model,
    reference=held.model,
    rollout=static.rollout_config(config, policy),
    every=config.train.samples_every,
    gold=None if config.data.path else toy_language.of(config).gold_reward,
    logits_per_chunk=per_chunk,
  )
  return _Settings(step, ledger)


def _with_reference(config, workdir, sides, held, reference, identity, mesh):
  """Train and held-out batches, with what their loss asks of the reference."""
  if config.dpo.loss == "simpo":
    return [dpo.Batch(side) for side in sides]
  sets: dict[str, types.PreferencePairs] = {
    "train": sides[0],
    "heldout": sides[1],
  }
  if config.dpo.loss == "kto":
    sets |= {
      f"{name}_mismatched": preference_data.mismatched(side)
      for name, side in sets.items()
    }
  asked = dpo.DPOConfig(
    held.model,
    config.dpo.loss,
    temperature=config.rollout.temperature,
    logits_per_chunk=static.logits_per_chunk(config),
  )
  score = jax.jit(dpo.pair_logprobs, static_argnums=2)
  logprobs = reference_cache.load_or_make(
    workdir.path / "reference_logprobs.safetensors",
    sets,
    lambda pairs: batches.map_rows(
      lambda batch, _: score(reference, batch, asked),
      pairs,
      mesh=mesh,
      batch_size=config.train.batch_size,
    ),
    reference=identity,
    temperature=config.rollout.temperature,
  )
  whole = {name: dpo.Batch(sets[name], logprobs[name]) for name in sets}
  if config.dpo.loss == "kto":
    return [
      whole[name]._replace(mismatched=whole[f"{name}_mismatched"])
      for name in ("train", "heldout")
    ]
  return [whole["train"], whole["heldout"]]


def _finished(config, state, reference, prompts, mesh, ledger) -> types.Metrics:
  """What the finished policy writes, and its ledger."""
  prompts = batches.batch_at(
    prompts,
    seed=config.seed,
    step=config.train.steps,
    batch_size=FINAL_PROMPTS,
  )
  key = jax.random.fold_in(jax.random.key(config.seed), config.train.steps)
  write = jax.jit(evaluate_lib.written, static_argnums=4)
  rollout, comparison = batches.map_rows(
    lambda batch, index: write(
      state.params, reference, batch, jax.random.fold_in(key, index), ledger
    ),
    prompts,
    mesh=mesh,
    batch_size=config.train.batch_size,
  )
  rollout, comparison = jax.tree.map(jnp.asarray, (rollout, comparison))
  of_offline = jax.jit(ledger_lib.of_offline, static_argnums=3)
  beta = jnp.float32(config.kl.beta)
  return jax.device_get(of_offline(rollout, comparison, beta, ledger.gold))


def _heldout(config, state, heldout, mesh, step_config):
  """Means over the held-out pairs of what a step reports."""
  evaluate = jax.jit(dpo.pair_figures, static_argnums=3)
  figures = batches.map_rows(
    lambda batch, _: evaluate(state.params, batch, state.beta, step_config),
    heldout,
    mesh=mesh,
    batch_size=config.train.batch_size,
  )
  return {
    name.replace("/", "/heldout_"): float(figure.mean())
    for name, figure in figures.items()
  }
