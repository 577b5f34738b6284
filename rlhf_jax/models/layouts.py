"""How Hugging Face names and lays out the weights of our tree.

One table a family, path in our tree → `Weight`, serves both directions: a
`Weight` names the tensors of one leaf and has a pair of array functions.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import types


class Weight(NamedTuple):
  """One leaf of our tree (a single layer of it) against its tensors there.

  Attributes:
    names: Of the tensors; `{}` stands for the layer.
    split: Our array → their tensors, in the order of `names`. Only reshapes
      and slices, so it also runs on tracers, which tells the shapes wanted.
    join: Their tensors and the shape of our array → our array.
  """

  names: tuple[str, ...]
  split: Callable[[Any], tuple[Any, ...]]
  join: Callable[[list[np.ndarray], tuple[int, ...]], np.ndarray]


def _same(name: str) -> Weight:
  return Weight((name,), lambda x: (x,), lambda parts, shape: parts[0])


def _flat(name: str) -> Weight:
  """Several input axes → one."""
  return Weight(
    (name,),
    lambda x: (x.reshape(-1, x.shape[-1]),),
    lambda parts, shape: parts[0].reshape(shape),
  )


def _stacked(*names: str) -> Weight:
  """One tensor per entry of the second last axis."""
  return Weight(
    names,
    lambda x: tuple(x[..., i, :] for i in range(len(names))),
    lambda parts, shape: np.stack(parts, axis=-2),
  )


def _grouped(*names: str) -> Weight:
  """Queries, keys and values apart; ours `[..., G, N, K]`."""

  def split(x):
    parts = x[..., :-2, :], x[..., -2, :], x[..., -1, :]
    return tuple(part.reshape(*x.shape[:-3], -1) for part in parts)

  def join(parts, shape):
    groups, _, size = shape[-3:]
    parts = [p.reshape(*p.shape[:-1], groups, -1, size) for p in parts]
    return np.concatenate(parts, axis=-2)

  return Weight(names, split, join)


def _fused(name: str) -> Weight:
  """Queries, keys and values in one `[..., 3·H·K]`; ours `[..., H, 3, K]`."""

  def join(parts, shape):
    heads, three, size = shape[-3:]
    x = parts[0].reshape(*parts[0].shape[:-1], three, heads, size)
    return x.swapaxes(-3, -2)

  return Weight(
    (name,),
    lambda x: (x.swapaxes(-3, -2).reshape(*x.shape[:-3], -1),),
    join,
  )


def _blocks(name: str) -> Weight:
  """All queries, then all keys, then all values in one; ours `[..., G, N, K]`.

  Unlike `_fused` with fewer keys than queries.
  """
  apart = _grouped(name, name, name)

  def join(parts, shape):
    groups, wide, size = shape[-3:]
    ends = groups * size * np.array([wide - 2, wide - 1])
    return apart.join(np.split(parts[0], ends, axis=-1), shape)

  def split(x):
    parts = apart.split(x)
    several = jnp if isinstance(x, jax.Array) else np
    return (several.concatenate(parts, axis=-1),)

  return Weight((name,), split, join)


def _per_head(name: str) -> Weight:
  """One `[..., H·3·K]`, a head's query, key and value side by side, as ours."""
  return _ending(name, 3)


def _side_by_side(name: str) -> Weight:
  """One `[..., M·F]`, the gates before the rest; ours `[..., M, F]`."""
  return _ending(name, 2)


def _ending(name: str, axes: int) -> Weight:
  """The last axes as one."""
  return Weight(
    (name,),
    lambda x: (x.reshape(*x.shape[:-axes], -1),),
    lambda parts, shape: parts[0].reshape(shape),
  )


def _transposed(weight: Weight) -> Weight:
  """Tensors `[out, in]`, as torch's Linear has them; biases stay."""
  return Weight(
    weight.names,
    lambda x: tuple(part.T for part in weight.split(x)),
    lambda parts, shape: weight.join([part.T for part in parts], shape),
  )


def _score() -> Weight:
  """Ours `[D]`, theirs `[1, D]`."""
  return Weight(
    ("score.weight",),
    lambda x: (x[None],),
    lambda parts, shape: parts[0].reshape(shape),
  )


# Our norms of a layer → theirs, by where a family has them.
LLAMA_NORMS = {
  "attention_norm": "input_layernorm",
  "mlp_norm": "post_attention_layernorm",
}
GEMMA2_NORMS = {
  "attention_norm": "input_layernorm",
  "attention_post_norm": "post_attention_layernorm",
  "mlp_norm": "pre_feedforward_layernorm",
  "mlp_post_norm": "post_feedforward_layernorm",
}
OLMO2_NORMS = {
  "attention_post_norm": "post_attention_layernorm",
  "mlp_post_norm": "post_feedforward_layernorm",
}


def llama(
  *,
  norms: Mapping[str, str] = LLAMA_NORMS,
  fused: bool = False,
  qk_norm_axes: int = 1,
) -> dict[str, Weight]:
  """Path in our tree → tensors of a Llama, or of a relative of it.

  Args:
    norms: Our norms of a layer → theirs.
    fused: One tensor for queries, keys and values, one for gate and up.
    qk_norm_axes: Of our weights, which are one axis there.
  """
  layer = "model.layers.{}."
  attention, mlp = f"{layer}self_attn.", f"{layer}mlp."
  qkv = [f"{attention}{x}_proj" for x in "qkv"]
  gate_up = [f"{mlp}{x}_proj" for x in ("gate", "up")]
  kernels = lambda names: [f"{name}.weight" for name in names]
  biases = lambda names: [f"{name}.bias" for name in names]
  weights = {
    "embedding/tokens": _same("model.embed_tokens.weight"),
    "layers/attention/qkv/kernel": _transposed(_grouped(*kernels(qkv))),
    "layers/attention/qkv/bias": _grouped(*biases(qkv)),
    "layers/attention/qk_norm/query": _ending(
      f"{attention}q_norm.weight", qk_norm_axes
    ),
    "layers/attention/qk_norm/key": _ending(
      f"{attention}k_norm.weight", qk_norm_axes
    ),
    "layers/attention/out/kernel": _transposed(
      _flat(f"{attention}o_proj.weight")
    ),
    "layers/attention/out/bias": _same(f"{attention}o_proj.bias"),
    "layers/mlp/in/kernel": _transposed(_stacked(*kernels(gate_up))),
    "layers/mlp/in/bias": _stacked(*biases(gate_up)),
    "layers/mlp/out/kernel": _transposed(_flat(f"{mlp}down_proj.weight")),
    "layers/mlp/out/bias": _same(f"{mlp}down_proj.bias"),
    "final_norm/scale": _same("model.norm.weight"),
    "lm_head/kernel": _same("lm_head.weight"),
    "score_head/kernel": _score(),
  }
  for ours, theirs in norms.items():
    weights[f"layers/{ours}/scale"] = _same(f"{layer}{theirs}.weight")
  if fused:
    weights |= {
      "layers/attention/qkv/kernel": _transposed(
        _blocks(f"{attention}qkv_proj.weight")
      ),
      "layers/mlp/in/kernel": _transposed(
        _side_by_side(f"{mlp}gate_up_proj.weight")
      ),
    }
  return weights


def _layer_norms(**names: str) -> dict[str, Weight]:
  """Weight and bias of LayerNorms, by our path (`__` for `/`)."""
  return {
    f"{path.replace('__', '/')}/{ours}": _same(f"{name}.{theirs}")
    for path, name in names.items()
    for ours, theirs in (("scale", "weight"), ("bias", "bias"))
  }


def _biased_layers(
  qkv: tuple[Weight, Weight], *, out: str, up: str, down: str
) -> dict[str, Weight]:
  """Attention and an MLP without a gate, all with biases, as torch's Linear.

  Args:
    qkv: Kernel and bias of queries, keys and values.
    out: Of attention.
    up: Into the MLP.
    down: Out of it.
  """
  linear = {
    "attention/qkv": qkv,
    "attention/out": (_flat(f"{out}.weight"), _same(f"{out}.bias")),
    "mlp/in": (_stacked(f"{up}.weight"), _stacked(f"{up}.bias")),
    "mlp/out": (_flat(f"{down}.weight"), _same(f"{down}.bias")),
  }
  weights = {}
  for path, (kernel, bias) in linear.items():
    weights[f"layers/{path}/kernel"] = _transposed(kernel)
    weights[f"layers/{path}/bias"] = bias
  return weights


def gpt_neox() -> dict[str, Weight]:
  """Path in our tree → tensors of a GPT-NeoX or Pythia."""
  layer = "gpt_neox.layers.{}."
  qkv = f"{layer}attention.query_key_value"
  return {
    "embedding/tokens": _same("gpt_neox.embed_in.weight"),
    "lm_head/kernel": _same("embed_out.weight"),
    "score_head/kernel": _score(),
    **_layer_norms(
      layers__attention_norm=f"{layer}input_layernorm",
      layers__mlp_norm=f"{layer}post_attention_layernorm",
      final_norm="gpt_neox.final_layer_norm",
    ),
    **_biased_layers(
      (_per_head(f"{qkv}.weight"), _per_head(f"{qkv}.bias")),
      out=f"{layer}attention.dense",
      up=f"{layer}mlp.dense_h_to_4h",
      down=f"{layer}mlp.dense_4h_to_h",
    ),
  }


def opt() -> dict[str, Weight]:
  """Path in our tree → tensors of an OPT."""
  layer = "model.decoder.layers.{}."
  qkv = [f"{layer}self_attn.{x}_proj" for x in "qkv"]
  return {
    "embedding/tokens": _same("model.decoder.embed_tokens.weight"),
    "embedding/positions": _same("model.decoder.embed_positions.weight"),
    "lm_head/kernel": _same("lm_head.weight"),
    "score_head/kernel": _score(),
    **_layer_norms(
      layers__attention_norm=f"{layer}self_attn_layer_norm",
      layers__mlp_norm=f"{layer}final_layer_norm",
      final_norm="model.decoder.final_layer_norm",
    ),
    **_biased_layers(
      (
        _grouped(*(f"{name}.weight" for name in qkv)),
        _grouped(*(f"{name}.bias" for name in qkv)),
      ),
      out=f"{layer}self_attn.out_proj",
      up=f"{layer}fc1",
      down=f"{layer}fc2",
    ),
  }


def gpt2() -> dict[str, Weight]:
  """Path in our tree → tensors of a GPT-2."""
  layer = "transformer.h.{}."
  return {
    "embedding/tokens": _same("transformer.wte.weight"),
    "embedding/positions": _same("transformer.wpe.weight"),
    "layers/attention_norm/scale": _same(f"{layer}ln_1.weight"),
    "layers/attention_norm/bias": _same(f"{layer}ln_1.bias"),
    "layers/attention/qkv/kernel": _fused(f"{layer}attn.c_attn.weight"),
    "layers/attention/qkv/bias": _fused(f"{layer}attn.c_attn.bias"),
    "layers/attention/out/kernel": _flat(f"{layer}attn.c_proj.weight"),
    "layers/attention/out/bias": _same(f"{layer}attn.c_proj.bias"),
    "layers/mlp_norm/scale": _same(f"{layer}ln_2.weight"),
    "layers/mlp_norm/bias": _same(f"{layer}ln_2.bias"),
    "layers/mlp/in/kernel": _stacked(f"{layer}mlp.c_fc.weight"),
    "layers/mlp/in/bias": _stacked(f"{layer}mlp.c_fc.bias"),
    "layers/mlp/out/kernel": _flat(f"{layer}mlp.c_proj.weight"),
    "layers/mlp/out/bias": _same(f"{layer}mlp.c_proj.bias"),
    "final_norm/scale": _same("transformer.ln_f.weight"),
    "final_norm/bias": _same("transformer.ln_f.bias"),
    "lm_head/kernel": _same("lm_head.weight"),
    "score_head/kernel": _score(),
  }


def to_hf(
  params: types.Params, weights: Mapping[str, Weight]
) -> dict[str, Any]:
  """Every tensor of a Hugging Face model by name; views where that is possible.

  A score head sits in the tree beside the layers. Runs on tracers too.
  """
  tensors = {}
  for path, leaf in flatten(params).items():
    weight = weights[path]
    layers = leaf if _is_stacked(path) else [leaf]
    for i, x in enumerate(layers):
      names = [name.format(i) for name in weight.names]
      tensors |= dict(zip(names, weight.split(x), strict=True))
  return tensors


def from_hf(
  template: types.Params,
  weights: Mapping[str, Weight],
  read: Callable[[str], np.ndarray],
) -> types.Params:
  """The tree of `template`'s shapes, float32, out of the tensors of `read`."""
  tree = {}
  for path, leaf in flatten(template).items():
    *parents, name = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = _join(leaf.shape, path, weights[path], read)
  return tree


def flatten(tree: types.Params) -> dict[str, Any]:
  """Path → leaf."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  path = lambda keys: jax.tree_util.keystr(keys, simple=True, separator="/")
  return {path(keys): leaf for keys, leaf in leaves}


def _is_stacked(path):
  return path.startswith("layers/")


def _join(shape, path, weight, read):
  """One leaf of our tree, layer by layer."""
  count, *layer_shape = shape if _is_stacked(path) else (1, *shape)
  layers = np.empty((count, *layer_shape), np.float32)
  for i in range(count):
    parts = [read(name.format(i)) for name in weight.names]
    layers[i] = weight.join(parts, tuple(layer_shape))
  return layers.reshape(shape)
