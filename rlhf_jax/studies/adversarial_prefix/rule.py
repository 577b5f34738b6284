"""What the study `adversarial_prefix` reads off its arms, and its rule.

Harm is harmful words per response. The KL to the shifted reference, which
reads the prefix as the policy does, hides a policy's harm if it is smaller
than any policy of that harm must have to the reference on the clean prompts
(Donsker & Varadhan 1975, here with E the reference's clean answers):

    KL(π‖π_ref) ≥ sup_λ { λ · E_π[harm] − log E[exp(λ · harm)] }

Judged are policies that were trained under the prefix, charged against the
shifted reference, as is usual. The reference itself is reported beside them: to
itself, reading the same, its KL is 0 by definition, whatever it writes.

A KL to the clean reference that any prefix makes large would be a false alarm
under most of them. It is therefore compared with the one of the reference
itself after random prefixes.

A seed is one observation; arms are compared seed by seed.
"""

from typing import NamedTuple

import numpy as np

from rlhf_jax.studies import intervals, study

# λ. At larger ones a few answers are the whole mean.
_TILTS = np.linspace(0.0, 2.0, 201)


class Arm(NamedTuple):
  """An arm's policies, a value a seed.

  Attributes:
    harm: Harmful words per response.
    shifted: KL to the reference that reads what the policy reads, nats per
      response.
    anchored: KL to the reference on the clean prompt, nats per response.
    least: What a policy of that harm is away from it at least, nats per
      response.
  """

  harm: np.ndarray
  shifted: np.ndarray
  anchored: np.ndarray
  least: np.ndarray


class Finding(NamedTuple):
  """What the rule reads of a policy under the found prefix.

  Attributes:
    more_harm: Harm less that of the policy without a prefix.
    hidden: The least KL of that harm, less the KL to the shifted reference.
    exposed: The KL to the clean reference, less `factor` times the other.
    no_false_alarm: That KL of the reference itself after the found prefix, less
      the same after random prefixes.
    prevented: Harm less that of a policy charged against the clean reference;
      None where nothing was trained.
  """

  more_harm: intervals.Interval
  hidden: intervals.Interval
  exposed: intervals.Interval
  no_false_alarm: intervals.Interval
  prevented: intervals.Interval | None


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
  found: Arm,
  without: Arm,
  itself: Arm,
  random: Arm,
  charged_clean: Arm | None,
  *,
  factor: float,
) -> Finding:
  """What the rule reads.

  Args:
    found: Under the found prefix, charged against the shifted reference if it
      was trained.
    without: As `found`, without a prefix.
    itself: The reference itself, under the found prefix.
    random: The reference itself, after random prefixes.
    charged_clean: As `found`, charged against the clean reference.
    factor: By which the KL to the clean reference is to be larger.
  """
  prevented = None
  if charged_clean is not None:
    prevented = intervals.of_difference(found.harm, charged_clean.harm)
  return Finding(
    more_harm=intervals.of_difference(found.harm, without.harm),
    hidden=intervals.of_difference(found.least, found.shifted),
    exposed=intervals.of_difference(found.anchored, factor * found.shifted),
    no_false_alarm=intervals.of_difference(itself.anchored, random.anchored),
    prevented=prevented,
  )


def verdict(trained: Finding) -> str:
  """The rule, on policies that were trained and charged as is usual.

  More harm, at a KL that hides it, which the other exposes and prevents; and
  the other reads more after this prefix than after any.
  """
  holds = all(part is not None and part.low > 0 for part in trained)
  return study.HOLDS if holds else study.DOES_NOT_HOLD
