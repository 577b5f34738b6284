"""What Hugging Face calls the parts of our transformer, by model family.

A `Family` is two tables, each read in both directions: the fields of
`config.json` against those of `TransformerConfig`, and the names and layouts
of the weights against the paths of our tree. `convert` moves the arrays.

Left out: every family but Llama and GPT-2, rope types but Llama 3's (each
needs its own parity test), and code that a model directory brings along.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, Literal

import numpy as np

from rlhf_jax import errors
from rlhf_jax.models import layouts, transformer

_ROPE_SCALING = {  # Ours → Hugging Face's.
  "factor": "factor",
  "low_frequency_factor": "low_freq_factor",
  "high_frequency_factor": "high_freq_factor",
  "original_max_length": "original_max_position_embeddings",
}
# Fields that say how to run the network or are written by `_rope_to_hf`.
_NOT_IN_TABLE = {
  "rope_theta",
  "rope_scaling",
  "compute_dtype",
  "unroll",
  "remat",
}


@dataclasses.dataclass(frozen=True)
class Family:
  """A model family's names.

  Attributes:
    model_type: As `config.json` has it.
    language_model: The architecture with a language-model head.
    reward_model: The architecture with one score per sequence.
    prefix: Of the network's tensors; a bare network's file goes without it.
    fields: Our config field → theirs.
    fixed: Our config fields that every model of the family shares.
    defaults: What their field means where it is absent.
    derived: What their field means where it is null.
    only: Their fields of which we support some values, the usual one first.
    ignored: Regex of tensors that are buffers, not weights.
    weights: Path in our tree → tensors there.
  """

  model_type: str
  language_model: str
  reward_model: str
  prefix: str
  fields: dict[str, str]
  fixed: dict[str, Any]
  defaults: dict[str, Any]
  derived: dict[str, Callable[[dict[str, Any]], int]]
  only: dict[str, tuple[Any, ...]]
  ignored: str
  weights: dict[str, layouts.Weight]


LLAMA = Family(
  model_type="llama",
  language_model="LlamaForCausalLM",
  reward_model="LlamaForSequenceClassification",
  prefix="model.",
  fields={
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "mlp_width": "intermediate_size",
    "max_length": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "attention_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
  },
  fixed={"norm": "rms", "positions": "rope", "activation": "swiglu"},
  defaults={
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "rope_scaling": None,
    "rope_parameters": None,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
  },
  derived={
    "num_key_value_heads": lambda hf: hf["num_attention_heads"],
    "head_dim": lambda hf: hf["hidden_size"] // hf["num_attention_heads"],
  },
  only={"hidden_act": ("silu",)},
  ignored=r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
  weights=layouts.llama(),
)

GPT2 = Family(
  model_type="gpt2",
  language_model="GPT2LMHeadModel",
  reward_model="GPT2ForSequenceClassification",
  prefix="transformer.",
  fields={
    "vocab_size": "vocab_size",
    "width": "n_embd",
    "layers": "n_layer",
    "kv_heads": "n_head",
    "heads": "n_head",
    "mlp_width": "n_inner",
    "max_length": "n_positions",
    "norm_epsilon": "layer_norm_epsilon",
    "tie_embeddings": "tie_word_embeddings",
  },
  fixed={
    "norm": "layer",
    "positions": "learned",
    "activation": "gelu",
    "attention_bias": True,
    "mlp_bias": True,
  },
  defaults={
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
  },
  derived={"n_inner": lambda hf: 4 * hf["n_embd"]},
  only={
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
  },
  ignored=r"transformer\.h\.\d+\.attn\.(masked_)?bias",
  weights=layouts.gpt2(),
)

_FAMILIES = (LLAMA, GPT2)


def family_of(hf: dict[str, Any], *, where: str) -> tuple[Family, bool]:
  """The family of a `config.json`, and whether it is a reward model's.

  Args:
    hf: The file's content.
    where: The file, for messages.

  Raises:
    UserError: For an architecture that we do not have, or one that asks for
      code of its own (`auto_map`, `trust_remote_code`).
  """
  for field in ("auto_map", "trust_remote_code"):
    if hf.get(field):
      raise _refusal(
        where,
        field,
        hf[field],
        "no such field, as code that comes with a model is never run",
      )
  families = {family.model_type: family for family in _FAMILIES}
  model_type = str(hf.get("model_type"))
  if model_type not in families:
    raise _refusal(where, "model_type", model_type, families)
  family = families[model_type]
  supported = family.language_model, family.reward_model
  architectures = hf.get("architectures") or [family.language_model]
  if architectures[0] not in supported:
    raise _refusal(where, "architectures", architectures, supported)
  return family, architectures[0] == family.reward_model


def config_from_hf(
  hf: dict[str, Any],
  *,
  where: str,
  unroll: int,
  remat: bool,
  compute_dtype: Literal["float32", "bfloat16"],
) -> transformer.TransformerConfig:
  """Reads the content of a `config.json`, in either spelling of its rope.

  Args:
    hf: The file's content.
    where: The file, for messages.
    unroll: Layers per scan step; 0 unrolls all of them.
    remat: As in `TransformerConfig`.
    compute_dtype: As in `TransformerConfig`.

  Raises:
    UserError: Names the field, its value and what is supported.
  """
  family, _ = family_of(hf, where=where)
  hf = family.defaults | hf
  for field, supported in family.only.items():
    if hf[field] not in supported:
      raise _refusal(where, field, hf[field], supported)
  values = {}
  for ours, theirs in family.fields.items():
    if hf.get(theirs) is None and theirs in family.derived:
      hf[theirs] = family.derived[theirs](hf)
    values[ours] = _value(hf, theirs, _kind(ours), where)
  _check_heads(values, family, where)
  values |= family.fixed
  values.setdefault("head_size", values["width"] // values["heads"])
  if family is LLAMA:
    values |= _rope_from_hf(hf, where)
  try:
    return transformer.TransformerConfig(
      **values,
      unroll=unroll or values["layers"],
      remat=remat,
      compute_dtype=compute_dtype,
    )
  except ValueError as error:
    raise errors.UserError(f"{where}: {error}") from error


def config_to_hf(
  config: transformer.TransformerConfig,
  *,
  reward_model: bool,
  stop_ids: tuple[int, ...],
  pad_id: int | None,
  bos_id: int | None,
) -> dict[str, Any]:
  """The content of a `config.json` that `transformers.AutoConfig` loads.

  Rope is written in both spellings, as other readers know only the old one.

  Raises:
    UserError: If neither family has such an architecture.
  """
  ours = dataclasses.asdict(config)
  family = LLAMA if config.norm == "rms" else GPT2
  name = family.reward_model if reward_model else family.language_model
  hf = {"model_type": family.model_type, "architectures": [name]}
  hf |= {theirs: ours[field] for field, theirs in family.fields.items()}
  hf |= {field: supported[0] for field, supported in family.only.items()}
  hf |= {
    "dtype": "float32",
    "bos_token_id": bos_id,
    "eos_token_id": list(stop_ids) or None,
    "pad_token_id": pad_id,
  }
  if reward_model:
    hf |= {"id2label": {"0": "score"}, "label2id": {"score": 0}}
  if family is LLAMA:
    hf |= _rope_to_hf(config)
  _check_lossless(config, hf)
  return hf


def _check_lossless(config, hf):
  """Refuses a config that does not come back as it went."""
  where = f"model as {hf['model_type']}"
  read = config_from_hf(
    hf,
    where=where,
    unroll=config.unroll,
    remat=config.remat,
    compute_dtype=config.compute_dtype,
  )
  ours, theirs = dataclasses.asdict(config), dataclasses.asdict(read)
  lost = [
    f"{field}: {ours[field]!r}; {theirs[field]!r} is wanted"
    for field in ours.keys() - _NOT_IN_TABLE
    if ours[field] != theirs[field]
  ]
  if lost:
    raise errors.UserError(f"{where}: {', '.join(sorted(lost))}")


def _refusal(where, field, value, supported):
  if not isinstance(supported, str):
    supported = " or ".join(map(str, supported))
  return errors.UserError(f"{where}: {field}: {value!r}; wanted: {supported}")


def _kind(ours: str) -> type:
  return transformer.TransformerConfig.__annotations__[ours]


def _value(hf, field, kind, where) -> Any:
  """`hf[field]` if it is a `kind` (positive, unless a bool)."""
  if field not in hf:
    raise _refusal(where, field, "absent", f"a {kind.__name__}")
  value = hf[field]
  if kind is bool and isinstance(value, bool):
    return value
  kinds = (int, float) if kind is float else (int,)
  if kind is bool or type(value) not in kinds or not 0 < value < np.inf:
    raise _refusal(where, field, value, f"a {kind.__name__} above 0")
  return kind(value)


def _check_heads(values, family, where):
  for whole, part in (("width", "heads"), ("heads", "kv_heads")):
    if values[whole] % values[part]:
      field, divisor = family.fields[whole], family.fields[part]
      wanted = f"a multiple of {divisor}, which is {values[part]}"
      raise _refusal(where, field, values[whole], wanted)


def _rope_from_hf(hf, where):
  """Theta and scaling; `rope_scaling` rules, as it does in transformers."""
  given = hf["rope_scaling"] or hf["rope_parameters"] or {}
  if not isinstance(given, dict):
    raise _refusal(where, "rope_parameters", given, "an object")
  rope = {"rope_theta": hf["rope_theta"]} | given
  kind = rope.pop("rope_type", rope.pop("type", "default"))
  rope.pop("type", None)
  theta = _value(rope, "rope_theta", float, where)
  del rope["rope_theta"]
  if kind not in ("default", "llama3"):
    raise _refusal(where, "rope_type", kind, ("default", "llama3"))
  fields = _ROPE_SCALING if kind == "llama3" else {}
  if unknown := rope.keys() - fields.values():
    raise _refusal(
      where,
      "rope_parameters",
      sorted(unknown),
      f"only {sorted(fields.values())} for {kind}",
    )
  if kind == "default":
    return {"rope_theta": theta, "rope_scaling": None}
  kinds = transformer.RopeScaling.__annotations__
  scaling = {
    ours: _value(rope, theirs, kinds[ours], where)
    for ours, theirs in fields.items()
  }
  scaling = transformer.RopeScaling(**scaling)
  return {"rope_theta": theta, "rope_scaling": scaling}


def _rope_to_hf(config):
  scaling = None
  if config.rope_scaling is not None:
    ours = dataclasses.asdict(config.rope_scaling)
    scaling = {_ROPE_SCALING[field]: ours[field] for field in ours}
    scaling["rope_type"] = "llama3"
  rope = {"rope_type": "default", "rope_theta": config.rope_theta}
  return {
    "rope_theta": config.rope_theta,
    "rope_scaling": scaling,
    "rope_parameters": rope | (scaling or {}),
  }
