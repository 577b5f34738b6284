"""Eight CPU devices, checked shapes, and a compilation cache for all tests.

`pytest -m quick` is what a change of the maths can break, in under a minute.
"""

import gc
import os
import pathlib

import jax
from jaxtyping import install_import_hook
import pytest

# Before JAX starts its backend.
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))

# All modules whose functions carry shapes. Not `types`: tree.map, vmap and
# scan rebuild pytree dataclasses with other ranks and with non-arrays.
_CHECKED = [
  "rlhf_jax.objective",
  "rlhf_jax.models",
  "rlhf_jax.steps",
  "rlhf_jax.text",
  "rlhf_jax.storage",
  "rlhf_jax.settings",
  "rlhf_jax.data",
  "rlhf_jax.measures",
  "rlhf_jax.report",
  "rlhf_jax.stages",
]
install_import_hook(_CHECKED, "beartype.beartype")

_ROOT = pathlib.Path(__file__).parents[1]
_CACHE = str(_ROOT / ".cache" / "jax")
jax.config.update("jax_compilation_cache_dir", _CACHE)
os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE  # For commands that are run.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Tests of the maths are `quick`, but for those that are marked `slow`."""
  maths = pathlib.Path(__file__).parent / "objective"
  for item in items:
    if maths in item.path.parents and not item.get_closest_marker("slow"):
      item.add_marker(pytest.mark.quick)


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
  """Compiled programs of a file are of no use to the next; they are large."""
  yield
  jax.clear_caches()
  gc.collect()


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
  """Real weights and data that may lie beside the checkout."""
  directory = _ROOT.parent / "shared" / "data"
  if not directory.is_dir():
    pytest.skip("../shared/data is not present: no real weights or data")
  return directory
