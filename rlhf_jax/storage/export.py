"""From a workdir to a Hugging Face directory that `transformers` loads."""

import pathlib
from typing import Any

from rlhf_jax.models import convert
from rlhf_jax.storage import pretrained as pretrained_lib


def run(workdir: str, output: str) -> str:
  """Exports the workdir's model and tokenizer; says what was written.

  A reward model's score head is divided by the deviation of its score, and the
  mean is left out: the format has no bias there, and a constant changes
  nothing that a reward is used for.

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
  convert.save(
    output,
    params,
    found.model,
    stop_ids=found.stop_ids,
    pad_id=tokenizer.pad_token_id,
    bos_id=tokenizer.bos_token_id,
  )
  tokenizer.save_pretrained(output)
  return (
    f"{output}: the {kind} of {workdir}; "
    f"transformers.{reader}.from_pretrained({output!r}) loads it"
  )
