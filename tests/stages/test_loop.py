"""The loop: one compilation, resuming, signals, and figures that are NaN."""

import io
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich import console as rich_console

from rlhf_jax import errors, types
from rlhf_jax.stages import loop
from rlhf_jax.steps import sharding
from rlhf_jax.storage import checkpoint

STEPS = 6


def make_state():
  return types.TrainState(
    step=jnp.int32(0),
    params={"value_head": {"kernel": jnp.ones(4)}},
    optimizer=(),
    beta={"beta": jnp.float32(0.1)},
  )


class Trivial:
  """A stage whose step draws noise, and that records what the loop does."""

  def __init__(self, directory, *, every=100, metadata=None):
    self.run = loop.Run(
      name="trivial",
      steps=STEPS,
      mesh=sharding.make_mesh(2, 1, 1),
      checkpoints=checkpoint.Checkpoints(directory, every=every, keep=2),
      metadata={"reference": "abc"} if metadata is None else metadata,
    )
    self.traced = 0
    self.first = []
    self.recorded = []
    self.at = {}  # Step → what to do while it is recorded.
    self.output = io.StringIO()

  def step(self, state, amount):
    self.traced += 1
    key = jax.random.fold_in(jax.random.key(0), state.step)
    kernel = state.params["value_head"]["kernel"]
    kernel = kernel + amount * jax.random.normal(key, kernel.shape)
    new = types.TrainState(
      step=state.step + 1,
      params={"value_head": {"kernel": kernel}},
      optimizer=(),
      beta={"beta": state.beta["beta"] * 1.1},
    )
    return new, {"total": kernel.sum()}

  def record(self, index, metrics, seconds):
    assert type(metrics["total"]) is np.ndarray and seconds > 0
    self.recorded.append(index)
    if index in self.at:
      self.at[index]()
    return {"": {"total": float(metrics["total"])}}

  def drive(self):
    state = loop.drive(
      self.run,
      make_state(),
      self.step,
      arguments=lambda index: (jnp.float32(index + 1),),
      rewind=self.first.append,
      record=self.record,
      console=rich_console.Console(file=self.output),
    )
    return jax.device_get(state)


def send(number):
  return lambda: os.kill(os.getpid(), number)


def handlers():
  return [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  stage = Trivial(tmp_path_factory.mktemp("whole"))
  state = stage.drive()
  assert stage.recorded == list(range(STEPS)) and stage.first == [0]
  assert stage.traced == 1
  return state


def test_the_state_is_the_sum_of_its_steps(uninterrupted):
  kernel = np.ones(4)
  for index in range(STEPS):
    key = jax.random.fold_in(jax.random.key(0), index)
    kernel = kernel + (index + 1) * np.asarray(jax.random.normal(key, (4,)))
  found = uninterrupted.params["value_head"]["kernel"]
  np.testing.assert_allclose(found, kernel, rtol=1e-5)
  assert uninterrupted.step == STEPS


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_a_resumed_run_is_the_same(
  number, tmp_path, uninterrupted
):
  """Trap 12, bad input 53: interrupted ≡ uninterrupted, bitwise."""
  before = handlers()
  stage = Trivial(tmp_path)
  stage.at = {2: send(number)}
  with pytest.raises(errors.Preempted) as caught:
    stage.drive()
  assert caught.value.exit_code == 42
  assert str(caught.value) == (
    f"trivial: stopped by {number.name} after step 3 of 6; saved; --resume "
    "continues it"
  )
  assert handlers() == before
  assert stage.recorded == [0, 1, 2]
  assert stage.run.checkpoints.steps() == [3]

  stage = Trivial(tmp_path)
  state = stage.drive()
  assert stage.first == [3] and stage.recorded == [3, 4, 5]
  assert stage.traced == 1
  jax.tree.map(np.testing.assert_array_equal, state, uninterrupted)
  assert stage.run.checkpoints.steps() == [3, 6]


def test_a_finished_run_does_nothing_when_resumed(tmp_path, uninterrupted):
  Trivial(tmp_path).drive()
  stage = Trivial(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, stage.drive(), uninterrupted)
  assert stage.first == [STEPS]
  assert stage.recorded == [] and stage.traced == 0


def test_a_signal_during_the_last_step_stops_what_would_follow(
  tmp_path, uninterrupted
):
  """A pipeline must not go on to its next stage."""
  stage = Trivial(tmp_path)
  stage.at = {STEPS - 1: send(signal.SIGTERM)}
  with pytest.raises(errors.Preempted):
    stage.drive()
  assert stage.run.checkpoints.steps() == [STEPS]
  resumed = Trivial(tmp_path).drive()
  jax.tree.map(np.testing.assert_array_equal, resumed, uninterrupted)


@pytest.fixture
def interruptible():
  """Python's own handler, which a process in the background may lack."""
  previous = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("interruptible")
def test_a_second_signal_acts_as_ever(tmp_path):
  before = handlers()
  stage = Trivial(tmp_path)

  def twice():
    send(signal.SIGINT)()
    send(signal.SIGINT)()

  stage.at = {1: twice}
  with pytest.raises(KeyboardInterrupt):
    stage.drive()
  assert handlers() == before


def test_what_says_saved_is_saved(tmp_path, monkeypatch):
  """A signal between the decision to save and the decision to stop."""
  stage = Trivial(tmp_path)
  due = stage.run.checkpoints.due

  def interrupted(step, last):
    decision = due(step, last)
    if step == 2:
      send(signal.SIGTERM)()
    return decision

  monkeypatch.setattr(stage.run.checkpoints, "due", interrupted)
  with pytest.raises(errors.Preempted, match="after step 3 of 6; saved"):
    stage.drive()
  assert stage.run.checkpoints.steps() == [3]


def test_checkpoints_are_saved_when_due_and_at_the_end(tmp_path):
  Trivial(tmp_path, every=4).drive()
  steps = checkpoint.Checkpoints(tmp_path, every=1, keep=2).steps()
  assert steps == [4, 6]


def test_another_reference_is_refused(tmp_path):
  """Trap 11, bad input 39."""
  Trivial(tmp_path).drive()
  stage = Trivial(tmp_path, metadata={"reference": "other"})
  with pytest.raises(errors.UserError, match="the reference or the reward"):
    stage.drive()
  assert stage.traced == 0


def test_figures_that_are_not_numbers_stop_the_run(tmp_path):
  """Trap 25: before the state that they came from is saved."""
  before = handlers()
  stage = Trivial(tmp_path, every=1)
  figures = {"kl": np.float32(0.1), "loss": np.array([1.0, np.nan])}
  stage.at = {1: lambda: loop.check_finite("trivial", 1, figures)}
  with pytest.raises(errors.NonFinite) as caught:
    stage.drive()
  assert caught.value.exit_code == 44
  assert str(caught.value).startswith("trivial: step 1: loss not finite; ")
  assert stage.run.checkpoints.steps() == [1]
  assert handlers() == before


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_check_finite_names_every_figure(bad):
  loop.check_finite("ppo", 3, {"a": np.float32(1.0), "b": np.zeros(2)})
  with pytest.raises(errors.NonFinite, match=r"^ppo: step 3: a, c not finite"):
    loop.check_finite("ppo", 3, {"a": bad, "b": 0.0, "c": np.array([0.0, bad])})


def test_progress_is_plain_lines_where_there_is_no_terminal(tmp_path):
  stage = Trivial(tmp_path)
  stage.drive()
  lines = stage.output.getvalue().splitlines()
  assert lines[0] == "trivial: compiling"
  assert lines[-1].startswith("trivial 6/6 total ")
