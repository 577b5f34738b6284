"""What scores a response: three kinds behind one signature.

    score(reward_model, sequences, step) → Float[Array, "B"]

A reward model is a pytree argument of the step (frozen, never closed over).
A function of arrays is traced into the step. A function of text is called
from inside the compiled step through a host callback.
"""

from collections.abc import Callable, Sequence
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from rlhf_jax import types
from rlhf_jax.models import transformer
from rlhf_jax.objective import masking, preference_loss
from rlhf_jax.steps import rollout

Score = Callable[
  [types.Params, types.Sequences, Int[Array, ""]], Float[Array, "B"]
]
Agreement = Callable[
  [types.Params, types.Sequences, Int[Array, ""]], Float[Array, ""]
]
Gold = Callable[[types.Sequences], Float[Array, "B"]]
Scale = Callable[[types.Params], Float[Array, ""]]


class Judgement(NamedTuple):
  """What is said of responses. The policy learns from the scores alone.

  Attributes:
    scores: Reward units.
    golds: The true rewards, where there are any.
    pair_accuracy: The share of pairs that the scores order as the golds do.
    agreement: How far an ensemble of reward models agrees, if there is one.
    scale: Raw reward units in a unit of the score, where they differ.
  """

  scores: Float[Array, "B"]
  golds: Float[Array, "B"] | None
  pair_accuracy: Float[Array, ""] | None
  agreement: Float[Array, ""] | None
  scale: Float[Array, ""] | None

  @property
  def reliability(self) -> Float[Array, ""]:
    """What β controllers ask for; NaN where nobody measured.

    The agreement stands in for an accuracy that is not known.
    """
    for measured in (self.pair_accuracy, self.agreement):
      if measured is not None:
        return measured
    return jnp.float32(jnp.nan)


Judge = Callable[[types.Params, types.Sequences, Int[Array, ""]], Judgement]


def judge(
  score: Score,
  *,
  group_size: int,
  gold: Gold | None = None,
  agreement: Agreement | None = None,
  score_scale: Scale | None = None,
) -> Judge:
  """All that judges a response, behind the signature of a score."""

  def judged(reward_model, sequences, step):
    scores = score(reward_model, sequences, step)
    golds, accuracy, agreed, scale = None, None, None, None
    if score_scale is not None:
      scale = score_scale(reward_model)
    if agreement is not None:
      agreed = agreement(reward_model, sequences, step)
    if gold is not None:
      golds = gold(sequences)
      accuracy = preference_loss.concordance(
        scores, golds, group_size=group_size
      )
    return Judgement(scores, golds, accuracy, agreed, scale)

  return judged


def raw_scores(
  reward_model: types.Params,
  sequences: types.Sequences,
  *,
  model: transformer.TransformerConfig,
) -> Float[Array, "B"]:
  """The score head on the last real token, before normalisation."""
  hidden = rollout.teacher_forced(
    reward_model["transformer"], sequences, model=model
  )
  # An empty response leaves the last token of the prompt, one column before.
  columns = sequences.prompt_tokens.shape[1] + sequences.response_lengths
  last = masking.last_token(hidden, columns)
  return transformer.apply_scalar_head(reward_model["score_head"], last)


def from_model(model: transformer.TransformerConfig) -> Score:
  """Scores of a reward model, normalised by its own stored moments.

  (raw − mean) / std, where mean and std were measured on held-out responses
  of the reference: β then has the same meaning for every reward model.
  """

  def score(reward_model, sequences, step):
    del step
    moments = reward_model["normalisation"]
    raw = raw_scores(reward_model, sequences, model=model)
    return (raw - moments["mean"]) / moments["std"]

  return score


def score_scale(reward_model: types.Params) -> Float[Array, ""]:
  """Raw reward units in a unit of the score.

  A model's is its stored deviation σ. An ensemble's score is the mean of r/σ:
  of a reward that all members know, 1 / mean(1/σ).
  """
  is_ensemble = "members" in reward_model
  members = reward_model["members"] if is_ensemble else [reward_model]
  deviations = [member["normalisation"]["std"] for member in members]
  return 1 / jnp.stack([1 / deviation for deviation in deviations]).mean()


def from_ensemble(
  models: Sequence[transformer.TransformerConfig], *, group_size: int
) -> tuple[Score, Agreement]:
  """The mean score of several reward models, and how far they agree.

  Their parameters are `{"members": (…)}`, each a reward model's own. The
  agreement is the share of pairs of responses that two members order alike,
  averaged over the pairs of members: ½ is chance. Where no gold and no fresh
  labels exist it stands in for the accuracy, which it can only flatter:
  members that err alike agree.
  """
  functions = [from_model(model) for model in models]

  def member_scores(reward_model, sequences, step):
    members = reward_model["members"]
    return [
      function(member, sequences, step)
      for function, member in zip(functions, members)
    ]

  def score(reward_model, sequences, step):
    return jnp.stack(member_scores(reward_model, sequences, step)).mean(0)

  def agreement(reward_model, sequences, step):
    # The compiler finds these scores among those of `score`.
    scores = member_scores(reward_model, sequences, step)
    pairs = itertools.combinations(scores, 2)
    alike = [
      preference_loss.concordance(a, b, group_size=group_size) for a, b in pairs
    ]
    return jnp.stack(alike).mean()

  return score, agreement


def from_function(
  function: Callable[
    [Int[Array, "B T"], Bool[Array, "B T"]], Float[Array, "B"]
  ],
) -> Score:
  """Scores of a JAX function of all tokens and the mask of the response's."""

  def score(reward_model, sequences, step):
    del reward_model, step
    prompt = jnp.zeros(sequences.prompt_tokens.shape, bool)
    response = masking.response_mask(
      sequences.response_lengths, sequences.response_tokens.shape[1]
    )
    mask = jnp.concatenate([prompt, response], axis=1)
    return jnp.asarray(function(sequences.tokens, mask), jnp.float32)

  return score


def from_host(
  function: Callable[[types.Sequences, int], np.ndarray],
) -> Score:
  """Scores of a host function, called while the compiled step waits.

  The function gets numpy arrays and the step's number and must return float32
  `[B]`. It must not raise: an exception in a callback ends the whole program
  with the runtime's message and not with its own.
  """

  def score(reward_model, sequences, step):
    del reward_model
    shape = sequences.response_lengths.shape
    return jax.pure_callback(
      lambda sequences, step: function(
        jax.tree.map(np.asarray, sequences), int(step)
      ),
      jax.ShapeDtypeStruct(shape, jnp.float32),
      sequences,
      step,
      vmap_method="sequential",
    )

  return score
