"""What the devices of this machine are for.

A program on a CPU sees one device, and its own small operations cannot keep
many cores busy. `divide_cores` makes every core a device, for the members of a
sweep: policies that know nothing of each other. A single run, and each stage
that comes before a sweep, stays on one of them, with all cores at its service.
"""

import os

import jax

_divided = False


def divide_cores() -> None:
  """Makes each core of the CPU a device; to be called before JAX starts.

  What `XLA_FLAGS` or `JAX_NUM_CPU_DEVICES` say goes before this: such devices
  are a mesh for single runs, too.
  """
  global _divided
  forced = "xla_force_host_platform_device_count" in os.environ.get(
    "XLA_FLAGS", ""
  )
  if forced or jax.config.values["jax_num_cpu_devices"] > 0:
    return
  cores = os.cpu_count() or 1
  if hasattr(os, "sched_getaffinity"):  # What of them is ours; not on macOS.
    cores = len(os.sched_getaffinity(0))
  jax.config.update("jax_num_cpu_devices", cores)
  _divided = True


def are_divided_cores() -> bool:
  """Whether the devices are the cores of one CPU."""
  return _divided and jax.default_backend() == "cpu"


def count() -> int:
  """How many devices one run has: all, but for cores that were divided."""
  return 1 if are_divided_cores() else jax.device_count()
