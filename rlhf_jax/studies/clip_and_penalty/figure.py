"""The figure of `clip_and_penalty`."""

from collections.abc import Mapping
from typing import Any

from matplotlib import figure as matplotlib_figure
from matplotlib import ticker

from rlhf_jax.studies import intervals

_STYLES = (
  ("on", "tab:blue", "o", "with the penalty"),
  ("off", "tab:orange", "s", "without"),
)


def draw(
  arms: Mapping[tuple[float, str], Any], start: float
) -> matplotlib_figure.Figure:
  """Step and distance of every arm; gold by clip range."""
  figure = matplotlib_figure.Figure(figsize=(11, 4.4), layout="constrained")
  left, right = figure.subplots(1, 2)
  clips = list(dict.fromkeys(clip for clip, _ in arms))
  names = [*(f"{clip:g}" for clip in clips[:-1]), "off"]
  for shift, (penalty, colour, marker, label) in zip((-0.1, 0.1), _STYLES):
    mine = [arms[clip, penalty] for clip in clips]
    steps = [float(runs.step.mean()) for runs in mine]
    nats = [float(runs.kl.mean()) for runs in mine]
    style = {"color": colour, "marker": marker}
    for runs in mine:
      left.plot(
        runs.step, runs.kl, linestyle="", markersize=3, alpha=0.5, **style
      )
    left.plot(steps, nats, label=label, markersize=8, **style)
    for x, y, name in zip(steps, nats, names):
      left.annotate(
        name, (x, y), (4, 6), textcoords="offset points", fontsize=9
      )
    golds = [intervals.of_mean(runs.gold) for runs in mine]
    places = [place + shift for place in range(len(clips))]
    ends = ([g.mean - g.low for g in golds], [g.high - g.mean for g in golds])
    right.errorbar(
      places, [g.mean for g in golds], ends, linestyle="", capsize=3, **style
    )
    for place, runs in zip(places, mine):
      right.plot(
        [place + 0.06] * len(runs.gold), runs.gold, ".", color="0.6", zorder=0
      )
  left.set_xscale("log")
  left.set_yscale("log")
  for axis in (left.xaxis, left.yaxis):
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(ticker.LogLocator(subs=(2, 5)))
    axis.set_minor_formatter("{x:g}")
  left.set_title("Clipping (the number) and the penalty", fontsize=10)
  left.set_xlabel("a step: KL(π_old‖π_new), nats per response")
  left.set_ylabel("distance at the end: KL(π‖π_ref), nats per response")
  right.axhline(start, color="0.6", linestyle="--", linewidth=0.8)
  right.annotate("SFT policy", (-0.45, start), va="bottom", fontsize=8)
  right.set_xlim(-0.5, len(clips) - 0.5)
  right.set_xticks(range(len(clips)), names)
  right.set_title("Gold at the end: mean, 95 % interval, seeds", fontsize=10)
  right.set_xlabel("clip range")
  right.set_ylabel("gold reward")
  figure.legend(
    *left.get_legend_handles_labels(),
    loc="outside lower center",
    ncols=2,
    frameon=False,
  )
  for axis in (left, right):
    axis.spines[["top", "right"]].set_visible(False)
  return figure
