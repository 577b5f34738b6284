"""The built-in languages: texts by a grammar of word pairs.

A text is a Markov chain over words: each word belongs to one class, a class
names the classes that may follow it, and a word is drawn within its class by
weight (`toy_words` has the tables). The chain is conditioned on the number of
words. A text's first words, each number as likely, are the prompt and the rest
is the response. So whether a pair of words is grammatical, how likely a text
is, and what it is worth are all known in closed form.

`reviews` of films are the default; `notes` on meals are short and have half
the words, `essays` on towns are long and have almost four times the words.
What they draw (| ends the prompt):

    <start> it was | modern while the music looked rather boring . <end>
    <start> they thought it felt | lovely . they enjoyed its ending . <end>

    <start> the | fish was so soft <end>
    <start> i disliked | its colour <end>

    <start> the museum was too changed but the | beach was remote but the castle
    was eastern . children resented its dance . everyone welcomed another view
    . <end>

Figures, over the languages' own texts: gold's 5th and 95th percentiles are
±`tail`; the best grammatical text after a prompt of one word reaches `best`,
and "lovely" to the end of the longest text, after "it was", `gamed`. Tokens
and entropy are means over responses: the floor of any model's held-out loss.

              reviews    notes    essays
    ids            96       48       352
    words        8-26      3-9     24-48   between <start> and <end>
    prompt        1-5      1-2       1-7   words
    gold sd      0.95     1.04      0.98   about a mean of 0.00
    tail         1.61     2.28      1.55
    best         2.95     2.89      2.99
    gamed       -15.4     -3.0     -15.0
    tokens      13.65     4.62     32.52   per response
    entropy     25.41     5.67     93.29   nats per response
                 1.86     1.23      2.87   nats per token

Left out: meaning across sentences. A writer has no mood, so that a pair of
words is all the grammar there is.
"""

from collections.abc import Mapping
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
from ml_collections import ConfigDict
import numpy as np
import tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf_jax import types
from rlhf_jax.objective import masking
from rlhf_jax.text import toy_words

PAD_ID, START_ID, STOP_ID = 0, 1, 2
GOLD_CEILING = 3.0  # reward units


@dataclasses.dataclass(frozen=True, eq=False)
class Language:
  """A grammar, and what its texts are worth.

  Attributes:
    name: As `config.data.language` has it.
    words: Class → its words, with their weights.
    followers: Class → the probabilities of the next word's class.
    sentiments: Of the words that have one.
    shortest: Words between <start> and <end>, at least.
    longest: The same, at most.
    longest_prompt: Tokens, <start> included.
    gold_scale: Summed sentiment at which tanh bends.
    gold_price: Reward units per ungrammatical pair.
  """

  name: str
  words: toy_words.Words
  followers: toy_words.Followers
  sentiments: Mapping[str, float]
  shortest: int
  longest: int
  longest_prompt: int
  gold_scale: float
  gold_price: float

  @functools.cached_property
  def vocabulary(self) -> tuple[str, ...]:
    """The words by id: <pad>, <start>, <end>, then class by class."""
    special = toy_words.PAD, toy_words.START, toy_words.STOP
    classes = (words for c, words in self.words.items() if c != "stop")
    return (*special, *(word for words in classes for word in words))

  @functools.cached_property
  def chain(self) -> np.ndarray:
    """`[V, V]`: probability of each next word, whatever the text's length."""
    members = {"start": {toy_words.START: 1}, **self.words}
    ids = {word: i for i, word in enumerate(self.vocabulary)}
    chain = np.zeros((len(ids), len(ids)))
    for name, followers in self.followers.items():
      rows = [ids[word] for word in members[name]]
      for follower, probability in followers.items():
        total = sum(self.words[follower].values())
        for word, weight in self.words[follower].items():
          chain[rows, ids[word]] = probability * weight / total
    return chain

  @functools.cached_property
  def _grammatical(self) -> np.ndarray:
    """`[V, V]`: whether a word may follow another; small enough to compile."""
    return self.chain > 0

  @functools.cached_property
  def _sentiment_of(self) -> np.ndarray:
    """`[V]`: of each word."""
    known = self.sentiments
    return np.array([known.get(w, 0.0) for w in self.vocabulary], np.float32)

  @functools.cached_property
  def _conditioned_chain(self) -> np.ndarray:
    """`[T, V, V]`: p(word t | word t − 1, the text's length is allowed).

    Word 0 is <start>. With h_t(w) the probability that a text whose word t is
    w comes to an allowed end, this is chain(v, w) · h_t(w) / h_{t−1}(v).
    """
    size = self.longest + 2
    ends = np.zeros((size, len(self.vocabulary)))
    ends[self.shortest + 1 :, STOP_ID] = 1.0
    steps = np.zeros((size, *self.chain.shape))
    for t in range(size - 1, 0, -1):
      joint = self.chain * ends[t]
      ends[t - 1] += joint.sum(axis=1)
      total = joint.sum(axis=1, keepdims=True)
      steps[t] = np.divide(joint, total, out=steps[t], where=total > 0)
    return steps

  def sample_texts(
    self, seed: int, count: int, opening: str = ""
  ) -> list[tuple[list[int], list[int]]]:
    """Draws `count` texts, each cut into a prompt and its response.

    Prompts are <start> and the first words; responses end with <end>. The same
    seed gives the same texts.

    Args:
      seed: Of the draw.
      count: How many.
      opening: The class of the first word; '' for any. The texts are those
        of the language that begin so, by their likelihoods.

    Raises:
      ValueError: No text begins with the class.
    """
    rng = np.random.default_rng(seed)
    tokens = np.full((count, self.longest + 2), STOP_ID)
    tokens[:, 0] = START_ID
    for t in range(1, self.longest + 2):
      steps = self._conditioned_chain[t]
      if t == 1:
        steps = steps * self._opens(opening)
      below = steps.cumsum(axis=1)[tokens[:, t - 1]]
      # Scaled by the row's own sum, which rounding leaves beside 1; after the
      # stop a row is all zeros and stays at the stop.
      threshold = rng.random((count, 1)) * below[:, -1:]
      drawn = (below <= threshold).sum(axis=1)
      tokens[:, t] = np.where(tokens[:, t - 1] == STOP_ID, STOP_ID, drawn)
    lengths = (tokens == STOP_ID).argmax(axis=1) + 1
    cuts = rng.integers(2, self.longest_prompt + 1, count)
    return [
      (row[:cut].tolist(), row[cut:length].tolist())
      for row, cut, length in zip(tokens, cuts, lengths)
    ]

  def _opens(self, opening: str) -> np.ndarray:
    """`[V]`: whether a text may begin with a word."""
    if not opening:
      return np.ones(len(self.vocabulary), bool)
    if opening not in (openings := self.followers["start"]):
      raise ValueError(f"{opening!r}; wanted one of {', '.join(openings)}")
    return np.isin(self.vocabulary, list(self.words[opening]))

  def sample_prompts(
    self, seed: int, count: int, opening: str = ""
  ) -> list[list[int]]:
    """The prompts of `sample_texts(seed, count, opening)`."""
    texts = self.sample_texts(seed, count, opening)
    return [prompt for prompt, _ in texts]

  def negative_log_likelihood(
    self, prompt: list[int], response: list[int]
  ) -> float:
    """Exact −log p(response | prompt) of the language, nats per response.

    Its mean over `sample_texts` is the entropy that no model's held-out loss
    can pass. A response without <end> counts as the beginning of one.

    Returns:
      The sum over the response's tokens; infinite where a pair of words is
      ungrammatical or the text is shorter or longer than the language allows.
    """
    text = prompt + response
    if len(text) > self.longest + 2:
      return float("inf")
    columns = range(len(prompt), len(text))
    steps = self._conditioned_chain
    likelihoods = [steps[t, text[t - 1], text[t]] for t in columns]
    with np.errstate(divide="ignore"):
      return float(-np.log(likelihoods).sum())

  def sentiment(self, sequences: types.Sequences) -> Float[Array, "B"]:
    """Sum of the sentiments of a response's words, without the prompt's."""
    words = jnp.asarray(self._sentiment_of)[sequences.response_tokens]
    return jnp.where(_response_mask(sequences), words, 0.0).sum(axis=1)

  def ungrammatical_pairs(self, sequences: types.Sequences) -> Int[Array, "B"]:
    """Number of a response's words that may not follow the word before them.

    The first response word is paired with the last of the prompt, if there is
    one. Nothing may follow <end>; a response that was cut off has no pair at
    its cut.
    """
    response = sequences.response_tokens
    first = sequences.prompt_tokens[:, -1:]
    previous = jnp.concatenate([first, response[:, :-1]], axis=1)
    has_prompt = sequences.prompt_lengths[:, None] > 0
    is_pair = _response_mask(sequences) & (
      has_prompt | (jnp.arange(response.shape[1]) > 0)
    )
    faulty = ~jnp.asarray(self._grammatical)[previous, response]
    return (is_pair & faulty).sum(axis=1)

  def gold_reward(self, sequences: types.Sequences) -> Float[Array, "B"]:
    """What a response is truly worth, reward units; 0 for an empty one.

        3 · tanh(sentiment / gold_scale) − gold_price · ungrammatical pairs

    Good words pay less and less, up to 3; faulty pairs cost the same each.
    """
    bent = jnp.tanh(self.sentiment(sequences) / self.gold_scale)
    faults = self.ungrammatical_pairs(sequences)
    return GOLD_CEILING * bent - self.gold_price * faults

  def tokenizer(self) -> PreTrainedTokenizerFast:
    """The language's tokenizer: a token per word, <start> before a text.

    A word outside the vocabulary is an error of `tokenizers`, not a token; so
    are <start> and <end> written out, which a text must not smuggle in.
    """
    ids = {word: i for i, word in enumerate(self.vocabulary)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids))
    pre_tokenizers = tokenizers.pre_tokenizers
    backend.pre_tokenizer = pre_tokenizers.Sequence(
      [
        pre_tokenizers.WhitespaceSplit(),
        pre_tokenizers.Split("<", behavior="isolated"),
      ]
    )
    backend.post_processor = tokenizers.processors.TemplateProcessing(
      single=f"{toy_words.START} $A",
      special_tokens=[(toy_words.START, START_ID)],
    )
    return PreTrainedTokenizerFast(
      tokenizer_object=backend,
      pad_token=toy_words.PAD,
      bos_token=toy_words.START,
      eos_token=toy_words.STOP,
      padding_side="left",
      split_special_tokens=True,
      clean_up_tokenization_spaces=False,
    )


def _response_mask(sequences: types.Sequences) -> Bool[Array, "B R"]:
  size = sequences.response_tokens.shape[1]
  return masking.response_mask(sequences.response_lengths, size)


_REVIEWS = Language(
  name="reviews",
  words=toy_words.REVIEWS,
  followers=toy_words.REVIEWS_FOLLOWERS,
  sentiments=toy_words.REVIEWS_SENTIMENT,
  shortest=8,
  longest=26,
  longest_prompt=6,
  gold_scale=5.0,
  gold_price=0.8,
)
_NOTES = Language(
  name="notes",
  words=toy_words.NOTES,
  followers=toy_words.NOTES_FOLLOWERS,
  sentiments=toy_words.NOTES_SENTIMENT,
  shortest=3,
  longest=9,
  longest_prompt=3,
  gold_scale=2.0,
  gold_price=1.0,
)
_ESSAYS = Language(
  name="essays",
  words=toy_words.ESSAYS,
  followers=toy_words.ESSAYS_FOLLOWERS,
  sentiments=toy_words.ESSAYS_SENTIMENT,
  shortest=24,
  longest=48,
  longest_prompt=8,
  gold_scale=7.0,
  gold_price=0.4,
)
LANGUAGES: Mapping[str, Language] = {
  language.name: language for language in (_REVIEWS, _NOTES, _ESSAYS)
}


def of(config: ConfigDict) -> Language:
  """The language that `config.data.language` names."""
  return LANGUAGES[config.data.language]


def label_preferences(
  key: PRNGKeyArray,
  gold_first: Float[Array, "B"],
  gold_second: Float[Array, "B"],
  *,
  temperature: float = 1.0,
) -> Bool[Array, "B"]:
  """Draws whether the first of two responses is preferred.

  P(first preferred) = σ((gold_first − gold_second) / temperature), Bradley &
  Terry 1952: a judge who errs more the closer the two are, and the higher the
  temperature, in reward units, is.
  """
  margin = (gold_first - gold_second) / temperature
  return jax.random.bernoulli(key, jax.nn.sigmoid(margin))


# The default language, by name.
VOCABULARY = _REVIEWS.vocabulary
sample_texts = _REVIEWS.sample_texts
sample_prompts = _REVIEWS.sample_prompts
negative_log_likelihood = _REVIEWS.negative_log_likelihood
gold_reward = _REVIEWS.gold_reward
tokenizer = _REVIEWS.tokenizer
