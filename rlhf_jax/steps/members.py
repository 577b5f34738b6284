"""One step over the members of a sweep, in one compiled program."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from rlhf_jax.steps import sharding


def step_of_all(
  step: Callable[..., Any], mesh: Mesh, *, vectorise: bool
) -> Callable[..., Any]:
  """The step over states, batches and keys with a leading axis of members.

  Vectorised, the members' operations are one: what an accelerator wants, on
  which a small model's leave most of it idle. A CPU gains nothing from it, and
  loses by matrices that no longer fit its caches: there each device takes its
  members one after another, and a member equals the single run to the last
  bit.

  Args:
    step: `step(state, reference, reward_model, batch, key)`; vectorised, it
      may use the axis `sharding.MEMBER_AXIS`.
    mesh: Its axis of members, if it has one, divides them.
    vectorise: Whether `vmap` or a loop; see `vectorises`.
  """
  axis = sharding.MEMBER_AXIS
  divided = axis in mesh.axis_names
  if vectorise:
    return jax.vmap(
      step,
      in_axes=(0, None, None, 0, 0),
      axis_name=axis,
      spmd_axis_name=axis if divided else None,
    )

  def each(states, reference, reward_model, batches, keys):
    def one(member):
      state, batch, key = member
      return step(state, reference, reward_model, batch, key)

    return lax.map(one, (states, batches, keys))

  if not divided:
    return each
  # All axes are ours, though one is divided: a reward on the host needs that.
  return jax.shard_map(
    each,
    mesh=mesh,
    in_specs=(P(axis), P(), P(), P(axis), P(axis)),
    out_specs=P(axis),
    check_vma=False,
  )


def vectorises(mesh: Mesh) -> bool:
  """Whether members are one operation: but where a CPU's device has whole ones.

  Where a member is divided itself, `vmap` leaves the division to XLA.
  """
  is_cpu = mesh.devices.flat[0].platform == "cpu"
  has_whole = mesh.size == mesh.shape.get(sharding.MEMBER_AXIS, 1)
  return not (is_cpu and has_whole)
