"""What a sweep over β found: from its members' figures to one record.

The figures are of final policies on held-out prompts. Reward units are those
of the reward that is trained on (scores normalised on the reference's
samples); KL is KL(π‖π_ref) in nats per response; β is reward units per nat.

A β's interval is Student's t over its seeds. One seed has only the error of
its responses, and the field `interval` says so: what another seed would give
is then not known.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any

from jaxtyping import Bool, Float
import numpy as np
from scipy import stats

from rlhf_jax.measures import best_of_n as best_of_n_lib
from rlhf_jax.measures import recommendation, scaling_fits

# Of a run, along training: (KL, proxy, gold), gold None where there is none.
Trajectory = Sequence[tuple[float, float, float | None]]
Trajectories = Mapping[tuple[float, int], Trajectory]

_DRAWS = 2000
_NORMAL = float(stats.norm.ppf(0.975))


@dataclasses.dataclass(frozen=True)
class Member:
  """One (β, seed): its final policy on held-out prompts, errors over those.

  Attributes:
    beta: Reward units per nat.
    seed: Of its training.
    workdir: Relative to the sweep's.
    proxy: Mean score by the reward that is trained on.
    proxy_se: Standard errors are over responses.
    gold: Mean true reward; None where there is none.
    gold_se: None with `gold`.
    win_rate: Share of prompts where it beats the reference, ties a half.
    win_rate_se: None with `win_rate`.
    kl: KL(π‖π_ref), nats per response.
    kl_se: Of the same.
  """

  beta: float
  seed: int
  workdir: str
  proxy: float
  proxy_se: float
  gold: float | None
  gold_se: float | None
  win_rate: float | None
  win_rate_se: float | None
  kl: float
  kl_se: float


def record(
  members: Sequence[Member],
  best_of_n: Sequence[best_of_n_lib.BestOfN],
  reference: Mapping[str, Any],
  trajectories: Trajectories,
) -> dict[str, Any]:
  """All that the sweep found, as JSON holds it: NaN and infinity are null.

  Members with a figure or an error that is not finite are named in `left_out`
  and take part in nothing else.

  Args:
    members: Of one sweep; either all have gold or none.
    best_of_n: Of the reference; the baseline.
    reference: The reference's own 'proxy' and 'gold' (may be None).
    trajectories: (β, seed) → rows along its training.

  Raises:
    ValueError: No member has finite figures, or only some have gold.
  """
  has_gold = reference["gold"] is not None
  if any((member.gold is not None) != has_gold for member in members):
    raise ValueError("gold of some but not of all members and the reference")
  left_out = [member for member in members if not _is_finite(member)]
  kept = [member for member in members if _is_finite(member)]
  if not kept:
    raise ValueError("no member has finite figures")
  groups = {
    beta: sorted((m for m in kept if m.beta == beta), key=lambda m: m.seed)
    for beta in sorted({m.beta for m in kept})
  }
  reward = "gold" if has_gold else "proxy"
  rows = [_row(beta, group) for beta, group in groups.items()]
  if reference["gold"] is not None:
    golds = {
      beta: {m.seed: m.gold for m in group if m.gold is not None}
      for beta, group in groups.items()
    }
    advice = recommendation.by_gold(rows, golds, reference["gold"])
  else:
    advice = recommendation.by_proxy(rows, reference["proxy"])
  return _plain(
    {
      "reference": dict(reference),
      "members": [dataclasses.asdict(m) for m in members],
      "left_out": [{"beta": m.beta, "seed": m.seed} for m in left_out],
      "by_beta": rows,
      "pareto": {
        "reward": reward,
        "points": _pareto(rows, list(groups.values()), reward),
      },
      "best_of_n": [dataclasses.asdict(point) for point in best_of_n],
      "fits": _fits(kept, best_of_n, reference["gold"], trajectories),
      "recommendation": advice,
    }
  )


def _is_finite(member: Member) -> bool:
  figures = (v for v in vars(member).values() if isinstance(v, float))
  return all(map(math.isfinite, figures))


def _row(beta: float, group: Sequence[Member]) -> dict[str, Any]:
  """Means of a β's members, with intervals."""
  figures = {}
  for name in ("proxy", "gold", "win_rate", "kl"):
    values = [getattr(member, name) for member in group]
    if None in values:
      figures[name] = None
      continue
    mean = float(np.mean(values))
    if len(group) > 1:
      half = stats.t.ppf(0.975, len(group) - 1) * stats.sem(values)
    else:
      half = _NORMAL * getattr(group[0], f"{name}_se")
    figures[name] = {"mean": mean, "low": mean - half, "high": mean + half}
  return {
    "beta": beta,
    "seeds": [member.seed for member in group],
    "interval": "seeds" if len(group) > 1 else "responses",
    **figures,
  }


def _pareto(
  rows: Sequence[dict[str, Any]],
  groups: Sequence[Sequence[Member]],
  reward: str,
) -> list[dict[str, Any]]:
  """Which β are on the front, which beat the others, and how sure that is.

  `share_on_front` is a bootstrap's: seeds are resampled, the same for all β,
  and each member's figures are drawn with the error of its responses. Seeds'
  spread has that error in it already, so that the share errs towards doubt.
  """
  means = lambda name: np.array([row[name]["mean"] for row in rows])
  beats = _beats(means(reward), means("kl"))
  rng = np.random.default_rng(0)
  # A place in [0, 1) for a seed: the same seeds, where all β have the same.
  places = rng.random((_DRAWS, max(map(len, groups))))
  draws = {reward: [], "kl": []}
  for group in groups:
    chosen = (places[:, : len(group)] * len(group)).astype(int)
    for name, drawn in draws.items():
      values = np.array([getattr(member, name) for member in group])
      errors = np.array([getattr(member, f"{name}_se") for member in group])
      noisy = values[chosen] + errors[chosen] * rng.normal(size=chosen.shape)
      drawn.append(noisy.mean(1))
  drawn_beats = _beats(np.stack(draws[reward], 1), np.stack(draws["kl"], 1))
  shares = 1 - np.any(drawn_beats, axis=1).mean(0)
  return [
    {
      "beta": row["beta"],
      "on_front": not by.any(),
      "share_on_front": share,
      "dominated_by": [other["beta"] for other, does in zip(rows, by) if does],
    }
    for row, by, share in zip(rows, beats.T, shares)
  ]


def _beats(
  reward: Float[np.ndarray, "*S N"], kl: Float[np.ndarray, "*S N"]
) -> Bool[np.ndarray, "*S N N"]:
  """[i, j]: i has at least j's reward at no more KL, and not both the same."""
  gain = reward[..., :, None] - reward[..., None, :]
  cost = kl[..., :, None] - kl[..., None, :]
  no_worse = np.logical_and(gain >= 0, cost <= 0)
  return np.logical_and(no_worse, np.logical_or(gain > 0, cost < 0))


def _fits(
  members: Sequence[Member],
  best_of_n: Sequence[best_of_n_lib.BestOfN],
  start: float | None,
  trajectories: Trajectories,
) -> dict[str, Any]:
  """The laws of Gao et al. 2022 through gold beyond the reference's."""
  names = ("rl", "rl_along_training", "best_of_n")
  if start is None:
    return {name: {"reason": "there is no gold"} for name in names}
  root = lambda kls: np.sqrt(np.maximum(np.array(kls, float), 0.0))
  beyond = lambda golds: np.array(golds, float) - start
  errors = lambda points: np.array([p.gold_se for p in points], float)
  along = np.array(
    [
      (i, kl, gold)
      for i, rows in enumerate(trajectories.values())
      for kl, _, gold in rows
    ],
    float,
  ).reshape(-1, 3)
  along = along[np.isfinite(along).all(1)]
  return {
    "rl": scaling_fits.as_record(
      scaling_fits.fit_rl(
        root([m.kl for m in members]),
        beyond([m.gold for m in members]),
        errors(members),
      )
    ),
    "rl_along_training": scaling_fits.as_record(
      scaling_fits.fit_rl(
        root(along[:, 1]), beyond(along[:, 2]), groups=along[:, 0].astype(int)
      )
    ),
    "best_of_n": scaling_fits.as_record(
      scaling_fits.fit_best_of_n(
        root([point.kl_estimate for point in best_of_n]),
        beyond([point.gold for point in best_of_n]),
        errors(best_of_n),
      )
    ),
  }


def _plain(value: Any) -> Any:
  """What JSON holds: None for NaN and infinities, Python's own numbers."""
  if isinstance(value, dict):
    return {name: _plain(entry) for name, entry in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(entry) for entry in value]
  if isinstance(value, np.generic):
    value = value.item()
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value
