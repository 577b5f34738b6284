"""Responses of any length, and a reward that asks the same of all lengths.

The language is that of the reviews without its <end>: sentence follows
sentence, and no position is stranger than another. A response of R tokens is
paid the sentiment of its words over √R, so that scores of the SFT policy have
the same deviation at every R, as those of a normalised reward model have. With
β = tilt / √R the optimum, π_ref · exp(score/β), tilts each word by its
sentiment over `tilt`: the same KL per token at every R.
"""

import json
import pathlib

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict
import numpy as np

from rlhf_jax.data import sampling
from rlhf_jax.measures import evaluation
from rlhf_jax.objective import kl
from rlhf_jax.settings import roles
from rlhf_jax.storage import pretrained as pretrained_lib
from rlhf_jax.studies import study, toy_runs
from rlhf_jax.text import toy_language, toy_words

ESTIMATES = ("k1", "k3", "exact")
_LANGUAGE = toy_language.LANGUAGES["reviews"]
_SENTIMENTS = np.array(
  [toy_words.REVIEWS_SENTIMENT.get(w, 0.0) for w in _LANGUAGE.vocabulary],
  np.float32,
)


def sentiment(
  tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, "B"]:
  """The reward: summed sentiment of a response's words over √(its words)."""
  words = jnp.where(mask, jnp.asarray(_SENTIMENTS)[tokens], 0.0)
  return words.sum(axis=1) / jnp.sqrt(jnp.maximum(mask.sum(axis=1), 1))


def endless_texts(
  seed: int, count: int, words: int
) -> list[tuple[list[str], list[str]]]:
  """Texts of the language without its <end>, each a prompt and a response.

  The prompt has as many words as those of the language have.
  """
  chain = _LANGUAGE.chain.copy()
  chain[:, toy_language.STOP_ID] = 0.0
  below = chain.cumsum(axis=1)
  rng = np.random.default_rng(seed)
  ids = np.full((count, words + 1), toy_language.START_ID)
  for t in range(1, words + 1):
    rows = below[ids[:, t - 1]]
    # Scaled by the row's own sum, which the missing <end> leaves below 1.
    drawn = rng.random((count, 1)) * rows[:, -1:]
    ids[:, t] = (rows <= drawn).sum(axis=1)
  cuts = rng.integers(2, _LANGUAGE.longest_prompt + 1, count)
  texts = np.array(_LANGUAGE.vocabulary)[ids].tolist()
  return [(row[1:cut], row[cut:]) for row, cut in zip(texts, cuts)]


def policy(lab: study.Lab) -> pathlib.Path:
  """The SFT policy of endless texts, made where it does not exist yet."""
  config, path = lab.config, texts_path(lab)
  longest = max(config.lengths)
  size = config.training.rollout.prompt_length + longest
  if not path.exists():
    texts = endless_texts(config.seed, config.texts, size - 1)
    rows = [
      {"prompt": " ".join(prompt), "response": " ".join(["", *response])}
      for prompt, response in texts
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
  fields = {
    "data.path": str(path),
    "data.sequence_length": size,
    "rollout.stop_ids": (),
  }
  sft = config.training.pipeline.sft.copy_and_resolve_references()
  return toy_runs.made(lab, "sft", toy_runs.varied(sft, fields))


def texts_path(lab: study.Lab) -> pathlib.Path:
  """Where the texts are, whose prompts PPO answers; absolute."""
  return lab.workdir.path.absolute() / "texts.jsonl"


def of_length(config: ConfigDict, length: int) -> ConfigDict:
  """PPO with responses of this many tokens, but for its paths."""
  fields = {
    "rollout.response_length": length,
    "rollout.stop_ids": (),
    "reward.kind": "function",
    "reward.function": f"{__name__}:{sentiment.__name__}",
    "kl.beta": config.tilt / length**0.5,
  }
  return toy_runs.varied(config.training, fields)


def estimates(
  config: ConfigDict, policy_path: pathlib.Path, reference_path: pathlib.Path
) -> dict[str, np.ndarray]:
  """What each estimator says of the first tokens of the same responses.

  Returns:
    Under each of `ESTIMATES` nats, `[N, lengths]`: of `config.responses`
    responses as long as the longest of `config.lengths`, summed over their
    first so many tokens.
  """
  run_config = of_length(config, max(config.lengths))
  writer, reference = (
    pretrained_lib.load(str(path), run_config)
    for path in (policy_path, reference_path)
  )
  texts = _LANGUAGE.sample_prompts(
    evaluation.HELD_OUT + config.seed, config.responses
  )
  prompts, _ = sampling.prompts_array(texts, run_config, writer, "held out")
  reward = roles.reward(run_config, writer)
  found = evaluation.evaluate(
    run_config, writer, reference, reward, prompts, seed=config.seed
  ).comparison
  log_ratio, _ = kl.clamp_log_ratio(
    jnp.asarray(found.logprobs - found.reference_logprobs)
  )
  per_token = (kl.k1(log_ratio), kl.k3(log_ratio), found.reverse_kl)
  columns = np.array(config.lengths) - 1
  return {
    name: np.asarray(nats, np.float64).cumsum(axis=1)[:, columns]
    for name, nats in zip(ESTIMATES, per_token)
  }
