"""The reference's logprobs of preference pairs: made once, kept in a file.

Neither the reference nor the pairs move, so a step need not ask again, and a
resumed run need not either. The file says what it was made of: the
reference's hash, that of the tokens, and the temperature. One that was made of
something else is refused and not made anew, because then the run is not the
one that began.

It is a safetensors file. That format does not checksum its numbers, so their
sha256 stands in the header.
"""

from collections.abc import Callable, Mapping
import os
import pathlib
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from rlhf_jax import errors, types
from rlhf_jax.storage import checkpoint

Logprobs = tuple[Any, Any]  # numpy arrays, of chosen and of rejected
_FORMAT = "1"
_SIDES = ("chosen", "rejected")


def load_or_make(
  path: pathlib.Path,
  pairs: Mapping[str, types.PreferencePairs],
  score: Callable[[types.PreferencePairs], Logprobs],
  *,
  reference: str,
  temperature: float,
) -> dict[str, Logprobs]:
  """Log π_ref of all chosen and rejected responses, by the names of `pairs`.

  Args:
    path: The file, which is read if it is there and else written.
    pairs: Several sets of them, such as those to train on and those held out.
    score: Log π_ref of all chosen and all rejected of a set, in nats.
    reference: Hash of the reference, from `checkpoint.tree_hash`.
    temperature: Of the distribution that `score` scores.

  Raises:
    UserError: The file was made of something else, is damaged or cannot be
      written.
  """
  identity = {
    "reference": reference,
    "data": checkpoint.tree_hash(dict(pairs)),
    "temperature": repr(float(temperature)),
  }
  if path.exists():
    return _load(path, list(pairs), identity)
  logprobs = {name: score(rows) for name, rows in pairs.items()}
  _save(path, logprobs, identity)
  return logprobs


def _load(path, names, identity) -> dict[str, Logprobs]:
  mend = "delete it to have it made again"
  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      header = file.metadata() or {}
      keys = [f"{name}/{side}" for name in names for side in _SIDES]
      tensors = {key: file.get_tensor(key) for key in keys}
  except (OSError, safetensors.SafetensorError) as error:
    raise errors.UserError(f"{path}: damaged: {error}; {mend}") from error
  if header.keys() != {"format", "sha256", *identity} or (
    header["format"] != _FORMAT
  ):
    raise errors.UserError(
      f"{path}: no cache of reference logprobs in format {_FORMAT}; {mend}"
    )
  for what, now in identity.items():
    if (then := header[what]) != now:
      raise errors.UserError(
        f"{path}: {what}: {then:.12} when the reference's logprobs were made,"
        f" {now:.12} now; put back what was there then, or begin another run"
        " in another --workdir"
      )
  if header["sha256"] != checkpoint.tree_hash(tensors):
    raise errors.UserError(
      f"{path}: damaged, its sha256 is not the header's; {mend}"
    )
  return {
    name: (tensors[f"{name}/chosen"], tensors[f"{name}/rejected"])
    for name in names
  }


def _save(path, logprobs: dict[str, Logprobs], identity) -> None:
  """Writes the file so that a kill leaves all of it or none."""
  tensors = {
    f"{name}/{side}": np.ascontiguousarray(values)
    for name, both in logprobs.items()
    for side, values in zip(_SIDES, both)
  }
  header = {"format": _FORMAT, "sha256": checkpoint.tree_hash(tensors)}
  content = safetensors.numpy.save(tensors, identity | header)
  temporary = path.with_name(f".{path.name}.writing")
  try:
    with temporary.open("wb") as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    temporary.replace(path)
  except OSError as error:
    raise errors.UserError(
      f"{path}: cannot be written: {error.strerror}; free space, change its"
      " mode, or give another --workdir"
    ) from error
