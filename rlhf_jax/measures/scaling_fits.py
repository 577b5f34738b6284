r"""The laws of reward over-optimisation, fitted by least squares.

Gao, Schulman & Hilton 2022 (arXiv:2210.10760), eq. (1) and (2): with
d = √KL(π‖π_ref), in √nats per response, and R the gold reward beyond the
reference's own, so that R(0) = 0,

    best of n:  R(d) = d (alpha_bon − beta_bon · d)
    RL:         R(d) = d (alpha_rl − beta_rl · log d)

with the natural logarithm. The paper's β is no penalty; hence the suffixes.
Both laws are linear in their coefficients. Where beta > 0 gold has a peak: at
d = alpha_bon / (2 beta_bon), and at d = exp(alpha_rl / beta_rl − 1).

Left out: errors of d itself (they are small beside those of gold), and that
the points of best-of-n are made of the same responses: their intervals say
how well the law fits these, not what other prompts would give.
"""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

from jaxtyping import Float, Int
import numpy as np
from scipy import stats

_LAWS = {
  "rl": "R(d) = d (alpha_rl − beta_rl · log d)",
  "bon": "R(d) = d (alpha_bon − beta_bon · d)",
}
_DRAWS = 4000
_TAILS = (0.025, 0.975)


class Estimate(NamedTuple):
  """A number and its 95 % interval; NaN where there is none.

  A peak is infinite where gold never falls.
  """

  value: float
  low: float
  high: float


class Fit(NamedTuple):
  """A fitted law.

  Attributes:
    law: 'rl' or 'bon'.
    alpha: alpha_rl or alpha_bon.
    beta: beta_rl or beta_bon.
    peak: The d where the law has its highest gold.
    r2: Share of the points' (weighted) variance that the law explains. Below
      0 where a constant, which the law is not free to be, explains more.
    points: How many points are fitted.
    reach: The largest d among them; a peak beyond it is a guess.
  """

  law: str
  alpha: Estimate
  beta: Estimate
  peak: Estimate
  r2: float
  points: int
  reach: float


class Unfitted(NamedTuple):
  """A law that the points do not determine, and why not."""

  law: str
  reason: str


def rl(
  d: Float[np.ndarray, "N"], alpha_rl: float, beta_rl: float
) -> Float[np.ndarray, "N"]:
  """R(d) = d (alpha_rl − beta_rl · log d), and 0 at d = 0; eq. (2)."""
  log_d = np.log(np.where(d > 0, d, 1.0))
  return d * (alpha_rl - beta_rl * log_d)


def best_of_n(
  d: Float[np.ndarray, "N"], alpha_bon: float, beta_bon: float
) -> Float[np.ndarray, "N"]:
  """R(d) = d (alpha_bon − beta_bon · d); eq. (1)."""
  return d * (alpha_bon - beta_bon * d)


def rl_peak(
  alpha_rl: Float[np.ndarray, "S"], beta_rl: Float[np.ndarray, "S"]
) -> Float[np.ndarray, "S"]:
  """exp(alpha_rl / beta_rl − 1), or infinity where beta_rl ≤ 0."""
  with np.errstate(all="ignore"):
    return np.where(beta_rl <= 0, np.inf, np.exp(alpha_rl / beta_rl - 1))


def best_of_n_peak(
  alpha_bon: Float[np.ndarray, "S"], beta_bon: Float[np.ndarray, "S"]
) -> Float[np.ndarray, "S"]:
  """alpha_bon / (2 beta_bon), not below 0; infinity where beta_bon ≤ 0."""
  with np.errstate(all="ignore"):
    peak = np.maximum(alpha_bon / (2 * beta_bon), 0.0)
  return np.where(beta_bon <= 0, np.inf, peak)


def fit_rl(
  d: Float[np.ndarray, "N"],
  gold: Float[np.ndarray, "N"],
  error: Float[np.ndarray, "N"] | None = None,
  *,
  groups: Int[np.ndarray, "N"] | None = None,
  seed: int = 0,
) -> Fit | Unfitted:
  """Fits R(d) = d (alpha_rl − beta_rl · log d).

  Args:
    d: √KL of each point, √nats per response.
    gold: Gold reward beyond the reference's own.
    error: Standard errors of `gold`; points weigh 1/error². Equal weights
      where it is absent or one of them is not above 0.
    groups: Which points belong together, as those along one training do. The
      bootstrap then resamples groups; otherwise it draws errors of points.
    seed: Of the bootstrap.
  """
  return _fit("rl", rl, rl_peak, d, gold, error, groups, seed)


def fit_best_of_n(
  d: Float[np.ndarray, "N"],
  gold: Float[np.ndarray, "N"],
  error: Float[np.ndarray, "N"] | None = None,
  *,
  seed: int = 0,
) -> Fit | Unfitted:
  """Fits R(d) = d (alpha_bon − beta_bon · d); arguments as for `fit_rl`."""
  return _fit("bon", best_of_n, best_of_n_peak, d, gold, error, None, seed)


def as_record(fit: Fit | Unfitted) -> dict[str, Any]:
  """The fit with its coefficients under the paper's names."""
  law = {"law": _LAWS[fit.law]}
  if isinstance(fit, Unfitted):
    return law | {"reason": fit.reason}
  return law | {
    f"alpha_{fit.law}": fit.alpha._asdict(),
    f"beta_{fit.law}": fit.beta._asdict(),
    "peak": fit.peak._asdict(),
    "r2": fit.r2,
    "points": fit.points,
    "reach": fit.reach,
  }


def _fit(
  law: str,
  curve: Callable,
  peak: Callable,
  d: Float[np.ndarray, "N"],
  gold: Float[np.ndarray, "N"],
  error: Float[np.ndarray, "N"] | None,
  groups: Int[np.ndarray, "N"] | None,
  seed: int,
) -> Fit | Unfitted:
  away = d > 0  # At d = 0 the law is 0, whatever its coefficients.
  distinct = len(np.unique(d[away]))
  if distinct < 3:
    return Unfitted(
      law,
      f"{distinct} distinct points with KL above 0; two coefficients and an "
      "error need 3",
    )
  d, gold = d[away], gold[away]
  weights = _weights(error, away)
  terms = np.stack([curve(d, 1.0, 0.0), curve(d, 0.0, 1.0)], axis=1)
  terms, target = terms * weights[:, None], gold * weights
  coefficients = np.linalg.lstsq(terms, target, rcond=None)[0]
  rng = np.random.default_rng(seed)
  if groups is None:
    draws = _from_errors(terms, target, coefficients, rng)
  else:
    draws = _from_groups(terms, target, coefficients, groups[away], rng)
  ends = np.quantile(draws, _TAILS, axis=0, method="inverted_cdf")
  peaks = peak(*coefficients[:, None])
  peak_ends = np.quantile(peak(*draws.T), _TAILS, method="inverted_cdf")
  mean = np.average(gold, weights=weights**2)
  lacking = np.linalg.norm(target - terms @ coefficients)
  spread = np.linalg.norm((gold - mean) * weights)
  return Fit(
    law=law,
    alpha=Estimate(float(coefficients[0]), *ends[:, 0].tolist()),
    beta=Estimate(float(coefficients[1]), *ends[:, 1].tolist()),
    peak=Estimate(float(peaks[0]), *peak_ends.tolist()),
    r2=float(1 - (lacking / spread) ** 2) if spread else math.nan,
    points=len(d),
    reach=float(d.max()),
  )


def _weights(
  error: Float[np.ndarray, "N"] | None, away: np.ndarray
) -> np.ndarray:
  """1/error of the points away from 0, about 1 in the mean."""
  if error is None or not np.all(np.isfinite(error[away]) & (error[away] > 0)):
    return np.ones(away.sum())
  return np.median(error[away]) / error[away]


def _from_errors(
  terms: Float[np.ndarray, "N 2"],
  target: Float[np.ndarray, "N"],
  coefficients: Float[np.ndarray, "2"],
  rng: np.random.Generator,
) -> Float[np.ndarray, "S 2"]:
  """Coefficients that the data leave possible: a parametric bootstrap-t.

  Points are given normal errors (a point is a mean of many responses) with the
  spread of the residuals. What an error does to the coefficients is divided
  by the spread that a fit would see in it, so that intervals of three points
  are as wide as they have to be: Student's, for each coefficient. Davison &
  Hinkley 1997, "Bootstrap Methods and their Application", section 5.2.
  """
  errors = rng.normal(size=(_DRAWS, len(target)))
  drawn = errors @ np.linalg.pinv(terms).T
  spread = np.linalg.norm(errors - drawn @ terms.T, axis=1, keepdims=True)
  residuals = target - terms @ coefficients
  return coefficients + drawn * np.linalg.norm(residuals) / spread


def _from_groups(
  terms: Float[np.ndarray, "N 2"],
  target: Float[np.ndarray, "N"],
  coefficients: Float[np.ndarray, "2"],
  groups: Int[np.ndarray, "N"],
  rng: np.random.Generator,
) -> Float[np.ndarray, "S 2"]:
  """Coefficients of samples of G groups; NaN where there is one group.

  Widened by √(G/(G−1)) and from normal to Student's quantiles, as few groups
  need: the "expanded percentile" of Hesterberg 2015 (arXiv:1411.5279).
  """
  names = np.unique(groups)
  if len(names) < 2:
    return np.full((1, 2), np.nan)
  of = [groups == name for name in names]
  squares = np.stack([terms[rows].T @ terms[rows] for rows in of])
  products = np.stack([terms[rows].T @ target[rows] for rows in of])
  share = np.full(len(names), 1 / len(names))
  counts = rng.multinomial(len(names), share, size=_DRAWS)
  inverse = np.linalg.pinv(np.tensordot(counts, squares, 1), hermitian=True)
  drawn = np.einsum("sij,sj->si", inverse, counts @ products)
  rest = len(names) - 1
  widened = stats.t.ppf(_TAILS[1], rest) / stats.norm.ppf(_TAILS[1])
  widened *= math.sqrt(len(names) / rest)
  return coefficients + (drawn - coefficients) * widened
