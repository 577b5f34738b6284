"""Stage `ppo`: one policy, or many at once.

The members of a sweep run in one compiled program (`sharding.step_of_all`):
each has its state, prompts and random numbers; the reference and the reward
model are shared. Each member has a workdir of the same form as a single run's.
"""

from collections.abc import Sequence
import dataclasses
import functools
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
from rich import console as rich_console

from rlhf_jax.data import batches
from rlhf_jax.data import mix as mix_texts
from rlhf_jax.data import prompts as prompts_lib
from rlhf_jax.models import transformer
from rlhf_jax.settings import roles, static
from rlhf_jax.stages import alarms, loop, sample_records, training
from rlhf_jax.steps import optimizer as optimizer_lib
from rlhf_jax.steps import ppo, rewards, sharding, text_mix
from rlhf_jax.steps import reference as reference_lib
from rlhf_jax.storage import checkpoint
from rlhf_jax.storage import workdir as workdir_lib
from rlhf_jax.text import toy_language

SAMPLES = 4  # responses of a step that are recorded


class Member(NamedTuple):
  """A run among those that are trained at once.

  Attributes:
    label: What tells it from the others, such as `β=0.1`; '' alone.
    config: Its own; members differ in `seed` and `kl.beta` alone.
    workdir: Its own.
  """

  label: str
  config: ConfigDict
  workdir: workdir_lib.Workdir


def run(
  config: ConfigDict,
  workdir: workdir_lib.Workdir,
  *,
  console: rich_console.Console,
) -> dict[str, Any]:
  """Trains, leaves the policy in the workdir and returns the summary."""
  member = Member("", config, workdir)
  checkpoints = workdir.path / "checkpoints"
  (summary,) = train(
    roles.load(config), [member], checkpoints, stacked=False, console=console
  )
  return summary


def train(
  models: roles.Models,
  members: Sequence[Member],
  checkpoints: pathlib.Path,
  *,
  stacked: bool,
  console: rich_console.Console,
) -> list[dict[str, Any]]:
  """Trains the members, leaves policies and summaries in their workdirs.

  Args:
    models: From `roles.load`.
    members: Runs with one shape of everything.
    checkpoints: Where the state of all of them is saved.
    stacked: Whether their states have a leading axis, as many members need.
    console: Where progress and alarms go.

  Returns:
    The members' summaries.
  """
  began = time.monotonic()
  config = members[0].config
  mesh = static.mesh(config, members=len(members) if stacked else 1)
  # Every device has as many: the first ones are run twice where some lack.
  lacking = -len(members) % mesh.shape.get(sharding.MEMBER_AXIS, 1)
  places = [*members, *members[:lacking]]
  # The reference and the reward model are placed as the policy is.
  reference, reward_params = _placed(
    (reference_lib.freeze(models.reference.params), models.reward.params), mesh
  )
  step, starts = _step_and_states(models, places, mesh, stacked)
  data = _data(models, members, console)
  keys = [jax.random.key(place.config.seed) for place in places]
  key = jnp.stack(keys) if stacked else keys[0]

  def arguments(index):
    each = [_batch(m.config, data[m.config.seed], index) for m in places]
    batch = jax.tree.map(lambda *x: np.stack(x), *each) if stacked else each[0]
    placed = sharding.place_batch(batch, mesh, leading=int(stacked))
    return reference, reward_params, placed, key

  def rewind(index):
    for member in members:
      member.workdir.rewind(index)

  record = _Record(models, members, stacked, console)
  state = loop.drive(
    loop.Run(
      name="ppo",
      steps=config.train.steps,
      mesh=mesh,
      checkpoints=checkpoint.Checkpoints(checkpoints, **config.checkpoint),
      metadata={
        "reference": checkpoint.tree_hash(reference),
        "reward": models.reward.identity,
      },
      leading=int(stacked),
    ),
    starts,
    step,
    arguments=arguments,
    rewind=rewind,
    record=record.step,
    console=console,
  )
  trained = jax.device_get(state.params["transformer"])
  wall_s = (time.monotonic() - began) / len(members)
  return [
    training.finish(
      member.config,
      member.workdir,
      dataclasses.replace(models.policy, params={"transformer": params}),
      {},
      wall_s=wall_s,
    )
    for member, params in zip(members, record.split(trained))
  ]


def _placed(params, mesh):
  return jax.device_put(params, sharding.shardings(params, mesh))


def _step_and_states(models, members, mesh, stacked):
  """The step of all members, and their states before step 0."""
  config = members[0].config
  updates = config.ppo.epochs * config.ppo.minibatches
  optimizer = optimizer_lib.make(
    static.optimizer_config(config, updates_per_step=updates)
  )
  controller = static.controller(config)
  policy, reward = models.policy, models.reward
  head = transformer.init_scalar_head(policy.model.width, use_bias=True)
  params = {"transformer": policy.params["transformer"], "value_head": head}
  vectorise = stacked and sharding.vectorises(mesh)
  step = ppo.make_step(
    static.ppo_config(
      config,
      policy,
      models.reference,
      members=len(members) if vectorise else 1,
    ),
    score=reward.score,
    optimizer=optimizer,
    controller=controller,
    gold=None if config.data.path else toy_language.of(config).gold_reward,
    score_scale=rewards.score_scale if reward.normalised else None,
    agreement=reward.agreement,
    member_axis=sharding.MEMBER_AXIS if vectorise else None,
  )

  def start(params, betas):
    of = lambda beta: ppo.init_state(
      params, beta=beta, optimizer=optimizer, controller=controller
    )
    return jax.vmap(of)(betas) if stacked else of(betas[0])

  if stacked:
    step = sharding.step_of_all(step, mesh, vectorise=vectorise)
  betas = jnp.array([member.config.kl.beta for member in members])
  # Made where they belong: no device ever holds all of them.
  shapes = jax.eval_shape(start, params, betas)
  places = sharding.shardings(shapes, mesh, leading=int(stacked))
  make = jax.jit(start, out_shardings=places)
  return step, make(_placed(params, mesh), betas)


def _data(models, members, console):
  """Seed → the prompts of the members with it, and the texts of a mix."""
  found, prompts = {}, None
  for member in members:
    config, seed = member.config, member.config.seed
    if seed in found:
      continue
    # A file's prompts are the same for every seed.
    if prompts is None or not config.data.path:
      prompts = prompts_lib.load(config, models.policy, console)
    texts = None
    if config.mix.kind != "none":
      texts = mix_texts.load(config, models.policy, console)
    found[seed] = prompts, texts
  return found


def _batch(config, data, index):
  """What a step sees; the responses to a prompt are neighbours."""
  prompts, texts = data
  rows = functools.partial(batches.batch_at, seed=config.seed, step=index)
  each = config.train.batch_size // config.ppo.group_size
  groups = lambda x: np.repeat(x, config.ppo.group_size, axis=0)
  batch = jax.tree.map(groups, rows(prompts, batch_size=each))
  if texts is None:
    return batch
  return text_mix.Batch(batch, rows(texts, batch_size=config.mix.batch_size))


class _Record:
  """Writes the steps of all members; says what alarms; shows some figures."""

  def __init__(self, models, members, stacked, console):
    self._models = models
    self._members = members
    self._stacked = stacked
    self._console = console
    compute_dtype = members[0].config.model.compute_dtype
    self._watches = [alarms.Watch(compute_dtype) for _ in members]

  def split(self, tree):
    """Each member's part of what all have together."""
    if not self._stacked:
      return [tree]
    count = range(len(self._members))
    return [jax.tree.map(lambda x, i=i: x[i], tree) for i in count]

  def step(self, index, metrics, seconds):
    """Records a step that took so long for all of them."""
    if self._models.reward.host is not None:
      self._models.reward.host.raise_if_failed()
    each = zip(self._members, self._watches, self.split(metrics))
    return {
      member.label: self._of(member, watch, index, mine, seconds)
      for member, watch, mine in each
    }

  def _of(self, member, watch, index, metrics, seconds):
    """Writes one member's step; returns the figures to show."""
    config, workdir, scalars = member.config, member.workdir, metrics.scalars
    self._warn(member.label, index, watch.alarms(index, scalars))
    loop.check_finite(f"ppo in {workdir.path}", index, scalars)
    mine = seconds / len(self._members)
    tokens = float(scalars["rollout/response_tokens"]) * config.train.batch_size
    per_second = tokens / mine
    workdir.append_metrics(
      index,
      scalars | {"time/step_s": mine, "time/response_tokens_per_s": per_second},
    )
    last = index + 1 == config.train.steps
    if last or index % config.train.samples_every == 0:
      workdir.append_samples(
        sample_records.of_step(
          index, self._models.policy, metrics, most=SAMPLES
        )
      )
    figures = {n: scalars[m] for n, m in _SHOWN.items() if m in scalars}
    return figures | {"tokens/s": per_second}

  def _warn(self, label, index, found):
    for alarm in found:
      words = filter(None, [f"ppo step {index}", label, alarm])
      self._console.print(
        " ".join(words), style="yellow", markup=False, soft_wrap=True
      )


# What the display shows of a step, by its name there.
_SHOWN = {
  "score": "reward/score",
  "gold": "reward/gold",
  "KL": "kl/reverse_exact",
}
