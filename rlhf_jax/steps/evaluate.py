"""A policy on a batch of prompts, measured and not trained.

    evaluation = evaluate(policy, reference, reward_model, prompts, key)

Responses, scores and KL as a PPO step has them: drawn by the same rollout, and
both models teacher-forced, so that a policy that equals its reference is at KL
0 exactly. Every figure is one per response; means are the host's.

A policy that is trained offline is looked at beside its step (`with_ledger`):
a loss on given pairs says nothing of what the policy would write.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from rlhf_jax import types
from rlhf_jax.objective import logprobs as logprobs_lib
from rlhf_jax.objective import masking
from rlhf_jax.steps import ledger, rewards
from rlhf_jax.steps import reference as reference_lib
from rlhf_jax.steps import rollout as rollout_lib

EvaluateConfig = reference_lib.ComparisonConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class LedgerConfig(reference_lib.ComparisonConfig):
  """How a policy is looked at while it is trained offline.

  Attributes:
    every: Steps between two looks.
    gold: The true reward, where there is one.
  """

  every: int
  gold: rewards.Gold | None = None


class Evaluation(NamedTuple):
  """Responses, and what each is worth and strays.

  Attributes:
    rollout: The responses, with their logprobs while decoding.
    comparison: Policy and reference at each token, teacher-forced.
    score: Reward units.
    gold: The true reward, where there is one.
    reverse_k1: log π(y|x)/π_ref(y|x), nats per response, as are the next
      five: each a sum over the response's tokens.
    reverse_k3: See `kl.k3`.
    reverse_exact: Of KL(π‖π_ref), all tokens summed at each state.
    forward_exact: Of KL(π_ref‖π) at the states that the policy visited.
    reference_nll: −log π_ref(y|x).
    entropy: Of the policy's next token.
    anchored: Of KL(π‖π_ref) where π_ref does not see the prefix; None without
      one.
  """

  rollout: types.Rollout
  comparison: logprobs_lib.Comparison
  score: Float[Array, "B"]
  gold: Float[Array, "B"] | None
  reverse_k1: Float[Array, "B"]
  reverse_k3: Float[Array, "B"]
  reverse_exact: Float[Array, "B"]
  forward_exact: Float[Array, "B"]
  reference_nll: Float[Array, "B"]
  entropy: Float[Array, "B"]
  anchored: Float[Array, "B"] | None


Evaluate = Callable[
  [types.Params, types.Params, types.Params, types.Prompts, PRNGKeyArray],
  Evaluation,
]


def make(
  config: EvaluateConfig, *, score: rewards.Score, gold: rewards.Gold | None
) -> Evaluate:
  """The evaluation of a batch, to be jitted.

  Args:
    config: Static settings.
    score: The reward, from `steps.rewards`; it is told that this is step 0.
    gold: The true reward, where there is one.
  """

  def evaluate(policy, reference, reward_model, prompts, key):
    rollout, compared = _write(policy, reference, prompts, key, config)
    comparison, clean = compared.asked.comparison, compared.clean
    mask = masking.response_mask(
      rollout.sequences.response_lengths, config.rollout.response_length
    )
    per_response = functools.partial(masking.per_response, mask=mask)
    meters = ledger.meters(comparison)
    return Evaluation(
      rollout=rollout,
      comparison=comparison,
      score=score(reward_model, compared.judged, jnp.int32(0)),
      gold=None if gold is None else gold(compared.judged),
      reverse_k1=per_response(meters["kl/reverse_k1"]),
      reverse_k3=per_response(meters["kl/reverse_k3"]),
      reverse_exact=per_response(meters["kl/reverse_exact"]),
      forward_exact=per_response(meters["kl/forward_exact"]),
      reference_nll=per_response(-comparison.reference_logprobs),
      entropy=per_response(comparison.entropy),
      anchored=None if clean is None else per_response(clean.terms.reverse_kl),
    )

  return evaluate


def with_ledger(
  step: Callable[..., tuple[types.TrainState, Any]], config: LedgerConfig
) -> Callable[..., tuple[types.TrainState, tuple[Any, types.Metrics]]]:
  """The step, and beside its result what the policy wrote before it.

  `step(state, batch, reference, prompts, key)`. Between two looks, where
  `state.step` is no multiple of `config.every`, the second result is zeros:
  nothing is sampled.
  """

  def watched(state, batch, reference, prompts, key):
    step_key = jax.random.fold_in(key, state.step)

    def look():
      pair = written(state.params, reference, prompts, step_key, config)
      return ledger.of_offline(*pair, state.beta, config.gold)

    def nothing():
      zeros = lambda x: jnp.zeros(x.shape, x.dtype)
      return jax.tree.map(zeros, jax.eval_shape(look))

    metrics = lax.cond(state.step % config.every == 0, look, nothing)
    state, scalars = step(state, batch)
    return state, (scalars, metrics)

  return watched


def written(
  policy: types.Params,
  reference: types.Params,
  prompts: types.Prompts,
  key: PRNGKeyArray,
  config: reference_lib.ComparisonConfig,
) -> tuple[types.Rollout, logprobs_lib.Comparison]:
  """A response of the policy to each prompt, and both models on its tokens."""
  rollout, compared = _write(policy, reference, prompts, key, config)
  return rollout, compared.asked.comparison


def _write(policy, reference, prompts, key, config):
  """The rollout, and the policy beside the reference on it."""
  rollout = rollout_lib.rollout(
    policy["transformer"],
    prompts,
    key,
    model=config.model,
    config=config.rollout,
  )
  return rollout, reference_lib.compare(
    policy, reference, rollout.sequences, config
  )
