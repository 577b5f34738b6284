"""Who plays what in a run: the policy, the reference, the reward."""

import dataclasses
from typing import NamedTuple

from ml_collections import ConfigDict

from rlhf_jax import errors, types
from rlhf_jax.settings import validate
from rlhf_jax.steps import rewards
from rlhf_jax.storage import checkpoint
from rlhf_jax.storage import pretrained as pretrained_lib
from rlhf_jax.text import rewards as text_rewards


@dataclasses.dataclass(frozen=True)
class Reward:
  """The reward of a run: its parameters, its function, and who it is."""

  params: types.Params
  score: rewards.Score
  identity: str
  normalised: bool = False
  agreement: rewards.Agreement | None = None
  host: text_rewards.TextReward | None = None


class Models(NamedTuple):
  """Who plays what; the reference and the reward stay as they are."""

  policy: pretrained_lib.Pretrained
  reference: pretrained_lib.Pretrained
  reward: Reward


def load(config: ConfigDict) -> Models:
  """The models that the config names, checked against it and each other."""
  policy = pretrained_lib.load_policy(config)
  validate.validate_model(config, policy.model)
  return Models(policy, reference(config, policy), reward(config, policy))


def reference(
  config: ConfigDict, policy: pretrained_lib.Pretrained
) -> pretrained_lib.Pretrained:
  """What the policy is held to: itself, or the model at `reference.path`."""
  if not config.reference.path:
    return policy
  held = pretrained_lib.load(config.reference.path, config)
  if "score_head" in held.params:
    raise errors.UserError(
      f"config.reference.path: {held.where} is a reward model; wanted a"
      " language model"
    )
  pretrained_lib.check_same_tokenizer(policy, held)
  sizes = policy.model.vocab_size, held.model.vocab_size
  if sizes[0] != sizes[1]:
    raise errors.UserError(
      f"config.reference.path: {held.where} has {sizes[1]} logits, the policy"
      f" {policy.where} has {sizes[0]}; the KL needs one vocabulary"
    )
  validate.validate_model(config, held.model)
  return held


def reward(config: ConfigDict, policy: pretrained_lib.Pretrained) -> Reward:
  """What pays the responses: reward models, or a function of yours."""
  if config.reward.kind == "model":
    if not config.reward.path:
      raise errors.UserError(
        "config.reward.path: ''; wanted a reward model's workdir; make one with"
        " configs/reward_model.py, or set config.reward.kind"
      )
    paths = config.reward.path, *config.reward.ensemble
    models = [_reward_model(config, path, policy) for path in paths]
    identity = ", ".join(checkpoint.tree_hash(m.params) for m in models)
    if len(models) == 1:
      params, score = models[0].params, rewards.from_model(models[0].model)
      return Reward(params, score, identity, normalised=True)
    score, agreement = rewards.from_ensemble(
      [m.model for m in models], group_size=config.ppo.group_size
    )
    params = {"members": tuple(m.params for m in models)}
    return Reward(params, score, identity, normalised=True, agreement=agreement)
  name = config.reward.function
  function = text_rewards.load_function(name)
  if config.reward.kind == "function":
    text_rewards.check_traced(name, function)
    return Reward({}, rewards.from_function(function), name)
  host = text_rewards.TextReward(
    name,
    function,
    policy.tokenizer,
    special_tokens=config.reward.special_tokens,
  )
  return Reward({}, rewards.from_host(host), name, host=host)


def _reward_model(config, path, policy) -> pretrained_lib.Pretrained:
  model = pretrained_lib.load(path, config)
  validate.validate_model(config, model.model)
  if "score_head" not in model.params:
    raise errors.UserError(
      f"config.reward: {model.where} is no reward model: it has no score head;"
      " make one with configs/reward_model.py"
    )
  pretrained_lib.check_same_tokenizer(policy, model)
  return model
