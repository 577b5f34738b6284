"""The loop that drives a compiled step: feed, record, show, save, stop.

Randomness and the place in the data are functions of the step's number, so a
resumed loop needs nothing but the state.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import signal
import time
from typing import Any

import jax
import numpy as np
from rich import console as rich_console

from rlhf_jax import errors, types
from rlhf_jax.stages import progress as progress_lib
from rlhf_jax.steps import sharding
from rlhf_jax.storage import checkpoint

Record = Callable[[int, Any, float], Mapping[str, progress_lib.Figures]]


@dataclasses.dataclass(frozen=True)
class Run:
  """What a stage tells the loop.

  Attributes:
    name: For the progress display.
    steps: Steps of the whole run.
    mesh: Where everything lives.
    checkpoints: Where the state is saved.
    metadata: Saved beside the state; on resume `reference` must be equal.
    leading: Axes before the parameters' own (a sweep's members).
  """

  name: str
  steps: int
  mesh: jax.sharding.Mesh
  checkpoints: checkpoint.Checkpoints
  metadata: dict[str, Any]
  leading: int = 0


def drive(
  run: Run,
  state: types.TrainState,
  step: Callable[..., tuple[types.TrainState, Any]],
  *,
  arguments: Callable[[int], tuple],
  rewind: Callable[[int], None],
  record: Record,
  console: rich_console.Console,
) -> types.TrainState:
  """Runs `state, metrics = step(state, *arguments(i))` up to the last step.

  Compiles once, for the state's shardings. Begins at the newest checkpoint,
  if there is one. SIGINT and SIGTERM save and stop.

  Args:
    run: What to run.
    state: The state before step 0.
    step: A function to be compiled; its state is donated.
    arguments: What else the step takes, placed on the mesh.
    rewind: Told the first step that will run, once.
    record: Told step number, metrics (numpy) and seconds; returns the figures
      to show. May raise.
    console: Where progress goes.

  Raises:
    Preempted: A signal came; the state is saved.
    UserError: The checkpoint is of another run.
  """
  with jax.set_mesh(run.mesh):
    shardings = sharding.shardings(state, run.mesh, leading=run.leading)
    state = _restore(run, state, shardings)
    first = int(np.max(jax.device_get(state.step)))
    rewind(first)
    if first >= run.steps:
      return state
    with (
      progress_lib.show(
        console, run.name, done=first, steps=run.steps
      ) as progress,
      _signals() as stop,
    ):
      progress.note("compiling")
      compiled = (
        jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
        .lower(state, *arguments(first))
        .compile()
      )
      for index in range(first, run.steps):
        began = time.perf_counter()
        state, metrics = compiled(state, *arguments(index))
        metrics = jax.device_get(metrics)
        seconds = time.perf_counter() - began
        progress.update(index + 1, record(index, metrics, seconds))
        # Read once: a signal that comes later waits for the next step's save.
        stopping = bool(stop)
        last = index + 1 == run.steps
        if run.checkpoints.due(index + 1, last or stopping):
          run.checkpoints.save(index + 1, state, run.metadata)
        if stopping:
          raise errors.Preempted(
            f"{run.name}: stopped by {stop[0]} after step {index + 1} of "
            f"{run.steps}; saved; --resume continues it"
          )
  return state


def check_finite(name: str, step: int, scalars: Mapping[str, Any]) -> None:
  """Stops a run whose figures are no longer numbers.

  Raises:
    NonFinite: Names the figures.
  """
  bad = [n for n, value in scalars.items() if not np.isfinite(value).all()]
  if bad:
    raise errors.NonFinite(
      f"{name}: step {step}: {', '.join(bad[:4])} not finite; the last "
      "checkpoint is from before; lower optimizer.learning_rate, or look at "
      "the reward"
    )


def _restore(run: Run, state, shardings):
  abstract = jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=where
    ),
    state,
    shardings,
  )
  if (restored := run.checkpoints.restore(abstract)) is None:
    return jax.device_put(state, shardings)
  state, metadata = restored
  if metadata != run.metadata:
    raise errors.UserError(
      f"{run.name}: the reference or the reward model is not the one that the "
      f"checkpoint was trained with (now {run.metadata}, then {metadata}); put "
      "the models of then back in place"
    )
  return state


@contextlib.contextmanager
def _signals() -> Iterator[list[str]]:
  """Notes the first SIGINT or SIGTERM; a second one acts as ever."""
  caught: list[str] = []
  numbers = (signal.SIGINT, signal.SIGTERM)
  previous = [signal.getsignal(number) for number in numbers]

  def restore():
    for number, handler in zip(numbers, previous):
      signal.signal(number, handler)

  def note(number, frame):
    del frame
    caught.append(signal.Signals(number).name)
    restore()

  for number in numbers:
    signal.signal(number, note)
  try:
    yield caught
  finally:
    restore()
