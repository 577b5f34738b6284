"""The cache of reference logprobs: what it holds, and what it refuses."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import errors, types
from rlhf_jax.storage import reference_cache


def make_pairs(seed, rows):
  rng = np.random.default_rng(seed)

  def side() -> types.Sequences:
    draw = lambda *shape: rng.integers(1, 9, size=shape).astype(np.int32)
    return types.Sequences(draw(rows, 3), draw(rows), draw(rows, 4), draw(rows))

  return types.PreferencePairs(side(), side())


PAIRS = {"train": make_pairs(0, 5), "heldout": make_pairs(1, 3)}
IDENTITY = {"reference": "ab" * 32, "temperature": 1.0}


class Model:
  """Scores a response by its tokens' sum; counts how often it is asked."""

  calls = 0

  def __call__(self, pairs):
    self.calls += 1
    of = lambda side: -0.1 * side.response_tokens.sum(1).astype(jnp.float32)
    return np.asarray(of(pairs.chosen)), np.asarray(of(pairs.rejected))


def load_or_make(path, model, pairs=None, **changes):
  return reference_cache.load_or_make(
    path,
    PAIRS if pairs is None else pairs,
    model,
    **IDENTITY | changes,
  )


@pytest.fixture
def cache(tmp_path):
  """A file that was made of `PAIRS` and `IDENTITY`."""
  path = tmp_path / "reference_logprobs.safetensors"
  load_or_make(path, Model())
  return path


def test_the_reference_is_asked_once(tmp_path):
  path, model = tmp_path / "cache", Model()
  made = load_or_make(path, model)
  assert model.calls == 2  # A set at a time.
  loaded = load_or_make(path, model)
  assert model.calls == 2
  for name, pairs in PAIRS.items():
    sides = pairs.chosen, pairs.rejected
    for side, first, again in zip(sides, made[name], loaded[name], strict=True):
      wanted = -0.1 * np.asarray(side.response_tokens).sum(1)
      np.testing.assert_allclose(first, wanted, rtol=1e-6)
      np.testing.assert_array_equal(first, again)
      assert again.dtype == np.float32
  assert [p.name for p in tmp_path.iterdir()] == ["cache"]


def other_tokens():
  side = dataclasses.replace(
    PAIRS["train"].chosen,
    response_lengths=PAIRS["train"].chosen.response_lengths + 1,
  )
  pairs = types.PreferencePairs(side, PAIRS["train"].rejected)
  return PAIRS | {"train": pairs}


@pytest.mark.parametrize(
  "changes, found",
  [
    (
      {"reference": "cd" * 32},
      r"reference: abababababab when .*cdcdcdcdcdcd now",
    ),
    ({"temperature": 0.7}, r"temperature: 1\.0 when .* 0\.7 now"),
    ({"pairs": other_tokens()}, r"data: \w{12} when .*, \w{12} now"),
  ],
)
def test_a_stale_cache_is_refused(cache, changes, found):
  """Trap 11. It says what differs and how to mend it, and is left alone."""
  before, model = cache.read_bytes(), Model()
  with pytest.raises(errors.UserError, match=f"{cache}: {found}; put back"):
    load_or_make(cache, model, **changes)
  assert cache.read_bytes() == before and model.calls == 0


def truncate(content):
  return content[:-7]


def flip_a_bit(content):
  return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(
  "damage",
  [
    truncate,
    flip_a_bit,
    lambda content: b"",
    lambda content: content[:20],
    lambda content: b"\x80\x04]" + content,
  ],
)
def test_a_damaged_cache_is_refused(cache, damage):
  """Trap 28: a flipped bit as well."""
  cache.write_bytes(damage(cache.read_bytes()))
  before = cache.read_bytes()
  with pytest.raises(errors.UserError, match=r"damaged.*delete it") as error:
    load_or_make(cache, Model())
  assert "\n" not in str(error.value)
  assert cache.read_bytes() == before


def test_a_cache_of_fewer_pairs_is_refused(cache):
  more = PAIRS | {"train_mismatched": make_pairs(2, 5)}
  with pytest.raises(errors.UserError, match="delete it"):
    load_or_make(cache, Model(), pairs=more)


def test_another_safetensors_file_is_refused(tmp_path):
  import safetensors.numpy

  path = tmp_path / "model.safetensors"
  sides = ("chosen", "rejected")
  keys = [f"{name}/{side}" for name in PAIRS for side in sides]
  tensors = {key: np.zeros(3, np.float32) for key in keys}
  safetensors.numpy.save_file(tensors, path)
  with pytest.raises(errors.UserError, match="no cache of reference logprobs"):
    load_or_make(path, Model())


def test_a_failed_write_leaves_nothing(tmp_path):
  """The directory of the file is not there."""
  path = tmp_path / "gone" / "cache"
  with pytest.raises(errors.UserError, match=f"{path}: cannot be written"):
    load_or_make(path, Model())
  assert not list(tmp_path.iterdir())


def test_a_killed_write_is_no_cache(cache, tmp_path, monkeypatch):
  """Whoever dies before the rename leaves the old state behind."""

  def die(self, target):
    raise KeyboardInterrupt

  path = tmp_path / "new"
  monkeypatch.setattr(type(path), "replace", die)
  with pytest.raises(KeyboardInterrupt):
    load_or_make(path, Model())
  assert not path.exists()
