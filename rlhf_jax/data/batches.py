"""Which rows a step sees, which are held out, and rows by the batch.

A batch is a pure function of (seed, step), so the place in the data is no
state, and a run that resumes sees the rows that it would have seen.
"""

from collections.abc import Callable
import functools
from typing import Any, TypeVar

import jax
from jaxtyping import Int
import numpy as np

from rlhf_jax import types
from rlhf_jax.errors import UserError
from rlhf_jax.steps import sharding

Rows = TypeVar("Rows")

# Streams of `_permutation`: one splits the rows, the others order the epochs.
_SPLIT, _FIRST_EPOCH = 0, 1


def batch_at(rows: Rows, *, seed: int, step: int, batch_size: int) -> Rows:
  """The rows of one step: a function of (seed, step) and of nothing else.

  The stream is epoch after epoch, each in an order of its own; a batch may
  straddle two. Prompts may be fewer than a batch and then repeat within it,
  for each gets another response; of other rows a batch needs enough.

  Args:
    rows: A pytree of arrays with equal leading axes.
    seed: At least 0.
    step: Counts from 0.
    batch_size: Rows.

  Raises:
    UserError: There are fewer rows than a batch, or no prompts.
  """
  count = _count(rows)
  if count < (1 if isinstance(rows, types.Prompts) else batch_size):
    raise UserError(
      f"train.batch_size: {batch_size}, and the data has {count:,} rows; wanted"
      " at least a batch; lower it or bring more rows"
    )
  places = np.arange(step * batch_size, (step + 1) * batch_size)
  epochs = places // count
  indices = np.empty_like(places)
  for epoch in range(epochs[0], epochs[-1] + 1):
    order = _permutation(count, seed, _FIRST_EPOCH + epoch)
    indices[epochs == epoch] = order[places[epochs == epoch] % count]
  return _take(rows, indices)


def split_heldout(
  rows: Rows, fraction: float, seed: int, *, by: Any = None
) -> tuple[Rows, Rows]:
  """Splits rows in two, (train, held out), each in its old order.

  Rows that are equal, or that are equal in `by`, stay on one side, so that
  nothing that is held out was trained on: the fraction is one of the distinct
  rows. At least one is held out, unless the fraction is 0.

  Args:
    rows: A list of texts or ids, or a pytree of arrays with equal leading axes.
    fraction: In [0, 1).
    seed: At least 0.
    by: What must not be on both sides, such as prompts; None is the row.

  Raises:
    UserError: No row would be left to train on.
  """
  groups: dict[Any, list[int]] = {}
  for index, key in enumerate(_keys(rows if by is None else by)):
    groups.setdefault(key, []).append(index)
  heldout = max(round(fraction * len(groups)), int(fraction > 0))
  if heldout >= len(groups):
    raise UserError(
      f"data.heldout_fraction: {fraction} of {len(groups)} distinct rows leaves"
      " none to train on; lower it or bring more rows"
    )
  members = list(groups.values())
  held = np.zeros(_count(rows), np.bool_)
  for group in _permutation(len(groups), seed, _SPLIT)[:heldout]:
    held[members[group]] = True
  return _take(rows, np.flatnonzero(~held)), _take(rows, np.flatnonzero(held))


def map_rows(
  function: Callable[..., Any],
  rows: Any,
  *,
  mesh: jax.sharding.Mesh,
  batch_size: int,
) -> Any:
  """`function(batch, index)` over all rows; its results, one per row, joined.

  Every batch is full, because a mesh divides it: the last is filled up with
  the first rows, whose second results are dropped.

  Args:
    function: Of a batch on the mesh and its number; compiled by the caller.
    rows: A pytree of arrays with equal leading axes.
    mesh: Where the batches go.
    batch_size: Rows of a batch.

  Returns:
    numpy arrays with a leading axis as long as that of `rows`.
  """
  count = _count(rows)
  results = []
  with jax.set_mesh(mesh):
    for index, begin in enumerate(range(0, count, batch_size)):
      batch = _take(rows, np.arange(begin, begin + batch_size) % count)
      result = function(sharding.place_batch(batch, mesh), index)
      results.append(jax.device_get(result))
  return jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *results)


@functools.lru_cache(maxsize=8)
def _permutation(count: int, seed: int, stream: int) -> Int[np.ndarray, "N"]:
  """An order of `count` rows.

  Sorted from raw bits, which numpy promises never to change: a run can be
  resumed under another numpy. `Generator.permutation` carries no such promise.
  """
  bits = np.random.PCG64(np.random.SeedSequence([seed, stream]))
  order = np.argsort(bits.random_raw(count), kind="stable")
  order.flags.writeable = False  # The cache hands it to every caller.
  return order


def _count(rows: Any) -> int:
  if isinstance(rows, list):
    return len(rows)
  (count,) = {len(leaf) for leaf in jax.tree.leaves(rows)}
  return count


def _take(rows: Any, indices: Int[np.ndarray, "N"]) -> Any:
  if isinstance(rows, list):
    return [rows[index] for index in indices]
  return jax.tree.map(lambda leaf: leaf[indices], rows)


def _keys(rows: Any) -> list[Any]:
  """What is equal where rows are: their spelling, or their bytes."""
  if isinstance(rows, list):
    return [repr(row) for row in rows]
  leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(rows)]
  return [
    tuple(leaf[index].tobytes() for leaf in leaves)
    for index in range(_count(rows))
  ]
