r"""A sweep of many β against as many single runs, as a user would start them.

    python -m benchmarks.sweep_time --members=16 --steps=200

Each is a command of its own: imports, compilation, training, files. Half of
the single runs come before the sweep and half after it, so that a machine that
drifts favours neither. All begin with one SFT policy and one reward model,
whose making is not counted, and an empty cache of compiled programs, which the
single runs share as they do at home; the evaluation that follows a sweep is
left out, since single runs have none.

Prints one JSON object; `step_ratio` leaves out what is no step.
"""

import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from absl import app, flags

_MEMBERS = flags.DEFINE_integer("members", 16, "β of the sweep.", 2)
_STEPS = flags.DEFINE_integer("steps", 200, "Of each run.", 2)


def betas(count: int) -> list[float]:
  """0, then penalties from 0.001 to 1, evenly in their logarithms."""
  exponents = [-3 + 3 * i / max(count - 2, 1) for i in range(count - 1)]
  return [0.0, *(round(10**exponent, 5) for exponent in exponents)]


def timed(directory: pathlib.Path, name: str, *words: str) -> dict[str, float]:
  """Runs a command in a workdir of its own: seconds of the wall and the CPU."""
  began, before = time.perf_counter(), os.times()
  subprocess.run(
    [sys.executable, "-m", *words, f"--workdir={directory / name}"],
    check=True,
    stdout=subprocess.DEVNULL,
    env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(directory / "compiled")},
  )
  after = os.times()
  cpu = after.children_user + after.children_system
  cpu -= before.children_user + before.children_system
  return {"wall_s": time.perf_counter() - began, "cpu_s": cpu}


def step_s(workdir: pathlib.Path) -> float:
  """The median time of a run's steps, or a member's share."""
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return statistics.median(json.loads(line)["time/step_s"] for line in lines)


def measure(members: int, steps: int) -> dict[str, Any]:
  """All of it; minutes."""
  with tempfile.TemporaryDirectory() as name:
    directory = pathlib.Path(name)
    toy = ["launch.train", "--config=configs/ppo.py"]
    timed(directory, "start", *toy, "--config.train.steps=1")
    shutil.rmtree(directory / "compiled", ignore_errors=True)
    shared = [
      "--config=configs/ppo.py",
      f"--config.policy.path={directory / 'start' / 'sft'}",
      f"--config.reward.path={directory / 'start' / 'reward_model'}",
      f"--config.train.steps={steps}",
    ]
    values = betas(members)
    half = members // 2

    def single(beta):
      beta_flag = f"--config.kl.beta={beta}"
      return timed(directory, f"{beta:g}", "launch.train", *shared, beta_flag)

    singles = [single(beta) for beta in values[:half]]
    sweep = timed(
      directory,
      "sweep",
      "launch.sweep",
      *shared,
      f"--betas={','.join(map(str, values))}",
      "--config.sweep.frontier=False",
    )
    singles += [single(beta) for beta in values[half:]]
    shares = [step_s(directory / "sweep" / f"beta={b:g}") for b in values]
    alone = [step_s(directory / f"{beta:g}") for beta in values]
  both = {
    kind: {"sweep": sweep[kind], "singles": sum(run[kind] for run in singles)}
    for kind in ("wall_s", "cpu_s")
  }
  return {
    "members": members,
    "steps": steps,
    **both,
    "ratio": both["wall_s"]["sweep"] / both["wall_s"]["singles"],
    "cpu_ratio": both["cpu_s"]["sweep"] / both["cpu_s"]["singles"],
    "step_ratio": statistics.mean(shares) / statistics.mean(alone),
  }


def main(_: list[str]) -> None:
  """Measures and prints."""
  print(json.dumps(measure(_MEMBERS.value, _STEPS.value), indent=1))


if __name__ == "__main__":
  app.run(main)
