"""What the fields of a study may be, said once for the check and its message.

limits.check(config, {"seeds": limits.SEEDS, "kept": limits.inside(0, 1)})
"""

from collections.abc import Callable, Collection, Mapping
import math
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from rlhf_jax import errors


class Limit(NamedTuple):
  """What is wanted, in words, and whether a value is that."""

  wanted: str
  holds: Callable[[Any], bool]


def check(config: ConfigDict, wanted: Mapping[str, Limit]) -> None:
  """Refuses a config unless its fields are as wanted.

  Args:
    config: A study's.
    wanted: By field; one limit may stand for several, with spaces between.

  Raises:
    UserError: With the first such field, its value and what is wanted.
  """
  for fields, limit in wanted.items():
    for field in fields.split():
      if not limit.holds(config[field]):
        raise errors.UserError(
          f"config.{field}: {config[field]!r}; wanted {limit.wanted}"
        )


def between(low: int, high: int, named: str = "") -> Limit:
  """A number from `low` to `high`; `named` is what the message calls that."""
  return Limit(f"{low} to {named or high}", lambda x: low <= x <= high)


def inside(low: float, high: float) -> Limit:
  """A number between two that it may not be."""
  return Limit(f"in ({low}, {high})", lambda x: low < x < high)


def at_least(low: float) -> Limit:
  """That number or a larger one."""
  return Limit(f"at least {low}", lambda x: x >= low)


def steps_of(config: ConfigDict) -> Limit:
  """A number of steps that PPO has."""
  steps = config.training.train.steps
  return between(1, steps, f"training.train.steps={steps}")


def is_rising(
  values: Collection[float],
  *,
  count: int = 1,
  above: float = -math.inf,
  below: float = math.inf,
) -> bool:
  """At least `count` numbers, each larger than the one before, within both."""
  return (
    len(values) >= count
    and list(values) == sorted({*values})
    and all(above < x < below for x in values)
  )


def some_of(names: Collection[str]) -> Limit:
  """One or more of the names, none of them twice."""
  return Limit(
    f"different ones of {', '.join(names)}",
    lambda xs: len(xs) == len({*xs}) > 0 and {*xs} <= {*names},
  )


SEEDS = between(2, 20)
ABOVE_0 = Limit("above 0", lambda x: x > 0)
FINITE_ABOVE_0 = Limit("finite and above 0", lambda x: 0 < x < math.inf)
RISING_FROM_0 = Limit(
  "0 and then rising numbers",
  lambda xs: is_rising(xs, count=2) and xs[0] == 0,
)


def equal(value: Any, why: str = "the study sets it itself") -> Limit:
  """That value, and no choice of the user's."""
  return Limit(f"{value!r}: {why}", lambda x: x == value)
