"""The dimension key and the pytrees that pass between the rooms.

Dimensions, as jaxtyping annotations spell them: B sequences · P prompt ·
R response · T = P + R · V vocabulary · D width · H heads · G KV heads ·
K head size · F mlp width · L layers · C cache length.

Layout of a sequence, everywhere: the prompt is left-padded to P, the response
right-padded to R, so that every response begins at column P. Masks are built
from the two lengths (`objective.masking`), never from token ids: a pad id may
be a word, and a stop id may be the pad.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Params = Any  # A nested dict of arrays.

BATCH_AXES = ("data", "fsdp")  # Mesh axes that divide the batch.
MODEL_AXIS = "tensor"  # The mesh axis that divides heads, mlp and vocabulary.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Head:
  """What turns hidden states into logits; `objective.logprobs` applies it.

  Attributes:
    kernel: The matrix.
    softcap: c of c·tanh(x/c), which bounds the logits; None does not.
    tokens: Ids from this one on have no text. They are no tokens: nothing is
      drawn from them, and they have no probability. None is all ids.
  """

  kernel: Float[Array, "V D"]
  softcap: float | None = dataclasses.field(
    default=None, metadata={"static": True}
  )
  tokens: int | None = dataclasses.field(
    default=None, metadata={"static": True}
  )

  @property
  def vocab_size(self) -> int:
    """V."""
    return self.kernel.shape[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompts:
  """Left-padded prompts. A row's last `lengths[b]` tokens are real."""

  tokens: Int[Array, "B P"]
  lengths: Int[Array, "B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sequences:
  """Prompts with a response each, laid out as the module docstring says.

  A response's length counts its stop token, if it has one.
  """

  prompt_tokens: Int[Array, "B P"]
  prompt_lengths: Int[Array, "B"]
  response_tokens: Int[Array, "B R"]
  response_lengths: Int[Array, "B"]

  @property
  def tokens(self) -> Int[Array, "B T"]:
    """Prompt and response side by side."""
    return jnp.concatenate([self.prompt_tokens, self.response_tokens], axis=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollout:
  """What the policy wrote, with the logprobs that it had while writing.

  `logprobs` are under the temperature-scaled policy over the whole vocabulary
  (top-k and top-p narrow what is sampled, not what is scored); 0 beyond a
  response's end. `truncated` rows ran out of room before a stop token.
  """

  sequences: Sequences
  logprobs: Float[Array, "B R"]
  truncated: Bool[Array, "B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedTexts:
  """Several texts a row. Segment 0 is padding; positions restart per text.

  `loss_mask[b, t]` marks the tokens that are to be predicted (a response's);
  a text's first token is never predicted.
  """

  tokens: Int[Array, "B T"]
  segments: Int[Array, "B T"]
  positions: Int[Array, "B T"]
  loss_mask: Bool[Array, "B T"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PreferencePairs:
  """The same prompt with a preferred and a rejected response."""

  chosen: Sequences
  rejected: Sequences

  @property
  def both(self) -> Sequences:
    """All chosen, and after them all rejected: one batch for a model."""
    return jax.tree.map(
      lambda *sides: jnp.concatenate(sides), self.chosen, self.rejected
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """All that a run needs to go on, beside its config and its frozen models.

  Randomness and the place in the data are derived from `step`; `beta` is the
  state of the β controller and empty where a stage has no penalty.
  """

  step: Int[Array, ""]
  params: Params
  optimizer: Any
  beta: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Samples:
  """Per-response record of one PPO step, for people and for `samples.jsonl`."""

  sequences: Sequences
  scores: Float[Array, "B"]
  logprobs: Float[Array, "B R"]
  reference_logprobs: Float[Array, "B R"]
  reverse_kl: Float[Array, "B R"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Metrics:
  """A step's figures by name, and the responses that they were read off.

  `by_position` holds means over the responses that reach each position, their
  standard errors, and how many those are.
  """

  scalars: dict[str, Float[Array, ""]]
  samples: Samples
  by_position: dict[str, Float[Array, "R"]]
