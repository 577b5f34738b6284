"""The models of `small_beats_large` on held-out prompts and texts."""

import pathlib
import textwrap
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from rich import console as rich_console

from rlhf_jax import types
from rlhf_jax.measures import evaluation, retention
from rlhf_jax.settings import roles
from rlhf_jax.steps import evaluate as evaluate_lib
from rlhf_jax.storage import pretrained as pretrained_lib
from rlhf_jax.studies import toy_runs
from rlhf_jax.text import tokenizer as tokenizer_lib
from rlhf_jax.text import toy_language

SMALL, RLHF, LARGE = "small", "small, RLHF", "large"
_TEXT_WIDTH = 80  # columns of a sample


class Measured(NamedTuple):
  """A model of one seed, on held-out prompts and texts.

  Attributes:
    nll: Of held-out texts, nats per token.
    above_floor: What of it the language itself does not have.
    gold: The mean of its responses.
    errors: Ungrammatical pairs a response.
    kl: To the small language model, nats per response; of the large model 0,
      as it is compared with itself.
    wins: Share of prompts where its gold is above the large model's; a tie
      counts half.
    wins_low: The end of its 95 % interval over prompts, as `wins_high`.
    wins_by_score: The same share by the seed's reward model.
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


class Models:
  """The models that all seeds share; each seed's policy is compared to them.

  Args:
    config: The study's.
    begun: The small language model and the reward model.
    large: The large model's workdir.
  """

  def __init__(
    self, config: ConfigDict, begun: toy_runs.Start, large: pathlib.Path
  ):
    fields = {"evaluate.prompts": config.prompts}
    self._config = toy_runs.varied(
      toy_runs.from_start(config.training, begun), fields
    )
    self._small = pretrained_lib.load(str(begun.policy), self._config)
    self._large = pretrained_lib.load(str(large), self._config)
    self._reward = roles.reward(self._config, self._small)

  def compare(
    self, member: toy_runs.Member, console: rich_console.Console
  ) -> tuple[list[Measured], list[tuple[str, str]]]:
    """A row a model, and what they write to the first prompt."""
    config = toy_runs.varied(self._config, {"seed": member.seed})
    models = {
      SMALL: self._small,
      RLHF: pretrained_lib.load(str(member.path), config),
      LARGE: self._large,
    }
    prompts = evaluation.heldout_prompts(
      config, self._small, console, shared=False
    )
    found = {
      # Streams of their own: responses of two models are independent.
      name: evaluation.evaluate(
        config,
        model,
        self._large if name == LARGE else self._small,
        self._reward,
        prompts,
        seed=evaluation.seed_of(member.seed, stream),
      )
      for stream, (name, model) in enumerate(models.items())
    }
    floor = _floor(config)
    rows = [
      _row(
        member.seed,
        name,
        count(models[name].params),
        retention.losses(config, models[name], models[name], console),
        floor,
        found[name],
        found[LARGE],
        toy_language.of(config),
      )
      for name in models
    ]
    return rows, _first_texts(self._small, found)


def _row(seed, name, parameters, losses, floor, mine, large, language):
  nll = losses[f"retention/{retention.BUILT_IN}/nll"]
  gold = evaluation.worth(mine)
  wins = evaluation.win_rate(gold, evaluation.worth(large))
  by_score = evaluation.win_rate(mine.score, large.score)
  sequences = jax.tree.map(jnp.asarray, mine.rollout.sequences)
  faults = language.ungrammatical_pairs(sequences)
  return Measured(
    seed=seed,
    model=name,
    parameters=parameters,
    nll=nll,
    above_floor=nll - floor,
    gold=float(gold.mean()),
    errors=float(faults.mean()),
    kl=float(mine.reverse_exact.mean()),
    wins=wins["win/rate"],
    wins_low=wins["win/rate_low"],
    wins_high=wins["win/rate_high"],
    wins_by_score=by_score["win/rate"],
  )


def _floor(config: ConfigDict) -> float:
  """The language's own NLL of the texts that `retention` takes, per token."""
  language = toy_language.of(config)
  texts = language.sample_texts(
    evaluation.HELD_OUT + config.seed,
    config.evaluate.prompts,
    config.data.opening,
  )
  nats = sum(language.negative_log_likelihood(*text) for text in texts)
  return nats / sum(len(response) for _, response in texts)


def _first_texts(
  model: pretrained_lib.Pretrained,
  found: dict[str, evaluate_lib.Evaluation],
) -> list[tuple[str, str]]:
  """What each model answers to the first prompt."""
  decode = lambda ids: tokenizer_lib.decode(model.tokenizer, ids.tolist())
  texts = []
  for name, of in found.items():
    sequences = of.rollout.sequences
    prompt = sequences.prompt_tokens[0]
    prompt = prompt[len(prompt) - sequences.prompt_lengths[0] :]
    response = sequences.response_tokens[0, : sequences.response_lengths[0]]
    text = f"{decode(prompt)} | {decode(response)}"
    texts.append((name, textwrap.shorten(text, _TEXT_WIDTH, placeholder=" …")))
  return texts


def count(params: types.Params) -> int:
  """How many parameters there are."""
  return sum(x.size for x in jax.tree.leaves(params))
