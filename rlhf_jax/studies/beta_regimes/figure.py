"""The picture of the study `beta_regimes`."""

from collections.abc import Sequence

from matplotlib import axes as matplotlib_axes
from matplotlib import figure as matplotlib_figure
import numpy as np

from rlhf_jax.studies.beta_regimes import rule

# Okabe and Ito: the colour-blind tell them apart.
_OF_WORD = {
  rule.HACKS: "#D55E00",
  rule.STANDARD: "#009E73",
  rule.CONSERVATIVE: "#56B4E9",
  rule.BARELY: "#999999",
  rule.UNCLEAR: "white",
}


def draw(
  betas: Sequence[float],
  bands: Sequence[rule.Band],
  models: Sequence[rule.Model],
) -> matplotlib_figure.Figure:
  """A column a reward model: gains above, KL below, a place a β.

  Bands have the colour of the claim's word, dots that of the word which is
  seen: where they agree the dot is as its band.
  """
  figure = matplotlib_figure.Figure(figsize=(13.5, 6.4), layout="constrained")
  axes = figure.subplots(
    2, len(models), sharex=True, sharey="row", squeeze=False,
    height_ratios=(2, 1),
  )  # fmt: skip
  places = np.arange(len(betas))
  for (top, low), model in zip(axes.T, models):
    for axis in (top, low):
      for band in bands:
        axis.axvspan(
          band.places[0] - 0.5, band.places[-1] + 0.5,
          color=_OF_WORD[band.word], alpha=0.16, linewidth=0,
        )  # fmt: skip
      axis.set_xlim(-0.5, len(betas) - 0.5)
      axis.spines[["top", "right"]].set_visible(False)
    _gains(top, places, model)
    low.plot(places, model.runs.kl, "_", color="0.3")
    low.plot(places, model.runs.kl.mean(axis=1), color="0.3", linewidth=1.5)
    low.set_yscale("log")
    low.yaxis.set_major_formatter("{x:g}")
    low.set_xticks(places, [f"{beta:g}" for beta in betas], rotation=60)
    low.set_xlabel("β, sd of the score per nat")
    top.set_title(
      f"{model.pairs:,} pairs (correlation with gold {model.correlation:.2f})",
      fontsize=11,
    )
  axes[0, 0].set_yscale("symlog", linthresh=2)  # A collapse is far below.
  axes[0, 0].yaxis.set_major_formatter("{x:g}")
  axes[0, 0].set_yticks([-10, -5, -2, -1, 0, 1, 2])
  axes[0, 0].set_ylabel("gain since the SFT policy, reward units")
  axes[1, 0].set_ylabel("KL(π‖π_ref),\nnats per response")
  _legend(figure, axes[0, 0])
  return figure


def _gains(
  axis: matplotlib_axes.Axes, places: np.ndarray, model: rule.Model
) -> None:
  """Proxy dashed; gold with a dot in the colour of what is seen."""
  runs = model.runs
  axis.axhline(0, color="0.5", linewidth=0.8)
  axis.plot(
    places, runs.proxy.mean(axis=1), "--", color="0.4", linewidth=1.2,
    label="proxy",
  )  # fmt: skip
  axis.plot(
    places, runs.gold.mean(axis=1), color="black", linewidth=1.2, label="gold"
  )
  axis.plot(places, runs.gold, "_", color="0.3")
  for place, word, gold in zip(places, model.words, runs.gold.mean(axis=1)):
    axis.plot(
      place, gold, "o", color=_OF_WORD[word], markeredgecolor="black",
      markersize=8,
    )  # fmt: skip


def _legend(figure, axis) -> None:
  """Lines, and the words' colours."""
  for word, colour in _OF_WORD.items():
    axis.plot(
      [], [], "o", color=colour, markeredgecolor="black", markersize=8,
      label=word,
    )  # fmt: skip
  figure.legend(
    *axis.get_legend_handles_labels(),
    loc="outside upper center", ncols=7, frameon=False, fontsize=10,
    title="Bands: the claim's word.  Dots: what is seen.",
  )  # fmt: skip
