"""DPO with several references, and with none, in one compiled program.

The members differ in what their loss subtracts, and in their seed: log π of a
reference, or 0, which leaves −log σ(β log π(y_c|x) − β log π(y_r|x)), DPO's own
loss without its reference term. All begin at the SFT policy. A seed has pairs
of its own: two responses of that policy, judged by noisy gold.

Stage `dpo` cannot be asked for the loss without the term: it has SimPO, which
differs from DPO in more than that. Here the step is the stage's, under `vmap`.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
from rich import text as rich_text

from rlhf_jax import types
from rlhf_jax.data import batches
from rlhf_jax.data import preferences as preference_data
from rlhf_jax.settings import static
from rlhf_jax.stages import progress as progress_lib
from rlhf_jax.steps import dpo
from rlhf_jax.steps import optimizer as optimizer_lib
from rlhf_jax.storage import pretrained as pretrained_lib
from rlhf_jax.studies import study

References = Mapping[str, pretrained_lib.Pretrained | None]


def made(
  lab: study.Lab,
  config: ConfigDict,
  references: References,
  seeds: Sequence[int],
) -> dict[str, list[pathlib.Path]]:
  """The members' workdirs, after training where one has not ended.

  Args:
    lab: The study's.
    config: Of stage `dpo`, its `policy.path` set.
    references: By name; None for no reference.
    seeds: Each is a member with every reference.

  Returns:
    A workdir a seed, by the reference's name.
  """
  workdir, console = lab.workdir, lab.console
  members = [(name, seed) for name in references for seed in seeds]
  paths = [workdir.path / _name(*member) for member in members]
  if not all((path / "summary.json").exists() for path in paths):
    console.print(rich_text.Text(f"dpo: {len(members)} members"))
    policy = pretrained_lib.load_policy(config)
    params = _train(config, policy, references, members, console)
    for place, member in enumerate(members):
      mine = jax.tree.map(lambda x, place=place: x[place], params)
      trained = dataclasses.replace(policy, params=mine)
      _save(config, trained, member, workdir)
  return {
    name: [(workdir.path / _name(name, seed)).absolute() for seed in seeds]
    for name in references
  }


def without_reference(
  pairs: types.PreferencePairs,
) -> dpo.PairLogprobs:
  """What a loss without a reference subtracts: nothing."""
  nothing = jnp.zeros(len(pairs.chosen.response_lengths))
  return nothing, nothing


def _name(reference: str, seed: int) -> str:
  return f"dpo/reference={reference},seed={seed}"


def _train(config, policy, references, members, console):
  """Every member's parameters, stacked."""
  step_config = dpo.DPOConfig(
    policy.model,
    "dpo",
    temperature=config.rollout.temperature,
    logits_per_chunk=static.logits_per_chunk(config, members=len(members)),
  )
  rows = _rows(config, policy, references, members, step_config)
  optimizer = optimizer_lib.make(static.optimizer_config(config))
  start = dpo.init_state(
    {"transformer": jax.tree.map(jnp.asarray, policy.params["transformer"])},
    beta=config.kl.beta,
    optimizer=optimizer,
  )
  state = jax.tree.map(lambda x: jnp.stack([x] * len(members)), start)
  step = jax.jit(jax.vmap(dpo.make_step(step_config, optimizer)))
  with progress_lib.show(
    console, "dpo", done=0, steps=config.train.steps
  ) as progress:
    for index in range(config.train.steps):
      each = [
        batches.batch_at(
          rows[member],
          seed=member[1],
          step=index,
          batch_size=config.train.batch_size,
        )
        for member in members
      ]
      batch = jax.tree.map(lambda *x: np.stack(x), *each)
      state, scalars = step(state, batch)
      loss = float(scalars["dpo/loss"].mean())
      progress.update(index + 1, {"": {"loss": loss}})
  return jax.device_get(state.params)


def _rows(config, policy, references, members, step_config):
  """What each member learns from: pairs, and what it subtracts."""
  score = jax.jit(dpo.pair_logprobs, static_argnums=2)
  mesh = static.mesh(config)
  pairs = {}
  for seed in dict.fromkeys(seed for _, seed in members):
    mine = config.copy_and_resolve_references()
    mine.seed = seed
    pairs[seed], _ = preference_data.split(
      mine, preference_data.sampled(mine, policy)
    )

  def subtracted(reference, of):
    if reference is None:
      return jax.tree.map(np.asarray, without_reference(of))
    return batches.map_rows(
      lambda batch, _: score(reference.params, batch, step_config),
      of,
      mesh=mesh,
      batch_size=config.train.batch_size,
    )

  return {
    (name, seed): dpo.Batch(
      pairs[seed], subtracted(references[name], pairs[seed])
    )
    for name, seed in members
  }


def _save(config, trained, member, workdir):
  """Leaves a member's policy and summary in its workdir."""
  reference, seed = member
  mine = config.copy_and_resolve_references()
  mine.seed = seed
  with workdir.sub(
    _name(reference, seed), mine.to_dict(), resume=True
  ) as opened:
    pretrained_lib.save(opened, trained)
    opened.write_summary(
      {
        "stage": "dpo",
        "seed": seed,
        "steps": config.train.steps,
        "reference": reference,
      }
    )
