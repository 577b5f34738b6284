"""The prompts of a PPO run: a file's, less those held out, or made ones."""

from ml_collections import ConfigDict
from rich import console as rich_console

from rlhf_jax import types
from rlhf_jax.data import sampling
from rlhf_jax.data import texts as texts_lib
from rlhf_jax.settings import static
from rlhf_jax.storage import pretrained as pretrained_lib
from rlhf_jax.text import chat, toy_language

MANY_CUT = 0.1  # Of the prompts; more speaks of a length that is set wrong.


def load(
  config: ConfigDict,
  policy: pretrained_lib.Pretrained,
  console: rich_console.Console,
) -> types.Prompts:
  """The prompts of `data.path`, less those held out, or of the language."""
  if path := config.data.path:
    texts, held, counts = texts_lib.split_prompts(
      path, config.data.heldout_fraction
    )
    if held:
      counts = f"{counts}, {len(held)} of them held out"
    console.print(f"ppo: {path}: {counts}", markup=False, highlight=False)
  else:
    pretrained_lib.check_speaks_the_built_in_language(policy, config)
    texts = toy_language.of(config).sample_prompts(
      config.seed + 4, config.data.size, config.data.opening
    )
  array, cut = sampling.prompts_array(texts, config, policy, path or "toy")
  if path:
    _say_what_is_read(config, policy, console, texts, array)
  if cut.rows:
    alarm = "alarm: " if cut.rows > MANY_CUT * len(texts) else ""
    console.print(
      f"ppo: {alarm}{cut.rows} of {len(texts)} prompts are longer than "
      f"rollout.prompt_length={config.rollout.prompt_length} and lost their "
      "first tokens",
      highlight=False,
    )
  return array


def _say_what_is_read(config, policy, console, texts, array) -> None:
  """The first prompt with its special tokens, and where a response ends."""
  say = lambda line: console.print(
    f"ppo: {line}", markup=False, highlight=False, soft_wrap=True
  )
  tokenizer = policy.tokenizer
  first = tokenizer.decode(array.tokens[0][-int(array.lengths[0]) :])
  say(f"the first prompt as the model reads it: {first!r}")
  stop_ids = static.rollout_config(config, policy).stop_ids
  tokens = tokenizer.convert_ids_to_tokens(list(stop_ids))
  ends = ", ".join(f"{token!r} ({i})" for token, i in zip(tokens, stop_ids))
  say(f"a response ends with {ends or 'nothing'}")
  spelled = [
    token
    for text in texts
    if isinstance(text, str) and (token := chat.special_in(tokenizer, text))
  ]
  if spelled:
    say(
      f"alarm: {len(spelled)} of {len(texts)} prompts spell special tokens, "
      f"such as {spelled[0]!r}, which are read as plain text; give "
      "conversations (lists of messages), which data.template writes"
    )
