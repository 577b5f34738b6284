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
import numpy as np
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
from rlhf_jax.models import transformer
from rlhf_jax.steps import optimizer as optimizer_lib
from rlhf_jax.steps import reference as reference_lib
from rlhf_jax.steps import reward_model, rewards, sharding

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
  pairs = _pairs(config, policy, console)
  train, heldout = batches.split_heldout(
    pairs,
    config.data.heldout_fraction,
    config.seed,
    by=_prompts_of(pairs),  # A held-out pair's prompt is new as well.
  )
  mesh = settings.mesh(config)
  step_config = reward_model.RewardModelConfig(policy.model)
  optimizer = optimizer_lib.make(settings.optimizer_config(config))
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
    _prompts_of(heldout), seed=config.seed, step=0, batch_size=MOMENT_PROMPTS
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


def _pairs(config, policy, console):
  """Preference pairs, from a file or from the policy itself."""
  layout = {
    "prompt_length": config.rollout.prompt_length,
    "response_length": config.rollout.response_length,
    "pad_id": policy.pad_id,
    "vocab_size": policy.model.vocab_size,
  }
  if not (path := config.data.path):
    return _sampled_pairs(config, policy)
  texts, counts = readers.read_pairs(path)
  console.print(f"reward model: {path}: {counts}", markup=False)
  # The policy's responses will end so, and so must those that are judged.
  stop = list(settings.rollout_config(config, policy).stop_ids[:1])
  rows = []
  for text in texts:
    (prompt, chosen), (_, rejected) = (
      tokenizer_lib.encode_pair(policy.tokenizer, text.prompt, response)
      for response in (text.chosen, text.rejected)
    )
    rows.append((prompt, chosen + stop, rejected + stop))
  pairs, cut = data.preference_pairs_array(rows, **layout, where=path)
  if cut.rows:
    console.print(
      f"reward model: {cut.rows} prompts and responses are longer than "
      f"rollout.prompt_length={layout['prompt_length']} or "
      f"rollout.response_length={layout['response_length']} and lost "
      f"{cut.tokens} tokens",
      highlight=False,
    )
  return pairs


def _prompts_of(pairs: types.PreferencePairs) -> types.Prompts:
  return types.Prompts(pairs.chosen.prompt_tokens, pairs.chosen.prompt_lengths)


def _sampled_pairs(config, policy):
  """Two responses of the policy to each prompt, judged by noisy gold."""
  pretrained_lib.check_speaks_the_built_in_language(policy)
  ids = toy_language.sample_prompts(config.seed + 2, config.data.size)
  asked, _ = sampling.prompts_array(ids, config, policy, "prompts")
  first, second = (
    sampling.sample(policy, asked, config, seed=config.seed + offset)
    for offset in (2, 3)
  )
  key = jax.random.fold_in(jax.random.key(config.seed), config.data.size)
  gold = jax.jit(toy_language.gold_reward)
  first_wins = np.asarray(
    toy_language.label_preferences(key, gold(first), gold(second))
  )

  def pick(condition):
    choose = lambda a, b: np.where(
      condition.reshape((-1,) + (1,) * (a.ndim - 1)), a, b
    )
    return jax.tree.map(choose, first, second)

  return types.PreferencePairs(pick(first_wins), pick(~first_wins))
