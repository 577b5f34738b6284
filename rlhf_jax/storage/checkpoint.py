"""What a run must not lose: its state while it trains, its models at the end.

The only file that knows Orbax. A saved directory is

    state/          the arrays, as Orbax writes them
    metadata.json   format, dtype and shape of each array, the caller's JSON
    manifest.json   sha256 of every other file

Orbax does not check the bytes that it reads: a flipped bit loads silently.
Hence the manifest, which is verified before anything is read. A directory is
written under another name and renamed when complete, so that one with a
step's name and no manifest was half copied.

Orbax's own `Checkpointer` is left out. It deletes old steps when the arrays
of the new one are written, before their sums are, and counts a damaged step
among those to keep; `Checkpoints.due` and `Checkpoints.save` are our policies
for saving and preserving. Left out too: several processes (on a pod the hosts
must agree on who renames) and saving in the background.
"""

from collections.abc import Iterator
import contextlib
import hashlib
import json
import os
import pathlib
import shutil
from typing import Any

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from rlhf_jax import errors, types

FORMAT = 2  # Raised when an older program could not read what we write.


def tree_hash(params: types.Params) -> str:
  """Sha256 of a tree's paths, dtypes, shapes and bytes: a model's identity.

  The same for numpy and JAX arrays, and however the arrays are sharded.
  """
  digest = hashlib.sha256()
  for path, leaf in _flatten(params).items():
    array = np.ascontiguousarray(jax.device_get(leaf))
    digest.update(json.dumps([path, *_spec(leaf)]).encode())
    digest.update(array.reshape(-1).view(np.uint8).data)
  return digest.hexdigest()


class Checkpoints:
  """The checkpoints of a run, each in a directory named by its step.

  A step counts finished updates. Use by one process at a time.
  """

  def __init__(self, directory: str | os.PathLike, every: int, keep: int):
    """Nothing is written before the first `save`.

    Args:
      directory: Where the steps' directories are.
      every: Steps between checkpoints.
      keep: How many of the newest stay on disk.

    Raises:
      UserError: `every` or `keep` is not positive.
    """
    for field, value in (("every", every), ("keep", keep)):
      if value < 1:
        raise errors.UserError(
          f"checkpoint.{field}: {value}; a whole number from 1 is wanted"
        )
    self._directory = pathlib.Path(directory).absolute()
    self._every = every
    self._keep = keep

  def due(self, step: int, last: bool) -> bool:
    """Whether `step` is to be saved; the last one always is."""
    return last or step % self._every == 0

  def steps(self) -> list[int]:
    """Steps on disk, oldest first, whether or not they are good."""
    if not self._directory.exists():
      return []
    names = [entry.name for entry in self._directory.iterdir()]
    return sorted(int(name) for name in names if name.isdecimal())

  def save(self, step: int, state: Any, metadata: dict[str, Any]) -> None:
    """Writes a checkpoint, then deletes those that are no longer kept.

    Steps beyond this one are deleted too: a run that resumed before them has
    left them behind.

    Args:
      step: Finished updates. A checkpoint of the same step is replaced.
      state: Any pytree of arrays; typed PRNG keys are not arrays.
      metadata: JSON that `restore` gives back. It lies on disk in the clear.

    Raises:
      UserError: It cannot be written.
    """
    _write(self._directory / str(step), state, metadata)
    kept = [other for other in self.steps() if other <= step][-self._keep :]
    for other in set(self.steps()) - set(kept):
      shutil.rmtree(self._directory / str(other))

  def restore(self, abstract_state: Any) -> tuple[Any, dict[str, Any]] | None:
    """Reads the newest checkpoint whose sums hold.

    Args:
      abstract_state: The state's tree of `jax.ShapeDtypeStruct`. A leaf with a
        sharding is placed so, whatever its sharding was when it was saved.

    Returns:
      State and metadata, or None where nothing was ever saved.

    Raises:
      NoUsableCheckpoint: There are checkpoints, and none is good.
      UserError: The checkpoint is of another architecture or a newer format.
    """
    steps = self.steps()
    for step in reversed(steps):
      directory = self._directory / str(step)
      if (fault := _fault(directory)) is None:
        return _restore(directory, abstract_state)
      logging.warning("%s; checkpoint %d is skipped", fault, step)
    if steps:
      raise errors.NoUsableCheckpoint(
        f"{self._directory}: none of the checkpoints {steps} is whole; put an "
        "undamaged copy of one in place, or begin anew in another --workdir"
      )
    return None


def save_params(
  directory: str | os.PathLike, params: types.Params, metadata: dict[str, Any]
) -> None:
  """Writes a finished model, in place of one that may be there.

  Args:
    directory: Made with its parents.
    params: A nested dict of arrays.
    metadata: JSON that `load_params` gives back; what the model is.

  Raises:
    UserError: It cannot be written.
  """
  _write(pathlib.Path(directory).absolute(), params, metadata)


def load_params(
  directory: str | os.PathLike,
) -> tuple[types.Params, dict[str, Any]]:
  """Reads what `save_params` wrote, as numpy arrays.

  Raises:
    UserError: There is nothing, it is damaged, or it is of a newer format.
  """
  directory = pathlib.Path(directory).absolute()
  if (fault := _fault(directory)) is not None:
    raise errors.UserError(f"{fault}; make or copy the model again")
  record = _record(directory)
  target = {
    path: np.empty(shape, jnp.dtype(dtype))
    for path, (dtype, shape) in record["arrays"].items()
  }
  params = {}
  for path, array in _load(directory, target).items():
    *parents, name = path.split("/")
    node = params
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = array
  return params, record["metadata"]


def _flatten(tree: Any) -> dict[str, Any]:
  """A tree's leaves by path, such as `params/embedding/tokens`."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _spec(leaf: Any) -> list[Any]:
  """An array's dtype and shape, as they are in metadata.json."""
  return [str(leaf.dtype), list(leaf.shape)]


def _write(directory: pathlib.Path, tree: Any, metadata: dict[str, Any]):
  """Writes a directory as the module docstring lays it out, all or nothing."""
  arrays = _flatten(tree)
  record = {
    "format": FORMAT,
    "arrays": {path: _spec(leaf) for path, leaf in arrays.items()},
    "metadata": metadata,
  }
  text = json.dumps(record, indent=2)
  temporary = directory.parent / ".writing"
  with _translated(directory, "written"):
    try:
      shutil.rmtree(temporary, ignore_errors=True)
      temporary.mkdir(parents=True)
      ocp.save(str(temporary / "state"), arrays)
      (temporary / "metadata.json").write_text(text)
      files = sorted(file for file in temporary.rglob("*") if file.is_file())
      sums = {str(file.relative_to(temporary)): _sum(file) for file in files}
      (temporary / "manifest.json").write_text(json.dumps(sums, indent=2))
      if directory.exists():
        shutil.rmtree(directory)
      temporary.rename(directory)
    finally:
      shutil.rmtree(temporary, ignore_errors=True)


def _sum(file: pathlib.Path) -> str:
  with file.open("rb") as stream:
    return hashlib.file_digest(stream, "sha256").hexdigest()


def _fault(directory: pathlib.Path) -> str | None:
  """What makes a directory unfit to read, or None if its sums hold."""
  manifest = directory / "manifest.json"
  try:
    sums = json.loads(manifest.read_bytes())
  except FileNotFoundError:
    return f"{manifest}: missing, so nothing was saved here, or not all of it"
  except ValueError:
    return f"{manifest}: damaged"
  for name, wanted in sums.items():
    file = directory / name
    if not file.is_file():
      return f"{file}: missing, though the manifest names it"
    if _sum(file) != wanted:
      return f"{file}: damaged, its sha256 is not the manifest's"
  return None


def _record(directory: pathlib.Path) -> dict[str, Any]:
  """Metadata of a directory whose sums hold."""
  file = directory / "metadata.json"
  record = json.loads(file.read_bytes())
  if record["format"] > FORMAT:
    raise errors.UserError(
      f"{file}: format: {record['format']}; this program reads formats up to "
      f"{FORMAT}; use the newer one that wrote it"
    )
  return record


def _restore(
  directory: pathlib.Path, abstract_state: Any
) -> tuple[Any, dict[str, Any]]:
  record = _record(directory)
  abstract = _flatten(abstract_state)
  wanted = {path: _spec(leaf) for path, leaf in abstract.items()}
  _check_same_arrays(directory, record["arrays"], wanted)
  placed = lambda leaf: leaf.sharding is not None
  target = {
    path: leaf if placed(leaf) else np.empty(leaf.shape, leaf.dtype)
    for path, leaf in abstract.items()
  }
  loaded = _load(directory, target)
  leaves = [
    loaded[path] if placed(leaf) else jnp.array(loaded[path])
    for path, leaf in abstract.items()
  ]
  treedef = jax.tree.structure(abstract_state)
  return jax.tree.unflatten(treedef, leaves), record["metadata"]


def _check_same_arrays(directory: pathlib.Path, saved: dict, wanted: dict):
  """Refuses another architecture's checkpoint by its first odd array."""
  show = lambda spec: "nothing" if spec is None else f"{spec[0]}{spec[1]}"
  for path in wanted | saved:
    found, want = saved.get(path), wanted.get(path)
    if found != want:
      raise errors.UserError(
        f"{directory}: {path}: {show(found)} in the checkpoint; {show(want)} "
        "in this run; resume with the config that wrote it"
      )


def _load(directory: pathlib.Path, target: dict[str, Any]) -> dict[str, Any]:
  with _translated(directory, "read"):
    return ocp.load(str(directory / "state"), target)


@contextlib.contextmanager
def _translated(directory: pathlib.Path, verb: str) -> Iterator[None]:
  """Turns whatever Orbax or the file system raises into one line of ours."""
  try:
    yield
  except Exception as error:  # Orbax documents none of what it raises.
    first = str(error).partition("\n")[0]
    raise errors.UserError(
      f"{directory}: cannot be {verb}: {type(error).__name__}: {first}"
    ) from error
