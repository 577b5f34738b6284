"""Is k3 in the loss worse under top-p, and is that the truncation's doing?

With top-p, tokens are drawn from q, the policy π on its nucleus, renormalised,
and scored by π. (Weighing by π/q mends nothing: on the nucleus it is a number a
state, and the tail is never drawn.) Measured is the relative error of a
penalty's expected gradient, a sum over all responses, to ∇KL(π‖π_ref) of whole
responses. k1 is in the reward, with the critic that is perfect under q. The
exact KL, which needs no sample of a state's tail, is not judged.

Two comparisons separate the causes. Without top-p the error is the estimator's.
With top-p, but q, and π_ref on its nucleus, as what scores and whose KL is
meant, it is the estimator's again. Models are random; each is an observation.
Left out: values of the KL, later epochs, training.
"""

import itertools
from typing import NamedTuple

import jax
from ml_collections import ConfigDict
import numpy as np

from rlhf_jax.studies import drawing, intervals, limits, listed, study
from rlhf_jax.studies import kl_measurements as measure

ARMS = {
  "k1 in reward": ("sequence_reverse", "sampled"),
  "k2 in loss": ("k2_in_loss", "sampled"),
  "k3 in loss": ("k3_in_loss", "sampled"),
  "exact": ("sequence_reverse", "rao_blackwellised"),
}
K1, K2, K3, EXACT = range(len(ARMS))


class Excess(NamedTuple):
  """How far k3's error is above another arm's; the table says what each is."""

  nats: float
  top_p: float
  over: str
  truncated: intervals.Interval
  whole: intervals.Interval
  added: intervals.Interval
  own: intervals.Interval


def check(config: ConfigDict) -> None:
  """Refuses fields that make no sense."""
  wanted = {
    "models": limits.between(2, 100),
    "size.vocab_size": limits.between(2, 8),
    "size.response_length": limits.between(1, 4),
    "distances": limits.different(limits.FINITE_ABOVE_0),
    "top_ps": limits.different(limits.inside(0, 1)),
    "margin": limits.at_least(0),
  }
  limits.check(config, wanted)


def run(lab: study.Lab) -> study.Outcome:
  """Does all models; none takes long enough to be kept."""
  config, found = lab.config, []
  rng = np.random.default_rng(config.seed)
  distances, top_ps = config.distances, (1.0, *config.top_ps)
  with jax.enable_x64(True):
    for _ in lab.each(range(config.models), "models"):
      start = listed.make(rng, **config.size)
      models = listed.moved(start, rng, distances, field="distances")
      of = lambda x: measure.under_top_p(x, top_ps, ARMS.values())
      found.append([*map(of, models)])
  found = np.moveaxis(np.array(found), 0, -1)
  rows = excesses(found[..., 0, :], distances, top_ps)
  short = lambda x: f"{x.mean:+.2f} ± {x.high - x.mean:.2f}"
  causes = study.Table(
    f"k3's error less another's, {config.models} models, ± 95 %: truncated (π"
    " scores); whole, without top-p; added, their difference; own (q scores)",
    Excess._fields,
    [(*row[:3], *map(short, row[3:])) for row in rows],
  )
  names = itertools.product(distances, top_ps, "πq", ARMS)
  cells = found.reshape(-1, 2, config.models)
  arms = study.Table(
    "Error of the expected gradient and sd of a response's, in norms of ∇KL",
    ("nats", "top_p", "scored by", "arm", "error", "noise"),
    [(*of, *map(intervals.of_mean, x)) for of, x in zip(names, cells)],
    shown=False,
  )
  text = _paragraph(found.mean(axis=-1), rows, distances, top_ps)
  figure = _draw(found[:, :, 0, :, 0], distances, top_ps)
  tables = {"causes": causes, "arms": arms}
  return study.Outcome(verdict(rows, config.margin), text, tables, figure)


def excesses(errors: np.ndarray, distances, top_ps) -> list[Excess]:
  """From errors by distance, top-p (1 first), what scores, arm, and model."""
  rows = []
  for i, nats in enumerate(distances):
    for j, top_p in enumerate(top_ps[1:], start=1):
      for rival in (K1, K2):
        of = errors[i, :, :, K3] - errors[i, :, :, rival]
        (truncated, own), (whole, _) = of[j], of[0]
        each = truncated, whole, truncated - whole, own
        row = nats, top_p, [*ARMS][rival], *map(intervals.of_mean, each)
        rows.append(Excess(*row))
  return rows


def verdict(rows: list[Excess], margin: float) -> str:
  """The rule, of each top-p at each distance, with all of every interval.

  k3's error is above both others', truncation adds to that, and where nothing
  is truncated, or nothing that is scored, there is no excess above `margin`.
  """
  conditions = {}
  for row in rows:
    worse = row.truncated.low > 0 and row.added.low > 0
    alone = row.whole.high <= margin and row.own.high <= margin
    name = f"{row.top_p:g} at {row.nats:g} nats"
    conditions[name] = conditions.get(name, True) and worse and alone
  return study.verdict(conditions, "top-p is")


def _paragraph(means, rows, distances, top_ps) -> str:
  i, j = len(distances) // 2, len(top_ps) // 2
  k1, k2 = (x for x in rows if x[:2] == (distances[i], top_ps[j]))
  error, noise = np.moveaxis(means[i, (0, j), 0], -1, 0)
  change = lambda of, arm: f"from {of[0, arm]:.2f} to {of[1, arm]:.2f}"
  return (
    f"Of {len(rows)} excesses of k3's error truncation clearly adds to"
    f" {sum(x.added.low > 0 for x in rows)} and lessens"
    f" {sum(x.added.high < 0 for x in rows)}: at {k2.nats:g} nats top-p"
    f" {k2.top_p:g} changes that over k2's, {k2.whole.mean:.2f} without it, by"
    f" {k2.added:+.2f}, and that over k1's, {k1.whole.mean:.2f}, by"
    f" {k1.added:+.2f}. All lose: the error of k3 in the loss goes"
    f" {change(error, K3)}, of k2 in the loss {change(error, K2)}, of k1 in the"
    f" reward {change(error, K1)}, of the exact KL {change(error, EXACT)}; a"
    f" response's noise with k3 {change(noise, K3)} times the gradient, with k2"
    f" {change(noise, K2)}. If q scores, k3's excess over k2 is {k2.own:.2f}."
  )


def _draw(errors, distances, top_ps):
  figure, axes = drawing.panels((13.5, 4.6), len(distances), sharey=True)
  for axis, nats, of in zip(axes, distances, errors):
    for arm, each in zip(ARMS, of.swapaxes(0, 1)):
      style = {"linestyle": "-", "marker": "o", "label": arm}
      drawing.bars(axis, top_ps, [*map(intervals.of_mean, each)], **style)
    drawing.say(axis, f"{nats:g} nats from π_ref", "top-p", "relative error")
  drawing.legend(figure, axes[0], columns=4)
  return figure
