"""Texts to train on, of a file or of the built-in language, packed in rows."""

from ml_collections import ConfigDict
from rich import console as rich_console

from rlhf_jax import types
from rlhf_jax.host import batches, data, readers, settings, toy_language
from rlhf_jax.host import pretrained as pretrained_lib
from rlhf_jax.host import tokenizer as tokenizer_lib


def packed(
  config: ConfigDict,
  policy: pretrained_lib.Pretrained,
  console: rich_console.Console,
  *,
  stage: str,
  path: str,
  opening: str,
) -> tuple[types.PackedTexts, types.PackedTexts]:
  """Rows to train on, and those that `data.heldout_fraction` holds out.

  The same seed, size and share hold out the same texts in every stage.

  Args:
    config: The stage's; its `data` says how many texts and how long a row.
    policy: Who reads them.
    console: Where the counts go.
    stage: The name of who asks, for the console.
    path: A file, or '' for the built-in language.
    opening: How the built-in language's texts begin; see `data.opening`.

  Raises:
    UserError: The file cannot be used, or the policy has another language.
  """
  say = lambda text: console.print(
    f"{stage}: {text}", markup=False, highlight=False
  )
  if path:
    found, counts = readers.read_texts(path)
    say(f"{path}: {counts}")
    # A response ends with the first stop id, or the policy never learns to.
    stop = list(settings.rollout_config(config, policy).stop_ids[:1])
    pairs = (tokenizer_lib.encode_pair(policy.tokenizer, *t) for t in found)
    found = [(prompt, response + stop) for prompt, response in pairs]
  else:
    pretrained_lib.check_speaks_the_built_in_language(policy, config)
    found = toy_language.of(config).sample_texts(
      config.seed, config.data.size, opening
    )
  seen, heldout = batches.split_heldout(
    found, config.data.heldout_fraction, config.seed
  )
  pack = lambda side: _pack(side, config, policy, path, say)
  return pack(seen), pack(heldout)


def _pack(side, config, policy, path, say) -> types.PackedTexts:
  rows, cut = data.pack(
    side,
    sequence_length=config.data.sequence_length,
    pad_id=policy.pad_id,
    vocab_size=policy.model.vocab_size,
    where=path or "the built-in language",
  )
  if cut.rows:
    say(
      f"{cut.rows} texts are longer than data.sequence_length="
      f"{config.data.sequence_length} and lost {cut.tokens} tokens"
    )
  return rows
