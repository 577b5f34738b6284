"""What a policy that is trained offline would write, beside its training step.

A loss on given pairs says nothing of where the policy has gone. `with_ledger`
adds a look to some of the steps: fresh responses, their KL to the reference
by every meter of `steps.ledger`, and the gold reward where there is one.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from rlhf_jax import types
from rlhf_jax.models import transformer
from rlhf_jax.objective import kl, masking
from rlhf_jax.objective import logprobs as logprobs_lib
from rlhf_jax.steps import learner, ledger
from rlhf_jax.steps import rollout as rollout_lib


@dataclasses.dataclass(frozen=True)
class LedgerConfig:
  """How the policy is sampled, and held against its reference.

  Attributes:
    model: The policy's architecture.
    reference: The reference's.
    every: Steps between two looks.
    gold: The true reward, where there is one.
  """

  model: transformer.TransformerConfig
  reference: transformer.TransformerConfig
  rollout: rollout_lib.RolloutConfig
  every: int
  gold: Callable[[types.Sequences], Float[Array, "B"]] | None = None
  logits_per_chunk: int = 2**24


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
      return of_samples(*pair, state.beta, config)

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
  config: LedgerConfig,
) -> tuple[types.Rollout, logprobs_lib.Comparison]:
  """A response of the policy to each prompt, beside the reference's logprobs.

  Both models pass through the same teacher-forced code, so that two equal
  ones are at KL 0 to the last bit.
  """
  rollout = rollout_lib.rollout(
    policy["transformer"],
    prompts,
    key,
    model=config.model,
    config=config.rollout,
  )

  sequences = rollout.sequences
  comparison = logprobs_lib.compare(
    learner.states_and_head(policy, sequences, model=config.model),
    learner.states_and_head(reference, sequences, model=config.reference),
    sequences.response_tokens,
    temperature=config.rollout.temperature,
    logits_per_chunk=config.logits_per_chunk,
  )
  return rollout, comparison


def of_samples(
  rollout: types.Rollout,
  comparison: logprobs_lib.Comparison,
  beta: Float[Array, ""],
  config: LedgerConfig,
) -> types.Metrics:
  """The KL ledger of what `written` returned, and the gold reward.

  A sample's score is its implicit reward, β Σ log π/π_ref.
  """
  sequences = rollout.sequences
  mask = masking.response_mask(
    sequences.response_lengths, config.rollout.response_length
  )
  log_ratio, clamped = kl.clamp_log_ratio(
    comparison.logprobs - comparison.reference_logprobs
  )
  scalars, by_position = ledger.of_rollout(
    rollout, comparison, log_ratio, clamped, mask, group_size=1
  )
  scalars["kl/penalty"] = beta * scalars["kl/reverse_exact"]
  if config.gold is not None:
    golds = config.gold(sequences)
    scalars |= ledger.with_error("reward/gold", golds, group_size=1)
  samples = types.Samples(
    sequences=sequences,
    scores=beta * jnp.where(mask, log_ratio, 0.0).sum(1),
    logprobs=comparison.logprobs,
    reference_logprobs=comparison.reference_logprobs,
    reverse_kl=comparison.reverse_kl,
  )
  return types.Metrics(scalars, samples, by_position)
