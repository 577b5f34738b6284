"""Rotary positions: the frequencies of every kind that checkpoints use.

A pair of a head's numbers turns by `position · frequency` (RoFormer,
arXiv:2104.09864). A model that was stretched to longer texts has its
frequencies scaled, in one of five ways:

- `linear`: all divided by a factor (arXiv:2306.15595).
- `dynamic`: as they were up to the model's length, and stretched beyond it.
- `yarn`: slow pairs divided, fast ones kept, a ramp between (arXiv:2309.00071).
- `longrope`: each divided by a number of its own, one set for texts up to the
  original length and one for longer ones (arXiv:2402.13753).
- `llama3`: as `yarn`, with bounds on wavelengths (arXiv:2407.21783).

Left out: frequencies that change with a text's length. `dynamic` and `longrope`
have them, and there a token's probability would depend on how much was written
after it was scored: the sampler and the learner would disagree. Such models run
up to `longest`, where the frequencies are constant.
"""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

Kind = Literal["linear", "dynamic", "yarn", "longrope", "llama3"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
  """How the frequencies were stretched; None where a kind has no such number.

  Attributes:
    kind: See the module's docstring.
    factor: How much longer the texts became; None is the model's length over
      the original one.
    original_max_length: Before the stretching.
    attention_factor: What cosine and sine are multiplied by; None is the
      kind's own formula.
    low_frequency_factor: llama3: turns within the original length below which
      a pair is divided by the factor.
    high_frequency_factor: llama3: turns above which it is kept.
    beta_fast: yarn: turns above which a pair is kept.
    beta_slow: yarn: turns below which it is divided.
    mscale: yarn: of the attention factor's formula.
    mscale_all_dim: yarn: what that is divided by.
    truncate: yarn: whether the ramp's ends are whole pairs.
    short_factor: longrope: a divisor a pair.
    long_factor: longrope: the same for longer texts; kept, and not used.
  """

  kind: Kind
  factor: float | None = None
  original_max_length: int | None = None
  attention_factor: float | None = None
  low_frequency_factor: float | None = None
  high_frequency_factor: float | None = None
  beta_fast: float | None = None
  beta_slow: float | None = None
  mscale: float | None = None
  mscale_all_dim: float | None = None
  truncate: bool | None = None
  short_factor: tuple[float, ...] | None = None
  long_factor: tuple[float, ...] | None = None


def longest(scaling: RopeScaling | None, max_length: int) -> int:
  """The longest text whose frequencies do not depend on its length."""
  if scaling is not None and scaling.kind == "longrope":
    return min(scaling.original_max_length or max_length, max_length)
  return max_length


def frequencies(
  size: int, theta: float, scaling: RopeScaling | None, max_length: int
) -> tuple[Float[Array, "K2"], float]:
  """Radians per position of each pair, and the factor of cosine and sine.

  Args:
    size: Numbers of a head that turn; even.
    theta: The base of the wavelengths.
    scaling: None leaves them as they are.
    max_length: The model's.
  """
  half = size // 2
  plain = 1.0 / theta ** (jnp.arange(half, dtype=jnp.float32) / half)
  if scaling is None or scaling.kind == "dynamic":
    return plain, 1.0
  factor = scaling.factor
  if factor is None:
    factor = max_length / (scaling.original_max_length or max_length)
  if scaling.kind == "linear":
    return plain / factor, 1.0
  if scaling.kind == "longrope":
    divisors = jnp.asarray(scaling.short_factor, jnp.float32)
    return plain / divisors, _longrope_attention(scaling, factor)
  if scaling.kind == "yarn":
    keep = _yarn_kept(scaling, size, theta)
    stretched = plain * (keep + (1 - keep) / factor)
    return stretched, _yarn_attention(scaling, factor)
  keep = _llama3_kept(scaling, plain)
  return plain * (keep + (1 - keep) / factor), 1.0


def _llama3_kept(scaling, plain):
  """How much of each pair's frequency is kept, between 0 and 1."""
  turns = scaling.original_max_length * plain / (2 * math.pi)
  span = scaling.high_frequency_factor - scaling.low_frequency_factor
  return jnp.clip((turns - scaling.low_frequency_factor) / span, 0.0, 1.0)


def _yarn_kept(scaling, size, theta):
  """How much of each pair's frequency is kept, between 0 and 1."""

  def pair(turns):
    """The pair, a fraction, that turns so often within the original length."""
    wavelength = scaling.original_max_length / (turns * 2 * math.pi)
    return size * math.log(wavelength) / (2 * math.log(theta))

  low, high = pair(scaling.beta_fast or 32), pair(scaling.beta_slow or 1)
  if scaling.truncate is not False:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, size - 1)
  high += 0.001 * (low == high)  # The formula's own guard.
  ramp = (jnp.arange(size // 2, dtype=jnp.float32) - low) / (high - low)
  return 1 - jnp.clip(ramp, 0.0, 1.0)


def _yarn_attention(scaling, factor) -> float:
  if scaling.attention_factor is not None:
    return scaling.attention_factor
  of = lambda scale: 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1
  if scaling.mscale and scaling.mscale_all_dim:
    return of(scaling.mscale) / of(scaling.mscale_all_dim)
  return of(1.0)


def _longrope_attention(scaling, factor) -> float:
  if scaling.attention_factor is not None:
    return scaling.attention_factor
  return longrope_attention(scaling, factor)


def longrope_attention(scaling: RopeScaling, factor: float) -> float:
  """What cosine and sine are multiplied by where nothing else is said."""
  if factor <= 1:
    return 1.0
  original = scaling.original_max_length or factor
  return math.sqrt(1 + math.log(factor) / math.log(original))
