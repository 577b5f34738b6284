"""Checkpoints: bitwise, verified, and never silently the wrong ones."""

import hashlib
import json
import shutil

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import optax
import pytest

from rlhf_jax import errors, types
from rlhf_jax.storage import checkpoint


def make_state(seed, *, width=8):
  """A train state with every kind of leaf, after two Adam updates."""
  key = jax.random.key(seed)
  params = {
    "embedding": {"tokens": jax.random.normal(key, (16, width))},
    "layers": {"in": jax.random.normal(key, (2, width)).astype(jnp.bfloat16)},
    "bias": jnp.float32(0.1),
  }
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
  opt_state = optimizer.init(params)
  for _ in range(2):
    updates, opt_state = optimizer.update(params, opt_state, params)
    params = optax.apply_updates(params, updates)
  beta = {"log_beta": jnp.float32(-3.0), "hit": jnp.array(True)}
  return types.TrainState(jnp.int32(seed), params, opt_state, beta)


def abstract(state, sharding=None):
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    ),
    state,
  )


def assert_same_bits(found, wanted):
  assert jax.tree.structure(found) == jax.tree.structure(wanted)
  for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
    assert one.dtype == other.dtype and one.shape == other.shape
    assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def flip_bit(file):
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 1
  file.write_bytes(content)


def array_files(step_directory):
  """Files in which Orbax keeps array data; the largest holds most of it."""
  files = [f for f in step_directory.rglob("*") if f.parent.name == "d"]
  return sorted(files, key=lambda file: file.stat().st_size)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
  """A directory with good checkpoints of steps 10 and 20; copy, then harm."""
  directory = tmp_path_factory.mktemp("saved") / "checkpoints"
  checkpoints = checkpoint.Checkpoints(directory, every=10, keep=2)
  for step in (10, 20):
    checkpoints.save(step, make_state(step), {"reference": f"hash {step}"})
  return directory


@pytest.fixture
def harmed(saved, tmp_path):
  directory = tmp_path / "checkpoints"
  shutil.copytree(saved, directory)
  return directory


def restore(directory, state=None):
  checkpoints = checkpoint.Checkpoints(directory, every=10, keep=2)
  restored = checkpoints.restore(abstract(state or make_state(0)))
  assert restored is not None
  return restored


def test_due():
  checkpoints = checkpoint.Checkpoints("nowhere", every=50, keep=1)
  due = [step for step in range(1, 131) if checkpoints.due(step, step == 130)]
  assert due == [50, 100, 130]


@pytest.mark.parametrize("every, keep", [(0, 1), (1, 0), (-5, 1)])
def test_periods_are_positive(every, keep):
  with pytest.raises(errors.UserError, match=r"checkpoint\.(every|keep): "):
    checkpoint.Checkpoints("nowhere", every=every, keep=keep)


def test_nothing_saved_is_none(tmp_path):
  checkpoints = checkpoint.Checkpoints(tmp_path / "absent", every=1, keep=1)
  assert checkpoints.restore(abstract(make_state(0))) is None
  assert list(tmp_path.iterdir()) == []


def test_restores_the_newest_bit_for_bit(saved):
  """Trap 12."""
  state, metadata = restore(saved)
  assert_same_bits(state, make_state(20))
  assert metadata == {"reference": "hash 20"}
  assert isinstance(state, types.TrainState)
  assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))


def test_restored_state_trains_on(saved):
  """A restored state may be donated, and goes where the fresh one goes."""
  step = jax.jit(
    lambda state: jax.tree.map(lambda leaf: leaf * 3, state), donate_argnums=0
  )
  state, _ = restore(saved)
  assert_same_bits(step(state), step(make_state(20)))


def test_restores_onto_another_sharding(tmp_path):
  """Saved on one mesh, restored on another, and on one device."""
  devices = np.array(jax.devices()[:8])
  axes = (AxisType.Auto, AxisType.Auto)
  tall = jax.sharding.Mesh(devices.reshape(4, 2), ("a", "b"), axis_types=axes)
  wide = jax.sharding.Mesh(devices.reshape(2, 4), ("a", "b"), axis_types=axes)
  kernel = jnp.arange(64, dtype=jnp.float32).reshape(8, 8)
  before = NamedSharding(tall, PartitionSpec("a", "b"))
  after = NamedSharding(wide, PartitionSpec("b", "a"))
  checkpoints = checkpoint.Checkpoints(tmp_path, every=1, keep=1)
  checkpoints.save(1, {"kernel": jax.device_put(kernel, before)}, {})
  for sharding in (after, jax.sharding.SingleDeviceSharding(devices[3])):
    wanted = abstract({"kernel": kernel}, sharding)
    restored = checkpoints.restore(wanted)
    assert restored is not None
    assert restored[0]["kernel"].sharding == sharding
    assert_same_bits(restored[0], {"kernel": kernel})
  restored = checkpoints.restore(abstract({"kernel": kernel}))
  assert restored is not None
  assert not restored[0]["kernel"].committed
  assert_same_bits(restored[0], {"kernel": kernel})


def test_keeps_the_newest_and_forgets_the_future(tmp_path):
  """Trap 29: what stays is what we say, also after a rewound run."""
  checkpoints = checkpoint.Checkpoints(tmp_path, every=1, keep=2)
  for step in (1, 2, 3, 9):
    checkpoints.save(step, {"x": jnp.float32(step)}, {})
  assert checkpoints.steps() == [3, 9]
  checkpoints.save(4, {"x": jnp.float32(4)}, {})
  assert checkpoints.steps() == [3, 4]
  checkpoints.save(4, {"x": jnp.float32(5)}, {})
  restored = checkpoints.restore(abstract({"x": jnp.float32(0)}))
  assert restored == ({"x": 5.0}, {})
  assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4"]


def test_manifest_sums_every_other_file(saved):
  """The sums are sha256 of the files' bytes, and no file is left out."""
  step = saved / "20"
  sums = json.loads((step / "manifest.json").read_text())
  files = {f for f in step.rglob("*") if f.is_file()}
  assert {step / name for name in sums} == files - {step / "manifest.json"}
  for name, found in sums.items():
    wanted = hashlib.sha256((step / name).read_bytes()).hexdigest()
    assert found == wanted


def test_a_flipped_bit_anywhere_falls_back(harmed, caplog):
  """Trap 28: one bit of each file in turn; the array data is among them."""
  files = [f for f in (harmed / "20").rglob("*") if f.is_file()]
  assert set(array_files(harmed / "20")) < set(files)
  for file in files:
    content = file.read_bytes()
    if content:
      flip_bit(file)
      state, metadata = restore(harmed)
      assert_same_bits(state, make_state(10))
      assert metadata == {"reference": "hash 10"}
      assert f"{file}: " in caplog.text or file.name == "manifest.json"
      file.write_bytes(content)
  assert_same_bits(restore(harmed)[0], make_state(20))


@pytest.mark.parametrize(
  "name", ["manifest.json", "metadata.json", "state/orbax.checkpoint"]
)
def test_half_copied_step_falls_back(harmed, caplog, name):
  """Row 40: a missing file, the manifest itself among them."""
  (harmed / "20" / name).unlink()
  state, _ = restore(harmed)
  assert_same_bits(state, make_state(10))
  assert str(harmed / "20" / name) in caplog.text


def test_damaged_manifest_falls_back(harmed, caplog):
  (harmed / "20" / "manifest.json").write_text('{"state/')
  assert_same_bits(restore(harmed)[0], make_state(10))
  assert "20/manifest.json: damaged" in caplog.text


def test_no_good_checkpoint(harmed):
  """Trap 28: exit code 45, and the damaged files stay to be looked at."""
  for step in ("10", "20"):
    flip_bit(array_files(harmed / step)[-1])
  with pytest.raises(errors.NoUsableCheckpoint, match=r"\[10, 20\]") as caught:
    restore(harmed)
  assert caught.value.exit_code == 45
  assert (harmed / "10").is_dir() and (harmed / "20").is_dir()


def test_an_interrupted_save_leaves_the_old_steps(harmed, monkeypatch):
  """Neither a step with the new name nor rubbish beside the old ones."""

  def full(*_):
    raise OSError(28, "No space left on device\nand more")

  monkeypatch.setattr(checkpoint.ocp, "save", full)
  checkpoints = checkpoint.Checkpoints(harmed, every=10, keep=1)
  with pytest.raises(errors.UserError, match="30: cannot be written") as caught:
    checkpoints.save(30, make_state(30), {})
  assert "\n" not in str(caught.value)
  assert sorted(path.name for path in harmed.iterdir()) == ["10", "20"]


@pytest.mark.parametrize(
  "change, wanted",
  [
    (
      lambda params: params | {"bias": jnp.zeros((3,))},
      r"params/bias: float32\[\] in the checkpoint; float32\[3\] in this run",
    ),
    (
      lambda params: params | {"head": jnp.zeros((2, 3))},
      r"params/head: nothing in the checkpoint; float32\[2, 3\] in this run",
    ),
    (
      lambda params: {"bias": params["bias"], "layers": params["layers"]},
      r"params/embedding/tokens: float32\[16, 8\] in the checkpoint; nothing",
    ),
    (
      lambda params: params | {"bias": jnp.bfloat16(0)},
      r"params/bias: float32\[\] in the checkpoint; bfloat16\[\] in this run",
    ),
  ],
)
def test_another_architecture(saved, change, wanted):
  """Row 40 and trap 29: our words, with the path and both shapes."""
  state = make_state(0)
  state = types.TrainState(
    state.step, change(state.params), state.optimizer, {}
  )
  with pytest.raises(errors.UserError, match=wanted) as caught:
    restore(saved, state)
  assert "\n" not in str(caught.value)


def test_newer_format(harmed):
  """Row 40."""
  file = harmed / "20" / "metadata.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 3}))
  manifest = harmed / "20" / "manifest.json"
  sums = json.loads(manifest.read_text())
  sums["metadata.json"] = hashlib.sha256(file.read_bytes()).hexdigest()
  manifest.write_text(json.dumps(sums))
  with pytest.raises(errors.UserError, match=r"metadata\.json: format: 3; "):
    restore(harmed)


def test_params_round_trip(tmp_path):
  """A frozen model comes back without a tree to ask for it."""
  params = make_state(3).params | {
    "odd.name": {"x y": np.arange(4, dtype="i4")}
  }
  directory = tmp_path / "new" / "policy"
  checkpoint.save_params(directory, make_state(1).params, {})
  checkpoint.save_params(directory, params, {"stage": "sft", "width": 8})
  loaded, metadata = checkpoint.load_params(directory)
  assert metadata == {"stage": "sft", "width": 8}
  assert_same_bits(loaded, params)
  assert checkpoint.tree_hash(loaded) == checkpoint.tree_hash(params)


def test_damaged_params(tmp_path):
  """Trap 28."""
  with pytest.raises(errors.UserError, match=r"manifest\.json: missing"):
    checkpoint.load_params(tmp_path / "absent")
  checkpoint.save_params(tmp_path / "policy", make_state(1).params, {})
  file = array_files(tmp_path / "policy")[-1]
  flip_bit(file)
  with pytest.raises(errors.UserError, match=f"{file}: damaged"):
    checkpoint.load_params(tmp_path / "policy")


def test_tree_hash_of_one_array():
  """From the definition: the header, then the little-endian bytes."""
  digest = hashlib.sha256(b'["a/b", "float32", [2]]')
  digest.update(bytes.fromhex("0000803f000000c0"))  # 1.0 and −2.0
  found = checkpoint.tree_hash({"a": {"b": jnp.array([1.0, -2.0])}})
  assert found == digest.hexdigest()


def test_tree_hash_tells_trees_apart():
  """Trap 11: values, shapes, dtypes and names all count; placement not."""
  x = np.arange(8, dtype=np.float32)
  trees = [
    {"a": x},
    {"b": x},
    {"a": x.reshape(2, 4)},
    {"a": x.view(np.int32)},
    {"a": np.nextafter(x, np.float32(9))},
    {"a": x[:4], "b": x[4:]},
    {"a": {"b": x}},
  ]
  assert len(set(map(checkpoint.tree_hash, trees))) == len(trees)
  axes = (AxisType.Auto,)
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]), ("a",), axis_types=axes)
  sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("a")))
  same = [{"a": x}, {"a": jnp.array(x)}, {"a": sharded}, {"a": x[::-1][::-1]}]
  assert len(set(map(checkpoint.tree_hash, same))) == 1
