"""A policy on a batch of prompts, measured and not trained.

    evaluation = evaluate(policy, reference, reward_model, prompts, key)

Responses, scores and KL as a PPO step has them: drawn by the same rollout, and
both models teacher-forced, so that a policy that equals its reference is at KL
0 exactly. Every figure is one per response; means are the host's.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from rlhf_jax import types
from rlhf_jax.models import transformer
from rlhf_jax.objective import kl, masking
from rlhf_jax.objective import logprobs as logprobs_lib
from rlhf_jax.steps import anchor, learner, ppo, rewards
from rlhf_jax.steps import rollout as rollout_lib


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
  """What is fixed when the evaluation is compiled.

  Attributes:
    prefix: What stands in front of every prompt, where something does.
  """

  model: transformer.TransformerConfig
  reference: transformer.TransformerConfig
  rollout: rollout_lib.RolloutConfig
  prefix: anchor.Prefix | None = None
  logits_per_chunk: int = 2**24


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
  config: EvaluateConfig, *, score: rewards.Score, gold: ppo.Gold | None
) -> Evaluate:
  """The evaluation of a batch, to be jitted.

  Args:
    config: Static settings.
    score: The reward, from `steps.rewards`; it is told that this is step 0.
    gold: The true reward, where there is one.
  """

  def evaluate(policy, reference, reward_model, prompts, key):
    rollout = rollout_lib.rollout(
      policy["transformer"],
      prompts,
      key,
      model=config.model,
      config=config.rollout,
    )
    sequences = rollout.sequences
    mask = masking.response_mask(
      sequences.response_lengths, config.rollout.response_length
    )
    states = learner.states_and_head(policy, sequences, model=config.model)
    against = functools.partial(_against, reference, states, config=config)
    comparison, judged, anchored = against(sequences), sequences, None
    per_response = lambda nats: jnp.where(mask, nats, 0.0).sum(1)
    if config.prefix is not None:
      judged = anchor.without_prefix(sequences, config.prefix)
      anchored = per_response(against(judged).reverse_kl)
    log_ratio, _ = kl.clamp_log_ratio(
      comparison.logprobs - comparison.reference_logprobs
    )
    return Evaluation(
      rollout=rollout,
      comparison=comparison,
      score=score(reward_model, judged, jnp.int32(0)),
      gold=None if gold is None else gold(judged),
      reverse_k1=per_response(kl.k1(log_ratio)),
      reverse_k3=per_response(kl.k3(log_ratio)),
      reverse_exact=per_response(comparison.reverse_kl),
      forward_exact=per_response(comparison.forward_kl),
      reference_nll=per_response(-comparison.reference_logprobs),
      entropy=per_response(comparison.entropy),
      anchored=anchored,
    )

  return evaluate


def _against(reference, states, sequences, *, config: EvaluateConfig):
  """The policy's states against the reference that reads `sequences`."""
  return logprobs_lib.compare(
    states,
    learner.states_and_head(reference, sequences, model=config.reference),
    sequences.response_tokens,
    temperature=config.rollout.temperature,
    logits_per_chunk=config.logits_per_chunk,
  )
