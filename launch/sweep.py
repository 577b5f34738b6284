r"""PPO under many penalties and seeds in one compiled program.

    python -m launch.sweep --config=configs/ppo.py --betas=0,0.02,0.1,0.5 \
      --seeds=0,1 --workdir=runs/sweep

Each member leaves what a single run leaves, in a sub-workdir; the sweep leaves
`frontier.json` and `frontier.png`: what each penalty bought. The flags set
`config.sweep.betas` and `config.sweep.seeds`. `--resume` goes on with a sweep.
"""

from absl import flags

from configs import defaults
from launch import app, train
from rlhf_jax import errors

_BETAS = flags.DEFINE_string("betas", "", "Penalties, such as 0,0.05,0.2.")
_SEEDS = flags.DEFINE_string(
  "seeds", "", "Seeds, such as 0,1,2; each with every β."
)


def main(values: flags.FlagValues) -> None:
  """Sets the members, then trains as `launch.train` does."""
  config = values.config
  for flag in ("betas", "seeds"):
    if text := values[flag].value:
      try:
        defaults.apply_overrides(config, [f"sweep.{flag}={text}"])
      except ValueError:
        raise errors.UserError(
          f"--{flag}: {text!r}; wanted numbers with commas between them, such"
          " as 0,1"
        ) from None
  if not config.sweep.betas:
    raise errors.UserError(
      "--betas: missing; wanted the penalties of the members, such as"
      " --betas=0,0.05,0.2"
    )
  train.main(values)


if __name__ == "__main__":
  app.run(main)
