"""The built-in language: film reviews by a grammar of word pairs.

A review is a Markov chain over words: each word belongs to one class, a class
names the classes that may follow it (`_FOLLOWERS`), and a word is drawn within
its class by weight (`_WORDS`). The chain is conditioned on a review of
`SHORTEST_REVIEW` to `LONGEST_REVIEW` words; its first 1 to 5 words, each
number as likely, are the prompt and the rest is the response. So whether a
pair of words is grammatical, how likely a text is, and what it is worth are
all known in closed form.

What one draws (| ends the prompt):

    <start> it was | modern while the music looked rather boring . <end>
    <start> they thought it felt | lovely . they enjoyed its ending . <end>
    <start> i liked its ending | and it was quite silly . <end>

Figures, over the language's own texts: gold mean 0.00, sd 0.95, its 5th and
95th percentiles −1.6 and 1.6; the best grammatical review reaches 2.95, and
"lovely" 21 times after "it was" −13.0. A response has 13.65 tokens on average
and an entropy of 25.41 nats (1.86 nats per token): the floor of any model's
held-out loss.

Left out: meaning across sentences. A reviewer has no mood, so that a pair of
words is all the grammar there is.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
import numpy as np
import tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf_jax import types
from rlhf_jax.objective import masking

_PAD, _START, _STOP = "<pad>", "<start>", "<end>"

# Class → its words, and how often each is drawn relative to the others.
_WORDS = {
  "determiner": {"the": 6, "this": 2, "that": 1},
  "kind": {
    **{"whole": 2, "main": 2, "new": 2, "old": 2},
    **{"final": 1, "small": 1, "foreign": 1},
  },
  "subject": {
    **{"film": 4, "plot": 3, "acting": 3, "story": 3, "music": 2, "cast": 2},
    **{"script": 2, "director": 1, "camera": 1, "hero": 1, "villain": 1},
    **{"dialogue": 1},
  },
  "pronoun": {"it": 1},
  "copula": {"was": 6, "felt": 2, "seemed": 1, "looked": 1},
  "degree": {
    **{"really": 3, "very": 3, "quite": 2, "rather": 2},
    **{"so": 1, "truly": 1, "simply": 1},
  },
  "verdict": {
    **{"charming": 2, "funny": 3, "clever": 2, "warm": 2},
    **{"lovely": 2, "superb": 1, "brilliant": 1},
    **{"quiet": 3, "short": 2, "strange": 2, "familiar": 2},
    **{"simple": 2, "modern": 2},
    **{"dull": 3, "clumsy": 2, "cold": 2, "silly": 2},
    **{"boring": 2, "awful": 1, "dreadful": 1},
  },
  "person": {"i": 6, "we": 2, "they": 1, "everyone": 1},
  "belief": {"thought": 4, "said": 2, "believed": 1, "hoped": 1},
  "opinion": {
    **{"liked": 3, "enjoyed": 2, "praised": 1, "loved": 2},
    **{"noticed": 2, "watched": 2, "remembered": 2},
    **{"disliked": 3, "regretted": 2, "mocked": 1, "hated": 2},
  },
  "possessive": {"its": 6, "every": 2, "his": 1, "her": 1, "another": 1},
  "object": {
    **{"ending": 4, "scene": 4, "song": 2, "joke": 2, "speech": 1},
    **{"dance": 1, "costume": 1, "twist": 1, "line": 1, "chase": 1},
  },
  "join": {"and": 6, "but": 3, "while": 1, "yet": 1},
  "period": {".": 1},
  "stop": {_STOP: 1},
}

# Class → the probability of the class of the next word. Words of sentiment are
# verdicts and opinions, and a grammatical text repeats them every fourth word
# at best ("lovely and it was lovely"): a policy that gives up grammar can
# show a proxy reward model four times as many.
_FOLLOWERS = {
  "start": {"determiner": 0.55, "pronoun": 0.1, "person": 0.35},
  "determiner": {"kind": 0.25, "subject": 0.75},
  "kind": {"subject": 1.0},
  "subject": {"copula": 1.0},
  "pronoun": {"copula": 1.0},
  "copula": {"degree": 0.35, "verdict": 0.65},
  "degree": {"verdict": 1.0},
  "verdict": {"join": 0.45, "period": 0.55},
  "person": {"belief": 0.3, "opinion": 0.7},
  "belief": {"determiner": 0.8, "pronoun": 0.2},
  "opinion": {"possessive": 1.0},
  "possessive": {"object": 1.0},
  "object": {"join": 0.45, "period": 0.55},
  "join": {"determiner": 0.5, "pronoun": 0.15, "person": 0.35},
  "period": {"determiner": 0.25, "pronoun": 0.05, "person": 0.2, "stop": 0.5},
}

_SENTIMENT = {
  **dict.fromkeys(("lovely", "superb", "brilliant", "loved"), 2.0),
  **dict.fromkeys(("charming", "funny", "clever", "warm"), 1.0),
  **dict.fromkeys(("liked", "enjoyed", "praised"), 1.0),
  **dict.fromkeys(("dull", "clumsy", "cold", "silly"), -1.0),
  **dict.fromkeys(("disliked", "regretted", "mocked"), -1.0),
  **dict.fromkeys(("boring", "awful", "dreadful", "hated"), -2.0),
}

VOCABULARY: tuple[str, ...] = (
  _PAD,
  _START,
  _STOP,
  *(w for name, words in _WORDS.items() if name != "stop" for w in words),
)
PAD_ID, START_ID, STOP_ID = 0, 1, 2
LONGEST_PROMPT = 6  # tokens, <start> included
SHORTEST_REVIEW, LONGEST_REVIEW = 8, 26  # words between <start> and <end>
_LONGEST_TEXT = LONGEST_REVIEW + 2  # tokens

GOLD_CEILING = 3.0  # reward units
GOLD_SCALE = 5.0  # summed sentiment at which tanh bends
GOLD_PRICE = 0.8  # reward units per ungrammatical pair


def _word_chain() -> np.ndarray:
  """`[V, V]`: probability of each next word, whatever the review's length."""
  members = {"start": {_START: 1}, **_WORDS}
  chain = np.zeros((len(VOCABULARY), len(VOCABULARY)))
  for name, followers in _FOLLOWERS.items():
    rows = [VOCABULARY.index(word) for word in members[name]]
    for follower, probability in followers.items():
      total = sum(_WORDS[follower].values())
      for word, weight in _WORDS[follower].items():
        chain[rows, VOCABULARY.index(word)] = probability * weight / total
  return chain


_CHAIN = _word_chain()
_GRAMMATICAL = _CHAIN > 0
_SENTIMENTS = np.array([_SENTIMENT.get(w, 0.0) for w in VOCABULARY], np.float32)


@functools.cache
def _conditioned_chain() -> np.ndarray:
  """`[T, V, V]`: p(word t | word t − 1, the review's length is allowed).

  Word 0 is <start>. With h_t(w) the probability that a text whose word t is w
  comes to an allowed end, this is chain(v, w) · h_t(w) / h_{t−1}(v).
  """
  ends = np.zeros((_LONGEST_TEXT, len(VOCABULARY)))
  ends[SHORTEST_REVIEW + 1 :, STOP_ID] = 1.0
  steps = np.zeros((_LONGEST_TEXT, *_CHAIN.shape))
  for t in range(_LONGEST_TEXT - 1, 0, -1):
    joint = _CHAIN * ends[t]
    ends[t - 1] += joint.sum(axis=1)
    total = joint.sum(axis=1, keepdims=True)
    steps[t] = np.divide(joint, total, out=steps[t], where=total > 0)
  return steps


def sample_texts(seed: int, count: int) -> list[tuple[list[int], list[int]]]:
  """Draws `count` reviews, each cut into a prompt and its response.

  Prompts are <start> and the first 1 to 5 words; responses end with <end>.
  The same seed gives the same texts.
  """
  rng = np.random.default_rng(seed)
  cumulative = _conditioned_chain().cumsum(axis=2)
  tokens = np.full((count, _LONGEST_TEXT), STOP_ID)
  tokens[:, 0] = START_ID
  for t in range(1, _LONGEST_TEXT):
    below = cumulative[t, tokens[:, t - 1]]
    # Scaled by the row's own sum, which rounding leaves beside 1; after the
    # stop a row is all zeros and stays at the stop.
    threshold = rng.random((count, 1)) * below[:, -1:]
    drawn = (below <= threshold).sum(axis=1)
    tokens[:, t] = np.where(tokens[:, t - 1] == STOP_ID, STOP_ID, drawn)
  lengths = (tokens == STOP_ID).argmax(axis=1) + 1
  cuts = rng.integers(2, LONGEST_PROMPT + 1, count)
  return [
    (row[:cut].tolist(), row[cut:length].tolist())
    for row, cut, length in zip(tokens, cuts, lengths)
  ]


def sample_prompts(seed: int, count: int) -> list[list[int]]:
  """The prompts of `sample_texts(seed, count)`."""
  return [prompt for prompt, _ in sample_texts(seed, count)]


def negative_log_likelihood(prompt: list[int], response: list[int]) -> float:
  """Exact −log p(response | prompt) of the language, nats per response.

  Its mean over `sample_texts` is the entropy that no model's held-out loss can
  pass. A response without <end> counts as the beginning of one.

  Returns:
    The sum over the response's tokens; infinite where a pair of words is
    ungrammatical or the review is shorter or longer than the language allows.
  """
  text = prompt + response
  if len(text) > _LONGEST_TEXT:
    return float("inf")
  steps = _conditioned_chain()
  columns = range(len(prompt), len(text))
  likelihoods = [steps[t, text[t - 1], text[t]] for t in columns]
  with np.errstate(divide="ignore"):
    return float(-np.log(likelihoods).sum())


def sentiment(sequences: types.Sequences) -> Float[Array, "B"]:
  """Sum of the sentiments of a response's words; the prompt's do not count."""
  words = jnp.asarray(_SENTIMENTS)[sequences.response_tokens]
  return jnp.where(_response_mask(sequences), words, 0.0).sum(axis=1)


def ungrammatical_pairs(sequences: types.Sequences) -> Int[Array, "B"]:
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
  faulty = ~jnp.asarray(_GRAMMATICAL)[previous, response]
  return (is_pair & faulty).sum(axis=1)


def gold_reward(sequences: types.Sequences) -> Float[Array, "B"]:
  """What a response is truly worth, reward units; 0 for an empty one.

      3 · tanh(sentiment / 5) − 0.8 · ungrammatical pairs

  Good words pay less and less, up to 3; faulty pairs cost the same each.
  """
  praise = GOLD_CEILING * jnp.tanh(sentiment(sequences) / GOLD_SCALE)
  return praise - GOLD_PRICE * ungrammatical_pairs(sequences)


def _response_mask(sequences: types.Sequences) -> Bool[Array, "B R"]:
  size = sequences.response_tokens.shape[1]
  return masking.response_mask(sequences.response_lengths, size)


def label_preferences(
  key: PRNGKeyArray,
  gold_first: Float[Array, "B"],
  gold_second: Float[Array, "B"],
) -> Bool[Array, "B"]:
  """Draws whether the first of two responses is preferred.

  P(first preferred) = σ(gold_first − gold_second), Bradley & Terry 1952: a
  judge who errs more the closer the two are.
  """
  return jax.random.bernoulli(key, jax.nn.sigmoid(gold_first - gold_second))


def tokenizer() -> PreTrainedTokenizerFast:
  """The language's tokenizer: a token per word, <start> before a text.

  A word outside the vocabulary is an error of `tokenizers`, not a token; so
  are <start> and <end> written out, which a text must not smuggle in.
  """
  ids = {word: i for i, word in enumerate(VOCABULARY)}
  backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids))
  pre_tokenizers = tokenizers.pre_tokenizers
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.WhitespaceSplit(),
      pre_tokenizers.Split("<", behavior="isolated"),
    ]
  )
  backend.post_processor = tokenizers.processors.TemplateProcessing(
    single=f"{_START} $A", special_tokens=[(_START, START_ID)]
  )
  return PreTrainedTokenizerFast(
    tokenizer_object=backend,
    pad_token=_PAD,
    bos_token=_START,
    eos_token=_STOP,
    padding_side="left",
    split_special_tokens=True,
    clean_up_tokenization_spaces=False,
  )
