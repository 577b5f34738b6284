"""The picture of the study `forgetting`."""

from collections.abc import Mapping, Sequence

from matplotlib import axes as matplotlib_axes
from matplotlib import figure as matplotlib_figure
import numpy as np

from rlhf_jax.studies.forgetting import rule

_START, _NONE, _PENALTY = "0.5", "#D55E00", "#0072B2"
_MIXES = ("#009E73", "#CC79A7", "#E69F00")
_MARKERS = ("s", "^", "D")
Arms = Mapping[str, Sequence[rule.Figures]]


def draw(
  arms: Arms,
  betas: int,
  best: float,
  predictors: Sequence[rule.Predictor],
) -> matplotlib_figure.Figure:
  """What each arm won and forgot; what tells it; how well.

  Args:
    arms: By name: the SFT policy, no penalty, as many β, the mixes.
    betas: How many β above 0 there are.
    best: The β that the mixes stand beside.
    predictors: From `rule.predictors`.
  """
  figure = matplotlib_figure.Figure(figsize=(14, 4.6), layout="constrained")
  won, told, ranks = figure.subplots(1, 3, width_ratios=(1.3, 1, 0.8))
  styles = _styles(arms, betas)
  _frontier(won, arms, betas, best, styles)
  for name, runs in list(arms.items())[1:]:
    colour, marker = styles[name]
    told.plot(
      rule.column(runs, "forward"), rule.column(runs, "rise"),
      marker, color=colour, markersize=5, alpha=0.8,
    )  # fmt: skip
  told.set_title("Forgetting against the forward KL, a dot a run", fontsize=11)
  told.set_xlabel("KL(π_ref‖π) on the task, nats per response")
  told.set_ylabel("rise of other texts' NLL, nats per token")
  _ranks(ranks, predictors)
  for axis in (won, told, ranks):
    axis.spines[["top", "right"]].set_visible(False)
  return figure


def _styles(arms: Arms, betas: int) -> dict[str, tuple[str, str]]:
  """Each arm's colour and marker."""
  mixes = zip(_MIXES, _MARKERS)
  styles = [(_START, "X"), (_NONE, "o"), *[(_PENALTY, "o")] * betas, *mixes]
  return dict(zip(arms, styles))


def _frontier(
  axis: matplotlib_axes.Axes, arms: Arms, betas: int, best: float, styles
) -> None:
  """Means with the seeds behind them; the β joined by a line."""
  of = lambda name: [rule.column(arms[name], x) for x in ("gold", "rise")]
  names = list(arms)
  line = np.array([np.mean(of(name), axis=1) for name in names[1 : 2 + betas]])
  axis.plot(*line.T, color=_PENALTY, linewidth=1, alpha=0.5)
  for place, name in enumerate(names):
    colour, marker = styles[name]
    axis.plot(*of(name), marker, color=colour, markersize=4, alpha=0.35)
    is_beta = 2 <= place < 2 + betas
    label = "penalty alone" if is_beta else name
    label += f" (β = {best:g})" if place >= 2 + betas else ""
    axis.plot(
      *np.mean(of(name), axis=1), marker, color=colour, markersize=9,
      label="" if is_beta and place > 2 else label,
    )  # fmt: skip
    if is_beta:
      axis.annotate(
        name, tuple(np.mean(of(name), axis=1)), (8, 4 - 14 * (place % 2)),
        fontsize=8,
        textcoords="offset points",
      )  # fmt: skip
  axis.set_title("Won on the task, forgotten beside it", fontsize=11)
  axis.set_xlabel("gold reward on the task")
  axis.set_ylabel("rise of other texts' NLL, nats per token")
  axis.legend(frameon=False, fontsize=8)


def _ranks(
  axis: matplotlib_axes.Axes, predictors: Sequence[rule.Predictor]
) -> None:
  """A correlation a line, with its interval."""
  for place, found in enumerate(predictors):
    axis.plot([found.low, found.high], [place] * 2, color=_PENALTY)
    axis.plot(found.spearman, place, "o", color=_PENALTY, markersize=8)
  axis.axvline(0, color="0.4", linewidth=0.8)
  axis.set_yticks(
    range(len(predictors)), [p.figure.replace(", ", ",\n") for p in predictors]
  )
  axis.set_ylim(len(predictors) - 0.5, -0.5)
  axis.set_title("Spearman with forgetting", fontsize=11)
  axis.set_xlabel("rank correlation, 95 % interval")
