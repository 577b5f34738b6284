"""The picture of the study `adversarial_prefix`."""

from collections.abc import Mapping, Sequence

from matplotlib import axes as matplotlib_axes
from matplotlib import figure as matplotlib_figure
import numpy as np

from rlhf_jax.studies import toy_runs
from rlhf_jax.studies.adversarial_prefix import rule

_COLOURS = ("0.5", "#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#0072B2")
_WINDOW = 5  # steps of a curve's means


def draw(
  arms: Mapping[str, rule.Arm],
  clean_harms: np.ndarray,
  tuned: Mapping[str, Sequence[toy_runs.Member]],
  prefix: str,
) -> matplotlib_figure.Figure:
  """What both KLs say of each arm's harm; harm while it is learned.

  Args:
    arms: By name.
    clean_harms: Harmful words of the reference's answers to clean prompts.
    tuned: The members of the arms that were trained, by name.
    prefix: That was found.
  """
  figure = matplotlib_figure.Figure(figsize=(13, 4.8), layout="constrained")
  left, right = figure.subplots(1, 2, width_ratios=(1.3, 1))
  colours = dict(zip(arms, _COLOURS))
  _kls(left, arms, clean_harms, colours)
  left.set_title(
    f"What the KL says of the harm; the prefix is “{prefix}”", fontsize=11
  )
  for name, members in tuned.items():
    curves = [
      toy_runs.trailing_mean(
        toy_runs.column(m.rows, "reward/score"), min(_WINDOW, len(m.rows))
      )
      for m in members
    ]
    steps = np.arange(1, len(curves[0]) + 1)
    for curve in curves:
      right.plot(steps, curve, color=colours[name], linewidth=0.6, alpha=0.5)
    right.plot(
      steps, np.mean(curves, axis=0),
      color=colours[name], linewidth=2.2, label=name,
    )  # fmt: skip
  right.set_title("PPO that is rewarded for harm, a line a seed", fontsize=11)
  right.set_xlabel("step")
  right.set_ylabel("harmful words per response")
  right.legend(frameon=False, fontsize=9)
  for axis in (left, right):
    axis.set_ylim(bottom=0)
    axis.spines[["top", "right"]].set_visible(False)
  return figure


def _kls(
  axis: matplotlib_axes.Axes,
  arms: Mapping[str, rule.Arm],
  clean_harms: np.ndarray,
  colours: Mapping[str, str],
) -> None:
  """For each arm a hollow dot, the shifted KL, below a full one, the clean."""
  most = max(float(arm.harm.max()) for arm in arms.values())
  harms = np.linspace(0, most * 1.05, 100)
  least = [rule.least_kl(clean_harms, harm) for harm in harms]
  axis.fill_between(harms, least, color="0.9", linewidth=0)
  axis.plot(harms, least, color="0.5", linewidth=1)
  for name, arm in arms.items():
    harm, shifted, anchored = (float(np.mean(values)) for values in arm[:3])
    axis.plot(
      [harm, harm], [shifted, anchored], color=colours[name], linewidth=1
    )
    axis.plot(
      harm, shifted, "o", color=colours[name], markersize=10,
      markerfacecolor="white", markeredgewidth=2, clip_on=False, zorder=3,
    )  # fmt: skip
    axis.plot(
      harm, anchored, "o", color=colours[name], markersize=10,
      label=name, clip_on=False, zorder=3,
    )  # fmt: skip
  axis.set_xlim(left=0)
  axis.set_xlabel(
    "harmful words per response\n"
    "hollow: KL to the reference that reads the prefix, full: to the one on the"
    " clean prompt;\ngrey: no policy of that harm has so small a KL to the"
    " clean one"
  )
  axis.set_ylabel("KL, nats per response")
  axis.legend(
    frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(0.1, 1)
  )
