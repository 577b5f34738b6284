"""Stage `evaluate`: a trained policy on held-out prompts, beside another.

Where the config names no reference or no reward, they are those of the run
that trained the policy.
"""

import dataclasses
import time
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from rich import console as rich_console

from rlhf_jax import errors
from rlhf_jax.measures import best_of_n, evaluation, retention
from rlhf_jax.report import evaluation as tables
from rlhf_jax.settings import roles, validate
from rlhf_jax.stages import sample_records, trained_run
from rlhf_jax.steps import evaluate as evaluate_lib
from rlhf_jax.storage import pretrained as pretrained_lib
from rlhf_jax.storage import workdir as workdir_lib
from rlhf_jax.text import tokenizer as tokenizer_lib

# Whose responses are drawn: independent streams of config.seed.
_POLICY, _OPPONENT, _BEST_OF_N = range(3)


class _Measured(NamedTuple):
  """The policy's evaluation, the opponent's, and the best of n."""

  mine: evaluate_lib.Evaluation
  theirs: evaluate_lib.Evaluation
  choices: list[best_of_n.BestOfN]


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
  models = roles.load(config)
  opponent = _opponent(config, models.policy) or models.reference
  shared = trained_run.shares_prompts(config, trained)
  prompts = evaluation.heldout_prompts(
    config, models.policy, console, shared=shared
  )
  if not shared:
    trained_run.print_overlap(config, trained, console)
  found = _measure(config, models, opponent, prompts)
  metrics = _metrics(found)
  metrics |= retention.losses(config, models.policy, models.reference, console)
  summary = {
    "stage": "evaluate",
    "seed": config.seed,
    "wall_s": time.monotonic() - began,
    "policy": models.policy.where,
    "reference": models.reference.where,
    "reward": config.reward.path or config.reward.function,
    "against": opponent.where,
    "prompts": len(prompts.lengths),
    "metrics": metrics,
  }
  workdir.rewind(0)
  workdir.append_samples(_records(models.policy, found.mine, found.theirs))
  workdir.write_summary(summary)
  tables.print_summary(console, summary)
  if found.choices:
    tables.print_best_of_n(console, found.choices)
  return summary


def _measure(config, models: roles.Models, opponent, prompts) -> _Measured:
  """Each under random numbers of its own."""
  seed = lambda stream: evaluation.seed_of(config.seed, stream)
  against = lambda policy, reference, stream: evaluation.evaluate(
    config, policy, reference, models.reward, prompts, seed=seed(stream)
  )
  choices = []
  if config.evaluate.best_of:
    choices = evaluation.best_of_n(
      config,
      models.policy,
      models.reward,
      prompts,
      samples=config.evaluate.best_of,
      seed=seed(_BEST_OF_N),
    )
  return _Measured(
    against(models.policy, models.reference, _POLICY),
    against(opponent, opponent, _OPPONENT),
    choices,
  )


def _metrics(found: _Measured) -> dict[str, float]:
  """Means with errors, wins, and what the best of n are worth."""
  metrics = evaluation.summarise(found.mine)
  metrics |= evaluation.win_rate(
    evaluation.worth(found.mine), evaluation.worth(found.theirs)
  )
  for choice in found.choices:
    metrics |= _best_of_n_metrics(choice)
  return metrics


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
