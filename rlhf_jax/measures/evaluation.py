"""A policy on prompts that it was not trained on: figures with errors.

Standard errors are over responses, one to a prompt, and so over prompts.
Held-out prompts of the built-in language come from seeds that no training run
can have: `HELD_OUT` and above, where theirs are below 2³² + 5. (They are short,
so that some are equal to prompts that were trained on.)
"""

from collections.abc import Callable
import functools

import jax
from jaxtyping import Float
from ml_collections import ConfigDict
import numpy as np
import numpy.typing as npt
from rich import console as rich_console
from scipy import stats

from rlhf_jax import errors, types
from rlhf_jax.data import batches, sampling
from rlhf_jax.data import texts as texts_lib
from rlhf_jax.measures import best_of_n as best_of_n_lib
from rlhf_jax.settings import prefix as prefix_lib
from rlhf_jax.settings import roles, static
from rlhf_jax.steps import evaluate as evaluate_lib
from rlhf_jax.steps import rewards, sharding
from rlhf_jax.storage import pretrained as pretrained_lib
from rlhf_jax.text import statistics as text_statistics
from rlhf_jax.text import toy_language

HELD_OUT = 2**33  # Added to config.seed.
_REPEATED = 4  # n of text/self_repetition, as in Welleck et al. 2020.
_NORMAL = float(stats.norm.ppf(0.975))


def seed_of(seed: int, stream: int) -> int:
  """A seed of responses: independent streams of a config's."""
  bits = np.random.SeedSequence([seed, stream])
  return int(bits.generate_state(1)[0])


def heldout_texts(
  config: ConfigDict, *, shared: bool
) -> tuple[sampling.Prompts, str]:
  """`evaluate.prompts` prompts, and a line that says where they are from.

  Args:
    config: Names the file, or the built-in language.
    shared: Whether training read the file, too: prompts are then those that it
      held out. All rows of another file are.

  Raises:
    UserError: They are fewer than two: no figure of them has an error.
  """
  wanted = config.evaluate.prompts
  if not config.data.path:
    seed = HELD_OUT + config.seed
    prompts = toy_language.of(config).sample_prompts(
      seed, wanted, config.data.opening
    )
    source = f"the built-in language {config.data.language!r}, seed {seed}"
    return prompts, f"{wanted} prompts of {source}"
  path, fraction = config.data.path, config.data.heldout_fraction
  texts, held, counts = texts_lib.split_prompts(
    path, fraction if shared else 0.0
  )
  how = ", held out of training" if held else ""
  if shared and not held:
    how = ", all of them trained on: data.heldout_fraction holds out none"
  texts = held or texts
  count = min(wanted, len(texts))
  if count < 2:
    raise errors.UserError(
      f"config.data.path: {path}: {count} prompt is held out of {counts.rows}; "
      "at least 2 are wanted, for figures that have an error: raise "
      "data.heldout_fraction, or bring more prompts"
    )
  chosen = batches.batch_at(texts, seed=config.seed, step=0, batch_size=count)
  return chosen, f"{count} of {path}: {counts}{how}"


def heldout_prompts(
  config: ConfigDict,
  policy: pretrained_lib.Pretrained,
  console: rich_console.Console,
  *,
  shared: bool,
) -> types.Prompts:
  """The prompts of `heldout_texts` as arrays; prints where they are from.

  Raises:
    UserError: The built-in language is not that of the policy.
  """
  if not config.data.path:
    pretrained_lib.check_speaks_the_built_in_language(policy, config)
  texts, line = heldout_texts(config, shared=shared)
  where = config.data.path or "the built-in language"
  prompts, cut = sampling.prompts_array(texts, config, policy, where)
  if cut.rows:
    line += (
      f"; {cut.rows} are longer than rollout.prompt_length="
      f"{config.rollout.prompt_length} and lost their first tokens"
    )
  console.print(
    f"evaluate: {line}", markup=False, highlight=False, soft_wrap=True
  )
  return prompts


def evaluate(
  config: ConfigDict,
  policy: pretrained_lib.Pretrained,
  reference: pretrained_lib.Pretrained,
  reward: roles.Reward,
  prompts: types.Prompts,
  *,
  seed: int,
) -> evaluate_lib.Evaluation:
  """One response to each prompt, measured; arrays are numpy's.

  Args:
    config: Its rollout, mesh and batch size; without `data.path` there is the
      gold of the built-in language.
    policy: Who writes.
    reference: Whom the KL is to.
    reward: What scores.
    prompts: Any number.
    seed: Of the responses: the same seed, prompts and batch size give the same
      to the same policy.

  Raises:
    UserError: A score is not finite, or a function of text failed.
  """
  mesh = static.mesh(config)
  prefix = prefix_lib.of(config, policy)
  compiled = _compiled(
    evaluate_lib.EvaluateConfig(
      model=policy.model,
      reference=reference.model,
      rollout=static.rollout_config(config, policy),
      prefix=None if prefix is None else prefix.place,
      logits_per_chunk=static.logits_per_chunk(config),
    ),
    reward.score,
    None if config.data.path else toy_language.of(config).gold_reward,
  )
  models = policy.params, reference.params, reward.params
  models = jax.device_put(models, sharding.shardings(models, mesh))
  key = jax.random.key(seed)
  evaluation = batches.map_rows(
    lambda batch, index: compiled(
      *models, batch, jax.random.fold_in(key, index)
    ),
    prompts,
    mesh=mesh,
    batch_size=config.train.batch_size,
  )
  if reward.host is not None:
    reward.host.raise_if_failed()
  if not np.isfinite(evaluation.score).all():
    row = int(np.flatnonzero(~np.isfinite(evaluation.score))[0])
    raise errors.UserError(
      f"{reward.identity}: prompt {row + 1} has a response with score"
      f" {evaluation.score[row]}; wanted finite scores; mend the reward"
    )
  return evaluation


@functools.lru_cache(maxsize=4)
def _compiled(
  config: evaluate_lib.EvaluateConfig,
  score: rewards.Score,
  gold: rewards.Gold | None,
) -> Callable[..., evaluate_lib.Evaluation]:
  """Policies of one architecture share a program."""
  return jax.jit(evaluate_lib.make(config, score=score, gold=gold))


def summarise(evaluation: evaluate_lib.Evaluation) -> dict[str, float]:
  """Means with standard errors under the ledger's names, and diversity.

  `kl/…` are nats per response, `rollout/reference_nll` and `ppo/entropy` nats
  per token: a ratio of means, with the error of one.
  """
  rollout = evaluation.rollout
  lengths = rollout.sequences.response_lengths
  metrics = with_error("reward/score", evaluation.score)
  if evaluation.gold is not None:
    metrics |= with_error("reward/gold", evaluation.gold)
  metrics |= with_error("kl/reverse_exact", evaluation.reverse_exact)
  metrics |= with_error("kl/reverse_k1", evaluation.reverse_k1)
  metrics |= with_error("kl/reverse_k3", evaluation.reverse_k3)
  metrics |= with_error("kl/forward_exact", evaluation.forward_exact)
  if evaluation.anchored is not None:
    metrics |= with_error("kl/anchored", evaluation.anchored)
  metrics |= with_error("rollout/response_tokens", lengths)
  metrics |= with_error("rollout/truncated_fraction", rollout.truncated)
  for name, nats in (
    ("rollout/reference_nll", evaluation.reference_nll),
    ("ppo/entropy", evaluation.entropy),
  ):
    metrics |= ratio_with_error(name, nats, lengths)
  return metrics | _diversity(rollout)


def with_error(name: str, per_response: npt.ArrayLike) -> dict[str, float]:
  """The mean under its name, its standard error beside it."""
  x = np.asarray(per_response, np.float64)
  return {name: float(x.mean()), f"{name}_se": _error(x)}


def ratio_with_error(
  name: str, sums: npt.ArrayLike, counts: npt.ArrayLike
) -> dict[str, float]:
  """Σ sums / Σ counts under its name, its standard error beside it.

  To first order in the deviations of both from their means.
  """
  x, n = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
  ratio = x.sum() / n.sum()
  error = _error(x - ratio * n) / float(n.mean())
  return {name: float(ratio), f"{name}_se": error}


def _error(x: Float[np.ndarray, "N"]) -> float:
  """Standard error of the mean; of a single number it is not known."""
  return float(x.std(ddof=1)) / len(x) ** 0.5 if len(x) > 1 else float("nan")


def _diversity(rollout: types.Rollout) -> dict[str, float]:
  """Of the responses' ids, without the stop token that ends most of them."""
  sequences = rollout.sequences
  lengths = sequences.response_lengths - ~rollout.truncated
  responses = [
    ids[:length].tolist()
    for ids, length in zip(sequences.response_tokens, lengths)
  ]
  distinct = {
    f"text/distinct_{n}": text_statistics.distinct(responses, n)
    for n in (1, 2, 3)
  }
  repetition = text_statistics.self_repetition(responses, _REPEATED)
  return distinct | {"text/self_repetition": repetition}


def worth(evaluation: evaluate_lib.Evaluation) -> np.ndarray:
  """What decides who wins: gold where there is one, the score otherwise."""
  gold = evaluation.gold
  return np.asarray(evaluation.score if gold is None else gold)


def win_rate(
  mine: Float[np.ndarray, "N"], theirs: Float[np.ndarray, "N"]
) -> dict[str, float]:
  """How often the first of two responses to a prompt is worth more.

  A win counts 1, a tie ½. The responses must have been drawn independently,
  from two seeds: with one seed for both, equal policies would tie always.

  `win/rate_low` and `win/rate_high` are a 95 % interval over prompts: the
  mean of the outcomes ± 1.96 standard errors after half a win, half a loss and
  a tie are added to them. (Agresti & Min 2005, Statistics in Medicine 24, for
  the difference of matched proportions, which is 2 · rate − 1.) So it keeps
  its width where all outcomes are the same, as mean ± error would not.
  """
  ties = mine == theirs
  outcomes = np.where(ties, 0.5, mine > theirs)
  metrics = with_error("win/rate", outcomes)
  values = np.concatenate([outcomes, [1.0, 0.0, 0.5]])
  weights = np.concatenate([np.ones(len(outcomes)), [0.5, 0.5, 1.0]])
  centre = np.average(values, weights=weights)
  variance = np.average((values - centre) ** 2, weights=weights)
  half = _NORMAL * np.sqrt(variance / weights.sum())
  return metrics | {
    "win/rate_low": float(max(centre - half, 0.0)),
    "win/rate_high": float(min(centre + half, 1.0)),
    "win/ties": float(ties.mean()),
  }


def best_of_n(
  config: ConfigDict,
  policy: pretrained_lib.Pretrained,
  reward: roles.Reward,
  prompts: types.Prompts,
  *,
  samples: int,
  seed: int,
) -> list[best_of_n_lib.BestOfN]:
  """Best-of-n of the policy for n = 1, 2, 4, … up to `samples` a prompt."""
  repeated = jax.tree.map(lambda x: np.repeat(x, samples, axis=0), prompts)
  # Its own reference: the KL is to the policy that is sampled.
  found = evaluate(config, policy, policy, reward, repeated, seed=seed)
  table = lambda x: np.asarray(x).reshape(-1, samples)
  gold = None if found.gold is None else table(found.gold)
  ns = [2**i for i in range(samples.bit_length())]
  return best_of_n_lib.best_of_n(table(found.score), gold, ns)
