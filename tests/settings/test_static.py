"""From config to settings: the right controller, the right penalty."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from configs import ppo
from rlhf_jax import errors
from rlhf_jax.objective import kl
from rlhf_jax.settings import static, validate
from rlhf_jax.storage import pretrained

NO_READING = jnp.float32(jnp.nan)


def path_of(overrides, *, readings, reliability=NO_READING, beta=0.1):
  """β before each of the updates with these KLs, and after the last."""
  config = ppo.get_config(overrides)
  validate.validate_fields(config)
  controller = static.controller(config)
  state = controller.init(beta)
  betas = [controller.value(state)]
  for reading in readings:
    state = controller.update(state, jnp.float32(reading), reliability)
    betas.append(controller.value(state))
  return np.array(betas)


@pytest.mark.parametrize(
  "overrides, readings, wanted",
  [
    ("kl.controller=fixed", [0, 100], [0.1, 0.1, 0.1]),
    # 1 + 0.2 / 5 a step: the error is (12 − 6) / 6, of which 0.2 count.
    (
      "kl.controller=ziegler,kl.target=6,kl.ziegler.horizon=5",
      [12, 12],
      [0.1, 0.104, 0.10816],
    ),
    # log β − log β₀ = ½ + 0.1 (e₁ + … + e_n) + ½ e_n, e = −1 and then ½.
    (
      "kl.controller=pi,kl.target=4,kl.pi.integral=0.1",
      [0, 6],
      0.1 * np.exp([0, -0.1, 0.5 - 0.05 + 0.25]),
    ),
    # β + 0.02 e, e = ½ and then −1.
    (
      "kl.controller=dual,kl.target=4,kl.dual.learning_rate=0.02",
      [6, 0],
      [0.1, 0.11, 0.09],
    ),
    # From 1 to ¼ in four steps, whatever the KL.
    (
      "kl.controller=schedule,kl.schedule.shape=linear,kl.schedule.end=0.25,"
      "kl.schedule.steps=4",
      [0, 9, 0, 9, 0],
      [0.1, 0.08125, 0.0625, 0.04375, 0.025, 0.025],
    ),
    # Steps of 0 are those of the run.
    (
      "kl.controller=schedule,kl.schedule.shape=exponential,"
      "kl.schedule.end=0.01,train.steps=2",
      [0, 0, 0],
      [0.1, 0.01, 0.001, 0.001],
    ),
    # A bound on the way: 0.1 · 1.02 is beyond 0.101.
    (
      "kl.controller=ziegler,kl.target=6,kl.beta_max=0.101",
      [12],
      [0.1, 0.101],
    ),
  ],
)
def test_the_controller_is_the_one_that_is_named(overrides, readings, wanted):
  found = path_of(overrides, readings=readings)
  np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_trust_reads_the_reliability():
  """R = ½ · ½ + ½ · 0.9 = 0.7; half way from chance to 0.9: √(β₀ · β_min)."""
  found = path_of(
    "kl.controller=trust,kl.trust.decay=0.5,kl.trust.reliability_wanted=0.9,"
    "kl.trust.beta_min=0.001",
    readings=[5],
    reliability=jnp.float32(0.9),
  )
  np.testing.assert_allclose(found, [0.1, 0.01], rtol=1e-5)


@pytest.mark.parametrize(
  "field, of",
  [
    ("kl.target", "controller=ziegler"),
    ("kl.target", "controller=pi"),
    ("kl.target", "controller=dual"),
    ("kl.beta_min", "controller=ziegler,kl.target=6"),
    ("kl.beta_min", "controller=pi,kl.target=6"),
    ("kl.beta_max", "controller=ziegler,kl.target=6"),
    ("kl.beta_max", "controller=dual,kl.target=6"),
    ("kl.ziegler.horizon", "controller=ziegler,kl.target=6"),
    ("kl.pi.proportional", "controller=pi,kl.target=6"),
    ("kl.pi.integral", "controller=pi,kl.target=6"),
    ("kl.dual.learning_rate", "controller=dual,kl.target=6"),
    ("kl.trust.reliability_wanted", "controller=trust"),
    ("kl.trust.beta_min", "controller=trust"),
    ("kl.trust.decay", "controller=trust"),
    ("kl.schedule.end", "controller=schedule,kl.schedule.shape=exponential"),
    ("kl.schedule.end", "controller=schedule,kl.schedule.shape=linear"),
  ],
)
def test_validation_lets_nothing_through_that_a_controller_refuses(field, of):
  """Trap 13. A refusal after the SFT stage would come an hour late."""
  exponents = 10.0 ** np.arange(-12, 13)
  values = [0.0, 0.5, 0.505, 0.9, 0.9999, 0.99995, *exponents]
  accepted, refused = [], []
  for sign, value in itertools.product((1, -1), values):
    config = ppo.get_config(f"kl.{of},{field}={sign * value}")
    try:
      validate.validate_fields(config)
    except errors.UserError:
      refused.append(value)
      continue
    accepted.append(value)
    static.controller(config)
  assert accepted and refused


def test_what_slips_through_names_the_controller():
  config = ppo.get_config("kl.controller=pi,kl.target=0")
  with pytest.raises(errors.UserError, match=r"^config\.kl, pi: target: 0"):
    static.controller(config)


def test_the_step_is_compiled_with_the_penalty_and_the_groups():
  config = ppo.get_config(
    "kl.gradient=token_forward,kl.estimator=rao_blackwellised,"
    "ppo.advantages=grpo,ppo.group_size=8,ppo.length_normalisation=true"
  )
  policy = pretrained.load_policy(config)
  found = static.ppo_config(config, policy, policy)
  assert found.penalty is kl.PENALTIES["token_forward", "rao_blackwellised"]
  assert found.reference == found.model == policy.model
  assert (found.advantages, found.group_size) == ("grpo", 8)
  assert found.length_normalisation and found.normalise_groups


def test_responses_are_drawn_as_the_config_says():
  """Also where it names its own stop ids, and not the model's."""
  drawn = "rollout.temperature=0.7,rollout.top_k=5,rollout.top_p=0.9"
  config = ppo.get_config(f"{drawn},rollout.response_length=9")
  policy = pretrained.load_policy(config)
  found = static.rollout_config(config, policy)
  assert (found.temperature, found.top_k, found.top_p) == (0.7, 5, 0.9)
  assert (found.response_length, found.pad_id) == (9, policy.pad_id)
  assert found.stop_ids == policy.stop_ids
  for stop_ids in ((5, 7), ()):
    config.rollout.stop_ids = stop_ids
    assert static.rollout_config(config, policy).stop_ids == stop_ids
  assert static.ppo_config(config, policy, policy).rollout.temperature == 0.7


def test_the_schedule_counts_updates():
  """The config counts steps; a step of PPO has an update a minibatch."""
  config = ppo.get_config("train.steps=10,optimizer.warmup_steps=3")
  found = static.optimizer_config(config, updates_per_step=4)
  assert (found.updates, found.warmup_updates) == (40, 12)
  assert static.optimizer_config(config).updates == 10
