"""Responses as samples.jsonl has them."""

from typing import Any

import numpy as np

from rlhf_jax import types
from rlhf_jax.objective import logprobs as logprobs_lib
from rlhf_jax.storage import pretrained as pretrained_lib
from rlhf_jax.text import tokenizer as tokenizer_lib


def of_step(
  step: int,
  policy: pretrained_lib.Pretrained,
  metrics: types.Metrics,
  *,
  most: int,
) -> list[dict[str, Any]]:
  """Some responses; the first record also has the batch's KL by position.

  Args:
    step: Whose they are.
    policy: Its tokenizer reads them.
    metrics: As numpy arrays.
    most: Responses that are recorded.
  """
  samples = metrics.samples
  records = [
    {"step": step}
    | of_response(policy, samples.sequences, samples, row)
    | {"score": float(samples.scores[row])}
    for row in range(min(most, len(samples.scores)))
  ]
  reached = int(np.sum(metrics.by_position["responses"] > 0))
  records[0]["by_position"] = {
    name: np.round(x[:reached], 5).tolist()
    for name, x in metrics.by_position.items()
  }
  return records


def of_response(
  policy: pretrained_lib.Pretrained,
  sequences: types.Sequences,
  figures: types.Samples | logprobs_lib.Comparison,
  row: int,
) -> dict[str, Any]:
  """Prompt and response as texts, and the figures of each of its tokens."""
  size = sequences.response_lengths[row]
  prompt = sequences.prompt_tokens[row]
  prompt = prompt[len(prompt) - sequences.prompt_lengths[row] :].tolist()
  response = sequences.response_tokens[row, :size].tolist()
  numbers = lambda x: np.round(x[row, :size], 5).tolist()
  return {
    "prompt": tokenizer_lib.decode(policy.tokenizer, prompt),
    "response": tokenizer_lib.decode(policy.tokenizer, response),
    "tokens": tokenizer_lib.pieces(policy.tokenizer, response),
    "logprobs": numbers(figures.logprobs),
    "reference_logprobs": numbers(figures.reference_logprobs),
    "reverse_kl": numbers(figures.reverse_kl),
  }
