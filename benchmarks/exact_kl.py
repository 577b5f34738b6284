r"""What the exact KL costs the learner: memory as compiled, and seconds.

    python -m benchmarks.exact_kl

The learner of one minibatch at a vocabulary of 32,000: PPO's loss and its
gradient, with the logprobs of the sampled tokens alone, and with the exact KL
to the reference and its gradient (`sequence_reverse`, `rao_blackwellised`).
Once from the final hidden states on (the head, where the vocabulary is), and
once the whole network of workload W2, its layers rematerialised, a row at a
time. Prints one JSON object; the two sides of a comparison alternate.

The floor: a head pass is 2 V D FLOPs a token. Logprobs with their gradient
take three (logits, ∂states, ∂head), the exact KL a fourth for the reference's
logits; nothing is made twice.
"""

import json
import math
import statistics
import time

from absl import app, flags
import jax
import jax.numpy as jnp

from rlhf_jax import types
from rlhf_jax.models import transformer
from rlhf_jax.objective import kl
from rlhf_jax.steps import learner, rollout

_ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed, of each side.", 1)
_TIMES = flags.DEFINE_bool("times", True, "Run, and not only compile.")

V, D, B, P, R = 32_000, 288, 8, 4, 508
ARRAY_MB = B * (P + R) * V * 4 / 1e6  # One float32 array of all logits.
ESTIMATORS = ("sampled", "rao_blackwellised")


def learner_config(estimator: str, *, rows_at_once: int) -> learner.PPOConfig:
  """PPO on the network of W2 with a penalty of this estimator."""
  model = transformer.TransformerConfig(
    vocab_size=V,
    width=D,
    layers=6,
    heads=6,
    kv_heads=6,
    head_size=48,
    mlp_width=768,
    max_length=P + R,
    remat=True,
  )
  return learner.PPOConfig(
    model,
    rollout.RolloutConfig(R),
    penalty=kl.PENALTIES["sequence_reverse", estimator],
    microbatches=B // rows_at_once,
  )


def head_learner(estimator: str):
  """The learner from the hidden states on: a function and its arguments."""
  config = learner_config(estimator, rows_at_once=B)

  def learn(hidden, head, columns, price, reference_head):
    return learner.head_gradient(
      hidden, head, columns, price, reference_head, config
    )

  per_token = lambda dtype=jnp.float32: jax.ShapeDtypeStruct((B, R), dtype)
  hidden = jax.ShapeDtypeStruct((B, R, D), jnp.float32)
  head = types.Head(jax.ShapeDtypeStruct((V, D), jnp.float32))  # pyright: ignore
  columns = {
    name: per_token()
    for name in ("logprobs", "reference_logprobs", "advantages", "weights")
  }
  columns |= {"tokens": per_token(jnp.int32), "mask": per_token(jnp.bool_)}
  if config.penalty.needs_reference:
    columns["reference_hidden"] = hidden
  price = jax.ShapeDtypeStruct((), jnp.float32)
  return learn, (hidden, head, columns, price, head)


def whole_learner(estimator: str):
  """The learner of the whole network: a function and its arguments."""
  config = learner_config(estimator, rows_at_once=1)
  array = lambda *shape, dtype=jnp.float32: jnp.zeros((B, 1, *shape), dtype)
  tokens = lambda *shape: array(*shape, dtype=jnp.int32)

  def minibatch():
    needed = array(R, D) if config.penalty.needs_reference else None
    return learner.Experience(
      sequences=types.Sequences(tokens(P), tokens(), tokens(R), tokens()),
      logprobs=array(R),
      reference_logprobs=array(R),
      reference_hidden=needed,
      values=array(R),
      advantages=array(R),
      returns=array(R),
    )

  def params():
    head = transformer.init_scalar_head(D, use_bias=True)
    policy = transformer.init(jax.random.key(0), config.model)
    return {"transformer": policy, "value_head": head}

  price = jax.ShapeDtypeStruct((), jnp.float32)
  head = types.Head(jax.ShapeDtypeStruct((V, D), jnp.float32))  # pyright: ignore

  def learn(params, minibatch, price, reference_head):
    return learner.gradient(params, minibatch, price, reference_head, config)

  policy, rows = jax.eval_shape(lambda: (params(), minibatch()))
  return learn, (policy, rows, price, head)


def temporary_mb(compiled) -> float:
  """What the program holds beside its arguments and results."""
  return compiled.memory_analysis().temp_size_in_bytes / 1e6


def _filled(shapes):
  """Arguments with something in them: every token real, nothing equal."""
  leaves, treedef = jax.tree.flatten(shapes)
  keys = jax.random.split(jax.random.key(0), len(leaves))

  def fill(key, leaf):
    if leaf.dtype == jnp.bool_:
      return jnp.ones(leaf.shape, bool)
    if leaf.dtype == jnp.int32:
      return jax.random.randint(key, leaf.shape, 1, min(V, R))
    return jax.random.normal(key, leaf.shape) / math.sqrt(D)

  return treedef.unflatten(map(fill, keys, leaves))


def main(argv) -> None:
  """Compiles all four, times each side in turn, prints the JSON."""
  del argv
  result = {
    "device": jax.devices()[0].device_kind,
    "jax": jax.__version__,
    "vocabulary": V,
    "batch": B,
    "tokens": P + R,
    "array_mb": ARRAY_MB,
  }
  for name, make in (("head", head_learner), ("network", whole_learner)):
    programs = {}
    for estimator in ESTIMATORS:
      function, shapes = make(estimator)
      compiled = jax.jit(function).lower(*shapes).compile()
      programs[estimator] = compiled, _filled(shapes) if _TIMES.value else None
    result[name] = {
      "temporary_mb": {e: temporary_mb(c) for e, (c, _) in programs.items()}
    }
    if not _TIMES.value:
      continue
    seconds = {estimator: [] for estimator in ESTIMATORS}
    for _ in range(_ROUNDS.value + 1):
      for estimator, (compiled, arguments) in programs.items():
        began = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        seconds[estimator].append(time.perf_counter() - began)
    medians = {e: statistics.median(s[1:]) for e, s in seconds.items()}
    result[name] |= {
      "median_s": medians,
      "ratio": medians["rao_blackwellised"] / medians["sampled"],
    }
  print(json.dumps(result, indent=2))


if __name__ == "__main__":
  app.run(main)
