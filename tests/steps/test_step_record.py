"""A step that is rewritten costs what it cost, and gives the same bits.

`step_record.json` has for each case the floating-point operations and bytes
of the compiled step, and what ten steps gave: a digest of every bit of the
state and of all metrics, and the last step's scalars. On the machine and with
the versions of the record the digests must be equal. Elsewhere rounding
differs: there the scalars are compared, and the costs.

    WRITE_STEP_RECORD=1 python -m pytest tests/steps/test_step_record.py

writes the record anew. One may where a change is meant to alter what a step
computes or what it costs, in the commit that says so, or with a new version of
JAX; never beside a change that is meant to alter the text alone.
"""

from collections.abc import Callable
import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest

from rlhf_jax import types
from rlhf_jax.objective import beta as beta_lib
from rlhf_jax.objective import kl
from rlhf_jax.steps import (
  anchor,
  dpo,
  evaluate,
  ppo,
  reference,
  rewards,
  rollout,
  text_mix,
)
from rlhf_jax.steps import optimizer as optimizer_lib
from tests.steps import tiny

RECORD = pathlib.Path(__file__).with_name("step_record.json")
WRITE = "WRITE_STEP_RECORD"
STEPS = 10
B, R = 8, 6
MODEL = tiny.SHALLOW
OTHER = dataclasses.replace(MODEL, width=8, heads=2, kv_heads=1)
CONFIG = ppo.PPOConfig(
  model=MODEL,
  rollout=rollout.RolloutConfig(
    response_length=R, temperature=1.3, stop_ids=(3, 7), pad_id=3
  ),
  logits_per_chunk=16 * B * MODEL.vocab_size,  # Chunks do not divide R.
)
OPTIMIZER = optimizer_lib.make(
  optimizer_lib.OptimizerConfig(
    learning_rate=3e-3, updates=100, warmup_updates=3, schedule="cosine"
  )
)
DUAL = beta_lib.dual(target=1.0, beta_max=9.0, learning_rate=0.1)
# Of one machine's arithmetic against another's, after ten steps.
TOLERANCE = 1e-3
# Of the costs as another version of JAX compiles the step.
OTHER_VERSION = 0.1
# The largest of differences that are rounding.
ROUNDING = "rollout/logprob_max_abs_diff"


@dataclasses.dataclass(frozen=True)
class Case:
  """A step, its state before step 0, and what else it takes."""

  step: Callable[..., Any]
  state: types.TrainState
  rest: tuple[Any, ...]


def of_ppo(
  *,
  score=None,
  reward_model=None,
  batch=None,
  held=None,
  options=None,
  **fields,
) -> Case:
  """PPO against another model; by default a reward model judges."""
  config = dataclasses.replace(CONFIG, **fields)
  options = {"controller": DUAL} | (options or {})
  step = ppo.make_step(
    config,
    score=score or rewards.from_model(MODEL),
    optimizer=OPTIMIZER,
    **options,
  )
  state = ppo.init_state(
    tiny.policy(0, MODEL),
    beta=0.1,
    optimizer=OPTIMIZER,
    controller=options["controller"],
  )
  held = reference.freeze(tiny.policy(1, config.reference or MODEL))
  judge = tiny.reward_model(2, MODEL) if reward_model is None else reward_model
  batch = tiny.prompts() if batch is None else batch
  return Case(step, state, (held, judge, batch, jax.random.key(3)))


def lengths_as_gold(sequences):
  """A true reward of the response alone."""
  return 0.5 * sequences.response_lengths - sequences.prompt_lengths


def gae() -> Case:
  """As it is by default, with whatever a reward model brings along."""
  return of_ppo(
    epochs=2, minibatches=2, options={"score_scale": rewards.score_scale}
  )


def grpo() -> Case:
  """Groups with gold, which a controller reads."""
  return of_ppo(
    advantages="grpo",
    group_size=2,
    length_normalisation=True,
    penalty=kl.PENALTIES["k3_in_loss", "sampled"],
    options={"gold": lengths_as_gold, "controller": beta_lib.trust()},
  )


def exact_penalty() -> Case:
  """In rewards and loss, in microbatches; a reference of another shape."""
  return of_ppo(
    penalty=kl.PENALTIES["sequence_reverse", "rao_blackwellised"],
    reference=OTHER,
    minibatches=2,
    microbatches=2,
  )


def texts() -> Case:
  """A text mix beside leave-one-out."""
  rng = np.random.default_rng(5)
  columns = np.arange(10)
  segments = np.where(columns < 6, 1, np.where(columns < 9, 2, 0))
  segments = np.tile(segments, (4, 1))
  packed = types.PackedTexts(
    tokens=rng.integers(0, MODEL.vocab_size, (4, 10), np.int32),
    segments=segments.astype(np.int32),
    positions=np.tile(columns - 6 * (columns > 5), (4, 1)).astype(np.int32),
    loss_mask=(segments > 0) & (columns > 1) & (columns != 6),
  )
  return of_ppo(
    advantages="rloo",
    group_size=2,
    mix=text_mix.Mix("forward_kl", 0.7),
    epochs=2,
    minibatches=2,
    batch=text_mix.Batch(tiny.prompts(), packed),
  )


def anchored() -> Case:
  """A prefix that the reference is charged without."""
  return of_ppo(
    prefix=anchor.Prefix(size=2, begin=1),
    anchored=True,
    penalty=kl.PENALTIES["token_reverse", "rao_blackwellised"],
    advantages="reinforce_pp",
    batch=tiny.left_padded([[1, 9, 4, *row] for row in WORDS], 6),
    options={"gold": lengths_as_gold},
  )


def ensemble() -> Case:
  """Two reward models that agree or not, and a prefix that is looked through.

  One of them has other units.
  """
  score, agreement = rewards.from_ensemble([MODEL, MODEL], group_size=1)
  members = tuple(tiny.reward_model(seed, MODEL, std=seed) for seed in (2, 4))
  return of_ppo(
    prefix=anchor.Prefix(size=2, begin=1),
    batch=tiny.left_padded([[1, 9, 4, *row] for row in WORDS], 6),
    score=score,
    reward_model={"members": members},
    options={
      "agreement": agreement,
      "controller": beta_lib.trust(),
      "score_scale": rewards.score_scale,
    },
  )


def sweep() -> Case:
  """Three βs at once."""
  case = of_ppo(
    advantages="grpo", group_size=2, options={"member_axis": "member"}
  )
  step = jax.vmap(
    case.step, in_axes=(0, None, None, None, None), axis_name="member"
  )
  state = jax.vmap(
    lambda beta: ppo.init_state(
      case.state.params, beta=beta, optimizer=OPTIMIZER, controller=DUAL
    )
  )(jnp.array([0.0, 0.1, 1.0]))
  return Case(step, state, case.rest)


def offline() -> Case:
  """DPO, with a look at what the policy writes at every third step."""
  step = evaluate.with_ledger(
    dpo.make_step(dpo.DPOConfig(MODEL, "dpo"), OPTIMIZER),
    evaluate.LedgerConfig(
      model=MODEL,
      reference=OTHER,
      rollout=CONFIG.rollout,
      every=3,
      gold=lengths_as_gold,
    ),
  )
  params = {"transformer": tiny.network(0, MODEL)}
  state = dpo.init_state(params, beta=0.1, optimizer=OPTIMIZER)
  rng = np.random.default_rng(4)
  prompts = tiny.prompts()
  side = lambda: types.Sequences(
    prompts.tokens,
    prompts.lengths,
    jnp.asarray(rng.integers(0, MODEL.vocab_size, (B, R)), jnp.int32),
    jnp.asarray(rng.integers(1, R + 1, B), jnp.int32),
  )
  pairs = types.PreferencePairs(side(), side())
  held = -10.0 + jnp.arange(B), -9.0 - jnp.arange(B)
  batch = dpo.Batch(pairs, held)
  frozen = reference.freeze(tiny.policy(1, OTHER))
  return Case(step, state, (batch, frozen, prompts, jax.random.key(3)))


WORDS = [5], [6, 2], [7, 8, 9], [9], [4, 9], [2], [9, 4, 9], [0, 0]
CASES = {
  make.__name__: make
  for make in (
    gae,
    grpo,
    exact_penalty,
    texts,
    anchored,
    ensemble,
    sweep,
    offline,
  )
}


def machine() -> dict[str, str]:
  """Whose bits they are."""
  flags = set()
  for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
    if line.startswith(("model name", "flags", "Features")):
      flags.add(line)
  cpu = "\n".join([*sorted(flags), f"{os.cpu_count()} cores"])
  return {
    "jax": jax.__version__,
    "jaxlib": jaxlib.__version__,
    "device": jax.devices()[0].device_kind,
    "cpu": hashlib.sha256(cpu.encode()).hexdigest()[:16],
    "xla_flags": os.environ.get("XLA_FLAGS", "").strip(),
  }


def digest(trees) -> str:
  """Of every leaf's path, type and bits."""
  found = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(trees):
    array = np.asarray(leaf)
    head = f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}"
    found.update(head.encode() + array.tobytes())
  return found.hexdigest()


def scalars_of(metrics) -> dict[str, Any]:
  """The last step's, for machines with another arithmetic."""
  if isinstance(metrics, tuple):  # Offline: the loss's, and a look's.
    metrics = metrics[0] | metrics[1].scalars
  else:
    metrics = metrics.scalars
  return {name: np.asarray(x).tolist() for name, x in sorted(metrics.items())}


def measure(case: Case) -> dict[str, Any]:
  """What the record holds of a case."""
  lowered = jax.jit(case.step).lower(case.state, *case.rest)
  compiled = lowered.compile()
  costs: Any = compiled.cost_analysis()
  state, states, figures, metrics = case.state, [], [], None
  for _ in range(STEPS):
    state, metrics = compiled(state, *case.rest)
    states.append(jax.device_get(state))
    figures.append(jax.device_get(metrics))
  return {
    "flops": costs["flops"],
    "bytes": costs["bytes accessed"],
    "states": digest(states),
    "metrics": digest(figures),
    "scalars": scalars_of(figures[-1]),
  }


def faults(found, wanted, *, same_machine, same_version):
  """In which ways a case is not what its record says."""
  tolerance = 0.01 if same_version else OTHER_VERSION
  for name in ("flops", "bytes"):
    if abs(found[name] / wanted[name] - 1) > tolerance:
      yield f"{name}: {found[name]:g}; wanted {wanted[name]:g}"
  if same_machine:
    for name in ("states", "metrics"):
      if found[name] != wanted[name]:
        yield f"{name} have other bits"
  if found["scalars"].keys() != wanted["scalars"].keys():
    yield f"metrics {found['scalars'].keys() ^ wanted['scalars'].keys()}"
    return
  for name, value in wanted["scalars"].items():
    mine = found["scalars"][name]
    floor = 1e-3 if name == ROUNDING else TOLERANCE * 0.1
    if not np.allclose(mine, value, rtol=TOLERANCE, atol=floor, equal_nan=True):
      yield f"{name}: {mine}; wanted {value}"


@pytest.mark.parametrize("name", CASES)
def test_the_step_is_the_recorded_one(name):
  """Its costs within 1 %, and all bits of ten steps."""
  found = measure(CASES[name]())
  if os.environ.get(WRITE):
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if record.get("machine") != machine():
      record = {"machine": machine(), "cases": {}}
    record["cases"][name] = found
    RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    pytest.skip(f"{RECORD.name} is written")
  record = json.loads(RECORD.read_text())
  here = machine()
  version = [here[x] == record["machine"][x] for x in ("jax", "jaxlib")]
  assert not list(
    faults(
      found,
      record["cases"][name],
      same_machine=here == record["machine"],
      same_version=all(version),
    )
  )


@pytest.mark.parametrize(
  "change, here, elsewhere",
  [
    ({}, 0, 0),
    ({"flops": 1.02}, 1, 0),
    ({"bytes": 0.98}, 1, 0),
    ({"flops": 1.2, "bytes": 0.8}, 2, 2),
    ({"states": "other"}, 1, 0),
    ({"metrics": "other"}, 1, 0),
    ({"scalars": {"kl/beta": 1.01, "ppo/entropy": 1.0}}, 1, 1),
    ({"scalars": {"kl/beta": float("nan"), "ppo/entropy": 1.0}}, 1, 1),
    ({"scalars": {"kl/beta": 1.0}}, 1, 1),
  ],
)
def test_the_comparison_sees_a_fault(change, here, elsewhere):
  """On the record's machine, and on another with another version."""
  wanted = {
    "flops": 1.0,
    "bytes": 1.0,
    "states": "bits",
    "metrics": "bits",
    "scalars": {"kl/beta": 1.0, "ppo/entropy": 1.0},
  }
  for same, count in ((True, here), (False, elsewhere)):
    found = faults(
      wanted | change, wanted, same_machine=same, same_version=same
    )
    assert len(list(found)) == count


def test_bits_are_told_apart():
  """Values, their types, and where they stand."""
  one = digest({"a": np.float32([0.0])})
  assert one == digest({"a": np.float32([0.0])})
  for other in (
    {"a": np.float32([-0.0])},
    {"b": np.float32([0.0])},
    {"a": np.int32([0])},
    {"a": np.float32([[0.0]])},
  ):
    assert digest(other) != one
