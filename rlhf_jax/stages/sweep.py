"""A sweep: PPO under many β and seeds, and what came out of it.

Members share the reference and the reward model and are trained in one
compiled program, in chunks where memory is short; a chunk that has ended is
not done again. A member equals the single run with its β and its seed: to the
last bit where a device loops over its members (`sharding.step_of_all`); under
`vmap`, but for the rounding of batched sums, its first step to about 1e-5 and
later ones as far as sampling carries a last bit. A member whose figures are no
longer numbers stops the sweep, as it stops a single run.
"""

from collections.abc import Sequence
import contextlib
import itertools
import json
import os
import time
from typing import Any

import jax
from ml_collections import ConfigDict
from rich import console as rich_console

from rlhf_jax.measures import evaluation
from rlhf_jax.settings import roles, rules, static
from rlhf_jax.stages import ppo as ppo_stage
from rlhf_jax.stages import sweep_frontier
from rlhf_jax.steps import sharding
from rlhf_jax.storage import workdir as workdir_lib

_CHUNKS = "chunks.json"


def run(
  config: ConfigDict,
  workdir: workdir_lib.Workdir,
  *,
  resume: bool,
  console: rich_console.Console,
) -> dict[str, Any]:
  """Trains the members in sub-workdirs, and returns the sweep's summary."""
  began = time.monotonic()
  if config.sweep.frontier:  # Before all is trained that it will be asked of.
    evaluation.heldout_texts(config, shared=True)
  models = roles.load(config)
  with contextlib.ExitStack() as stack:
    members = _members(config, workdir, resume, stack)
    for chunk in _chunks(config, workdir, models, members):
      if not all(_has_ended(member) for member in chunk):
        ppo_stage.train(
          models,
          chunk,
          workdir.path / "checkpoints" / _name(chunk),
          stacked=True,
          console=console,
        )
    found = [_summary(member, workdir) for member in members]
  # Before the frontier: what is trained is found, whatever becomes of that.
  summary = _summarised(workdir, found, began)
  if config.sweep.frontier:
    sweep_frontier.write(config, workdir, models, found, console)
    summary = _summarised(workdir, found, began)
  return summary


def _summarised(workdir, found, began) -> dict[str, Any]:
  """Writes the sweep's summary."""
  wall_s = time.monotonic() - began
  summary = {"stage": "sweep", "wall_s": wall_s, "members": found}
  workdir.write_summary(summary)
  return summary


def _chunks(config, workdir, models, members):
  """As the sweep began, whatever memory there is when it goes on."""
  file = workdir.path / _CHUNKS
  if file.exists():
    sizes = json.loads(file.read_text())["sizes"]
  else:
    most = config.sweep.members_at_once
    most = most or most_members(config, models, len(members))
    sizes = [len(chunk) for chunk in chunks(members, most)]
    workdir.write_json(_CHUNKS, {"sizes": sizes})
  ends = [0, *itertools.accumulate(sizes)]
  return [members[a:b] for a, b in itertools.pairwise(ends)]


def chunks(members: Sequence[Any], size: int) -> list[Sequence[Any]]:
  """As few chunks of at most `size` as can be, as equal as can be."""
  count = -(-len(members) // size)
  ends = [len(members) * i // count for i in range(count + 1)]
  return [members[a:b] for a, b in itertools.pairwise(ends)]


def most_members(config: ConfigDict, models: roles.Models, count: int) -> int:
  """How many of `count` members fit the devices' memory at once, at least one.

  A member has parameters, two moments, a gradient and an update; a cache of
  keys and values; what the backward pass keeps, some 16 arrays of the width a
  layer. Those that hold a member together share it, and hold the reference and
  the reward model, too. An estimate, and half of the memory is left free;
  `sweep.members_at_once` says it better where it fails.
  """
  mesh = static.mesh(config, members=count)
  apart = mesh.shape.get(sharding.MEMBER_AXIS, 1)
  frozen = models.reference.params, models.reward.params
  frozen = sum(x.nbytes for x in jax.tree.leaves(frozen))
  model = models.policy.model
  size = sum(x.size for x in jax.tree.leaves(models.policy.params))
  tokens = config.rollout.prompt_length + config.rollout.response_length
  tokens *= config.train.batch_size
  cache = 2 * tokens * model.layers * model.kv_heads * model.head_size
  pieces = config.ppo.minibatches * config.ppo.microbatches
  kept = 16 * tokens // pieces * model.layers * model.width
  logits = 3 * min(tokens * model.vocab_size, static.LOGITS)
  needed = 4 * (5 * size + cache + kept + logits)
  share = config.mesh.fsdp * config.mesh.tensor
  room = _memory(mesh.size) * share // 2 - frozen
  return max(1, room // needed * apart)


def _memory(devices: int) -> int:
  """Bytes of a device, or its part of this machine where they are its cores."""
  stats = [device.memory_stats() for device in jax.local_devices()]
  if all(stats):
    return min(each["bytes_limit"] for each in stats if each)
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // devices


def _members(config, workdir, resume, stack) -> list[ppo_stage.Member]:
  """Every β with every seed, each in a sub-workdir that is open."""
  betas = rules.betas(config)
  seeds = config.sweep.seeds or (config.seed,)
  members = []
  for beta, seed in itertools.product(betas, seeds):
    member = config.copy_and_resolve_references()
    with member.unlocked():
      member.kl.beta = float(beta)
      member.seed = seed
      member.sweep.betas, member.sweep.seeds = (), ()
    name, label = f"beta={beta:g}", f"β={beta:g}"
    if config.sweep.seeds:
      name, label = f"{name},seed={seed}", f"{label} seed {seed}"
    opened = workdir.sub(name, member.to_dict(), resume=resume)
    opened = stack.enter_context(opened)
    members.append(ppo_stage.Member(label, member, opened))
  return members


def _name(chunk: Sequence[ppo_stage.Member]) -> str:
  """Of a chunk's checkpoints: they are of these members and no others."""
  first, last = (chunk[i].workdir.path.name for i in (0, -1))
  return f"{first}-to-{last}" if len(chunk) > 1 else first


def _has_ended(member: ppo_stage.Member) -> bool:
  return member.workdir.has_ended(member.config.train.steps)


def _summary(member: ppo_stage.Member, workdir) -> dict[str, Any]:
  """A member's part of the sweep's summary."""
  path = member.workdir.path
  metrics = json.loads((path / "summary.json").read_text())["metrics"]
  last = json.loads((path / "samples.jsonl").read_text().splitlines()[-1])
  return {
    "beta": member.config.kl.beta,
    "seed": member.config.seed,
    "workdir": str(path.relative_to(workdir.path)),
    "metrics": metrics,
    "sample": {name: last[name] for name in ("prompt", "response")},
  }
