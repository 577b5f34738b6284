"""Writes a workdir's policy or reward model as a Hugging Face directory.

python -m launch.export --workdir=runs/ppo --output=exported
"""

from absl import flags

from launch import app

_OUTPUT = flags.DEFINE_string("output", None, "Directory to be made.")


def main(values: flags.FlagValues) -> None:
  """Exports, and says what to do with it."""
  from rlhf_jax.storage import export

  print(export.run(values.workdir, values.output))


if __name__ == "__main__":
  app.run(main, required=("workdir", "output"))
