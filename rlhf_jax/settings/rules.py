"""The rules that a config must satisfy, as tables; `validate` reads them.

Choices, ranges, then whatever holds between fields. They need the config and
no JAX, which is slow to import: bounds that JAX code has too stand here once
more, and tests hold the two together.
"""

import math
import re
from typing import Any

from ml_collections import ConfigDict


def runs_ppo(config: ConfigDict) -> bool:
  """Whether a stage of the config has a penalty."""
  return config.stage in ("pipeline", "ppo")


def is_number(value: Any) -> bool:
  """Whether a value is an int or a float, and no bool."""
  return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_sweep(config: ConfigDict) -> bool:
  """Whether PPO runs under several β or seeds at once."""
  return bool(config.sweep.betas or config.sweep.seeds)


def betas(config: ConfigDict) -> tuple[int | float, ...]:
  """Every β that the config's PPO begins with."""
  return config.sweep.betas or (config.kl.beta,)


# What was published as a KL penalty and is not the gradient of one over whole
# responses: the estimator that each has, and what its gradient is instead.
RECIPES = {
  "k1_in_loss": ("sampled", "zero on average: π_ref does not appear in it"),
  "k2_in_loss": (
    "sampled",
    "the token-local reverse KL's, on the first minibatch only",
  ),
  "k3_in_loss": (
    "sampled",
    "the token-local forward KL's, on the first minibatch only",
  ),
  "k1_ratio_in_loss": (
    "sampled",
    "the token-local reverse KL's, with more noise than token_reverse has",
  ),
  "k2_ratio_in_loss": ("sampled", "that of E[ℓ²/2], which is no KL"),
  "k3_ratio_in_loss": ("sampled", "the token-local reverse KL's"),
  "k2_in_reward": ("sampled", "that of nothing with a name"),
  "k3_in_reward": ("sampled", "that of nothing with a name"),
  "abs_in_reward": ("sampled", "that of nothing with a name"),
  "exact_detached_reward": (
    "rao_blackwellised",
    "without the state's own KL, which no action of it can change",
  ),
}
TARGETS = ("sequence_reverse", "token_reverse", "token_forward")
_TO_A_TARGET = ("ziegler", "pi", "dual")

# Fields that name one of a few things, and these.
CHOICES = {
  "stage": ("pipeline", "sft", "reward_model", "ppo", "dpo", "evaluate"),
  "model.norm": ("rms", "layer"),
  "model.positions": ("rope", "learned"),
  "model.activation": ("swiglu", "geglu", "gelu", "gelu_exact", "relu"),
  "model.compute_dtype": ("float32", "bfloat16"),
  "reference.kind": ("frozen",),
  "reward.kind": ("model", "function", "python"),
  "kl.estimator": ("sampled", "rao_blackwellised"),
  "kl.controller": ("fixed", "schedule", *_TO_A_TARGET, "trust"),
  "kl.schedule.shape": ("linear", "cosine", "exponential"),
  "ppo.advantages": ("gae", "rloo", "grpo", "reinforce_pp"),
  "dpo.loss": (
    *("dpo", "conservative", "robust", "ipo"),
    *("kto", "simpo", "chi_po"),
  ),
  "optimizer.schedule": ("constant", "linear", "cosine"),
  "data.language": ("reviews", "notes", "essays"),
  "data.opening": ("", "determiner", "pronoun", "person"),
  "mix.kind": ("none", "nll", "forward_kl", "reverse_kl"),
  "mix.opening": ("", "determiner", "pronoun", "person"),
}


def _within(low: float, high: float, fields: str):
  """A row of `RANGES` with the bounds that objective/beta.py, JAX, has."""
  return f"from {low:g} to {high:g}", lambda x: low <= x <= high, fields


# What is wanted of a number, its test, and the fields. NaN passes no test.
RANGES = (
  (
    "at least 1",
    lambda x: x >= 1,
    "model.width model.layers model.heads model.kv_heads model.head_size"
    " model.mlp_width model.max_length rollout.prompt_length"
    " rollout.response_length ppo.epochs ppo.minibatches ppo.microbatches"
    " ppo.group_size mix.batch_size"
    " data.size train.steps train.batch_size train.samples_every mesh.fsdp"
    " mesh.tensor checkpoint.every checkpoint.keep",
  ),
  (
    "at least 2",
    lambda x: x >= 2,
    "data.sequence_length evaluate.prompts",
  ),
  (
    "at least 0",
    lambda x: x >= 0,
    "model.vocab_size model.unroll rollout.top_k optimizer.warmup_steps"
    " kl.schedule.steps sweep.members_at_once evaluate.best_of",
  ),
  ("-1 (the rest) or at least 1", lambda x: x == -1 or x >= 1, "mesh.data"),
  (
    "an integer in [0, 2**32)",
    lambda x: isinstance(x, int) and 0 <= x < 2**32,
    "seed",
  ),
  (
    "finite and above 0",
    lambda x: 0 < x < math.inf,
    "model.norm_epsilon model.rope_theta rollout.temperature"
    " ppo.value_clip_epsilon optimizer.learning_rate optimizer.epsilon"
    " dpo.desirable_weight dpo.undesirable_weight dpo.reward_bound"
    " optimizer.max_grad_norm data.judge_temperature",
  ),
  (
    "finite and at least 0",
    lambda x: 0 <= x < math.inf,
    "kl.beta kl.target ppo.value_coefficient optimizer.weight_decay dpo.margin"
    " mix.coefficient",
  ),
  ("in (0, 1)", lambda x: 0 < x < 1, "ppo.clip_epsilon data.heldout_fraction"),
  ("in (0, 1]", lambda x: 0 < x <= 1, "rollout.top_p"),
  ("in [0, 1)", lambda x: 0 <= x < 1, "optimizer.b1 optimizer.b2"),
  ("in [0, 0.5)", lambda x: 0 <= x < 0.5, "dpo.label_smoothing"),
  (
    "in [0, 1]",
    lambda x: 0 <= x <= 1,
    "ppo.gamma ppo.gae_lambda kl.schedule.end",
  ),
  _within(1e-9, 1e9, "kl.beta_min kl.beta_max kl.trust.beta_min"),
  _within(1.0, 1e6, "kl.ziegler.horizon"),
  _within(0.0, 10.0, "kl.pi.proportional"),
  _within(1e-6, 10.0, "kl.pi.integral"),
  _within(1e-9, 1e3, "kl.dual.learning_rate"),
  _within(0.51, 1.0, "kl.trust.reliability_wanted"),  # 0.5 is chance.
  _within(0.0, 0.9999, "kl.trust.decay"),
)

# A field, what holds between it and others, what is wanted of it otherwise.
RULES = (
  (
    "rollout.stop_ids",
    lambda c: (
      c.rollout.stop_ids == (-1,)
      or all(isinstance(i, int) and i >= 0 for i in c.rollout.stop_ids)
    ),
    "token ids of at least 0, (-1,) for the model's own, or () for none",
  ),
  (
    "sweep.betas",
    lambda c: all(is_number(b) and 0 <= b < math.inf for b in c.sweep.betas),
    "numbers, finite and at least 0",
  ),
  (
    "sweep.betas",
    # Workdirs are named after six digits.
    lambda c: len({f"{b:g}" for b in c.sweep.betas}) == len(c.sweep.betas),
    "each β once",
  ),
  (
    "sweep.betas",
    lambda c: not is_sweep(c) or runs_ppo(c),
    "() in stage {c.stage!r}, which has no penalty",
  ),
  (
    "sweep.seeds",
    lambda c: all(
      isinstance(s, int) and not isinstance(s, bool) and 0 <= s < 2**32
      for s in c.sweep.seeds
    ),
    "integers in [0, 2**32)",
  ),
  (
    "sweep.seeds",
    lambda c: len(set(c.sweep.seeds)) == len(c.sweep.seeds),
    "each seed once",
  ),
  (
    "sweep.seeds",
    lambda c: not c.sweep.seeds or c.policy.path or "sft" in c.pipeline,
    "() for a policy that starts at random: members share where they begin;"
    " set policy.path",
  ),
  *(
    (
      f"{part}.best_of",
      lambda c, part=part: (
        c[part].best_of >= 0 and c[part].best_of & (c[part].best_of - 1) == 0
      ),
      "a power of 2, or 0 for none",
    )
    for part in ("sweep", "evaluate")
  ),
  (
    "optimizer.warmup_steps",
    lambda c: c.optimizer.warmup_steps < c.train.steps,
    "fewer than train.steps={c.train.steps}, or the learning rate is never"
    " reached",
  ),
  (
    "ppo.gamma",
    lambda c: (
      not runs_ppo(c) or c.kl.gradient != "sequence_reverse" or c.ppo.gamma == 1
    ),
    "1 with kl.gradient='sequence_reverse': the sequence KL's gradient needs"
    " the undiscounted return",
  ),
  (
    "kl.target",
    lambda c: c.kl.controller in _TO_A_TARGET or c.kl.target == 0,
    "0 with kl.controller={c.kl.controller!r}: a target beside it would be a"
    " second controller; ziegler, pi and dual have one",
  ),
  (
    "kl.target",
    lambda c: c.kl.controller not in _TO_A_TARGET or 1e-6 <= c.kl.target <= 1e6,
    "the KL to hold, above 0 and at most 1e6 nats per response, with"
    " kl.controller={c.kl.controller!r}",
  ),
  (
    "kl.target_unit",
    lambda c: c.kl.target_unit == "nats per response",
    "'nats per response', which is what the penalty sums and the controllers"
    " read; for n nats per token write n times the response's tokens",
  ),
  (
    "kl.schedule.end",
    lambda c: c.kl.schedule.shape != "exponential" or c.kl.schedule.end >= 1e-6,
    "at least 1e-6 with kl.schedule.shape='exponential', which never ends at 0",
  ),
  (
    "kl.beta_min",
    lambda c: c.kl.beta_min < c.kl.beta_max,
    "less than kl.beta_max={c.kl.beta_max}",
  ),
  (
    "kl.beta",
    lambda c: (
      c.kl.controller not in ("ziegler", "pi") or min(betas(c)) >= c.kl.beta_min
    ),
    "every β (sweep.betas={c.sweep.betas}) at least"
    " kl.beta_min={c.kl.beta_min}: {c.kl.controller} multiplies it",
  ),
  (
    "kl.beta",
    lambda c: (
      c.kl.controller not in _TO_A_TARGET or max(betas(c)) <= c.kl.beta_max
    ),
    "every β (sweep.betas={c.sweep.betas}) at most kl.beta_max={c.kl.beta_max}",
  ),
  (
    "kl.beta",
    lambda c: c.kl.controller != "trust" or min(betas(c)) > c.kl.trust.beta_min,
    "every β (sweep.betas={c.sweep.betas}) above"
    " kl.trust.beta_min={c.kl.trust.beta_min}, to which trust relaxes it",
  ),
  (
    "kl.controller",
    lambda c: (
      c.kl.controller != "trust" or c.reward.ensemble or not c.data.path
    ),
    "one that needs no reliability: 'trust' measures it by the gold reward of"
    " the built-in language (no data.path) or by the members of"
    " reward.ensemble",
  ),
  (
    "kl.beta",
    lambda c: c.stage != "dpo" or c.kl.beta > 0,
    "above 0 in stage 'dpo': without β its loss does not see the policy",
  ),
  (
    "kl.controller",
    lambda c: c.stage != "dpo" or c.kl.controller == "fixed",
    "'fixed' in stage 'dpo', whose β is a constant of its loss",
  ),
  (
    "dpo.label_smoothing",
    lambda c: (
      (c.dpo.label_smoothing > 0) == (c.dpo.loss in ("conservative", "robust"))
    ),
    "the share of labels that are flipped, above 0, with dpo.loss="
    "'conservative' or 'robust', and 0 with any other (here {c.dpo.loss!r})",
  ),
  (
    "ppo.group_size",
    lambda c: c.ppo.advantages not in ("rloo", "grpo") or c.ppo.group_size > 1,
    "at least 2 with ppo.advantages={c.ppo.advantages!r}, which compares"
    " responses to the same prompt",
  ),
  (
    "ppo.group_size",
    lambda c: not runs_ppo(c) or c.train.batch_size % c.ppo.group_size == 0,
    "a divisor of train.batch_size={c.train.batch_size}, which counts"
    " responses",
  ),
  (
    "ppo.gamma",
    lambda c: c.ppo.advantages not in ("rloo", "grpo") or c.ppo.gamma == 1,
    "1 with ppo.advantages={c.ppo.advantages!r}, to which a response is one"
    " action",
  ),
  (
    "ppo.length_normalisation",
    lambda c: not c.ppo.length_normalisation or c.kl.allow_biased,
    "False: with responses divided by their lengths no penalty has the gradient"
    " of its target; kl.allow_biased=True runs it all the same",
  ),
  (
    "kl.schedule.steps",
    lambda c: c.kl.controller == "schedule" or c.kl.schedule.steps == 0,
    "0 with kl.controller={c.kl.controller!r}: a schedule beside it would be a"
    " second controller",
  ),
  (
    "ppo.whiten_advantages",
    lambda c: c.ppo.advantages != "reinforce_pp" or c.ppo.whiten_advantages,
    "True with ppo.advantages='reinforce_pp', which compares with the batch",
  ),
  (
    "reward.ensemble",
    lambda c: not c.reward.ensemble or c.reward.kind == "model",
    "() with reward.kind={c.reward.kind!r}; reward models form an ensemble",
  ),
  (
    "reward.special_tokens",
    lambda c: not c.reward.special_tokens or c.reward.kind == "python",
    "False with reward.kind={c.reward.kind!r}, which reads ids and not texts",
  ),
  (
    "reward.function",
    lambda c: c.reward.kind != "model" or not c.reward.function,
    "'' with reward.kind='model', or reward.kind 'function' (of tokens, in"
    " JAX) or 'python' (of texts)",
  ),
  (
    "reward.function",
    lambda c: (
      c.reward.kind == "model"
      or re.fullmatch(
        r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", c.reward.function
      )
    ),
    "module:function with reward.kind={c.reward.kind!r}, such as"
    " rlhf_jax.text.rewards:happy_words",
  ),
  (
    "reward.path",
    lambda c: c.reward.kind == "model" or not c.reward.path,
    "'' with reward.kind={c.reward.kind!r}, which loads no reward model",
  ),
  (
    "train.batch_size",
    lambda c: not runs_ppo(c) or c.train.batch_size % c.ppo.minibatches == 0,
    "a multiple of ppo.minibatches={c.ppo.minibatches}",
  ),
  (
    "ppo.microbatches",
    lambda c: (
      not runs_ppo(c)
      or c.train.batch_size // c.ppo.minibatches % c.ppo.microbatches == 0
    ),
    "a divisor of a minibatch's rows, train.batch_size={c.train.batch_size} /"
    " ppo.minibatches={c.ppo.minibatches}",
  ),
  (
    "rollout.prefix",
    lambda c: not c.rollout.prefix or runs_ppo(c) or c.stage == "evaluate",
    "'' in stage {c.stage!r}; PPO and evaluations have a prefix",
  ),
  (
    "kl.anchored",
    lambda c: not c.kl.anchored or c.rollout.prefix,
    "False without a rollout.prefix, which it leaves out for the reference",
  ),
  (
    "mix.kind",
    lambda c: c.mix.kind == "none" or runs_ppo(c),
    "'none' in stage {c.stage!r}; PPO alone has a mix",
  ),
  (
    "mix.path",
    lambda c: c.mix.kind != "none" or not c.mix.path,
    "'' with mix.kind='none', which reads no texts; set mix.kind",
  ),
  (
    "mix.path",
    lambda c: c.mix.kind == "none" or c.mix.path or not c.data.path,
    "a file of texts with data.path, whose prompts are in no built-in language",
  ),
  (
    "mix.opening",
    lambda c: not c.mix.opening or (c.mix.kind != "none" and not c.mix.path),
    "'' unless mix.kind brings texts of the built-in language (no mix.path)",
  ),
  (
    "mix.batch_size",
    lambda c: (
      c.mix.kind == "none"
      or c.mix.batch_size % (c.ppo.minibatches * c.ppo.microbatches) == 0
    ),
    "a multiple of ppo.minibatches × ppo.microbatches = {c.ppo.minibatches} ×"
    " {c.ppo.microbatches}, into which the texts are cut, too",
  ),
  (
    "stage",
    lambda c: c.stage != "pipeline" or len(c.pipeline) == 2,
    "sft and reward_model in config.pipeline, as in configs/quickstart.py",
  ),
  (
    "stage",
    lambda c: not c.pipeline or c.stage not in ("sft", "evaluate"),
    "a stage that stands on those that config.pipeline has",
  ),
  (
    "policy.path",
    lambda c: c.stage != "pipeline" or not c.policy.path,
    "'' in stage 'pipeline', which makes its own; set stage='ppo'",
  ),
  (
    "policy.path",
    lambda c: c.stage != "evaluate" or c.policy.path,
    "the policy that is measured: a workdir or a Hugging Face directory",
  ),
  (
    "policy.tokenizer",
    lambda c: not (c.policy.path and c.policy.tokenizer),
    "'' with policy.path, whose own tokenizer is used",
  ),
  (
    "reward.path",
    lambda c: c.stage != "pipeline" or not c.reward.path,
    "'' in stage 'pipeline', which makes its own; set stage='ppo'",
  ),
  (
    "data.language",
    lambda c: not c.data.path or c.data.language == "reviews",
    "'reviews', the default, with data.path, whose texts are in no built-in"
    " language",
  ),
  (
    "data.opening",
    lambda c: not (c.data.path and c.data.opening),
    "'' with data.path, whose texts begin as they do",
  ),
  (
    "data.judge_temperature",
    lambda c: not c.data.path or c.data.judge_temperature == 1,
    "1 with data.path, whose pairs are judged already",
  ),
  (
    "data.language",
    lambda c: all(
      part.data.language == c.data.language for part in c.pipeline.values()
    ),
    "one language for all of config.pipeline; set config.data.language only",
  ),
  (
    "model.heads",
    lambda c: c.policy.path or c.model.heads % c.model.kv_heads == 0,
    "a multiple of model.kv_heads={c.model.kv_heads}",
  ),
  (
    "model.head_size",
    lambda c: (
      c.policy.path or c.model.positions != "rope" or c.model.head_size % 2 == 0
    ),
    "an even number with model.positions='rope', which rotates pairs",
  ),
)


def _longest(m):
  """Of a network; config.model has no rope whose positions have an end."""
  return getattr(m, "longest", math.inf)


# The same between the config `c` and a network `m`, which is config.model
# where the policy starts at random. Vocabulary 0 is the tokenizer's.
MODEL_RULES = (
  (
    "rollout.response_length",
    lambda c, m: (
      c.stage == "sft"
      or c.rollout.prompt_length + c.rollout.response_length <= m.max_length
    ),
    "at most the model's {m.max_length} positions less"
    " rollout.prompt_length={c.rollout.prompt_length}",
  ),
  (
    "rollout.response_length",
    lambda c, m: (
      c.stage == "sft"
      or c.rollout.prompt_length + c.rollout.response_length <= _longest(m)
    ),
    "at most {m.longest} less rollout.prompt_length={c.rollout.prompt_length}:"
    " in longer texts this model's rotary positions depend on their length",
  ),
  (
    "data.sequence_length",
    lambda c, m: (
      (c.stage not in ("sft", "evaluate") and c.mix.kind == "none")
      or c.data.sequence_length <= min(m.max_length, _longest(m))
    ),
    "at most the model's {m.max_length} positions",
  ),
  (
    "rollout.stop_ids",
    lambda c, m: (
      not m.vocab_size or all(i < m.vocab_size for i in c.rollout.stop_ids)
    ),
    "ids below the model's vocab_size={m.vocab_size}",
  ),
  (
    "model.unroll",
    lambda c, m: not c.model.unroll or m.layers % c.model.unroll == 0,
    "0 (all) or a divisor of the model's layers={m.layers}",
  ),
  (
    "mesh.tensor",
    lambda c, m: (
      math.gcd(m.kv_heads, m.mlp_width, m.vocab_size) % c.mesh.tensor == 0
    ),
    "a divisor of the model's kv_heads={m.kv_heads}, mlp_width={m.mlp_width}"
    " and vocab_size={m.vocab_size}",
  ),
  (
    "mesh.fsdp",
    lambda c, m: m.width % c.mesh.fsdp == 0,
    "a divisor of the model's width={m.width}",
  ),
)
