"""Stage `reward_model`: Bradley–Terry on preference pairs.

Pairs come from a file; or, for the built-in language, from the SFT policy
itself, labelled by the gold reward with a judge's noise. At the end the score
is normalised on held-out responses of the policy that the model stands on,
which is to be the reference.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from rich import console as rich_console

from rlhf_jax import errors, types
from rlhf_jax.data import batches, preferences, sampling
from rlhf_jax.models import transformer
from rlhf_jax.stages import training
from rlhf_jax.steps import reference as reference_lib
from rlhf_jax.steps import reward_model, rewards
from rlhf_jax.storage import checkpoint
from rlhf_jax.storage import pretrained as pretrained_lib
from rlhf_jax.storage import workdir as workdir_lib

MOMENT_PROMPTS = 512  # responses that the score is normalised on
LEAST_DEVIATION = 1e-3  # of raw scores; less is noise, and would be a divisor


def run(
  config: ConfigDict,
  workdir: workdir_lib.Workdir,
  *,
  console: rich_console.Console,
) -> dict[str, Any]:
  """Trains, leaves the reward model in the workdir; returns the summary."""
  stage = training.begin(config, workdir, console)
  policy = stage.start
  pairs = preferences.read(config, policy, console, stage="reward model")
  train, heldout = preferences.split(config, pairs)
  settings = reward_model.RewardModelConfig(policy.model)
  optimizer = stage.optimizer()
  trunk = reference_lib.freeze(policy.params)["transformer"]
  trunk.pop("lm_head", None)
  head = transformer.init_scalar_head(policy.model.width, use_bias=False)
  state = stage.drive(
    reward_model.make_step(settings, optimizer),
    stage.state({"transformer": trunk, "score_head": head}, optimizer),
    arguments=lambda index: (stage.batch(train, index),),
    record=stage.recorder(
      {n: f"reward_model/{n}" for n in ("loss", "accuracy")}
    ),
    metadata={"reference": checkpoint.tree_hash(policy.params)},
  )
  evaluate = jax.jit(reward_model.pair_scores, static_argnums=2)
  scores = stage.measured(
    lambda batch: evaluate(state.params, batch, settings), heldout
  )
  figures = reward_model.pair_metrics(*map(jnp.array, scores))
  measured = {
    name.replace("/", "/heldout_"): float(x) for name, x in figures.items()
  }
  trained = stage.trained(state.params)
  moments = _moments(trained, policy, preferences.prompts_of(heldout), config)
  for name in ("mean", "std"):
    measured[f"reward_model/raw_{name}"] = float(moments[name])
  params = state.params | {"normalisation": moments}
  return stage.finish(dataclasses.replace(trained, params=params), measured)


def _moments(
  model: pretrained_lib.Pretrained,
  policy: pretrained_lib.Pretrained,
  prompts: types.Prompts,
  config: ConfigDict,
) -> dict[str, jax.Array]:
  """Of the raw scores of what the policy writes to the prompts."""
  asked = batches.batch_at(
    prompts, seed=config.seed, step=0, batch_size=MOMENT_PROMPTS
  )
  samples = sampling.sample(policy, asked, config, seed=config.seed + 1)
  raw = functools.partial(rewards.raw_scores, model=policy.model)
  scores = sampling.score(model, samples, config, function=raw)
  moments = reward_model.moments(jnp.array(scores))
  if moments["std"] < LEAST_DEVIATION:
    raise errors.UserError(
      f"the reward model scores all that the policy writes alike (deviation "
      f"{float(moments['std']):.1e}): it has learned nothing to be normalised "
      "by; train it longer, or bring pairs that differ more"
    )
  return moments
