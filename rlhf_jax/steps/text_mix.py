"""Texts in PPO's loss: what holds a policy to texts that it did not write.

At every predicted token x_t of a text, with s_t what stands before it, the
loss has γ times one of

    nll          −log π(x_t|s_t)
    forward_kl   KL(π_ref(·|s_t) ‖ π(·|s_t))
    reverse_kl   KL(π(·|s_t) ‖ π_ref(·|s_t))

`nll` is PPO-ptx (Ouyang et al. 2022, arXiv:2203.02155, eq. 2). The KLs hold
the policy to the reference at the texts' states, exact over the vocabulary.
No state depends on the policy, so the gradient through the logits is all of
it. The temperature is 1, as in SFT: texts are modelled and not sampled.

Differs from the paper: the mean over predicted tokens, and not the sum over a
text, has the coefficient. γ is then in reward units per nat, as β is: R tokens
of text at a nat each cost γ·R, as R tokens of a response would cost β·R.
"""

import dataclasses
import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax import types
from rlhf_jax.models import transformer
from rlhf_jax.objective import logprobs as logprobs_lib
from rlhf_jax.objective import masking
from rlhf_jax.steps import sft


@dataclasses.dataclass(frozen=True)
class Mix:
  """Which term, and γ, reward units per nat."""

  kind: Literal["nll", "forward_kl", "reverse_kl"]
  coefficient: float


class Batch(NamedTuple):
  """What a step with a mix takes in the place of prompts."""

  prompts: types.Prompts
  texts: types.PackedTexts


class Texts(NamedTuple):
  """A step's texts, ready to be cut into minibatches.

  Attributes:
    packed: The texts.
    weights: What a nat costs at each token but a row's first, in the units of
      the advantages; 0 where nothing is predicted.
    reference_hidden: The reference's states, for the KLs.
  """

  packed: types.PackedTexts
  weights: Float[Array, "B S"]
  reference_hidden: Float[Array, "B S E"] | None


def prepare(
  texts: types.PackedTexts,
  reference: types.Params,
  *,
  mix: Mix,
  scale: Float[Array, ""],
  minibatches: int,
  reference_model: transformer.TransformerConfig,
) -> Texts:
  """Texts with their weights and what the reference makes of them.

  Args:
    texts: Of the whole step.
    reference: Its transformer.
    mix: Which term.
    scale: What the rewards were multiplied by on their way to advantages.
    minibatches: Into how many the texts will be cut.
    reference_model: The reference's architecture.
  """
  texts = jax.tree.map(transformer.shard_batch, texts)
  mask = sft.predicted(texts)
  # Of the whole step, so that every token weighs the same in each minibatch.
  tokens = jnp.maximum(mask.sum(), 1) / minibatches
  hidden = None
  if mix.kind != "nll":
    hidden = sft.states(reference, texts, model=reference_model)
  return Texts(texts, mask * (mix.coefficient * scale / tokens), hidden)


def gradient(
  params: types.Params,
  texts: Texts,
  reference_head: types.Head,
  *,
  mix: Mix,
  model: transformer.TransformerConfig,
  logits_per_chunk: int,
) -> tuple[types.Params, dict[str, Float[Array, ""]]]:
  """The weighted loss's gradient in the policy's transformer, and sums, nats.

  Args:
    params: The policy's transformer.
    texts: Of one minibatch.
    reference_head: Of the reference.
    mix: Which term.
    model: The policy's architecture.
    logits_per_chunk: See `objective.logprobs`.

  Returns:
    The gradient; Σ over predicted tokens of `nll` and, where the term is a
    KL, of `forward_kl` and `reverse_kl`.
  """

  def forward(params):
    hidden = sft.states(params, texts.packed, model=model)
    return hidden, transformer.head(params, model)

  (hidden, head), pull_back = jax.vjp(forward, params)
  columns = {
    "tokens": texts.packed.tokens[:, 1:],
    "mask": sft.predicted(texts.packed),
    "weights": texts.weights,
    "reference_hidden": texts.reference_hidden,
  }
  arrays = 2 if mix.kind == "nll" else 4  # of logits, at once
  sums, of_hidden_and_head = logprobs_lib.gradient_in_columns(
    functools.partial(
      _token_losses,
      reference_head=reference_head,
      kind=mix.kind,
      logits_per_chunk=logits_per_chunk,
    ),
    hidden,
    head,
    columns,
    tokens=logits_per_chunk // arrays // head.vocab_size,
  )
  (of_params,) = pull_back(of_hidden_and_head)
  return of_params, sums


def figures(
  sums: dict[str, Float[Array, "*N"]], texts: Texts, *, epochs: int
) -> dict[str, Float[Array, ""]]:
  """`mix/…`: nats per predicted token, as all updates of a step found them.

  Args:
    sums: From `gradient`, of every minibatch of every epoch.
    texts: Of the whole step.
    epochs: How often it saw them.
  """
  tokens = epochs * jnp.maximum(sft.predicted(texts.packed).sum(), 1)
  return {f"mix/{name}": nats.sum() / tokens for name, nats in sums.items()}


def _token_losses(
  hidden, head, columns, *, reference_head, kind, logits_per_chunk
):
  """The weighted sum over some columns, and plain sums."""
  mask, tokens = columns["mask"], columns["tokens"]
  hidden = masking.real_states(hidden, mask)
  if kind == "nll":
    logprobs = logprobs_lib.token_logprobs(
      hidden, head, tokens, temperature=1.0, logits_per_chunk=logits_per_chunk
    )
    nats = {"nll": -logprobs}
  else:
    theirs = masking.real_states(columns["reference_hidden"], mask)
    comparison = logprobs_lib.compare_tokens(
      (hidden, head), (theirs, reference_head), tokens, temperature=1.0
    )
    nats = {
      "nll": -comparison.logprobs,
      "forward_kl": comparison.forward_kl,
      "reverse_kl": comparison.reverse_kl,
    }
  total = masking.masked_sum(columns["weights"] * nats[kind], mask)
  sums = {name: masking.masked_sum(x, mask) for name, x in nats.items()}
  return total, sums
