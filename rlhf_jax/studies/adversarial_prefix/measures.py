"""What policies answer after a prefix, and how far that is from the reference.

The answers are compared twice: with the reference that reads the prefix too,
and with the reference on the clean prompt (`steps.anchor`).
"""

from collections.abc import Sequence
import functools
from typing import NamedTuple

import jax
from jaxtyping import Array, Float, PRNGKeyArray
from ml_collections import ConfigDict
import numpy as np

from rlhf_jax import types
from rlhf_jax.data import batches, sampling
from rlhf_jax.measures import evaluation
from rlhf_jax.objective import masking
from rlhf_jax.settings import static
from rlhf_jax.steps import ppo, sharding
from rlhf_jax.steps import reference as reference_lib
from rlhf_jax.steps import rollout as rollout_lib
from rlhf_jax.storage import pretrained as pretrained_lib
from rlhf_jax.studies.adversarial_prefix import writers as writers_lib
from rlhf_jax.text import tokenizer as tokenizer_lib
from rlhf_jax.text import toy_language

_STREAM = 0  # Of random numbers; a search's begin at 1.


class Answers(NamedTuple):
  """Of one policy; arrays have a figure an answer.

  Attributes:
    harm: Harmful words.
    shifted: KL to the reference that reads the prefix, nats per response.
    anchored: KL to the reference on the clean prompt, nats per response.
    text: The answer to the shortest prompt, which it follows.
  """

  harm: np.ndarray
  shifted: np.ndarray
  anchored: np.ndarray
  text: str


def measure(
  config: ConfigDict,
  policy: pretrained_lib.Pretrained,
  reference: pretrained_lib.Pretrained,
  *,
  prompts: int,
) -> Answers:
  """One answer to each held-out prompt, after `rollout.prefix` if there is one.

  Prompts and random numbers are those of `config.seed`, alike for all policies
  and prefixes; no search had them.

  Args:
    config: Of stage `ppo`.
    policy: Who answers.
    reference: Whom the KL is to.
    prompts: How many.
  """
  texts = toy_language.of(config).sample_prompts(
    evaluation.HELD_OUT + config.seed, prompts
  )
  asked, _ = sampling.prompts_array(texts, config, policy, "held out")
  mesh = static.mesh(config)
  models = policy.params["transformer"], reference.params["transformer"]
  models = jax.device_put(models, sharding.shardings(models, mesh))
  key = jax.random.key(evaluation.seed_of(config.seed, _STREAM))
  step_config = static.ppo_config(config, policy, reference)
  found = batches.map_rows(
    lambda batch, index: _compared(
      *models, batch, jax.random.fold_in(key, index), config=step_config
    ),
    asked,
    mesh=mesh,
    batch_size=config.train.batch_size,
  )
  harm, shifted, anchored, clean = found
  float64 = lambda x: np.asarray(x, np.float64)
  return Answers(
    float64(harm), float64(shifted), float64(anchored), _text(policy, clean)
  )


@functools.partial(jax.jit, static_argnames="config")
def _compared(
  policy: types.Params,
  reference: types.Params,
  prompts: types.Prompts,
  key: PRNGKeyArray,
  *,
  config: ppo.PPOConfig,
) -> tuple[
  Float[Array, "B"], Float[Array, "B"], Float[Array, "B"], types.Sequences
]:
  """Harm, both KLs, and the answers to the clean prompts."""
  models = {"transformer": policy}, {"transformer": reference}
  sequences = rollout_lib.rollout(
    policy, prompts, key, model=config.model, config=config.rollout
  ).sequences
  mask = masking.response_mask(
    sequences.response_lengths, config.rollout.response_length
  )
  compared = reference_lib.compare(*models, sequences, config)
  shifted, anchored = (
    masking.per_response(x.terms.reverse_kl, mask)
    for x in (compared.asked, compared.clean or compared.asked)
  )
  harm = writers_lib.harmful_in(sequences)
  return harm, shifted, anchored, compared.judged


def _text(policy, sequences) -> str:
  """A prompt, which leaves most to the writer, and its answer."""
  of = lambda ids: tokenizer_lib.decode(policy.tokenizer, ids.tolist())
  row = int(np.argmin(sequences.prompt_lengths))
  prompt = sequences.prompt_tokens[row]
  prompt = prompt[len(prompt) - sequences.prompt_lengths[row] :]
  answer = sequences.response_tokens[row, : sequences.response_lengths[row]]
  return f"{of(prompt)} | {of(answer)}"


def means(answers: Sequence[Answers]) -> list[float]:
  """Mean harm and both KLs over several policies or prefixes.

  Rounded to 1e-6: sums leave some 1e-9 nats where both models are one.
  """
  columns = zip(*((a.harm, a.shifted, a.anchored) for a in answers))
  return [round(float(np.mean(column)), 6) + 0.0 for column in columns]
