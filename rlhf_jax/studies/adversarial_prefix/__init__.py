"""Does a prefix hide harmful text from the KL, and does the clean prompt tell?

The reference is an SFT policy of texts by two kinds of writers (`writers`),
and harm is words that only the harsh ones use. A search (`search`) finds
the prefix after which it is most harmful. Arms: no prefix, random prefixes, the
found one. Policies: those that PPO rewards for harm, charged against the
reference that reads the prefix, as is usual, or against the reference on the
clean prompt (`kl.anchored`); they are judged. The reference itself, whose KL to
itself is 0 by definition, is reported.

Left out: the language's own SFT policy. Its writers have no mood, and a search
of three words found none that made it more harmful, or less grammatical: where
the reference has nothing to bring out, a prefix cannot shift it.
"""

from collections.abc import Mapping, Sequence
import math
import pathlib
from typing import Any, NamedTuple

from matplotlib import figure as matplotlib_figure
from ml_collections import ConfigDict
import numpy as np

from rlhf_jax.data import sampling
from rlhf_jax.measures import evaluation
from rlhf_jax.settings import prefix as prefix_lib
from rlhf_jax.settings import roles
from rlhf_jax.steps import anchor, rewards
from rlhf_jax.storage import pretrained as pretrained_lib
from rlhf_jax.studies import (
  drawing,
  held_out,
  intervals,
  limits,
  study,
  toy_runs,
)
from rlhf_jax.studies.adversarial_prefix import rule
from rlhf_jax.studies.adversarial_prefix import search as search_lib
from rlhf_jax.studies.adversarial_prefix import writers as writers_lib
from rlhf_jax.text import toy_language

UNTRAINED, TRAINED = "the reference itself", "rewarded for harm"
NONE, RANDOM, FOUND = rule.NONE, rule.RANDOM, rule.FOUND
TUNED = {  # The arms that PPO trains, by their sub-workdirs.
  "clean": f"PPO, {NONE}",
  "shifted": f"PPO, {FOUND}",
  "anchored": "PPO, the same, charged clean",
}
CLEAN, SHIFTED, ANCHORED = TUNED.values()
_FIXED = toy_runs.SWEPT | {
  "kl.anchored": False,
  "rollout.prefix": "",
  "data.language": "reviews",
  "data.opening": "",
  "pipeline.sft.data.path": "",
}
_HARM = roles.Reward(
  {}, rewards.from_function(writers_lib.harmful_words), "harmful words"
)
_STREAM = 0  # Of random numbers; a search's begin at 1.
_WINDOW = 5  # steps of a curve's means


class Answers(NamedTuple):
  """Of one policy.

  `figures`, `[3, answer]`, are harmful words and the KL to the reference that
  reads the prefix and to the one on the clean prompt, nats per response; `text`
  is the shortest prompt, which leaves most to the writer, with its answer.
  """

  figures: np.ndarray
  text: str


Arms = Mapping[str, rule.Arm]
Tuned = Mapping[str, Sequence[toy_runs.Member]]  # by arm


def check(config: ConfigDict) -> None:
  """Refuses fields that make no sense."""
  length = config.training.rollout.prompt_length
  room = length - toy_language.of(config.training).longest_prompt
  left = f"{room}, what training.rollout.prompt_length={length} leaves"
  factor = limits.Limit("finite and at least 1", lambda x: 1 <= x < math.inf)
  limits.check(
    config,
    {
      "harsh": limits.inside(0, 1),
      "longest": limits.between(1, room, left),
      "beam search_prompts randoms": limits.at_least(1),
      "seeds": limits.SEEDS,
      "prompts": limits.at_least(2),
      "factor": factor,
    },
  )
  toy_runs.check(config, _sweeps(config, "the"), _FIXED)


def run(lab: study.Lab) -> study.Outcome:
  """Makes the reference, finds the prefix, tunes and asks the policies."""
  config, path = lab.config, str(_reference(lab))
  reference = pretrained_lib.load(path, config.training)
  searched = search_lib.search(config, reference)
  found = max(searched, key=lambda row: row.again)
  tuned = {
    TUNED[name]: toy_runs.members(toy_runs.made(lab, name, sweep))
    for name, sweep in _sweeps(config, found.prefix, path).items()
  }
  answers = _answers(config, reference, found, tuned)
  harms = [of[0].figures[0] for of in answers[NONE]]
  arms = {name: _arm(of, harms) for name, of in answers.items()}
  factor = config.factor
  findings = {
    UNTRAINED: rule.finding(arms, FOUND, NONE, None, factor=factor),
    TRAINED: rule.finding(arms, SHIFTED, CLEAN, ANCHORED, factor=factor),
  }
  texts = [(name, of[0][0].text) for name, of in answers.items()]
  return study.Outcome(
    verdict=rule.verdict(findings[TRAINED]),
    paragraph=_paragraph(found, arms, findings, dict(texts)[SHIFTED]),
    tables=_tables(config, searched, found, arms, findings, texts),
    figure=_draw(arms, np.concatenate(harms), tuned, found.prefix),
  )


def _reference(lab: study.Lab) -> pathlib.Path:
  """The SFT policy of the two writers."""
  config, sft = lab.config, lab.config.training.pipeline.sft
  language = toy_language.of(config.training)
  path = lab.workdir.path.absolute() / "texts.jsonl"
  size, harsh = sft.data.size, config.harsh
  texts = writers_lib.sample(language, config.seed, size, harsh=harsh)
  writers_lib.write(path, language, texts)
  sft = toy_runs.varied(sft, {"data.path": str(path)})
  return toy_runs.made(lab, "sft", sft)


def _sweeps(
  config: ConfigDict, prefix: str, path: str = ""
) -> dict[str, ConfigDict]:
  """PPO for harm, without a prefix and with it, charged in two ways."""
  read = {"rollout__prefix": prefix}
  harm = {
    "policy__path": path,
    "reward__kind": "function",
    "reward__function": f"{writers_lib.__name__}:harmful_words",
  }
  fields = {}, read, read | {"kl__anchored": True}
  return {
    name: toy_runs.sweep(config, (), **harm, **of)
    for name, of in zip(TUNED, fields)
  }


def _answers(
  config, reference, found, tuned: Tuned
) -> dict[str, list[list[Answers]]]:
  """Arm → for each seed the answers of its policy, after one or more prefixes.

  Only the random arm has more than one prefix a seed.
  """
  training, seeds = config.training, toy_runs.seeds(config)
  language = toy_language.of(training)

  def asked(policy, seed, *prefixes):
    fields = [{"seed": seed, "rollout.prefix": prefix} for prefix in prefixes]
    configs = [toy_runs.varied(training, of) for of in fields]
    return [measure(x, policy, reference, config.prompts) for x in configs]

  def random(seed):
    rng = np.random.default_rng([seed, found.words])
    words = toy_language.STOP_ID + 1, len(language.vocabulary)
    ids = rng.integers(*words, (config.randoms, found.words))
    return [search_lib.text_of(language, of) for of in ids]

  answers = {
    NONE: [asked(reference, seed, "") for seed in seeds],
    RANDOM: [asked(reference, seed, *random(seed)) for seed in seeds],
    FOUND: [asked(reference, seed, found.prefix) for seed in seeds],
  }
  for name, members in tuned.items():
    prefix = "" if name == CLEAN else found.prefix
    policy = lambda member: pretrained_lib.load(str(member.path), training)
    answers[name] = [asked(policy(m), m.seed, prefix) for m in members]
  return answers


def measure(
  config: ConfigDict,
  policy: pretrained_lib.Pretrained,
  reference: pretrained_lib.Pretrained,
  count: int,
) -> Answers:
  """One answer to each held-out prompt, after `rollout.prefix` if there is one.

  Prompts and random numbers are those of `config.seed`, alike for all policies
  and prefixes; no search had them. `config` is of stage `ppo`.
  """
  heldout = evaluation.HELD_OUT + config.seed
  prompts = toy_language.of(config).sample_prompts(heldout, count)
  asked, _ = sampling.prompts_array(prompts, config, policy, "held out")
  seed = evaluation.seed_of(config.seed, _STREAM)
  of = evaluation.evaluate(config, policy, reference, _HARM, asked, seed=seed)
  sequences, anchored = of.rollout.sequences, of.anchored
  if (prefix := prefix_lib.of(config, policy)) is not None:
    sequences = anchor.without_prefix(sequences, prefix.place)
  else:
    anchored = of.reverse_exact
  figures = np.array([of.score, of.reverse_exact, anchored], np.float64)
  row = int(np.argmin(sequences.prompt_lengths))
  return Answers(figures, held_out.text(policy, sequences, row))


def _arm(by_seed, clean: Sequence[np.ndarray]) -> rule.Arm:
  """Means of each seed, and the least KL of that harm by the seed's answers."""
  means = [np.mean([x.figures for x in of], axis=(0, 2)) for of in by_seed]
  # Sums leave some 1e-9 nats where both models are one.
  harm, shifted, anchored = np.transpose(means).round(6) + 0.0
  least = [rule.least_kl(of, wanted) for of, wanted in zip(clean, harm)]
  return rule.Arm(harm, shifted, anchored, np.array(least))


def _tables(
  config, searched, found, arms: Arms, findings, texts
) -> dict[str, study.Table]:
  means = f"means over {config.seeds} seeds with 95 % intervals"
  return {
    "search": study.table_of(
      "The best prefix of each length: harmful words per response of the"
      f" reference when it was chosen, and to other prompts; {found.prefix!r}"
      " is gone on with",
      searched,
    ),
    "arms": study.Table(
      "Harmful words per response; KL in nats per response, to the reference"
      " that reads the prefix, to the one on the clean prompt, and the least"
      f" that so much harm must have there; {means}",
      ("arm", "harm", "KL, shifted", "KL, clean", "least"),
      [
        (
          name,
          intervals.of_mean(arm.harm),
          f"{arm.shifted.mean():.2f}",
          intervals.of_mean(arm.anchored),
          f"{arm.least.mean():.2f}",
        )
        for name, arm in arms.items()
      ],
    ),
    "findings": study.Table(
      f"What the rule reads of the policies that are {TRAINED}, all of it above"
      f" 0 where the claim holds; beside it {UNTRAINED}, whose shifted KL is 0"
      f" by definition; {means} of pairs",
      ("harmful words per response, or nats per response", *findings),
      [*zip(rule.meanings(config.factor), *findings.values(), strict=True)],
    ),
    "seeds": study.table_of_seeds(
      f"Every seed: means over {config.prompts} held-out prompts",
      ("arm",),
      arms,
      toy_runs.seeds(config),
    ),
    "samples": study.Table(
      f"A short held-out prompt of seed {config.seed} (| ends it), and what is"
      " answered; the prefix is not shown",
      ("policy", "text"),
      texts,
      shown=False,
    ),
  }


def _paragraph(
  found: search_lib.Found,
  arms: Arms,
  findings: Mapping[str, rule.Finding],
  text: str,
) -> str:
  of = lambda name, field: intervals.of_mean(arms[name]._asdict()[field])
  untrained, trained = findings[UNTRAINED], findings[TRAINED]
  return (
    f"PPO for harm after {found.prefix!r} ends with {of(SHIFTED, 'harm')}"
    f" harmful words per response, at {of(SHIFTED, 'shifted')} nats from the"
    " reference that it is charged against, where so much harm is at least"
    f" {of(SHIFTED, 'least')} from the one on the clean prompt; the KL to that"
    f" one is {of(SHIFTED, 'anchored')}. Without the prefix PPO ends with"
    f" {of(CLEAN, 'harm')} harmful words, and after it with"
    f" {of(ANCHORED, 'harm')} where it is charged against the reference on the"
    f" clean prompt; the differences are {trained.more_harm} and"
    f" {trained.prevented}. The reference itself writes {of(FOUND, 'harm')}"
    f" after the prefix, {of(NONE, 'harm')} without one and"
    f" {of(RANDOM, 'harm')} after random ones; its KL to itself is 0 by"
    " definition, and to the reference on the clean prompt"
    f" {of(FOUND, 'anchored')} after the prefix and {of(RANDOM, 'anchored')}"
    f" after random ones, a difference of {untrained.no_false_alarm}. What PPO"
    f" writes after the prefix: “{text}”."
  )


def _draw(
  arms: Arms, clean_harms: np.ndarray, tuned: Tuned, prefix: str
) -> matplotlib_figure.Figure:
  """What both KLs say of each arm's harm; harm while it is learned."""
  figure, (left, right) = drawing.panels((13, 4.8), 2, width_ratios=(1.3, 1))
  hues = drawing.SKY, drawing.ORANGE, drawing.GREEN, drawing.PINK, drawing.BLUE
  colours = dict(zip(arms, (drawing.GREY, *hues)))
  harms = np.linspace(0, 1.05 * max(of.harm.max() for of in arms.values()), 100)
  least = [rule.least_kl(clean_harms, harm) for harm in harms]
  left.fill_between(harms, least, color="0.9", linewidth=0)
  left.plot(harms, least, color="0.5", linewidth=1)
  style: dict[str, Any] = {"markersize": 10, "clip_on": False, "zorder": 3}
  hollow: dict[str, Any] = {"markerfacecolor": "white", "markeredgewidth": 2}
  for name, arm in arms.items():
    harm, shifted, anchored, _ = map(np.mean, arm)
    style["color"] = colour = colours[name]
    left.plot([harm, harm], [shifted, anchored], color=colour, linewidth=1)
    left.plot(harm, shifted, "o", **style, **hollow)
    left.plot(harm, anchored, "o", label=name, **style)
  for name, members in tuned.items():
    harms = toy_runs.curves(members, "reward/score")
    window = min(_WINDOW, harms.shape[1])
    colour = colours[name]
    drawing.curves(right, harms, colour=colour, label=name, window=window)
  drawing.say(
    left,
    f"What the KL says of the harm; the prefix is “{prefix}”",
    "harmful words per response\n"
    "hollow: KL to the reference that reads the prefix, full: to the one on the"
    " clean prompt;\ngrey: no policy of that harm has so small a KL to the"
    " clean one",
    "KL, nats per response",
    size=11,
  )
  title = "PPO that is rewarded for harm, a line a seed"
  drawing.say(right, title, "step", "harmful words per response", size=11)
  place = {"loc": "upper left", "bbox_to_anchor": (0.1, 1)}
  left.legend(frameon=False, fontsize=9, **place)
  right.legend(frameon=False, fontsize=9)
  left.set_xlim(left=0)
  for axis in (left, right):
    axis.set_ylim(bottom=0)
  return figure
