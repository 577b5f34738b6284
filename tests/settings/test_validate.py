"""Every rule refuses what it should, and no preset."""

import math
import types

import pytest

from configs import dpo, ppo, quickstart, reward_model, sft
from rlhf_jax import errors
from rlhf_jax.objective import kl
from rlhf_jax.settings import rules, validate

PRESETS = [
  (sft, "toy", 8),
  (sft, "stories", 8),
  (reward_model, "toy", 8),
  (reward_model, "hh", 8),
  (ppo, "toy", 8),
  (ppo, "stories", 8),
  (ppo, "1b", 8),
  (ppo, "8b", 64),
  (dpo, "toy", 8),
  (dpo, "hh", 8),
  (quickstart, "toy", 1),
]

# Overrides of the toy PPO config, and what the message must say in order.
BAD_FIELDS = [
  # Bad inputs 1: a word for one of a few things.
  ("stage=pppo", "config.stage: 'pppo'; wanted", "Did you mean 'ppo'?"),
  ("stage=rloo", "config.stage: 'rloo'; wanted 'pipeline' or 'sft'"),
  ("dpo.loss=sipo", "config.dpo.loss: 'sipo'; wanted 'dpo' or 'conservative'"),
  ("dpo.label_smoothing=0.5", "label_smoothing: 0.5; wanted in [0, 0.5)"),
  ("dpo.label_smoothing=0.1", "above 0, with dpo.loss='conserv", "here 'dpo'"),
  ("dpo.loss=robust", "dpo.label_smoothing: 0.0; wanted the share of labels"),
  ("dpo.margin=-1", "config.dpo.margin: -1.0; wanted finite and at least 0"),
  ("dpo.undesirable_weight=0", "undesirable_weight: 0.0; wanted", "above 0"),
  ("stage=dpo,kl.beta=0", "config.kl.beta: 0.0; wanted above 0 in stage 'dpo'"),
  (
    "stage=dpo,dpo.loss=simpo,kl.beta=0",
    "config.kl.beta: 0.0; wanted above 0 in stage 'dpo'",
  ),
  (
    "stage=dpo,kl.controller=trust",
    "config.kl.controller: 'trust'; wanted 'fixed' in stage 'dpo'",
  ),
  ("model.norm=rsm", "config.model.norm: 'rsm'", "Did you mean 'rms'?"),
  ("model.positions=alibi", "wanted 'rope' or 'learned'"),
  ("model.activation=elu", "wanted 'swiglu' or 'geglu'"),
  ("model.compute_dtype=float16", "Did you mean 'bfloat16'?"),
  ("reference.kind=ema", "config.reference.kind: 'ema'; wanted 'frozen'"),
  ("reward.kind=pyton", "Did you mean 'python'?"),
  (
    "kl.gradient=sequence_revers",
    "config.kl.gradient: 'sequence_revers'; wanted 'sequence_reverse' or",
    "Did you mean 'sequence_reverse'?",
    "kl.allow_biased: k1_in_loss, k2_in_loss",
  ),
  ("kl.gradient=k3_in_los", "Did you mean 'k3_in_loss'?"),
  ("kl.gradient=", "config.kl.gradient: ''; wanted 'sequence_reverse' or"),
  ("kl.estimator=k3", "config.kl.estimator: 'k3'; wanted 'sampled' or"),
  ("kl.controller=zigler", "'zigler'", "Did you mean 'ziegler'?"),
  ("kl.schedule.shape=cosin", "shape: 'cosin'", "Did you mean 'cosine'?"),
  ("ppo.advantages=reinforce", "wanted 'gae' or", "mean 'reinforce_pp'?"),
  ("optimizer.schedule=cosin", "Did you mean 'cosine'?"),
  (
    "data.language=essay",
    "config.data.language: 'essay'; wanted 'reviews' or 'notes' or 'essays'",
    "Did you mean 'essays'?",
  ),
  ("data.opening=persons", "config.data.opening: 'persons'; wanted '' or"),
  # 3, 4: numbers.
  ("optimizer.learning_rate=nan", "learning_rate: nan; wanted finite and"),
  ("optimizer.learning_rate=inf", "learning_rate: inf; wanted finite and"),
  ("optimizer.learning_rate=0", "learning_rate: 0.0; wanted", "above 0"),
  ("optimizer.b2=1", "config.optimizer.b2: 1.0; wanted in [0, 1)"),
  ("optimizer.weight_decay=-1", "weight_decay: -1.0; wanted finite and at"),
  ("optimizer.max_grad_norm=0", "max_grad_norm: 0.0"),
  ("data.judge_temperature=0", "judge_temperature: 0.0; wanted finite and abo"),
  ("data.judge_temperature=inf", "config.data.judge_temperature: inf; wanted"),
  ("data.judge_temperature=nan", "config.data.judge_temperature: nan; wanted"),
  ("optimizer.warmup_steps=200", "warmup_steps: 200", "train.steps=200"),
  ("train.batch_size=0", "config.train.batch_size: 0; wanted at least 1"),
  ("train.steps=-5", "config.train.steps: -5; wanted at least 1"),
  ("rollout.response_length=0", "response_length: 0; wanted at least 1"),
  ("rollout.prompt_length=-1", "prompt_length: -1; wanted at least 1"),
  ("data.sequence_length=1", "sequence_length: 1; wanted at least 2"),
  ("data.heldout_fraction=1", "heldout_fraction: 1.0; wanted in (0, 1)"),
  ("checkpoint.every=0", "checkpoint.every: 0; wanted at least 1"),
  ("model.layers=0", "config.model.layers: 0; wanted at least 1"),
  ("mesh.data=0", "config.mesh.data: 0; wanted -1 (the rest) or at least 1"),
  # 5: what must divide what.
  ("train.batch_size=63", "batch_size: 63", "ppo.minibatches=2"),
  ("ppo.microbatches=3", "ppo.microbatches: 3", "train.batch_size=64 /"),
  ("ppo.microbatches=64", "ppo.microbatches: 64", "a minibatch's rows"),
  ("ppo.group_size=0", "config.ppo.group_size: 0; wanted at least 1"),
  ("ppo.group_size=3", "group_size: 3; wanted a divisor", "batch_size=64"),
  ("ppo.advantages=rloo", "config.ppo.group_size: 1; wanted at least 2", "rlo"),
  ("ppo.advantages=grpo", "config.ppo.group_size: 1; wanted at least 2", "grp"),
  ("pipeline.sft.ppo.group_size=-1", "config.pipeline.sft.ppo.group_size: -1"),
  # 7, 8: the penalty and PPO.
  ("kl.beta=-0.1", "config.kl.beta: -0.1; wanted finite and at least 0"),
  ("kl.beta=nan", "config.kl.beta: nan"),
  ("kl.beta=inf", "config.kl.beta: inf"),
  (
    "kl.target=6",
    "config.kl.target: 6.0; wanted 0 with kl.controller='fixed'",
    "a second controller; ziegler, pi and dual have one",
  ),
  ("kl.controller=schedule,kl.target=6", "kl.target: 6.0; wanted 0", "second"),
  ("kl.controller=trust,kl.target=6", "kl.target: 6.0; wanted 0", "second"),
  (
    "kl.controller=pi,kl.target=5,kl.schedule.steps=50",
    "config.kl.schedule.steps: 50; wanted 0 with kl.controller='pi'",
    "a second controller",
  ),
  (
    "ppo.length_normalisation=true",
    "config.ppo.length_normalisation: True; wanted False",
    "no penalty has the gradient of its target",
    "kl.allow_biased=True",
  ),
  (
    "kl.controller=ziegler,pi",
    "config.kl.controller: 'ziegler,pi'; wanted 'fixed' or 'schedule' or",
  ),
  ("kl.controller=ziegler", "config.kl.target: 0.0; wanted the KL", "above 0"),
  ("kl.controller=pi", "config.kl.target: 0.0; wanted the KL", "above 0"),
  ("kl.controller=dual", "config.kl.target: 0.0; wanted the KL", "above 0"),
  ("kl.controller=pi,kl.target=-2", "config.kl.target: -2.0; wanted finite"),
  ("kl.controller=pi,kl.target=inf", "config.kl.target: inf; wanted finite"),
  ("kl.controller=pi,kl.target=1e-9", "kl.target: 1e-09; wanted the KL"),
  (
    "kl.target_unit=",
    "config.kl.target_unit: ''; wanted 'nats per response'",
    "write n times the response's tokens",
  ),
  ("kl.target_unit=nats per token", "'nats per token'; wanted 'nats per re"),
  ("kl.beta_min=10", "config.kl.beta_min: 10.0; wanted less than", "max=10.0"),
  ("kl.beta_min=11", "config.kl.beta_min: 11.0; wanted less than", "max=10.0"),
  ("kl.beta_min=0", "config.kl.beta_min: 0.0; wanted from 1e-09 to 1e+09"),
  (
    "kl.controller=ziegler,kl.target=6,kl.beta=1e-5",
    "config.kl.beta: 1e-05; wanted every β",
    "kl.beta_min=0.0001: ziegler multiplies it",
  ),
  (
    "kl.controller=pi,kl.target=6,sweep.betas=0,0.1",
    "config.kl.beta: 0.05; wanted every β (sweep.betas=(0, 0.1)) at least",
    "kl.beta_min=0.0001: pi multiplies it",
  ),
  ("kl.controller=pi,kl.target=6,kl.beta=11", "kl.beta: 11.0", "max=10.0"),
  ("kl.controller=dual,kl.target=6,kl.beta=11", "kl.beta: 11.0", "max=10.0"),
  (
    "kl.controller=dual,kl.target=6,sweep.betas=0.1,11",
    "wanted every β (sweep.betas=(0.1, 11)) at most kl.beta_max=10.0",
  ),
  (
    "kl.controller=trust,kl.beta=0.01",
    "config.kl.beta: 0.01; wanted every β",
    "above kl.trust.beta_min=0.01, to which trust relaxes it",
  ),
  ("kl.controller=trust,sweep.betas=0,1", "(sweep.betas=(0, 1)) above kl.tr"),
  ("kl.trust.reliability_wanted=0.5", "reliability_wanted: 0.5; wanted from"),
  ("kl.trust.decay=1", "config.kl.trust.decay: 1.0; wanted from 0 to 0.9999"),
  ("kl.ziegler.horizon=0", "config.kl.ziegler.horizon: 0.0; wanted from 1 to"),
  ("kl.pi.proportional=-1", "config.kl.pi.proportional: -1.0; wanted from 0"),
  ("kl.pi.integral=0", "config.kl.pi.integral: 0.0; wanted from 1e-06 to 10"),
  ("kl.dual.learning_rate=0", "config.kl.dual.learning_rate: 0.0; wanted"),
  ("kl.schedule.end=1.5", "config.kl.schedule.end: 1.5; wanted in [0, 1]"),
  ("kl.schedule.steps=-1", "config.kl.schedule.steps: -1; wanted at least 0"),
  (
    "kl.schedule.shape=exponential,kl.schedule.end=0",
    "config.kl.schedule.end: 0.0; wanted at least 1e-6",
  ),
  ("ppo.gamma=0.99", "config.ppo.gamma: 0.99", "undiscounted return"),
  (
    "ppo.gamma=0.99,kl.estimator=rao_blackwellised",
    "config.ppo.gamma: 0.99; wanted 1 with kl.gradient='sequence_reverse'",
  ),
  (
    "ppo.gamma=0.99,kl.gradient=token_reverse,ppo.advantages=rloo,"
    "ppo.group_size=2",
    "config.ppo.gamma: 0.99; wanted 1 with ppo.advantages='rloo'",
  ),
  (
    "ppo.gamma=0.99,kl.gradient=token_reverse,ppo.advantages=grpo,"
    "ppo.group_size=2",
    "config.ppo.gamma: 0.99; wanted 1 with ppo.advantages='grpo'",
  ),
  (
    "ppo.advantages=reinforce_pp,ppo.whiten_advantages=false",
    "config.ppo.whiten_advantages: False; wanted True with",
    "'reinforce_pp'",
  ),
  ("ppo.gamma=1.1", "config.ppo.gamma: 1.1; wanted in [0, 1]"),
  ("ppo.gae_lambda=-0.1", "config.ppo.gae_lambda: -0.1; wanted in [0, 1]"),
  ("ppo.clip_epsilon=1", "config.ppo.clip_epsilon: 1.0; wanted in (0, 1)"),
  ("ppo.clip_epsilon=0", "config.ppo.clip_epsilon: 0.0; wanted in (0, 1)"),
  ("rollout.temperature=0", "temperature: 0.0; wanted", "above 0"),
  ("rollout.top_p=0", "rollout.top_p: 0.0; wanted in (0, 1]"),
  ("rollout.top_p=1.1", "rollout.top_p: 1.1"),
  ("rollout.top_k=-1", "rollout.top_k: -1; wanted at least 0"),
  ("rollout.stop_ids=1,-1", "config.rollout.stop_ids: (1, -1); wanted"),
  ("rollout.stop_ids='a'", "config.rollout.stop_ids: ('a',); wanted"),
  # The prefix, and texts in the loss.
  ("kl.anchored=true", "config.kl.anchored: True; wanted False without a rol"),
  ("stage=dpo,rollout.prefix=a", "config.rollout.prefix: 'a'; wanted '' in st"),
  ("mix.kind=ptx", "config.mix.kind: 'ptx'; wanted 'none' or 'nll' or 'forw"),
  ("stage=dpo,mix.kind=nll", "config.mix.kind: 'nll'; wanted 'none' in stage"),
  ("mix.path=a.txt", "config.mix.path: 'a.txt'; wanted '' with mix.kind='none"),
  ("mix.kind=nll,mix.path=a.txt", "config.mix.path: 'a.txt'; wanted '' or a f"),
  ("mix.kind=nll,data.path=a.txt", "config.mix.path: ''; wanted a file of tex"),
  ("mix.opening=person", "config.mix.opening: 'person'; wanted '' unless mix"),
  ("mix.coefficient=-1", "config.mix.coefficient: -1.0; wanted finite and at"),
  ("mix.batch_size=0", "config.mix.batch_size: 0; wanted at least 1"),
  (
    "mix.kind=nll,mix.batch_size=6,ppo.microbatches=2",
    "config.mix.batch_size: 6; wanted a multiple of ppo.minibatches",
    "= 2 × 2, into which the texts are cut",
  ),
  (
    "mix.kind=nll,data.sequence_length=129",
    "config.data.sequence_length: 129; wanted at most the model's 128",
  ),
  # 9, 38: the network.
  ("rollout.response_length=121", "response_length: 121", "128 positions"),
  ("model.kv_heads=3", "config.model.heads: 4", "model.kv_heads=3"),
  ("model.head_size=7", "config.model.head_size: 7", "even"),
  ("model.layers=3,model.unroll=2", "model.unroll: 2", "layers=3"),
  ("mesh.tensor=8", "config.mesh.tensor: 8", "kv_heads=4"),
  ("mesh.tensor=4,model.mlp_width=30", "mesh.tensor: 4", "mlp_width=30"),
  ("mesh.tensor=4,model.vocab_size=9", "mesh.tensor: 4", "vocab_size=9"),
  ("mesh.fsdp=3", "config.mesh.fsdp: 3", "width=64"),
  ("model.vocab_size=8,rollout.stop_ids=8", "stop_ids: (8,)", "=8"),
  # 13: the seed.
  ("seed=-1", "config.seed: -1; wanted an integer in [0, 2**32)"),
  (f"seed={2**32}", f"config.seed: {2**32}; wanted an integer"),
  # 49: a reward that is none.
  ("reward.kind=python", "config.reward.function: ''; wanted module:function"),
  ("reward.kind=function,reward.function=f", "reward.function: 'f'; wanted"),
  ("reward.kind=function,reward.function=a:b:c", "function: 'a:b:c'; wanted"),
  ("reward.function=a:b", "config.reward.function: 'a:b'; wanted ''"),
  ("reward.kind=python,reward.function=a:b,reward.path=c", "reward.path: 'c'"),
  (
    "reward.kind=function,reward.function=a:b,reward.ensemble='c'",
    "config.reward.ensemble: ('c',); wanted () with reward.kind='function'",
  ),
  # Paths.
  ("policy.path=nowhere", "config.policy.path: 'nowhere'; wanted '' or a dir"),
  ("policy.tokenizer=nowhere", "config.policy.tokenizer: 'nowhere'"),
  ("reference.path=nowhere", "config.reference.path: 'nowhere'; wanted '' or"),
  ("reward.path=nowhere", "config.reward.path: 'nowhere'"),
  ("reward.ensemble='nowhere'", "reward.ensemble: 'nowhere'; wanted direct"),
  ("reward.special_tokens=True", "which reads ids and not texts"),
  ("reward.ensemble=1", "config.reward.ensemble: 1; wanted directories"),
  ("reward.ensemble='.','tests/..'", "('.', 'tests/..')", "each model once"),
  ("reward.path=.,reward.ensemble='.'", "reward.path='.'; wanted each model"),
  ("data.path=nowhere", "config.data.path: 'nowhere'; wanted '' or a file"),
  # The built-in languages, and files in none of them.
  (
    "data.path=a,data.language=notes",
    "config.data.language: 'notes'; wanted 'reviews', the default, with data.p",
  ),
  (
    "data.path=a,data.opening=person",
    "config.data.opening: 'person'; wanted '' with data.path",
  ),
  (
    "data.path=a,data.judge_temperature=2",
    "config.data.judge_temperature: 2.0; wanted 1 with data.path",
  ),
  (
    "data.language=notes,pipeline.sft.data.language=essays",
    "config.data.language: 'notes'; wanted one language for all of",
  ),
  # Sweeps and pipelines.
  ("sweep.betas=0,-1", "config.sweep.betas: (0, -1); wanted numbers"),
  ("sweep.betas='a'", "config.sweep.betas: ('a',); wanted numbers"),
  ("sweep.betas=0.1,0.1", "config.sweep.betas: (0.1, 0.1); wanted each"),
  ("sweep.betas=0.1,0.10000001", "config.sweep.betas: (0.1, 0.10000001); want"),
  ("sweep.seeds=1,1", "config.sweep.seeds: (1, 1); wanted each seed once"),
  ("sweep.seeds=0,-1", "config.sweep.seeds: (0, -1); wanted integers"),
  ("sweep.seeds=0.5", "config.sweep.seeds: (0.5,); wanted integers"),
  ("sweep.seeds=True", "config.sweep.seeds: (True,); wanted integers"),
  ("sweep.members_at_once=-1", "config.sweep.members_at_once: -1; wanted at"),
  ("stage=sft", "config.stage: 'sft'; wanted a stage that stands on"),
  ("pipeline.sft.kl.beta=-1", "config.pipeline.sft.kl.beta: -1.0"),
  ("pipeline.sft.stage=ppo", "config.pipeline.sft.stage: 'ppo'"),
  (
    "pipeline.sft.model.width=32",
    "config.pipeline.sft.model.width: 32; wanted config.model.width=64",
  ),
]


def refusal(call, *args, **kwargs):
  with pytest.raises(errors.UserError) as caught:
    call(*args, **kwargs)
  message = str(caught.value)
  assert "\n" not in message
  return message


def assert_in_order(message, fragments):
  position = 0
  for fragment in fragments:
    assert fragment in message[position:], (message, fragment)
    position += message[position:].index(fragment)


@pytest.mark.parametrize("module, preset, device_count", PRESETS)
def test_every_preset_passes(module, preset, device_count):
  config = module.get_config(preset)
  validate.validate(config, device_count=device_count)


@pytest.mark.parametrize(
  "overrides, fragments", [(row[0], row[1:]) for row in BAD_FIELDS]
)
def test_bad_fields(overrides, fragments):
  """Bad inputs 1, 3-5, 7-9, 13, 38 and 49."""
  config = ppo.get_config(overrides)
  assert_in_order(refusal(validate.validate_fields, config), fragments)


@pytest.mark.parametrize(
  "overrides",
  [
    "kl.beta=0,rollout.top_k=5,rollout.stop_ids=()",
    "rollout.response_length=120",
    "ppo.clip_epsilon=0.999,ppo.gae_lambda=0,rollout.top_p=1",
    f"seed={2**32 - 1},sweep.betas=0,0.1",
    "reward.kind=python,reward.function=a.b:c",
    "reward.kind=model,reward.path=tests,reward.ensemble='docs','.'",
    "kl.controller=ziegler,kl.target=1e-3,kl.beta=1e-4",
    "kl.controller=pi,kl.target=6,kl.beta=10",
    "kl.controller=dual,kl.target=6,sweep.betas=0,10",
    "kl.controller=trust,kl.beta=0.0101",
    "kl.controller=schedule,kl.schedule.end=0,kl.schedule.steps=7",
    "kl.gradient=token_forward,kl.estimator=rao_blackwellised,ppo.gamma=0.9",
    "ppo.advantages=rloo,ppo.group_size=2,ppo.whiten_advantages=false",
    "ppo.advantages=grpo,ppo.group_size=64,ppo.normalise_groups=false",
    "ppo.advantages=reinforce_pp,kl.gradient=token_reverse,ppo.gamma=0",
    "ppo.group_size=4",
    "model.kv_heads=1,model.unroll=1",
    "data.language=essays,data.opening=person,data.judge_temperature=1e-6",
  ],
)
def test_what_is_allowed_to_the_last(overrides):
  validate.validate_fields(ppo.get_config(overrides))


def of_the_penalty(gradient, estimator, *, allow_biased):
  return ppo.get_config(
    f"kl.gradient={gradient},kl.estimator={estimator},"
    f"kl.allow_biased={allow_biased}"
  )


@pytest.mark.parametrize("recipe", rules.RECIPES)
def test_a_biased_recipe_needs_open_eyes(recipe):
  """Trap 1; bad input 7: the message says what it is, and what to write."""
  estimator, truth = rules.RECIPES[recipe]
  config = of_the_penalty(recipe, estimator, allow_biased=False)
  fragments = [
    f"config.kl.gradient: {recipe!r}: its gradient is {truth}; wanted",
    "'sequence_reverse' or 'token_reverse' or 'token_forward'",
    "kl.allow_biased=True",
  ]
  assert_in_order(refusal(validate.validate_fields, config), fragments)
  config.kl.allow_biased = True
  validate.validate_fields(config)


def test_the_penalties_are_those_of_the_objective():
  """Its table is JAX, and validation is free of it: they are compared here."""
  recipes = {
    name: estimator
    for name, estimator in kl.PENALTIES
    if name not in kl.TARGETS
  }
  assert recipes == {name: row[0] for name, row in rules.RECIPES.items()}
  for name in (*kl.TARGETS, *recipes):
    for estimator in ("sampled", "rao_blackwellised"):
      config = of_the_penalty(name, estimator, allow_biased=True)
      if (name, estimator) in kl.PENALTIES:
        validate.validate_fields(config)
        continue
      wanted = [
        f"config.kl.estimator: {estimator!r}; wanted {recipes[name]!r}",
        f"kl.gradient={name!r}",
      ]
      assert_in_order(refusal(validate.validate_fields, config), wanted)
  for name in kl.TARGETS:
    config = of_the_penalty(name, "sampled", allow_biased=False)
    validate.validate_fields(config)


@pytest.mark.parametrize("recipe", rules.RECIPES)
def test_what_is_said_of_a_recipe_is_what_the_table_says(recipe):
  estimator, truth = rules.RECIPES[recipe]
  target = kl.PENALTIES[recipe, estimator].target
  wording = {
    "token_reverse": "token-local reverse KL",
    "token_forward": "token-local forward KL",
  }
  for name, words in wording.items():
    assert (words in truth) == (name == target)


def test_trust_needs_a_judge(tmp_path):
  """An ensemble is one where there is no gold reward."""
  prompts = tmp_path / "prompts.txt"
  prompts.touch()
  given = f"stories,data.path={prompts},kl.controller=trust,reward.kind=model"
  given = f"{given},reward.function=,reward.path={tmp_path}"
  message = refusal(validate.validate_fields, ppo.get_config(given))
  wanted = "config.kl.controller: 'trust'; wanted one that needs no reliability"
  assert message.startswith(wanted)
  assert "gold reward of the built-in language" in message
  assert "reward.ensemble" in message
  validate.validate_fields(ppo.get_config(f"{given},reward.ensemble='docs'"))


@pytest.mark.parametrize("seed", [1.5, True])
def test_seed_of_another_type(seed):
  """Bad input 13; a typed config lets neither through, one with types off."""
  config = ppo.get_config()
  with config.ignore_type():
    config.seed = seed
  assert "config.seed: " in refusal(validate.validate_fields, config)


def test_a_pipeline_learns_the_built_in_language(tmp_path):
  texts = tmp_path / "texts.jsonl"
  texts.touch()
  for field in ("data.path", "pipeline.sft.data.path"):
    config = ppo.get_config(f"{field}={texts}")
    message = refusal(validate.validate_fields, config)
    assert message.startswith(f"config.{field}: ")
    assert "built-in language" in message
  config = quickstart.get_config(f"policy.path={tmp_path}")
  message = refusal(validate.validate_fields, config)
  assert_in_order(message, ["config.policy.path: ", "set stage='ppo'"])
  # With a policy of one's own nothing is made first.
  validate.validate_fields(
    ppo.get_config(f"policy.path={tmp_path},data.path={texts}")
  )


def test_a_pipeline_has_its_stages():
  config = quickstart.get_config()
  with config.pipeline.unlocked():
    config.pipeline.sfft = config.pipeline.sft
    del config.pipeline["sft"]
  message = refusal(validate.validate_fields, config)
  assert_in_order(message, ["pipeline.sfft: ", "Did you mean 'sft'?"])
  with config.pipeline.unlocked():
    del config.pipeline["sfft"]
  assert "configs/quickstart.py" in refusal(validate.validate_fields, config)


def test_an_sft_stage_asks_nothing_of_the_rollout():
  config = sft.get_config("model.max_length=64,train.batch_size=5")
  config.rollout.response_length = 100
  validate.validate_fields(config)
  config = sft.get_config("data.sequence_length=129")
  message = refusal(validate.validate_fields, config)
  assert_in_order(message, ["data.sequence_length: 129", "128 positions"])
  config = sft.get_config("sweep.betas=0.1")
  assert "no penalty" in refusal(validate.validate_fields, config)


@pytest.mark.parametrize(
  "overrides, device_count",
  [("", 1), ("", 8), ("mesh.fsdp=2,mesh.tensor=2", 8), ("mesh.tensor=4", 4)],
)
def test_meshes_that_fit(overrides, device_count):
  config = ppo.get_config(overrides)
  validate.validate_mesh(config, device_count=device_count)


@pytest.mark.parametrize(
  "overrides, device_count, fragments",
  [
    # Of the shapes over 4, each row is divided by 64 / 2, each head group by 4.
    (
      "mesh.data=3",
      4,
      [
        "config.mesh: data×fsdp×tensor = 3×1×1; wanted a product of 4",
        "4×1×1 or 2×2×1 or 1×4×1 or 2×1×2 or 1×2×2 or 1×1×4",
      ],
    ),
    ("mesh.fsdp=3", 4, ["-1×3×1", "a product of 4 devices"]),
    ("mesh.fsdp=16", 8, ["-1×16×1", "a product of 8 devices"]),
    ("mesh.data=3", 5, ["a product of 5 devices", "none does here"]),
    (
      "ppo.microbatches=8",
      8,
      ["batch_size: 64", "4 rows", "mesh.fsdp = 8 × 1 = 8"],
    ),
    (
      "pipeline.sft.train.batch_size=12",
      8,
      ["config.pipeline.sft.train.batch_size: 12", "= 8"],
    ),
  ],
)
def test_meshes_that_do_not(overrides, device_count, fragments):
  """Bad inputs 5 and 6."""
  config = ppo.get_config(overrides)
  message = refusal(validate.validate_mesh, config, device_count=device_count)
  assert_in_order(message, fragments)


def test_validate_does_both():
  with pytest.raises(errors.UserError, match=r"config\.seed"):
    validate.validate(ppo.get_config("seed=-1"), device_count=1)
  with pytest.raises(errors.UserError, match=r"config\.mesh"):
    validate.validate(ppo.get_config("mesh.data=2"), device_count=1)


@pytest.mark.parametrize(
  "overrides, fragments",
  [
    ("rollout.response_length=500", ["512 positions", "prompt_length=32"]),
    ("rollout.stop_ids=512", ["stop_ids: (512,)", "vocab_size=512"]),
    ("mesh.tensor=8", ["mesh.tensor: 8", "kv_heads=4"]),
    ("mesh.fsdp=3", ["mesh.fsdp: 3", "width=64"]),
    ("model.unroll=2", ["model.unroll: 2", "layers=5"]),
  ],
)
def test_a_loaded_model(overrides, fragments):
  """Bad inputs 9 and 38, for a network that brings its own sizes."""
  model = types.SimpleNamespace(
    vocab_size=512,
    width=64,
    layers=5,
    kv_heads=4,
    mlp_width=172,
    max_length=512,
  )
  validate.validate_model(ppo.get_config("stories"), model)
  config = ppo.get_config(f"stories,{overrides}")
  assert_in_order(refusal(validate.validate_model, config, model), fragments)


def test_a_loaded_model_replaces_the_sizes_in_the_config(tmp_path):
  config = ppo.get_config(f"stories,policy.path={tmp_path},model.kv_heads=3")
  config.rollout.response_length = 10_000
  validate.validate_fields(config)


def test_suggest():
  assert (
    validate.suggest("beta ", ["beta", "gamma"]) == ". Did you mean 'beta'?"
  )
  assert validate.suggest("zzz", ["beta", "gamma"]) == ""


def test_nan_passes_no_range():
  """Bad input 3: every field with a fraction refuses NaN."""
  config = ppo.get_config()
  sections = ("kl", "rollout", "ppo", "optimizer", "data", "model")
  controllers = ("schedule", "ziegler", "pi", "dual", "trust")
  fields = [
    f"{section}.{name}"
    for section in (*sections, *(f"kl.{name}" for name in controllers))
    for name, value in config[section].items()
    if isinstance(value, float)
  ]
  assert len(fields) > 25
  for field in fields:
    config = ppo.get_config()
    config.update_from_flattened_dict({field: math.nan})
    message = refusal(validate.validate_fields, config)
    assert f"config.{field}: nan" in message
