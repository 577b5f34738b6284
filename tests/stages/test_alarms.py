"""Alarms of the KL ledger: where they begin, and when they are silent."""

import numpy as np
import pytest

from rlhf_jax.stages import alarms

QUIET = {
  "kl/reverse_k1": 2.0,
  "kl/reverse_k1_se": 0.5,
  "kl/clamp_fraction": 0.0,
  "rollout/logprob_max_abs_diff": 1e-6,
  "rollout/truncated_fraction": 0.2,
}


def raised(compute_dtype="float32", **figures):
  """The alarms of one step; a figure goes by what follows its slash."""
  names = {name.split("/")[1]: name for name in QUIET}
  scalars = QUIET | {names[name]: value for name, value in figures.items()}
  return alarms.Watch(compute_dtype).alarms(0, scalars)


@pytest.mark.parametrize(
  "figures, expected",
  [
    # 3 · 0.5 = 1.5 below 0; exact in binary, so that "at" is at.
    ({"reverse_k1": -1.25}, None),
    ({"reverse_k1": -1.5}, None),
    ({"reverse_k1": -1.5625}, "kl/reverse_k1 = -1.56 is more than 3 standard"),
    # A standard error of 0: one response, or equal ones.
    ({"reverse_k1": -2.0, "reverse_k1_se": 0.0}, None),
    ({"reverse_k1": 0.0, "reverse_k1_se": 0.0}, None),
    ({"clamp_fraction": 0.0099}, None),
    ({"clamp_fraction": 0.01}, None),
    ({"clamp_fraction": 0.0101}, "kl/clamp_fraction = 1.0% of the tokens"),
    ({"clamp_fraction": 1.0}, "kl/clamp_fraction = 100.0% of the tokens"),
    ({"logprob_max_abs_diff": 0.0009}, None),
    ({"logprob_max_abs_diff": 0.001}, None),
    ({"logprob_max_abs_diff": 0.0011}, "rollout/logprob_max_abs_diff = 0.0011"),
    ({"truncated_fraction": 0.5}, None),
    ({"truncated_fraction": 0.96}, "rollout/truncated_fraction = 96% of the"),
    # NaN is another room's business, and no figure to compare.
    ({"reverse_k1": np.nan}, None),
    ({"reverse_k1": -9.0, "reverse_k1_se": np.nan}, None),
    ({"clamp_fraction": np.nan, "logprob_max_abs_diff": np.nan}, None),
    ({"reverse_k1": -np.inf}, "kl/reverse_k1 = -inf"),
  ],
)
def test_each_alarm_begins_above_its_threshold(figures, expected):
  """Trap 4: a negative k1 is noise down to 3 standard errors."""
  found = raised(**figures)
  if expected is None:
    assert found == []
    return
  (line,) = found
  assert line.startswith(f"alarm: {expected}")
  assert "\n" not in line


@pytest.mark.parametrize(
  "compute_dtype, below, above",
  [("float32", 9e-4, 1.1e-3), ("bfloat16", 0.24, 0.26)],
)
def test_a_coarser_type_may_differ_more(compute_dtype, below, above):
  assert raised(compute_dtype, logprob_max_abs_diff=below) == []
  (line,) = raised(compute_dtype, logprob_max_abs_diff=above)
  tolerance = {"float32": "0.001", "bfloat16": "0.25"}[compute_dtype]
  assert line.endswith(f"agree within {tolerance}")


def test_all_that_is_found_is_said():
  lines = raised(
    reverse_k1=-9.0, clamp_fraction=0.5, logprob_max_abs_diff=np.float32(1)
  )
  assert [line.split()[1] for line in lines] == [
    "kl/reverse_k1",
    "kl/clamp_fraction",
    "rollout/logprob_max_abs_diff",
  ]
  assert "raise kl.beta" in lines[1]


def test_the_same_alarm_is_silent_for_fifty_steps():
  watch = alarms.Watch("float32")
  clamped = QUIET | {"kl/clamp_fraction": 0.02}
  steps = [step for step in range(7, 160) if watch.alarms(step, clamped)]
  assert steps == [7, 57, 107, 157]


def test_another_alarm_is_not_silenced():
  watch = alarms.Watch("float32")
  clamped = QUIET | {"kl/clamp_fraction": 0.02}
  assert len(watch.alarms(0, clamped)) == 1
  both = clamped | {"kl/reverse_k1": -9.0}
  (line,) = watch.alarms(1, both)
  assert "kl/reverse_k1" in line


def test_silence_begins_with_what_was_said_and_not_with_what_was_seen():
  """An alarm that comes and goes is raised again on its fiftieth step."""
  watch = alarms.Watch("float32")
  clamped = QUIET | {"kl/clamp_fraction": 0.02}
  assert watch.alarms(0, clamped)
  assert not watch.alarms(1, QUIET)
  assert not watch.alarms(49, clamped)
  assert watch.alarms(50, clamped)
  assert not watch.alarms(51, clamped)


def test_runs_have_watches_of_their_own():
  clamped = QUIET | {"kl/clamp_fraction": 0.02}
  one, other = alarms.Watch("float32"), alarms.Watch("float32")
  assert one.alarms(0, clamped) and other.alarms(0, clamped)
