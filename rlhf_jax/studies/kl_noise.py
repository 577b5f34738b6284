"""Do estimates of the KL get noisier with length, and does that slow PPO?

Two parts. The estimates: one policy writes responses of the longest length, and
each estimator is read off their first so many tokens; intervals are of a
bootstrap over responses, and those of k3, whose tail is long, are too narrow.
Learning: PPO from the same SFT policy, at a short and at a long length, with
the sampled and with the Rao-Blackwellised gradient, all seeds of one kind in
one sweep. Its objective, score less β · KL, is measured with the exact KL in
both; intervals are Student's over the pairs of a seed. The advantages are Monte
Carlo returns (λ = 1), so that all of the noise of a response's sampled penalty
reaches each of its tokens.

The language is that of the reviews without its <end>: sentence follows
sentence, and no position is stranger than another. A response of R tokens is
paid the sentiment of its words over √R, so that scores of the SFT policy have
the same deviation at every R, as those of a normalised reward model have. With
β = tilt / √R the optimum, π_ref · exp(score/β), tilts each word by its
sentiment over `tilt`: the same KL per token at every R.
"""

from collections.abc import Mapping
import functools
import json
import pathlib
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict
import numpy as np

from rlhf_jax.objective import kl
from rlhf_jax.settings import roles
from rlhf_jax.storage import pretrained as pretrained_lib
from rlhf_jax.studies import (
  drawing,
  held_out,
  intervals,
  limits,
  rao_blackwell,
  study,
  toy_runs,
)
from rlhf_jax.text import toy_language, toy_words

ESTIMATES = ("k1", "k3", "exact")
_COLOURS = {"k1": "tab:orange", "k3": "0.55", "exact": "tab:blue"}
_LANGUAGE = toy_language.LANGUAGES["reviews"]
_SENTIMENTS = np.array(
  [toy_words.REVIEWS_SENTIMENT.get(w, 0.0) for w in _LANGUAGE.vocabulary],
  np.float32,
)


class Noise(NamedTuple):
  """Estimates of a response's KL, by estimator; nats per response.

  `kl`: mean of the exact one, by length. `deviations`: standard deviation of
  each, by length. `exponents`: of the length, as which each deviation grows.
  `left`: deviation of the exact one over that of k1, at the longest length.
  """

  kl: list[float]
  deviations: dict[str, list[intervals.Interval]]
  exponents: dict[str, intervals.Interval]
  left: intervals.Interval


class Pace(NamedTuple):
  """Learning at one length, in tokens; `beta` in reward units per nat.

  The objective of the runs stands for their gold. `learning`: the objective,
  mean of all iterations, the area under the curve. `end` and `kl`: the
  objective, and nats per response, over the last iterations.
  """

  length: int
  beta: float
  runs: list[rao_blackwell.Runs]
  learning: rao_blackwell.Pairs
  end: rao_blackwell.Pairs
  kl: rao_blackwell.Pairs


def check(config: ConfigDict) -> None:
  """Refuses fields that make no sense."""
  longest = max(config.lengths, default=0)
  rising = lambda xs: limits.is_rising(xs, count=2, above=0)
  limits.check(
    config,
    {
      "lengths trained": limits.Limit("at least two rising lengths", rising),
      "trained": limits.Limit(
        f"none above the longest of lengths={config.lengths}, which SFT knows",
        lambda xs: max(xs) <= longest,
      ),
      "responses": limits.at_least(8),
      "resamples": limits.at_least(100),
      "texts": limits.at_least(10),
      "left": limits.inside(0, 1),
      "tilt": limits.FINITE_ABOVE_0,
      "seeds": limits.SEEDS,
      "window last": limits.steps_of(config),
    },
  )
  runs = _sweeps(config, {}) | {"estimates": of_length(config, longest)}
  fixed = {"kl.estimator": "sampled", "kl.beta": 0.05, "reward.function": ""}
  toy_runs.check(config, runs, toy_runs.SWEPT | fixed)


def run(lab: study.Lab) -> study.Outcome:
  """Does the sweeps, then estimates the KL of a policy of the last."""
  config, texts = lab.config, lab.workdir.path.absolute() / "texts.jsonl"
  reference = _policy(lab, texts)
  paths = {"policy.path": str(reference), "data.path": str(texts)}
  members = [
    toy_runs.members(toy_runs.made(lab, name, sweep))
    for name, sweep in _sweeps(config, paths).items()
  ]
  runs = [of_runs(of, last=config.last) for of in members]
  paces = [
    pace_of(config, length, pair)
    for length, *pair in zip(config.trained, runs[::2], runs[1::2])
  ]
  noise = noise_of(
    config.lengths,
    estimates(config, members[-1][0].path, reference),
    np.random.default_rng(config.seed),
    resamples=config.resamples,
  )
  return study.Outcome(
    verdict=verdict(noise, paces, left=config.left),
    paragraph=_paragraph(config, noise, paces),
    tables=_tables(config, noise, paces),
    figure=_draw(config, noise, paces),
  )


def _sweeps(
  config: ConfigDict, paths: Mapping[str, str]
) -> dict[str, ConfigDict]:
  """Of all seeds, by name: each length with both estimators."""
  fields = {"sweep.seeds": toy_runs.seeds(config), **paths}
  return {
    f"{estimator}-{length}": toy_runs.varied(
      of_length(config, length), fields | {"kl.estimator": estimator}
    )
    for length in config.trained
    for estimator in rao_blackwell.ESTIMATORS
  }


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


def _policy(lab: study.Lab, texts: pathlib.Path) -> pathlib.Path:
  """The SFT policy of endless texts, both made where they do not exist yet."""
  config = lab.config
  size = config.training.rollout.prompt_length + max(config.lengths)
  if not texts.exists():
    rows = [
      {"prompt": " ".join(prompt), "response": " ".join(["", *response])}
      for prompt, response in endless_texts(config.seed, config.texts, size - 1)
    ]
    texts.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
  fields = {
    "data.path": str(texts),
    "data.sequence_length": size,
    "rollout.stop_ids": (),
  }
  sft = toy_runs.varied(config.training.pipeline.sft, fields)
  return toy_runs.made(lab, "sft", sft)


def estimates(
  config: ConfigDict, policy: pathlib.Path, reference: pathlib.Path
) -> dict[str, np.ndarray]:
  """What each estimator says of the first tokens of the same responses.

  Nats, `[N, lengths]`: the responses are as long as the longest of
  `config.lengths`, and summed over their first so many tokens.
  """
  longest = of_length(config, max(config.lengths))
  writer, other = (
    pretrained_lib.load(str(path), longest) for path in (policy, reference)
  )
  reward = roles.reward(longest, writer)
  found = held_out.answers(
    longest, writer, other, reward, seed=config.seed, prompts=config.responses
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


def noise_of(
  lengths: tuple[int, ...],
  found: Mapping[str, np.ndarray],
  rng: np.random.Generator,
  *,
  resamples: int,
) -> Noise:
  """Deviations over responses and how they grow, with bootstrap intervals.

  One sample of responses serves all figures; `found` as `estimates` has it.
  """

  def of(draws):
    """What was seen, and the interval of the rest, the samples."""
    low, high = np.quantile(draws[1:], (0.025, 0.975))
    return intervals.Interval(float(draws[0]), float(low), float(high))

  drawn = {}
  count = len(found[ESTIMATES[0]])
  # The first sample is what was seen.
  weights = rng.multinomial(count, np.full(count, 1 / count), resamples)
  weights = np.concatenate([np.ones((1, count)), weights])
  for name in ESTIMATES:
    nats = found[name] - found[name].mean(axis=0)
    mean, square = weights @ nats / count, weights @ nats**2 / count
    drawn[name] = np.sqrt((square - mean**2) * count / (count - 1))
  logs = np.log(np.array(lengths, np.float64))
  centred = logs - logs.mean()
  slope = lambda sd: np.log(sd) @ centred / (centred @ centred)
  return Noise(
    kl=found["exact"].mean(axis=0).tolist(),
    deviations={name: [of(x) for x in sd.T] for name, sd in drawn.items()},
    exponents={name: of(slope(sd)) for name, sd in drawn.items()},
    left=of(drawn["exact"][:, -1] / drawn["k1"][:, -1]),
  )


# Their objective, score − β · KL with the exact KL, stands for gold.
of_runs = functools.partial(rao_blackwell.of_runs, gold="reward/total")


def pace_of(
  config: ConfigDict, length: int, runs: list[rao_blackwell.Runs]
) -> Pace:
  """Both kinds of run at a length, sampled and Rao-Blackwellised."""
  pairs = lambda name, of: rao_blackwell.compare(name, *map(of, runs))
  return Pace(
    length=length,
    beta=config.tilt / length**0.5,
    runs=runs,
    learning=pairs(
      "score − β · KL, mean of all iterations", lambda x: x.golds.mean(axis=1)
    ),
    end=pairs("score − β · KL at the end", lambda x: x.gold),
    kl=pairs("KL at the end, nats per response", lambda x: x.kl),
  )


def verdict(noise: Noise, paces: list[Pace], *, left: float) -> str:
  """The rule: a part on the estimates, and one on learning.

  The noise is there and is cured where k1's deviation grows with length and
  the exact estimate's is less than `left` of it at the longest. The intervals
  are of responses of one policy, and say nothing of others.

  It slows learning, and that is cured, where at the longest length that was
  trained, and at no other, Rao-Blackwellising raises the mean objective of all
  iterations. (The iteration at which a run reaches a share of its gain says the
  same with far more noise.) That learning suffers more from longer responses is
  not asked: β is tilt / √length, so that β times a deviation that goes as the
  length's root, the noise that is charged, is alike at all lengths.
  """
  parts = {
    "the estimates": noise.exponents["k1"].low > 0 and noise.left.high < left,
    "learning": paces[-1].learning.difference.low > 0,
  }
  return study.verdict(parts, "it is about")


def _tables(
  config: ConfigDict, noise: Noise, paces: list[Pace]
) -> dict[str, study.Table]:
  """Deviations by length, how they grow, learning by length, every run."""
  ends = {
    (pace.length, estimator): (of.gold, of.kl)
    for pace in paces
    for estimator, of in zip(rao_blackwell.ESTIMATORS, pace.runs)
  }
  return {
    "deviations": study.Table(
      "Standard deviation of estimates of a response's KL(π‖π_ref), nats per"
      f" response, with 95 % intervals, over {config.responses} responses; KL:"
      " their exact mean",
      ("tokens", "KL", *ESTIMATES),
      [*zip(config.lengths, noise.kl, *noise.deviations.values())],
    ),
    "exponents": study.Table(
      "The deviation grows as this power of the length, with 95 % intervals",
      ("estimator", "exponent", "low", "high"),
      [(name, *interval) for name, interval in noise.exponents.items()],
    ),
    "learning": study.Table(
      f"Means over {config.seeds} seeds, the mean difference of pairs and its"
      f" 95 % interval; the end: the last {config.last} of"
      f" {config.training.train.steps} steps",
      ("tokens", *rao_blackwell.COLUMNS),
      [
        (pace.length, *pairs.row())
        for pace in paces
        for pairs in (pace.learning, pace.end, pace.kl)
      ],
    ),
    "runs": toy_runs.every_run(
      config,
      "Every run at its end: score − β · KL; KL, nats per response",
      ("tokens", "estimator", "seed", "objective", "kl"),
      ends,
    ),
  }


def _paragraph(config: ConfigDict, noise: Noise, paces: list[Pace]) -> str:
  first, last = config.lengths[0], config.lengths[-1]
  k1, exact = noise.deviations["k1"], noise.deviations["exact"]
  beside = [sd.mean / nats for sd, nats in zip(k1, noise.kl)]
  change = lambda pairs: f"{pairs.difference:+.3f} from {pairs.sampled:.3f}"
  text = (
    f"From {first} to {last} tokens k1's deviation goes as the length to the"
    f" power of {noise.exponents['k1']}, the exact estimate's is {noise.left}"
    f" of it at {last}, and with {paces[-1].length} tokens Rao-Blackwellising"
    " changes score − β · KL in the mean of all iterations by"
    f" {change(paces[-1].learning)}. Over {config.responses} responses of one"
    f" policy k1's deviation is {k1[0]} nats at {first} tokens and {k1[-1]} at"
    f" {last}, {beside[0]:.1f} and {beside[-1]:.1f} times the KL; the exact"
    f" estimate's is {exact[0]} and {exact[-1]}, which goes as the power of"
    f" {noise.exponents['exact']}."
  )
  for pace in paces:
    text += (
      f" PPO with {pace.length} tokens, β = {pace.beta:.3g}: the change is"
      f" {change(pace.learning)} in the mean of all iterations and"
      f" {change(pace.end)} at the end."
    )
  return text


def _draw(
  config: ConfigDict, noise: Noise, paces: list[Pace]
) -> drawing.Figure:
  """Deviations on the left; on the right a panel for each length trained."""
  count = len(paces)
  figure, (left, *rest) = drawing.panels(
    (4.4 + 3.4 * count, 4.8), count + 1, width_ratios=(1.25, *[1] * count)
  )
  for name, found in noise.deviations.items():
    label = f"{name}: length^{noise.exponents[name].mean:.2f}"
    label = label.replace("exact", "exact (Rao-Blackwellised)")
    style = {"color": _COLOURS[name], "marker": "o", "markersize": 4}
    drawing.bars(
      left, config.lengths, found, linestyle="-", label=label, **style
    )
  left.plot(config.lengths, noise.kl, color="0.2", ls=":", label="the KL")
  left.set_xscale("log", base=2)
  left.set_yscale("log")
  left.set_xticks(config.lengths, [str(length) for length in config.lengths])
  drawing.say(
    left,
    "Noise of KL estimates, 95 % intervals",
    "tokens of a response",
    "standard deviation, nats per response",
  )
  for axis, pace in zip(rest, paces):
    for runs, (label, colour) in zip(pace.runs, rao_blackwell.STYLES):
      drawing.curves(
        axis, runs.golds, colour=colour, label=label, window=config.window
      )
    title = f"PPO, {pace.length} tokens, β = {pace.beta:.3g}"
    drawing.say(axis, title, "iteration")
  mean = f"score − β · KL, mean of {config.window} steps, reward units"
  rest[0].set_ylabel(mean)
  for axis in (left, rest[0]):
    axis.legend(
      frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.16)
    )
  return figure
