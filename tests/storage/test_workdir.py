"""Workdirs: one writer, valid JSON, and refusals that change nothing."""

import json
import math
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import errors
from rlhf_jax.storage import workdir


def make_config(**changes):
  """A config as `ConfigDict.to_dict` gives it, changed at dotted names."""
  config = {
    "seed": 0,
    "kl": {"beta": 0.05},
    "rollout": {"stop_ids": (-1,), "top_p": 1.0},
    "train": {"steps": 20, "samples_every": 10},
    "mesh": {"data": -1},
    "pipeline": {},
  }
  for field, value in changes.items():
    *parents, name = field.split("__")
    node = config
    for parent in parents:
      node = node[parent]
    node[name] = value
  return config


def snapshot(directory):
  """Every path below, with what it holds and when it was written."""
  return {
    path: (path.lstat().st_mtime_ns, path.is_file() and path.read_bytes())
    for path in directory.rglob("*")
  }


def begin(path, config=None):
  """A run that has ended."""
  workdir.Workdir.open(path, config or make_config(), resume=False).close()


def refused(path, match, *, config=None, resume=False):
  root = pathlib.Path(path).parent
  before = snapshot(root)
  with pytest.raises(errors.UserError, match=match) as caught:
    workdir.Workdir.open(path, config or make_config(), resume=resume)
  assert "\n" not in str(caught.value)
  assert snapshot(root) == before


@pytest.fixture
def run(tmp_path):
  with workdir.Workdir.open(
    tmp_path / "run", make_config(), resume=False
  ) as run:
    yield run


def test_writes_the_config(tmp_path):
  path = tmp_path / "runs" / "first"
  config = make_config(rollout__top_p=math.inf, seed=None)
  with workdir.Workdir.open(path, config, resume=False):
    assert workdir.is_workdir(path)
  wanted = make_config(rollout__top_p="inf", rollout__stop_ids=[-1], seed=None)
  assert workdir.read_config(path) == wanted
  assert list(workdir.read_config(path)) == list(config)  # In its order.
  assert not workdir.is_workdir(tmp_path)


def test_refuses_a_run_without_resume(tmp_path):
  """Row 12. A copied workdir may lack its lock; refusing it makes none."""
  begin(tmp_path / "run")
  refused(tmp_path / "run", "holds a run; --resume continues it")
  (tmp_path / "run" / ".lock").unlink()
  refused(tmp_path / "run", "holds a run; --resume continues it")


def test_refuses_a_file_and_what_lies_below_it(tmp_path):
  """Row 12."""
  (tmp_path / "file").write_text("mine")
  refused(tmp_path / "file", "file: a file")
  refused(tmp_path / "file" / "run", "file: a file")


def test_refuses_a_dead_link(tmp_path):
  """Row 12."""
  (tmp_path / "run").symlink_to(tmp_path / "gone")
  refused(tmp_path / "run", "cannot be written: File exists")


def test_refuses_a_read_only_parent(tmp_path, monkeypatch):
  """Row 12. Root may write anywhere, so `os.access` is told to refuse."""
  access = os.access
  locked = lambda path, mode: path != tmp_path and access(path, mode)
  monkeypatch.setattr(os, "access", locked)
  refused(tmp_path / "run", f"{tmp_path}: not writable")


@pytest.mark.parametrize("path", ["", "a\0b", "a\nb", "a\x1b[2Jb"])
def test_refuses_control_characters(path, tmp_path, monkeypatch):
  """Row 11."""
  monkeypatch.chdir(tmp_path)
  refused(path, "without control characters")


def test_resume_begins_where_there_is_none(tmp_path):
  with workdir.Workdir.open(tmp_path / "run", make_config(), resume=True):
    assert workdir.is_workdir(tmp_path / "run")


def test_resume_with_harmless_changes(tmp_path):
  """Row 10: more steps and another mesh are the same run."""
  begin(tmp_path / "run")
  config = make_config(train__steps=40, train__samples_every=1, mesh__data=4)
  with workdir.Workdir.open(tmp_path / "run", config, resume=True) as run:
    stored = workdir.read_config(run.path)
  assert stored["train"] == {"steps": 40, "samples_every": 1}
  assert stored["mesh"] == {"data": 4}


@pytest.mark.parametrize(
  "changes, match",
  [
    ({"kl__beta": 0.1}, "kl.beta: 0.05 → 0.1; "),
    ({"rollout__stop_ids": (-1, 2)}, r"stop_ids: \[-1\] → \[-1, 2\]; "),
    ({"seed": False}, "seed: 0 → false; "),
    ({"kl__target": 6.0}, "kl.target: nothing → 6.0; "),
    ({"kl": {}}, "kl.beta: 0.05 → nothing; "),
    ({"pipeline__sft": {"train": {"steps": 9}}}, "pipeline.sft.train.steps: "),
    (
      {"seed": 1, "kl__beta": 1, "rollout__top_p": 0.9, "stage": "dpo", "a": 1},
      "seed: 0 → 1, kl.beta: 0.05 → 1, rollout.top_p: 1.0 → 0.9 and 2 more; ",
    ),
  ],
)
def test_resume_with_another_config(tmp_path, changes, match):
  """Row 10."""
  begin(tmp_path / "run")
  refused(tmp_path / "run", match, config=make_config(**changes), resume=True)


def test_resume_with_a_damaged_config(tmp_path):
  begin(tmp_path / "run")
  (tmp_path / "run" / "config.json").write_text('{"seed": ')
  refused(tmp_path / "run", "config.json: damaged", resume=True)


def test_second_process_is_refused(tmp_path):
  """Row 54; and the lock goes with the process that holds it."""
  begin(tmp_path / "run")
  program = (
    "import sys\n"
    "from rlhf_jax.storage import workdir\n"
    "config = eval(sys.argv[2])\n"
    "run = workdir.Workdir.open(sys.argv[1], config, resume=True)\n"
    "print('open', flush=True)\n"
    "sys.stdin.read()\n"
  )
  other = subprocess.Popen(
    [sys.executable, "-c", program, tmp_path / "run", repr(make_config())],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
    cwd=pathlib.Path(__file__).parents[2],
  )
  with other:
    assert other.stdout is not None
    assert other.stdout.readline() == "open\n"
    refused(tmp_path / "run", "another process is writing to it", resume=True)
    other.kill()
  workdir.Workdir.open(tmp_path / "run", make_config(), resume=True).close()


def test_subs_are_workdirs_of_their_own(run):
  member = make_config(kl__beta=0.0)
  with run.sub("members/0", member, resume=False) as sub:
    sub.append_metrics(0, {"kl/beta": 0.0})
  with pytest.raises(errors.UserError, match="holds a run"):
    run.sub("members/0", member, resume=False)
  run.sub("members/0", member, resume=True).close()
  assert workdir.read_config(sub.path)["kl"]["beta"] == 0.0
  assert sub.path == run.path / "members" / "0"


OUTSIDE = ["", "..", "../x", "a/../../x", "/tmp/x", "a//b", "a/"]
UNFIT = ["a\0", "a\nb", "-x", "a/-x", ".lock", "\u202egnp"]


@pytest.mark.parametrize("name", OUTSIDE + UNFIT)
def test_sub_names_stay_inside(run, tmp_path, name):
  """Row 11."""
  before = snapshot(tmp_path)
  with pytest.raises(errors.UserError, match="as the name of a run") as caught:
    run.sub(name, make_config(), resume=False)
  assert str(caught.value).isprintable()
  assert snapshot(tmp_path) == before


def test_sub_through_a_link_that_leads_out(run, tmp_path):
  """Row 12."""
  (tmp_path / "elsewhere").mkdir()
  (run.path / "sft").symlink_to(tmp_path / "elsewhere")
  with pytest.raises(errors.UserError, match="leads out of"):
    run.sub("sft", make_config(), resume=False)
  assert list((tmp_path / "elsewhere").iterdir()) == []


def test_secrets_are_masked(tmp_path):
  """Row 51: the canary is in no file; fields that only sound alike stay."""
  canary = "hf_canary8471"
  config = {
    "hub": {"hf_token": canary, "api_key": canary, "user": "ada"},
    "loggers": [{"wandb_API-KEY": canary}, {"password": {"old": canary}}],
    "client_secret_value": canary,
    "unset_token": "",
    "tokenizer": "llama",
    "response_tokens": 26,
  }
  begin(tmp_path / "run", config)
  files = [path for path in tmp_path.rglob("*") if path.is_file()]
  assert files
  assert all(canary.encode() not in path.read_bytes() for path in files)
  assert workdir.read_config(tmp_path / "run") == {
    "hub": {"hf_token": "***", "api_key": "***", "user": "ada"},
    "loggers": [{"wandb_API-KEY": "***"}, {"password": "***"}],
    "client_secret_value": "***",
    "unset_token": "",
    "tokenizer": "llama",
    "response_tokens": 26,
  }
  workdir.Workdir.open(tmp_path / "run", config, resume=True).close()


def strict(text):
  """Parses JSON as other languages do: NaN and Infinity are errors."""

  def refuse(name):
    raise ValueError(name)

  return json.loads(text, parse_constant=refuse)


def test_metrics_are_valid_json_and_lossless(run):
  """Each line is on disk at once, and every float comes back."""
  third = 1 / 3
  run.append_metrics(0, {"a": third, "b": math.nan, "c": -math.inf})
  line = (run.path / "metrics.jsonl").read_text()
  assert line.endswith("\n")
  assert strict(line) == {"step": 0, "a": third, "b": "nan", "c": "-inf"}
  run.append_metrics(1, {"a": 1e-300})
  first, second = workdir.read_metrics(run.path)
  assert (first["step"], first["a"], first["c"]) == (0, third, -math.inf)
  assert math.isnan(first["b"])
  assert second == {"step": 1, "a": 1e-300}


def test_no_metrics_yet(run):
  assert workdir.read_metrics(run.path) == []
  assert run.mean_of_last() == {}
  run.rewind(0)
  assert not (run.path / "metrics.jsonl").exists()


def test_samples_are_inert(run):
  """Row 50: no escape or bidi mark reaches a terminal; the text is whole."""
  text = "\x1b[31m</script>\u202e\u2028é\n"
  record = {"step": 3, "response": text, "logprobs": [-0.5, -math.inf]}
  run.append_samples([record, {"step": 3, "response": "b"}])
  content = (run.path / "samples.jsonl").read_bytes()
  assert content.count(b"\n") == 2
  assert all(byte == 10 or 32 <= byte < 127 for byte in content)
  found = strict(content.splitlines()[0])
  assert found == {"step": 3, "response": text, "logprobs": [-0.5, "-inf"]}


def test_mean_of_last(run):
  """By hand: steps 2 to 11; `late` is in two of them."""
  for step in range(12):
    late = {"late": 10.0 * step} if step >= 10 else {}
    run.append_metrics(step, {"a": float(step)} | late)
  # (2 + … + 11)/10 = 6.5; (100 + 110)/2 = 105; (10 + 11)/2 = 10.5.
  assert run.mean_of_last() == {"a": 6.5, "late": 105.0}
  assert run.mean_of_last(2) == {"a": 10.5, "late": 105.0}


def test_mean_of_last_hides_no_nan(run):
  """Trap 25."""
  run.append_metrics(0, {"a": 1.0})
  run.append_metrics(1, {"a": math.nan})
  assert math.isnan(run.mean_of_last()["a"])


def test_summary_is_replaced_whole(run):
  run.write_summary({"stage": "ppo", "steps": 1})
  run.write_summary({"stage": "ppo", "metrics": {"kl/beta": math.inf}})
  summary = strict((run.path / "summary.json").read_text())
  assert summary == {"stage": "ppo", "metrics": {"kl/beta": "inf"}}
  names = {path.name for path in run.path.iterdir()}
  assert names == {".lock", "config.json", "summary.json"}


def test_rewind_forgets_what_is_done_again(run):
  """Kept lines keep their bytes; an unfinished last line goes."""
  for step in range(4):
    run.append_metrics(step, {"a": step + 0.1})
    run.append_samples([{"step": step, "n": 0}, {"step": step, "n": 1}])
  metrics = run.path / "metrics.jsonl"
  wanted = metrics.read_bytes().splitlines(keepends=True)[:2]
  with metrics.open("ab") as file:
    file.write(b'{"step": 4, "a"')
  assert len(workdir.read_metrics(run.path)) == 4  # Not the unfinished one.
  run.rewind(2)
  assert metrics.read_bytes() == b"".join(wanted)
  run.append_metrics(2, {"a": 2.5})
  assert [row["a"] for row in workdir.read_metrics(run.path)] == [0.1, 1.1, 2.5]
  samples = (run.path / "samples.jsonl").read_text().splitlines()
  records = [(row["step"], row["n"]) for row in map(json.loads, samples)]
  assert records == [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.mark.parametrize(
  "line", ["{", "[1]", '{"a": 1}', '{"step": "1"}', "\xff"]
)
def test_faulty_line_is_named(run, line):
  """A whole line that is no record is never dropped silently."""
  run.append_metrics(0, {"a": 1.0})
  with (run.path / "metrics.jsonl").open("a", encoding="latin-1") as file:
    file.write(f"{line}\n")
  with pytest.raises(errors.UserError, match=r"metrics\.jsonl:2: "):
    workdir.read_metrics(run.path)
  with pytest.raises(errors.UserError, match=r"metrics\.jsonl:2: "):
    run.rewind(5)


@pytest.mark.parametrize("value", ["null", '"high"', "[1.0]"])
def test_faulty_metric_is_named(run, value):
  (run.path / "metrics.jsonl").write_text(f'{{"step": 0, "a": {value}}}\n')
  with pytest.raises(errors.UserError, match=r"metrics\.jsonl:1: "):
    workdir.read_metrics(run.path)


def test_metrics_from_arrays(run):
  """What a step returns may be written as it is."""
  run.append_metrics(0, {"a": jnp.float32(0.5), "b": np.array(2), "c": 3})
  row = workdir.read_metrics(run.path)[0]
  assert row == {"step": 0, "a": 0.5, "b": 2.0, "c": 3.0}


def test_full_disk(run):
  """Row 12."""
  if not pathlib.Path("/dev/full").exists():
    pytest.skip("no /dev/full on this system")
  (run.path / "metrics.jsonl").symlink_to("/dev/full")
  with pytest.raises(
    errors.UserError, match=r"metrics\.jsonl: .*No space left"
  ):
    run.append_metrics(0, {"a": 1.0})


def test_no_workdir_to_read(tmp_path):
  """Row 52."""
  with pytest.raises(errors.UserError, match="not a workdir"):
    workdir.read_config(tmp_path)
  (tmp_path / "config.json").write_text("[]")
  with pytest.raises(errors.UserError, match="no JSON object"):
    workdir.read_config(tmp_path)


def test_a_refusal_before_anything_was_done_leaves_nothing(tmp_path):
  """Else the command that mends it would be told that there is a run."""
  path = tmp_path / "runs" / "a"
  with (
    pytest.raises(errors.UserError, match="no such file"),
    workdir.Workdir.open(path, {"stage": "ppo"}, resume=False) as opened,
    opened.sub("sft", {"stage": "sft"}, resume=True),
  ):
    raise errors.UserError("no such file")
  assert not path.exists()


def test_a_refusal_leaves_a_directory_that_was_there(tmp_path):
  with (
    pytest.raises(errors.UserError),
    workdir.Workdir.open(tmp_path, {}, resume=False),
  ):
    raise errors.UserError("x")
  assert tmp_path.is_dir() and not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyError, errors.Preempted])
def test_what_is_no_refusal_leaves_the_run(error, tmp_path):
  with (
    pytest.raises(error),
    workdir.Workdir.open(tmp_path / "a", {}, resume=False),
  ):
    raise error("x")
  assert (tmp_path / "a" / "config.json").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "notes.txt"])
def test_a_refusal_later_leaves_what_was_done(name, tmp_path):
  """And files of others."""
  with (
    pytest.raises(errors.UserError),
    workdir.Workdir.open(tmp_path / "a", {}, resume=False) as opened,
  ):
    (opened.path / name).write_text("{}")
    raise errors.UserError("x")
  assert {path.name for path in (tmp_path / "a").iterdir()} == {
    "config.json",
    ".lock",
    name,
  }


def test_a_refusal_on_resume_leaves_the_run(tmp_path):
  with workdir.Workdir.open(tmp_path / "a", {}, resume=False):
    pass
  with (
    pytest.raises(errors.UserError),
    workdir.Workdir.open(tmp_path / "a", {}, resume=True),
  ):
    raise errors.UserError("x")
  assert (tmp_path / "a" / "config.json").exists()
