"""Models by path: a Hugging Face directory, or the workdir of a stage.

A finished stage leaves its model in `WORKDIR/model` (our own tree, with
sums) and its tokenizer in `WORKDIR/tokenizer`.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerBase

from rlhf_jax import errors, types
from rlhf_jax.models import convert, rope, transformer
from rlhf_jax.storage import checkpoint
from rlhf_jax.storage import workdir as workdir_lib
from rlhf_jax.text import tokenizer as tokenizer_lib
from rlhf_jax.text import toy_language


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """A network with its tokenizer.

  Attributes:
    params: `transformer`; a reward model's also `score_head` and
      `normalisation`.
    model: The architecture.
    tokenizer: Of its texts.
    stop_ids: Ids that end a text, by its own account.
    where: Its path, for messages.
  """

  params: types.Params
  model: transformer.TransformerConfig
  tokenizer: PreTrainedTokenizerBase
  stop_ids: tuple[int, ...]
  where: str

  @property
  def bos_id(self) -> int | None:
    """What a text begins with, where the tokenizer has such an id."""
    bos_id: Any = self.tokenizer.bos_token_id
    return bos_id

  @property
  def pad_id(self) -> int:
    """The tokenizer's pad, or 0: masks come from lengths and not from it."""
    pad_id: Any = self.tokenizer.pad_token_id
    return pad_id or 0


def load_policy(config: ConfigDict) -> Pretrained:
  """The model at `config.policy.path`; a random one where that is empty.

  A random model is made for the tokenizer at `config.policy.tokenizer`, or for
  the built-in language that `config.data.language` names, by `config.seed`.
  """
  if path := config.policy.path:
    found = load(path, config)
    if "score_head" in found.params:
      raise errors.UserError(
        f"config.policy.path: {found.where} is a reward model; wanted a "
        "language model"
      )
    return found
  if path := config.policy.tokenizer:
    tokenizer = tokenizer_lib.load(path)
    tokenizer_lib.set_template(tokenizer, config.data.template)
    stop_ids = tokenizer_lib.stop_ids(path, tokenizer)
  else:
    tokenizer = toy_language.of(config).tokenizer()
    stop_ids = (toy_language.STOP_ID,)
  model = architecture(config, vocab_size=len(tokenizer))
  tokenizer_lib.check(tokenizer, model.vocab_size, "config.model.vocab_size")
  model = _of_tokens(model, tokenizer)
  params = transformer.init(jax.random.key(config.seed), model)
  params = {"transformer": params}
  return Pretrained(params, model, tokenizer, stop_ids, "a random start")


def load(path: str, config: ConfigDict) -> Pretrained:
  """The model at `path`, run as `config.model` says (dtype, unroll, remat)."""
  directory = pathlib.Path(path)
  # Both kinds of directory have a config.json.
  if workdir_lib.is_workdir(directory) and (
    "stage" in workdir_lib.read_config(directory)
  ):
    found = load_workdir(directory)
    tokenizer_lib.set_template(found.tokenizer, config.data.template)
  else:
    found = _load_hugging_face(directory, config.data.template)
  tokenizer_lib.check(found.tokenizer, found.model.vocab_size, found.where)
  unroll = config.model.unroll or found.model.layers
  if found.model.layers % unroll:
    raise errors.UserError(
      f"config.model.unroll: {unroll}; wanted a divisor of the "
      f"{found.model.layers} layers of {found.where}, or 0 for all"
    )
  model = dataclasses.replace(
    _of_tokens(found.model, found.tokenizer),
    compute_dtype=config.model.compute_dtype,
    remat=config.model.remat,
    unroll=unroll,
  )
  return dataclasses.replace(found, model=model)


def _of_tokens(model, tokenizer) -> transformer.TransformerConfig:
  """Rows of the embedding that the tokenizer has no text for are no tokens."""
  tokens = max(tokenizer.get_vocab().values()) + 1
  return dataclasses.replace(
    model, tokens=tokens if tokens < model.vocab_size else None
  )


def load_workdir(directory: pathlib.Path) -> Pretrained:
  """The model that a finished stage left.

  Raises:
    UserError: The stage has not finished.
  """
  if not (directory / "model").is_dir():
    raise errors.UserError(
      f"{directory}: there is no model in it yet: the run has not finished "
      "(--resume continues it), or its models are in sub-workdirs"
    )
  params, metadata = checkpoint.load_params(directory / "model")
  return Pretrained(
    params,
    _architecture(metadata["model"]),
    tokenizer_lib.load(directory / "tokenizer"),
    tuple(metadata["stop_ids"]),
    str(directory),
  )


def _load_hugging_face(directory: pathlib.Path, template: str) -> Pretrained:
  params, model = convert.load(
    directory, unroll=0, remat=False, compute_dtype="float32"
  )
  tokenizer = tokenizer_lib.load(directory)
  tokenizer_lib.set_template(tokenizer, template)
  if "score_head" in params:  # One whose scores are what they are.
    params["normalisation"] = {"mean": jnp.zeros(()), "std": jnp.ones(())}
  else:
    params = {"transformer": params}
  stop_ids = tokenizer_lib.stop_ids(directory, tokenizer)
  return Pretrained(params, model, tokenizer, stop_ids, str(directory))


def save(workdir: workdir_lib.Workdir, pretrained: Pretrained) -> None:
  """Leaves a model in a workdir, for `load`."""
  metadata: dict[str, Any] = {
    "model": dataclasses.asdict(pretrained.model),
    "stop_ids": list(pretrained.stop_ids),
  }
  checkpoint.save_params(workdir.path / "model", pretrained.params, metadata)
  tokenizer_lib.save(pretrained.tokenizer, workdir.path / "tokenizer")


def check_speaks_the_built_in_language(
  policy: Pretrained, config: ConfigDict
) -> None:
  """Requires that the policy's ids are those of `config.data.language`.

  Raises:
    UserError: They are not; other ids would be read as its words.
  """
  name = config.data.language
  ids = list(range(len(policy.tokenizer)))
  words = tuple(policy.tokenizer.convert_ids_to_tokens(ids))
  spoken = [
    language.name
    for language in toy_language.LANGUAGES.values()
    if language.vocabulary == words
  ]
  if not spoken:
    raise errors.UserError(
      "config.data.path: '' is the built-in language, which is not that of "
      f"{policy.where}; give a file of your own, .jsonl or .txt"
    )
  if name not in spoken:
    raise errors.UserError(
      f"config.data.language: {name!r}; wanted {spoken[0]!r}, the language of "
      f"{policy.where}"
    )


def check_same_tokenizer(first: Pretrained, second: Pretrained) -> None:
  """Requires that ids mean the same to both models.

  Raises:
    UserError: Their vocabularies differ.
  """
  fingerprints = map(
    tokenizer_lib.fingerprint, (first.tokenizer, second.tokenizer)
  )
  if len(set(fingerprints)) > 1:
    raise errors.UserError(
      f"{first.where} and {second.where} have different tokenizers "
      f"({len(first.tokenizer)} and {len(second.tokenizer)} tokens); the "
      "policy, the reference and the reward model must share one"
    )


def architecture(
  config: ConfigDict, *, vocab_size: int
) -> transformer.TransformerConfig:
  """`config.model` as an architecture; `vocab_size` stands in for a 0 there."""
  fields = config.model.to_dict()
  fields["vocab_size"] = fields["vocab_size"] or vocab_size
  fields["unroll"] = fields["unroll"] or fields["layers"]
  return _architecture(fields)


def _architecture(fields: dict[str, Any]) -> transformer.TransformerConfig:
  """From a config, or from what a workdir's JSON kept: lists were tuples."""

  def as_kept(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value

  fields = {name: as_kept(value) for name, value in fields.items()}
  if "attention_bias" in fields:  # Of a workdir before format 2.
    fields["qkv_bias"] = fields["out_bias"] = fields.pop("attention_bias")
  if (scaling := fields.pop("rope_scaling", None)) is not None:
    scaling = {name: as_kept(value) for name, value in scaling.items()}
    scaling.setdefault("kind", "llama3")  # Before format 2, the only one.
    scaling = rope.RopeScaling(**scaling)
  return transformer.TransformerConfig(**fields, rope_scaling=scaling)
