"""A decoder-only transformer as plain functions of a plain parameter tree.

One network, configured and not cloned: each difference between two families
of models is a field of `TransformerConfig`, and `models.families` says which
family has which.

    params = init(key, config)
    hidden, cache = apply(params, tokens, config=config, ...)
    head(params, config)      # makes logits of hidden: objective.logprobs

Parameters, layers stacked on their first axis (N = H/G + 2: the queries of a
KV group, then its key and its value, so that one matmul makes all three and
the tensor axis divides whole groups):

    embedding/tokens                [V, D]
    embedding/positions             [C + O, D]     learned; O = position_offset
    layers/attention_norm/scale     [L, D]         and bias for LayerNorm
    layers/attention/qkv/kernel     [L, D, G, N, K]
    layers/attention/qkv/bias       [L, G, N, K]   qkv_bias
    layers/attention/qk_norm/query  [L, K]         or [L, G, H/G, K]: qk_norm
    layers/attention/qk_norm/key    [L, K]         or [L, G, 1, K]
    layers/attention/out/kernel     [L, G, H/G, K, D]
    layers/attention/out/bias       [L, D]         out_bias
    layers/attention_post_norm/scale [L, D]        norms_after
    layers/mlp_norm/scale           [L, D]         and bias for LayerNorm
    layers/mlp/in/kernel            [L, D, M, F]   M = 2 (gate, up) or 1
    layers/mlp/in/bias              [L, M, F]      mlp_bias
    layers/mlp/out/kernel           [L, F, D]
    layers/mlp/out/bias             [L, D]         mlp_bias
    layers/mlp_post_norm/scale      [L, D]         norms_after
    final_norm/scale                [D]            and bias for LayerNorm
    lm_head/kernel                  [V, D]         untied head

Left out: dropout (policy and reference would differ at step 0), mutable
collections (the KV cache is an argument and a result) and partitioning boxes
(`steps.sharding` matches paths instead).
"""

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from rlhf_jax import types
from rlhf_jax.models import rope

LayerKind = Literal["global", "local", "unturned"]
Activation = Literal["swiglu", "geglu", "gelu", "gelu_exact", "relu"]
_GATED = {"swiglu": nn.silu, "geglu": nn.gelu}
_PLAIN = {
  "gelu": nn.gelu,
  "gelu_exact": functools.partial(nn.gelu, approximate=False),
  "relu": nn.relu,
}


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """The architecture; hashable, so it can be a static argument.

  Attributes:
    norm: RMSNorm, or LayerNorm with biases.
    norm_plus_one: The norm's weights are kept less 1.
    norms_before: Attention and MLP read their input normalised.
    norms_after: What they add is normalised (with `norms_before` too: both).
    parallel_residual: The MLP reads what attention reads, not what it wrote.
    qk_norm: RMSNorm of queries and keys before they turn: of each head, or of
      all heads together.
    positions: Turned queries and keys, or a table added to the embeddings.
    position_offset: Rows of that table before position 0.
    rope_theta: Base of the wavelengths, and their stretching.
    rotary_size: Numbers of a head that turn, the first ones; None is all.
    layer_kinds: Per layer: "global" (the default, ()), "local" (attends to
      `window` tokens, itself included) or "unturned" (global, without rope).
    window: Of local layers.
    local_rope_theta: Of local layers, without stretching; None is as global.
    attention_scalar: Queries are divided by its root; None is the head size.
    attention_softcap: c of c·tanh(x/c), on attention's logits.
    logit_softcap: The same, on the logits of the next token.
    tokens: Ids that the tokenizer has, if fewer than `vocab_size`: the rest
      are never drawn, and have no probability.
    activation: SiLU or GELU of a gate, or GELU (its tanh form, or exact) or
      ReLU without one.
    scale_embeddings: Embeddings are multiplied by the root of the width.
    unroll: Layers per scan step. `layers` unrolls fully, which runs small
      models 1.4 to 1.6 times faster on CPU; 1 compiles large ones fastest.
    remat: Recompute each layer in the backward pass instead of keeping it.
    compute_dtype: Of matmul inputs; parameters and logits are float32.
    family: Where it came from, by `model_type`; says what is exported where
      several families have such a network, and nothing else.
    stored_dtype: Of the weights' file that it came from; what is exported.
  """

  vocab_size: int
  width: int
  layers: int
  heads: int
  kv_heads: int
  head_size: int
  mlp_width: int
  max_length: int
  norm: Literal["rms", "layer"] = "rms"
  norm_epsilon: float = 1e-5
  norm_plus_one: bool = False
  norms_before: bool = True
  norms_after: bool = False
  parallel_residual: bool = False
  qk_norm: Literal["none", "head", "heads"] = "none"
  positions: Literal["rope", "learned"] = "rope"
  position_offset: int = 0
  rope_theta: float = 10_000.0
  rope_scaling: rope.RopeScaling | None = None
  rotary_size: int | None = None
  layer_kinds: tuple[LayerKind, ...] = ()
  window: int | None = None
  local_rope_theta: float | None = None
  attention_scalar: int | None = None
  attention_softcap: float | None = None
  logit_softcap: float | None = None
  tokens: int | None = None
  activation: Activation = "swiglu"
  scale_embeddings: bool = False
  tie_embeddings: bool = True
  qkv_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  compute_dtype: Literal["float32", "bfloat16"] = "float32"
  unroll: int = 1
  remat: bool = False
  family: str = ""
  stored_dtype: Literal["float32", "bfloat16", "float16"] = "float32"

  def __post_init__(self):
    if self.heads % self.kv_heads:
      raise ValueError(
        f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}"
      )
    if self.layers % self.unroll:
      raise ValueError(
        f"unroll={self.unroll} does not divide layers={self.layers}"
      )
    size = self.turning_size
    if self.positions == "rope" and (size % 2 or size > self.head_size):
      name = "head_size" if self.rotary_size is None else "rotary_size"
      raise ValueError(
        f"{name}={size} is odd, or more than a head; rope rotates pairs"
      )
    if self.layer_kinds and len(self.layer_kinds) != self.layers:
      raise ValueError(
        f"layer_kinds has {len(self.layer_kinds)} entries for {self.layers} "
        "layers"
      )
    if ("local" in self.layer_kinds) != (self.window is not None):
      raise ValueError(
        f"window={self.window}; local layers need one, and others have none"
      )

  @property
  def turning_size(self) -> int:
    """Numbers of a head that turn."""
    return self.head_size if self.rotary_size is None else self.rotary_size

  @property
  def longest(self) -> int:
    """Tokens of the longest text that the network can read."""
    return rope.longest(self.rope_scaling, self.max_length)


class Cache(NamedTuple):
  """Keys and values of the tokens so far: `[B, G, C, K]` a layer.

  A tuple of layers where the layers are unrolled (each is updated in place),
  one array stacked on a leading L axis where they are scanned.
  """

  keys: tuple[Array, ...] | Array
  values: tuple[Array, ...] | Array


def _dtype(config: TransformerConfig):
  return jnp.dtype(config.compute_dtype)


class _Norm(nn.Module):
  config: TransformerConfig

  @nn.compact
  def __call__(self, x):
    config = self.config
    x32 = x.astype(jnp.float32)
    scale = _norm_weight(self, "scale", (x.shape[-1],))
    if config.norm == "layer":
      bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
      x32 = x32 - x32.mean(-1, keepdims=True)
    variance = jnp.square(x32).mean(-1, keepdims=True)
    y = x32 * lax.rsqrt(variance + config.norm_epsilon) * scale
    return (y + bias if config.norm == "layer" else y).astype(x.dtype)


def _norm_weight(module, name, shape):
  """What a normalised x is multiplied by; 1 at the start."""
  if module.config.norm_plus_one:
    return 1.0 + module.param(name, nn.initializers.zeros, shape)
  return module.param(name, nn.initializers.ones, shape)


class _QueryKeyNorm(nn.Module):
  """RMSNorm of queries and keys `[B, T, G, H/G + 1, K]`, the key at the end."""

  config: TransformerConfig

  @nn.compact
  def __call__(self, x):
    config = self.config
    group = config.heads // config.kv_heads
    queries, keys = lax.split(x.astype(jnp.float32), (group, 1), axis=3)
    axes, shapes = -1, ((config.head_size,),) * 2
    if config.qk_norm == "heads":
      axes = (2, 3, 4)
      shapes = (queries.shape[2:], keys.shape[2:])
    parts = []
    for name, part, shape in zip(("query", "key"), (queries, keys), shapes):
      scale = _norm_weight(self, name, shape)
      variance = jnp.square(part).mean(axes, keepdims=True)
      parts.append(part * lax.rsqrt(variance + config.norm_epsilon) * scale)
    return jnp.concatenate(parts, axis=3).astype(x.dtype)


class _Dense(nn.Module):
  """`x[..., in] → x[..., out]`; the kernel may have several axes on a side."""

  config: TransformerConfig
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]
  use_bias: bool
  scale: float = 1.0

  @nn.compact
  def __call__(self, x):
    fan_in, fan_out = math.prod(self.inputs), math.prod(self.outputs)
    normal = nn.initializers.normal(self.scale / math.sqrt(fan_in))
    kernel = self.param("kernel", normal, self.inputs + self.outputs)
    # Rows by columns: a product over [B, T, in] costs up to a third more,
    # for its gradient contracts two axes at once.
    batch = x.shape[: x.ndim - len(self.inputs)]
    matrix = kernel.reshape(fan_in, fan_out).astype(_dtype(self.config))
    y = (x.reshape(-1, fan_in) @ matrix).reshape(batch + self.outputs)
    if self.use_bias:
      bias = self.param("bias", nn.initializers.zeros, self.outputs)
      y = y + bias.astype(y.dtype)
    return y


def _rotary(positions, config: TransformerConfig, kind: LayerKind):
  """Cosine and sine `[B, T, K/2]` of each position's angle per pair."""
  theta, scaling = config.rope_theta, config.rope_scaling
  if kind == "local" and config.local_rope_theta is not None:
    theta, scaling = config.local_rope_theta, None
  frequency, factor = rope.frequencies(
    config.turning_size, theta, scaling, config.max_length
  )
  angle = positions[..., None].astype(jnp.float32) * frequency
  if kind == "unturned":
    return jnp.ones_like(angle), jnp.zeros_like(angle)
  if factor == 1.0:
    return jnp.cos(angle), jnp.sin(angle)
  return factor * jnp.cos(angle), factor * jnp.sin(angle)


def _rotate(x, rotary, size):
  """Rotates pairs (i, i + size/2) of `x` [B, T, G, N, K], in float32."""
  cos, sin = (a[:, :, None, None, :] for a in rotary)
  turning, rest = x, ()
  if size < x.shape[-1]:
    turning, *rest = jnp.split(x, (size,), axis=-1)
  first, second = jnp.split(turning.astype(jnp.float32), 2, axis=-1)
  rotated = (first * cos - second * sin, second * cos + first * sin)
  return jnp.concatenate((*rotated, *rest), axis=-1).astype(x.dtype)


class _Attention(nn.Module):
  config: TransformerConfig

  @nn.compact
  def __call__(self, x, rotary, bias, cache, index):
    config = self.config
    group = config.heads // config.kv_heads
    shape = (config.kv_heads, group + 2, config.head_size)
    qkv = _Dense(config, (config.width,), shape, config.qkv_bias, name="qkv")(x)
    # `split` throughout: its transpose is one concatenation, an index's a pad
    # and a sum.
    turning, values = lax.split(qkv, (group + 1, 1), axis=3)
    if config.qk_norm != "none":
      turning = _QueryKeyNorm(config, name="qk_norm")(turning)
    if rotary is not None:  # The key turns with its queries.
      turning = _rotate(turning, rotary, config.turning_size)
    queries, keys = lax.split(turning, (group, 1), axis=3)
    scalar = config.attention_scalar or config.head_size
    queries = (queries / math.sqrt(scalar)).transpose(0, 2, 3, 1, 4)
    keys, values = (a[:, :, :, 0].transpose(0, 2, 1, 3) for a in (keys, values))
    if cache is not None:
      write = lambda old, new: lax.dynamic_update_slice_in_dim(
        old, new.astype(old.dtype), index, axis=2
      )
      cache = write(cache[0], keys), write(cache[1], values)
      keys, values = (a[:, :, : bias.shape[-1]] for a in cache)
    logits = jnp.einsum(
      "bgntk,bgsk->bgnts", queries, keys, preferred_element_type=jnp.float32
    )
    if config.attention_softcap is not None:
      cap = config.attention_softcap
      logits = cap * jnp.tanh(logits / cap)
    weights = jax.nn.softmax(logits + bias, axis=-1).astype(values.dtype)
    y = jnp.einsum("bgnts,bgsk->bgntk", weights, values)
    y = y.transpose(0, 3, 1, 2, 4)
    shape = (config.kv_heads, group, config.head_size)
    scale = 1 / math.sqrt(2 * config.layers)
    out = _Dense(
      config, shape, (config.width,), config.out_bias, scale, name="out"
    )
    return out(y), cache


class _Mlp(nn.Module):
  config: TransformerConfig

  @nn.compact
  def __call__(self, x):
    config = self.config
    gated = config.activation in _GATED
    shape = (2 if gated else 1, config.mlp_width)
    bias = config.mlp_bias
    y = _Dense(config, (config.width,), shape, bias, name="in")(x)
    y = y.reshape((*x.shape[:-1], -1))
    parts = jnp.split(y, shape[0], axis=-1)
    if gated:
      y = _GATED[config.activation](parts[0]) * parts[1]
    else:
      y = _PLAIN[config.activation](parts[0])
    scale = 1 / math.sqrt(2 * config.layers)
    out = _Dense(
      config, (config.mlp_width,), (config.width,), bias, scale, name="out"
    )
    return out(y)


class _Block(nn.Module):
  config: TransformerConfig

  @nn.compact
  def __call__(self, x, rotary, bias, cache, index):
    config = self.config
    norm = lambda name, y: _Norm(config, name=name)(y)
    before = norm if config.norms_before else lambda name, y: y
    after = norm if config.norms_after else lambda name, y: y
    attention, mlp = (
      _Attention(config, name="attention"),
      _Mlp(config, name="mlp"),
    )
    y, cache = attention(
      before("attention_norm", x), rotary, bias, cache, index
    )
    y = after("attention_post_norm", y)
    read = x if config.parallel_residual else x + y
    z = after("mlp_post_norm", mlp(before("mlp_norm", read)))
    if config.parallel_residual:
      return x + y + z, cache
    return read + z, cache


def init(
  key: PRNGKeyArray, config: TransformerConfig, *, lm_head: bool = True
) -> types.Params:
  """Random parameters, float32, in the tree of the module docstring.

  Residual projections start smaller by √(2L), as in GPT-2. With
  `lm_head=False` an untied network is made without its head (a reward model).
  """
  embed_key, position_key, layers_key, head_key = jax.random.split(key, 4)
  normal = nn.initializers.normal(0.02)
  embedding = {"tokens": normal(embed_key, (config.vocab_size, config.width))}
  if config.positions == "learned":
    shape = (config.max_length + config.position_offset, config.width)
    embedding["positions"] = normal(position_key, shape)
  x = jnp.zeros((1, 1, config.width))
  bias = jnp.zeros((1, 1, 1, 1, 1))

  def init_layer(layer_key):
    variables = _Block(config).init(layer_key, x, None, bias, None, None)
    return variables["params"]

  params = {
    "embedding": embedding,
    "layers": jax.vmap(init_layer)(jax.random.split(layers_key, config.layers)),
    "final_norm": _Norm(config).init(head_key, x)["params"],
  }
  if lm_head and not config.tie_embeddings:
    shape = (config.vocab_size, config.width)
    params["lm_head"] = {"kernel": normal(head_key, shape)}
  return params


def init_cache(config: TransformerConfig, batch: int, length: int) -> Cache:
  """An empty cache for `batch` rows and `length` tokens."""
  shape = (batch, config.kv_heads, length, config.head_size)
  if config.unroll == config.layers:
    layer = lambda: tuple(
      jnp.zeros(shape, _dtype(config)) for _ in range(config.layers)
    )
  else:
    layer = lambda: jnp.zeros((config.layers, *shape), _dtype(config))
  return Cache(layer(), layer())


def unstack_layers(
  params: types.Params, config: TransformerConfig
) -> types.Params:
  """Splits the stacked layers of a fully unrolled network, once.

  A decode loop that split them in its body would copy every weight per token.
  `apply` takes either form.
  """
  if config.unroll != config.layers or isinstance(params["layers"], tuple):
    return params
  # `split` transposes to one concatenation; indexing, to L padded sums.
  leaves, treedef = jax.tree.flatten(params["layers"])
  split = [lax.split(leaf, [1] * config.layers) for leaf in leaves]
  layers = tuple(
    treedef.unflatten([pieces[i][0] for pieces in split])
    for i in range(config.layers)
  )
  return params | {"layers": layers}


def apply(
  params: types.Params,
  tokens: Int[Array, "B T"],
  *,
  config: TransformerConfig,
  positions: Int[Array, "B T"],
  mask: Bool[Array, "B T S"],
  cache: Cache | None = None,
  index: Int[Array, ""] | int | None = None,
) -> tuple[Float[Array, "B T D"], Cache | None]:
  """Final hidden states of `tokens`.

  Args:
    params: As `init` makes them; heads are applied by the caller.
    tokens: Ids; the caller has checked that they are in the vocabulary.
    config: The architecture.
    positions: Position of each token within its own text.
    mask: Which of the S keys each query may attend to. Without a cache S = T;
      with one, the first S slots of the cache.
    cache: Where keys and values are kept; T slots are written at `index`.
    index: First slot to write.

  Returns:
    Hidden states after the final norm (compute dtype), and the new cache.
  """
  table = _whole_rows(params["embedding"]["tokens"])
  x = shard_batch(table[tokens].astype(_dtype(config)))
  if config.scale_embeddings:
    x = x * jnp.asarray(math.sqrt(config.width), x.dtype)
  if config.positions == "learned":
    rows = positions + config.position_offset
    x = x + params["embedding"]["positions"][rows].astype(x.dtype)
  kinds = config.layer_kinds or ("global",) * config.layers
  present = sorted(set(kinds))
  # What the layers of a kind share.
  shared = [_seen(kind, positions, mask, index, config) for kind in present]
  places = [present.index(kind) for kind in kinds]

  def block(x, layer, layer_cache, rotary, bias) -> Any:
    x = shard_batch(x)
    variables = {"params": layer}
    args = (x, rotary, bias, layer_cache, index)
    return _Block(config).apply(variables, *args)

  if config.remat:
    block = jax.checkpoint(block)
  if config.unroll == config.layers:
    layers = unstack_layers(params, config)["layers"]
    caches: list[Any] = [None] * config.layers
    if cache is not None:
      caches = list(zip(*cache))
    for i, layer in enumerate(layers):
      x, caches[i] = block(x, layer, caches[i], *shared[places[i]])
    if cache is not None:
      keys, values = zip(*caches)
      cache = Cache(keys, values)
  else:
    of = lambda place: shared[0]
    if len(present) > 1:
      stacked = jax.tree.map(lambda *each: jnp.stack(each), *shared)
      of = lambda place: jax.tree.map(lambda x: x[place], stacked)
    step = lambda x, scanned: block(x, *scanned[:2], *of(scanned[2]))
    pair = None if cache is None else tuple(cache)
    scanned = params["layers"], pair, jnp.asarray(places)
    x, pair = lax.scan(step, x, scanned, unroll=config.unroll)
    cache = None if cache is None else Cache(*pair)
  norm: Any = _Norm(config).apply({"params": params["final_norm"]}, x)
  return shard_batch(norm), cache


def _seen(kind, positions, mask, index, config):
  """What a layer of this kind is given: rotary (or None), attention's bias."""
  rotary = None
  if config.positions == "rope":
    rotary = _rotary(positions, config, kind)
  if kind == "local":  # Slots and not positions: a text's are contiguous.
    *_, length, slots = mask.shape
    queries = jnp.arange(length) + (0 if index is None else index)
    distance = queries[:, None] - jnp.arange(slots)
    mask = mask & (distance < config.window)
  # Finite: a padding row attends to nothing, and must not make NaN.
  return rotary, jnp.where(mask, 0.0, -1e30)[:, None, None]


def head(params: types.Params, config: TransformerConfig) -> types.Head:
  """What turns hidden states into logits."""
  return types.Head(head_kernel(params), config.logit_softcap, config.tokens)


def head_kernel(params: types.Params) -> Float[Array, "V D"]:
  """The head's matrix."""
  if "lm_head" in params:
    return _whole_rows(params["lm_head"]["kernel"])
  return _whole_rows(params["embedding"]["tokens"])


def _whole_rows(table):
  """A [V, D] table divided by V alone, to be looked up in.

  The batch is divided over fsdp too: rows that were divided by their width
  over the same devices would first be copied to all of them.
  """
  return _constrain(jnp.asarray(table), PartitionSpec(types.MODEL_AXIS, None))


def shard_batch(x: Array) -> Array:
  """Divides the first axis over the mesh's batch axes, if a mesh is set."""
  spec = PartitionSpec(types.BATCH_AXES, *[None] * (x.ndim - 1))
  return _constrain(x, spec)


def _constrain(x, spec):
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.are_all_axes_manual:  # None, or one device's part.
    return x
  return lax.with_sharding_constraint(x, spec)


def init_scalar_head(width: int, *, use_bias: bool) -> types.Params:
  """A zero head from hidden states to one number: a value or a score."""
  bias = {"bias": jnp.zeros(())} if use_bias else {}
  return {"kernel": jnp.zeros((width,))} | bias


def apply_scalar_head(
  params: types.Params, hidden: Float[Array, "*N D"]
) -> Float[Array, "*N"]:
  """One float32 number per hidden state."""
  y = hidden.astype(jnp.float32) @ params["kernel"]
  return y + params["bias"] if "bias" in params else y
