"""The picture of the study `kl_gradients`."""

from matplotlib import axes as matplotlib_axes
from matplotlib import figure as matplotlib_figure

from rlhf_jax.objective import kl
from rlhf_jax.studies.kl_gradients import estimates as estimates_lib
from rlhf_jax.studies.kl_gradients import penalties as penalties_lib

_OURS, _NAMED, _PUBLISHED = "tab:blue", "0.45", "tab:red"


def draw(
  rows: dict[str, list[penalties_lib.OfPenalty]],
  models: list[penalties_lib.OfModel],
  estimates: list[estimates_lib.Row],
) -> matplotlib_figure.Figure:
  """Errors, deviations and variances side by side."""
  figure = matplotlib_figure.Figure(figsize=(14.5, 4.8), layout="constrained")
  left, middle, right = figure.subplots(1, 3, width_ratios=(1.25, 1, 1))
  _errors(left, rows)
  _deviations(middle, estimates)
  _variances(right, models)
  for axis in (left, middle, right):
    axis.spines[["top", "right"]].set_visible(False)
  return figure


def _errors(
  axis: matplotlib_axes.Axes, rows: dict[str, list[penalties_lib.OfPenalty]]
) -> None:
  """A line of dots for each penalty, a dot for each model."""
  labels = []
  for place, of in enumerate(zip(*rows.values())):
    name, estimator = of[0].penalty, of[0].estimator
    colour = _PUBLISHED
    if name in kl.TARGETS:
      colour = _OURS if name == "sequence_reverse" else _NAMED
      name = f"{name}, {estimator.replace('rao_blackwellised', 'rao-bl.')}"
    labels.append((name, colour))
    axis.plot(
      [row.to_sequence for row in of],
      [place] * len(of),
      "o",
      color=colour,
      alpha=0.55,
      markersize=7,
      markeredgewidth=0,
      clip_on=False,
    )
  axis.set_yticks(range(len(labels)), [name for name, _ in labels], fontsize=9)
  for tick, (_, colour) in zip(axis.get_yticklabels(), labels):
    tick.set_color(colour)
  axis.invert_yaxis()
  axis.set_xlim(left=0)
  axis.grid(axis="y", linewidth=0.4, alpha=0.5)
  axis.set_axisbelow(True)
  axis.set_title(
    "Whose gradient is it? Error to that of KL(π‖π_ref)", fontsize=10
  )
  axis.set_xlabel(
    "relative error, a dot a model\n"
    "blue: names this KL · grey: names another · red: published recipes",
    fontsize=9,
  )


def _deviations(
  axis: matplotlib_axes.Axes, estimates: list[estimates_lib.Row]
) -> None:
  """A line for each estimate."""
  distances = [row.kl for row in estimates]
  for name, colour, deviations in (
    ("k1", "tab:orange", [row.sd_k1 for row in estimates]),
    ("k2", "0.6", [row.sd_k2 for row in estimates]),
    ("k3", _PUBLISHED, [row.sd_k3 for row in estimates]),
    ("exact", _OURS, [row.sd_exact for row in estimates]),
  ):
    axis.loglog(
      distances, deviations, "o-", color=colour, markersize=4, label=name
    )
  axis.loglog(distances, distances, ":", color="0.5", label="the KL itself")
  axis.set_title("How noisy is an estimate of the KL?", fontsize=10)
  axis.set_xlabel("KL(π‖π_ref), nats per response")
  axis.set_ylabel("standard deviation per response, nats")
  axis.legend(frameon=False, fontsize=9)


def _variances(
  axis: matplotlib_axes.Axes, models: list[penalties_lib.OfModel]
) -> None:
  """A pair of dots for each model."""
  for place, row in enumerate(models):
    axis.plot([row.rao_bl, row.sampled], [place] * 2, color="0.75", zorder=1)
    for variance, colour in ((row.sampled, "tab:orange"), (row.rao_bl, _OURS)):
      axis.plot(variance, place, "o", color=colour, markersize=8)
    ratio = row.sampled / row.rao_bl
    axis.annotate(
      f"÷ {ratio:.1f}",
      ((row.sampled * row.rao_bl) ** 0.5, place),
      xytext=(0, 5),
      textcoords="offset points",
      ha="center",
      fontsize=8,
    )
  axis.plot([], [], "o", color="tab:orange", label="sampled")
  axis.plot([], [], "o", color=_OURS, label="Rao-Blackwellised")
  axis.set_xscale("log")
  axis.set_yticks(range(len(models)), [row.model for row in models], fontsize=8)
  axis.set_ylim(len(models) - 0.5, -0.8)
  axis.set_title("Variance of the sequence KL's gradient", fontsize=10)
  axis.set_xlabel("trace of the covariance, per response")
  axis.legend(frameon=False, fontsize=9)
