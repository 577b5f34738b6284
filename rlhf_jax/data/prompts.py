"""The prompts of a PPO run: a file's, less those held out, or made ones."""

from ml_collections import ConfigDict
from rich import console as rich_console

from rlhf_jax import types
from rlhf_jax.data import sampling
from rlhf_jax.data import texts as texts_lib
from rlhf_jax.storage import pretrained as pretrained_lib
from rlhf_jax.text import toy_language

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
  if cut.rows:
    alarm = "alarm: " if cut.rows > MANY_CUT * len(texts) else ""
    console.print(
      f"ppo: {alarm}{cut.rows} of {len(texts)} prompts are longer than "
      f"rollout.prompt_length={config.rollout.prompt_length} and lost their "
      "first tokens",
      highlight=False,
    )
  return array
