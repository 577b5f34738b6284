"""Is a small RLHF policy preferred to a raw model 100 times its size?

A small language model, a reward model of the same size on top of it, PPO from
both with several seeds, and a large language model. The two language models
are trained alike, by next-token prediction on the texts of the built-in
language, for as many steps; only PPO has seen preferences. The judge is the
gold reward, on responses to held-out prompts. A seed draws PPO's samples, and
the prompts, responses and texts of a comparison; it is one observation, and
intervals are over seeds. The models that PPO begins with, and the large one,
are the same throughout.

That the large model is large is not enough: it must be the better language
model as well, by its loss on texts that neither was trained on.

Differs from the paper: GPT-3 was pretrained on another distribution than that
of its instructions, and prompted; here the large model was trained on just the
texts that the small one's SFT saw. All that it lacks is RLHF. And size buys
little here: the language is so plain that the small model comes within some
hundredths of a nat of its entropy, so that the two are nearly even before RLHF,
where GPT-3 of 175B is far ahead of that of 1.3B.
"""

from collections.abc import Sequence
import pathlib
import textwrap
from typing import NamedTuple

import jax
from matplotlib import figure as matplotlib_figure
from ml_collections import ConfigDict
import numpy as np

from rlhf_jax import types
from rlhf_jax.measures import evaluation, retention
from rlhf_jax.models import transformer
from rlhf_jax.settings import roles
from rlhf_jax.storage import pretrained as pretrained_lib
from rlhf_jax.studies import (
  drawing,
  held_out,
  intervals,
  limits,
  study,
  toy_runs,
)
from rlhf_jax.text import toy_language

MODELS = SMALL, RLHF, LARGE = "small", "small, RLHF", "large"
_LARGE = {"stage": "sft", "policy.path": "", "data.path": ""}
_TEXT_WIDTH = 80  # columns of a sample


class Measured(NamedTuple):
  """A model of one seed, on held-out prompts and texts.

  `nll` is of the texts, nats per token, and `above_floor` what of it the
  language itself does not have; `gold` is the mean of its responses, `errors`
  are ungrammatical pairs a response. `kl` is to the small language model, nats
  per response; of the large model, which is compared with itself, 0. `wins` is
  the share of prompts where its gold is above the large model's, a tie counting
  half, with its 95 % interval over prompts; `wins_by_score` by the reward
  model.
  """

  seed: int
  model: str
  parameters: int
  nll: float
  above_floor: float
  gold: float
  errors: float
  kl: float
  wins: float
  wins_low: float
  wins_high: float
  wins_by_score: float


class Judged(NamedTuple):
  """A model over all seeds; see `Measured`."""

  model: str
  parameters: int
  above_floor: float
  gold: intervals.Interval
  wins: intervals.Interval
  by_score: float


def check(config: ConfigDict) -> None:
  """Refuses fields that make no sense."""
  limits.check(
    config,
    {
      "times": limits.Limit("above 1", lambda x: x > 1),
      "seeds": limits.SEEDS,
      "prompts": limits.at_least(2),
    },
  )
  toy_runs.check(config, {"sweep": _sweep(config)}, {"sweep.seeds": ()})
  only = "it is only pretrained, on the built-in language"
  raw = {f"large.{name}": limits.equal(x, only) for name, x in _LARGE.items()}
  limits.check(config, raw)
  toy_runs.check_one(config.large, "large")
  small, large = map(_parameters, (config.training, config.large))
  wanted = limits.Limit(
    f"at most {large / small:.1f}: large has {large:,} parameters and training"
    f" {small:,}",
    lambda times: times * small <= large,
  )
  limits.check(config, {"times": wanted})


def run(lab: study.Lab) -> study.Outcome:
  """Makes the models, in sub-workdirs, and compares them."""
  config, begun = lab.config, toy_runs.start(lab)
  large = toy_runs.made(lab, "large", config.large)
  members = toy_runs.swept(lab, "ppo", _sweep(config), begun)
  measured, samples = _compared(lab, begun, large, members)
  judged = [judge(measured, model) for model in MODELS]
  return study.Outcome(
    verdict=verdict(measured),
    paragraph=_paragraph(config, measured, judged),
    tables=_tables(config, measured, judged, samples),
    figure=_draw(measured, judged),
  )


def verdict(measured: Sequence[Measured]) -> str:
  """The rule: the small policy wins, against the better language model.

  Both by intervals over seeds: more than half of the prompts, and a loss that
  is lower than that of the small language model.
  """
  wins = intervals.of_mean(_column(measured, RLHF, "wins"))
  holds = wins.low > 0.5 and _lead(measured).low > 0
  return study.HOLDS if holds else study.DOES_NOT_HOLD


def _lead(measured: Sequence[Measured]) -> intervals.Interval:
  """The small language model's loss less the large one's, nats per token."""
  nll = [_column(measured, model, "nll") for model in (SMALL, LARGE)]
  return intervals.of_difference(*nll)


def judge(measured: Sequence[Measured], model: str) -> Judged:
  """One model's means, with intervals over seeds."""
  column = lambda field: _column(measured, model, field)
  return Judged(
    model,
    column("parameters")[0],
    float(np.mean(column("above_floor"))),
    intervals.of_mean(column("gold")),
    intervals.of_mean(column("wins")),
    float(np.mean(column("wins_by_score"))),
  )


def _column(measured: Sequence[Measured], model: str, field: str) -> list:
  return [row._asdict()[field] for row in measured if row.model == model]


def _sweep(config: ConfigDict) -> ConfigDict:
  return toy_runs.sweep(config, ())


def _parameters(config: ConfigDict) -> int:
  """Of the model that would start at random."""
  vocab_size = len(toy_language.of(config).vocabulary)
  model = pretrained_lib.architecture(config, vocab_size=vocab_size)
  init = lambda: transformer.init(jax.random.key(0), model)
  return _count(jax.eval_shape(init))


def _count(params: types.Params) -> int:
  return sum(x.size for x in jax.tree.leaves(params))


def _compared(
  lab: study.Lab,
  begun: toy_runs.Start,
  large_path: pathlib.Path,
  members: Sequence[toy_runs.Member],
) -> tuple[list[Measured], list[tuple[str, str]]]:
  """A row a seed and model; what each writes to the first prompt of all."""
  prompts = {"evaluate.prompts": lab.config.prompts}
  training = toy_runs.from_start(lab.config.training, begun)
  training = toy_runs.varied(training, prompts)
  small = pretrained_lib.load(str(begun.policy), training)
  large = pretrained_lib.load(str(large_path), training)
  reward = roles.reward(training, small)
  rows, samples = [], []
  for member in members:
    config = toy_runs.varied(training, {"seed": member.seed})
    rlhf = pretrained_lib.load(str(member.path), config)
    models = {SMALL: small, RLHF: rlhf, LARGE: large}
    asked = evaluation.heldout_prompts(config, small, lab.console, shared=False)
    found = {}
    for stream, (name, model) in enumerate(models.items()):
      # Streams of their own: responses of two models are independent.
      seed = evaluation.seed_of(member.seed, stream)
      held = large if name == LARGE else small
      found[name] = evaluation.evaluate(
        config, model, held, reward, asked, seed=seed
      )
    rows += [
      _row(config, name, model, found[name], found[LARGE], lab.console)
      for name, model in models.items()
    ]
    samples = samples or [(name, _text(small, x)) for name, x in found.items()]
  return rows, samples


def _row(config, name, model, mine, large, console) -> Measured:
  losses = retention.losses(config, model, model, console)
  nll = losses[f"retention/{retention.BUILT_IN}/nll"]
  gold = evaluation.worth(mine)
  wins = evaluation.win_rate(gold, evaluation.worth(large))
  by_score = evaluation.win_rate(mine.score, large.score)
  faults = jax.jit(toy_language.of(config).ungrammatical_pairs)
  return Measured(
    seed=config.seed,
    model=name,
    parameters=_count(model.params),
    nll=nll,
    above_floor=nll - _floor(config),
    gold=float(gold.mean()),
    errors=float(faults(mine.rollout.sequences).mean()),
    kl=float(mine.reverse_exact.mean()),
    wins=wins["win/rate"],
    wins_low=wins["win/rate_low"],
    wins_high=wins["win/rate_high"],
    wins_by_score=by_score["win/rate"],
  )


def _floor(config: ConfigDict) -> float:
  """The language's own NLL of the texts that `retention` takes, per token."""
  language = toy_language.of(config)
  seed, count = evaluation.HELD_OUT + config.seed, config.evaluate.prompts
  texts = language.sample_texts(seed, count, config.data.opening)
  nats = sum(language.negative_log_likelihood(*text) for text in texts)
  return nats / sum(len(response) for _, response in texts)


def _text(model, found) -> str:
  """The first prompt, and what was answered."""
  text = held_out.text(model, found.rollout.sequences, 0)
  return textwrap.shorten(text, _TEXT_WIDTH, placeholder=" …")


def _tables(config, measured, judged, samples) -> dict[str, study.Table]:
  return {
    "models": study.Table(
      f"Means over {config.seeds} seeds, lo and hi: ends of 95 % intervals."
      " excess: held-out loss above the language's entropy, nats per token;"
      f" gold reward; wins: share of {config.prompts} held-out prompts where"
      " its gold is above the large model's, a tie counting half; the same by"
      " the reward model's score",
      (
        *("model", "parameters", "excess", "gold", "gold_lo", "gold_hi"),
        *("wins", "wins_lo", "wins_hi", "by_score"),
      ),
      [
        # The large model does not play against itself.
        (*row, *gold, *([None] * 4 if row[0] == LARGE else (*wins, by_score)))
        for *row, gold, wins, by_score in judged
      ],
    ),
    "samples": study.Table(
      f"What they write, seed {config.seed}; | ends the prompt",
      ("model", "text"),
      samples,
    ),
    "seeds": study.table_of(
      "Every seed; the intervals of wins are over its prompts",
      measured,
      shown=False,
    ),
  }


def _paragraph(config, measured, judged) -> str:
  small, rlhf, large = judged
  nats, lead = np.mean(_column(measured, RLHF, "kl")), _lead(measured)
  return (
    f"The RLHF policy of {rlhf.parameters:,} parameters is preferred to the raw"
    f" model of {large.parameters:,}"
    f" ({large.parameters / rlhf.parameters:.1f} times as many) on"
    f" {rlhf.wins.mean:.1%} of held-out prompts ({rlhf.wins.low:.1%} to"
    f" {rlhf.wins.high:.1%} over {config.seeds} seeds). Before PPO it was on"
    f" {small.wins:.1%}. Mean gold: {small.gold.mean:.2f} before PPO,"
    f" {rlhf.gold.mean:.2f} after it at {nats:.1f} nats,"
    f" {large.gold.mean:.2f} of the large model, whose held-out loss is lower"
    f" than the small one's by {lead.mean:.3f} nats per token"
    f" ({lead.low:.3f} to {lead.high:.3f}):"
    f" {large.above_floor:.3f} above the language's entropy against"
    f" {small.above_floor:.3f}, and {rlhf.above_floor:.3f} after PPO."
  )


def _draw(
  measured: Sequence[Measured], judged: Sequence[Judged]
) -> matplotlib_figure.Figure:
  """Who is preferred, and who is the better language model."""
  figure, (left, right) = drawing.panels((11, 3.9), 2)
  colours = "tab:orange", "tab:blue", "0.35"
  *small, large = judged
  drawing.lying(
    left,
    [f"{row.model}\n{row.parameters:,} parameters" for row in small],
    [row.wins for row in small],
    colours,
    dots=[_column(measured, row.model, "wins") for row in small],
    size=6,
  )
  left.axvline(0.5, color="0.4", linestyle="--", linewidth=1)
  left.set_xlim(0, 1)
  drawing.say(
    left,
    f"Preferred to the raw model of {large.parameters:,} parameters?",
    "share of held-out prompts won, by gold\n"
    "colour: mean, 95 % interval; grey: a seed; dashed: even",
  )
  for row, colour, marker, away in zip(judged, colours, "soD", (-26, 16, 16)):
    x, y = (_column(measured, row.model, f) for f in ("above_floor", "gold"))
    right.plot(x, y, marker, color=colour, markersize=8, alpha=0.8)
    place, style = (row.above_floor, row.gold.mean), {"color": colour}
    style |= {"ha": "center", "fontsize": 10}
    drawing.name_at(right, row.model, place, (0, away), **style)
  right.set_xscale("log")
  right.margins(0.15, 0.25)
  drawing.say(
    right,
    "Is the better language model the better writer?",
    "held-out loss above the language's entropy, nats per token",
    "mean gold reward of responses",
  )
  return figure
