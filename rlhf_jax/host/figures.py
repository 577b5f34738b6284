"""What a sweep over β looks like: a table for the terminal, a picture."""

from collections.abc import Sequence
import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")  # Files, not windows.

from matplotlib import pyplot as plt
from rich import box as rich_box
from rich import console as rich_console
from rich import table as rich_table
from rich import text as rich_text

from rlhf_jax.host import workdir as workdir_lib

Member = dict[str, Any]


def print_members(
  console: rich_console.Console, members: Sequence[Member]
) -> None:
  """Prints β, proxy, gold and KL with standard errors, then a sample each."""
  table = rich_table.Table(
    title="What the penalty bought",
    title_justify="left",
    box=rich_box.SIMPLE_HEAD,
  )
  has_gold = "reward/gold" in members[0]["metrics"]
  for name in ["β", "proxy", *["gold"] * has_gold, "KL (nats/response)"]:
    table.add_column(name, justify="right", no_wrap=True)
  for member in members:
    figure = lambda name, digits, metrics=member["metrics"]: (
      f"{metrics[name]:.{digits}f} ± {metrics[name + '_se']:.{digits}f}"
    )
    table.add_row(
      f"{member['beta']:g}",
      figure("reward/score", 2),
      *[figure("reward/gold", 2)] * has_gold,
      figure("kl/reverse_exact", 1),
    )
  console.print()
  console.print(table)
  for member in members:
    sample = member["sample"]
    # A Text: a model may write rich's markup.
    line = f"β = {member['beta']:g}: {sample['prompt']} | {sample['response']}"
    console.print(rich_text.Text(line), soft_wrap=True)


def plot_members(root: pathlib.Path, members: Sequence[Member]) -> pathlib.Path:
  """Draws proxy and gold over the run against KL; returns the file."""
  names = ["reward/score", "reward/gold"]
  names = [n for n in names if n in members[0]["metrics"]]
  titles = {
    "reward/score": "proxy: the reward that is trained on",
    "reward/gold": "gold: the true reward",
  }
  figure, axes = plt.subplots(
    1, len(names), figsize=(4.6 * len(names), 3.8), squeeze=False
  )
  colours = plt.get_cmap("viridis_r")
  for i, member in enumerate(members):
    rows = workdir_lib.read_metrics(root / member["workdir"])
    colour = colours((i + 0.5) / len(members)) if member["beta"] else "crimson"
    root_kl = [max(row["kl/reverse_exact"], 0.0) ** 0.5 for row in rows]
    for axis, name in zip(axes[0], names):
      smooth = _smoothed([row[name] for row in rows])
      label = f"β = {member['beta']:g}"
      axis.plot(_smoothed(root_kl), smooth, color=colour, label=label)
      axis.plot(_smoothed(root_kl)[-1], smooth[-1], "o", color=colour)
  for axis, name in zip(axes[0], names):
    axis.set_title(titles[name], fontsize=10)
    axis.set_xlabel("√KL(π‖π_ref), √nats per response")
    axis.axhline(0, color="grey", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
  axes[0, 0].legend(frameon=False, fontsize=9)
  figure.tight_layout()
  file = root / "frontier.png"
  figure.savefig(file, dpi=150)
  plt.close(figure)
  return file


def _smoothed(values: Sequence[float], width: int = 5) -> list[float]:
  """Means over a window that reaches back; short at the beginning."""
  windows = [values[max(0, i - width + 1) : i + 1] for i in range(len(values))]
  return [sum(window) / len(window) for window in windows]
