"""Text and ids: nothing is added, doubled or lost on the way."""

import json
import pathlib

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, processors
import transformers

from rlhf_jax import errors
from rlhf_jax.text import tokenizer as tokenizer_lib

DATA = pathlib.Path(__file__).parents[2].parent / "shared/data"
NAMES = ("stories260K", "tokenizers/gpt2", "tokenizers/minimind")


@pytest.fixture(scope="session")
def small(tmp_path_factory):
  """A sentencepiece-like tokenizer that adds BOS *and* EOS."""
  words = ["<unk>", "<s>", "</s>", "▁", "h", "i", "o", "hi", "▁hi", "▁h"]
  words += [*"<>s/.a", "\n"]
  vocab = {word: i for i, word in enumerate(words)}
  merges = [("h", "i"), ("▁", "hi"), ("▁", "h")]
  model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>")
  backend = tokenizers.Tokenizer(model)
  prepend = normalizers.Prepend("▁")
  backend.normalizer = normalizers.Sequence(  # pyright: ignore
    [prepend, normalizers.Replace(" ", "▁")]
  )
  backend.decoder = decoders.Sequence(  # pyright: ignore
    [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
  )
  backend.add_special_tokens(["<unk>", "<s>", "</s>"])
  backend.post_processor = processors.TemplateProcessing(  # pyright: ignore
    single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
  )
  directory = tmp_path_factory.mktemp("tokenizer")
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend,
    bos_token="<s>",
    eos_token="</s>",
    unk_token="<unk>",
  ).save_pretrained(directory)
  return tokenizer_lib.load(directory)


@pytest.fixture(scope="session", params=NAMES)
def real(request):
  directory = DATA / request.param
  if not directory.is_dir():
    pytest.skip(f"no {request.param} here")
  return tokenizer_lib.load(directory)


def test_prompt_has_one_bos_and_no_eos(small):
  """Bad input 30: ▁hi is 8; the template's </s> stays out."""
  assert small("hi")["input_ids"] == [1, 8, 2]
  assert tokenizer_lib.encode_prompt(small, "hi") == [1, 8]
  assert tokenizer_lib.encode_prompt(small, "") == [1]


def test_special_token_in_a_prompt_is_plain_text(small):
  """Bad inputs 25 and 30: "<s>" is ▁ < s >, and BOS is not doubled."""
  assert small("<s>hi")["input_ids"][:2] == [1, 1]
  assert tokenizer_lib.encode_prompt(small, "<s>hi") == [1, 3, 10, 12, 11, 7]
  ids = tokenizer_lib.encode_prompt(small, "hi</s>")
  assert ids == [1, 8, 10, 13, 12, 11]


def test_pieces_make_up_the_text(small):
  """The decoder strips the space in front of an id that stands alone."""
  ids = [7, 8, 1, 8]
  assert tokenizer_lib.decode(small, [8]) == "hi"
  assert tokenizer_lib.pieces(small, ids) == ["hi", " hi", "", " hi"]
  assert tokenizer_lib.pieces(small, []) == []


def test_pieces_of_a_long_text_take_time_as_its_ids_do(small, monkeypatch):
  """They were decoded from the first one on for each: 12 s for 8,192 ids."""
  ids = [7, 8, 5, 8, 9] * 200
  seen, decode = [], tokenizer_lib.decode

  def counted(tokenizer, ids):
    seen.append(len(ids))
    return decode(tokenizer, ids)

  monkeypatch.setattr(tokenizer_lib, "decode", counted)
  found = tokenizer_lib.pieces(small, ids)
  assert "".join(found) == decode(small, ids)
  assert sum(seen) < 40 * len(ids)
  # The same pieces as where all is decoded at once.
  monkeypatch.setattr(tokenizer_lib, "_WINDOW", 10**6)
  assert tokenizer_lib.pieces(small, ids) == found


def test_pieces_of_a_character_in_several_ids():
  """The last of them has all of it; a replacement character never shows."""
  vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
  backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
  backend.decoder = decoders.ByteFallback()  # pyright: ignore
  bytes_of = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
  ids = list("aéb".encode())
  assert tokenizer_lib.pieces(bytes_of, ids) == ["a", "", "é", "b"]


@pytest.mark.parametrize(
  "prompt, response, prompt_ids, response_ids",
  [
    ("hi", " hi", [1, 8], [8]),  # The joint ids: ▁hi ▁hi.
    ("hi", "hi", [1, 8], [7]),
    ("h", "i", [1, 9], [5]),  # Joint: ▁hi spans the border.
    ("", "hi", [1], [8]),
    ("hi", "", [1, 8], []),
  ],
)
def test_pair(small, prompt, response, prompt_ids, response_ids):
  pair = tokenizer_lib.encode_pair(small, prompt, response)
  assert pair == (prompt_ids, response_ids)


def test_decode_skips_special_tokens(small):
  assert tokenizer_lib.decode(small, [1, 8, 10, 2, 0]) == "hi<"


def test_tokenizer_larger_than_the_embedding_is_refused(small):
  """Bad input 27."""
  tokenizer_lib.check(small, 17, "here")
  with pytest.raises(errors.UserError, match=r"here: .* up to 16; at most 15"):
    tokenizer_lib.check(small, 16, "here")


def test_fingerprint_is_the_vocabulary(small, tmp_path):
  """Bad input 29: a token added, or two exchanged, changes it."""
  small.save_pretrained(tmp_path)
  same = tokenizer_lib.load(tmp_path)
  fingerprint = tokenizer_lib.fingerprint(small)
  assert tokenizer_lib.fingerprint(same) == fingerprint
  path = tmp_path / "tokenizer.json"
  content = json.loads(path.read_text())
  vocab = content["model"]["vocab"]
  vocab["o"], vocab["a"] = vocab["a"], vocab["o"]
  path.write_text(json.dumps(content))
  exchanged = tokenizer_lib.load(tmp_path)
  assert tokenizer_lib.fingerprint(exchanged) != fingerprint


@pytest.mark.parametrize(
  "generation, config, expected",
  [
    (None, None, (2,)),
    ([9, 1], 2, (2, 9, 1)),
    (7, [7, 3], (2, 7, 3)),
    ([], None, (2,)),
  ],
)
def test_stop_ids(small, tmp_path, generation, config, expected):
  """Trap 16: from wherever they are declared; the tokenizer's is the first.

  Texts to learn from end with it, and not with the smallest.
  """
  for name, eos in (("generation_config", generation), ("config", config)):
    content = json.dumps({"eos_token_id": eos})
    (tmp_path / f"{name}.json").write_text(content)
  assert tokenizer_lib.stop_ids(tmp_path, small) == expected


def test_stop_ids_refuse_what_is_no_id(small, tmp_path):
  (tmp_path / "config.json").write_text('{"eos_token_id": ["</s>"]}')
  with pytest.raises(errors.UserError, match=r"config\.json: eos_token_id"):
    tokenizer_lib.stop_ids(tmp_path, small)


def test_no_tokenizer_is_refused(tmp_path):
  with pytest.raises(errors.UserError, match="no tokenizer"):
    tokenizer_lib.load(tmp_path)
  with pytest.raises(errors.UserError, match="no tokenizer"):
    tokenizer_lib.load(tmp_path / "absent")


def test_damaged_tokenizer_is_refused(tmp_path):
  (tmp_path / "tokenizer.json").write_text('{"version": ')
  with pytest.raises(errors.UserError, match="cannot be read") as caught:
    tokenizer_lib.load(tmp_path)
  assert "\n" not in str(caught.value)


def test_code_beside_a_tokenizer_is_never_run(tmp_path):
  """Bad input 37."""
  (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
  config = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  with pytest.raises(errors.UserError, match="cannot be read"):
    tokenizer_lib.load(tmp_path)


@pytest.mark.parametrize(
  "prompt, response",
  [
    ("Once upon a time", ", there was a cat."),
    ("Once upon a ti", "me there"),
    ("Once", " upon"),
    ("Once ", "upon"),
    ("", "hi"),
    ("<s>x", "</s>y<|endoftext|><|im_start|>user"),
    ("a\n\n", "\n\nb"),
    ("don", "'t"),
    ("日", "本"),
    ("12", "34"),
  ],
)
def test_real_pairs_decode_to_the_joint_text(real, prompt, response):
  """Bad input 25: also where the text spells special tokens."""
  pair = tokenizer_lib.encode_pair(real, prompt, response)
  ids = pair[0] + pair[1]
  assert tokenizer_lib.decode(real, ids) == prompt + response
  special = {i for i in ids[1:] if i in real.all_special_ids}
  assert not special
  assert pair[0] == tokenizer_lib.encode_prompt(real, prompt)


def test_stories_prompt_begins_as_the_reference_does():
  """The stored torch run began with BOS and "Once upon a time"."""
  if not (DATA / "stories260K").is_dir():
    pytest.skip("no stories260K here")
  tokenizer = tokenizer_lib.load(DATA / "stories260K")
  ids = tokenizer_lib.encode_prompt(tokenizer, "Once upon a time")
  assert ids == [1, 403, 407, 261, 378]
  assert tokenizer_lib.stop_ids(DATA / "stories260K", tokenizer) == (2,)
