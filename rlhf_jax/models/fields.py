"""Fields of `config.json` that are more than one value under one name.

A `Reader` turns some fields into fields of `TransformerConfig`, and back: the
rotary positions, which have been spelled in several ways, and what differs
from layer to layer. Beside each stand the names that it reads.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax import errors
from rlhf_jax.models import rope, transformer

_ORIGINAL = "original_max_position_embeddings"
# Of a kind of rope: ours → theirs, those that must be there and those that may.
_ROPE_REQUIRED = {
  "default": {},
  "linear": {"factor": "factor"},
  "dynamic": {"factor": "factor"},
  "yarn": {"original_max_length": _ORIGINAL},
  "longrope": {
    "short_factor": "short_factor",
    "long_factor": "long_factor",
    "original_max_length": _ORIGINAL,
  },
  "llama3": {
    "factor": "factor",
    "low_frequency_factor": "low_freq_factor",
    "high_frequency_factor": "high_freq_factor",
    "original_max_length": _ORIGINAL,
  },
}
_ROPE_OPTIONAL = {
  "yarn": {
    "factor": "factor",
    "attention_factor": "attention_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "truncate": "truncate",
  },
  "longrope": {"factor": "factor", "attention_factor": "attention_factor"},
}
_FULL, _SLIDING = "full_attention", "sliding_attention"


class Reader(NamedTuple):
  """Their fields ⇄ ours.

  Attributes:
    names: Of the fields there that it reads or writes.
    read: `(hf, values so far, where) → fields of TransformerConfig`.
    write: `config → fields of config.json`.
  """

  names: tuple[str, ...]
  read: Callable[[Mapping[str, Any], dict[str, Any], str], dict[str, Any]]
  write: Callable[[transformer.TransformerConfig], dict[str, Any]]


def refusal(
  where: str, field: str, value: Any, supported: Any
) -> errors.UserError:
  """Says what was found in a field, and what is wanted there."""
  if not isinstance(supported, str):
    supported = " or ".join(map(str, supported))
  return errors.UserError(f"{where}: {field}: {value!r}; wanted: {supported}")


def value_of(hf: Mapping[str, Any], field: str, kind: type, where: str) -> Any:
  """`hf[field]` if it is a `kind` (positive, unless a bool).

  Raises:
    UserError: It is absent, or something else.
  """
  if field not in hf:
    raise refusal(where, field, "absent", f"a {kind.__name__}")
  value = hf[field]
  if kind is bool and isinstance(value, bool):
    return value
  kinds = (int, float) if kind is float else (int,)
  if kind is bool or type(value) not in kinds or not 0 < value < np.inf:
    raise refusal(where, field, value, f"a {kind.__name__} above 0")
  return kind(value)


def rotary(
  *, theta: str = "rope_theta", partial: str | None = None, share: float = 1.0
) -> Reader:  # fmt: skip
  """Rope of a network whose layers all turn alike.

  Args:
    theta: The base's name where it stands outside `rope_parameters`.
    partial: The same of the share of a head that turns; None where the
      family's heads turn whole.
    share: What that share is where it is absent.
  """

  def read(hf, values, where):
    given = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if not isinstance(given, dict):
      raise refusal(where, "rope_parameters", given, "an object")
    outside = {
      "rope_theta": hf.get(theta),
      "partial_rotary_factor": hf.get(partial) if partial else 1.0,
      _ORIGINAL: hf.get(_ORIGINAL),
    }
    found = {name: x for name, x in outside.items() if x is not None} | given
    if partial is None and found["partial_rotary_factor"] != 1:
      share_given = found["partial_rotary_factor"]
      raise refusal(where, "partial_rotary_factor", share_given, "1")
    return _one_rope(found, values, where, share=share)

  def write(config):
    inside = _rope_to_hf(config.rope_theta, config.rope_scaling)
    outside = {
      theta: config.rope_theta,
      "rope_scaling": _as_before(inside, config.rope_scaling),
    }
    if partial is not None:
      inside["partial_rotary_factor"] = config.turning_size / config.head_size
      outside[partial] = config.turning_size / config.head_size
    if (
      config.rope_scaling is not None and config.rope_scaling.kind == "longrope"
    ):
      outside[_ORIGINAL] = config.rope_scaling.original_max_length
    return outside | {"rope_parameters": inside}

  names = "rope_scaling", "rope_parameters", theta, _ORIGINAL
  names += (partial,) if partial else ()
  return Reader(names, read, write)


def _two_ropes() -> Reader:
  """Gemma 3: local layers have a base of their own, and no stretching."""
  local = "rope_local_base_freq"

  def read(hf, values, where):
    given = hf.get("rope_parameters") or {}
    if _FULL in given:
      full, sliding = given[_FULL], given.get(_SLIDING) or {}
    else:  # As transformers 4 spelled it.
      theta = {"rope_theta": hf.get("rope_theta") or 1_000_000.0}
      full = theta | (hf.get("rope_scaling") or {})
      sliding = {"rope_theta": hf.get(local) or 10_000.0}
    found = _one_rope(full, values, where)
    near = _one_rope(sliding, values, where)
    if near["rope_scaling"] is not None:
      raise refusal(where, f"rope_parameters.{_SLIDING}", sliding, "default")
    return found | {"local_rope_theta": near["rope_theta"]}

  def write(config):
    full = _rope_to_hf(config.rope_theta, config.rope_scaling)
    return {
      "rope_theta": config.rope_theta,
      local: config.local_rope_theta,
      "rope_scaling": _as_before(full, config.rope_scaling),
      "rope_parameters": {
        _FULL: full,
        _SLIDING: _rope_to_hf(config.local_rope_theta, None),
      },
    }

  names = "rope_scaling", "rope_parameters", "rope_theta", local
  return Reader(names, read, write)


def _one_rope(given, values, where, *, share=1.0):
  """Fields of ours, from one object of rope parameters."""
  rope_of = {"rope_theta": 10_000.0, "partial_rotary_factor": share} | given
  kind: Any = rope_of.pop("rope_type", rope_of.pop("type", "default"))
  rope_of.pop("type", None)
  kind = {"su": "longrope"}.get(kind, kind)  # Phi-3's first name for it.
  theta = value_of(rope_of, "rope_theta", float, where)
  partial = value_of(rope_of, "partial_rotary_factor", float, where)
  if kind not in _ROPE_REQUIRED:
    raise refusal(where, "rope_type", kind, _ROPE_REQUIRED)
  required, optional = _ROPE_REQUIRED[kind], _ROPE_OPTIONAL.get(kind, {})
  if "original_max_length" not in required:
    rope_of.pop(_ORIGINAL, None)  # Stands outside, and means nothing here.
  elif kind != "llama3":
    rope_of.setdefault(_ORIGINAL, values["max_length"])
  known = {**required, **optional}
  names = {"rope_theta", "partial_rotary_factor", *known.values()}
  if unknown := sorted(rope_of.keys() - names):
    raise refusal(
      where, "rope_parameters", unknown, f"only {sorted(names)} for {kind}"
    )
  head = values.get("head_size") or values["width"] // values["heads"]
  size = int(head * partial)
  found = {"rope_theta": theta, "rope_scaling": None}
  if size != head:
    found["rotary_size"] = size
  if kind != "default":
    scaling: dict[str, Any] = {
      ours: _rope_number(rope_of, theirs, ours, size // 2, where)
      for ours, theirs in known.items()
      if ours in required or rope_of.get(theirs) is not None
    }
    found["rope_scaling"] = _plainest(rope.RopeScaling(kind=kind, **scaling))
  return found


def _rope_number(given, theirs, ours, pairs, where):
  if ours in ("short_factor", "long_factor"):
    value = given.get(theirs)
    if not isinstance(value, list) or len(value) != pairs:
      raise refusal(where, theirs, value, f"{pairs} numbers, one a pair")
    return tuple(float(x) for x in value)
  kinds = {"original_max_length": int, "truncate": bool}
  return value_of(given, theirs, kinds.get(ours, float), where)


def _rope_to_hf(theta, scaling):
  found = {"rope_type": "default", "rope_theta": theta}
  if scaling is None:
    return found
  known = _ROPE_REQUIRED[scaling.kind] | _ROPE_OPTIONAL.get(scaling.kind, {})
  values = dataclasses.asdict(scaling)
  for ours, theirs in known.items():
    value = values[ours]
    if value is not None:
      found[theirs] = list(value) if isinstance(value, tuple) else value
  return found | {"rope_type": scaling.kind}


def _as_before(inside, scaling):
  """As transformers 4 reads it: without the base, and with less of longrope.

  That has a factor and an original length of its own making, and Phi-3's takes
  three fields; what its formula would get wrong is said as a number.
  """
  if scaling is None:
    return None
  if scaling.kind != "longrope":
    return {name: x for name, x in inside.items() if name != "rope_theta"}
  found = {
    "type": "longrope",
    "short_factor": inside["short_factor"],
    "long_factor": inside["long_factor"],
  }
  if scaling.factor is not None:
    found["factor"] = scaling.factor
    found["attention_factor"] = scaling.attention_factor
    if scaling.attention_factor is None:
      found["attention_factor"] = rope.longrope_attention(
        scaling, scaling.factor
      )
  return found


def _plainest(scaling):
  """Without an attention factor that is the formula's own."""
  if scaling.kind == "longrope" and scaling.factor is not None:
    usual = rope.longrope_attention(scaling, scaling.factor)
    if scaling.attention_factor == usual:
      return dataclasses.replace(scaling, attention_factor=None)
  return scaling


TWO_ROPES = _two_ropes()


# What differs from layer to layer.


def _everywhere_to_read(hf, values, where):
  window = hf.get("sliding_window")
  if window is None:
    return {}
  window = value_of(hf, "sliding_window", int, where)
  if window >= values["max_length"]:  # It cuts nothing off.
    return {}
  return {"layer_kinds": ("local",) * values["layers"], "window": window}


# A window for all layers, or none (Mistral, Phi-3).
WINDOW_EVERYWHERE = Reader(
  ("sliding_window",),
  _everywhere_to_read,
  lambda config: {"sliding_window": config.window},
)


def _layer_types(hf, values, where, local: Callable[[int], bool]):
  """Per layer whether it is local: as named, or by the family's old rule."""
  layers = values["layers"]
  types = hf.get("layer_types")
  if types is None:
    types = [_SLIDING if local(i) else _FULL for i in range(layers)]
  if len(types) != layers or not set(types) <= {_FULL, _SLIDING}:
    raise refusal(
      where, "layer_types", types, f"{layers} of {_FULL} or {_SLIDING}"
    )
  if _SLIDING not in types:
    return {}
  return {
    "layer_kinds": tuple("local" if x == _SLIDING else "global" for x in types),
    "window": value_of(hf, "sliding_window", int, where),
  }


def _types_to_hf(config):
  kinds = config.layer_kinds or ("global",) * config.layers
  return [_SLIDING if kind == "local" else _FULL for kind in kinds]


def _qwen_to_read(hf, values, where):
  if not hf.get("use_sliding_window"):
    return {}
  first = hf.get("max_window_layers", 28)
  return _layer_types(hf, values, where, lambda i: i >= first)


def _qwen_to_hf(config):
  local = config.window is not None
  found = {"use_sliding_window": local, "sliding_window": config.window}
  types = _types_to_hf(config)
  first = types.index(_SLIDING) if local else config.layers
  return found | {"layer_types": types, "max_window_layers": first}


# A window that must be switched on (Qwen 2 and 3).
WINDOW_IF_USED = Reader(
  ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
  _qwen_to_read,
  _qwen_to_hf,
)


def alternating(every: int) -> Reader:
  """Local layers, and a global one at the end of each `every` (Gemma 2, 3)."""
  pattern = "sliding_window_pattern"

  def read(hf, values, where):
    period = hf.get(pattern) or hf.get(f"_{pattern}") or every
    return _layer_types(hf, values, where, lambda i: bool((i + 1) % period))

  def write(config):
    types = _types_to_hf(config)
    found = {"layer_types": types, "sliding_window": config.window}
    return found | ({pattern: every} if every != 2 else {})

  names = "layer_types", "sliding_window", pattern, f"_{pattern}"
  return Reader(names, read, write)


def _unturned_to_read(hf, values, where):
  layers, every = values["layers"], hf.get("no_rope_layer_interval", 4)
  turned = hf.get("no_rope_layers")
  if turned is None:
    turned = [int((i + 1) % every != 0) for i in range(layers)]
  if len(turned) != layers or not set(turned) <= {0, 1}:
    raise refusal(where, "no_rope_layers", turned, f"{layers} of 0 or 1")
  if all(turned):
    return {}
  return {"layer_kinds": tuple("global" if x else "unturned" for x in turned)}


# Layers without rope (SmolLM3).
UNTURNED_LAYERS = Reader(
  ("no_rope_layers", "no_rope_layer_interval"),
  _unturned_to_read,
  lambda config: {
    "no_rope_layers": [
      int(kind != "unturned")
      for kind in config.layer_kinds or ("global",) * config.layers
    ]
  },
)


def _same_width(hf, values, where):
  width = hf.get("word_embed_proj_dim") or values["width"]
  if width != values["width"]:
    raise refusal(where, "word_embed_proj_dim", width, str(values["width"]))
  return {}


# Embeddings as wide as the network (OPT; 350M has others).
SAME_WIDTH = Reader(
  ("word_embed_proj_dim",),
  _same_width,
  lambda config: {"word_embed_proj_dim": config.width},
)
