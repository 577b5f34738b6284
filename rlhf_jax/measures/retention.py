"""What a policy still knows: its loss on texts that it was not trained on."""

from collections.abc import Sequence
import pathlib

import jax
from ml_collections import ConfigDict
from rich import console as rich_console

from rlhf_jax.data import arrays, batches, readers
from rlhf_jax.measures import evaluation
from rlhf_jax.settings import static
from rlhf_jax.steps import sft, sharding
from rlhf_jax.storage import pretrained as pretrained_lib
from rlhf_jax.text import tokenizer as tokenizer_lib
from rlhf_jax.text import toy_language

BUILT_IN = "built-in language"

_row_logprobs = jax.jit(sft.row_logprobs, static_argnums=2)


def losses(
  config: ConfigDict,
  policy: pretrained_lib.Pretrained,
  reference: pretrained_lib.Pretrained,
  console: rich_console.Console,
) -> dict[str, float]:
  """`retention/<corpus>/nll` and `…/reference_nll` with errors, nats per token.

  The corpora are the files of `evaluate.corpora`, each under its name without
  ending, and where the policy is one of the built-in language, its own texts.
  Responses are scored given their prompts, whole texts from their second token
  on. Errors are over packed rows.

  Raises:
    UserError: A file or one of its rows cannot be used.
  """
  metrics = {}
  for name, texts in _corpora(config, policy, console).items():
    rows, cut = arrays.pack(
      texts,
      sequence_length=config.data.sequence_length,
      pad_id=policy.pad_id,
      vocab_size=policy.model.vocab_size,
      where=name,
    )
    if cut.rows:
      console.print(
        f"evaluate: {name}: {cut.rows} texts are longer than"
        f" data.sequence_length={config.data.sequence_length} and lost"
        f" {cut.tokens} tokens",
        markup=False,
        highlight=False,
        soft_wrap=True,
      )
    for figure, model in (("nll", policy), ("reference_nll", reference)):
      sums, counts = _map(config, model, rows)
      metrics |= evaluation.ratio_with_error(
        f"retention/{name}/{figure}", -sums, counts
      )
  return metrics


def _corpora(config, policy, console) -> dict[str, Sequence]:
  """Name → (prompt, response) ids."""
  corpora = {}
  if not config.data.path:
    seed = evaluation.HELD_OUT + config.seed
    corpora[BUILT_IN] = toy_language.of(config).sample_texts(
      seed, config.evaluate.prompts, config.data.opening
    )
  for path in config.evaluate.corpora:
    texts, counts = readers.read_texts(path)
    line = f"evaluate: {path}: {counts}"
    console.print(line, markup=False, highlight=False, soft_wrap=True)
    corpora[pathlib.Path(path).stem] = [
      tokenizer_lib.encode_pair(policy.tokenizer, *text) for text in texts
    ]
  return corpora


def _map(config, model, rows):
  """Each row's sum of logprobs and its number of predicted tokens."""
  mesh = static.mesh(config)
  params = jax.device_put(model.params, sharding.shardings(model.params, mesh))
  step_config = sft.SFTConfig(model.model, static.logits_per_chunk(config))
  return batches.map_rows(
    lambda batch, _: _row_logprobs(params, batch, step_config),
    rows,
    mesh=mesh,
    batch_size=config.train.batch_size,
  )
