"""Diversity of a set of responses, in n-grams of token ids.

Each figure pools the n-grams of all responses; one that is shorter than n has
none. All of them depend on how many responses there are and how long they are:
compare figures of as many responses to the same prompts.
"""

from collections.abc import Iterator, Sequence

Ids = Sequence[int]


def distinct(responses: Sequence[Ids], n: int) -> float:
  """Different n-grams of all responses over their number of n-grams.

  From near 0 (all say the same) to 1 (no n-gram occurs twice); NaN where there
  is none. Source: Li et al. 2016 (arXiv:1510.03055), distinct-1 and -2.
  """
  grams = [gram for ids in responses for gram in _grams(ids, n)]
  return len(set(grams)) / len(grams) if grams else float("nan")


def self_repetition(responses: Sequence[Ids], n: int) -> float:
  """The share of n-grams that repeat an earlier one of the same response.

  0 where no response repeats itself; NaN where there is no n-gram. Source:
  Welleck et al. 2020 (arXiv:1908.04319), seq-rep-n. Differs from the paper:
  n-grams are pooled, where it averages over responses.
  """
  each = [list(_grams(ids, n)) for ids in responses]
  total = sum(map(len, each))
  repeated = sum(len(grams) - len(set(grams)) for grams in each)
  return repeated / total if total else float("nan")


def _grams(ids: Ids, n: int) -> Iterator[tuple[int, ...]]:
  return zip(*(ids[start:] for start in range(n)))
