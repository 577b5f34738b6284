"""From the config's fields to the settings that the steps are compiled with."""

import jax
from ml_collections import ConfigDict

from rlhf_jax.host import pretrained as pretrained_lib
from rlhf_jax.steps import optimizer, ppo, rollout, sharding


def mesh(config: ConfigDict) -> jax.sharding.Mesh:
  """The mesh; a `data` of −1 takes the devices that the others leave."""
  fsdp, tensor = config.mesh.fsdp, config.mesh.tensor
  data = config.mesh.data
  if data == -1:
    data = jax.device_count() // (fsdp * tensor)
  return sharding.make_mesh(data, fsdp, tensor)


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
  config: ConfigDict, pretrained: pretrained_lib.Pretrained
) -> ppo.PPOConfig:
  """The step's static settings."""
  return ppo.PPOConfig(
    model=pretrained.model,
    rollout=rollout_config(config, pretrained),
    logits_per_chunk=logits_per_chunk(config),
    **config.ppo.to_dict(),
  )


def logits_per_chunk(config: ConfigDict) -> int:
  """Logits that may exist at once: 64 MiB of float32 on each device."""
  return 2**24 * mesh(config).size
