"""Every family against its own implementation in torch, in both directions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.models import convert, families, transformer
from rlhf_jax.objective import logprobs
from tests.models import zoo

TOKENS = np.random.default_rng(0).integers(1, 13, (2, zoo.LENGTH))


def load(directory):
  return convert.load(directory, unroll=0, remat=False, compute_dtype="float32")


def save(directory, params, config, **options):
  ids = {"stop_ids": (2, 5), "pad_id": 0, "bos_id": 1}
  convert.save(directory, params, config, **ids, **options)


def torch_model(name, *, reward_model=False):
  """A tiny torch model with every parameter random, biases and norms too."""
  torch = pytest.importorskip("torch")
  import transformers

  kind = transformers.AutoModelForCausalLM
  config = zoo.CONFIGS[name]
  if reward_model:
    kind = transformers.AutoModelForSequenceClassification
    config = type(config).from_dict(config.to_dict() | {"num_labels": 1})
  model = kind.from_config(config, attn_implementation="eager").eval()
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.normal_(0.0, 0.2, generator=generator)
  return model


def torch_again(kind, directory):
  """Loads what we wrote, and requires a perfect fit."""
  model, info = kind.from_pretrained(
    directory, output_loading_info=True, attn_implementation="eager"
  )
  for name in ("missing_keys", "unexpected_keys", "mismatched_keys"):
    assert not info[name], (name, info[name])
  return model.eval()


def hidden(params, config, tokens):
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  mask = jnp.tril(jnp.ones((*tokens.shape, tokens.shape[1]), bool))
  x, _ = transformer.apply(
    params, jnp.asarray(tokens), config=config, positions=positions, mask=mask
  )
  return x


def logits(params, config, tokens):
  params = jax.tree.map(jnp.asarray, params)
  return logprobs.token_logits(
    hidden(params, config, tokens),
    transformer.head(params, config),
    temperature=1.0,
  )


def loss(params, config, tokens):
  """Mean over the tokens of −log p."""
  found = logits(params, config, tokens)[:, :-1]
  each = optax.softmax_cross_entropy_with_integer_labels(found, tokens[:, 1:])
  return each.mean()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
  """By name, made once: a torch model, ours of it, the directory between."""
  made = {}

  def of(name):
    if name not in made:
      model = torch_model(name)
      directory = tmp_path_factory.mktemp(name)
      model.save_pretrained(directory)
      made[name] = model, load(directory), directory
    return made[name]

  return of


@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_logits_and_round_trip(name, pairs, tmp_path):
  """1e-5 in float32; what we write has the same bits, and gives the same."""
  torch = pytest.importorskip("torch")
  model, (params, config), _ = pairs(name)
  with torch.no_grad():
    wanted = model(torch.as_tensor(TOKENS)).logits.numpy()
  found = logits(params, config, TOKENS)
  assert wanted.std() > 0.05
  np.testing.assert_allclose(found, wanted, atol=1e-5)
  save(tmp_path, params, config)
  again = torch_again(type(model), tmp_path)
  states = [{k: v for k, v in m.state_dict().items()} for m in (again, model)]
  assert states[0].keys() == states[1].keys()
  for key, tensor in states[1].items():
    np.testing.assert_array_equal(states[0][key].numpy(), tensor.numpy())
  assert again.generation_config.eos_token_id == [2, 5]
  with torch.no_grad():  # The config came back too, not only the weights.
    found = again(torch.as_tensor(TOKENS)).logits.numpy()
  np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_greedy_tokens(name, pairs):
  """With a cache, beside a shorter prompt, as the sampler decodes."""
  model, (params, config), _ = pairs(name)
  prompts = [TOKENS[0, :3], TOKENS[1, :7]]
  found = greedy(params, config, prompts, 12)
  np.testing.assert_array_equal(found, torch_greedy(model, prompts, 12))


def torch_greedy(model, prompts, count):
  """Each prompt by itself."""
  import torch

  return [
    model.generate(
      torch.as_tensor(prompt[None]),
      max_new_tokens=count,
      do_sample=False,
      eos_token_id=None,
      pad_token_id=0,
    )[0, len(prompt) :].numpy()
    for prompt in prompts
  ]


def greedy(params, config, prompts, count):
  """Left-padded rows, one token at a time."""
  params = jax.tree.map(jnp.asarray, params)
  size = max(map(len, prompts))
  lengths = np.array([len(prompt) for prompt in prompts])
  tokens = np.zeros((len(prompts), size), np.int32)
  for row, prompt in enumerate(prompts):
    tokens[row, size - len(prompt) :] = prompt
  begin = size - lengths
  total = size + count
  slots = np.arange(total)

  @jax.jit
  def apply(params, tokens, cache, index):
    at = index + jnp.arange(tokens.shape[1])
    mask = (slots <= at[:, None]) & (slots >= begin[:, None, None])
    x, cache = transformer.apply(
      params,
      tokens,
      config=config,
      positions=jnp.maximum(at - begin[:, None], 0),
      mask=mask,
      cache=cache,
      index=index,
    )
    scores = logprobs.token_logits(
      x[:, -1], transformer.head(params, config), temperature=1.0
    )
    return scores.argmax(-1).astype(jnp.int32), cache

  cache = transformer.init_cache(config, len(prompts), total)
  token, cache = apply(params, jnp.asarray(tokens), cache, 0)
  found = [token]
  for index in range(size, total - 1):
    token, cache = apply(params, token[:, None], cache, index)
    found.append(token)
  return np.stack(found, axis=1)


@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_training_gradient(name, pairs):
  """Of every weight, by its name there."""
  torch = pytest.importorskip("torch")
  model, (params, config), _ = pairs(name)
  model.zero_grad()
  found_logits = model(torch.as_tensor(TOKENS)).logits[:, :-1]
  torch.nn.functional.cross_entropy(
    found_logits.reshape(-1, 13), torch.as_tensor(TOKENS[:, 1:]).reshape(-1)
  ).backward()
  gradient = jax.jit(jax.grad(lambda p: loss(p, config, TOKENS)))(
    jax.tree.map(jnp.asarray, params)
  )
  (family,) = [
    family
    for family in families.FAMILIES
    if family.model_type == zoo.CONFIGS[name].model_type
  ]
  found = families.layouts.to_hf(
    jax.tree.map(np.asarray, gradient), family.weights
  )
  named = {"lm_head.weight": "embed_out.weight"}  # In GPT-NeoX's files.
  wanted = {
    key if key in found else named[key]: p.grad.numpy()
    for key, p in model.named_parameters()
    if p.requires_grad
  }
  assert found.keys() == wanted.keys()
  largest = max(np.abs(x).max() for x in wanted.values())
  for key, x in wanted.items():
    np.testing.assert_allclose(found[key], x, atol=1e-4 * largest, err_msg=key)


@pytest.mark.parametrize("name", zoo.PLAIN.values())
def test_reward_model(name, tmp_path):
  torch = pytest.importorskip("torch")
  model = torch_model(name, reward_model=True)
  model.save_pretrained(tmp_path / "theirs")
  params, config = load(tmp_path / "theirs")
  params = jax.tree.map(jnp.asarray, params)
  with torch.no_grad():
    wanted = model(torch.as_tensor(TOKENS)).logits[:, 0].numpy()
  last = hidden(params["transformer"], config, TOKENS)[:, -1]
  found = transformer.apply_scalar_head(params["score_head"], last)
  np.testing.assert_allclose(found, wanted, atol=1e-5)
  save(tmp_path / "ours", params, config)
  again = torch_again(type(model), tmp_path / "ours")
  with torch.no_grad():
    found = again(torch.as_tensor(TOKENS)).logits[:, 0].numpy()
  np.testing.assert_array_equal(found, wanted)


# Without torch.


@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_scanned_layers_are_the_unrolled_ones(name):
  """Kinds of layers too: what differs from layer to layer is scanned along."""
  hf = zoo.CONFIGS[name].to_dict() | {"architectures": None}
  read = lambda unroll: families.config_from_hf(
    hf, where="", unroll=unroll, remat=unroll == 1, compute_dtype="float32"
  )
  shapes = jax.eval_shape(lambda: transformer.init(jax.random.key(0), read(0)))
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), jnp.float32), shapes
  )
  one, other = (hidden(params, read(unroll), TOKENS) for unroll in (0, 1))
  np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_every_field_is_read_or_refused_or_changes_nothing(name):
  """All that `transformers` knows of a family; a new field must be placed."""
  config = zoo.CONFIGS[name]
  (family,) = [
    f for f in families.FAMILIES if f.model_type == config.model_type
  ]
  known = {
    *family.fields.values(),
    *family.only,
    *family.named,
    *family.inert,
    *(field for reader in family.readers for field in reader.names),
  }
  import transformers

  given = set(config.to_dict())
  of_all = set(transformers.PreTrainedConfig().to_dict())
  assert given - of_all - known == set()


def test_every_family_has_a_model_here():
  """Step five of adding one; the names are those of `transformers`."""
  import transformers

  mapping = transformers.models.auto.modeling_auto
  for family in families.FAMILIES:
    assert family.model_type in zoo.PLAIN, family.model_type
    kinds = (
      (mapping.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, family.language_model),
      (
        mapping.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        family.reward_model,
      ),
    )
    for names, ours in kinds:
      theirs = names[family.model_type]
      assert ours in (theirs, *(theirs if isinstance(theirs, tuple) else ()))
