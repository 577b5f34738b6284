"""Cores as devices: for members, and for nothing else."""

import os
import subprocess
import sys

import jax

from rlhf_jax.settings import devices

DIVIDED = """
import jax
from configs import ppo
from rlhf_jax.settings import devices, static
devices.divide_cores()
cores = jax.device_count()
print(cores, devices.count())
shape = lambda members: dict(static.mesh(ppo.toy(), members=members).shape)
print(shape(1) == {"data": 1, "fsdp": 1, "tensor": 1})
alone = {"member": cores, "data": 1, "fsdp": 1, "tensor": 1}
print(cores == 1 or shape(3 * cores) == alone)
"""


def test_cores_become_devices():
  environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  found = subprocess.run(
    [sys.executable, "-c", DIVIDED],
    env=environment | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    check=True,
  ).stdout.split()
  cores = os.cpu_count()
  if hasattr(os, "sched_getaffinity"):
    cores = len(os.sched_getaffinity(0))
  assert found == [str(cores), "1", "True", "True"]


def test_who_asked_for_devices_keeps_them():
  """The tests' eight are a mesh for single runs too."""
  devices.divide_cores()
  assert not devices.are_divided_cores()
  assert devices.count() == jax.device_count() == 8
