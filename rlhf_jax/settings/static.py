"""From the config's fields to the settings that the steps are compiled with."""

import math

import jax
from ml_collections import ConfigDict

from rlhf_jax import errors
from rlhf_jax.objective import beta, kl
from rlhf_jax.settings import devices
from rlhf_jax.settings import prefix as prefix_lib
from rlhf_jax.steps import optimizer, ppo, rollout, sharding, text_mix
from rlhf_jax.storage import pretrained as pretrained_lib

LOGITS = 2**24  # 64 MiB of float32.


def mesh(config: ConfigDict, *, members: int = 1) -> jax.sharding.Mesh:
  """The mesh; a `data` of −1 takes the devices that the others leave.

  Of these a sweep's members take as many as divide them: policies that know
  nothing of each other need no communication. Cores that were divided are for
  members alone.
  """
  fsdp, tensor = config.mesh.fsdp, config.mesh.tensor
  data, member = config.mesh.data, 1
  if data == -1:
    rest = devices.count() // (fsdp * tensor)
    member = math.gcd(rest, members)
    data = rest // member
    if devices.are_divided_cores():
      member = min(jax.device_count(), members)
  return sharding.make_mesh(data, fsdp, tensor, member=member)


def optimizer_config(
  config: ConfigDict, *, updates_per_step: int = 1
) -> optimizer.OptimizerConfig:
  """The optimiser; the config counts steps, its schedule counts updates."""
  fields = config.optimizer.to_dict()
  warmup_steps = fields.pop("warmup_steps")
  return optimizer.OptimizerConfig(
    updates=config.train.steps * updates_per_step,
    warmup_updates=warmup_steps * updates_per_step,
    **fields,
  )


def rollout_config(
  config: ConfigDict, pretrained: pretrained_lib.Pretrained
) -> rollout.RolloutConfig:
  """How responses are drawn; stop ids of (-1,) are the model's own."""
  stop_ids = tuple(config.rollout.stop_ids)
  return rollout.RolloutConfig(
    response_length=config.rollout.response_length,
    temperature=config.rollout.temperature,
    top_k=config.rollout.top_k,
    top_p=config.rollout.top_p,
    stop_ids=pretrained.stop_ids if stop_ids == (-1,) else stop_ids,
    pad_id=pretrained.pad_id,
  )


def ppo_config(
  config: ConfigDict,
  pretrained: pretrained_lib.Pretrained,
  reference: pretrained_lib.Pretrained,
  *,
  members: int = 1,
) -> ppo.PPOConfig:
  """The static settings of a step, of which `members` run at once.

  Raises:
    UserError: The prefix cannot be put in front of prompts.
  """
  prefix = prefix_lib.of(config, pretrained)
  mix = None
  if config.mix.kind != "none":
    mix = text_mix.Mix(config.mix.kind, config.mix.coefficient)
  return ppo.PPOConfig(
    model=pretrained.model,
    rollout=rollout_config(config, pretrained),
    reference=reference.model,
    penalty=kl.PENALTIES[config.kl.gradient, config.kl.estimator],
    prefix=None if prefix is None else prefix.place,
    anchored=config.kl.anchored,
    mix=mix,
    logits_per_chunk=logits_per_chunk(config, members=members),
    **config.ppo.to_dict(),
  )


def controller(config: ConfigDict) -> beta.Controller:
  """What moves β, as `config.kl` says.

  Raises:
    UserError: A constant is outside its range.
  """
  name = config.kl.controller
  try:
    return _controller(name, config.kl, config.train.steps)
  except errors.UserError as error:
    raise errors.UserError(f"config.kl, {name}: {error}") from error


def _controller(name: str, fields: ConfigDict, steps: int) -> beta.Controller:
  target = {"target": fields.target, "beta_max": fields.beta_max}
  match name:
    case "fixed":
      return beta.fixed()
    case "schedule":
      schedule = fields.schedule.to_dict()
      return beta.relax(**schedule | {"steps": schedule["steps"] or steps})
    case "ziegler":
      return beta.ziegler(**target, beta_min=fields.beta_min, **fields.ziegler)
    case "pi":
      return beta.pi(**target, beta_min=fields.beta_min, **fields.pi)
    case "dual":
      return beta.dual(**target, **fields.dual)
    case "trust":
      return beta.trust(**fields.trust)
  raise ValueError(name)


def logits_per_chunk(config: ConfigDict, *, members: int = 1) -> int:
  """Logits of a member that may exist at once: `LOGITS` on each device."""
  return max(1, LOGITS * mesh(config).size // members)
