"""The mesh, and where each parameter lives on it.

Axes: `data` copies the parameters, `fsdp` divides them by rows, `tensor`
divides heads, mlp and vocabulary; data and fsdp together divide the batch.
A parameter finds its PartitionSpec by a regular expression on its path, and
must match exactly one. Moments of the optimiser carry their parameter's path
at their end and so fall under the same rule. A sweep's mesh has an axis
`member` in front: `step_of_all` runs one step over all members.
"""

from collections.abc import Callable
import math
import re
from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rlhf_jax import errors, types

AXES = (*types.BATCH_AXES, types.MODEL_AXIS)
MEMBER_AXIS = "member"  # Of a sweep's mesh, in front of the others.

# Axes of each parameter: see the docstring of models/transformer.py.
RULES = (
  (r"(^|/)embedding/tokens$", P("tensor", "fsdp")),
  (r"(^|/)embedding/positions$", P(None, "fsdp")),
  (r"(^|/)layers/(attention|mlp)(_post)?_norm/(scale|bias)$", P()),
  (r"(^|/)attention/qkv/kernel$", P(None, "fsdp", "tensor")),
  (r"(^|/)attention/qkv/bias$", P(None, "tensor")),
  (r"(^|/)attention/qk_norm/(query|key)$", P()),
  (r"(^|/)attention/out/kernel$", P(None, "tensor", None, None, "fsdp")),
  (r"(^|/)attention/out/bias$", P()),
  (r"(^|/)mlp/in/kernel$", P(None, "fsdp", None, "tensor")),
  (r"(^|/)mlp/in/bias$", P(None, None, "tensor")),
  (r"(^|/)mlp/out/kernel$", P(None, "tensor", "fsdp")),
  (r"(^|/)mlp/out/bias$", P()),
  (r"(^|/)final_norm/(scale|bias)$", P()),
  (r"(^|/)lm_head/kernel$", P("tensor", "fsdp")),
  (r"(^|/)(value|score)_head/(kernel|bias)$", P()),
  (r"(^|/)normalisation/(mean|std)$", P()),
)


def make_mesh(data: int, fsdp: int, tensor: int, *, member: int = 1) -> Mesh:
  """A mesh `data × fsdp × tensor` over the first devices that it needs.

  With `member` above 1 it has an axis `member` in front, which divides a
  sweep's members and nothing else.
  """
  shape, axes = (data, fsdp, tensor), AXES
  if member > 1:
    shape, axes = (member, *shape), (MEMBER_AXIS, *AXES)
  # Auto: make_mesh defaults to Explicit axes, under which a sharding
  # constraint inside a step is an error.
  auto = (AxisType.Auto,) * len(axes)
  devices = jax.devices()[: math.prod(shape)]
  return jax.make_mesh(shape, axes, axis_types=auto, devices=devices)


def path_name(path: tuple[Any, ...]) -> str:
  """A pytree path as `a/b/c`."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def spec_of(name: str) -> P:
  """The PartitionSpec of the parameter at this path.

  Raises:
    ValueError: No rule matches, or several do; the path is named.
  """
  matches = [spec for rule, spec in RULES if re.search(rule, name)]
  if len(matches) != 1:
    raise ValueError(
      f"parameter {name} matches {len(matches)} sharding rules; exactly one "
      "of steps.sharding.RULES must match it"
    )
  return matches[0]


def shardings(tree: Any, mesh: Mesh, *, leading: int = 0) -> Any:
  """A NamedSharding for each leaf of parameters or of a whole train state.

  Scalars (counters, β) are on every device.

  Args:
    tree: Arrays or their shapes.
    mesh: From `make_mesh`.
    leading: Axes before the parameter's own: 1 in a sweep, whose members
      the mesh's `member` axis divides, if it has one.

  Raises:
    UserError: A dimension is not a multiple of the axes that divide it.
  """
  members = _members_spec(mesh, leading)

  def sharding(path, leaf):
    name = path_name(path)
    if leaf.ndim == leading:
      return NamedSharding(mesh, P(*members))
    spec = spec_of(name)
    for size, axes in zip(leaf.shape[leading:], spec):
      axes = (axes,) if isinstance(axes, str) else axes or ()
      parts = math.prod(mesh.shape[axis] for axis in axes)
      if size % parts:
        raise errors.UserError(
          f"config.mesh: {' × '.join(axes)} = {parts} does not divide "
          f"{size}, an axis of {name} {leaf.shape}; choose a divisor"
        )
    return NamedSharding(mesh, P(*members, *spec))

  return jax.tree_util.tree_map_with_path(sharding, tree)


def batch_sharding(mesh: Mesh, *, leading: int = 0) -> NamedSharding:
  """Rows over data and fsdp; `leading` as in `shardings`."""
  members = _members_spec(mesh, leading)
  return NamedSharding(mesh, P(*members, types.BATCH_AXES))


def place_batch(batch: Any, mesh: Mesh, *, leading: int = 0) -> Any:
  """Puts a host batch on the mesh, its rows divided."""
  return jax.device_put(batch, batch_sharding(mesh, leading=leading))


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
      may use the axis `MEMBER_AXIS`.
    mesh: Its axis of members, if it has one, divides them.
    vectorise: Whether `vmap` or a loop; see `vectorises`.
  """
  axis = MEMBER_AXIS
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
  has_whole = mesh.size == mesh.shape.get(MEMBER_AXIS, 1)
  return not (is_cpu and has_whole)


def _members_spec(mesh: Mesh, leading: int) -> list[str | None]:
  """How the axes before an array's own are divided."""
  divides = MEMBER_AXIS in mesh.axis_names
  return [MEMBER_AXIS if divides else None] * leading
