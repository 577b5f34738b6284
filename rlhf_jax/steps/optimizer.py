"""AdamW with a schedule and a global gradient clip."""

from collections.abc import Callable
import dataclasses
from typing import Any, Literal

import jax
from jaxtyping import Array, Float
import optax

from rlhf_jax import types
from rlhf_jax.models import transformer

Scalars = dict[str, Float[Array, ""]]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) and its schedule.

  Attributes:
    updates: Optimiser updates of the whole run: where the schedule ends.
    schedule: After a linear warm-up, constant, or down to 0 at the end.
    max_grad_norm: Gradients longer than this are scaled down to it.
  """

  learning_rate: float
  updates: int
  schedule: Literal["constant", "linear", "cosine"] = "constant"
  warmup_updates: int = 0
  weight_decay: float = 0.0
  b1: float = 0.9
  b2: float = 0.999
  epsilon: float = 1e-8
  max_grad_norm: float = 1.0


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
  """The learning rate at each optimiser update."""
  rest = max(config.updates - config.warmup_updates, 1)
  after = {
    "constant": optax.constant_schedule(config.learning_rate),
    "linear": optax.linear_schedule(config.learning_rate, 0.0, rest),
    "cosine": optax.cosine_decay_schedule(config.learning_rate, rest),
  }[config.schedule]
  if not config.warmup_updates:
    return after
  # The first update already moves: it has the first step of the ramp.
  ramp = optax.linear_schedule(
    config.learning_rate / config.warmup_updates,
    config.learning_rate,
    max(config.warmup_updates - 1, 1),
  )
  return optax.join_schedules([ramp, after], [config.warmup_updates])


def make(config: OptimizerConfig) -> optax.GradientTransformation:
  """The optimiser; weights decay, norms and biases do not."""
  return optax.chain(
    optax.clip_by_global_norm(config.max_grad_norm),
    optax.adamw(
      learning_rate(config),
      b1=config.b1,
      b2=config.b2,
      eps=config.epsilon,
      weight_decay=config.weight_decay,
      mask=_is_weight,
    ),
  )


def apply(
  optimizer: optax.GradientTransformation,
  params: types.Params,
  optimizer_state: optax.OptState,
  gradient: types.Params,
) -> tuple[types.Params, optax.OptState]:
  """Parameters and optimiser state after one update."""
  updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
  return optax.apply_updates(params, updates), optimizer_state


def one_update_step(
  loss: Callable[[types.Params, Any, Any], tuple[Float[Array, ""], Scalars]],
  optimizer: optax.GradientTransformation,
  *,
  name: str,
) -> Callable[[types.TrainState, Any], tuple[types.TrainState, Scalars]]:
  """A step that is one update: `state, scalars = step(state, batch)`.

  Args:
    loss: `(params, batch, beta) → (loss, scalars)`.
    optimizer: From `make`.
    name: Of the metric `{name}/grad_norm`, which joins the loss's.
  """

  def step(state, batch):
    batch = jax.tree.map(transformer.shard_batch, batch)
    gradient, scalars = jax.grad(loss, has_aux=True)(
      state.params, batch, state.beta
    )
    params, optimizer_state = apply(
      optimizer, state.params, state.optimizer, gradient
    )
    state = dataclasses.replace(
      state, step=state.step + 1, params=params, optimizer=optimizer_state
    )
    return state, scalars | {f"{name}/grad_norm": optax.global_norm(gradient)}

  return step


def _is_weight(params: types.Params):
  return jax.tree_util.tree_map_with_path(
    lambda path, _: path[-1].key in ("kernel", "tokens"), params
  )
