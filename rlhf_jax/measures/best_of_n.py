"""Best-of-n: the reward that choosing among n samples buys, and its KL.

Of n independent samples of a policy the one with the highest proxy score is
kept (ties: any of them, as likely). With N ≥ n samples a prompt, everything is
estimated from all subsets of size n at once and not from one of them.
"""

from collections.abc import Sequence
import dataclasses
import math

from jaxtyping import Float
import numpy as np
from scipy import stats


@dataclasses.dataclass(frozen=True)
class BestOfN:
  """What n samples buy, as means over prompts with standard errors.

  Attributes:
    n: Samples to choose among.
    proxy: Proxy score of the chosen one.
    gold: Its gold, where there is one.
    kl_bound: log n − (n − 1)/n, nats per response: the KL to the policy where
      no two samples tie, an upper bound where some do (Beirami et al. 2024,
      arXiv:2401.01879).
    kl_estimate: Of that KL, from the samples; see `kl_to_policy`.
  """

  n: int
  proxy: float
  proxy_se: float
  gold: float | None
  gold_se: float | None
  kl_bound: float
  kl_estimate: float
  kl_estimate_se: float


def best_of_n(
  proxy: Float[np.ndarray, "M N"],
  gold: Float[np.ndarray, "M N"] | None,
  ns: Sequence[int],
) -> list[BestOfN]:
  """Best-of-n for each n in `ns`, from N samples of each of M prompts.

  Proxy and gold are unbiased. Errors are over prompts, so M ≥ 2.

  Raises:
    ValueError: There are fewer than two prompts, or an n is not in [1, N].
  """
  if len(proxy) < 2:
    raise ValueError(f"{len(proxy)} prompts; an error needs at least 2")
  results = []
  for n in ns:
    weights = np.stack([_chances(scores, n) for scores in proxy])
    of_proxy = (weights * proxy).sum(1)
    of_gold = None if gold is None else (weights * gold).sum(1)
    kl = np.array([kl_to_policy(scores, n) for scores in proxy])
    results.append(
      BestOfN(
        n=n,
        proxy=float(of_proxy.mean()),
        proxy_se=float(stats.sem(of_proxy)),
        gold=None if of_gold is None else float(of_gold.mean()),
        gold_se=None if of_gold is None else float(stats.sem(of_gold)),
        kl_bound=math.log(n) - (n - 1) / n,
        kl_estimate=float(kl.mean()),
        kl_estimate_se=float(stats.sem(kl)),
      )
    )
  return results


def kl_to_policy(scores: Float[np.ndarray, "N"], n: int) -> float:
  """KL(best-of-n ‖ policy) on one prompt by the samples' scores, nats.

      Σ_g p_n(g) log(p_n(g) / m(g)),   p_n(g) = F(g)^n − F(g−)^n

  over the distinct scores g, with m and F their shares and cumulative shares.
  That is the whole KL and no bound on it: given its score, the response that
  is kept is distributed as the policy's.

  A plug-in: the samples stand for the distribution, so it is biased by
  O(1/N), and mostly low. Of continuous scores (no ties) with N = 4, 16, 64 it
  misses 0.019, 0.0016 and 0.0001 nats of the 0.193 of n = 2, and of five
  scores as likely as each other 0.10, 0.023 and 0.005 of the 0.607 of n = 4.

  Args:
    scores: Of N samples.
    n: Samples to choose among; may exceed N.
  """
  _, counts = np.unique(scores, return_counts=True)
  shares = counts / len(scores)
  chosen = np.diff((np.cumsum(counts) / len(scores)) ** n, prepend=0.0)
  # The lowest score's chance may underflow: 0 · log 0 counts as 0.
  real = chosen > 0
  return float((chosen[real] * np.log(chosen[real] / shares[real])).sum())


def _chances(scores: Float[np.ndarray, "N"], n: int) -> Float[np.ndarray, "N"]:
  """How likely each sample is to be the best of a random subset of size n.

  The i-th lowest of N is best in C(i − 1, n − 1) of the C(N, n) subsets; ties
  share what they have together.
  """
  size = len(scores)
  if not 1 <= n <= size:
    raise ValueError(f"n = {n}; wanted 1 to the {size} samples of a prompt")
  subsets = math.comb(size, n)
  by_rank = [math.comb(rank, n - 1) / subsets for rank in range(size)]
  _, group, counts = np.unique(scores, return_inverse=True, return_counts=True)
  of_group = np.bincount(np.sort(group), weights=by_rank) / counts
  return of_group[group]
