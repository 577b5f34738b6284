"""Batches, splits and rows by the batch, against their definitions."""

import jax
import numpy as np
import pytest

from rlhf_jax import types
from rlhf_jax.data import batches as batches_lib
from rlhf_jax.errors import UserError
from rlhf_jax.steps import sharding

LIMITS = {"pad_id": 0, "vocab_size": 10, "where": "rows"}


def refusal(function, *args, **kwargs):
  with pytest.raises(UserError) as error:
    function(*args, **kwargs)
  assert "\n" not in str(error.value)
  return str(error.value)


def numbered(count):
  """Prompts whose tokens and lengths both say their row."""
  rows: Any = np.arange(count)
  tokens: Any = np.stack([rows, rows + 100], axis=1)
  return types.Prompts(tokens, rows)


def batches(rows, steps, *, seed=3, batch_size=4):
  return [
    batches_lib.batch_at(rows, seed=seed, step=step, batch_size=batch_size)
    for step in steps
  ]


@pytest.mark.parametrize("count, batch_size", [(10, 4), (8, 4), (7, 7), (3, 8)])
def test_every_row_once_an_epoch(count, batch_size):
  rows = numbered(count)
  drawn = batches(rows, range(3 * count), batch_size=batch_size)
  for batch in drawn:
    assert batch.tokens.shape == (batch_size, 2)
    np.testing.assert_array_equal(batch.tokens[:, 0], batch.lengths)
    np.testing.assert_array_equal(batch.tokens[:, 1], batch.lengths + 100)
  stream = np.concatenate([batch.lengths for batch in drawn])
  epochs = stream.reshape(-1, count)
  assert len(epochs) == 3 * batch_size
  np.testing.assert_array_equal(
    np.sort(epochs), np.tile(np.arange(count), (len(epochs), 1))
  )
  assert len(set(map(tuple, epochs))) > 1  # Another order each epoch.


def test_a_step_is_the_same_whatever_was_drawn_before():
  """Trap 12: the place in the data is the step alone."""
  rows = numbered(10)
  in_order = batches(rows, range(30))
  batches_lib._permutation.cache_clear()
  backwards = batches(rows, reversed(range(30)))[::-1]
  jax.tree.map(np.testing.assert_array_equal, in_order, backwards)
  batches_lib._permutation.cache_clear()
  jax.tree.map(
    np.testing.assert_array_equal, [in_order[17]], batches(rows, [17])
  )


def test_seeds_differ_and_the_order_never_changes():
  """The drawn rows are part of what a resumed run relies on."""
  rows = numbered(10)
  orders = [
    tuple(batches(rows, [0], seed=seed, batch_size=10)[0].lengths.tolist())
    for seed in range(5)
  ]
  assert len(set(orders)) == 5
  bits = np.random.PCG64(np.random.SeedSequence([0, 1])).random_raw(10)
  assert orders[0] == tuple(sorted(range(10), key=lambda row: bits[row]))


def test_batches_of_any_pytree():
  rows: Any = np.arange(6)
  side = types.Sequences(rows, rows + 10, rows + 20, rows + 30)
  pairs = types.PreferencePairs(side, side)
  batch = batches_lib.batch_at(pairs, seed=0, step=2, batch_size=4)
  row = batch.chosen.prompt_tokens
  np.testing.assert_array_equal(batch.rejected.response_lengths, row + 30)


def test_only_prompts_may_be_fewer_than_a_batch():
  rows = {"a": np.arange(3)}
  message = refusal(batches_lib.batch_at, rows, seed=0, step=0, batch_size=4)
  assert message.startswith("train.batch_size: 4, and the data has 3 rows;")
  none = refusal(
    batches_lib.batch_at, numbered(0), seed=0, step=0, batch_size=4
  )
  assert "the data has 0 rows" in none


# The held-out split.


@pytest.mark.parametrize("fraction, heldout", [(0.0, 0), (0.01, 1), (0.25, 10)])
def test_split_is_a_partition_in_order(fraction, heldout):
  rows = [str(i) for i in range(40)]
  train, held = batches_lib.split_heldout(rows, fraction, 5)
  assert len(held) == heldout
  assert sorted(train + held, key=int) == rows
  assert train == sorted(train, key=int)
  assert held == sorted(held, key=int)
  assert batches_lib.split_heldout(rows, fraction, 5) == (train, held)


def test_split_depends_on_the_seed():
  rows = list(range(100))
  splits = {
    tuple(batches_lib.split_heldout(rows, 0.1, seed)[1]) for seed in range(5)
  }
  assert len(splits) == 5


@pytest.mark.parametrize("seed", range(5))
def test_equal_rows_stay_on_one_side(seed):
  """Texts, ids and arrays alike; nothing is lost."""
  rng = np.random.default_rng(seed)
  numbers: Any = rng.integers(0, 30, 100)
  lists = [([int(number)], [int(number), 1]) for number in numbers]
  tokens: Any = np.stack([numbers, numbers], axis=1)
  arrays = types.Prompts(tokens, numbers % 2)
  train, held = batches_lib.split_heldout(lists, 0.3, seed)
  assert held
  assert not {str(row) for row in train} & {str(row) for row in held}
  assert len(train) + len(held) == 100
  train_array, held_array = batches_lib.split_heldout(arrays, 0.3, seed)
  assert [row[0][0] for row in train] == train_array.tokens[:, 0].tolist()
  assert [row[0][0] for row in held] == held_array.tokens[:, 1].tolist()


def test_refuses_a_split_that_leaves_nothing():
  message = refusal(batches_lib.split_heldout, ["a", "a"], 0.1, 0)
  assert message.startswith("data.heldout_fraction: 0.1 of 1 distinct rows")


@pytest.mark.parametrize("count", [1, 7, 8, 20])
def test_map_rows_gives_every_row_once_and_in_order(count):
  rows = np.arange(count, dtype=np.int32)
  sizes = []

  def double(batch, index):
    sizes.append((index, len(batch)))
    return 2 * batch, batch + index * 0

  doubled, same = batches_lib.map_rows(
    double, rows, mesh=sharding.make_mesh(8, 1, 1), batch_size=8
  )
  np.testing.assert_array_equal(doubled, 2 * rows)
  np.testing.assert_array_equal(same, rows)
  assert sizes == [(i, 8) for i in range(-(-count // 8))]
