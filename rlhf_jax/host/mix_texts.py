"""The texts of `config.mix`, which PPO sees beside its own responses."""

from ml_collections import ConfigDict
from rich import console as rich_console

from rlhf_jax import errors, types
from rlhf_jax.host import batches, data, readers, settings, toy_language
from rlhf_jax.host import pretrained as pretrained_lib
from rlhf_jax.host import tokenizer as tokenizer_lib


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
  if path := config.mix.path:
    texts, counts = readers.read_texts(path)
    console.print(f"ppo: {path}: {counts}", markup=False, highlight=False)
    stop = list(settings.rollout_config(config, policy).stop_ids[:1])
    pairs = (tokenizer_lib.encode_pair(policy.tokenizer, *t) for t in texts)
    texts = [(prompt, response + stop) for prompt, response in pairs]
  else:
    pretrained_lib.check_speaks_the_built_in_language(policy, config)
    texts = toy_language.of(config).sample_texts(
      config.seed, config.data.size, config.mix.opening
    )
  seen, _ = batches.split_heldout(
    texts, config.data.heldout_fraction, config.seed
  )
  rows, cut = data.pack(
    seen,
    sequence_length=config.data.sequence_length,
    pad_id=policy.pad_id,
    vocab_size=policy.model.vocab_size,
    where=path or "the built-in language",
  )
  if cut.rows:
    console.print(
      f"ppo: {cut.rows} texts of the mix are longer than data.sequence_length="
      f"{config.data.sequence_length} and lost {cut.tokens} tokens",
      highlight=False,
    )
  if len(rows.tokens) < config.mix.batch_size:
    raise errors.UserError(
      f"config.mix.batch_size: {config.mix.batch_size}, and"
      f" {path or 'the built-in language'} fills {len(rows.tokens)} rows of"
      f" data.sequence_length={config.data.sequence_length} tokens; lower it or"
      " bring more texts"
    )
  return rows
