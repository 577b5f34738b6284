"""What the terminal and the picture show of a hand-made sweep."""

import dataclasses
import io
import math

from matplotlib import colors as matplotlib_colors
from matplotlib import figure as matplotlib_figure
import numpy as np
import pytest
from rich import cells
from rich import console as rich_console

from rlhf_jax.measures import best_of_n, frontier
from rlhf_jax.report import figures

_ODD = "[bold]a[/bold] \x1b[31mred\x1b[0m\nnext \u202eback 映画映画 " * 9


def _sweep(betas=(0.0, 0.05, 0.2, 1.0), seeds=(0, 1), *, has_gold=True):
  """A record with samples, and trajectories; gold falls towards β = 0."""
  members, trajectories = [], {}
  for beta in betas:
    for seed in seeds:
      kl = 4.0 / (0.1 + beta)
      gold = 1.0 - 0.01 * (kl - 9.0) ** 2 + 0.02 * seed
      trajectories[beta, seed] = [
        (kl * i / 9, i / 9, gold * i / 9 if has_gold else None)
        for i in range(10)
      ]
      members.append(
        frontier.Member(
          beta=beta,
          seed=seed,
          workdir=f"beta={beta:g},seed={seed}",
          proxy=2.0 - beta,
          proxy_se=0.1,
          gold=gold if has_gold else None,
          gold_se=0.1 if has_gold else None,
          win_rate=0.6,
          win_rate_se=0.05,
          kl=kl,
          kl_se=0.4,
        )
      )
  best = [
    best_of_n.BestOfN(
      n=n,
      proxy=0.4 * n,
      proxy_se=0.1,
      gold=0.2 * n if has_gold else None,
      gold_se=0.1 if has_gold else None,
      kl_bound=0.5 * n,
      kl_estimate=0.25 * n,
      kl_estimate_se=0.01,
    )
    for n in (1, 4, 16)
  ]
  start = {"proxy": 0.1, "gold": 0.3 if has_gold else None}
  record = frontier.record(members, best, start, trajectories)
  for member in record["members"]:
    response = f"seed {member['seed']} {_ODD}"
    member["sample"] = {"prompt": "the film", "response": response}
  return record, trajectories


def _printed(record, width=100):
  console = rich_console.Console(
    file=io.StringIO(), width=width, force_terminal=True, color_system=None
  )
  figures.print_members(console, record)
  return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 100, 200])
@pytest.mark.parametrize("has_gold", [True, False])
def test_no_line_is_too_wide(width, has_gold):
  betas = (0.0, *np.geomspace(1.23456e-3, 1, 15).tolist())
  text = _printed(_sweep(betas, has_gold=has_gold)[0], width)
  widths = [cells.cell_len(line) for line in text.splitlines()]
  assert max(widths) <= min(width, 100)
  # Samples are cut; nothing in the tables is.
  assert [line for line in text.splitlines() if "…" in line] == [
    line for line in text.splitlines() if "the film |" in line
  ]


def test_the_table_holds_the_records_figures():
  record, _ = _sweep(seeds=(0,))
  lines = _printed(record).splitlines()
  # KL = 4 / 0.3 = 13.3; gold = 1 − 0.01 · 4.33² = 0.81; errors times 1.96.
  (row,) = (line for line in lines if line.split()[:2] == ["0.2", "1"])
  assert " ".join(row.split()[2:-1]) == (
    "1.80 ± 0.20 0.81 ± 0.20 0.60 ± 0.10 13.3 ± 0.78"
  )
  (start,) = (line for line in lines if line.split()[:1] == ["start"])
  assert start.split() == ["start", "0.10", "0.30", "–", "0.00"]
  (best,) = (line for line in lines if line.split()[:1] == ["16"])
  assert " ".join(best.split()) == (
    "16 6.40 ± 0.20 3.20 ± 0.20 4.00 ± 0.02 8.00"
  )
  assert "interval over responses" in lines[1]


def test_the_recommendation_is_shown():
  record, _ = _sweep()
  text = " ".join(_printed(record).split())
  assert " ".join(record["recommendation"]["text"].split()) in text


def test_what_a_model_wrote_is_shown_and_not_obeyed():
  """Markup, terminal escapes, newlines and bidirectional marks (row 50)."""
  text = _printed(_sweep()[0])
  assert "[bold]a[/bold] \\x1b[31mred\\x1b[0m\\nnext \\u202eback" in text
  assert "\x1b[31m" not in text and "\u202e" not in text


def test_samples_are_a_few_from_end_to_end():
  betas = tuple(np.arange(16) / 16)
  lines = _printed(_sweep(betas)[0]).splitlines()
  samples = [line for line in lines if "the film |" in line]
  shown = [float(line.split()[2].rstrip(":")) * 16 for line in samples]
  assert shown == [0, 3, 6, 9, 12, 15]
  assert all("seed 0" in line for line in samples)


@pytest.fixture
def drawn(monkeypatch):
  """Draws a sweep; returns its axes."""
  kept = []
  save = matplotlib_figure.Figure.savefig

  def savefig(self, *args, **kwargs):
    kept.append(self)
    save(self, *args, **kwargs)

  monkeypatch.setattr(matplotlib_figure.Figure, "savefig", savefig)

  def draw(record, trajectories):
    picture = figures.plot_frontier(record, trajectories)
    assert picture[:4] == b"\x89PNG"
    return kept[-1].axes

  return draw


def _line(axis, label):
  (line,) = (line for line in axis.lines if line.get_label() == label)
  return line


def test_the_picture_draws_the_records_figures(drawn):
  record, trajectories = _sweep(seeds=(0,))
  proxy, gold, by_beta, _ = drawn(record, trajectories)
  assert proxy.get_title().startswith("Proxy")
  assert gold.get_title().startswith("Gold")
  # The mean of the last five of ten points, in d and in gold.
  rows = np.array(trajectories[0.2, 0])[-5:]
  d, reward = np.sqrt(rows[:, 0]).mean(), rows[:, 2].mean()
  ends = [line.get_xydata()[-1] for line in gold.lines[:4]]
  assert any(np.allclose(end, (d, reward)) for end in ends)
  # Final policies: √(4 / 0.3), and 1 − 0.01 · (13.33 − 9)².
  ends = [
    line.get_xydata()[0] for line in gold.lines if line.get_marker() == "o"
  ]
  assert any(np.allclose(end, (3.6515, 0.8122), atol=1e-4) for end in ends)
  # √0.25, √1, √4.
  np.testing.assert_allclose(
    _line(gold, "best of n").get_xydata(), [(0.5, 0.2), (1, 0.8), (2, 3.2)]
  )
  recommended = _line(by_beta, "recommended").get_xdata()[0]
  assert recommended == record["recommendation"]["beta"]
  # ±0.196: the gold of β = 1, 1 − 0.01 · (3.64 − 9)² = 0.71, is like 0.81.
  (band,) = by_beta.patches
  assert (band.get_x(), band.get_x() + band.get_width()) == (0.2, 1.0)
  # β = 0 stands left of the others, under its own name.
  labels = [label.get_text() for label in by_beta.get_xticklabels()]
  assert labels == ["0", "0.05", "0.2", "1"]
  fit = _line(gold, "RL law, final policies").get_xydata()
  assert fit[0] == pytest.approx((0, 0.3))
  # The law at the largest d, from the record: √40 = 6.325.
  alpha, beta = (
    record["fits"]["rl"][name]["value"] for name in ("alpha_rl", "beta_rl")
  )
  assert fit[-1] == pytest.approx(
    (40**0.5, 0.3 + 40**0.5 * (alpha - beta * np.log(40**0.5)))
  )


def test_no_penalty_has_its_own_colour(drawn):
  proxy, *_ = drawn(*_sweep())
  crimson = matplotlib_colors.to_rgb("crimson")
  colours = [matplotlib_colors.to_rgb(line.get_color()) for line in proxy.lines]
  # Two seeds of β = 0, then two each of the others.
  assert colours[:2] == [crimson] * 2
  assert crimson not in colours[2:8]
  assert colours[2] == colours[3] != colours[4]


@pytest.mark.parametrize(
  "betas, seeds", [((0.0,), (0,)), ((0.1,), (0, 1)), ((0.1, 0.2), (0,))]
)
def test_few_members_are_drawn_too(drawn, betas, seeds):
  drawn(*_sweep(betas, seeds))
  drawn(*_sweep(betas, seeds, has_gold=False))


def test_a_member_that_is_not_finite_is_not_drawn(drawn):
  record, trajectories = _sweep(seeds=(0,))
  members = [
    frontier.Member(**{n: v for n, v in m.items() if n != "sample"})
    for m in record["members"]
  ]
  members[1] = dataclasses.replace(members[1], kl=math.nan, gold_se=math.inf)
  trajectories[0.05, 0] = [(math.nan, math.nan, math.nan)] * 3
  record = frontier.record(members, [], record["reference"], trajectories)
  proxy, *_ = drawn(record, trajectories)
  points = [line for line in proxy.lines if line.get_marker() in ("o", "X")]
  assert len(points) == 3 + 1  # And the legend's.
  assert "Left out: β = 0.05 seed 0" in _printed(record)


def test_without_gold_only_the_proxy_is_drawn(drawn):
  axes = drawn(*_sweep(has_gold=False))
  titles = [axis.get_title() for axis in axes]
  assert not any("Gold" in title for title in titles)
  assert len(axes) == 3  # The proxy, by β, and the colours.
