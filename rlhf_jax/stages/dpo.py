"""Stage `dpo`: a policy straight from preference pairs, by DPO or its family.

The pairs are those of the reward model's stage: of a file, or two responses
of the policy judged by noisy gold. The reference's logprobs of them are made
once and kept in the workdir. What the training does not see, the ledger does:
every `train.samples_every` steps and at the end the policy writes to held-out
prompts, and its KL to the reference is measured on that. A row of
metrics.jsonl is of the policy before its step, the last one of the finished
policy, on `FINAL_PROMPTS` responses.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from rich import console as rich_console

from rlhf_jax import types
from rlhf_jax.data import batches, preferences
from rlhf_jax.settings import roles, static
from rlhf_jax.stages import alarms, loop, sample_records, training
from rlhf_jax.steps import dpo, sharding
from rlhf_jax.steps import evaluate as evaluate_lib
from rlhf_jax.steps import ledger as ledger_lib
from rlhf_jax.steps import reference as reference_lib
from rlhf_jax.storage import checkpoint, reference_cache
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
  stage = training.begin(config, workdir, console)
  held = roles.reference(config, stage.start)
  pairs = preferences.read(config, stage.start, console, stage="dpo")
  sides = preferences.split(config, pairs)
  prompts = preferences.prompts_of(sides[1])
  reference = reference_lib.freeze(held.params)
  reference = jax.device_put(
    reference, sharding.shardings(reference, stage.mesh)
  )
  identity = checkpoint.tree_hash(reference)
  compiled = _settings(config, stage.start, held)
  train, heldout = _with_reference(stage, sides, held, reference, identity)
  optimizer = stage.optimizer()
  params = {"transformer": stage.start.params["transformer"]}
  record = _Record(stage)
  key = jax.random.key(config.seed)
  state = stage.drive(
    evaluate_lib.with_ledger(
      dpo.make_step(compiled.step, optimizer), compiled.ledger
    ),
    dpo.init_state(
      jax.tree.map(jnp.asarray, params),
      beta=config.kl.beta,
      optimizer=optimizer,
    ),
    arguments=lambda index: (
      stage.batch(train, index),
      reference,
      stage.batch(prompts, index),
      key,
    ),
    record=record.step,
    metadata={"reference": identity},
  )
  looked = _finished(stage, state, reference, prompts, compiled.ledger)
  measured = workdir.mean_of_last()  # Of the steps, before the last look.
  record.finished(looked)
  measured |= {name: float(x) for name, x in looked.scalars.items()}
  measured |= _heldout(stage, state, heldout, compiled.step)
  return stage.finish(stage.trained(state.params), measured)


class _Record:
  """Writes the steps; keeps the figures of the last look for the display."""

  def __init__(self, stage: training.Stage):
    self._stage = stage
    self._watch = alarms.Watch(stage.config.model.compute_dtype)
    self._shown = {}

  def step(self, index, metrics, seconds):
    """Writes a step, with the ledger where there was a look."""
    scalars, looked = metrics
    loop.check_finite("dpo", index, scalars)
    names = {"loss": "dpo/loss", "accuracy": "dpo/accuracy"}
    shown = {name: scalars[metric] for name, metric in names.items()}
    if index % self._stage.config.train.samples_every == 0:
      self._look(index, looked)
      scalars = scalars | looked.scalars
    self._stage.workdir.append_metrics(
      index, scalars | {"time/step_s": seconds}
    )
    return {"": shown | self._shown}

  def finished(self, looked):
    """Writes what the finished policy wrote."""
    steps = self._stage.config.train.steps
    self._look(steps, looked)
    self._stage.workdir.append_metrics(steps, looked.scalars)
    figures = " ".join(f"{n} {float(x):.3g}" for n, x in self._shown.items())
    self._stage.console.print(f"dpo: the finished policy: {figures}")

  def _look(self, index, looked):
    loop.check_finite("dpo", index, looked.scalars)
    for alarm in self._watch.alarms(index, looked.scalars):
      self._stage.console.print(
        f"dpo step {index} {alarm}", style="yellow", markup=False
      )
    self._stage.workdir.append_samples(
      sample_records.of_step(index, self._stage.start, looked, most=SAMPLES)
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


def _with_reference(stage, sides, held, reference, identity):
  """Train and held-out batches, with what their loss asks of the reference."""
  config = stage.config
  if config.dpo.loss == "simpo":
    return [dpo.Batch(side) for side in sides]
  sets: dict[str, types.PreferencePairs] = {
    "train": sides[0],
    "heldout": sides[1],
  }
  if config.dpo.loss == "kto":
    sets |= {
      f"{name}_mismatched": preferences.mismatched(side)
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
    stage.workdir.path / "reference_logprobs.safetensors",
    sets,
    lambda pairs: stage.measured(
      lambda batch: score(reference, batch, asked), pairs
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


def _finished(stage, state, reference, prompts, ledger) -> types.Metrics:
  """What the finished policy writes, and its ledger."""
  config = stage.config
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
    mesh=stage.mesh,
    batch_size=config.train.batch_size,
  )
  rollout, comparison = jax.tree.map(jnp.asarray, (rollout, comparison))
  of_offline = jax.jit(ledger_lib.of_offline, static_argnums=3)
  beta = jnp.float32(config.kl.beta)
  return jax.device_get(of_offline(rollout, comparison, beta, ledger.gold))


def _heldout(stage, state, heldout, settings):
  """Means over the held-out pairs of what a step reports."""
  evaluate = jax.jit(dpo.pair_figures, static_argnums=3)
  figures = stage.measured(
    lambda batch: evaluate(state.params, batch, state.beta, settings), heldout
  )
  return {
    name.replace("/", "/heldout_"): float(figure.mean())
    for name, figure in figures.items()
  }
