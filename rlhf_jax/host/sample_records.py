"""Responses as samples.jsonl has them."""

from typing import Any

import numpy as np

from rlhf_jax import types
from rlhf_jax.host import pretrained as pretrained_lib
from rlhf_jax.host import tokenizer as tokenizer_lib


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
  records = []
  samples, sequences = metrics.samples, metrics.samples.sequences
  for row in range(min(most, len(samples.scores))):
    prompt = sequences.prompt_tokens[row]
    prompt = prompt[len(prompt) - sequences.prompt_lengths[row] :]
    size = sequences.response_lengths[row]
    decode = lambda ids: tokenizer_lib.decode(policy.tokenizer, ids.tolist())
    numbers = lambda x, row=row, size=size: np.round(x[row, :size], 5).tolist()
    records.append(
      {
        "step": step,
        "prompt": decode(prompt),
        "response": decode(sequences.response_tokens[row, :size]),
        "tokens": [
          decode(sequences.response_tokens[row, i : i + 1]) for i in range(size)
        ],
        "score": float(samples.scores[row]),
        "logprobs": numbers(samples.logprobs),
        "reference_logprobs": numbers(samples.reference_logprobs),
        "reverse_kl": numbers(samples.reverse_kl),
      }
    )
  reached = int(np.sum(metrics.by_position["responses"] > 0))
  records[0]["by_position"] = {
    name: np.round(x[:reached], 5).tolist()
    for name, x in metrics.by_position.items()
  }
  return records
