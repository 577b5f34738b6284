"""What Hugging Face calls the parts of our transformer, by model family.

A `Family` is two tables, each read in both directions: the fields of
`config.json` against those of `TransformerConfig`, and the names and layouts
of the weights against the paths of our tree. `convert` moves the arrays.

To add a family: its `Family` here, in `FAMILIES`; its weights in `layouts`; a
field of `TransformerConfig` for what no other family has, and how it is
computed; a rule in `steps.sharding` for a new weight; a model in
`tests/models/zoo.py`, for which every test of parity then runs.

Left out: mixtures of experts, and code that a model directory brings along.
"""

from collections.abc import Callable
import dataclasses
import types
from typing import Any, Literal, get_args, get_origin

from rlhf_jax import errors
from rlhf_jax.models import fields, layouts, transformer
from rlhf_jax.models.fields import Reader

# Fields of ours that say how to run the network, and not what it computes.
_HOW_TO_RUN = ("compute_dtype", "unroll", "remat")
# Fields of ours that no config.json has, for they are not of the network.
_NOT_THERE = ("family", "stored_dtype", "tokens")


@dataclasses.dataclass(frozen=True, kw_only=True)
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
    named: Their field → ours and what its values mean there.
    readers: Of fields that are more than one value.
    whole_heads: Whether the width must be a multiple of the heads.
    inert: Their fields that change nothing that is computed here: dropout,
      how weights begin, ids, caches.
    ignored: Regex of tensors that are buffers, not weights.
    weights: Path in our tree → tensors there.
  """

  model_type: str
  language_model: str
  reward_model: str
  prefix: str = "model."
  fields: dict[str, str]
  fixed: dict[str, Any] = dataclasses.field(default_factory=dict)
  defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
  derived: dict[str, Callable[[dict[str, Any]], int]] = dataclasses.field(
    default_factory=dict
  )
  only: dict[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
  named: dict[str, tuple[str, dict[Any, Any]]] = dataclasses.field(
    default_factory=dict
  )
  readers: tuple[Reader, ...] = ()
  whole_heads: bool = False
  inert: frozenset[str] = frozenset()
  ignored: str = r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
  weights: dict[str, layouts.Weight]


_SIZES = {
  "vocab_size": "vocab_size",
  "width": "hidden_size",
  "layers": "num_hidden_layers",
  "heads": "num_attention_heads",
  "max_length": "max_position_embeddings",
  "tie_embeddings": "tie_word_embeddings",
}
_LLAMA_SIZES = _SIZES | {
  "kv_heads": "num_key_value_heads",
  "mlp_width": "intermediate_size",
  "norm_epsilon": "rms_norm_eps",
  "head_size": "head_dim",
}
_ATTENTION_BIAS = {"qkv_bias": "attention_bias", "out_bias": "attention_bias"}
_MLP_BIAS = {"mlp_bias": "mlp_bias"}
_LLAMA_DERIVED = {
  "num_key_value_heads": lambda hf: hf["num_attention_heads"],
  "head_dim": lambda hf: hf["hidden_size"] // hf["num_attention_heads"],
}
_LLAMA_DEFAULTS = {
  "head_dim": None,
  "num_key_value_heads": None,
  "hidden_act": "silu",
  "rms_norm_eps": 1e-6,
  "tie_word_embeddings": False,
}
_SILU = {"hidden_act": ("silu",)}
_NO_BIASES = {"attention_bias": False, "mlp_bias": False}
_INERT = frozenset(
  {
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "initializer_range",
    "pad_token_id",
    "pretraining_tp",
    "use_cache",
  }
)


def _llama_like(
  model_type: str, name: str, *, sizes: dict[str, str] | None = None, **given
) -> Family:
  """A family whose network is a Llama but for what is given."""
  usual: dict[str, Any] = {
    "fields": _LLAMA_SIZES | (sizes or {}),
    "derived": _LLAMA_DERIVED,
    "only": _SILU,
    "readers": (fields.rotary(),),
    "inert": _INERT,
    "weights": layouts.llama(),
    "reward_model": f"{name}ForSequenceClassification",
  }
  given["defaults"] = _LLAMA_DEFAULTS | given.get("defaults", {})
  return Family(
    model_type=model_type,
    language_model=f"{name}ForCausalLM",
    **(usual | given),
  )


_LLAMA = _llama_like(
  "llama",
  "Llama",
  sizes=_ATTENTION_BIAS | _MLP_BIAS,
  defaults=_NO_BIASES,
  whole_heads=True,
)
_MISTRAL = _llama_like(
  "mistral",
  "Mistral",
  readers=(fields.rotary(), fields.WINDOW_EVERYWHERE),
)
_SMOLLM3 = _llama_like(
  "smollm3",
  "SmolLM3",
  sizes=_ATTENTION_BIAS | _MLP_BIAS,
  defaults={"tie_word_embeddings": True, "use_sliding_window": False}
  | _NO_BIASES,
  only=_SILU | {"use_sliding_window": (False,)},
  readers=(fields.rotary(), fields.UNTURNED_LAYERS),
  inert=_INERT | {"sliding_window", "layer_types"},
)
_QWEN2 = _llama_like(
  "qwen2",
  "Qwen2",
  fixed={"qkv_bias": True},
  readers=(fields.rotary(), fields.WINDOW_IF_USED),
)
_QWEN3 = _llama_like(
  "qwen3",
  "Qwen3",
  sizes=_ATTENTION_BIAS,
  fixed={"qk_norm": "head"},
  defaults={"head_dim": 128, "attention_bias": False},
  readers=(fields.rotary(), fields.WINDOW_IF_USED),
)
_PHI3 = _llama_like(
  "phi3",
  "Phi3",
  defaults={"rms_norm_eps": 1e-5},
  readers=(
    fields.rotary(partial="partial_rotary_factor"),
    fields.WINDOW_EVERYWHERE,
  ),
  inert=_INERT | {"resid_pdrop", "embd_pdrop"},
  weights=layouts.llama(fused=True),
)
_OLMO2 = _llama_like(
  "olmo2",
  "Olmo2",
  sizes=_ATTENTION_BIAS,
  fixed={"norms_before": False, "norms_after": True, "qk_norm": "heads"},
  defaults={"rms_norm_eps": 1e-5, "attention_bias": False},
  weights=layouts.llama(norms=layouts.OLMO2_NORMS, qk_norm_axes=3),
)

_GEMMA_FIXED = {
  "norm_plus_one": True,
  "scale_embeddings": True,
  "activation": "geglu",
}
_GEMMA_DEFAULTS = {
  "head_dim": 256,
  "tie_word_embeddings": True,
  "attention_bias": False,
  "use_bidirectional_attention": None,
  "hidden_act": "gelu_pytorch_tanh",
  "hidden_activation": None,
}
_GELU = ("gelu_pytorch_tanh",)
_CAUSAL = {"use_bidirectional_attention": (None, False)}
# Gemma 1 was published as "gelu", and means tanh's, as transformers says too.
_GEMMA = _llama_like(
  "gemma",
  "Gemma",
  sizes=_ATTENTION_BIAS,
  fixed=_GEMMA_FIXED,
  defaults=_GEMMA_DEFAULTS,
  only={"hidden_act": (*_GELU, "gelu_new", "gelu"), **_CAUSAL},
  inert=_INERT | {"hidden_activation"},
)
_CAPS = {
  "attention_softcap": "attn_logit_softcapping",
  "attention_scalar": "query_pre_attn_scalar",
  "logit_softcap": "final_logit_softcapping",
}
_GEMMA2_LIKE: dict[str, Any] = {
  "sizes": _ATTENTION_BIAS | _CAPS,
  "fixed": _GEMMA_FIXED | {"norms_after": True},
  "inert": _INERT | {"hidden_act"},
  "whole_heads": True,
}
_GEMMA2 = _llama_like(
  "gemma2",
  "Gemma2",
  **_GEMMA2_LIKE,
  defaults=_GEMMA_DEFAULTS
  | {
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window": 4096,
  },
  only={"hidden_activation": _GELU, **_CAUSAL},
  readers=(fields.rotary(), fields.alternating(2)),
  weights=layouts.llama(norms=layouts.GEMMA2_NORMS),
)
_GEMMA3 = _llama_like(
  "gemma3_text",
  "Gemma3",
  reward_model="Gemma3TextForSequenceClassification",
  **(_GEMMA2_LIKE | {"fixed": _GEMMA2_LIKE["fixed"] | {"qk_norm": "head"}}),
  defaults=_GEMMA_DEFAULTS
  | {
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "sliding_window": 4096,
  },
  only={"hidden_activation": _GELU, **_CAUSAL},
  readers=(fields.TWO_ROPES, fields.alternating(6)),
  weights=layouts.llama(norms=layouts.GEMMA2_NORMS),
)

_GPT_FIXED = {"norm": "layer", "mlp_bias": True}
_GPT_NEOX = Family(
  model_type="gpt_neox",
  language_model="GPTNeoXForCausalLM",
  reward_model="GPTNeoXForSequenceClassification",
  prefix="gpt_neox.",
  fields=_SIZES
  | _ATTENTION_BIAS
  | {
    "kv_heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "norm_epsilon": "layer_norm_eps",
    "parallel_residual": "use_parallel_residual",
  },
  fixed=_GPT_FIXED,
  whole_heads=True,
  defaults={
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "use_parallel_residual": True,
    "attention_bias": True,
    "is_decoder": False,
  },
  named={
    "hidden_act": (
      "activation",
      {
        "gelu": "gelu_exact",
        "gelu_new": "gelu",
        "gelu_fast": "gelu",
        "gelu_pytorch_tanh": "gelu",
        "relu": "relu",
      },
    )
  },
  readers=(
    fields.rotary(theta="rotary_emb_base", partial="rotary_pct", share=0.25),
  ),
  inert=_INERT
  | {"hidden_dropout", "classifier_dropout", "is_decoder", "rope_theta"},
  ignored=(
    r"gpt_neox\.layers\.\d+\.attention\.(masked_bias|bias|rotary_emb.inv_freq)"
  ),
  weights=layouts.gpt_neox(),
)
_GPT2 = Family(
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
  whole_heads=True,
  fixed=_GPT_FIXED
  | {"positions": "learned", "qkv_bias": True, "out_bias": True},
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
  named={
    "activation_function": (
      "activation",
      {
        "gelu_new": "gelu",
        "gelu_pytorch_tanh": "gelu",
        "gelu": "gelu_exact",
        "relu": "relu",
      },
    )
  },
  only={
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
  },
  inert=_INERT
  | {
    "attn_pdrop",
    "embd_pdrop",
    "resid_pdrop",
    "summary_activation",
    "summary_first_dropout",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
  },
  ignored=r"transformer\.h\.\d+\.attn\.(masked_)?bias",
  weights=layouts.gpt2(),
)
_OPT = Family(
  model_type="opt",
  language_model="OPTForCausalLM",
  reward_model="OPTForSequenceClassification",
  fields=_SIZES | {"kv_heads": "num_attention_heads", "mlp_width": "ffn_dim"},
  whole_heads=True,
  fixed=_GPT_FIXED
  | {
    "positions": "learned",
    "position_offset": 2,
    "qkv_bias": True,
    "out_bias": True,
  },
  defaults={
    "activation_function": "relu",
    "tie_word_embeddings": True,
    "do_layer_norm_before": True,
    "_remove_final_layer_norm": False,
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
  },
  named={
    "activation_function": (
      "activation",
      {"relu": "relu", "gelu": "gelu_exact", "gelu_new": "gelu"},
    )
  },
  only={
    "do_layer_norm_before": (True,),
    "_remove_final_layer_norm": (False,),
    "enable_bias": (True,),
    "layer_norm_elementwise_affine": (True,),
  },
  readers=(fields.SAME_WIDTH,),
  inert=_INERT | {"dropout", "layerdrop", "init_std"},
  weights=layouts.opt(),
)

# In the order in which a network is offered to them: the plainest first.
FAMILIES = (
  _LLAMA,
  _QWEN2,
  _QWEN3,
  _MISTRAL,
  _SMOLLM3,
  _PHI3,
  _OLMO2,
  _GEMMA,
  _GEMMA2,
  _GEMMA3,
  _GPT2,
  _GPT_NEOX,
  _OPT,
)


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
      raise fields.refusal(
        where,
        field,
        hf[field],
        "no such field, as code that comes with a model is never run",
      )
  families = {family.model_type: family for family in FAMILIES}
  model_type = str(hf.get("model_type"))
  if model_type not in families:
    raise fields.refusal(where, "model_type", model_type, families)
  family = families[model_type]
  supported = family.language_model, family.reward_model
  architectures = hf.get("architectures") or [family.language_model]
  if architectures[0] not in supported:
    raise fields.refusal(where, "architectures", architectures, supported)
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
  if hf.get("quantization_config"):
    raise fields.refusal(
      where,
      "quantization_config",
      hf["quantization_config"],
      "weights that are not quantised (float32, float16 or bfloat16)",
    )
  hf = family.defaults | hf
  for field, supported in family.only.items():
    if hf[field] not in supported:
      raise fields.refusal(where, field, hf[field], supported)
  values = dict(family.fixed)
  for theirs, (ours, meanings) in family.named.items():
    if hf[theirs] not in meanings:
      raise fields.refusal(where, theirs, hf[theirs], meanings)
    values[ours] = meanings[hf[theirs]]
  for ours, theirs in family.fields.items():
    if hf.get(theirs) is None and theirs in family.derived:
      hf[theirs] = family.derived[theirs](hf)
    values[ours] = _value(hf, theirs, ours, where)
  _check_heads(values, family, where)
  values.setdefault("head_size", values["width"] // values["heads"])
  for reader in family.readers:
    values |= reader.read(hf, values, where)
  try:
    return transformer.TransformerConfig(
      **values,
      unroll=unroll or values["layers"],
      remat=remat,
      compute_dtype=compute_dtype,
      family=family.model_type,
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
  dtype: str = "float32",
) -> dict[str, Any]:
  """The content of a `config.json` that `transformers.AutoConfig` loads.

  Rope is written in both spellings, as other readers know only the old one.

  Raises:
    UserError: If no family has such an architecture.
  """
  lost = {}
  # Its own before the others.
  for family in sorted(FAMILIES, key=lambda f: f.model_type != config.family):
    hf = _written(config, family)
    if not (different := _differences(config, family, hf)):
      break
    lost[family.model_type] = different
  else:
    nearest = min(lost, key=lambda name: len(lost[name]))
    raise errors.UserError(
      f"model as {nearest}: {', '.join(lost[nearest])}; no other family is "
      "nearer"
    )
  name = family.reward_model if reward_model else family.language_model
  hf |= {
    "architectures": [name],
    "dtype": dtype,
    "torch_dtype": dtype,  # As transformers 4 has it.
    "bos_token_id": bos_id,
    "eos_token_id": list(stop_ids) or None,
    "pad_token_id": pad_id,
  }
  if reward_model:
    hf |= {"id2label": {"0": "score"}, "label2id": {"score": 0}}
  return hf


def _written(config, family) -> dict[str, Any]:
  """Its fields in a `config.json`, right if the family can say them at all."""
  ours = dataclasses.asdict(config)
  hf = {"model_type": family.model_type}
  hf |= {theirs: ours[field] for field, theirs in family.fields.items()}
  hf |= {field: supported[0] for field, supported in family.only.items()}
  for theirs, (field, meanings) in family.named.items():
    names = [name for name, meant in meanings.items() if meant == ours[field]]
    hf[theirs] = (names or list(meanings))[0]
  for reader in family.readers:
    hf |= reader.write(config)
  return hf


def _differences(config, family, hf) -> list[str]:
  """What does not come back as it went."""
  run = {name: getattr(config, name) for name in _HOW_TO_RUN}
  where = f"model as {family.model_type}"
  try:
    read = config_from_hf(dict(hf), where=where, **run)
  except errors.UserError as error:
    return [str(error).removeprefix(f"{where}: ")]
  ours, theirs = dataclasses.asdict(config), dataclasses.asdict(read)
  return sorted(
    f"{field}: {ours[field]!r}; {theirs[field]!r} is wanted"
    for field in ours
    if ours[field] != theirs[field] and field not in _NOT_THERE
  )


def _value(hf, theirs, ours, where) -> Any:
  """A value of the type that our field has; null where that may be None."""
  kind = transformer.TransformerConfig.__annotations__[ours]
  if get_origin(kind) is types.UnionType:
    if hf.get(theirs) is None:
      return None
    kind = get_args(kind)[0]
  return fields.value_of(hf, theirs, kind, where)


def _check_heads(values, family, where):
  pairs = [("heads", "kv_heads")]
  if family.whole_heads:
    pairs.append(("width", "heads"))
  for whole, part in pairs:
    if values[whole] % values[part]:
      field, divisor = family.fields[whole], family.fields[part]
      wanted = f"a multiple of {divisor}, which is {values[part]}"
      raise fields.refusal(where, field, values[whole], wanted)
