"""Every field that exists, with its default and its unit.

The other configs start here and change what they must, so each is complete:
`--config.anything` either names a field below or is refused. No field means
different things in different stages.

Values are written as in Python, bare strings without quotes, alike in a
config's argument and on the command line:

    --config=configs/ppo.py:toy,kl.beta=0.1 --config.sweep.betas=0,0.02,0.1
"""

import ast
from collections.abc import Callable, Iterable, Iterator, Mapping
import difflib
import re

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """A complete config of a small Llama-like PPO run."""
  config = ConfigDict()
  config.stage = "ppo"  # pipeline, sft, reward_model, ppo, dpo, evaluate
  config.seed = 0

  # The network, where it starts at random; a model that is loaded brings its
  # own architecture, and of these only the last three fields are used.
  config.model = ConfigDict()
  config.model.vocab_size = 0  # 0: the tokenizer's
  config.model.width = 64
  config.model.layers = 2
  config.model.heads = 4
  config.model.kv_heads = 4
  config.model.head_size = 16
  config.model.mlp_width = 256
  config.model.max_length = 128  # positions
  config.model.norm = "rms"  # rms, layer
  config.model.norm_epsilon = 1e-5
  config.model.positions = "rope"  # rope, learned
  config.model.rope_theta = 10_000.0
  config.model.activation = "swiglu"  # swiglu, geglu, gelu, gelu_exact, relu
  config.model.tie_embeddings = True
  config.model.qkv_bias = False
  config.model.out_bias = False
  config.model.mlp_bias = False
  config.model.compute_dtype = "float32"  # float32, bfloat16
  config.model.unroll = 0  # layers per scan step; 0: all (small models)
  config.model.remat = False  # recompute layers in the backward pass

  config.policy = ConfigDict()
  config.policy.path = ""  # a Hugging Face directory or a workdir; '': random
  config.policy.tokenizer = ""  # of a random policy; '': the built-in language

  config.reference = ConfigDict()
  config.reference.kind = "frozen"  # never moves
  config.reference.path = ""  # a model; '': the policy as it was before step 0

  config.reward = ConfigDict()
  config.reward.kind = "model"  # model, function, python
  config.reward.path = ""  # model: a reward model's workdir
  config.reward.ensemble = ()  # model: workdirs of more, 'A','B'; mean of all
  config.reward.function = ""  # function, python: module:function
  config.reward.special_tokens = False  # python: whether its texts have theirs

  config.kl = ConfigDict()
  config.kl.beta = 0.05  # reward units per nat; where a controller begins
  # Whose gradient: sequence_reverse, token_reverse, token_forward; or, with
  # allow_biased, the name of a published recipe (objective/kl.py).
  config.kl.gradient = "sequence_reverse"
  config.kl.estimator = "sampled"  # sampled, rao_blackwellised
  config.kl.allow_biased = False
  config.kl.anchored = False  # True: to the reference without rollout.prefix
  # fixed, schedule (relaxes), ziegler, pi, dual (towards the target), trust
  config.kl.controller = "fixed"
  config.kl.target = 0.0  # of ziegler, pi and dual
  config.kl.target_unit = "nats per response"
  config.kl.beta_min = 1e-4  # of ziegler and pi, reward units per nat
  config.kl.beta_max = 10.0  # of ziegler, pi and dual
  config.kl.schedule = ConfigDict()
  config.kl.schedule.shape = "cosine"  # linear, cosine, exponential
  config.kl.schedule.end = 0.1  # share of kl.beta that is left
  config.kl.schedule.steps = 0  # until then; 0: the whole run
  config.kl.ziegler = ConfigDict()
  config.kl.ziegler.horizon = 10.0  # steps
  config.kl.pi = ConfigDict()
  config.kl.pi.proportional = 0.5  # log β per relative error
  config.kl.pi.integral = 0.07  # the same, per step
  config.kl.dual = ConfigDict()
  config.kl.dual.learning_rate = 0.01  # β per relative error and step
  config.kl.trust = ConfigDict()
  # Share of pairs for full trust: of one prompt where ppo.group_size > 1,
  # else across prompts, with what the scores think of the prompts.
  config.kl.trust.reliability_wanted = 0.75
  config.kl.trust.beta_min = 0.01  # β under full trust
  config.kl.trust.decay = 0.9  # of the running mean of the reliability

  config.rollout = ConfigDict()
  config.rollout.prompt_length = 8  # tokens; longer prompts lose their start
  config.rollout.response_length = 26  # tokens
  # A text in front of every prompt, after BOS, which policy and reference read
  # and the rewards do not; the ledger then has kl/anchored (steps/anchor.py).
  config.rollout.prefix = ""
  config.rollout.temperature = 1.0
  # Narrow what is drawn, not what is scored: KL readings are then too high
  # (0.70 nats read 0.86 at top_p = 0.9) and its sampled gradient is biased.
  config.rollout.top_k = 0  # 0: off
  config.rollout.top_p = 1.0  # 1: off
  config.rollout.stop_ids = (-1,)  # (-1,): the model's own; (): never stop

  config.ppo = ConfigDict()
  config.ppo.advantages = "gae"  # gae, rloo, grpo, reinforce_pp
  config.ppo.group_size = 1  # responses to a prompt; batch_size counts them all
  config.ppo.normalise_groups = True  # grpo: scores by their group's deviation
  # True: a response weighs 1 whatever its length, as in GRPO (needs
  # kl.allow_biased: no penalty then has the gradient of its target).
  config.ppo.length_normalisation = False
  config.ppo.epochs = 2
  config.ppo.minibatches = 2
  config.ppo.microbatches = 1  # per minibatch; gradients add up
  config.ppo.clip_epsilon = 0.2
  config.ppo.value_clip_epsilon = 0.2  # gae
  config.ppo.value_coefficient = 0.1  # gae
  config.ppo.gamma = 1.0
  config.ppo.gae_lambda = 0.95  # gae
  config.ppo.whiten_advantages = True  # by the batch; rloo and grpo, too

  # Texts in PPO's loss beside the responses (steps/text_mix.py).
  config.mix = ConfigDict()
  config.mix.kind = "none"  # none, nll (PPO-ptx), forward_kl, reverse_kl
  config.mix.coefficient = 0.1  # reward units per nat, as kl.beta
  config.mix.path = ""  # .jsonl or .txt, as in SFT; '': the built-in language
  config.mix.opening = ""  # of the built-in language's texts, see data.opening
  config.mix.batch_size = 32  # rows of data.sequence_length tokens a step

  config.dpo = ConfigDict()
  # dpo, conservative, robust, ipo, kto, simpo, chi_po; β is kl.beta, of simpo
  # in reward units per nat per token.
  config.dpo.loss = "dpo"
  config.dpo.label_smoothing = 0.0  # conservative, robust: share of flips
  config.dpo.margin = 0.5  # simpo: reward units
  config.dpo.desirable_weight = 1.0  # kto
  config.dpo.undesirable_weight = 1.0  # kto
  config.dpo.reward_bound = 10.0  # chi_po: range of the reward, reward units

  config.optimizer = ConfigDict()
  config.optimizer.learning_rate = 1e-3
  config.optimizer.schedule = "constant"  # constant, linear, cosine
  config.optimizer.warmup_steps = 0
  config.optimizer.weight_decay = 0.0
  config.optimizer.b1 = 0.9
  config.optimizer.b2 = 0.999
  config.optimizer.epsilon = 1e-8
  config.optimizer.max_grad_norm = 1.0

  config.data = ConfigDict()
  # .jsonl, .json (a list of rows) or .txt; '': the built-in language
  config.data.path = ""
  # What writes conversations: auto (the tokenizer's chat template), none, or a
  # file with a template.
  config.data.template = "auto"
  config.data.size = 4096  # the built-in language: texts, or pairs
  config.data.language = "reviews"  # notes, reviews, essays, by length
  # The class of the first word of this stage's texts and prompts: determiner,
  # pronoun, person; '': any.
  config.data.opening = ""
  # Reward units; the judge of pairs prefers by σ(Δgold / temperature).
  config.data.judge_temperature = 1.0
  config.data.sequence_length = 64  # tokens of a packed row (sft)
  config.data.heldout_fraction = 0.1

  config.train = ConfigDict()
  config.train.steps = 200
  config.train.batch_size = 64
  config.train.samples_every = 10  # steps between records in samples.jsonl

  config.mesh = ConfigDict()
  config.mesh.data = -1  # -1: the devices that fsdp and tensor leave
  config.mesh.fsdp = 1
  config.mesh.tensor = 1

  config.checkpoint = ConfigDict()
  config.checkpoint.every = 50  # steps; the last step is always saved
  config.checkpoint.keep = 2  # newest checkpoints that stay on disk

  # What a pipeline runs first, each a complete config of its own, in
  # sub-workdirs.
  config.pipeline = ConfigDict()

  # PPO under every one of these β with every one of these seeds, at once.
  config.sweep = ConfigDict()
  config.sweep.betas = ()  # (): kl.beta
  config.sweep.seeds = ()  # (): seed
  config.sweep.members_at_once = 0  # 0: as many as memory holds
  # Final policies on held-out prompts, and best-of-n of the reference.
  config.sweep.frontier = True
  config.sweep.best_of = 64  # largest n, a power of 2; 0: no best-of-n

  # What a policy is measured on.
  config.evaluate = ConfigDict()
  config.evaluate.prompts = 512  # held out; or all rows of a smaller data.path
  config.evaluate.against = ""  # whom it is to beat: a model; '': the reference
  config.evaluate.best_of = 0  # samples to a prompt, for best-of-n; 0: off
  config.evaluate.corpora = ()  # files of texts whose NLL is taken, 'A','B'

  config.lock()  # A config file that misspells a field is refused, too.
  config.pipeline.unlock()
  return config


def parse(
  argument: str, presets: Mapping[str, Callable[[], ConfigDict]]
) -> ConfigDict:
  """A preset with its overrides, as a config file's argument names them.

  Args:
    argument: `preset`, `preset,key=value,…` or `key=value,…`, which starts
      from the first preset, as the empty string does.
    presets: The file's presets by name.

  Raises:
    ValueError: There is no such preset or field, or a value does not fit.
  """
  name, *items = re.split(r",(?=[\w.]+=)", argument)
  if "=" in name:
    name, items = "", [name, *items]
  name = name or next(iter(presets))
  if name not in presets:
    raise ValueError(
      f"no preset {name!r}; the presets are {', '.join(presets)}"
    )
  config = presets[name]()
  apply_overrides(config, items)
  return config


def add_stage(config: ConfigDict, name: str, stage_config: ConfigDict) -> None:
  """Lets `config` make what it stands on; one seed and one network for both.

  The stage's seed and network follow `config`, unless they are set; so do the
  built-in language and its judge.
  """
  stage_config.seed = config.get_ref("seed").identity()
  for field in ("language", "judge_temperature"):
    stage_config.data[field] = config.data.get_ref(field).identity()
  for field in config.model:
    stage_config.model[field] = config.model.get_ref(field).identity()
  config.pipeline[name] = stage_config


def apply_overrides(config: ConfigDict, items: Iterable[str]) -> None:
  """Sets fields from `key=value` texts, each read as its field's type.

  Raises:
    ValueError: No field has the key, or the value is not of its type.
  """
  names = set(_field_names(config))
  for item in items:
    name, _, text = item.partition("=")
    if name not in names:
      raise ValueError(
        f"config.{name}: no such field{_did_you_mean(name, names)}"
      )
    kind = type(config[name])
    try:
      value = _READERS[kind](text)
    except (ValueError, KeyError, SyntaxError):
      raise ValueError(
        f"config.{name}: {text!r} is not of its type; wanted {kind.__name__},"
        f" such as {config[name]!r}"
      ) from None
    config.update_from_flattened_dict({name: value})


def check_complete(config: ConfigDict, name: str = "config") -> None:
  """Checks that the fields of `config` are those of this file, and their types.

  A config file that does not start from this one may lack a field or have one
  that nothing reads.

  Raises:
    ValueError: A field is missing, unknown or of another type.
  """
  wanted = get_config()
  wanted_names = set(_field_names(wanted))
  names = {n for n in _field_names(config) if not n.startswith("pipeline.")}
  for field in sorted(names - wanted_names):
    hint = _did_you_mean(field, wanted_names)
    raise ValueError(f"{name}.{field}: no such field{hint}")
  for field in sorted(wanted_names - names | {"pipeline"} - set(config)):
    raise ValueError(
      f"{name}.{field}: missing; start from configs.defaults.get_config()"
    )
  for field in sorted(names):
    if type(config[field]) is not type(wanted[field]):
      raise ValueError(
        f"{name}.{field}: {config[field]!r}; wanted"
        f" {type(wanted[field]).__name__}, such as {wanted[field]!r}"
      )
  for stage, stage_config in config.pipeline.items():
    check_complete(stage_config, f"{name}.pipeline.{stage}")


def _read_bool(text: str) -> bool:
  return {"true": True, "false": False}[text.lower()]


def _read_tuple(text: str) -> tuple:
  value = ast.literal_eval(text)
  return value if isinstance(value, tuple) else (value,)


_READERS = {
  bool: _read_bool,
  int: int,
  float: float,
  str: str,
  tuple: _read_tuple,
}


def _field_names(config: ConfigDict, prefix: str = "") -> Iterator[str]:
  """Dotted names of all fields that hold a value."""
  for name, value in config.items():
    if isinstance(value, ConfigDict):
      yield from _field_names(value, f"{prefix}{name}.")
    else:
      yield prefix + name


def _did_you_mean(name: str, names: Iterable[str]) -> str:
  # One that ends alike is meant before one that is spelled alike, and of these
  # the least nested: `learning_rate` is the optimiser's.
  ends = lambda full: full.rsplit(".", 1)[-1]
  alike = [full for full in names if ends(full) == ends(name)]
  matches = sorted(alike, key=lambda full: (full.count("."), full))
  matches = matches or difflib.get_close_matches(name, sorted(names), n=1)
  if matches:
    return f". Did you mean {matches[0]!r}?"
  return "; configs/defaults.py lists the fields"
