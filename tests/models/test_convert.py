"""Weights in and out: the same network as in torch, and nothing let through."""

import dataclasses
import json
import pathlib
import pickle
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from rlhf_jax import errors
from rlhf_jax.models import transformer
from tests.models.test_parity import load, logits, save

DATA = pathlib.Path(__file__).parents[2].parent / "shared/data"
LLAMA = transformer.TransformerConfig(
  vocab_size=13,
  width=16,
  layers=3,
  heads=4,
  kv_heads=2,
  head_size=4,
  mlp_width=20,
  max_length=32,
  tie_embeddings=False,
  unroll=3,
)
LLAMA_BIASED = dataclasses.replace(
  LLAMA,
  qkv_bias=True,
  out_bias=True,
  mlp_bias=True,
  kv_heads=1,
  tie_embeddings=True,
)
GPT2 = dataclasses.replace(
  LLAMA,
  kv_heads=4,
  norm="layer",
  positions="learned",
  activation="gelu",
  qkv_bias=True,
  out_bias=True,
  mlp_bias=True,
  tie_embeddings=True,
)
CONFIGS = {"llama": LLAMA, "llama_biased": LLAMA_BIASED, "gpt2": GPT2}


def random_params(config, reward_model=False):
  """Every leaf random, biases and scales too."""
  init = lambda: transformer.init(
    jax.random.key(0), config, lm_head=not reward_model
  )
  params = jax.eval_shape(init)
  if reward_model:
    kernel = jax.ShapeDtypeStruct((config.width,), jnp.float32)
    params = {"transformer": params, "score_head": {"kernel": kernel}}
  rng = np.random.default_rng(0)
  draw = lambda x: rng.normal(size=x.shape).astype(np.float32)
  return jax.tree.map(draw, params)


def on_device(params):
  return jax.tree.map(jnp.asarray, params)


def assert_same_tree(found, wanted):
  assert jax.tree.structure(found) == jax.tree.structure(wanted)
  jax.tree.map(np.testing.assert_array_equal, found, wanted)


# The stored reference.


@pytest.fixture(scope="module")
def stories():
  if not (DATA / "stories260K").is_dir():
    pytest.skip("no stories260K here")
  return load(DATA / "stories260K")


def test_stories_logits_are_those_of_torch(stories):
  params, config = stories
  stored = np.load(DATA / "stories260K_reference/torch_logits.npz")
  found = logits(params, config, stored["input_ids"][None])[0]
  np.testing.assert_allclose(found, stored["logits"], atol=1e-4)


def test_stories_greedy_continuation_is_that_of_torch(stories):
  params, config = stories
  wanted = np.load(DATA / "stories260K_reference/greedy257.npz")["ids"]
  length = len(wanted)
  params = on_device(params)

  def step(carry, i):
    token, cache = carry
    x, cache = transformer.apply(
      params,
      token[None, None],
      config=config,
      positions=i[None, None],
      mask=(jnp.arange(length) <= i)[None, None],
      cache=cache,
      index=i,
    )
    token = jnp.argmax(x[0, 0] @ transformer.head_kernel(params).T).astype(
      jnp.int32
    )
    return (token, cache), token

  start = jnp.int32(wanted[0]), transformer.init_cache(config, 1, length)
  _, found = jax.lax.scan(step, start, jnp.arange(length - 1))
  np.testing.assert_array_equal(found, wanted[1:])


# Both directions; against torch, see test_parity.


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("reward_model", [False, True])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 2_000])
def test_round_trip_is_bitwise(name, reward_model, max_shard_bytes, tmp_path):
  config = CONFIGS[name]
  params = random_params(config, reward_model)
  save(tmp_path, params, config, max_shard_bytes=max_shard_bytes)
  sharded = (tmp_path / "model.safetensors.index.json").exists()
  assert sharded == (max_shard_bytes < 10**9)
  found, found_config = load(tmp_path)
  assert dataclasses.replace(found_config, family="") == config
  assert_same_tree(found, params)


def test_llama_layout(tmp_path):
  """From torch's definition: `y = x @ W.T`, query head h uses group h // 2."""
  params = random_params(LLAMA)
  save(tmp_path, params, LLAMA)
  tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
  layer = jax.tree.map(lambda x: x[1], params["layers"])
  qkv = layer["attention"]["qkv"]["kernel"]  # [D, G=2, N=4, K=4]
  x = np.random.default_rng(1).normal(size=16)
  project = lambda name: tensors[f"model.layers.1.{name}_proj.weight"] @ x
  heads = project("self_attn.q").reshape(4, 4)
  for h in range(4):
    np.testing.assert_allclose(heads[h], x @ qkv[:, h // 2, h % 2], rtol=1e-5)
  keys = project("self_attn.k").reshape(2, 4)
  values = project("self_attn.v").reshape(2, 4)
  for g in range(2):
    np.testing.assert_allclose(keys[g], x @ qkv[:, g, 2], rtol=1e-5)
    np.testing.assert_allclose(values[g], x @ qkv[:, g, 3], rtol=1e-5)
  mlp = layer["mlp"]["in"]["kernel"]
  np.testing.assert_allclose(project("mlp.gate"), x @ mlp[:, 0], rtol=1e-5)
  np.testing.assert_allclose(project("mlp.up"), x @ mlp[:, 1], rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_files_are_read_as_float32(dtype, tmp_path):
  params = random_params(LLAMA)
  save(tmp_path, params, LLAMA)
  rewrite(tmp_path, lambda name, tensor: tensor.astype(dtype))
  found, _ = load(tmp_path)
  rounded = jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), params)
  assert_same_tree(found, rounded)
  assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(found))


def test_a_bare_network_and_its_buffers_are_read(tmp_path):
  """As the published GPT-2: no prefix, and causal masks among the weights."""
  params = random_params(GPT2)
  save(tmp_path, params, GPT2)
  file = tmp_path / "model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  tensors = {
    name.removeprefix("transformer."): x for name, x in tensors.items()
  }
  tensors["h.0.attn.bias"] = np.ones((1, 1, 32, 32), np.uint8)
  tensors["lm_head.weight"] = tensors["wte.weight"]
  write(file, tensors)
  found, _ = load(tmp_path)
  assert_same_tree(found, params)


def test_a_head_that_is_not_the_embedding_counts(tmp_path):
  """Though the config says tied; as in transformers, and said."""
  tied = dataclasses.replace(LLAMA, tie_embeddings=True)
  params = random_params(tied)
  save(tmp_path, params, tied)
  file = tmp_path / "model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  embedding = tensors["model.embed_tokens.weight"]
  write(file, tensors | {"lm_head.weight": embedding})
  found, config = load(tmp_path)
  assert config.tie_embeddings and "lm_head" not in found
  write(file, tensors | {"lm_head.weight": embedding + 1})
  with pytest.warns(
    UserWarning, match="tie_word_embeddings: True, and lm_head"
  ):
    found, config = load(tmp_path)
  assert not config.tie_embeddings
  np.testing.assert_array_equal(found["lm_head"]["kernel"], embedding + 1)


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module."])
def test_what_a_wrapper_put_in_front_is_taken_off(wrapper, tmp_path):
  params = random_params(LLAMA)
  save(tmp_path, params, LLAMA)
  file = tmp_path / "model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  write(file, {wrapper + name: x for name, x in tensors.items()})
  assert_same_tree(load(tmp_path)[0], params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_file_has_the_dtype_that_is_asked_for(dtype, tmp_path):
  """It is known when it is read again, and is what an export has by default."""
  params = random_params(LLAMA)
  save(tmp_path, params, LLAMA, dtype=dtype)
  found, config = load(tmp_path)
  assert config.stored_dtype == dtype
  assert json.loads((tmp_path / "config.json").read_text())["dtype"] == dtype
  kind = {"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype)
  rounded = jax.tree.map(lambda x: x.astype(kind).astype(np.float32), params)
  assert_same_tree(found, rounded)


# Refusals.


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
  directory = tmp_path_factory.mktemp("saved")
  save(directory, random_params(LLAMA), LLAMA, max_shard_bytes=6_000)
  return directory


@pytest.fixture
def directory(saved, tmp_path):
  """A sound model in one file, to be spoilt."""
  params, config = load(saved)
  save(tmp_path / "model", params, config)
  return tmp_path / "model"


def write(file, tensors):
  safetensors.numpy.save_file(tensors, file, {"format": "pt"})
  (file.parent / "SHA256SUMS").unlink(missing_ok=True)


def rewrite(directory, change):
  file = directory / "model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  write(file, {name: change(name, x) for name, x in tensors.items()})


def refusal(directory):
  with pytest.raises(errors.UserError) as caught:
    load(directory)
  message = str(caught.value)
  assert "\n" not in message and str(directory) in message
  return message


def test_all_that_is_wrong_is_listed_at_once(directory):
  """Bad inputs 32 and 35."""
  file = directory / "model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  del tensors["model.layers.1.mlp.up_proj.weight"]
  del tensors["lm_head.weight"]
  tensors["model.layers.3.mlp.up_proj.weight"] = np.zeros(3, np.float32)
  tensors["model.norm.weight"] = np.zeros(17, np.float32)
  name = "model.layers.0.self_attn.q_proj.weight"
  tensors[name] = tensors[name].astype(np.int8)
  tensors["model.embed_tokens.weight"][3, 4] = np.nan
  tensors["model.layers.2.input_layernorm.weight"][0] = -np.inf
  write(file, tensors)
  message = refusal(directory)
  for problem in (
    "model.layers.1.mlp.up_proj.weight is missing",
    "lm_head.weight is missing",
    "model.layers.3.mlp.up_proj.weight is extra",
    "model.norm.weight has shape (17,), (16,) is wanted",
    "model.layers.0.self_attn.q_proj.weight has dtype I8",
    "model.embed_tokens.weight has NaN",
    "model.layers.2.input_layernorm.weight has NaN or infinite",
  ):
    assert problem in message
  assert message.count(";") == 6  # Seven problems, and no others.


def test_lm_head_of_an_untied_reward_model_is_extra(tmp_path):
  """Bad input 32: it is not silently left behind."""
  save(tmp_path, random_params(LLAMA, reward_model=True), LLAMA)
  file = tmp_path / "model.safetensors"
  head = np.zeros((13, 16), np.float32)
  write(file, safetensors.numpy.load_file(file) | {"lm_head.weight": head})
  assert "lm_head.weight is extra" in refusal(tmp_path)


def test_several_labels_are_no_score(tmp_path):
  save(tmp_path, random_params(LLAMA, reward_model=True), LLAMA)
  double = lambda x: np.concatenate([x, x])
  rewrite(tmp_path, lambda n, x: double(x) if n == "score.weight" else x)
  message = refusal(tmp_path)
  assert "score.weight has shape (2, 16), (1, 16) is wanted" in message


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_truncated_or_empty(directory, kept):
  """Bad input 33."""
  file = directory / "model.safetensors"
  file.write_bytes(file.read_bytes()[:kept])
  (directory / "SHA256SUMS").unlink()
  wanted = "truncated or damaged" if kept else "model.safetensors: empty"
  assert wanted in refusal(directory)


@pytest.mark.parametrize("kind", ["pickle", "zip"])
def test_pickle_renamed(directory, kind):
  """Bad inputs 33 and 36: by the magic bytes, and without unpickling."""
  content = pickle.dumps({"model.norm.weight": [1.0]}, protocol=2)
  if kind == "zip":  # torch.save's container.
    content = b"PK\x03\x04" + content
  (directory / "model.safetensors").write_bytes(content)
  (directory / "SHA256SUMS").unlink()
  assert "a pickle by its first bytes" in refusal(directory)


@pytest.mark.parametrize("byte", [9, -1, -777])
def test_flipped_bit(directory, byte):
  """Trap 28, bad input 33: safetensors itself does not notice."""
  file = directory / "model.safetensors"
  content = bytearray(file.read_bytes())
  content[byte] ^= 1
  file.write_bytes(content)
  assert "SHA256SUMS" in refusal(directory)


def test_a_pointer_to_a_large_file(directory):
  (directory / "SHA256SUMS").unlink()
  (directory / "model.safetensors").write_text(
    "version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n"
  )
  assert "a Git LFS pointer (`git lfs pull`" in refusal(directory)


def test_an_adapter_is_no_model(tmp_path):
  (tmp_path / "adapter_config.json").write_text(
    json.dumps({"base_model_name_or_path": "some/base"})
  )
  message = refusal(tmp_path)
  assert "an adapter of 'some/base' and not a model; merge it" in message


@pytest.mark.parametrize(
  "name, meaning",
  [
    ("model.layers.0.self_attn.q_proj.lora_A.weight", "an adapter's"),
    ("v_head.summary.weight", "a value head's"),
    ("model.layers.0.mlp.up_proj.weight_scale", "quantised"),
  ],
)
def test_tensors_that_say_what_a_file_is(directory, name, meaning):
  file = directory / "model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  write(file, tensors | {name: np.zeros(2, np.float32)})
  assert f"{name} is extra ({meaning}" in refusal(directory)


def test_absent_shard(saved, tmp_path):
  """Bad input 34."""
  shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
  shards = sorted(tmp_path.glob("*.safetensors"))
  assert len(shards) > 2
  shards[1].unlink()
  message = refusal(tmp_path)
  assert shards[1].name in message and shards[0].name not in message


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd"])
def test_shard_outside_the_directory(saved, tmp_path, name):
  """Though there is such a file."""
  (tmp_path / "model.safetensors").touch()
  tmp_path = tmp_path / "model"
  shutil.copytree(saved, tmp_path)
  index = tmp_path / "model.safetensors.index.json"
  content = json.loads(index.read_text())
  content["weight_map"]["model.norm.weight"] = name
  index.write_text(json.dumps(content))
  assert f"{name}: not in the directory" in refusal(tmp_path)


def test_shards_without_index(saved, tmp_path):
  shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
  (tmp_path / "model.safetensors.index.json").unlink()
  assert "without model.safetensors.index.json" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "a.pth"])
def test_only_a_pickle(directory, name):
  """Bad input 36."""
  (directory / "model.safetensors").rename(directory / name)
  message = refusal(directory)
  assert name in message and "run any code" in message


def test_no_weights(directory):
  (directory / "model.safetensors").unlink()
  assert "no weights" in refusal(directory)


def test_no_directory(tmp_path):
  assert "config.json: absent" in refusal(tmp_path / "nowhere")


@pytest.mark.parametrize(
  "content, message",
  [
    (b'{\n"model_type": llama}', "config.json:2: not JSON"),
    (b"[]", "config.json: a list"),
    (b'{"a": "\xff"}', "config.json: not UTF-8 at byte 7"),
  ],
)
def test_damaged_config(directory, content, message):
  (directory / "config.json").write_bytes(content)
  assert message in refusal(directory)


def test_save_does_not_mix_with_another_model(directory):
  before = sorted(directory.iterdir())
  with pytest.raises(errors.UserError, match=r"holds .*empty this one"):
    save(directory, random_params(GPT2), GPT2)
  assert sorted(directory.iterdir()) == before


def test_save_refuses_before_it_writes(tmp_path):
  hybrid = dataclasses.replace(LLAMA, activation="gelu")
  with pytest.raises(errors.UserError, match="activation: 'gelu'"):
    save(tmp_path / "new", random_params(hybrid), hybrid)
  assert not (tmp_path / "new").exists()
