"""Stage `evaluate`: a trained policy on held-out prompts, beside another.

Where the config names no reference or no reward, they are those of the run
that trained the policy.
"""

import dataclasses
import time
from typing import Any

from ml_collections import ConfigDict
from rich import box as rich_box
from rich import console as rich_console
from rich import table as rich_table
from rich import text as rich_text

from rlhf_jax import errors
from rlhf_jax.measures import best_of_n, evaluation, retention
from rlhf_jax.settings import roles, validate
from rlhf_jax.stages import sample_records, trained_run
from rlhf_jax.steps import evaluate as evaluate_lib
from rlhf_jax.storage import pretrained as pretrained_lib
from rlhf_jax.storage import workdir as workdir_lib
from rlhf_jax.text import tokenizer as tokenizer_lib

# Whose responses are drawn: independent streams of config.seed.
_POLICY, _OPPONENT, _BEST_OF_N = range(3)


def run(
  config: ConfigDict,
  workdir: workdir_lib.Workdir,
  *,
  console: rich_console.Console,
) -> dict[str, Any]:
  """Measures, leaves responses and summary in the workdir, prints a table."""
  began = time.monotonic()
  trained = trained_run.read(config)
  config = trained_run.with_roles(config, trained, console)
  policy = pretrained_lib.load_policy(config)
  validate.validate_model(config, policy.model)
  reference = roles.reference(config, policy)
  reward = roles.reward(config, policy)
  opponent = _opponent(config, policy) or reference
  shared = trained_run.shares_prompts(config, trained)
  prompts = evaluation.heldout_prompts(config, policy, console, shared=shared)
  if not shared:
    trained_run.print_overlap(config, trained, console)

  mine = evaluation.evaluate(
    config,
    policy,
    reference,
    reward,
    prompts,
    seed=evaluation.seed_of(config.seed, _POLICY),
  )
  theirs = evaluation.evaluate(
    config,
    opponent,
    opponent,
    reward,
    prompts,
    seed=evaluation.seed_of(config.seed, _OPPONENT),
  )
  metrics = evaluation.summarise(mine)
  metrics |= evaluation.win_rate(
    evaluation.worth(mine), evaluation.worth(theirs)
  )
  metrics |= retention.losses(config, policy, reference, console)
  choices = []
  if config.evaluate.best_of:
    choices = evaluation.best_of_n(
      config,
      policy,
      reward,
      prompts,
      samples=config.evaluate.best_of,
      seed=evaluation.seed_of(config.seed, _BEST_OF_N),
    )
    for choice in choices:
      metrics |= _best_of_n_metrics(choice)

  summary = {
    "stage": "evaluate",
    "seed": config.seed,
    "wall_s": time.monotonic() - began,
    "policy": policy.where,
    "reference": reference.where,
    "reward": config.reward.path or config.reward.function,
    "against": opponent.where,
    "prompts": len(prompts.lengths),
    "metrics": metrics,
  }
  workdir.rewind(0)
  workdir.append_samples(_records(policy, mine, theirs))
  workdir.write_summary(summary)
  _show(console, summary)
  if choices:
    _show_best_of_n(console, choices)
  return summary


def _opponent(config, policy) -> pretrained_lib.Pretrained | None:
  """The model at `evaluate.against`, if one is named."""
  if not config.evaluate.against:
    return None
  opponent = pretrained_lib.load(config.evaluate.against, config)
  if "score_head" in opponent.params:
    raise errors.UserError(
      f"config.evaluate.against: {opponent.where} is a reward model; wanted a"
      " language model"
    )
  pretrained_lib.check_same_tokenizer(policy, opponent)
  validate.validate_model(config, opponent.model)
  return opponent


def _best_of_n_metrics(choice: best_of_n.BestOfN) -> dict[str, float]:
  figures = dataclasses.asdict(choice)
  n = figures.pop("n")
  return {
    f"best_of_{n}/{name}": figure
    for name, figure in figures.items()
    if figure is not None
  }


def _records(
  policy: pretrained_lib.Pretrained,
  mine: evaluate_lib.Evaluation,
  theirs: evaluate_lib.Evaluation,
) -> list[dict[str, Any]]:
  """A record a prompt: the response, token by token, and the opponent's."""
  worth = evaluation.worth(mine), evaluation.worth(theirs)
  records = []
  for row in range(len(mine.score)):
    record = {"step": 0}
    record |= sample_records.of_response(
      policy, mine.rollout.sequences, mine.comparison, row
    )
    record |= _worth(mine, row)
    others = theirs.rollout.sequences
    text = others.response_tokens[row, : others.response_lengths[row]].tolist()
    against = {"response": tokenizer_lib.decode(policy.tokenizer, text)}
    against |= _worth(theirs, row)
    record |= {f"against_{name}": value for name, value in against.items()}
    first, second = (x[row] for x in worth)
    record["win"] = 0.5 if first == second else float(first > second)
    records.append(record)
  return records


def _worth(of: evaluate_lib.Evaluation, row: int) -> dict[str, float]:
  found = {"score": float(of.score[row])}
  if of.gold is not None:
    found["gold"] = float(of.gold[row])
  return found


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


def _show(console: rich_console.Console, summary: dict[str, Any]) -> None:
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


def _show_best_of_n(
  console: rich_console.Console, choices: list[best_of_n.BestOfN]
) -> None:
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
