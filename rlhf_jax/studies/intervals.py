"""Means with intervals, and what a verdict may conclude from them.

A seed is one observation: what differs between seeds is the whole error, that
of the responses of each run included. Where arms share their seeds, the
differences of pairs are compared, which leaves out what the seeds have alike.
"""

from collections.abc import Sequence
import math
from typing import NamedTuple

import numpy as np
from scipy import stats

Values = Sequence[float] | np.ndarray


class Interval(NamedTuple):
  """A mean and the ends of its interval."""

  mean: float
  low: float
  high: float

  def __format__(self, spec: str) -> str:
    """All three numbers by one format, such as `+.2f` or `.0%`."""
    mean, low, high = (format(x, spec or ".2f") for x in self)
    return f"{mean} ({low} to {high})"

  def __str__(self) -> str:
    return format(self)


def of_mean(values: Values, *, level: float = 0.95) -> Interval:
  """Student's interval of the mean of independent values.

  Of one value it is infinitely wide; of equal ones it has no width.
  """
  array = np.asarray(values, np.float64)
  mean = float(array.mean())
  if array.size < 2:
    return Interval(mean, -math.inf, math.inf)
  error = float(array.std(ddof=1)) / math.sqrt(array.size)
  half = float(stats.t.ppf((1 + level) / 2, array.size - 1)) * error
  return Interval(mean, mean - half, mean + half)


def of_difference(
  first: Values, second: Values, *, level: float = 0.95
) -> Interval:
  """Student's interval of the mean of `first − second`, pair by pair."""
  pairs = zip(first, second, strict=True)
  return of_mean([a - b for a, b in pairs], level=level)
