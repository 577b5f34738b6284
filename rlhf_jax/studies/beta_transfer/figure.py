"""The picture of the study `beta_transfer`: gold over β, and regrets."""

from collections.abc import Sequence

from matplotlib import axes as matplotlib_axes
from matplotlib import figure as matplotlib_figure
from ml_collections import ConfigDict

from rlhf_jax.studies.beta_transfer import arms

_TASKS = ("tab:blue", "tab:orange", "tab:green", "tab:purple")
_BETA, _TARGET, _TOKENS = "tab:red", "tab:blue", "0.5"


def draw(
  config: ConfigDict,
  tasks: Sequence[arms.Task],
  transfers: Sequence[arms.Transfer],
  regrets: arms.Regrets,
) -> matplotlib_figure.Figure:
  """A panel for each task, then all regrets."""
  count = len(tasks)
  figure = matplotlib_figure.Figure(
    figsize=(2.7 * count + 5, 4.2), layout="constrained"
  )
  *panels, last = figure.subplots(
    1, count + 1, width_ratios=(*[1] * count, 1.6)
  )
  for axis, task in zip(panels, tasks):
    _golds(axis, task, tasks)
  panels[0].set_ylabel(f"gold reward, last {config.last} steps")
  panels[count // 2].legend(
    frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.22)
  )
  _regrets(last, config, transfers, regrets)
  for axis in (*panels, last):
    axis.spines[["top", "right"]].set_visible(False)
  return figure


def _golds(
  axis: matplotlib_axes.Axes, task: arms.Task, tasks: Sequence[arms.Task]
) -> None:
  """Each seed and their mean, with every task's best β."""
  axis.plot(task.betas, task.gold, color="0.75", linewidth=0.8)
  axis.plot(task.betas, task.gold.mean(axis=1), "o-", color="0.2", markersize=4)
  axis.axhline(task.start, color="0.6", linewidth=0.8, linestyle=":")
  for place, (other, colour) in enumerate(zip(tasks, _TASKS)):
    axis.plot(
      other.best_beta,
      0.03 + 0.06 * place,  # Of the height: tasks with one best β are stacked.
      marker="^",
      color=colour,
      markersize=10 if other is task else 6,
      linestyle="none",
      label=f"best β of {other.name}",
      transform=axis.get_xaxis_transform(),
    )
  axis.set_xscale("log")
  axis.xaxis.set_major_formatter("{x:g}")
  axis.set_xlabel("β, reward units per nat")
  axis.set_title(f"{task.name} (dotted: SFT)", fontsize=10)


def _regrets(
  axis: matplotlib_axes.Axes,
  config: ConfigDict,
  transfers: Sequence[arms.Transfer],
  regrets: arms.Regrets,
) -> None:
  """A row a pair of tasks, and their mean."""
  count = len(transfers)
  means = regrets.beta, regrets.target, regrets.tokens
  kinds = (
    ("β", _BETA, [t.of_beta for t in transfers]),
    ("KL target, nats per response", _TARGET, [t.of_target for t in transfers]),
    (
      "the same per token, off the sweep",
      _TOKENS,
      [t.of_tokens for t in transfers],
    ),
  )
  for shift, (name, colour, values), mean in zip(
    (-0.22, 0, 0.22), kinds, means
  ):
    for place, of in enumerate(values):
      axis.plot(of, [place + shift] * len(of), "o", color=colour, markersize=3)
    at = count + shift
    axis.plot([mean.low, mean.high], [at] * 2, color=colour, linewidth=1.5)
    axis.plot(mean.mean, at, "D", color=colour, markersize=6, label=name)
  axis.axvline(0, color="0.4", linewidth=0.8)
  axis.axvline(config.fails, color="0.4", linewidth=0.8, linestyle="--")
  axis.axhline(count - 0.5, color="0.8", linewidth=0.8)
  names = [f"{t.source} → {t.task}" for t in transfers]
  axis.set_yticks(range(count + 1), [*names, "mean, 95 %"])
  axis.set_ylim(count + 0.5, -0.5)
  axis.set_title("Gold lost with another task's setting", fontsize=10)
  axis.set_xlabel("share of the task's gain; a dot a seed\ndashed: a failure")
  axis.legend(
    frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.22)
  )
