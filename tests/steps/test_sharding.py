"""Eight devices compute what one computes; four known bugs do not."""

import dataclasses
import itertools
import re

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import optax
import pytest

from rlhf_jax import errors, types
from rlhf_jax.models import transformer
from rlhf_jax.objective import advantages, kl
from rlhf_jax.objective import beta as beta_lib
from rlhf_jax.steps import (
  learner,
  ppo,
  reference,
  rewards,
  rollout,
  sharding,
)
from rlhf_jax.steps import optimizer as optimizer_lib
from tests.steps import tiny

B, P, R = 8, 4, 6
MESHES = [(8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 1, 8)]
# Every axis that is divided is a multiple of eight.
MODEL = transformer.TransformerConfig(
  vocab_size=16,
  width=16,
  layers=2,
  heads=8,
  kv_heads=8,
  head_size=2,
  mlp_width=24,
  max_length=16,
  unroll=1,
)
CONFIG = ppo.PPOConfig(
  model=MODEL,
  rollout=rollout.RolloutConfig(response_length=R, stop_ids=(3, 5, 13)),
  epochs=2,
)

# Where a parameter lives.


def architectures():
  """Parameters of every kind of network, with every head."""
  for norm, positions, tied, biased in itertools.product(
    ("rms", "layer"), ("rope", "learned"), (True, False), (True, False)
  ):
    yield dataclasses.replace(
      MODEL,
      norm=norm,
      positions=positions,
      tie_embeddings=tied,
      qkv_bias=biased,
      out_bias=biased,
      mlp_bias=biased,
      activation="gelu" if biased else "swiglu",
      qk_norm="heads" if biased else "head",
      norms_after=tied,
    )


def all_params(model):
  head = transformer.init_scalar_head(model.width, use_bias=True)
  return {
    "transformer": transformer.init(jax.random.key(0), model),
    "value_head": head,
    "score_head": head,
    "normalisation": {"mean": jnp.zeros(()), "std": jnp.ones(())},
  }


def names_of(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return [sharding.path_name(path) for path, _ in leaves]


def test_every_parameter_matches_one_rule_and_every_rule_is_needed():
  """Also in the optimiser's moments; no spec is longer than its array."""
  mesh = sharding.make_mesh(1, 1, 8)
  seen = set()
  for model in architectures():
    params = jax.eval_shape(lambda model=model: all_params(model))
    optimizer = optimizer_lib.make(optimizer_lib.OptimizerConfig(1e-3, 1))
    moments = jax.eval_shape(optimizer.init, params)
    sharding.shardings(moments, mesh)
    placed = jax.tree.leaves(sharding.shardings(params, mesh))
    for name, leaf, where in zip(
      names_of(params), jax.tree.leaves(params), placed
    ):
      assert len(where.spec) <= leaf.ndim, name
      seen |= {rule for rule, _ in sharding.RULES if re.search(rule, name)}
  assert seen == {rule for rule, _ in sharding.RULES}


def test_parameters_without_one_rule_are_refused_by_name(monkeypatch):
  leaf = jax.ShapeDtypeStruct((8, 8), jnp.float32)
  mesh = sharding.make_mesh(8, 1, 1)
  with pytest.raises(ValueError, match=r"layers/router/kernel matches 0 "):
    sharding.shardings({"layers": {"router": {"kernel": leaf}}}, mesh)
  rules = (*sharding.RULES, (r"tokens$", PartitionSpec()))
  monkeypatch.setattr(sharding, "RULES", rules)
  with pytest.raises(ValueError, match=r"embedding/tokens matches 2 "):
    sharding.shardings({"embedding": {"tokens": leaf}}, mesh)


def test_sizes_that_do_not_divide_are_the_users_to_mend():
  tree = {"embedding": {"tokens": jax.ShapeDtypeStruct((13, 8), jnp.float32)}}
  sharding.shardings(tree, sharding.make_mesh(2, 4, 1))
  with pytest.raises(
    errors.UserError, match=r"tensor = 2 .* 13, .*embedding/tokens \(13, 8\)"
  ):
    sharding.shardings(tree, sharding.make_mesh(2, 2, 2))


def test_only_members_divide_leading_axes():
  mesh = sharding.make_mesh(2, 2, 2)
  leaf = jax.ShapeDtypeStruct((3, 16, 8), jnp.float32)
  scalar = jax.ShapeDtypeStruct((3,), jnp.float32)
  tree = {"embedding": {"tokens": leaf}, "beta": scalar}
  specs = jax.tree.map(
    lambda x: x.spec, sharding.shardings(tree, mesh, leading=1)
  )
  wanted = PartitionSpec(None, "tensor", "fsdp")
  scalar = PartitionSpec(None)
  assert specs == {"embedding": {"tokens": wanted}, "beta": scalar}


def test_mesh_allows_constraints_inside_a_step():
  """Trap 27: JAX's default, Explicit axes, does not."""
  x = jnp.arange(16.0).reshape(4, 4)
  spec = PartitionSpec("data", "tensor")
  place = lambda x: lax.with_sharding_constraint(x, spec)
  with jax.set_mesh(sharding.make_mesh(2, 2, 2)):
    placed = jax.jit(place)(x)
  assert placed.addressable_shards[0].data.shape == (2, 2)
  np.testing.assert_array_equal(placed, x)
  explicit = jax.make_mesh((2, 2, 2), sharding.AXES)
  with jax.set_mesh(explicit), pytest.raises(AssertionError, match="Explicit"):
    jax.jit(place)(x)


# One device against eight.


OPTIMIZER = tiny.keep_gradient(0.5)
CONTROLLER = beta_lib.fixed()


@dataclasses.dataclass(frozen=True)
class Result:
  """What a step did, on the host."""

  tokens: np.ndarray
  loss: float
  gradient: dict


def run(step, mesh=None, *, same=False):
  """Step 0 against another model, or the same; returns state and metrics."""
  rng = np.random.default_rng(0)
  draw = lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), x.dtype)
  policy = jax.tree.map(draw, abstract_params("value_head"))
  held = reference.freeze(policy if same else jax.tree.map(draw, policy))
  reward_model = abstract_params("score_head", "normalisation")
  reward_model = jax.tree.map(draw, reward_model)
  state = ppo.init_state(
    policy, beta=0.1, optimizer=OPTIMIZER, controller=CONTROLLER
  )
  tokens = jnp.asarray(rng.integers(0, 16, (B, P)), jnp.int32)
  prompts = types.Prompts(tokens, jnp.array([4, 1, 2, 3, 4, 2, 1, 3]))
  key = jax.random.key(3)
  if mesh is None:
    return step(state, held, reward_model, prompts, key)
  models = state, held, reward_model
  models = jax.device_put(models, sharding.shardings(models, mesh))
  with jax.set_mesh(mesh):
    return step(*models, sharding.place_batch(prompts, mesh), key)


def abstract_params(*heads):
  params = jax.eval_shape(lambda: all_params(MODEL))
  return {name: params[name] for name in ("transformer", *heads)}


def result_of(state, metrics):
  scalars = metrics.scalars
  loss = scalars["ppo/policy_loss"] + 0.1 * scalars["ppo/value_loss"]
  tokens = metrics.samples.sequences.response_tokens
  return Result(
    tokens=np.array(tokens),
    loss=float(loss),
    gradient=jax.tree.map(np.array, state.optimizer),
  )


def agrees(a: Result, b: Result) -> bool:
  """Same tokens, loss within 1e-6, gradient within 1e-5, both relative."""
  difference = jax.tree.map(np.subtract, a.gradient, b.gradient)
  norm = lambda tree: float(optax.global_norm(tree))
  return bool(
    np.array_equal(a.tokens, b.tokens)
    and abs(a.loss - b.loss) <= 1e-6 * abs(b.loss)
    and norm(difference) <= 1e-5 * norm(b.gradient)
  )


def compile_step(config=CONFIG):
  step = ppo.make_step(
    config,
    score=rewards.from_model(MODEL),
    optimizer=OPTIMIZER,
    controller=CONTROLLER,
  )
  return jax.jit(step)


@pytest.fixture(scope="session")
def alone():
  """The result of one device, and its response lengths."""
  state, metrics = run(compile_step())
  return result_of(state, metrics), metrics


def test_the_comparison_is_of_something(alone):
  """Lengths differ, neither loss is 0, and every parameter has a gradient."""
  result, metrics = alone
  lengths = np.array(metrics.samples.sequences.response_lengths)
  assert len(set(lengths.tolist())) > 2
  assert abs(float(metrics.scalars["ppo/policy_loss"])) > 1e-3
  assert agrees(result, result)
  assert all(np.abs(g).max() > 1e-5 for g in jax.tree.leaves(result.gradient))


@pytest.mark.parametrize("shape", MESHES)
def test_eight_devices_agree_with_one(alone, shape):
  """Traps 9, 18, 26: and what was divided stays divided."""
  mesh = sharding.make_mesh(*shape)
  step = compile_step()
  state, metrics = run(step, mesh)
  result = result_of(state, metrics)
  assert agrees(result, alone[0])

  wanted = sharding.shardings(state, mesh)
  same = lambda x, where: x.sharding.is_equivalent_to(where, x.ndim)
  assert all(jax.tree.leaves(jax.tree.map(same, state, wanted)))
  kernel = state.params["transformer"]["layers"]["mlp"]["in"]["kernel"]
  data, fsdp, tensor = shape
  shard = kernel.addressable_shards[0].data.shape
  assert shard == (2, 16 // fsdp, 2, 24 // tensor)
  assert data * fsdp * tensor == len(kernel.sharding.device_set)

  _, metrics = run(step, mesh, same=True)
  for name, value in metrics.scalars.items():
    if name.startswith(("kl/reverse", "kl/forward", "kl/per_token")):
      assert float(value) == 0.0, name


def test_eight_devices_agree_on_the_exact_penalty():
  """Trap 26: with the reference's whole distribution in the loss, in chunks."""
  penalty = kl.PENALTIES["sequence_reverse", "rao_blackwellised"]
  config = dataclasses.replace(
    CONFIG, penalty=penalty, logits_per_chunk=6 * B * MODEL.vocab_size
  )
  found = run(compile_step(config), sharding.make_mesh(2, 2, 2))
  assert agrees(result_of(*found), result_of(*run(compile_step(config))))


# Four bugs of sharded training, computed on one device as eight would with a
# row each. A minibatch is `[microbatches, rows, …]`.


def mutate_psum(monkeypatch):
  """The gradient is never summed: the first shard's stands for all."""
  right = learner.gradient

  def mutant(params, minibatch, *rest):
    own = jax.tree.map(lambda x: x[:, :1], minibatch)
    return right(params, own, *rest)[0], right(params, minibatch, *rest)[1]

  monkeypatch.setattr(learner, "gradient", mutant)


def mutate_mean(monkeypatch):
  """Mean over shards of each one's own mean per token."""
  right = learner.gradient

  def mutant(params, minibatch, *rest):
    def of_shard(own):
      own = jax.tree.map(lambda x: x[:, None], own)
      tokens = own.sequences.response_lengths.sum()
      gradient = right(params, own, *rest)[0]
      return jax.tree.map(lambda g: g * R / tokens, gradient)

    gradients = jax.vmap(of_shard, in_axes=1)(minibatch)
    gradient = jax.tree.map(lambda g: g.mean(0), gradients)
    return gradient, right(params, minibatch, *rest)[1]

  monkeypatch.setattr(learner, "gradient", mutant)


def mutate_randomness(monkeypatch):
  """Every shard draws with the same key: one row's numbers are all rows'."""
  uniform = jax.random.uniform

  def mutant(key, shape):
    return jnp.tile(uniform(key, (shape[0], 1)), (1, shape[1]))

  monkeypatch.setattr(jax.random, "uniform", mutant)


def mutate_whitening(monkeypatch):
  """Each shard whitens by its own moments."""
  whiten = advantages.whiten

  def mutant(x, mask):
    whitened, scales = jax.vmap(whiten)(x[:, None], mask[:, None])
    return whitened[:, 0], scales.mean()

  monkeypatch.setattr(advantages, "whiten", mutant)


@pytest.mark.parametrize(
  "mutate", [mutate_psum, mutate_mean, mutate_randomness, mutate_whitening]
)
def test_mutants_disagree(alone, mutate, monkeypatch):
  """Trap 26: the comparison sees each of the four bugs."""
  mutate(monkeypatch)
  mutant = result_of(*run(compile_step()))
  assert not agrees(mutant, alone[0])
