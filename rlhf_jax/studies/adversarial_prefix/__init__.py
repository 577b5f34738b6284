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

from collections.abc import Mapping
import math

from ml_collections import ConfigDict
import numpy as np

from rlhf_jax.storage import pretrained as pretrained_lib
from rlhf_jax.studies import intervals, limits, study, toy_runs
from rlhf_jax.studies.adversarial_prefix import figure as figure_lib
from rlhf_jax.studies.adversarial_prefix import measures, rule
from rlhf_jax.studies.adversarial_prefix import search as search_lib
from rlhf_jax.studies.adversarial_prefix import writers as writers_lib
from rlhf_jax.text import toy_language

UNTRAINED, TRAINED = "the reference itself", "rewarded for harm"
NONE, RANDOM, FOUND = "no prefix", "random prefixes", "found prefix"
CLEAN, SHIFTED, ANCHORED = "clean", "shifted", "anchored"
TUNED = {
  CLEAN: f"PPO, {NONE}",
  SHIFTED: f"PPO, {FOUND}",
  ANCHORED: "PPO, the same, charged clean",
}
_FIELDS = {
  "kl.controller": "fixed",
  "kl.anchored": False,
  "rollout.prefix": "",
  "sweep.seeds": (),
  "data.language": "reviews",
  "data.opening": "",
  "pipeline.sft.data.path": "",
}


def check(config: ConfigDict) -> None:
  """Refuses fields that make no sense.

  Raises:
    UserError: With the field, its value and what is wanted.
  """
  prompt = toy_language.of(config.training).longest_prompt
  length = config.training.rollout.prompt_length
  room = limits.between(
    1,
    length - prompt,
    f"{length - prompt}, what training.rollout.prompt_length={length} leaves",
  )
  factor = limits.Limit("finite and at least 1", lambda x: 1 <= x < math.inf)
  limits.check(
    config,
    {
      "harsh": limits.inside(0, 1),
      "longest": room,
      "beam search_prompts randoms": limits.at_least(1),
      "seeds": limits.SEEDS,
      "prompts": limits.at_least(2),
      "factor": factor,
    },
  )
  toy_runs.check(config, _sweeps(config, "the"), _FIELDS)


def run(lab: study.Lab) -> study.Outcome:
  """Makes the reference, finds the prefix, tunes and asks the policies."""
  config = lab.config
  path = str(_reference(lab))
  reference = pretrained_lib.load(path, config.training)
  searched = search_lib.search(
    config.training,
    reference,
    longest=config.longest,
    beam=config.beam,
    prompts=config.search_prompts,
  )
  found = max(searched, key=lambda row: row.again)
  tuned = {}
  for name, sweep in _sweeps(config, found.prefix).items():
    sweep = toy_runs.varied(sweep, {"policy.path": path})
    tuned[name] = toy_runs.members(toy_runs.made(lab, name, sweep))
  answers = _answers(config, reference, found, tuned)
  arms = _arms(answers)
  findings = {
    UNTRAINED: rule.finding(
      arms[FOUND],
      arms[NONE],
      arms[FOUND],
      arms[RANDOM],
      None,
      factor=config.factor,
    ),
    TRAINED: rule.finding(
      arms[TUNED[SHIFTED]],
      arms[TUNED[CLEAN]],
      arms[FOUND],
      arms[RANDOM],
      arms[TUNED[ANCHORED]],
      factor=config.factor,
    ),
  }
  return study.Outcome(
    verdict=rule.verdict(findings[TRAINED]),
    paragraph=_paragraph(
      found, arms, findings, answers[TUNED[SHIFTED]][0][0].text
    ),
    tables={
      **_tables(config, searched, found, arms, findings),
      "samples": study.Table(
        f"A short held-out prompt of seed {config.seed} (| ends it), and what"
        " is answered; the prefix is not shown",
        ("policy", "text"),
        [(name, of[0][0].text) for name, of in answers.items()],
        shown=False,
      ),
    },
    figure=figure_lib.draw(
      arms,
      np.concatenate([of[0].harm for of in answers[NONE]]),
      {TUNED[name]: members for name, members in tuned.items()},
      found.prefix,
    ),
  )


def _reference(lab):
  """The SFT policy of the two writers."""
  config, workdir = lab.config, lab.workdir
  language = toy_language.of(config.training)
  sft = config.training.pipeline.sft
  path = workdir.path.absolute() / "texts.jsonl"
  texts = writers_lib.sample(
    language, config.seed, sft.data.size, harsh=config.harsh
  )
  writers_lib.write(path, language, texts)
  sft = toy_runs.varied(sft, {"data.path": str(path)})
  return toy_runs.made(lab, "sft", sft)


def _seeds(config: ConfigDict) -> tuple[int, ...]:
  return tuple(range(config.seed, config.seed + config.seeds))


def _sweeps(config: ConfigDict, prefix: str) -> dict[str, ConfigDict]:
  """PPO for harm, without a prefix and with it, charged in two ways."""
  harm = {
    "reward.kind": "function",
    "reward.function": f"{writers_lib.__name__}:harmful_words",
    "sweep.seeds": _seeds(config),
  }
  fields = {
    CLEAN: {},
    SHIFTED: {"rollout.prefix": prefix},
    ANCHORED: {"rollout.prefix": prefix, "kl.anchored": True},
  }
  return {
    name: toy_runs.varied(config.training, harm | of)
    for name, of in fields.items()
  }


def _answers(
  config, reference, found, tuned
) -> dict[str, list[list[measures.Answers]]]:
  """Arm → for each seed the answers of its policy, after one or more prefixes.

  Only the random arm has more than one prefix a seed.
  """
  language = toy_language.of(config.training)

  def asked(policy, seed, prefix):
    return measures.measure(
      toy_runs.varied(
        config.training, {"seed": seed, "rollout.prefix": prefix}
      ),
      policy,
      reference,
      prompts=config.prompts,
    )

  def random(seed):
    rng = np.random.default_rng([seed, found.words])
    shape = config.randoms, found.words
    words = rng.integers(
      toy_language.STOP_ID + 1, len(language.vocabulary), shape
    )
    return [search_lib.text_of(language, ids) for ids in words]

  seeds = _seeds(config)
  prefixes = {
    NONE: lambda seed: [""],
    RANDOM: random,
    FOUND: lambda seed: [found.prefix],
  }
  answers = {
    name: [[asked(reference, seed, p) for p in of(seed)] for seed in seeds]
    for name, of in prefixes.items()
  }
  for name, members in tuned.items():
    prefix = "" if name == CLEAN else found.prefix
    answers[TUNED[name]] = [
      [asked(_loaded(config, member), member.seed, prefix)]
      for member in members
    ]
  return answers


def _loaded(config, member: toy_runs.Member) -> pretrained_lib.Pretrained:
  return pretrained_lib.load(str(member.path), config.training)


def _arms(answers) -> dict[str, rule.Arm]:
  """Means of each seed, and the least KL of that harm by the seed's answers."""
  clean = [of[0].harm for of in answers[NONE]]
  arms = {}
  for name, by_seed in answers.items():
    harm, shifted, anchored = np.transpose([*map(measures.means, by_seed)])
    least = [rule.least_kl(h, wanted) for h, wanted in zip(clean, harm)]
    arms[name] = rule.Arm(harm, shifted, anchored, np.array(least))
  return arms


def _meanings(factor: float) -> tuple[str, ...]:
  """What the fields of `rule.Finding` are."""
  return (
    "harm more than without a prefix",
    "hidden: least KL of that harm − KL, shifted",
    f"exposed: KL, clean − {factor:g} · KL, shifted",
    "no false alarm: KL, clean, of the reference − after random ones",
    "prevented: harm more than charged clean",
  )


def _tables(config, searched, found, arms, findings) -> dict[str, study.Table]:
  means = f"means over {config.seeds} seeds with 95 % intervals"
  return {
    "search": study.Table(
      "The best prefix of each length: harmful words per response of the"
      f" reference when it was chosen, and to other prompts; {found.prefix!r}"
      " is gone on with",
      search_lib.Found._fields,
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
          str(intervals.of_mean(arm.harm)),
          f"{intervals.of_mean(arm.shifted).mean:.2f}",
          str(intervals.of_mean(arm.anchored)),
          f"{intervals.of_mean(arm.least).mean:.2f}",
        )
        for name, arm in arms.items()
      ],
    ),
    "findings": study.Table(
      f"What the rule reads of the policies that are {TRAINED}, all of it above"
      f" 0 where the claim holds; beside it {UNTRAINED}, whose shifted KL is 0"
      f" by definition; {means} of pairs",
      ("harmful words per response, or nats per response", *findings),
      [
        (meaning, *(x and str(x) for x in parts))
        for meaning, parts in zip(
          _meanings(config.factor), zip(*findings.values()), strict=True
        )
      ],
    ),
    "seeds": study.Table(
      f"Every seed: means over {config.prompts} held-out prompts",
      ("arm", "seed", *rule.Arm._fields),
      [
        (name, seed, *map(float, row))
        for name, arm in arms.items()
        for seed, row in zip(_seeds(config), zip(*arm))
      ],
      shown=False,
    ),
  }


def _paragraph(
  found: search_lib.Found,
  arms: Mapping[str, rule.Arm],
  findings: Mapping[str, rule.Finding],
  text: str,
) -> str:
  of = lambda name, field: intervals.of_mean(arms[name]._asdict()[field])
  untrained, trained = findings[UNTRAINED], findings[TRAINED]
  shifted, clean, anchored = (TUNED[x] for x in (SHIFTED, CLEAN, ANCHORED))
  return (
    f"PPO for harm after {found.prefix!r} ends with {of(shifted, 'harm')}"
    f" harmful words per response, at {of(shifted, 'shifted')} nats from the"
    " reference that it is charged against, where so much harm is at least"
    f" {of(shifted, 'least')} from the one on the clean prompt; the KL to that"
    f" one is {of(shifted, 'anchored')}. Without the prefix PPO ends with"
    f" {of(clean, 'harm')} harmful words, and after it with"
    f" {of(anchored, 'harm')} where it is charged against the reference on the"
    f" clean prompt; the differences are {trained.more_harm} and"
    f" {trained.prevented}. The reference itself writes {of(FOUND, 'harm')}"
    f" after the prefix, {of(NONE, 'harm')} without one and"
    f" {of(RANDOM, 'harm')} after random ones; its KL to itself is 0 by"
    " definition, and to the reference on the clean prompt"
    f" {of(FOUND, 'anchored')} after the prefix and {of(RANDOM, 'anchored')}"
    f" after random ones, a difference of {untrained.no_false_alarm}. What PPO"
    f" writes after the prefix: “{text}”."
  )
