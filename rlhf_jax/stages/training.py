"""What every stage that trains has in common: it begins, drives and finishes.

    stage = training.begin(config, workdir, console)
    state = stage.drive(step, state, arguments=…, shown=…)
    return stage.finish(model, metrics)

A stage says what it trains on, what its step is and what it measures at the
end. PPO trains many members at once and drives its own loop; it finishes by
`finish` here.
"""

from collections.abc import Callable, Mapping
import dataclasses
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from rich import console as rich_console

from rlhf_jax import types
from rlhf_jax.data import batches
from rlhf_jax.settings import static, validate
from rlhf_jax.stages import loop
from rlhf_jax.steps import optimizer as optimizer_lib
from rlhf_jax.steps import sharding
from rlhf_jax.storage import checkpoint
from rlhf_jax.storage import pretrained as pretrained_lib
from rlhf_jax.storage import workdir as workdir_lib


class Stage(NamedTuple):
  """A stage that is running.

  Attributes:
    config: Its own.
    workdir: Where it leaves what it finds.
    console: Where it says what it does.
    start: The model that it begins with.
    mesh: Where everything lives.
    began: When, by `time.monotonic`.
  """

  config: ConfigDict
  workdir: workdir_lib.Workdir
  console: rich_console.Console
  start: pretrained_lib.Pretrained
  mesh: jax.sharding.Mesh
  began: float

  def optimizer(self) -> Any:
    """The optimiser of a step that is one update."""
    return optimizer_lib.make(static.optimizer_config(self.config))

  def state(self, params: types.Params, optimizer: Any) -> types.TrainState:
    """The state before step 0, of a stage without β."""
    params = jax.tree.map(jnp.asarray, params)
    return types.TrainState(jnp.int32(0), params, optimizer.init(params), ())

  def batch(self, rows: Any, index: int) -> Any:
    """The batch of a step, on the mesh."""
    config = self.config
    size = config.train.batch_size
    taken = batches.batch_at(
      rows, seed=config.seed, step=index, batch_size=size
    )
    return sharding.place_batch(taken, self.mesh)

  def drive(
    self,
    step: Callable[..., tuple[types.TrainState, Any]],
    state: types.TrainState,
    *,
    arguments: Callable[[int], tuple],
    record: loop.Record,
    metadata: Mapping[str, Any],
  ) -> types.TrainState:
    """The state after the last step; see `loop.drive`."""
    run = loop.Run(
      name=self.config.stage.replace("_", " "),
      steps=self.config.train.steps,
      mesh=self.mesh,
      checkpoints=checkpoint.Checkpoints(
        self.workdir.path / "checkpoints", **self.config.checkpoint
      ),
      metadata=dict(metadata),
    )
    return loop.drive(
      run,
      state,
      step,
      arguments=arguments,
      rewind=self.workdir.rewind,
      record=record,
      console=self.console,
    )

  def recorder(self, shown: Mapping[str, str]) -> loop.Record:
    """Writes each step's metrics; shows some, by the name on the display."""

    def record(index, metrics, seconds):
      loop.check_finite(self.config.stage, index, metrics)
      self.workdir.append_metrics(index, metrics | {"time/step_s": seconds})
      return {"": {name: metrics[metric] for name, metric in shown.items()}}

    return record

  def measured(self, function: Callable[[Any], Any], rows: Any) -> Any:
    """`function` of a batch over all rows, as numpy arrays, one per row."""
    return batches.map_rows(
      lambda batch, _: function(batch),
      rows,
      mesh=self.mesh,
      batch_size=self.config.train.batch_size,
    )

  def trained(self, params: types.Params) -> pretrained_lib.Pretrained:
    """The model that the stage leaves."""
    where = str(self.workdir.path)
    return dataclasses.replace(self.start, params=params, where=where)

  def finish(
    self, model: pretrained_lib.Pretrained, measured: Mapping[str, float]
  ) -> dict[str, Any]:
    """Leaves the model and the summary; see `finish` below."""
    wall_s = time.monotonic() - self.began
    return finish(self.config, self.workdir, model, measured, wall_s=wall_s)


def begin(
  config: ConfigDict,
  workdir: workdir_lib.Workdir,
  console: rich_console.Console,
) -> Stage:
  """Loads the policy that the config names, and checks it against that."""
  began = time.monotonic()
  start = pretrained_lib.load_policy(config)
  validate.validate_model(config, start.model)
  return Stage(config, workdir, console, start, static.mesh(config), began)


def finish(
  config: ConfigDict,
  workdir: workdir_lib.Workdir,
  model: pretrained_lib.Pretrained,
  measured: Mapping[str, float],
  *,
  wall_s: float,
) -> dict[str, Any]:
  """Leaves a model and its summary in the workdir; returns the summary.

  Args:
    config: The stage's.
    workdir: Its own.
    model: What it trained.
    measured: Figures beside the means over the last steps, in whose place they
      stand where the names are alike.
    wall_s: Seconds that it took.
  """
  # As it was trained to end, whatever it was loaded with.
  stop_ids = static.rollout_config(config, model).stop_ids
  pretrained_lib.save(workdir, dataclasses.replace(model, stop_ids=stop_ids))
  summary = {
    "stage": config.stage,
    "seed": config.seed,
    "steps": config.train.steps,
    "wall_s": wall_s,
    "metrics": workdir.mean_of_last() | dict(measured),
  }
  workdir.write_summary(summary)
  return summary
