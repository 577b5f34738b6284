"""Eight CPU devices, checked shapes, and a compilation cache for all tests.

`pytest -m quick` is what a change of the maths can break, in under a minute.
"""

import gc
import os
import pathlib
import resource

import jax
from jaxtyping import install_import_hook
import pytest

# Before JAX starts its backend. Two thirds of the tests' time was compilation,
# for programs that run milliseconds: the compiler is asked for less, not for
# other mathematics. XLA stops at a flag that it does not know, so what is not
# in its documentation is given to the releases that are known to have it.
_FLAGS = ["--xla_force_host_platform_device_count=8"]
if jax.__version_info__ < (0, 11):
  _FLAGS += [
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
  ]
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS])
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

# Collections of a heap as large as JAX's took a twentieth of the time.
gc.set_threshold(100_000, 50, 50)

_ROOT = pathlib.Path(__file__).parents[1]
_CACHE = str(_ROOT / ".cache" / "jax")
jax.config.update("jax_compilation_cache_dir", _CACHE)
os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE  # For commands that are run.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
# Where in the source an operation stands is of no use here, and takes a tenth
# of the time that lowering takes.
jax.config.update("jax_traceback_in_locations_limit", 0)
_MANY_KILOBYTES = 2_000_000  # Of a process, at most so far.


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Tests of the maths are `quick`, but for those that are marked `slow`."""
  maths = pathlib.Path(__file__).parent / "objective"
  for item in items:
    if maths in item.path.parents and not item.get_closest_marker("slow"):
      item.add_marker(pytest.mark.quick)


def pytest_collection_finish() -> None:
  """What is imported by now stays: it need not be looked through again."""
  gc.collect()
  gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
  """Compiled programs are kept for the next file until there are too many."""
  yield
  if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > _MANY_KILOBYTES:
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
  """Real weights and data that may lie beside the checkout."""
  directory = _ROOT.parent / "shared" / "data"
  if not directory.is_dir():
    pytest.skip("../shared/data is not present: no real weights or data")
  return directory
