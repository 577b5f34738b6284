"""From a workdir to a Hugging Face directory that `transformers` loads."""

import copy
import pathlib
from typing import Any

from rlhf_jax.models import convert, hf_files
from rlhf_jax.storage import pretrained as pretrained_lib
from rlhf_jax.text import tokenizer as tokenizer_lib


def run(workdir: str, output: str, dtype: hf_files.DType | None = None) -> str:
  """Exports the workdir's model and tokenizer; says what was written.

  A reward model's score head is divided by the deviation of its score, and the
  mean is left out: the format has no bias there, and a constant changes
  nothing that a reward is used for.

  Args:
    workdir: Of a finished stage.
    output: A directory without a model in it.
    dtype: Of the weights; None is that of the file that the model came from.

  Raises:
    UserError: The workdir has no model, `transformers` has no such
      architecture, or the output is there already.
  """
  found = pretrained_lib.load_workdir(pathlib.Path(workdir))
  params = found.params["transformer"]
  kind, reader = "policy", "AutoModelForCausalLM"
  if "score_head" in found.params:
    kind, reader = "reward model", "AutoModelForSequenceClassification"
    kernel = found.params["score_head"]["kernel"]
    kernel = kernel / found.params["normalisation"]["std"]
    params = {"transformer": params, "score_head": {"kernel": kernel}}
  tokenizer: Any = found.tokenizer  # Its ids may be typed as texts.
  if "score_head" in params:
    tokenizer = _padded_by_no_end(tokenizer, found.stop_ids)
  dtype = dtype or found.model.stored_dtype
  convert.save(
    output,
    params,
    found.model,
    stop_ids=found.stop_ids,
    pad_id=tokenizer.pad_token_id,
    bos_id=tokenizer.bos_token_id,
    dtype=dtype,
  )
  tokenizer_lib.save(tokenizer, output)
  return (
    f"{output}: the {kind} of {workdir} in {dtype}; "
    f"transformers.{reader}.from_pretrained({output!r}) loads it"
  )


def _padded_by_no_end(tokenizer: Any, stop_ids: tuple[int, ...]) -> Any:
  """The tokenizer with a pad that no scored text ends with.

  `transformers` reads the score at the last token that is not the pad: with
  pad = eos that is not where the text ends. Without another special token
  there is no pad, and it refuses batches of several texts.
  """
  if tokenizer.pad_token_id not in (*stop_ids, None):
    return tokenizer
  others = [id_ for id_ in tokenizer.all_special_ids if id_ not in stop_ids]
  tokenizer = copy.deepcopy(tokenizer)
  tokenizer.pad_token = (
    tokenizer.convert_ids_to_tokens(others[0]) if others else None
  )
  return tokenizer
