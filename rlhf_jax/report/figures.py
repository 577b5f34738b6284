"""What a sweep over β looks like: tables for the terminal, a picture.

Both show the record of `measures.frontier`, which says what the figures are.
"""

from collections.abc import Mapping, Sequence
import io
from typing import Any

import matplotlib
from matplotlib import cm
from matplotlib import colors as matplotlib_colors
from matplotlib import figure as matplotlib_figure
import numpy as np
from rich import box as rich_box
from rich import console as rich_console
from rich import table as rich_table
from rich import text as rich_text

from rlhf_jax.measures import frontier, scaling_fits

Record = Mapping[str, Any]

_WIDTH = 100  # columns; what every line fits into
_SAMPLES = 6
_NORMAL = 1.96
_NO_PENALTY = "crimson"
# Colours that the colour-blind tell apart (Okabe & Ito).
_OF_REWARD = {"proxy": "#0072B2", "gold": "#D55E00"}
_TITLES = {
  "proxy": "Proxy: the reward that is trained on",
  "gold": "Gold: the true reward",
}
_FITS = {
  "rl": ("-", "RL law, final policies"),
  "rl_along_training": ("-.", "RL law, along training"),
  "best_of_n": (":", "best-of-n law"),
}
_LEGEND = {"frameon": False, "fontsize": 8}


def print_members(console: rich_console.Console, record: Record) -> None:
  """Prints a row a β, best-of-n, the recommendation, and samples.

  Samples are those of record['members'] that have one, for the first seed of
  up to six β; a line each, cut to the console's width.
  """
  width = min(console.width, _WIDTH)
  say = lambda text="": console.print(
    rich_text.Text(_escaped(text)), width=width
  )
  kinds = " or ".join(sorted({row["interval"] for row in record["by_beta"]}))
  say()
  say(f"What the penalty bought (± half of a 95 % interval over {kinds}):")
  say()
  console.print(_beta_table(record), width=width)
  for of in record["left_out"]:
    say(f"Left out: β = {of['beta']:g} seed {of['seed']}: not finite.")
  if record["best_of_n"]:
    say()
    say("Best of n samples of the start (± half of a 95 % interval):")
    say()
    console.print(_best_of_n_table(record), width=width)
  say()
  say(record["recommendation"]["text"])
  samples = _samples(record)
  if samples:
    say()
  for beta, sample in samples:
    text = _escaped(f"β = {beta:g}: {sample['prompt']} | {sample['response']}")
    line = rich_text.Text(text)
    line.truncate(width, overflow="ellipsis")
    console.print(line, width=width, no_wrap=True)


def plot_frontier(record: Record, trajectories: frontier.Trajectories) -> bytes:
  """A PNG of rewards against √KL and against β."""
  has_gold = record["reference"]["gold"] is not None
  names = ["proxy", "gold"] if has_gold else ["proxy"]
  figure = matplotlib_figure.Figure(
    figsize=(4.6 * len(names) + 5.2, 4.4), layout="constrained"
  )
  axes = figure.subplots(1, len(names) + 1, squeeze=False)[0]
  colours = _Colours(row["beta"] for row in record["by_beta"])
  for column, (axis, name) in enumerate(zip(axes, names), start=1):
    _against_kl(axis, name, column, record, trajectories, colours)
  if has_gold:
    _draw_fits(axes[1], record)
  for axis in axes[:-1]:
    axis.legend(**_LEGEND)
  if colours.scale:
    bar = figure.colorbar(colours.scale, ax=list(axes[:-1]), pad=0.01)
    bar.ax.set_title("β", fontsize=10)
    bar.ax.minorticks_off()
    ticks, labels = _ticks(colours.betas)
    bar.set_ticks(ticks, labels=labels)
  _against_beta(axes[-1], names, record)
  for axis in axes:
    axis.spines[["top", "right"]].set_visible(False)
  content = io.BytesIO()
  figure.savefig(content, format="png", dpi=150)
  return content.getvalue()


class _Colours:
  """A colour for each β, by its logarithm; no penalty has its own."""

  def __init__(self, betas):
    self.betas = [beta for beta in betas if beta > 0]
    self.scale = None
    if self.betas:
      # Without the palest end, which is hard to see on white.
      shades = matplotlib.colormaps["viridis_r"](np.linspace(0.1, 1, 256))
      low, high = min(self.betas), max(self.betas)
      self.scale = cm.ScalarMappable(
        matplotlib_colors.LogNorm(low / 1.1, high * 1.1),
        matplotlib_colors.ListedColormap(shades),
      )

  def __call__(self, beta: float):
    if beta == 0 or self.scale is None:
      return _NO_PENALTY
    return self.scale.to_rgba(np.array([beta]))[0]


def _against_kl(axis, name, column, record, trajectories, colours) -> None:
  """A reward over each training, where it ended, and best-of-n."""
  for (beta, _), rows in trajectories.items():
    values = np.array(rows, float)
    axis.plot(
      _smoothed(_root(values[:, 0])),
      _smoothed(values[:, column]),
      color=colours(beta),
      linewidth=0.9,
      alpha=0.7,
    )
  left_out = [(of["beta"], of["seed"]) for of in record["left_out"]]
  for member in record["members"]:
    if (member["beta"], member["seed"]) in left_out:
      continue
    d = max(member["kl"], 0.0) ** 0.5
    axis.errorbar(
      d,
      member[name],
      xerr=_NORMAL * member["kl_se"] / (2 * d) if d else None,
      yerr=_NORMAL * member[f"{name}_se"],
      fmt="o" if member["beta"] else "X",
      color=colours(member["beta"]),
      markersize=5,
      elinewidth=0.9,
      zorder=3,
    )
  best = record["best_of_n"]
  if best:
    d = _root(np.array([point["kl_estimate"] for point in best]))
    rewards = [point[name] for point in best]
    axis.plot(d, rewards, "k--s", markersize=3, lw=1.1, label="best of n")
  if any(row["beta"] == 0 for row in record["by_beta"]):
    axis.plot([], [], "X-", color=_NO_PENALTY, label="β = 0: no penalty")
  start = record["reference"][name]
  axis.axhline(start, color="0.6", lw=0.8, zorder=0, label="the start")
  axis.set_title(_TITLES[name], fontsize=10)
  axis.set_xlabel("√KL(π‖π_ref), √nats per response")
  axis.set_ylabel("reward units")


def _draw_fits(axis, record) -> None:
  start = record["reference"]["gold"]
  for name, (style, label) in _FITS.items():
    fit = record["fits"][name]
    if "reason" in fit:
      continue
    d = np.linspace(0, fit["reach"], 200)
    if name == "best_of_n":
      curve = scaling_fits.best_of_n
      both = fit["alpha_bon"]["value"], fit["beta_bon"]["value"]
    else:
      curve = scaling_fits.rl
      both = fit["alpha_rl"]["value"], fit["beta_rl"]["value"]
    gold = start + curve(d, *both)
    axis.plot(d, gold, style, color="0.45", lw=1.2, label=label, zorder=2)


def _against_beta(axis, names, record) -> None:
  """Rewards at the end by β, with the β that is recommended."""
  rows, advice = record["by_beta"], record["recommendation"]
  places = dict(zip((row["beta"] for row in rows), _places(rows)))
  ends = [places[beta] for beta in advice["alike"] or ()]
  if len(set(ends)) > 1:
    axis.axvspan(*ends, color="0.9", zorder=-1, label="gold like the highest")
  axis.axvline(
    places[advice["beta"]], color="0.4", lw=1, ls="--", label="recommended"
  )
  for name in names:
    means = np.array([row[name]["mean"] for row in rows])
    lows = np.array([row[name]["low"] for row in rows])
    highs = np.array([row[name]["high"] for row in rows])
    axis.errorbar(
      list(places.values()),
      means,
      yerr=(means - lows, highs - means),
      fmt="o-" if name == "gold" else "s--",
      color=_OF_REWARD[name],
      markersize=4,
      linewidth=1.1,
      capsize=2,
      label=name,
    )
  start = record["reference"][names[-1]]
  label = f"{names[-1]} of the start"
  axis.axhline(start, color="0.6", lw=0.8, zorder=0, label=label)
  axis.set_xscale("log")
  axis.minorticks_off()
  positive = [beta for beta in places if beta > 0]
  ticks, labels = _ticks(positive)
  if 0 in places:
    ticks, labels = [places[0], *ticks], ["0", *labels]
  axis.set_xticks(ticks, labels)
  axis.set_title("At the end, with 95 % intervals", fontsize=10)
  axis.set_xlabel("β, reward units per nat")
  axis.set_ylabel("reward units")
  axis.legend(**_LEGEND)


def _places(rows) -> list[float]:
  """Where each β is on a logarithmic axis; 0 is left of all others."""
  smallest = min((row["beta"] for row in rows if row["beta"] > 0), default=1.0)
  return [row["beta"] or smallest / 4 for row in rows]


def _ticks(betas: Sequence[float]) -> tuple[list[float], list[str]]:
  """The β themselves where they are few, else powers of ten, or some β."""
  ticks = list(betas)
  if len(ticks) > 5:
    exponents = np.log10([min(ticks), max(ticks)])
    first, last = np.ceil(exponents[0] - 1e-9), np.floor(exponents[1] + 1e-9)
    if last > first:
      ticks = [10.0**e for e in np.arange(first, last + 1)]
    else:
      ticks = ticks[:: -(-len(ticks) // 5)]
  return ticks, [f"{tick:g}" for tick in ticks]


def _beta_table(record: Record) -> rich_table.Table:
  rows, start = record["by_beta"], record["reference"]
  shown = [
    name
    for name in ("proxy", "gold", "win_rate", "kl")
    if any(row[name] is not None for row in rows)
  ]
  heads = {"win_rate": "win rate", "kl": "KL, nats"}
  front = {
    point["beta"]: f"{point['share_on_front']:.0%}"
    for point in record["pareto"]["points"]
  }
  table = _table("β", "seeds", *(heads.get(n, n) for n in shown), "on front")
  begins = {"kl": 0.0} | start
  table.add_row(
    *("start", "", *(_number(begins.get(name)) for name in shown), "")
  )
  for row in rows:
    cells = [_with_half(row[name]) for name in shown]
    seeds = str(len(row["seeds"]))
    table.add_row(f"{row['beta']:g}", seeds, *cells, front[row["beta"]])
  return table


def _best_of_n_table(record: Record) -> rich_table.Table:
  has_gold = record["reference"]["gold"] is not None
  names = ["proxy", *["gold"] * has_gold, "kl_estimate"]
  heads = ["proxy", *["gold"] * has_gold, "KL, estimate", "KL, bound"]
  table = _table("n", *heads)
  for point in record["best_of_n"]:
    table.add_row(
      str(point["n"]),
      *(
        _with_half(_around(point[name], point[f"{name}_se"])) for name in names
      ),
      _number(point["kl_bound"]),
    )
  return table


def _table(*heads: str) -> rich_table.Table:
  table = rich_table.Table(
    box=rich_box.SIMPLE_HEAD,
    show_edge=False,
    pad_edge=False,
    padding=(0, 1, 0, 0),
  )
  for head in heads:
    table.add_column(head, justify="right", no_wrap=True)
  return table


def _around(mean: float, error: float) -> dict[str, float]:
  return {
    "mean": mean,
    "low": mean - _NORMAL * error,
    "high": mean + _NORMAL * error,
  }


def _with_half(figure: Mapping[str, float] | None) -> str:
  if figure is None:
    return "–"
  half = (figure["high"] - figure["low"]) / 2
  return f"{_number(figure['mean'])} ± {_number(half)}"


def _number(value: float | None) -> str:
  if value is None:
    return "–"
  digits = 2 if abs(value) < 10 else 1
  return f"{value:.{digits}f}" if abs(value) < 1e4 else f"{value:.2g}"


def _samples(record: Record) -> list[tuple[float, dict[str, str]]]:
  """β and a sample of its first seed, for a few β from end to end."""
  first: dict[float, dict[str, str]] = {}
  for member in sorted(
    record["members"], key=lambda member: (member["beta"], member["seed"])
  ):
    if "sample" in member:
      first.setdefault(member["beta"], member["sample"])
  count = min(_SAMPLES, len(first))
  chosen = np.linspace(0, len(first) - 1, count).round().astype(int)
  return [list(first.items())[i] for i in chosen]


def _escaped(text: str) -> str:
  """The text with whatever a terminal might obey as an escape."""
  return "".join(
    c if c.isprintable() else c.encode("unicode_escape").decode() for c in text
  )


def _root(kl: np.ndarray) -> np.ndarray:
  return np.sqrt(np.maximum(kl, 0.0))


def _smoothed(values) -> list[float]:
  """Means over a window that reaches back; short at the beginning."""
  width = 5
  windows = [values[max(0, i - width + 1) : i + 1] for i in range(len(values))]
  return [sum(window) / len(window) for window in windows]
