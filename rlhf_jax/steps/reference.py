"""The reference: the policy's transformer as it was, a value of its own.

It is an argument of the step: closed over, it would be compiled in as a
constant; donated, it would be gone; in the optimiser's state, it would move.
`compare` holds a policy against it.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhf_jax import types
from rlhf_jax.models import transformer
from rlhf_jax.objective import kl
from rlhf_jax.objective import logprobs as logprobs_lib
from rlhf_jax.steps import anchor
from rlhf_jax.steps import rollout as rollout_lib


@dataclasses.dataclass(frozen=True)
class ComparisonConfig:
  """How a policy writes, and what it is held against.

  Attributes:
    model: The policy's architecture.
    rollout: How it is sampled; both are scored at that temperature.
    reference: The reference's architecture, where it is not the policy's.
    prefix: What stands in front of every prompt, where something does.
    logits_per_chunk: See `objective.logprobs`.
  """

  model: transformer.TransformerConfig
  rollout: rollout_lib.RolloutConfig
  reference: transformer.TransformerConfig | None = None
  prefix: anchor.Prefix | None = None
  logits_per_chunk: int = 2**24

  @property
  def reference_model(self) -> transformer.TransformerConfig:
    """The reference's architecture."""
    return self.reference or self.model


class Divergence(NamedTuple):
  """The policy against a reference that read `sequences`, token by token.

  Attributes:
    sequences: The responses, after what the reference read before them.
    comparison: Of both models' distributions at each token.
    terms: What a penalty is made of.
    hidden: The reference's states.
  """

  sequences: types.Sequences
  comparison: logprobs_lib.Comparison
  terms: kl.Terms
  hidden: Float[Array, "B R E"]


class Compared(NamedTuple):
  """A policy beside its reference, on the policy's responses.

  Attributes:
    hidden: The policy's states, which predict the response's tokens.
    asked: Against the reference that read the policy's own prompt.
    clean: Against the reference on the prompt without its prefix (`anchor`);
      None where there is no prefix.
  """

  hidden: Float[Array, "B R D"]
  asked: Divergence
  clean: Divergence | None

  @property
  def judged(self) -> types.Sequences:
    """What rewards see: an answer to the prompt, whoever stands before it."""
    return (self.asked if self.clean is None else self.clean).sequences

  def charged(self, *, anchored: bool) -> Divergence:
    """What the penalty is made of: of the two, the one that is paid for."""
    if anchored and self.clean is not None:
      return self.clean
    return self.asked


def freeze(policy: types.Params) -> types.Params:
  """A copy of the policy without its value head.

  A copy, because the step donates the train state: buffers that reference
  and state shared would be overwritten, or refused as already donated. This
  is the one place that makes it.
  """
  return {"transformer": jax.tree.map(jnp.copy, policy["transformer"])}


def compare(
  policy: types.Params,
  reference: types.Params,
  sequences: types.Sequences,
  config: ComparisonConfig,
) -> Compared:
  """The policy against its reference, on responses that it wrote.

  Both models go through the same teacher-forced pass, although the policy's
  logprobs are known from the rollout: the difference of two equal models is
  then 0 to the last bit, and what decoding added is read off beside it.
  """
  policy, reference = policy["transformer"], reference["transformer"]
  hidden = rollout_lib.response_states(policy, sequences, model=config.model)

  def against(read):
    theirs = rollout_lib.response_states(
      reference, read, model=config.reference_model
    )
    comparison = logprobs_lib.compare(
      (hidden, transformer.head(policy, config.model)),
      (theirs, transformer.head(reference, config.reference_model)),
      sequences.response_tokens,
      temperature=config.rollout.temperature,
      logits_per_chunk=config.logits_per_chunk,
    )
    return Divergence(read, comparison, terms(comparison), theirs)

  clean = None
  if config.prefix is not None:
    clean = against(anchor.without_prefix(sequences, config.prefix))
  return Compared(hidden, against(sequences), clean)


def log_ratio(
  comparison: logprobs_lib.Comparison,
) -> tuple[Float[Array, "B R"], Bool[Array, "B R"]]:
  """ℓ of the sampled tokens within its limits, and where it was clamped."""
  return kl.clamp_log_ratio(comparison.logprobs - comparison.reference_logprobs)


def terms(comparison: logprobs_lib.Comparison) -> kl.Terms:
  """What a penalty is made of, at the policy that sampled."""
  clamped, _ = log_ratio(comparison)
  return kl.Terms(
    log_ratio=clamped,
    reverse_kl=comparison.reverse_kl,
    forward_kl=comparison.forward_kl,
    importance_ratio=jnp.ones_like(clamped),
  )
