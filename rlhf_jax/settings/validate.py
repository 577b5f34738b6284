"""What a config must satisfy, checked before anything is loaded or compiled.

The rules are tables (`settings.rules`). What does not fit a row is a generator
of `(field, complaint)`. `validate_fields` needs only the config, and no JAX,
which is slow to import; `validate_mesh` needs the number of devices,
`validate_model` the network that a stage loaded.

Left out: whether a field exists and its type (the configs are locked and
typed), and what only the data, the tokenizer or the reward function can tell.
"""

from collections.abc import Iterable, Iterator
import difflib
import os
from typing import Any

from ml_collections import ConfigDict

from rlhf_jax import errors
from rlhf_jax.settings import rules

Complaints = Iterator[tuple[str, str]]


def validate_fields(config: ConfigDict) -> None:
  """Checks all that can be seen from the config alone, its stages included.

  Raises:
    UserError: A field, or several together, cannot be used.
  """
  _check(config, "config", _FIELD_RULES)


def validate_mesh(config: ConfigDict, *, device_count: int) -> None:
  """Checks that the mesh fills the devices and divides the batch.

  Raises:
    UserError: It does not.
  """
  _check(config, "config", (lambda c: _mesh(c, device_count),))


def validate(config: ConfigDict, *, device_count: int) -> None:
  """`validate_fields`, then `validate_mesh`.

  Raises:
    UserError: As they do.
  """
  validate_fields(config)
  validate_mesh(config, device_count=device_count)


def validate_model(config: ConfigDict, model: Any) -> None:
  """Checks the config against the architecture that a stage has loaded.

  Raises:
    UserError: Texts outgrow its positions, a stop id its vocabulary, or an
      axis of the mesh does not divide it.
  """
  _raise_first(_model_rules(config, model), "config")


def suggest(name: str, options: Iterable[str]) -> str:
  """A question that ends a message, or nothing where no option is close."""
  matches = difflib.get_close_matches(name, list(options), n=1)
  return f". Did you mean {matches[0]!r}?" if matches else ""


def _check(config: ConfigDict, prefix: str, checks) -> None:
  for check in checks:
    _raise_first(check(config), prefix)
  for name, stage_config in config.pipeline.items():
    _check(stage_config, f"{prefix}.pipeline.{name}", checks)


def _raise_first(complaints: Complaints, prefix: str) -> None:
  for field, complaint in complaints:
    raise errors.UserError(f"{prefix}.{field}: {complaint}")


def _choices(config: ConfigDict) -> Complaints:
  for field, options in rules.CHOICES.items():
    value = config[field]
    if value not in options:
      wanted = " or ".join(map(repr, options))
      yield field, f"{value!r}; wanted {wanted}{suggest(value, options)}"


def _penalty(config: ConfigDict) -> Complaints:
  """The gradient's target, or a recipe that is asked for with open eyes."""
  gradient, estimator = config.kl.gradient, config.kl.estimator
  if gradient in rules.TARGETS:
    return
  wanted = " or ".join(map(repr, rules.TARGETS))
  if gradient not in rules.RECIPES:
    recipes = f"; recipes, with kl.allow_biased: {', '.join(rules.RECIPES)}"
    names = (*rules.TARGETS, *rules.RECIPES)
    yield (
      "kl.gradient",
      f"{gradient!r}; wanted {wanted}{suggest(gradient, names)}{recipes}",
    )
    return
  fitting, truth = rules.RECIPES[gradient]
  if not config.kl.allow_biased:
    yield (
      "kl.gradient",
      f"{gradient!r}: its gradient is {truth}; wanted {wanted}, or"
      " kl.allow_biased=True to run it all the same",
    )
  if estimator != fitting:
    yield (
      "kl.estimator",
      f"{estimator!r}; wanted {fitting!r}, the only one that"
      f" kl.gradient={gradient!r} has",
    )


def _ranges(config: ConfigDict) -> Complaints:
  for wanted, holds, fields in rules.RANGES:
    for field in fields.split():
      value = config[field]
      if not rules.is_number(value) or not holds(value):
        yield field, f"{value}; wanted {wanted}"


def _rules(config: ConfigDict) -> Complaints:
  for field, holds, wanted in rules.RULES:
    if not holds(config):
      yield field, f"{config[field]!r}; wanted {wanted.format(c=config)}"


def _model_rules(config: ConfigDict, model) -> Complaints:
  for field, holds, wanted in rules.MODEL_RULES:
    if not holds(config, model):
      wanted = wanted.format(c=config, m=model)
      yield field, f"{config[field]!r}; wanted {wanted}"


def _random_start(config: ConfigDict) -> Complaints:
  if not config.policy.path:
    yield from _model_rules(config, config.model)


def _paths(config: ConfigDict) -> Complaints:
  fields = (
    *("policy.path", "policy.tokenizer", "reference.path", "reward.path"),
    "evaluate.against",
  )
  for field in fields:
    if config[field] and not os.path.isdir(config[field]):
      yield field, f"{config[field]!r}; wanted '' or a directory that exists"
  for path in config.reward.ensemble:
    if not isinstance(path, str) or not os.path.isdir(path):
      yield "reward.ensemble", f"{path!r}; wanted directories that exist"
  for path in config.evaluate.corpora:
    if not isinstance(path, str) or not os.path.isfile(path):
      yield "evaluate.corpora", f"{path!r}; wanted files that exist"
  corpora = config.evaluate.corpora
  names = {os.path.splitext(os.path.basename(path))[0] for path in corpora}
  if len(names) < len(corpora):
    yield (
      "evaluate.corpora",
      f"{corpora!r}; wanted files of different names, which name their figures",
    )
  members = list(filter(None, (config.reward.path, *config.reward.ensemble)))
  if len(set(map(os.path.realpath, members))) < len(members):
    yield (
      "reward.ensemble",
      f"{config.reward.ensemble!r} beside reward.path={config.reward.path!r};"
      " wanted each model once: one agrees with itself",
    )
  for field in ("data.path", "mix.path"):
    if config[field] and not os.path.isfile(config[field]):
      yield field, f"{config[field]!r}; wanted '' or a file that exists"


def _pipeline(config: ConfigDict) -> Complaints:
  """The stages before PPO: their names, one language and one network."""
  for name, part in config.pipeline.items():
    field = f"pipeline.{name}"
    options = ("sft", "reward_model")
    if name not in options:
      yield field, f"no such stage; wanted {options}{suggest(name, options)}"
    if part.stage != name:
      yield f"{field}.stage", f"{part.stage!r}; wanted {name!r}"
    if config.policy.path:
      continue
    for owner, data in (("", config.data), (f"{field}.", part.data)):
      if data.path:
        yield (
          f"{owner}data.path",
          f"{data.path!r}; wanted '' (the built-in language) in a pipeline;"
          " on data of your own run the stages one by one",
        )
    for key, value in part.model.items():
      if value != config.model[key]:
        yield (
          f"{field}.model.{key}",
          f"{value!r}; wanted config.model.{key}={config.model[key]!r}: all"
          " stages have one network; set config.model only",
        )


def _mesh(config: ConfigDict, device_count: int) -> Complaints:
  data, fsdp, tensor = (config.mesh[a] for a in ("data", "fsdp", "tensor"))
  rows = config.train.batch_size
  of = "train.batch_size"
  if rules.runs_ppo(config):
    rows //= config.ppo.minibatches * config.ppo.microbatches
    of = "train.batch_size / ppo.minibatches / ppo.microbatches"
  rest = device_count // (fsdp * tensor) if data == -1 else data
  if rest * fsdp * tensor != device_count:
    shapes = [
      f"{d}×{f}×{t}"
      for d, f, t in _shapes(device_count)
      if rows % (d * f) == 0 and config.model.kv_heads % t == 0
    ]
    yield (
      "mesh",
      f"data×fsdp×tensor = {data}×{fsdp}×{tensor}; wanted a product of"
      f" {device_count} devices, as {' or '.join(shapes) or 'none does here'}",
    )
  if rows % (rest * fsdp):
    yield (
      "train.batch_size",
      f"{config.train.batch_size}, so {rows} rows at a time ({of}); wanted a"
      f" multiple of mesh.data × mesh.fsdp = {rest} × {fsdp} = {rest * fsdp}",
    )
  pieces = config.ppo.minibatches * config.ppo.microbatches
  if config.mix.kind != "none" and (
    config.mix.batch_size % (pieces * rest * fsdp)
  ):
    yield (
      "mix.batch_size",
      f"{config.mix.batch_size}; wanted a multiple of ppo.minibatches ×"
      f" ppo.microbatches × mesh.data × mesh.fsdp = {pieces * rest * fsdp}",
    )


def _shapes(device_count: int) -> Iterator[tuple[int, int, int]]:
  divisors = [d for d in range(1, device_count + 1) if device_count % d == 0]
  for tensor in divisors:
    for fsdp in divisors:
      if device_count % (fsdp * tensor) == 0:
        yield device_count // (fsdp * tensor), fsdp, tensor


# In this order: a rule may rely on those before it.
_FIELD_RULES = (
  _choices,
  _penalty,
  _ranges,
  _rules,
  _random_start,
  _paths,
  _pipeline,
)
