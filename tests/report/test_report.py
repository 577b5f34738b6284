"""The report: what it shows, that texts stay texts, and what it refuses."""

import base64
import datetime
from html import parser as html_parser
import json
import math
import os
import re
import shutil
import unicodedata

import pytest

from configs import defaults
from rlhf_jax import errors
from rlhf_jax.report import html, plots, writing
from rlhf_jax.storage import workdir as workdir_lib

PNG = b"\x89PNG\r\n\x1a\n" + b"picture"
TAGS = {"html", "head", "meta", "title", "style", "body", "section", "nav"}
TAGS |= {"h1", "h2", "h3", "h4", "p", "div", "span", "a", "code", "strong"}
TAGS |= {"table", "thead", "tbody", "tr", "th", "td", "details", "summary"}
TAGS |= {"figure", "figcaption", "img", "blockquote", "footer"}


class Page(html_parser.HTMLParser):
  """A page as a browser reads it: elements, their attributes, the words."""

  def __init__(self, text):
    super().__init__()
    self.elements, self.words, self._inside = [], [], []
    self.feed(text)
    self.text = " ".join(" ".join(self.words).split())

  def handle_starttag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))
    if tag not in ("meta", "img"):
      self._inside.append(tag)

  def handle_endtag(self, tag):
    assert self._inside.pop() == tag

  def handle_data(self, data):
    if self._inside and self._inside[-1] != "style":
      self.words.append(data)

  def all(self, tag):
    return [attributes for name, attributes in self.elements if name == tag]

  def classes(self):
    return [attrs["class"] for _, attrs in self.elements if "class" in attrs]


def default_config(config):
  return defaults.get_config().to_dict()


def read(path, *others, output=None):
  """The page of these workdirs."""
  writing.run([str(path), *map(str, others)], output, defaults=default_config)
  return Page((path / "report.html").read_text(encoding="utf-8"))


def row(step, score, gold=None):
  figures = {"reward/score": score, "reward/score_se": 0.5, "kl/beta": 0.1}
  return (step, figures | ({} if gold is None else {"reward/gold": gold}))


def sample(**changes):
  return {
    "step": 0,
    "prompt": "the film",
    "response": "was good .",
    "score": 1.5,
    "logprobs": [-1.0, -2.0, -0.5, 0.0],
    "reference_logprobs": [-1.0, -1.0, -4.0, -0.5],
    "reverse_kl": [0.25, 0.5, 1.0, 0.0],
  } | changes


def make(path, *overrides, rows=(), samples=(), ended=True, **files):
  """A workdir that a run could have left."""
  config = defaults.get_config()
  defaults.apply_overrides(config, overrides)
  with workdir_lib.Workdir.open(path, config.to_dict(), resume=False) as opened:
    for step, scalars in rows:
      opened.append_metrics(step, scalars)
    opened.append_samples(list(samples))
    if ended:
      opened.write_summary(
        {"stage": config.stage, "seed": 0, "steps": 2, "wall_s": 12.0}
        | ({"metrics": opened.mean_of_last()} if rows else {})
        | files
      )
  return path


def make_study(path, verdict="holds", *, ended=True):
  config = {"study": path.name, "claim": "It is so.", "seed": 3}
  workdir_lib.Workdir.open(path, config, resume=False).close()
  if ended:
    table = {
      "caption": "Of all arms",
      "columns": ["arm", "gold"],
      "rows": [["with", 1.25], ["without", None]],
      "shown": True,
    }
    study = {
      "study": path.name,
      "claim": "It is so.",
      "source": "Somebody 2022",
      "seed": 3,
      "wall_s": 61.2,
      "verdict": verdict,
      "paragraph": "What was found.",
      "tables": {"a": table, "b": table | {"caption": "Aside", "shown": False}},
    }
    (path / "study.json").write_text(json.dumps(study))
    (path / "figure.png").write_bytes(PNG)
  return path


def make_sweep(path, betas=(0.1, 0.0, 10.0, 2.0), **options):
  make(path, f"sweep.betas={betas}", **options)
  for beta in betas:
    rows = [row(step, beta + step) for step in range(2)]
    make(path / f"beta={beta:g}", f"kl.beta={beta}", rows=rows)
  return path


def refused(path, match, **options):
  """One line, and nothing on disk has changed."""
  before = snapshot(path.parent)
  with pytest.raises(errors.UserError, match=match) as caught:
    read(path, **options)
  assert "\n" not in str(caught.value)
  assert snapshot(path.parent) == before


def snapshot(directory):
  files = sorted(directory.rglob("*"))
  return [(p, p.lstat().st_mtime_ns, p.is_file()) for p in files]


def svgs(page):
  head = "data:image/svg+xml;base64,"
  return {
    image["alt"].removesuffix(" by step"): base64.b64decode(
      image["src"].removeprefix(head)
    )
    for image in page.all("img")
    if image["src"].startswith(head)
  }


def test_a_run(tmp_path):
  """Means of the last steps: (1 + 2)/2 ± 0.5; the figure's name; the facts."""
  rows = [row(0, 1.0, gold=-3.0), row(1, 2.0, gold=-3.0)]
  page = read(
    make(tmp_path / "run", "kl.beta=0.3", rows=rows, samples=[sample()])
  )
  assert "1.50 ± 0.50" in page.text.replace("\xa0", " ")
  assert "reward/gold gold: the true reward −3" in page.text
  assert "ended ppo · seed 0 · took 12 s" in page.text
  assert list(svgs(page)) == ["reward/score", "reward/gold", "kl/beta"]
  fields = len(list(report_fields(default_config({}))))
  assert f"1 of {fields} fields differ from the defaults" in page.text
  assert "kl.beta 0.3 0.05" in page.text


def report_fields(config):
  for value in config.values():
    yield from report_fields(value) if isinstance(value, dict) else [value]


def test_nothing_comes_from_elsewhere(tmp_path):
  page = read(
    make_sweep(tmp_path / "sweep", samples=[sample()]),
    make_study(tmp_path / "study"),
  )
  policies = [m for m in page.all("meta") if "http-equiv" in m]
  assert policies[0]["http-equiv"] == "Content-Security-Policy"
  assert policies[0]["content"].startswith(
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
  )
  assert {tag for tag, _ in page.elements} <= TAGS
  assert all(
    image["src"].startswith("data:image/") for image in page.all("img")
  )
  names = {attrs["id"] for _, attrs in page.elements if "id" in attrs}
  assert names == {"run-0", "run-1"}
  assert {link["href"] for link in page.all("a")} == {"#run-0", "#run-1"}
  for _, attributes in page.elements:
    assert not any(name.startswith("on") for name in attributes)
  text = (tmp_path / "sweep" / "report.html").read_text()
  assert "url(" not in text and "@import" not in text


@pytest.mark.parametrize(
  ("text", "shown"),
  [
    ("<script>alert(1)</script>", "<script>alert(1)</script>"),
    (
      "</textarea><img src=x onerror=alert(1)>",
      "</textarea><img src=x onerror",
    ),
    ("javascript:alert(1)", "javascript:alert(1)"),
    ("</td></style></title><!--", "</td></style></title><!--"),
    ('" onclick="alert(1)', '" onclick="alert(1)'),
    ("&lt;b&gt;&amp;", "&lt;b&gt;&amp;"),
    ("\x1b[2J\x1b]8;;x\x07", r"\x1b[2J\x1b]8;;x\x07"),
    ("a\u202eb\u2066c\u200bd", r"a\u202eb\u2066c\u200bd"),
    ("nul\0 lone \ud800 tab\t", r"nul\x00 lone \ud800 tab\t"),
  ],
)
@pytest.mark.parametrize("place", ["prompt", "response", "tokens"])
def test_a_models_text_stays_text(text, shown, place, tmp_path):
  """Bad input 50."""
  value = [text, "", "", ""] if place == "tokens" else text
  page = read(make(tmp_path / "run", samples=[sample(**{place: value})]))
  assert shown in page.text
  assert {tag for tag, _ in page.elements} <= TAGS
  raw = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
  hidden = {c for c in raw if unicodedata.category(c) in ("Cc", "Cf", "Cs")}
  assert hidden == {"\n"}


def test_names_of_files_and_figures_stay_text(tmp_path):
  """Bad input 50: a config, a metric and a study are written by others, too."""
  odd = "<b onclick=x>&\u202e$\\frac"
  shown = r"<b onclick=x>&\u202e$\frac"
  run = make(
    tmp_path / "a<b>&", f"policy.path={odd}", rows=[(0, {f"{odd}_loss": 1.0})]
  )
  study = make_study(tmp_path / "study", verdict=f"holds when {odd}")
  page = read(run, study)
  assert page.text.count(shown) >= 3
  assert "a<b>&" in page.text
  assert {tag for tag, _ in page.elements} <= TAGS


def test_secrets_stay_where_they_are(tmp_path, monkeypatch):
  """Bad input 51."""
  monkeypatch.setenv("HF_TOKEN", "canary-of-the-environment")
  config = defaults.get_config().to_dict() | {"hf_token": "canary-of-a-field"}
  workdir_lib.Workdir.open(tmp_path / "run", config, resume=False).close()
  page = read(tmp_path / "run")
  assert "hf_token" in page.text and '"***"' in page.text
  for file in (tmp_path / "run").iterdir():
    assert b"canary" not in file.read_bytes()


def test_refuses_what_is_no_workdir(tmp_path):
  """Bad input 52: missing, a file, empty, foreign, half a config."""
  refused(tmp_path / "none", "none' is no directory")
  (tmp_path / "file").write_text("mine")
  refused(tmp_path / "file", "file' is no directory")
  (tmp_path / "empty").mkdir()
  refused(tmp_path / "empty", "empty: no run in it")
  (tmp_path / "foreign").mkdir()
  (tmp_path / "foreign" / "config.json").write_text('{"model_type": "llama"}')
  refused(tmp_path / "foreign", "foreign: no run in it")
  (tmp_path / "half").mkdir()
  (tmp_path / "half" / "config.json").write_text('{"stage": "pp')
  refused(tmp_path / "half", r"half/config\.json: damaged")
  (tmp_path / "other").mkdir()
  (tmp_path / "other" / "config.json").write_text('{"stage": "build"}')
  refused(tmp_path / "other", r"other/config\.json: sweep: missing")
  make(tmp_path / "deep" / "1" / "2" / "3")
  refused(tmp_path / "deep", "deep: no run in it or up to 2 directories down")
  make(tmp_path / "run")
  refused(tmp_path / "run", r"--output: .*config\.json", output="config.json")


def test_a_half_written_workdir_is_shown_as_far_as_it_goes(tmp_path):
  """Bad input 52."""
  run = make(tmp_path / "run", "train.steps=7", ended=False)
  assert "No step is recorded yet." in read(run).text
  (run / "metrics.jsonl").write_text(
    '{"step": 0, "reward/score": 4.0}\n{"step": 1, "rew'
  )
  line = json.dumps(sample(response="The only one"))
  (run / "samples.jsonl").write_text(f"{line}\n{line[:40]}")
  page = read(run)
  assert "unfinished: 1 of 7 steps" in page.text
  assert page.text.count("The only one") == 1
  assert "reward/score proxy: the score that is trained on 4" in page.text


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("metrics.jsonl", '{"step": 0}\n{"step": 1, "a"}\n', r"metrics\.jsonl:2: "),
    ("samples.jsonl", "[]\n", r"samples\.jsonl:1: "),
    (
      "samples.jsonl",
      '{"step": 0, "prompt": 1}\n',
      r"samples\.jsonl:1: prompt",
    ),
    (
      "samples.jsonl",
      json.dumps(sample(logprobs=[0.0])) + "\n",
      r"samples\.jsonl:1: lists of \[1, 4\] tokens",
    ),
    (
      "samples.jsonl",
      json.dumps(sample(score="high")) + "\n",
      r"samples\.jsonl:1: could not convert",
    ),
    (
      "samples.jsonl",
      json.dumps(sample(tokens=["one"])) + "\n",
      r"samples\.jsonl:1: lists of \[1, 4\] tokens",
    ),
    ("summary.json", "{", r"summary\.json: damaged"),
    (
      "summary.json",
      '{"metrics": [1], "wall_s": 1}',
      r"summary\.json: metrics",
    ),
    ("frontier.json", '{"members": [1]}', r"frontier\.json: members: 1"),
    ("frontier.png", "<svg>", r"frontier\.png: damaged: no PNG"),
    ("study.json", '{"study": "x"}', ""),
  ],
)
def test_damaged_files_are_named(name, content, message, tmp_path):
  if name == "study.json":
    run, message = (
      make_study(tmp_path / "study"),
      r"study\.json: claim: missing",
    )
  else:
    run = make(tmp_path / "run")
  read(run)  # The report that must stay.
  (run / name).write_text(content)
  refused(run, message)


def test_a_sweep(tmp_path):
  """Members by β, none of them a section; every curve has all of them."""
  frontier = {
    "recommendation": {"beta": 2.0, "text": "β = 2 is <best>."},
    "members": [{"beta": 2.0, "gold": 0.5, "gold_se": 0.25, "win_rate": None}],
    "by_beta": [{"beta": 2.0, "kl": {"mean": 3.0, "low": 2.5, "high": 3.5}}],
  }
  path = make_sweep(tmp_path / "sweep")
  (path / "frontier.json").write_text(json.dumps(frontier))
  (path / "frontier.png").write_bytes(PNG)
  page = read(path)
  text = page.text.replace("\xa0", " ")
  order = [text.index(f"{beta} 0 {beta + 0.5:.2f} ±") for beta in (0, 2, 10)]
  assert order == sorted(order) and "0.1 0 0.60 ± 0.50" in text
  assert len(page.all("h2")) == 1 and not page.all("nav")
  assert "Recommendation. β = 2 is <best>." in text
  assert "2 0.50 ± 0.25 –" in text and "2 3 (2.5 to 3.5)" in text
  png = base64.b64encode(PNG).decode()
  assert f"data:image/png;base64,{png}" in [i["src"] for i in page.all("img")]
  colours = plots.colours([0.0, 0.1, 2.0, 10.0])
  assert len(set(colours)) == 4
  for colour in colours:
    assert f"stroke: {colour}" in svgs(page)["reward/score"].decode()
    assert {"class": "swatch", "style": f"background: {colour}"} in page.all(
      "span"
    )


def test_a_recommendation_may_be_a_line(tmp_path):
  path = make_sweep(tmp_path / "sweep")
  (path / "frontier.json").write_text('{"recommendation": "Take 2."}')
  assert "Recommendation. Take 2." in read(path).text


def test_an_unfinished_sweep(tmp_path):
  path = make_sweep(tmp_path / "sweep", ended=False)
  (path / "beta=10" / "summary.json").unlink()
  page = read(path)
  assert page.classes().count("badge unfinished") == 2
  assert page.classes().count("badge ended") == 3


def test_a_pipeline_in_its_order(tmp_path):
  """Its stages, then the sweep that stands on them; the defaults of stages."""
  path = make(tmp_path / "run", "stage=pipeline")
  make_sweep(path / "ppo")
  make(path / "reward_model", "stage=reward_model", "policy.path=sft")
  make(path / "sft", "stage=sft", rows=[(0, {"sft/loss": 2.5})])
  (path / "link").symlink_to(path / "sft")
  page = read(path)
  names = [f"{path}", *(f"{path}/{n}" for n in ("sft", "reward_model", "ppo"))]
  places = [page.text.rindex(f"{name} ended") for name in names]
  assert places == sorted(places)
  assert [link["href"] for link in page.all("a")] == [
    f"#run-{i}" for i in range(4)
  ]
  assert len(page.all("h2")) == 1 and len(page.all("h3")) == 3


def test_studies(tmp_path):
  """A folder of them: claims, verdicts that look different, tables, figures."""
  folder = tmp_path / "studies"
  make_study(folder / "first")
  make_study(folder / "second", "holds when it rains")
  make_study(folder / "third", "does not hold here")
  make_study(folder / "fourth", ended=False)
  make(folder / "first" / "sft", "stage=sft")  # A study's own runs stay there.
  page = read(folder)
  for kind in ("holds", "when", "not"):
    assert page.classes().count(f"badge {kind}") == 2  # Above, and its own.
  assert "Source: Somebody 2022" in page.text
  assert "Of all arms arm gold with 1.25 without –" in page.text
  assert "Aside" not in page.text
  assert "ended study · seed 3 · took 61 s" in page.text
  assert "The study has not ended" in page.text
  assert len(page.all("h2")) == 4 and not page.all("h3")
  assert len(page.all("img")) == 3


def test_samples_across_training(tmp_path):
  """Six steps of eleven, two each; the KL is 0.25 + 0.5 + 1 = 1.75."""
  samples = [
    sample(step=step, response=f"step {step} number {i}")
    for step in range(0, 110, 10)
    for i in range(3)
  ]
  text = read(make(tmp_path / "run", samples=samples)).text
  shown = re.findall(r"step (\d+) number (\d)", text)
  steps = [0, 20, 40, 60, 80, 100]
  assert shown == [(str(step), str(i)) for step in steps for i in (0, 1)]
  assert "12 of the 33" in text and "1.5 1.75" in text


def test_samples_of_one_step(tmp_path):
  """An evaluation's are all of one; twelve of them are enough."""
  samples = [sample(response=f"number {i}") for i in range(20)]
  text = read(make(tmp_path / "run", samples=samples)).text
  assert re.findall(r"number (\d+)", text) == [str(i) for i in range(12)]


def test_tokens_are_tinted_by_the_log_ratio(tmp_path):
  """ℓ = 0, −1, 3.5, 0.5 nats; with its text or, without, a cell of a strip."""
  tokens = ["was", " go", "od", "<eos>"]
  page = read(make(tmp_path / "a", samples=[sample(tokens=tokens)]))
  spans = [span for span in page.all("span") if "title" in span]
  wanted = [("same", "+0.00"), ("less-2", "-1.00")]
  wanted += [("more-4", "+3.50"), ("more-1", "+0.50")]
  assert [(span["class"], span["title"]) for span in spans] == wanted
  assert "was go od <eos>" in page.text and "was good" not in page.text
  page = read(make(tmp_path / "b", samples=[sample()]))
  spans = [span for span in page.all("span") if "title" in span]
  assert [(span["class"], span["title"]) for span in spans] == wanted
  assert "was good ." in page.text


def test_figures_that_are_not_finite(tmp_path):
  rows = [row(0, math.nan), row(1, math.inf), row(2, 1.0)]
  odd = sample(score="nan", reverse_kl=["inf", 0.0, 0.0, 0.0])
  page = read(make(tmp_path / "run", rows=rows, samples=[odd]))
  assert "nan inf" in page.text


@pytest.mark.parametrize("call", ["os.fsync", "pathlib.Path.replace"])
def test_a_kill_leaves_the_old_report(call, tmp_path, monkeypatch):
  run = make(tmp_path / "run")
  read(run)
  old = (run / "report.html").read_text()

  def full(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(call, full)
  with pytest.raises(
    errors.UserError, match=r"report\.html: cannot be written"
  ):
    read(run)
  assert (run / "report.html").read_text() == old


def test_an_evaluation_has_no_curves(tmp_path):
  """Its figures are all open to see, with errors where there are some."""
  metrics = {
    "reward/gold": 1.25,
    "reward/gold_se": 0.1,
    "text/distinct_2": None,
  }
  options = {"metrics": metrics, "against": "runs/<b>", "prompts": 512}
  page = read(make(tmp_path / "e", "stage=evaluate", **options))
  assert "took 12 s · against runs/<b> · prompts 512 · last" in page.text
  assert "1.25 ± 0.10" in page.text.replace("\xa0", " ")
  assert "1 more figures figure mean text/distinct_2 nan" in page.text
  assert [("open" in each) for each in page.all("details")] == [
    True,  # The figures; of the configuration nothing.
    False,
    False,
  ]
  assert "Curves" not in page.text and "at every step" not in page.text


def test_output_and_several_workdirs(tmp_path):
  """One given twice is one; the file is where it was asked for."""
  a, b = make(tmp_path / "a"), make(tmp_path / "b")
  output = tmp_path / "both.html"
  said = writing.run(
    [str(a), str(b), str(a)], str(output), defaults=default_config
  )
  assert said == f"{output}: 2 runs; open it in a browser"
  assert len(Page(output.read_text()).all("h2")) == 2
  assert not (a / "report.html").exists()
  with pytest.raises(errors.UserError, match="cannot be written"):
    writing.run(
      [str(a)], str(tmp_path / "no" / "x.html"), defaults=default_config
    )


def test_a_run_that_another_process_writes(tmp_path):
  config = defaults.get_config().to_dict()
  with workdir_lib.Workdir.open(tmp_path / "run", config, resume=False):
    assert "unfinished" in read(tmp_path / "run").text


def test_a_workdir_that_was_moved(tmp_path):
  path = make_sweep(tmp_path / "sweep")
  shutil.move(path, tmp_path / "elsewhere")
  assert len(read(tmp_path / "elsewhere").all("h2")) == 1


def points(path):
  """Of a path of a picture, downwards."""
  pairs = re.findall(r"(-?[\d.]+) (-?[\d.]+)", path)
  return [(float(x), float(y)) for x, y in pairs]


def lines(svg, colour):
  found = re.findall(rf'<path d="([^"]*)"[^>]*stroke: {colour}', svg.decode())
  return [points(path) for path in found]


def height(path):
  return max(y for _, y in path) - min(y for _, y in path)


def test_bands_are_95_percent():
  """A band of se = 1 is as high as a line from −1.96 to 1.96."""
  banded = [{"step": i, "x": 0.0, "x_se": 1.0} for i in range(2)]
  line = [{"step": i, "x": 1.96 * (2 * i - 1)} for i in range(2)]
  curves = [
    plots.Curve(banded, "#111111"),
    plots.Curve(line, "#222222"),
  ]
  svg = plots.draw("x", curves)
  band = re.findall(r'Fill.*?<path id="\w+" d="([^"]*)"', svg.decode(), re.S)[0]
  (drawn,) = lines(svg, "#222222")
  assert height(points(band)) == pytest.approx(height(drawn), abs=0.01)
  assert height(drawn) > 50 and height(lines(svg, "#111111")[0]) == 0


def test_beta_has_a_logarithmic_axis():
  """0.01, 0.1 and 1 are as far apart; 0 is not on it."""
  flat = lambda beta: [{"step": i, "kl/beta": beta} for i in range(2)]
  curves = [
    plots.Curve(flat(beta), "#123456") for beta in (0.0, 0.01, 0.1, 1.0)
  ]
  drawn = lines(plots.draw("kl/beta", curves), "#123456")
  low, middle, high = (path[0][1] for path in drawn if path)
  assert low - middle == pytest.approx(middle - high, abs=0.01)
  assert middle - high > 20


def test_long_runs_make_small_pictures():
  noisy = [{"step": i, "x": math.sin(i), "x_se": 1.0} for i in range(20_000)]
  svg = plots.draw("x", [plots.Curve(noisy, "#123456")])
  assert len(svg) < 100_000
  assert svg == plots.draw("x", [plots.Curve(noisy, "#123456")])


@pytest.mark.parametrize(
  ("value", "error", "shown"),
  [
    (1.2345, 0.042, "1.234 ± 0.042"),
    (-0.5, 0.11, "−0.50 ± 0.11"),
    (1234.5, 20.0, "1,234 ± 20"),
    (0.25, 0.0, "0.25"),
    (0.25, math.nan, "0.25"),
    (math.nan, 0.1, "nan"),
    (1e-9, None, "1e−09"),
  ],
)
def test_digits_follow_the_error(value, error, shown):
  metrics = {"x": value} | ({} if error is None else {"x_se": error})
  assert html.figure(metrics, "x").replace("\xa0", " ") == shown


def test_when_it_was_written(tmp_path):
  """The report's own date is not the run's."""
  run = make(tmp_path / "run")
  for file in run.iterdir():
    os.utime(file, (0, 1_000_000_000))
  read(run)
  when = datetime.datetime.fromtimestamp(1_000_000_000).astimezone()
  assert f"last written {when:%Y-%m-%d %H:%M}" in read(run).text
