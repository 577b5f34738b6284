"""The built-in languages against their definition, by hand and by counting."""

import collections
import hashlib
import itertools
import json
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from configs import sft
from rlhf_jax import types
from rlhf_jax.settings import rules
from rlhf_jax.text import toy_language

REVIEWS = toy_language.LANGUAGES["reviews"]
ID = {word: i for i, word in enumerate(REVIEWS.vocabulary)}
P, R = 8, 48

# The docstring's, per language, in its order.
FIGURES = {
  "ids": (96, 48, 352),
  "words": ((8, 26), (3, 9), (24, 48)),
  "prompt": (5, 2, 7),
  "gold sd": (0.95, 1.04, 0.98),
  "tail": (1.61, 2.28, 1.55),
  "best": (2.95, 2.89, 2.99),
  "gamed": (-15.4, -3.0, -15.0),
  "tokens": (13.65, 4.62, 32.52),
  "entropy": (25.41, 5.67, 93.29),
}


def figure(name, language):
  return FIGURES[name][list(toy_language.LANGUAGES).index(language.name)]


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


def ids(text, language=REVIEWS):
  return [language.vocabulary.index(word) for word in text.split()]


def read(*texts, language=REVIEWS):
  """Packs texts written as "prompt | response"."""
  parts = [text.split("|") for text in texts]
  return pack([tuple(ids(part, language) for part in p) for p in parts])


@pytest.fixture(scope="session", params=list(toy_language.LANGUAGES))
def language(request):
  return toy_language.LANGUAGES[request.param]


@pytest.fixture(scope="session")
def own_texts(language):
  return language.sample_texts(0, 20_000)


@pytest.fixture(scope="session")
def texts():
  return REVIEWS.sample_texts(0, 20_000)


def test_the_default_language_does_not_change():
  """Published runs stand on these texts; the sums are of 2026-11-21."""
  digest = lambda content: hashlib.sha256(content).hexdigest()
  texts = toy_language.sample_texts(0, 50)
  gold = np.asarray(toy_language.gold_reward(pack(texts)))
  nll = sum(toy_language.negative_log_likelihood(*text) for text in texts)
  assert digest(" ".join(toy_language.VOCABULARY).encode()) == (
    "50798e042fb5e952dfb804b7f9eb16e674ed55f11920335968acaa56702ea473"
  )
  assert digest(json.dumps(texts).encode()) == (
    "87b4e1a451066fbd20466f0adf0830eb11fd30443b9876e7677218cb95209124"
  )
  assert digest(" ".join(f"{g:.4f}" for g in gold).encode()) == (
    "262f4e49c24a9aea2a50478b892b77a80a2d054e3e0fb770c61744b8801bb998"
  )
  assert nll == pytest.approx(1327.0145017234931, rel=1e-12)
  assert toy_language.sample_prompts(0, 50) == [prompt for prompt, _ in texts]


def test_a_config_names_its_language(language):
  config = sft.get_config(f"data.language={language.name}")
  assert toy_language.of(config) is language


def test_the_rules_name_the_languages_and_the_openings(language):
  """Their tables are free of JAX, and are compared here."""
  assert rules.CHOICES["data.language"] == tuple(toy_language.LANGUAGES)
  openings = tuple(language.followers["start"])
  assert rules.CHOICES["data.opening"] == ("", *openings)


def test_vocabulary_has_each_word_once_and_divides_over_eight_devices(language):
  vocabulary = language.vocabulary
  assert len(set(vocabulary)) == len(vocabulary) == figure("ids", language)
  assert len(vocabulary) % 8 == 0
  special = toy_language.PAD_ID, toy_language.START_ID, toy_language.STOP_ID
  assert [vocabulary[i] for i in special] == ["<pad>", "<start>", "<end>"]
  assert set(language.sentiments) < set(vocabulary)


def test_probabilities_of_the_tables_sum_to_one(language):
  """A word that is no class's, or a class without words, would leave less."""
  sums = language.chain.sum(axis=1)
  ended = [toy_language.PAD_ID, toy_language.STOP_ID]
  np.testing.assert_array_equal(sums[ended], 0)
  np.testing.assert_allclose(np.delete(sums, ended), 1, rtol=1e-12)


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
  np.testing.assert_array_equal(REVIEWS.sentiment(sequences), sentiment)
  np.testing.assert_array_equal(REVIEWS.ungrammatical_pairs(sequences), faults)
  np.testing.assert_allclose(REVIEWS.gold_reward(sequences), gold, atol=1e-6)


def test_gold_of_hand_worked_notes_and_essays():
  notes = read(
    "<start> it | was lovely and i loved its sauce <end>",  # 2 + 2, fault 0
    "<start> i hated | its sauce burnt burnt",  # −4; sauce burnt, burnt burnt
    language=toy_language.LANGUAGES["notes"],
  )
  np.testing.assert_allclose(
    toy_language.LANGUAGES["notes"].gold_reward(notes),
    [3 * math.tanh(4 / 2), 3 * math.tanh(-4 / 2) - 2 * 1.0],
    rtol=1e-6,
  )
  essays = read(
    # 2 − 1 + 1 + 2, fault 0
    "<start> she felt | glorious ! our stone pier was drab and critics admired"
    " its tram . i adored my tea . <end>",
    "<start> the | city pier was cosy ! .",  # 1; city pier, ! .
    language=toy_language.LANGUAGES["essays"],
  )
  np.testing.assert_allclose(
    toy_language.LANGUAGES["essays"].gold_reward(essays),
    [3 * math.tanh(4 / 7), 3 * math.tanh(1 / 7) - 2 * 0.4],
    rtol=1e-6,
  )


def test_a_response_without_a_prompt_has_no_first_pair():
  sequences = pack([([], ids("lovely . <end>"))], filler=ID["lovely"])
  assert REVIEWS.ungrammatical_pairs(sequences).tolist() == [0]


@pytest.mark.parametrize("filler", [ID["<end>"], ID["lovely"], -1, 10**6])
def test_gold_ignores_what_stands_under_the_mask(texts, filler):
  """Trap 16: pad = stop, and ids that are no words, change nothing."""
  some = [*texts[:64], ([1], []), ([1], ids("lovely the was"))]
  np.testing.assert_array_equal(
    REVIEWS.gold_reward(pack(some, filler)),
    REVIEWS.gold_reward(pack(some)),
  )


def test_gold_is_the_same_under_jit_and_vmap(texts):
  sequences = pack(texts[:12])
  gold = REVIEWS.gold_reward(sequences)
  np.testing.assert_allclose(
    jax.jit(REVIEWS.gold_reward)(sequences), gold, rtol=1e-6
  )
  split = jax.tree.map(lambda x: x.reshape(3, 4, *x.shape[1:]), sequences)
  np.testing.assert_allclose(
    jax.vmap(REVIEWS.gold_reward)(split).ravel(), gold, rtol=1e-6
  )


def test_gold_compiles_to_small_constants(language):
  """Trap 21: the tables of pairs and of sentiments are below 1 MB together."""
  closed = jax.make_jaxpr(language.gold_reward)(pack([([1], [2])]))
  sizes = [constant.nbytes for constant in closed.consts]
  size = len(language.vocabulary)
  assert sorted(sizes) == [4 * size, size**2]
  assert sum(sizes) < 2**20


def test_good_words_saturate_and_their_repetition_costs():
  once = "lovely and it was superb "
  grammatical = "and it was lovely and it was superb " * 2
  golds = REVIEWS.gold_reward(
    read(
      f"<start> it was | {once} {grammatical}",  # 6 words, sentiment 12
      f"<start> it was | {once} . <end>",  # 2 words, sentiment 4
      f"<start> it was | {'lovely ' * 21}",  # 20 faulty pairs
    )
  )
  assert 2.9 < golds[0] < 3.0
  assert golds[1] > golds[0] / 2  # The other four buy less than the two did.
  assert golds[2] == pytest.approx(3 - 20 * 0.8, abs=1e-3)


def test_gold_over_the_language_leaves_room_to_rise(language, own_texts):
  """The docstring's figures; standard error of the mean 0.007."""
  sequences = pack(own_texts)
  gold = np.asarray(language.gold_reward(sequences))
  tail = figure("tail", language)
  assert gold.mean() == pytest.approx(0.0, abs=0.03)
  assert gold.std() == pytest.approx(figure("gold sd", language), abs=0.02)
  assert np.percentile(gold, [5, 95]) == pytest.approx([-tail, tail], abs=0.01)
  assert not language.ungrammatical_pairs(sequences).any()


def best_sentiment(language):
  """Over the grammatical texts of an allowed length, after a first word."""
  follows = np.where(language.chain > 0, 0.0, -np.inf)
  sentiments = [language.sentiments.get(w, 0.0) for w in language.vocabulary]
  # reached[w]: of the best beginning of a response that ends with the word w.
  reached = follows[toy_language.START_ID]
  best = -np.inf
  for words in range(1, language.longest + 1):
    if words >= language.shortest:
      best = max(best, (reached + follows[:, toy_language.STOP_ID]).max())
    reached = (reached[:, None] + follows).max(axis=0) + sentiments
  return best


def test_gold_is_gamed_by_repetition_and_not_by_grammar(language):
  """Who counts nice words prefers the text that gold prices lowest."""
  best = 3 * math.tanh(best_sentiment(language) / language.gold_scale)
  assert best == pytest.approx(figure("best", language), abs=0.005)
  repeated = "lovely " * (language.longest - 2)
  gamed = read(f"<start> it was | {repeated}", language=language)
  assert language.sentiment(gamed)[0] > 1.9 * best_sentiment(language)
  gold = float(language.gold_reward(gamed)[0])
  assert gold == pytest.approx(figure("gamed", language), abs=0.05)


def test_texts_have_the_promised_shape(language, own_texts):
  longest_prompt = figure("prompt", language)
  shortest, longest = figure("words", language)
  cuts = {len(prompt) - 1 for prompt, _ in own_texts}
  assert cuts == set(range(1, longest_prompt + 1))
  for prompt, response in own_texts:
    assert prompt[0] == toy_language.START_ID
    assert response[-1] == toy_language.STOP_ID
    assert (prompt + response).count(toy_language.STOP_ID) == 1
  lengths = {len(prompt + response) - 2 for prompt, response in own_texts}
  assert (min(lengths), max(lengths)) == (shortest, longest)


def test_every_word_is_used(language, own_texts):
  used = set(itertools.chain.from_iterable(p + r for p, r in own_texts))
  assert used == set(range(len(language.vocabulary))) - {toy_language.PAD_ID}


def test_texts_follow_their_seed(language, own_texts):
  assert language.sample_texts(3, 50) == language.sample_texts(3, 50)
  assert language.sample_texts(3, 50) != language.sample_texts(4, 50)
  prompts = language.sample_prompts(0, 20_000)
  assert prompts == [prompt for prompt, _ in own_texts]


def test_4096_texts_take_less_than_a_second():
  start = time.perf_counter()
  REVIEWS.sample_texts(5, 4096)
  assert time.perf_counter() - start < 1.0


@pytest.mark.parametrize("opening", rules.CHOICES["data.opening"][1:])
def test_an_opening_is_that_of_every_text(language, own_texts, opening):
  """Exactly `count`, drawn as those of the whole language that open so."""
  members = {language.vocabulary.index(w) for w in language.words[opening]}
  chosen = language.sample_texts(7, 3000, opening)
  assert len(chosen) == 3000
  assert {prompt[1] for prompt, _ in chosen} == members
  assert chosen == language.sample_texts(7, 3000, opening)
  assert language.sample_prompts(7, 3000, opening) == [p for p, _ in chosen]
  same = [text for text in own_texts if text[0][1] in members]
  for measure in (
    lambda text: text[0][1],
    lambda text: len(text[0]),
    lambda text: len(text[0] + text[1]),
    lambda text: language.negative_log_likelihood(*text),
  ):
    first, second = (np.array([*map(measure, t)]) for t in (chosen, same))
    error = math.hypot(first.std() / 3000**0.5, second.std() / len(same) ** 0.5)
    assert abs(first.mean() - second.mean()) < 4 * error + 1e-12


@pytest.mark.parametrize("opening", ["verdict", "stop", "subjects"])
def test_an_opening_that_no_text_has(opening):
  with pytest.raises(ValueError, match=f"'{opening}'; wanted one of determin"):
    REVIEWS.sample_texts(0, 1, opening)


def test_likelihood_is_the_frequency_of_a_prefix(texts):
  """The 20 commonest continuations of "<start> the" by two words."""
  prompt = [toy_language.START_ID, ID["the"]]
  rows = [(p + r)[2:4] for p, r in texts if (p + r)[1] == ID["the"]]
  counts = collections.Counter(map(tuple, rows)).most_common(20)
  for prefix, count in counts:
    nll = REVIEWS.negative_log_likelihood(prompt, list(prefix))
    expected = math.exp(-nll)
    error = math.sqrt(expected * (1 - expected) / len(rows))
    assert abs(count / len(rows) - expected) < 4 * error


def test_likelihoods_of_all_continuations_sum_to_one():
  prompt = ids("<start> it was lovely")
  pairs = itertools.product(range(96), repeat=2)
  nlls = [REVIEWS.negative_log_likelihood(prompt, [*p]) for p in pairs]
  assert sum(math.exp(-n) for n in nlls) == pytest.approx(1.0, abs=1e-9)


def test_likelihood_conditions_on_the_length_of_the_review():
  nll = REVIEWS.negative_log_likelihood
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
  chain = REVIEWS.chain
  powers = [np.linalg.matrix_power(chain, n) for n in range(28)]
  for prompt, response in texts[:50]:
    last = len(prompt) - 1
    ends = [
      powers[s - last][prompt[-1], toy_language.STOP_ID] for s in range(9, 28)
    ]
    pairs = zip([prompt[-1], *response], response)
    expected = math.log(sum(ends)) - sum(math.log(chain[p]) for p in pairs)
    nll = REVIEWS.negative_log_likelihood(prompt, response)
    assert nll == pytest.approx(expected, rel=1e-9)


def test_words_of_a_class_differ_by_their_weights():
  nll = REVIEWS.negative_log_likelihood
  the = ids("<start> the")
  ratio = math.exp(nll(the, ids("plot")) - nll(the, ids("film")))
  assert ratio == pytest.approx(4 / 3)


def test_an_ungrammatical_text_is_impossible():
  nll = REVIEWS.negative_log_likelihood
  assert nll(ids("<start> the film"), ids("film was")) == math.inf
  assert nll(ids("<start> the"), ids("was lovely")) == math.inf
  assert nll(ids("<start> it was"), ids("quiet and")) < math.inf


def entropy_and_length(language):
  """Of responses, by words that are neither drawn nor conditioned in advance.

  alive[w]: p(word t is w | the text comes to an allowed end); the chance of an
  end from each word is by powers of the chain.
  """
  chain, stop = language.chain, toy_language.STOP_ID
  size = language.longest + 2
  after = [np.eye(len(chain))[stop]]  # after[n][w]: <end> is n words after w.
  for _ in range(1, size):
    after.append(chain @ after[-1])
  ends = lambda t: sum(
    after[s - t] for s in range(max(t, language.shortest + 1), size)
  )
  alive = np.eye(len(chain))[toy_language.START_ID]
  alive = alive * ends(0) / ends(0)[toy_language.START_ID]
  entropies, present = [0.0], [1.0]
  for t in range(1, size):
    before = np.where(alive > 0, ends(t - 1), 1.0)
    steps = chain * ends(t) / before[:, None] * (alive > 0)[:, None]
    surprise = -np.log(np.where(steps > 0, steps, 1.0))
    entropies.append(float(alive @ (steps * surprise).sum(axis=1)))
    alive = alive @ steps
    present.append(float(alive.sum()))
  cuts = range(2, language.longest_prompt + 1)
  return tuple(
    np.mean([sum(numbers[cut:]) for cut in cuts])
    for numbers in (entropies, present)
  )


def test_likelihoods_have_the_chain_s_entropy(language, own_texts):
  """Mean NLL of 5,000 texts within four standard errors, and the figures."""
  entropy, length = entropy_and_length(language)
  assert entropy == pytest.approx(figure("entropy", language), abs=0.005)
  assert length == pytest.approx(figure("tokens", language), abs=0.005)
  nlls = [language.negative_log_likelihood(*t) for t in own_texts[:5000]]
  assert np.isfinite(nlls).all()
  error = np.std(nlls) / len(nlls) ** 0.5
  assert abs(np.mean(nlls) - entropy) < 4 * error


def test_figures_are_the_docstring_s():
  rows = {}
  for line in str(toy_language.__doc__).splitlines():
    for name in FIGURES:
      if line.startswith(f"    {name}  "):
        rows[name] = line.removeprefix(f"    {name}").split()[:3]
  spans = [f"{low}-{high}" for low, high in FIGURES["words"]]
  assert rows.pop("words") == spans
  assert rows.pop("prompt") == [f"1-{most}" for most in FIGURES["prompt"]]
  numbers = {name: tuple(map(float, row)) for name, row in rows.items()}
  assert numbers == {name: FIGURES[name] for name in numbers}
  assert set(FIGURES) == {*numbers, "words", "prompt"}


@pytest.mark.parametrize(
  "margin, temperature, expected",
  [
    (math.log(3), 1.0, 0.75),  # Wins three times in four.
    (0.0, 1.0, 0.5),
    (-40.0, 1.0, 0.0),
    (math.log(3), 0.5, 0.9),  # 9 : 1, the square of 3 : 1.
    (2 * math.log(3), 2.0, 0.75),
    (math.log(3), 1e9, 0.5),
    (0.01, 1e-9, 1.0),
  ],
)
def test_preferences_are_drawn_by_bradley_and_terry(
  margin, temperature, expected
):
  """σ(margin / temperature), within four standard errors of 20,000 draws."""
  second = jnp.full(20_000, 1.5)
  labels = toy_language.label_preferences(
    jax.random.key(0), second + margin, second, temperature=temperature
  )
  assert float(labels.mean()) == pytest.approx(expected, abs=0.0142)


def test_the_judge_is_sober_by_default():
  golds = jnp.linspace(-3, 3, 512), jnp.zeros(512)
  key = jax.random.key(3)
  np.testing.assert_array_equal(
    toy_language.label_preferences(key, *golds),
    toy_language.label_preferences(key, *golds, temperature=1.0),
  )


@pytest.fixture(scope="session", params=["made", "loaded"])
def tokenizer(request, tmp_path_factory):
  made = REVIEWS.tokenizer()
  if request.param == "made":
    return made
  directory = tmp_path_factory.mktemp("tokenizer")
  made.save_pretrained(directory)
  return transformers.AutoTokenizer.from_pretrained(directory)


def test_each_language_has_its_tokenizer(language, own_texts):
  tokenizer = language.tokenizer()
  words = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
  assert tuple(words) == language.vocabulary
  for prompt, response in own_texts[:20]:
    text = tokenizer.decode(prompt + response, skip_special_tokens=True)
    assert tokenizer.encode(text) == (prompt + response)[:-1]


def test_tokenizer_round_trip(tokenizer, texts):
  assert tokenizer.encode("the film was") == ids("<start> the film was")
  for prompt, response in texts[:20]:
    text = tokenizer.decode(prompt + response, skip_special_tokens=True)
    assert text == " ".join(
      REVIEWS.vocabulary[i] for i in (prompt + response)[1:-1]
    )
    assert tokenizer.encode(text) == (prompt + response)[:-1]


def test_tokenizer_has_the_language_s_ids(tokenizer):
  assert len(tokenizer) == len(REVIEWS.vocabulary)
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
