"""A tiny model of every family, and of what a family's models differ in.

`CONFIGS` is a `transformers` config by name. All have 3 layers or more, sizes
that are told apart, and texts of up to 32 tokens.
"""

from typing import Any

import transformers

LENGTH = 24  # Tokens of the texts that tests give them.
_IDS: dict[str, Any] = {
  "vocab_size": 13,
  "pad_token_id": 0,
  "bos_token_id": 1,
  "eos_token_id": 2,
}
_SIZES: dict[str, Any] = _IDS | {
  "hidden_size": 16,
  "intermediate_size": 20,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "max_position_embeddings": 32,
}
_GROUPED = _SIZES | {"num_key_value_heads": 2}
_WIDE = _GROUPED | {"head_dim": 8}  # Heads are not width / heads.
_SIX = {"num_hidden_layers": 6}


def _rope(kind: str, **parameters: Any) -> dict[str, Any]:
  return {
    "rope_parameters": {"rope_type": kind, "rope_theta": 100.0} | parameters
  }


_ROPES = {
  "linear": _rope("linear", factor=4.0),
  "dynamic": _rope("dynamic", factor=4.0),
  "yarn": _rope("yarn", factor=4.0, original_max_position_embeddings=8),
  "yarn_mscale": _rope(
    "yarn",
    factor=4.0,
    original_max_position_embeddings=8,
    beta_fast=16.0,
    beta_slow=2.0,
    mscale=0.7,
    mscale_all_dim=0.3,
    truncate=False,
  ),
  "longrope": _rope(
    "longrope",
    factor=4.0,
    original_max_position_embeddings=28,
    short_factor=[1.0, 1.5, 2.0, 3.0],
    long_factor=[2.0, 3.0, 4.0, 8.0],
  ),
  "llama3": _rope(
    "llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
  ),
}
CONFIGS: dict[str, transformers.PreTrainedConfig] = {
  "llama": transformers.LlamaConfig(**_WIDE),
  "llama_biased": transformers.LlamaConfig(
    **_WIDE, attention_bias=True, mlp_bias=True
  ),
  "llama_tied": transformers.LlamaConfig(**_WIDE, tie_word_embeddings=True),
  **{
    f"llama_{name}": transformers.LlamaConfig(**(_WIDE | parameters))
    for name, parameters in _ROPES.items()
  },
  "smollm3": transformers.SmolLM3Config(
    **_GROUPED, no_rope_layer_interval=2, no_rope_layers=[1, 0, 1]
  ),
  "mistral": transformers.MistralConfig(**_WIDE, sliding_window=5),
  "mistral_whole": transformers.MistralConfig(**_WIDE, sliding_window=None),
  "qwen2": transformers.Qwen2Config(**_GROUPED, tie_word_embeddings=True),
  "qwen2_window": transformers.Qwen2Config(
    **_GROUPED, use_sliding_window=True, sliding_window=5, max_window_layers=1
  ),
  "qwen3": transformers.Qwen3Config(**_WIDE),
  "qwen3_biased": transformers.Qwen3Config(
    **_WIDE, attention_bias=True, tie_word_embeddings=True
  ),
  "gemma": transformers.GemmaConfig(**_WIDE),
  "gemma2": transformers.Gemma2Config(
    **_WIDE,
    query_pre_attn_scalar=12,
    sliding_window=5,
    attn_logit_softcapping=2.0,
    final_logit_softcapping=3.0,
    attn_implementation="eager",  # The others leave the cap out.
  ),
  "gemma3_text": transformers.Gemma3TextConfig(
    **(_WIDE | _SIX),
    query_pre_attn_scalar=12,
    sliding_window=5,
    layer_types=["sliding_attention"] * 2
    + ["full_attention"]
    + ["sliding_attention"] * 2
    + ["full_attention"],
    rope_parameters={
      "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
      "full_attention": {
        "rope_type": "linear",
        "factor": 8.0,
        "rope_theta": 1000.0,
      },
    },
  ),
  "phi3": transformers.Phi3Config(**_GROUPED, sliding_window=5),
  "phi3_partial": transformers.Phi3Config(
    **(_GROUPED | {"hidden_size": 32}),
    original_max_position_embeddings=28,
    rope_parameters={
      "rope_type": "longrope",
      "rope_theta": 100.0,
      "partial_rotary_factor": 0.5,
      "short_factor": [1.0, 1.5],
      "long_factor": [2.0, 4.0],
      "original_max_position_embeddings": 28,
    },
  ),
  "olmo2": transformers.Olmo2Config(**_GROUPED),
  "gpt_neox": transformers.GPTNeoXConfig(
    **(_SIZES | {"hidden_size": 32}),
    rope_parameters={
      "rope_type": "default",
      "rope_theta": 100.0,
      "partial_rotary_factor": 0.5,
    },
  ),
  "gpt_neox_in_turn": transformers.GPTNeoXConfig(
    **(_SIZES | {"hidden_size": 32}),
    use_parallel_residual=False,
    attention_bias=False,
    hidden_act="gelu_new",
  ),
  "gpt2": transformers.GPT2Config(
    **_IDS, n_embd=16, n_layer=3, n_head=4, n_positions=32
  ),
  "gpt2_untied": transformers.GPT2Config(
    **_IDS,
    n_embd=16,
    n_layer=3,
    n_head=4,
    n_positions=32,
    n_inner=20,
    activation_function="gelu",
    tie_word_embeddings=False,
  ),
  "opt": transformers.OPTConfig(
    **_IDS,
    hidden_size=16,
    ffn_dim=20,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=32,
    word_embed_proj_dim=16,
  ),
}
# One a family.
PLAIN = {config.model_type: name for name, config in reversed(CONFIGS.items())}
