"""The words of the built-in languages: classes, weights, followers, sentiment.

Tables only; `toy_language` makes chains of them. Class → its words, and how
often each is drawn relative to the others; class → the probability of the
class of the next word; word → its sentiment. Words of sentiment are verdicts
and opinions, and a grammatical text repeats them every fourth word at best
("lovely and it was lovely"): a policy that gives up grammar can show a proxy
reward model four times as many.
"""

from collections.abc import Mapping

Words = Mapping[str, Mapping[str, int]]
Followers = Mapping[str, Mapping[str, float]]

PAD, START, STOP = "<pad>", "<start>", "<end>"


def _each(weight: int, words: str) -> dict[str, int]:
  return dict.fromkeys(words.split(), weight)


def _sentiments(levels: Mapping[float, str]) -> dict[str, float]:
  return {w: level for level, words in levels.items() for w in words.split()}


REVIEWS: Words = {
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
  "stop": {STOP: 1},
}

REVIEWS_FOLLOWERS: Followers = {
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

REVIEWS_SENTIMENT: Mapping[str, float] = _sentiments(
  {
    2.0: "lovely superb brilliant loved",
    1.0: "charming funny clever warm liked enjoyed praised",
    -1.0: "dull clumsy cold silly disliked regretted mocked",
    -2.0: "boring awful dreadful hated",
  }
)

# Meals, in a line: no kinds, no beliefs, no periods.
NOTES: Words = {
  "determiner": {"the": 4, "this": 1},
  "subject": {
    **{"soup": 3, "bread": 2, "fish": 2, "rice": 2},
    **{"cake": 1, "waiter": 1, "room": 1},
  },
  "pronoun": {"it": 1},
  "copula": {"was": 4, "looked": 1},
  "degree": {"very": 3, "so": 2, "quite": 1},
  "verdict": {
    **{"lovely": 1, "superb": 1, "warm": 2, "fresh": 2},
    **{"salty": 6, "plain": 6, "soft": 4, "mild": 4},
    **{"stale": 2, "cold": 2, "awful": 1, "burnt": 1},
  },
  "person": {"i": 4, "we": 2, "they": 1},
  "opinion": {
    **{"liked": 2, "loved": 1},
    **{"ordered": 5, "tasted": 4, "shared": 3},
    **{"disliked": 2, "hated": 1},
  },
  "possessive": {"its": 3, "every": 1},
  "object": {"sauce": 3, "crust": 2, "colour": 1, "smell": 1},
  "join": {"and": 3, "but": 1},
  "stop": {STOP: 1},
}

NOTES_FOLLOWERS: Followers = {
  "start": {"determiner": 0.5, "pronoun": 0.15, "person": 0.35},
  "determiner": {"subject": 1.0},
  "subject": {"copula": 1.0},
  "pronoun": {"copula": 1.0},
  "copula": {"degree": 0.35, "verdict": 0.65},
  "degree": {"verdict": 1.0},
  "verdict": {"join": 0.4, "stop": 0.6},
  "person": {"opinion": 1.0},
  "opinion": {"possessive": 1.0},
  "possessive": {"object": 1.0},
  "object": {"join": 0.4, "stop": 0.6},
  "join": {"determiner": 0.5, "pronoun": 0.2, "person": 0.3},
}

NOTES_SENTIMENT: Mapping[str, float] = _sentiments(
  {
    2.0: "lovely superb loved",
    1.0: "warm fresh liked",
    -1.0: "stale cold disliked",
    -2.0: "awful burnt hated",
  }
)

_BEST = (
  "lovely superb brilliant splendid magnificent wonderful marvellous glorious"
  " dazzling enchanting"
)
_GOOD = (
  "charming funny clever warm pleasant graceful elegant cheerful friendly"
  " lively cosy gentle bright fresh tidy handsome welcoming inviting restful"
  " spotless vivid witty noble tasteful"
)
_NEUTRAL = (
  "quiet short strange familiar simple modern plain narrow wide tall low remote"
  " ancient crowded local common ordinary typical distant steep flat round open"
  " hidden formal private public northern southern eastern western wooden rural"
  " urban coastal seasonal changed unusual unfinished empty"
)
_BAD = (
  "dull clumsy cold silly shabby noisy dirty grey bleak stale cramped rude"
  " tired careless gloomy ugly messy drab smelly damaged neglected tasteless"
  " unfriendly forgettable"
)
_WORST = (
  "awful dreadful horrible terrible ghastly hideous vile dismal filthy"
  " appalling"
)
_LOVED = "loved adored treasured cherished"
_LIKED = "liked enjoyed praised admired welcomed valued recommended appreciated"
_DISLIKED = "disliked regretted mocked avoided criticised doubted resented fled"
_HATED = "hated loathed despised detested"

# Towns, at length: the grammar of the reviews, four times their words.
ESSAYS: Words = {
  "determiner": {"the": 12, **_each(2, "this that our"), "one": 1},
  "kind": {
    **_each(3, "whole main new old small great"),
    **_each(1, "final foreign large little big royal famous central upper"),
    **_each(1, "lower second third middle inner outer former winter summer"),
    "stone": 1,
  },
  "subject": {
    **_each(4, "city town village river harbour market museum castle"),
    **_each(2, "bridge garden park street station library theatre church"),
    **_each(2, "palace tower island valley forest lake beach hill"),
    **_each(1, "cathedral mountain road railway hotel restaurant school"),
    **_each(1, "university hospital factory bakery gallery monument fountain"),
    **_each(1, "chapel temple quarter suburb coast bay canal port avenue pier"),
  },
  "pronoun": {"it": 4, "she": 1, "he": 1},
  "copula": {
    **{"was": 12, "felt": 4, "seemed": 3, "looked": 3},
    **_each(1, "sounded appeared remained became"),
  },
  "degree": {
    **_each(4, "really very quite rather"),
    **_each(2, "so truly simply too always often never nearly almost"),
    **_each(1, "fairly terribly extremely unusually surprisingly deeply oddly"),
  },
  "verdict": {
    **_each(2, _BEST),
    **_each(3, _GOOD),
    **_each(3, _NEUTRAL),
    **_each(3, _BAD),
    **_each(2, _WORST),
  },
  "person": {
    **{"i": 12, "we": 4, "they": 3, "everyone": 2, "you": 2},
    **_each(1, "someone critics visitors travellers locals children tourists"),
    "strangers": 1,
  },
  "belief": {
    **_each(4, "thought said believed hoped"),
    **_each(1, "claimed wrote imagined supposed agreed insisted argued knew"),
  },
  "opinion": {
    **_each(3, _LOVED),
    **_each(3, _LIKED),
    **_each(2, "noticed watched remembered described visited passed sketched"),
    **_each(2, "mentioned photographed explored crossed recorded compared"),
    **_each(2, "measured studied drew"),
    **_each(3, _DISLIKED),
    **_each(3, _HATED),
  },
  "possessive": {
    **{"its": 12, "every": 4},
    **_each(2, "his her another their my your"),
  },
  "object": {
    **_each(4, "view song statue story window roof gate courtyard"),
    **_each(2, "painting staircase door wall terrace balcony ceiling floor"),
    **_each(2, "clock map guide legend history dance festival parade"),
    **_each(1, "lamp bell concert meal breakfast dinner soup bread cheese"),
    **_each(1, "wine coffee tea shop boat train tram ferry bus taxi path"),
    **_each(1, "bench tree flower lantern"),
  },
  "join": {
    **{"and": 12, "but": 6},
    **_each(2, "while yet because although whereas since until"),
  },
  "period": {".": 5, "!": 1},
  "stop": {STOP: 1},
}

ESSAYS_FOLLOWERS: Followers = {
  **REVIEWS_FOLLOWERS,
  "period": {
    **{"determiner": 0.45, "pronoun": 0.1, "person": 0.35},
    "stop": 0.1,
  },
}

ESSAYS_SENTIMENT: Mapping[str, float] = _sentiments(
  {
    2.0: f"{_BEST} {_LOVED}",
    1.0: f"{_GOOD} {_LIKED}",
    -1.0: f"{_BAD} {_DISLIKED}",
    -2.0: f"{_WORST} {_HATED}",
  }
)
