"""Writes a workdir's policy or reward model as a Hugging Face directory.

python -m launch.export --workdir=runs/ppo --output=exported
"""

from absl import flags

from launch import app

_OUTPUT = flags.DEFINE_string("output", None, "Directory to be made.")
_DTYPE = flags.DEFINE_enum(
  "dtype",
  "",
  ["", "float32", "bfloat16", "float16"],
  "Of the weights; '' is that of the file that the model came from.",
)


def main(values: flags.FlagValues) -> None:
  """Exports, and says what to do with it."""
  from rlhf_jax.storage import export

  print(export.run(values.workdir, values.output, values.dtype or None))


if __name__ == "__main__":
  app.run(main, required=("workdir", "output"))
