"""The network of tests that run whole stages: it costs little.

Overrides of a config, which a test puts before its own.
"""

SIZES = (
  "model.width=16",
  "model.layers=1",
  "model.heads=2",
  "model.kv_heads=2",
  "model.head_size=8",
  "model.mlp_width=16",
)
