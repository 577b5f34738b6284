"""`config.json` and our config, both ways, and what is refused."""

import dataclasses
import re

import pytest
import transformers

from rlhf_jax import errors
from rlhf_jax.models import families, rope, transformer

LLAMA = {
  "model_type": "llama",
  "architectures": ["LlamaForCausalLM"],
  "vocab_size": 11,
  "hidden_size": 24,
  "intermediate_size": 40,
  "num_hidden_layers": 6,
  "num_attention_heads": 4,
  "max_position_embeddings": 32,
}
GPT2 = {
  "model_type": "gpt2",
  "vocab_size": 11,
  "n_embd": 24,
  "n_layer": 6,
  "n_head": 4,
  "n_positions": 32,
}
LLAMA3 = {
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 16,
}
OURS_LLAMA = transformer.TransformerConfig(
  vocab_size=11,
  width=24,
  layers=6,
  heads=4,
  kv_heads=4,
  head_size=6,
  mlp_width=40,
  max_length=32,
  norm_epsilon=1e-6,
  tie_embeddings=False,
  unroll=6,
  family="llama",
)
OURS_GPT2 = transformer.TransformerConfig(
  vocab_size=11,
  width=24,
  layers=6,
  heads=4,
  kv_heads=4,
  head_size=6,
  mlp_width=96,
  max_length=32,
  norm="layer",
  positions="learned",
  activation="gelu",
  qkv_bias=True,
  out_bias=True,
  mlp_bias=True,
  unroll=6,
  family="gpt2",
)
OURS_LLAMA3 = dataclasses.replace(
  OURS_LLAMA,
  rope_theta=5e5,
  rope_scaling=rope.RopeScaling(
    kind="llama3",
    factor=8.0,
    low_frequency_factor=1.0,
    high_frequency_factor=4.0,
    original_max_length=16,
  ),
)


def read(hf, unroll=0):
  return families.config_from_hf(
    hf, where="config.json", unroll=unroll, remat=False, compute_dtype="float32"
  )


def write(config, reward_model=False):
  return families.config_to_hf(
    config, reward_model=reward_model, stop_ids=(2, 5), pad_id=0, bos_id=1
  )


def test_what_is_absent_means_what_it_means_in_transformers():
  assert read(LLAMA) == OURS_LLAMA
  assert read(GPT2) == OURS_GPT2


@pytest.mark.parametrize(
  "rope",
  [
    {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"rope_type": "llama3"}},
    {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"type": "llama3"}},
    {"rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 5e5}},
  ],
)
def test_either_spelling_of_rope(rope):
  assert read(LLAMA | rope) == OURS_LLAMA3


@pytest.mark.parametrize(
  "rope, theta",
  [
    ({}, 1e4),
    ({"rope_theta": 3e4, "rope_scaling": None}, 3e4),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 3e4}}, 3e4),
    ({"rope_theta": 3e4, "rope_parameters": {"rope_type": "default"}}, 3e4),
  ],
)
def test_rope_without_scaling(rope, theta):
  assert read(LLAMA | rope) == dataclasses.replace(OURS_LLAMA, rope_theta=theta)


def test_heads_given():
  given = {"num_key_value_heads": 2, "head_dim": 8, "attention_bias": True}
  config = read(LLAMA | given)
  assert (config.kv_heads, config.head_size) == (2, 8)
  assert (config.qkv_bias, config.out_bias, config.mlp_bias) == (
    True,
    True,
    False,
  )


def test_unroll():
  assert read(LLAMA, unroll=3).unroll == 3
  with pytest.raises(errors.UserError, match="unroll=4 does not divide"):
    read(LLAMA, unroll=4)


@pytest.mark.parametrize("ours", [OURS_LLAMA, OURS_LLAMA3, OURS_GPT2])
@pytest.mark.parametrize("reward_model", [False, True])
def test_round_trip(ours, reward_model):
  hf = write(ours, reward_model)
  assert read(hf) == ours
  assert families.family_of(hf, where="")[1] == reward_model


@pytest.mark.parametrize("ours", [OURS_LLAMA, OURS_LLAMA3, OURS_GPT2])
def test_transformers_reads_what_we_write(ours):
  hf = write(ours, reward_model=True)
  config = transformers.AutoConfig.for_model(**hf)
  assert config.num_labels == 1
  assert (config.eos_token_id, config.pad_token_id) == ([2, 5], 0)
  again = config.to_dict()
  assert read(again | {"architectures": None}) == ours


@pytest.mark.parametrize(
  "change, message",
  [
    ({"model_type": "mamba"}, "model_type: 'mamba'; wanted: llama or qwen2"),
    ({"model_type": ["llama"]}, "model_type: .*; wanted: llama or qwen2"),
    (
      {"architectures": ["LlamaForTokenClassification"]},
      "LlamaForTokenClassification.*wanted: LlamaForCausalLM or Llama",
    ),
    ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map: .*never run"),
    ({"trust_remote_code": True}, "trust_remote_code: True; .*never run"),
    ({"hidden_act": "relu"}, "hidden_act: 'relu'; wanted: silu"),
    (
      {"rope_scaling": {"type": "spiral", "factor": 2.0}},
      "rope_type: 'spiral'; wanted: default or linear",
    ),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary"),
    ({"rope_parameters": {"beta_fast": 3.0}}, "rope_parameters: .'beta_fast'"),
    (
      {
        "rope_scaling": {
          "type": "longrope",
          "short_factor": [1.0],
          "long_factor": [1.0, 2.0, 3.0],
        }
      },
      "short_factor: .1.0.; wanted: 3 numbers",
    ),
    ({"quantization_config": {"bits": 4}}, "quantization_config: .*not quant"),
    (
      {"rope_scaling": "llama3"},
      "rope_parameters: 'llama3'; wanted: an object",
    ),
    (
      {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
      "low_freq_factor: 'absent'",
    ),
    (
      {"num_key_value_heads": 3},
      "num_attention_heads: 4; .* multiple of num_key_value_heads, which is 3",
    ),
    (
      {"num_attention_heads": 5},
      "hidden_size: 24; .* multiple of num_attention_heads, which is 5",
    ),
    ({"head_dim": 7}, "head_size=7 is odd"),
    ({"vocab_size": "11"}, "vocab_size: '11'; wanted: a int above 0"),
    ({"vocab_size": 0}, "vocab_size: 0; wanted"),
    ({"num_hidden_layers": True}, "num_hidden_layers: True; wanted"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps: nan; wanted"),
    ({"mlp_bias": 1}, "mlp_bias: 1; wanted"),
  ],
)
def test_llama_refusals(change, message):
  """Bad inputs 37 and 38: file, field, value and what is supported."""
  with pytest.raises(errors.UserError, match=rf"^config\.json: .*{message}"):
    read(LLAMA | change)


@pytest.mark.parametrize(
  "change",
  [
    {"activation_function": "silu"},
    {"scale_attn_by_inverse_layer_idx": True},
    {"reorder_and_upcast_attn": True},
    {"scale_attn_weights": False},
    {"add_cross_attention": True},
  ],
)
def test_gpt2_refusals(change):
  """Bad input 38."""
  [(field, value)] = change.items()
  message = re.escape(f"config.json: {field}: {value!r}; wanted: ")
  with pytest.raises(errors.UserError, match=message):
    read(GPT2 | change)


def test_absent_size_is_named():
  hf = {key: value for key, value in LLAMA.items() if key != "hidden_size"}
  with pytest.raises(errors.UserError, match="hidden_size: 'absent'"):
    read(hf)


@pytest.mark.parametrize(
  "change, message",
  [
    ({"positions": "learned"}, "positions: 'learned'; 'rope' is wanted"),
    ({"activation": "gelu"}, "activation: 'gelu'; 'swiglu' is wanted"),
    ({"parallel_residual": True}, "parallel_residual: True; False is wanted"),
  ],
)
def test_what_transformers_has_not_is_refused(change, message):
  with pytest.raises(errors.UserError, match=f"model as .*{message}"):
    write(dataclasses.replace(OURS_LLAMA, **change))


def test_gpt2_has_no_grouped_queries():
  config = dataclasses.replace(OURS_GPT2, kv_heads=2)
  with pytest.raises(errors.UserError, match="gpt2: kv_heads: 2; 4 is wanted"):
    write(config)


def test_gemma_means_tanh_by_gelu():
  """As it was published; `transformers` sets it right, too."""
  gemma = LLAMA | {"model_type": "gemma", "architectures": None}
  assert read(gemma | {"hidden_act": "gelu"}).activation == "geglu"
  theirs = transformers.GemmaConfig(hidden_act="gelu")
  assert theirs.hidden_act == "gelu_pytorch_tanh"


def test_the_family_that_it_came_from_is_exported():
  """A Mistral without a window is a Llama, too."""
  assert write(OURS_LLAMA)["model_type"] == "llama"
  mistral = dataclasses.replace(OURS_LLAMA, family="mistral")
  assert write(mistral)["model_type"] == "mistral"
  biased = dataclasses.replace(OURS_LLAMA, qkv_bias=True)
  assert write(biased)["model_type"] == "qwen2"
