"""What the KL ledger must not show, and the line that says so when it does."""

from collections.abc import Iterator, Mapping
from typing import SupportsFloat

STEPS_OF_SILENCE = 50  # before the same alarm is raised again

# Nats that decoding and the learner may differ by at one token.
MANY_TRUNCATED = 0.5  # Of the responses: the policy is not let finish.
MISMATCH_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}


class Watch:
  """Looks at the figures of every step of one run."""

  def __init__(self, compute_dtype: str):
    """`compute_dtype` decides how exact decoding can be."""
    self._tolerance = MISMATCH_TOLERANCE[compute_dtype]
    self._raised: dict[str, int] = {}

  def alarms(
    self, step: int, scalars: Mapping[str, SupportsFloat]
  ) -> list[str]:
    """The alarms of a step, without those that were raised a while ago.

    - `kl/reverse_k1` more than 3 standard errors below 0. Near the reference
      the estimate is noise around 0; beyond that the sampler and the scorer
      do not have the same distribution.
    - `kl/clamp_fraction` above 1 %: the KL is larger than it says.
    - `rollout/logprob_max_abs_diff` above its tolerance: the importance
      ratios of the update begin away from 1.
    - `rollout/truncated_fraction` above a half: most responses do not end.
    """
    found = []
    for name, line in self._findings(scalars):
      last = self._raised.get(name)
      if last is None or step - last >= STEPS_OF_SILENCE:
        self._raised[name] = step
        found.append(f"alarm: {line}")
    return found

  def _findings(self, scalars) -> Iterator[tuple[str, str]]:
    figure = {name: float(value) for name, value in scalars.items()}
    name = "kl/reverse_k1"
    if figure[name] < -3 * figure[f"{name}_se"] < 0:
      yield (
        name,
        f"{name} = {figure[name]:.3g} is more than 3 standard errors"
        f" ({figure[f'{name}_se']:.3g}) below 0: what was sampled is not what"
        " is scored",
      )
    name = "kl/clamp_fraction"
    if figure[name] > 0.01:
      yield (
        name,
        f"{name} = {figure[name]:.1%} of the tokens are beyond 60 nats: the"
        " policy has left the reference; raise kl.beta",
      )
    name = "rollout/truncated_fraction"
    if figure.get(name, 0.0) > MANY_TRUNCATED:
      yield (
        name,
        f"{name} = {figure[name]:.0%} of the responses are cut off before they"
        " end; raise rollout.response_length, or see to rollout.stop_ids",
      )
    name = "rollout/logprob_max_abs_diff"
    if figure[name] > self._tolerance:
      yield (
        name,
        f"{name} = {figure[name]:.3g} nats; decoding and the learner should"
        f" agree within {self._tolerance:g}",
      )
