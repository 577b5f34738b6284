"""Stage `reward_model`: Bradley–Terry on preference pairs.

Pairs come from a file; or, for the built-in language, from the SFT policy
itself, labelled by the gold reward with a judge's noise. At the end the score
is normalised on held-out responses of the policy that the model stands on,
which is to be the reference.
"""

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from rich import console as rich_console

from rlhf_jax import types
from rlhf_jax.data import batches, sampling
from rlhf_jax.data import preferences as preference_data
from rlhf_jax.models import transformer
from rlhf_jax.settings import static, validate
from rlhf_jax.stages import loop
from rlhf_jax.steps import optimizer as optimizer_lib
from rlhf_jax.steps import reference as reference_lib
from rlhf_jax.steps import reward_model, rewards, sharding
from rlhf_jax.storage import checkpoint
from rlhf_jax.storage import pretrained as pretrained_lib
from rlhf_jax.storage import workdir as workdir_lib

MOMENT_PROMPTS = 512  # responses that the score is normalised on


def run(
  config: ConfigDict,
  workdir: workdir_lib.Workdir,
  *,
  console: rich_console.Console,
) -> dict[str, Any]:
  """Trains, leaves the reward model in the workdir; returns the summary."""
  began = time.monotonic()
  policy = pretrained_lib.load_policy(config)
  validate.validate_model(config, policy.model)
  pairs = preference_data.read(config, policy, console, stage="reward model")
  train, heldout = preference_data.split(config, pairs)
  mesh = static.mesh(config)
  step_config = reward_model.RewardModelConfig(policy.model)
  optimizer = optimizer_lib.make(static.optimizer_config(config))
  trunk = reference_lib.freeze(policy.params)["transformer"]
  trunk.pop("lm_head", None)
  head = transformer.init_scalar_head(policy.model.width, use_bias=False)
  params = {"transformer": trunk, "score_head": head}
  state = types.TrainState(jnp.int32(0), params, optimizer.init(params), ())
  size = config.train.batch_size

  def arguments(index):
    rows = batches.batch_at(
      train, seed=config.seed, step=index, batch_size=size
    )
    return (sharding.place_batch(rows, mesh),)

  def record(index, metrics, seconds):
    loop.check_finite("reward_model", index, metrics)
    workdir.append_metrics(index, metrics | {"time/step_s": seconds})
    names = {"loss": "loss", "accuracy": "accuracy"}
    return {"": {n: metrics[f"reward_model/{m}"] for n, m in names.items()}}

  state = loop.drive(
    loop.Run(
      name="reward model",
      steps=config.train.steps,
      mesh=mesh,
      checkpoints=checkpoint.Checkpoints(
        workdir.path / "checkpoints", **config.checkpoint
      ),
      metadata={"reference": checkpoint.tree_hash(policy.params)},
    ),
    state,
    reward_model.make_step(step_config, optimizer),
    arguments=arguments,
    rewind=workdir.rewind,
    record=record,
    console=console,
  )
  metrics = workdir.mean_of_last()
  evaluate = jax.jit(reward_model.pair_scores, static_argnums=2)
  scores = batches.map_rows(
    lambda batch, _: evaluate(state.params, batch, step_config),
    heldout,
    mesh=mesh,
    batch_size=size,
  )
  for name, value in reward_model.pair_metrics(*map(jnp.array, scores)).items():
    metrics[name.replace("/", "/heldout_")] = float(value)
  trained = dataclasses.replace(
    policy, params=state.params, where=str(workdir.path)
  )
  prompts = batches.batch_at(
    preference_data.prompts_of(heldout),
    seed=config.seed,
    step=0,
    batch_size=MOMENT_PROMPTS,
  )
  samples = sampling.sample(policy, prompts, config, seed=config.seed + 1)
  raw = functools.partial(rewards.raw_scores, model=policy.model)
  moments = reward_model.moments(
    jnp.array(sampling.score(trained, samples, config, function=raw))
  )
  metrics["reward_model/raw_mean"] = float(moments["mean"])
  metrics["reward_model/raw_std"] = float(moments["std"])
  trained = dataclasses.replace(
    trained, params=state.params | {"normalisation": moments}
  )
  pretrained_lib.save(workdir, trained)
  summary = {
    "stage": "reward_model",
    "seed": config.seed,
    "steps": config.train.steps,
    "wall_s": time.monotonic() - began,
    "metrics": metrics,
  }
  workdir.write_summary(summary)
  return summary
