"""What `launch.evaluate` shows: a table of figures, and one of best of n."""

import dataclasses
from typing import Any

from rich import box as rich_box
from rich import console as rich_console
from rich import table as rich_table
from rich import text as rich_text

from rlhf_jax.measures import best_of_n

_SHOWN = {
  "reward/score": "score",
  "reward/gold": "gold",
  "kl/reverse_exact": "KL(π‖π_ref), nats per response",
  "kl/reverse_k1": "  by k1",
  "kl/reverse_k3": "  by k3",
  "kl/forward_exact": "KL(π_ref‖π) where π goes",
  "kl/anchored": "KL(π‖π_ref) with π_ref blind to the prefix",
  "rollout/response_tokens": "tokens per response",
  "rollout/truncated_fraction": "cut off",
  "rollout/reference_nll": "reference's NLL, nats per token",
  "text/distinct_1": "distinct 1-grams",
  "text/distinct_2": "distinct 2-grams",
  "text/distinct_3": "distinct 3-grams",
  "text/self_repetition": "repeated 4-grams",
}


def print_summary(
  console: rich_console.Console, summary: dict[str, Any]
) -> None:
  """A table of the figures with their standard errors."""
  metrics = summary["metrics"]
  table = _table(
    f"{summary['prompts']} responses of {summary['policy']} (± standard error)",
    show_header=False,
  )
  table.add_column("")
  table.add_column("", justify="right", no_wrap=True)
  for name, label in _SHOWN.items():
    if name in metrics:
      table.add_row(label, _figure(metrics, name))
  low, high = metrics["win/rate_low"], metrics["win/rate_high"]
  by = "gold" if "reward/gold" in metrics else "score"
  table.add_row(
    rich_text.Text(f"wins by {by} against {summary['against']}"),
    f"{metrics['win/rate']:.3f} [{low:.3f}, {high:.3f}]",
  )
  for name in metrics:
    if name.startswith("retention/") and not name.endswith("_se"):
      _, corpus, figure = name.split("/")
      whose = "policy's" if figure == "nll" else "reference's"
      label = rich_text.Text(f"{whose} NLL of {corpus}")
      table.add_row(label, _figure(metrics, name))
  console.print()
  console.print(table)


def print_best_of_n(
  console: rich_console.Console, choices: list[best_of_n.BestOfN]
) -> None:
  """A table of what is chosen among more and more responses."""
  table = _table(
    "Best of n (KL to the policy, nats per response)", show_header=True
  )
  has_gold = choices[0].gold is not None
  names = "proxy", *["gold"] * has_gold, "kl_estimate"
  for name in ("n", *names, "at most"):
    label = "KL" if name == "kl_estimate" else name
    table.add_column(label, justify="right", no_wrap=True)
  for choice in choices:
    figures = dataclasses.asdict(choice)
    table.add_row(
      str(choice.n),
      *(_figure(figures, name) for name in names),
      f"{choice.kl_bound:.3f}",
    )
  console.print(table)


def _table(title: str, *, show_header: bool) -> rich_table.Table:
  return rich_table.Table(
    title=rich_text.Text(title),  # A path may have brackets.
    title_justify="left",
    box=rich_box.SIMPLE_HEAD,
    show_header=show_header,
  )


def _figure(metrics: dict[str, Any], name: str) -> str:
  error = f" ± {metrics[f'{name}_se']:.3f}" if f"{name}_se" in metrics else ""
  return f"{metrics[name]:.3f}{error}"
