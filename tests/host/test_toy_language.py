"""The built-in language against its definition, by hand and by counting."""

import collections
import itertools
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from rlhf_jax import types
from rlhf_jax.host import toy_language

ID = {word: i for i, word in enumerate(toy_language.VOCABULARY)}
P, R = 7, 26


def pack(texts, filler=toy_language.PAD_ID):
  """Lays texts out as a rollout would, with `filler` where nothing is."""
  prompts = np.full((len(texts), P), filler, np.int32)
  responses = np.full((len(texts), R), filler, np.int32)
  for i, (prompt, response) in enumerate(texts):
    prompts[i, P - len(prompt) :] = prompt
    responses[i, : len(response)] = response
  count = lambda which: jnp.array([len(text[which]) for text in texts])
  return types.Sequences(
    jnp.array(prompts), count(0), jnp.array(responses), count(1)
  )


def ids(text):
  return [ID[word] for word in text.split()]


def read(*texts):
  """Packs texts written as "prompt | response"."""
  return pack([tuple(ids(part) for part in t.split("|")) for t in texts])


@pytest.fixture(scope="session")
def texts():
  return toy_language.sample_texts(0, 20_000)


def test_vocabulary_has_each_word_once_and_divides_over_eight_devices():
  vocabulary = toy_language.VOCABULARY
  assert len(set(vocabulary)) == len(vocabulary) == 96
  special = toy_language.PAD_ID, toy_language.START_ID, toy_language.STOP_ID
  assert [vocabulary[i] for i in special] == ["<pad>", "<start>", "<end>"]


def test_gold_of_hand_worked_texts():
  sequences = read(
    "<start> the film was | really lovely . <end>",  # lovely 2, fault 0
    "<start> i | loved its ending but it was dull . <end>",  # 2 − 1, fault 0
    "<start> the film was lovely | . i hated",  # −2 (the prompt's is not ours)
    "<start> it was | lovely lovely funny",  # 5; lovely lovely, lovely funny
    "<start> the | was the <end>",  # 0; the was, was the, the <end>
    "<start> it | the . <end>",  # 0; it the, the .
    "<start> it was | <end> it",  # 0; was <end>, <end> it
    "<start> it was |",  # nothing was said
  )
  sentiment = [2, 1, -2, 5, 0, 0, 0, 0]
  faults = [0, 0, 0, 2, 3, 2, 2, 0]
  gold = [3 * math.tanh(s / 5) - 0.8 * n for s, n in zip(sentiment, faults)]
  np.testing.assert_array_equal(toy_language.sentiment(sequences), sentiment)
  np.testing.assert_array_equal(
    toy_language.ungrammatical_pairs(sequences), faults
  )
  np.testing.assert_allclose(
    toy_language.gold_reward(sequences), gold, atol=1e-6
  )


def test_a_response_without_a_prompt_has_no_first_pair():
  sequences = pack([([], ids("lovely . <end>"))], filler=ID["lovely"])
  assert toy_language.ungrammatical_pairs(sequences).tolist() == [0]


@pytest.mark.parametrize("filler", [ID["<end>"], ID["lovely"], -1, 10**6])
def test_gold_ignores_what_stands_under_the_mask(texts, filler):
  """Trap 16: pad = stop, and ids that are no words, change nothing."""
  some = [*texts[:64], ([1], []), ([1], ids("lovely the was"))]
  np.testing.assert_array_equal(
    toy_language.gold_reward(pack(some, filler)),
    toy_language.gold_reward(pack(some)),
  )


def test_gold_is_the_same_under_jit_and_vmap(texts):
  sequences = pack(texts[:12])
  gold = toy_language.gold_reward(sequences)
  np.testing.assert_allclose(
    jax.jit(toy_language.gold_reward)(sequences), gold, rtol=1e-6
  )
  split = jax.tree.map(lambda x: x.reshape(3, 4, *x.shape[1:]), sequences)
  np.testing.assert_allclose(
    jax.vmap(toy_language.gold_reward)(split).ravel(), gold, rtol=1e-6
  )


def test_good_words_saturate_and_their_repetition_costs():
  once = "lovely and it was superb "
  grammatical = "and it was lovely and it was superb " * 2
  golds = toy_language.gold_reward(
    read(
      f"<start> it was | {once} {grammatical}",  # 6 words, sentiment 12
      f"<start> it was | {once} . <end>",  # 2 words, sentiment 4
      f"<start> it was | {'lovely ' * 21}",  # 20 faulty pairs
    )
  )
  assert 2.9 < golds[0] < 3.0
  assert golds[1] > golds[0] / 2  # The other four buy less than the two did.
  assert golds[2] == pytest.approx(3 - 20 * 0.8, abs=1e-3)


def test_gold_over_the_language_leaves_room_to_rise(texts):
  """The docstring's figures; standard error of the mean 0.007."""
  sequences = pack(texts)
  gold = np.asarray(toy_language.gold_reward(sequences))
  assert gold.mean() == pytest.approx(0.0, abs=0.03)
  assert gold.std() == pytest.approx(0.95, abs=0.03)
  assert np.percentile(gold, [5, 95]) == pytest.approx([-1.6, 1.6], abs=0.1)
  assert not toy_language.ungrammatical_pairs(sequences).any()


def test_texts_have_the_promised_shape(texts):
  assert {len(prompt) for prompt, _ in texts} == {2, 3, 4, 5, 6}
  assert toy_language.LONGEST_PROMPT == 6
  for prompt, response in texts:
    assert prompt[0] == toy_language.START_ID
    assert response[-1] == toy_language.STOP_ID
    assert (prompt + response).count(toy_language.STOP_ID) == 1
    assert 8 <= len(prompt + response) - 2 <= 26
  assert max(len(response) for _, response in texts) == 26


def test_every_word_is_used(texts):
  used = set(itertools.chain.from_iterable(p + r for p, r in texts))
  assert used == set(range(96)) - {toy_language.PAD_ID}


def test_texts_follow_their_seed(texts):
  assert toy_language.sample_texts(3, 50) == toy_language.sample_texts(3, 50)
  assert toy_language.sample_texts(3, 50) != toy_language.sample_texts(4, 50)
  prompts = toy_language.sample_prompts(0, 20_000)
  assert prompts == [prompt for prompt, _ in texts]


def test_4096_texts_take_less_than_a_second():
  start = time.perf_counter()
  toy_language.sample_texts(5, 4096)
  assert time.perf_counter() - start < 1.0


def test_likelihood_is_the_frequency_of_a_prefix(texts):
  """The 20 commonest continuations of "<start> the" by two words."""
  prompt = [toy_language.START_ID, ID["the"]]
  rows = [(p + r)[2:4] for p, r in texts if (p + r)[1] == ID["the"]]
  counts = collections.Counter(map(tuple, rows)).most_common(20)
  for prefix, count in counts:
    nll = toy_language.negative_log_likelihood(prompt, list(prefix))
    expected = math.exp(-nll)
    error = math.sqrt(expected * (1 - expected) / len(rows))
    assert abs(count / len(rows) - expected) < 4 * error


def test_likelihoods_of_all_continuations_sum_to_one():
  prompt = ids("<start> it was lovely")
  pairs = itertools.product(range(96), repeat=2)
  nlls = [toy_language.negative_log_likelihood(prompt, [*p]) for p in pairs]
  assert sum(math.exp(-n) for n in nlls) == pytest.approx(1.0, abs=1e-9)


def test_likelihood_conditions_on_the_length_of_the_review():
  nll = toy_language.negative_log_likelihood
  # <end> after 4 words, after 8, and when 26 words leave no room but for it.
  assert nll(ids("<start> it was lovely ."), ids("<end>")) == math.inf
  eight = ids("<start> it was lovely and it was lovely .")
  assert 0 < nll(eight, ids("<end>")) < math.log(2)
  long = ids("<start> it was lovely" + " and it was lovely" * 5)
  # 23 words: no join leads to an end by 26, so ". <end>" is certain.
  assert nll(long, ids(". <end>")) == pytest.approx(0.0, abs=1e-12)
  assert nll(long, ids("and it was lovely . <end>")) == math.inf


def test_likelihood_is_the_chain_s_over_that_of_an_allowed_end(texts):
  """By powers of the chain: Σ over the words s at which <end> may stand."""
  chain = toy_language._CHAIN
  powers = [np.linalg.matrix_power(chain, n) for n in range(28)]
  for prompt, response in texts[:50]:
    last = len(prompt) - 1
    ends = [
      powers[s - last][prompt[-1], toy_language.STOP_ID] for s in range(9, 28)
    ]
    pairs = zip([prompt[-1], *response], response)
    expected = math.log(sum(ends)) - sum(math.log(chain[p]) for p in pairs)
    nll = toy_language.negative_log_likelihood(prompt, response)
    assert nll == pytest.approx(expected, rel=1e-9)


def test_words_of_a_class_differ_by_their_weights():
  nll = toy_language.negative_log_likelihood
  the = ids("<start> the")
  ratio = math.exp(nll(the, ids("plot")) - nll(the, ids("film")))
  assert ratio == pytest.approx(4 / 3)


def test_an_ungrammatical_text_is_impossible():
  nll = toy_language.negative_log_likelihood
  assert nll(ids("<start> the film"), ids("film was")) == math.inf
  assert nll(ids("<start> the"), ids("was lovely")) == math.inf
  assert nll(ids("<start> it was"), ids("quiet and")) < math.inf


def test_entropy_is_the_docstring_s(texts):
  """Mean NLL, standard error 0.08 nats."""
  nll = toy_language.negative_log_likelihood
  mean = np.mean([nll(prompt, response) for prompt, response in texts])
  assert mean == pytest.approx(25.41, abs=0.25)
  assert "25.41 nats" in str(toy_language.__doc__)


def test_preferences_are_drawn_by_bradley_and_terry():
  """A margin of ln 3 wins three times in four; equals win half."""
  count = 20_000
  for margin, expected in ((math.log(3), 0.75), (0.0, 0.5), (-40.0, 0.0)):
    first = jnp.full(count, 1.5 + margin)
    labels = toy_language.label_preferences(
      jax.random.key(0), first, jnp.full(count, 1.5)
    )
    assert float(labels.mean()) == pytest.approx(expected, abs=0.015)


@pytest.fixture(scope="session", params=["made", "loaded"])
def tokenizer(request, tmp_path_factory):
  made = toy_language.tokenizer()
  if request.param == "made":
    return made
  directory = tmp_path_factory.mktemp("tokenizer")
  made.save_pretrained(directory)
  return transformers.AutoTokenizer.from_pretrained(directory)


def test_tokenizer_round_trip(tokenizer, texts):
  assert tokenizer.encode("the film was") == ids("<start> the film was")
  for prompt, response in texts[:20]:
    text = tokenizer.decode(prompt + response, skip_special_tokens=True)
    assert text == " ".join(
      toy_language.VOCABULARY[i] for i in (prompt + response)[1:-1]
    )
    assert tokenizer.encode(text) == (prompt + response)[:-1]


def test_tokenizer_has_the_language_s_ids(tokenizer):
  assert len(tokenizer) == len(toy_language.VOCABULARY)
  assert tokenizer.pad_token_id == toy_language.PAD_ID
  assert tokenizer.bos_token_id == toy_language.START_ID
  assert tokenizer.eos_token_id == toy_language.STOP_ID
  assert tokenizer.padding_side == "left"


@pytest.mark.parametrize(
  "text", ["the zebra", "the film <end>", "it<end>", "<start> it", "<pad>"]
)
def test_tokenizer_refuses_what_is_no_word(tokenizer, text):
  """Bad inputs 25: the text of a special token is never the token."""
  with pytest.raises(Exception, match="WordLevel"):
    tokenizer.encode(text)
