"""The texts of `config.mix`, which PPO sees beside its own responses."""

from ml_collections import ConfigDict
from rich import console as rich_console

from rlhf_jax import errors, types
from rlhf_jax.data import texts
from rlhf_jax.storage import pretrained as pretrained_lib


def load(
  config: ConfigDict,
  policy: pretrained_lib.Pretrained,
  console: rich_console.Console,
) -> types.PackedTexts:
  """Packed rows of `mix.path`, or of the built-in language.

  They are those that SFT trains on with the same seed, size and held-out
  share: what it holds out stays held out.

  Raises:
    UserError: The file cannot be used, or has too few rows for a batch.
  """
  path = config.mix.path
  seen, _ = texts.read(
    config,
    policy,
    console,
    stage="ppo",
    path=path,
    opening=config.mix.opening,
  )
  rows = texts.pack(config, policy, console, seen, stage="ppo", path=path)
  if len(rows.tokens) < config.mix.batch_size:
    raise errors.UserError(
      f"config.mix.batch_size: {config.mix.batch_size}, and"
      f" {path or 'the built-in language'} fills {len(rows.tokens)} rows of"
      f" data.sequence_length={config.data.sequence_length} tokens; lower it or"
      " bring more texts"
    )
  return rows
