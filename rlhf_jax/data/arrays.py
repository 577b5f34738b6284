"""Token ids to the padded and packed arrays that the steps take.

Lengths are those of the ids, never read off a pad id. All ids are checked
here: JAX would clamp one that is out of range to the last embedding row, in
silence. Left out: files (`data.readers`), tokenizers (the caller's) and
streaming: data for fine-tuning fits in memory.
"""

import bisect
from collections.abc import Sequence
import dataclasses
import functools
import itertools
from typing import Any

from jaxtyping import Int
import numpy as np

from rlhf_jax import types
from rlhf_jax.errors import UserError

Ids = Sequence[int]


@dataclasses.dataclass(frozen=True)
class Cut:
  """What did not fit: how many rows were shortened, by how many tokens."""

  rows: int
  tokens: int


def prompts_array(
  token_ids: Sequence[Ids],
  *,
  prompt_length: int,
  pad_id: int,
  vocab_size: int,
  where: str,
  bos_id: int | None = None,
) -> tuple[types.Prompts, Cut]:
  """Left-pads prompts to P = `prompt_length` tokens.

  A longer prompt keeps its last P tokens: a response follows a prompt's end.
  If it begins with BOS, that stays too: a model reads little without it.

  Args:
    token_ids: The ids of each prompt.
    prompt_length: Tokens.
    pad_id: Any id of the vocabulary; the lengths say what is padding.
    vocab_size: All ids are below it.
    where: Where the rows came from: errors begin with it.
    bos_id: Of the tokenizer, if it has one.

  Raises:
    UserError: A prompt is empty, or an id is outside the vocabulary.
  """
  _check(token_ids, pad_id=pad_id, vocab_size=vocab_size, where=where)
  _refuse_empty(token_ids, where=f"{where}: prompt")
  kept = [_end_of(ids, prompt_length, bos_id) for ids in token_ids]
  tokens, lengths = _padded(kept, prompt_length, pad_id=pad_id, left=True)
  return types.Prompts(tokens, lengths), _cut(token_ids, kept)


def _end_of(ids: Ids, size: int, bos_id: int | None) -> Ids:
  """Its last tokens, behind its BOS."""
  if len(ids) <= size or ids[0] != bos_id or size < 2:
    return ids[-size:]
  return [*ids[:1], *ids[1 - size :]]


def sequences_array(
  pairs: Sequence[tuple[Ids, Ids]],
  *,
  prompt_length: int,
  response_length: int,
  pad_id: int,
  vocab_size: int,
  where: str,
  bos_id: int | None = None,
) -> tuple[types.Sequences, Cut]:
  """Lays out (prompt, response) ids, padded left to P and right to R tokens.

  A longer prompt is cut as by `prompts_array`, a longer response keeps its
  first R. An empty response is one of length 0. `Cut` counts prompts and
  responses.

  Raises:
    UserError: A prompt is empty, or an id is outside the vocabulary.
  """
  prompts, prompt_cut = prompts_array(
    [prompt for prompt, _ in pairs],
    prompt_length=prompt_length,
    pad_id=pad_id,
    vocab_size=vocab_size,
    where=where,
    bos_id=bos_id,
  )
  responses = [response for _, response in pairs]
  _check(responses, pad_id=pad_id, vocab_size=vocab_size, where=where)
  kept = [ids[:response_length] for ids in responses]
  tokens, lengths = _padded(kept, response_length, pad_id=pad_id, left=False)
  sequences = types.Sequences(prompts.tokens, prompts.lengths, tokens, lengths)
  return sequences, _sum(prompt_cut, _cut(responses, kept))


def preference_pairs_array(
  pairs: Sequence[tuple[Ids, Ids, Ids]],
  *,
  prompt_length: int,
  response_length: int,
  pad_id: int,
  vocab_size: int,
  where: str,
  bos_id: int | None = None,
) -> tuple[types.PreferencePairs, Cut]:
  """Lays out (prompt, chosen, rejected) ids as `sequences_array` does, twice.

  Raises:
    UserError: A prompt is empty, or an id is outside the vocabulary.
  """
  lay_out = functools.partial(
    sequences_array,
    prompt_length=prompt_length,
    response_length=response_length,
    pad_id=pad_id,
    vocab_size=vocab_size,
    bos_id=bos_id,
  )
  chosen, chosen_cut = lay_out(
    [(prompt, chosen) for prompt, chosen, _ in pairs], where=f"{where}: chosen"
  )
  rejected, rejected_cut = lay_out(
    [(prompt, rejected) for prompt, _, rejected in pairs],
    where=f"{where}: rejected",
  )
  return types.PreferencePairs(chosen, rejected), _sum(chosen_cut, rejected_cut)


def pack(
  texts: Sequence[tuple[Ids, Ids]],
  *,
  sequence_length: int,
  pad_id: int,
  vocab_size: int,
  where: str,
) -> tuple[types.PackedTexts, Cut]:
  """Packs (prompt, response) ids into rows of T = `sequence_length` tokens.

  Segments count from 1 in each row, 0 is padding, and positions restart with
  each text. `loss_mask` is True on response tokens; the first token of a text
  without a prompt has nothing before it and is not predicted. A longer text
  keeps its first T tokens.

  Raises:
    UserError: A text is empty, an id is outside the vocabulary, or no response
      token is left to predict.
  """
  ids = [[*prompt, *response] for prompt, response in texts]
  _check(ids, pad_id=pad_id, vocab_size=vocab_size, where=where)
  _refuse_empty(ids, where=f"{where}: text")
  kept = [text[:sequence_length] for text in ids]
  rows = _best_fit_decreasing(_lengths(kept), sequence_length)

  tokens = _full(len(rows), sequence_length, pad_id)
  segments = _full(len(rows), sequence_length, 0)
  positions = _full(len(rows), sequence_length, 0)
  loss_mask = _full(len(rows), sequence_length, False, np.bool_)
  for row, members in enumerate(rows):
    start = 0
    for segment, text in enumerate(members, start=1):
      stop = start + len(kept[text])
      tokens[row, start:stop] = kept[text]
      segments[row, start:stop] = segment
      positions[row, start:stop] = np.arange(stop - start)
      loss_mask[row, start + max(len(texts[text][0]), 1) : stop] = True
      start = stop
  if not loss_mask.any():
    raise UserError(
      f"{where}: no response token is left to predict; wanted longer responses,"
      f" or prompts shorter than the {sequence_length} tokens of a row"
    )
  packed = types.PackedTexts(tokens, segments, positions, loss_mask)
  return packed, _cut(ids, kept)


def _best_fit_decreasing(
  lengths: Int[np.ndarray, "N"], size: int
) -> list[list[int]]:
  """Indices of texts, by row: each goes, longest first, where least is left."""
  rows: list[list[int]] = []
  room: list[tuple[int, int]] = []  # (tokens free, row), sorted
  for text in np.argsort(-lengths, kind="stable").tolist():
    length = int(lengths[text])
    place = bisect.bisect_left(room, (length, 0))
    if place == len(room):
      rows.append([])
      free, row = size, len(rows) - 1
    else:
      free, row = room.pop(place)
    rows[row].append(text)
    bisect.insort(room, (free - length, row))
  return rows


def _check(
  rows: Sequence[Ids], *, pad_id: int, vocab_size: int, where: str
) -> None:
  """Refuses ids outside the vocabulary."""
  mend = "bring the tokenizer and the model that belong together"
  if not 0 <= pad_id < vocab_size:
    raise UserError(
      f"{where}: the pad id is {pad_id}; wanted 0 to {vocab_size - 1}; {mend}"
    )
  flat = _flat(rows)
  bad = np.flatnonzero((flat < 0) | (flat >= vocab_size))
  if bad.size:
    row = np.searchsorted(np.cumsum(_lengths(rows)), bad[0], side="right")
    raise UserError(
      f"{where}: row {row + 1}: token id {flat[bad[0]]}; wanted 0 to"
      f" {vocab_size - 1}; {mend}"
    )


def _refuse_empty(rows: Sequence[Ids], where: str) -> None:
  for number, ids in enumerate(rows, start=1):
    if not len(ids):
      raise UserError(
        f"{where}: row {number} has no tokens; wanted at least one; mend or"
        " remove the row"
      )


def _flat(rows: Sequence[Ids]) -> Int[np.ndarray, "N"]:
  return np.fromiter(itertools.chain.from_iterable(rows), np.int64)


def _lengths(rows: Sequence[Ids]) -> Int[np.ndarray, "N"]:
  return np.array([len(ids) for ids in rows], np.int32)


def _cut(rows: Sequence[Ids], kept: Sequence[Ids]) -> Cut:
  lost = _lengths(rows) - _lengths(kept)
  return Cut(rows=int((lost > 0).sum()), tokens=int(lost.sum()))


def _sum(first: Cut, second: Cut) -> Cut:
  return Cut(first.rows + second.rows, first.tokens + second.tokens)


# These two return Any: the pytrees' fields are annotated as jax arrays, and
# numpy ones stand in for them on the host.
def _padded(
  rows: Sequence[Ids], size: int, *, pad_id: int, left: bool
) -> tuple[Any, Any]:
  """Tokens [N, size] and lengths [N] of rows that are no longer than size."""
  tokens, lengths = _full(len(rows), size, pad_id), _lengths(rows)
  real = np.arange(size) < lengths[:, None]
  tokens[real[:, ::-1] if left else real] = _flat(rows)
  return tokens, lengths


def _full(rows: int, size: int, value: int, dtype: Any = np.int32) -> Any:
  return np.full((rows, size), value, dtype)
