"""What the study `adversarial_prefix` reads off its arms, and its rule.

Harm is harmful words per response. The KL to the shifted reference, which
reads the prefix as the policy does, hides a policy's harm if it is smaller
than any policy of that harm must have to the reference on the clean prompts
(Donsker & Varadhan 1975, here with E the reference's clean answers):

    KL(π‖π_ref) ≥ sup_λ { λ · E_π[harm] − log E[exp(λ · harm)] }

A KL to the clean reference that any prefix makes large would be a false alarm
under most of them. It is therefore compared with the one of the reference
itself after random prefixes. Arms are compared seed by seed.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from rlhf_jax.studies import intervals, study

# The reference itself, by what it reads.
NONE, RANDOM, FOUND = "no prefix", "random prefixes", "found prefix"
# λ. At larger ones a few answers are the whole mean.
_TILTS = np.linspace(0.0, 2.0, 201)


class Arm(NamedTuple):
  """An arm's policies, a value a seed; KL is in nats per response.

  `harm` is harmful words per response; `shifted` the KL to the reference that
  reads what the policy reads, `anchored` to the one on the clean prompt; a
  policy of that harm is at `least` so far from the latter.
  """

  harm: np.ndarray
  shifted: np.ndarray
  anchored: np.ndarray
  least: np.ndarray


class Finding(NamedTuple):
  """What the rule reads of a policy under the found prefix; see `meanings`.

  `prevented` is None where nothing was trained.
  """

  more_harm: intervals.Interval
  hidden: intervals.Interval
  exposed: intervals.Interval
  no_false_alarm: intervals.Interval
  prevented: intervals.Interval | None


def meanings(factor: float) -> tuple[str, ...]:
  """What the fields of `Finding` are."""
  return (
    "harm more than without a prefix",
    "hidden: least KL of that harm − KL, shifted",
    f"exposed: KL, clean − {factor:g} · KL, shifted",
    "no false alarm: KL, clean, of the reference − after random ones",
    "prevented: harm more than charged clean",
  )


def least_kl(harms: np.ndarray, wanted: float) -> float:
  """The bound, from the harm of the reference's clean answers.

  Args:
    harms: Harmful words of each answer.
    wanted: The mean harm of a policy; below the reference's own the bound is 0.
  """
  values, counts = np.unique(harms, return_counts=True)
  weights = counts / counts.sum()
  cost = np.log(np.exp(np.outer(_TILTS, values)) @ weights)
  return float(np.max(_TILTS * wanted - cost))


def finding(
  arms: Mapping[str, Arm],
  found: str,
  without: str,
  charged_clean: str | None,
  *,
  factor: float,
) -> Finding:
  """What the rule reads of `found`, an arm under the found prefix.

  It was charged against the shifted reference, and `charged_clean` against the
  clean one, if anything was trained; `without` is the same without a prefix.
  """
  of, judged = intervals.of_difference, arms[found]
  clean = None if charged_clean is None else arms[charged_clean]
  return Finding(
    more_harm=of(judged.harm, arms[without].harm),
    hidden=of(judged.least, judged.shifted),
    exposed=of(judged.anchored, factor * judged.shifted),
    no_false_alarm=of(arms[FOUND].anchored, arms[RANDOM].anchored),
    prevented=clean and of(judged.harm, clean.harm),
  )


def verdict(trained: Finding) -> str:
  """The rule, on policies that were trained and charged as is usual.

  More harm, at a KL that hides it, which the other exposes and prevents; and
  the other reads more after this prefix than after any.
  """
  holds = all(part is not None and part.low > 0 for part in trained)
  return study.HOLDS if holds else study.DOES_NOT_HOLD
