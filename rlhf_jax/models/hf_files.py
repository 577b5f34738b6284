"""The files of a Hugging Face model directory: safetensors and JSON.

Left out: pickle formats (`.bin`, `.pt`), because reading one runs whatever it
holds, and quantised weights. safetensors does not checksum its data, so a
directory that we wrote has a `SHA256SUMS` file (as `sha256sum -c` reads it),
and one that has it is held to it.
"""

from collections.abc import Iterator, Mapping
import contextlib
import hashlib
import json
import pathlib
import re
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from rlhf_jax import errors

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SUMS = "SHA256SUMS"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_PICKLE_MAGIC = (b"PK\x03\x04", *(b"\x80" + bytes([i]) for i in range(2, 6)))
DType = Literal["float32", "bfloat16", "float16"]
DTYPES: dict[str, Any] = {
  "float32": np.float32,
  "bfloat16": ml_dtypes.bfloat16,
  "float16": np.float16,
}
_NAMES: dict[str, DType] = {  # As safetensors spells them.
  "F32": "float32",
  "F16": "float16",
  "BF16": "bfloat16",
}
_LFS_POINTER = b"version https://git-lfs"
_WRAPPERS = ("_orig_mod.", "module.")  # torch.compile's and DDP's.
# What names of tensors say of a file that is no whole model.
_NOT_A_MODEL = (
  (r"\.lora_[AB]\.|lora_embedding", "an adapter's; merge it into its base"),
  (r"(^|\.)v_head\.", "a value head's; save the language model without it"),
  (
    r"\.(qweight|qzeros|SCB|absmax)$|\.weight_scale",
    "quantised; save the model in bfloat16 or float32",
  ),
)


class Stored(NamedTuple):
  """A tensor in an open file, under the name that it has there."""

  file: Any
  name: str

  @property
  def shape(self) -> tuple[int, ...]:
    """From the header, without reading the data."""
    return tuple(self.file.get_slice(self.name).get_shape())

  @property
  def dtype(self) -> str:
    """As safetensors spells it, such as F32 or BF16."""
    return self.file.get_slice(self.name).get_dtype()

  def read(self) -> np.ndarray:
    """The values in float32, on the host."""
    return self.file.get_tensor(self.name).astype(np.float32)


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """A JSON file's object.

  Raises:
    UserError: If there is no such file, or something else in it.
  """
  if not path.is_file():
    raise errors.UserError(
      f"{path}: absent; a Hugging Face directory with this file is wanted"
    )
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except json.JSONDecodeError as error:
    message = f"{path}:{error.lineno}: not JSON: {error.msg}"
    raise errors.UserError(message) from error
  except UnicodeDecodeError as error:
    message = f"{path}: not UTF-8 at byte {error.start}"
    raise errors.UserError(message) from error
  if not isinstance(content, dict):
    raise errors.UserError(
      f"{path}: a {type(content).__name__}; a JSON object is wanted"
    )
  return content


def write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
  """Writes `content` for people to read too."""
  path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def open_tensors(
  directory: pathlib.Path, *, prefix: str
) -> Iterator[dict[str, Stored]]:
  """The directory's tensors by name, open while the context lasts.

  Args:
    directory: With `model.safetensors`, shards and their index, or a single
      file of another name.
    prefix: Added to the names of a file that was saved without it (a network
      saved without its head).

  Raises:
    UserError: If there is no safetensors file, a shard is absent, or a file is
      damaged, a pickle, or not what `SHA256SUMS` records.
  """
  files = _weight_files(directory)
  _check_sums(directory, files)
  tensors = {}
  with contextlib.ExitStack() as stack:
    for path in files:
      file = stack.enter_context(_open(path))
      names = file.keys()
      tensors |= {_bare(name): Stored(file, name) for name in names}
    if not any(name.startswith(prefix) for name in tensors):
      outside = ("lm_head.weight", "embed_out.weight", "score.weight")
      tensors = {
        name if name in outside else prefix + name: stored
        for name, stored in tensors.items()
      }
    yield tensors


def _bare(name: str) -> str:
  """Without what a wrapper put in front of all names."""
  for wrapper in _WRAPPERS:
    name = name.removeprefix(wrapper)
  return name


def check_tensors(
  tensors: Mapping[str, Stored],
  shapes: Mapping[str, tuple[int, ...]],
  *,
  ignored: str,
  where: str,
) -> None:
  """Requires exactly the tensors that a model has, floating and finite.

  Args:
    tensors: What the files hold.
    shapes: What the model has.
    ignored: Regex of names that may be there besides.
    where: The directory, for messages.

  Raises:
    UserError: One line that lists all that is wrong.
  """
  missing = sorted(shapes.keys() - tensors.keys())
  extra = sorted(tensors.keys() - shapes.keys())
  extra = [name for name in extra if not re.fullmatch(ignored, name)]
  problems = [f"{name} is missing" for name in missing]
  problems += [f"{name} is extra{_said_of(name)}" for name in extra]
  for name in sorted(shapes.keys() & tensors.keys()):
    stored = tensors[name]
    if stored.shape != shapes[name]:
      problems.append(
        f"{name} has shape {stored.shape}, {shapes[name]} is wanted"
      )
    if stored.dtype not in _NAMES:
      wanted = ", ".join(_NAMES)
      problems.append(f"{name} has dtype {stored.dtype}, not one of {wanted}")
    elif not np.isfinite(stored.read()).all():
      problems.append(f"{name} has NaN or infinite values")
  if problems:
    raise errors.UserError(
      f"{where}: weights that are not the config's model: {'; '.join(problems)}"
    )


def _said_of(name) -> str:
  for pattern, meaning in _NOT_A_MODEL:
    if re.search(pattern, name):
      return f" ({meaning})"
  return ""


def dtype_of(tensors: Mapping[str, Stored]) -> DType:
  """Of most of the numbers."""
  sizes: dict[str, int] = {}
  for stored in tensors.values():
    size = int(np.prod(stored.shape))
    sizes[stored.dtype] = sizes.get(stored.dtype, 0) + size
  return _NAMES.get(max(sizes, key=lambda name: sizes[name]), "float32")


def check_directory(directory: pathlib.Path) -> None:
  """Names a directory that is no model by itself.

  Raises:
    UserError: It holds an adapter and no model.
  """
  adapter = directory / "adapter_config.json"
  if adapter.is_file() and not (directory / "config.json").is_file():
    base = read_json(adapter).get("base_model_name_or_path")
    raise errors.UserError(
      f"{directory}: an adapter of {base!r} and not a model; merge it into its "
      "base (peft: merge_and_unload, save_pretrained), and give that directory"
    )


def write_tensors(
  directory: pathlib.Path,
  tensors: Mapping[str, np.ndarray],
  *,
  max_shard_bytes: int,
) -> None:
  """Writes one file, or several with an index, and their checksums."""
  shards = _shards(tensors, max_shard_bytes)
  for name, shard in shards.items():
    contiguous = {key: np.ascontiguousarray(shard[key]) for key in shard}
    # transformers wants to be told which framework's layout this is.
    metadata = {"format": "pt"}
    safetensors.numpy.save_file(contiguous, directory / name, metadata)
  if len(shards) > 1:
    weight_map = {key: name for name, shard in shards.items() for key in shard}
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    write_json(directory / _INDEX, index)
  sums = [f"{_sha256(directory / name)}  {name}\n" for name in shards]
  (directory / _SUMS).write_text("".join(sums), encoding="utf-8")


def make_directory(directory: pathlib.Path) -> None:
  """Makes a directory for a model.

  Raises:
    UserError: If it cannot be made, or already holds a model: a reader would
      see a mixture of the two.
  """
  try:
    directory.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    message = f"{directory}: cannot be made: {error.strerror}"
    raise errors.UserError(message) from error
  held = [*directory.glob("*.safetensors*"), *directory.glob("config.json")]
  if held:
    raise errors.UserError(
      f"{directory}: holds {held[0].name}; a directory without a model in it "
      "is wanted: name another, or empty this one"
    )


def _weight_files(directory: pathlib.Path) -> list[pathlib.Path]:
  """The safetensors files, chosen in transformers' order."""
  if (directory / _SINGLE).is_file():
    return [directory / _SINGLE]
  if (directory / _INDEX).is_file():
    return _shard_files(directory)
  files = sorted(directory.glob("*.safetensors"))
  if len(files) == 1:
    return files
  if files:
    names = ", ".join(file.name for file in files)
    raise errors.UserError(
      f"{directory}: {names} without {_INDEX}; one file, or an index, is wanted"
    )
  pickles = sorted(f.name for f in directory.iterdir() if f.suffix in _PICKLES)
  found = ", ".join(pickles) or "no weights"
  why = ", pickles, which can run any code when read" if pickles else ""
  raise errors.UserError(
    f"{directory}: {found}{why}; *.safetensors is wanted (transformers' "
    "save_pretrained writes it)"
  )


def _shard_files(directory):
  where = directory / _INDEX
  weight_map = read_json(where).get("weight_map")
  if not isinstance(weight_map, dict) or not weight_map:
    raise errors.UserError(
      f"{where}: weight_map: {weight_map!r}; file names by tensor are wanted"
    )
  names = sorted(set(map(str, weight_map.values())))
  paths = [directory / name for name in names]
  # A name with a directory in it is absent too: it might lead out of here.
  absent = sorted({*names} - {path.name for path in paths if path.is_file()})
  if absent:
    raise errors.UserError(
      f"{where}: weight_map: {', '.join(absent)}: not in the directory; every "
      "shard that the index names is wanted: copy the missing ones"
    )
  return paths


def _sha256(path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _check_sums(directory, files):
  path = directory / _SUMS
  if not path.is_file():
    return
  lines = path.read_text(encoding="utf-8").splitlines()
  sums = {
    name: digest for digest, _, name in (x.partition("  ") for x in lines)
  }
  for file in files:
    if file.name not in sums or sums[file.name] != _sha256(file):
      raise errors.UserError(
        f"{file}: not the bytes that {_SUMS} records; copy it again, or delete "
        f"{_SUMS} if the file was changed on purpose"
      )


def _open(path: pathlib.Path):
  """A safetensors file, its header checked against its size."""
  try:
    return safetensors.safe_open(path, framework="np")
  except (safetensors.SafetensorError, OSError) as error:
    with path.open("rb") as file:
      start = file.read(len(_LFS_POINTER))
    # Only now: a sound file's header length may look like a pickle's magic.
    if not start:
      found = "empty"
    elif start == _LFS_POINTER:
      found = "a Git LFS pointer (`git lfs pull` fetches the file itself)"
    elif start.startswith(_PICKLE_MAGIC):
      found = "a pickle by its first bytes, which can run any code when read"
    else:
      found = f"truncated or damaged ({error})"
    message = f"{path}: {found}; a whole safetensors file is wanted"
    raise errors.UserError(message) from error


def _shards(tensors, max_bytes) -> dict[str, dict[str, np.ndarray]]:
  """File name → its tensors; a file is closed before it passes the size."""
  groups, size = [{}], 0
  for name, tensor in tensors.items():
    if groups[-1] and size + tensor.nbytes > max_bytes:
      groups.append({})
      size = 0
    groups[-1][name] = tensor
    size += tensor.nbytes
  if len(groups) == 1:
    return {_SINGLE: groups[0]}
  name = lambda i: f"model-{i:05}-of-{len(groups):05}.safetensors"
  return {name(i): group for i, group in enumerate(groups, start=1)}
