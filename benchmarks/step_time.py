r"""Seconds per PPO iteration, its phases, and the multiple of the FLOP floor.

    python -m benchmarks.step_time --workload=W1

Prints one JSON object: medians over the iterations after warm-up, compile
time, peak memory. The whole step is what users run, its KL ledger included;
the phases are compiled apart and so do not add up to it exactly.

The floor counts what the cheapest algorithm must do (decode-time logprobs
kept, so the policy is not scored again), a multiply-add as 2, at a given rate
of the machine (`--gflops`). Compare medians of runs that alternate with the
other side's in one session: machines drift.
"""

import json
import resource
import statistics
import time
from typing import Any

from absl import app, flags
import jax
import jax.numpy as jnp

from rlhf_jax import types
from rlhf_jax.models import transformer
from rlhf_jax.objective import beta as beta_lib
from rlhf_jax.objective import kl
from rlhf_jax.steps import learner, ppo, reference, rewards, rollout
from rlhf_jax.steps import optimizer as optimizer_lib

_WORKLOAD = flags.DEFINE_enum("workload", "W1", ["W1", "W2"], "Which one.")
_ITERATIONS = flags.DEFINE_integer("iterations", 7, "Timed.", lower_bound=1)
_WARMUP = flags.DEFINE_integer("warmup", 2, "Not timed.", lower_bound=1)
_GFLOPS = flags.DEFINE_float(
  "gflops", 500.0, "Best float32 matmul rate of this machine, GFLOP/s."
)
_ESTIMATOR = flags.DEFINE_enum(
  "estimator",
  "sampled",
  ["sampled", "rao_blackwellised"],
  "Of the penalty's gradient, that of the sequence's reverse KL.",
)
_PHASES = flags.DEFINE_bool("phases", True, "Time the phases apart as well.")

# Vocabulary, width, layers, heads, mlp width; prompt, response, batch; epochs,
# minibatches.
_SIZES = {
  "W1": ((512, 128, 4, 4, 512), (16, 32, 64), (2, 2)),
  "W2": ((32_000, 288, 6, 6, 768), (32, 64, 16), (1, 2)),
}


def floor_flops(workload: str) -> dict[str, float]:
  """Least FLOPs of an iteration, by phase.

  A trunk of 4 D² + 3 D F weights a layer, a head of V D, and attention over
  the mean context; the prompt's logits are made for its last token only.
  """
  sizes, (prompt, response, batch), (epochs, _) = _SIZES[workload]
  vocabulary, width, layers, _, mlp = sizes
  trunk = layers * (4 * width**2 + 3 * width * mlp)
  total = prompt + response

  def forward(tokens, logits, context):
    attention = 4 * width * layers * context * tokens
    return 2 * trunk * tokens + 2 * vocabulary * width * logits + attention

  prefill = forward(prompt, 1, (prompt + 1) / 2)
  decode = forward(response - 1, response - 1, prompt + response / 2)
  scoring = batch * forward(total - 1, response, total / 2)
  return {
    "rollout": batch * (prefill + decode),
    "scoring": scoring,
    "update": 3 * scoring * epochs,
  }


def main(argv) -> None:
  """Times one workload and prints the JSON."""
  del argv
  workload = _WORKLOAD.value
  sizes, (prompt, response, batch), (epochs, minibatches) = _SIZES[workload]
  vocabulary, width, layers, heads, mlp = sizes
  model = transformer.TransformerConfig(
    vocab_size=vocabulary,
    width=width,
    layers=layers,
    heads=heads,
    kv_heads=heads,
    head_size=width // heads,
    mlp_width=mlp,
    max_length=256,
    unroll=layers,
  )
  config = ppo.PPOConfig(
    model,
    rollout.RolloutConfig(response),
    penalty=kl.PENALTIES["sequence_reverse", _ESTIMATOR.value],
    epochs=epochs,
    minibatches=minibatches,
  )
  optimizer = optimizer_lib.make(
    optimizer_lib.OptimizerConfig(1e-4, updates=10_000)
  )
  controller = beta_lib.fixed()
  lower_half = lambda tokens, mask: (
    (mask & (tokens < vocabulary // 2)).sum(1) / mask.sum(1)
  )
  step = ppo.make_step(
    config,
    score=rewards.from_function(lower_half),
    optimizer=optimizer,
    controller=controller,
  )
  policy = {
    "transformer": transformer.init(jax.random.key(0), model),
    "value_head": transformer.init_scalar_head(width, use_bias=True),
  }
  frozen = reference.freeze(policy)
  state = ppo.init_state(
    jax.tree.map(jnp.copy, policy),
    beta=0.05,
    optimizer=optimizer,
    controller=controller,
  )
  prompts = types.Prompts(
    jax.random.randint(jax.random.key(1), (batch, prompt), 0, vocabulary),
    jnp.full((batch,), prompt),
  )
  key = jax.random.key(2)

  began = time.perf_counter()
  jitted = jax.jit(step, donate_argnums=0)
  compiled = jitted.lower(state, frozen, {}, prompts, key).compile()
  compile_s = time.perf_counter() - began
  seconds = []
  for _ in range(_WARMUP.value + _ITERATIONS.value):
    began = time.perf_counter()
    state, metrics = compiled(state, frozen, {}, prompts, key)
    jax.block_until_ready(metrics)
    seconds.append(time.perf_counter() - began)
  seconds = seconds[_WARMUP.value :]

  floor = floor_flops(workload)
  floor_s = sum(floor.values()) / (_GFLOPS.value * 1e9)
  median = statistics.median(seconds)
  memory: Any = compiled.memory_analysis()
  result = {
    "workload": workload,
    "estimator": _ESTIMATOR.value,
    "device": jax.devices()[0].device_kind,
    "jax": jax.__version__,
    "iterations": len(seconds),
    "median_s": median,
    "min_s": min(seconds),
    "max_s": max(seconds),
    "compile_s": compile_s,
    "temporary_mb": memory.temp_size_in_bytes / 1e6,
    "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    "floor_gflop": {name: value / 1e9 for name, value in floor.items()},
    "floor_s": floor_s,
    "times_floor": median / floor_s,
  }
  if _PHASES.value:
    result["phases_median_s"] = _phases(
      config, policy, frozen, optimizer, prompts, key
    )
  print(json.dumps(result, indent=2))


def _phases(config, policy, frozen, optimizer, prompts, key):
  roll = jax.jit(
    lambda policy: rollout.rollout(
      policy["transformer"],
      prompts,
      key,
      model=config.model,
      config=config.rollout,
    )
  )
  rolled = roll(policy)

  def scored(policy, frozen, sequences):
    compared = reference.compare(policy, frozen, sequences, config)
    values = transformer.apply_scalar_head(
      policy["value_head"], compared.hidden
    )
    return compared.asked.comparison, values, compared.asked.hidden

  score = jax.jit(scored)
  comparison, values, reference_hidden = score(policy, frozen, rolled.sequences)
  experience = learner.Experience(
    sequences=rolled.sequences,
    logprobs=rolled.logprobs,
    reference_logprobs=comparison.reference_logprobs,
    reference_hidden=(
      reference_hidden if config.penalty.needs_reference else None
    ),
    values=values,
    advantages=values + 1.0,
    returns=values + 1.0,
  )
  update = jax.jit(
    lambda state, frozen, experience: ppo.update(
      state,
      frozen,
      experience,
      key,
      config=config,
      optimizer=optimizer,
      price=jnp.float32(0.05),
    )
  )
  state = ppo.init_state(
    policy, beta=0.05, optimizer=optimizer, controller=beta_lib.fixed()
  )
  return {
    "rollout": _median(roll, policy),
    "scoring": _median(score, policy, frozen, rolled.sequences),
    "update": _median(update, state, frozen, experience),
  }


def _median(function, *arguments):
  seconds = []
  for _ in range(_WARMUP.value + _ITERATIONS.value):
    began = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    seconds.append(time.perf_counter() - began)
  return statistics.median(seconds[_WARMUP.value :])


if __name__ == "__main__":
  app.run(main)
