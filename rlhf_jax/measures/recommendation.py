"""Which β of a sweep to use: a rule, and its result in words.

Rows are those of `frontier.record`'s `by_beta`, in order of β. Where there is
gold, the rule is the largest β whose gold cannot be told from the highest.
Where there is none, nothing tells a good gain in proxy from an exploit (a win
rate by the reward model would be the proxy again), so the rule weighs proxy
against KL alone, and says so.
"""

from collections.abc import Mapping, Sequence
import math
from typing import Any

import numpy as np
from scipy import stats

Row = Mapping[str, Any]
Golds = Mapping[float, Mapping[int, float]]  # β → seed → gold

ENOUGH_GAIN = 0.8  # Of the largest gain in proxy.
_UNIT = (
  "β is in this reward's units: scores normalised on the reference's samples."
)


def by_gold(rows: Sequence[Row], golds: Golds, start: float) -> dict[str, Any]:
  """The largest β whose gold cannot be told from the highest.

  From the β of the highest gold one goes up, and down, as far as gold cannot
  be told from it (`_alike`); `alike` holds both ends.

  Args:
    rows: In order of β.
    golds: Of the same β.
    start: The reference's own gold.
  """
  top = max(range(len(rows)), key=lambda i: rows[i]["gold"]["mean"])
  best = rows[top]
  chosen = _alike(rows[top:], golds)[-1]
  lowest = _alike(rows[top::-1], golds)[-1]
  gold, kl = chosen["gold"], chosen["kl"]["mean"]
  is_above = gold["low"] > start
  text = [
    f"β = {chosen['beta']:g} is recommended: gold {_interval(gold)} at "
    f"{kl:.3g} nats per response; the start's gold is {start:.2f}."
  ]
  if not is_above:
    text.append("That is not surely a gain.")
  if chosen is not lowest:
    text.append(
      f"From β = {lowest['beta']:g} to {chosen['beta']:g} gold cannot be told "
      f"from the highest ({best['gold']['mean']:.3g} at β = "
      f"{best['beta']:g}); the largest of these keeps closest to the reference."
    )
  if chosen is rows[-1]:
    text.append("No larger β was tried: one may do as well.")
  elif best is rows[0] and best["beta"] > 0:
    text.append("No smaller β was tried: one may do better.")
  return {
    "beta": chosen["beta"],
    "reward": "gold",
    "highest": best["beta"],
    "alike": [lowest["beta"], chosen["beta"]],
    "expected": gold,
    "kl": kl,
    "above_start": is_above,
    "text": " ".join([*text, _UNIT]),
  }


def by_proxy(rows: Sequence[Row], start: float) -> dict[str, Any]:
  """The largest β that keeps most of the largest gain in proxy.

  Args:
    rows: In order of β.
    start: The reference's own proxy.
  """
  gains = [row["proxy"]["mean"] - start for row in rows]
  best = rows[int(np.argmax(gains))]
  if max(gains) > 0:
    enough = ENOUGH_GAIN * max(gains)
    chosen = [row for row, gain in zip(rows, gains) if gain >= enough][-1]
    why = (
      f"is the largest that keeps {ENOUGH_GAIN:.0%} of the largest gain in "
      f"proxy, that of β = {best['beta']:g}"
    )
  else:
    chosen = best
    why = "lost least; no β raised the proxy"
  proxy, kl = chosen["proxy"], chosen["kl"]["mean"]
  return {
    "beta": chosen["beta"],
    "reward": "proxy",
    "highest": best["beta"],
    "alike": None,
    "expected": proxy,
    "kl": kl,
    "above_start": proxy["low"] > start,
    "text": (
      f"β = {chosen['beta']:g} {why}: proxy {_interval(proxy)} at {kl:.3g} "
      f"nats per response; the start's proxy is {start:.2f}. There is no gold "
      "to check this by: read the samples before you trust it. " + _UNIT
    ),
  }


def _alike(rows: Sequence[Row], golds: Golds) -> Sequence[Row]:
  """The first row, and those after it as far as their gold is like its own.

  With two seeds or more that all rows have, differences are paired over
  seeds: gold = mean of the β + effect of the seed + noise, the noise of equal
  spread for these rows, and two β differ where a t test at 5 % says so. For
  two rows this is the paired t test; more rows know the spread better, which
  two or three seeds do not. Otherwise β differ where 95 % intervals of gold
  do not overlap.
  """
  of = [golds[row["beta"]] for row in rows]
  seeds = sorted(set.intersection(*map(set, of)))
  if len(seeds) > 1 and len(rows) > 1:
    values = np.array([[by_seed[seed] for seed in seeds] for by_seed in of])
    means = values.mean(1)
    noise = values - means[:, None] - values.mean(0) + values.mean()
    freedom = (len(rows) - 1) * (len(seeds) - 1)
    spread = math.sqrt(2 * np.sum(noise**2) / freedom / len(seeds))
    alike = means[0] - means <= stats.t.ppf(0.975, freedom) * spread
  else:
    alike = [row["gold"]["high"] >= rows[0]["gold"]["low"] for row in rows]
  return rows[
    : next((i for i, is_like in enumerate(alike) if not is_like), None)
  ]


def _interval(figure: Mapping[str, float]) -> str:
  return f"{figure['mean']:.3g} [{figure['low']:.3g}, {figure['high']:.3g}]"
