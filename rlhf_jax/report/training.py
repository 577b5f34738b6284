"""What the report shows of a run or a sweep: figures, curves, samples."""

from collections.abc import Iterable, Iterator, Sequence
import math
from typing import Any

from rlhf_jax.report import found, html, plots

Runs = Sequence[found.Run]

# What is looked at first, in this order, and what it is.
_FIGURES = {
  "reward/score": "proxy: the score that is trained on",
  "reward/gold": "gold: the true reward",
  "kl/reverse_exact": "KL(π‖π_ref), nats per response",
  "kl/forward_exact": "KL(π_ref‖π) in the policy's states, nats per response",
  "kl/beta": "β, reward units per nat",
  "ppo/entropy": "entropy, nats per token",
  "rollout/response_tokens": "length of a response, tokens",
  "rollout/truncated_fraction": "share of responses that did not stop",
}
_ENDINGS = ("loss", "accuracy", "margin")  # Of figures that come after these.
_OF_MEMBERS = (
  "reward/score",
  "reward/gold",
  "kl/reverse_exact",
  "kl/forward_exact",
  "ppo/entropy",
  "rollout/response_tokens",
)
_MEANS = (
  "Of what is recorded at every step, the mean over the last ten; ± is a "
  "standard error over responses."
)
_FRONTIER = {
  "members": "On held-out prompts: members, ± standard errors over responses.",
  "by_beta": "On held-out prompts: means by β, with 95 % intervals.",
  "best_of_n": (
    "The baseline: the best of n samples of the reference by proxy; KL in nats "
    "per response, the upper bound and the estimate."
  ),
}
_SAMPLES = 12  # of a run, or about, at no more than so many steps:
_STEPS = 6
_SHADES = (0.25, 0.75, 1.5, 3.0)  # nats from which on a tint is stronger


def show(run: found.Run) -> Iterator[html.Node]:
  """Figures, the frontier, curves and samples."""
  yield from (_members(run) if run.members else _figures(run))
  if run.figure or run.frontier:
    yield html.tag("h4", "Frontier")
    yield from _frontier(run)
  runs = run.members or [run]
  yield from _curves(runs)
  for each in runs:
    if each.samples:
      yield _samples(each, is_open=each is runs[0])


def state(run: found.Run) -> html.Node:
  """Whether the run has ended, or how far it came."""
  if run.ended:
    return html.tag("span", "ended", class_="badge ended")
  done = [row["step"] + 1 for each in (run, *run.members) for row in each.rows]
  text = (
    f"unfinished: {max(done)} of {run.steps} steps" if done else "unfinished"
  )
  return html.tag("span", text, class_="badge unfinished")


def _members(run: found.Run) -> Iterator[html.Node]:
  """A sweep's members by β."""
  has = lambda name: any(name in member.metrics for member in run.members)
  names = [name for name in _OF_MEMBERS if has(name)]
  rows = [
    [
      _swatch(colour),
      f"{member.beta:g}",
      str(member.seed),
      *(html.figure(member.metrics, name) for name in names),
      state(member),
    ]
    for member, colour in zip(run.members, _colours(run.members))
  ]
  columns = ["", "β", "seed", *names, "state"]
  yield html.table(columns, rows, caption=_MEANS)


def _figures(run: found.Run) -> Iterator[html.Node]:
  """A run's means: those of interest, and the others folded away."""
  first = _in_order(run.metrics)
  others = [n for n in run.metrics if n not in first and not n.endswith("_se")]
  row = lambda name: [
    html.tag("span", html.tag("code", name), f" {_FIGURES.get(name, '')}"),
    html.figure(run.metrics, name),
  ]
  columns = ["figure", "mean"]
  if first:
    caption = _MEANS if run.rows else ""
    yield html.table(columns, map(row, first), caption=caption)
  elif run.kind != "pipeline":
    yield html.tag("p", "No step is recorded yet.")
  if others:
    table = html.table(columns, map(row, others))
    # An evaluation has no curves: its figures are all that there is.
    yield html.details(
      f"{len(others)} more figures", table, is_open=not run.rows
    )


def _frontier(run: found.Run) -> Iterator[html.Node]:
  """The recommended β, the picture, and figures on held-out prompts."""
  frontier = run.frontier or {}
  if advice := frontier.get("recommendation"):
    text = advice["text"] if isinstance(advice, dict) else str(advice)
    words = html.tag("strong", "Recommendation. ")
    yield html.tag("p", words, text, class_="text")
  if run.figure:
    yield html.image(run.figure, "png", "The reward against the KL, by β")
  for name, caption in _FRONTIER.items():
    if rows := frontier.get(name):
      # Texts have a table of their own, below.
      figures = [
        {key: value for key, value in row.items() if key != "sample"}
        for row in rows
      ]
      yield html.records(figures, caption=caption)


def _curves(runs: Runs) -> Iterator[html.Node]:
  """A picture of each figure that some run recorded; one legend for all."""
  curves = [
    plots.Curve(run.rows, colour) for run, colour in zip(runs, _colours(runs))
  ]
  recorded = {name for run in runs for row in run.rows for name in row}
  names = _in_order(recorded)
  if not names:
    return
  yield html.tag("h4", "Curves")
  legend = {f" β = {run.beta:g}": c.colour for run, c in zip(runs, curves)}
  if len(legend) == 1:
    legend = {}
  entries = (
    html.tag("span", _swatch(colour), label, class_="entry")
    for label, colour in legend.items()
  )
  note = "Bands: 95 % intervals over the responses of a step."
  has_bands = any(f"{name}_se" in recorded for name in names)
  yield html.tag("p", *entries, note * has_bands, class_="faint")
  yield html.tag("div", *(_curve(n, curves) for n in names), class_="curves")


def _curve(name: str, curves: Sequence[plots.Curve]) -> html.Node:
  picture = plots.draw(name, curves)
  about = html.tag("span", html.tag("code", name), f" {_FIGURES.get(name, '')}")
  return html.tag(
    "figure",
    html.tag("figcaption", about),
    html.image(picture, "svg+xml", f"{name} by step"),
  )


def _in_order(names: Iterable[str]) -> list[str]:
  """The figures of interest among the names."""
  names = set(names)
  others = {name for name in names if name.endswith(_ENDINGS)}
  return [n for n in _FIGURES if n in names] + sorted(others - _FIGURES.keys())


def _colours(runs: Runs) -> list[str]:
  return plots.colours([run.beta for run in runs])


def _swatch(colour: str) -> html.Node:
  return html.tag("span", class_="swatch", style=f"background: {colour}")


def _samples(run: found.Run, *, is_open: bool) -> html.Node:
  """Responses at evenly spaced steps, tokens tinted by their log-ratio."""
  steps = sorted({record["step"] for record in run.samples})
  last = len(steps) - 1
  spaced = sorted(
    {steps[round(last * i / (_STEPS - 1))] for i in range(_STEPS)}
  )
  rows = []
  for step in spaced:
    of_step = [record for record in run.samples if record["step"] == step]
    rows += map(_sample, of_step[: _SAMPLES // len(spaced)])
  return html.details(
    f"Samples of β = {run.beta:g}, seed {run.seed}: {len(rows)} of the "
    f"{len(run.samples)} that are recorded",
    _legend(),
    html.table(["step", "prompt", "response", "score", "KL, nats"], rows),
    is_open=is_open,
  )


def _sample(record: dict[str, Any]) -> list[html.Node]:
  """A row: the response, and the tints of its tokens."""
  pairs = zip(record["logprobs"], record["reference_logprobs"])
  ratios = [policy - reference for policy, reference in pairs]
  if "tokens" in record:
    tinted = map(_tinted, record["tokens"], ratios)
    response = [html.tag("span", *tinted, class_="tokens")]
  else:
    cells = (_tinted("", ratio) for ratio in ratios)
    response = [record["response"], html.tag("span", *cells, class_="strip")]
  return [
    str(record["step"]),
    html.tag("span", record["prompt"], class_="words"),
    html.tag("div", *response, class_="words"),
    html.cell(record["score"]),
    html.cell(sum(record["reverse_kl"])),
  ]


def _tinted(text: str, ratio: float) -> html.Node:
  """A token on orange where the policy likes it more, on blue where less."""
  return html.tag("span", text, class_=_tint(ratio), title=f"{ratio:+.2f}")


def _tint(ratio: float) -> str:
  if math.isnan(ratio):
    return "nan"
  shade = sum(abs(ratio) >= bound for bound in _SHADES)
  return f"{'more' if ratio > 0 else 'less'}-{shade}" if shade else "same"


def _legend() -> html.Node:
  bounds = [*(-bound for bound in reversed(_SHADES)), 0.0, *_SHADES]
  shades = (
    html.tag("span", f"{bound:+g}" if bound else "0", class_=_tint(bound))
    for bound in bounds
  )
  return html.tag(
    "p",
    html.tag("span", *shades, class_="legend"),
    " log π − log π_ref of each token, nats: orange where the policy likes it "
    "more than the reference does, blue where less. Where the tokens' own texts"
    " are not recorded, the strip below a response has a cell for each. KL is "
    "the response's KL(π‖π_ref), summed over its tokens.",
    class_="faint",
  )
