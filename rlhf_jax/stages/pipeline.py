"""What `config.stage` names, and the pipeline that runs one after the other.

A stage that stands on models whose paths are empty first makes them, in
sub-workdirs, from the complete configs in `config.pipeline`.
"""

import json
import pathlib
import time
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict
from rich import console as rich_console

from rlhf_jax.data import sampling
from rlhf_jax.settings import rules
from rlhf_jax.stages import dpo as dpo_stage
from rlhf_jax.stages import evaluate as evaluate_stage
from rlhf_jax.stages import ppo as ppo_stage
from rlhf_jax.stages import reward_model as reward_model_stage
from rlhf_jax.stages import sft as sft_stage
from rlhf_jax.stages import sweep
from rlhf_jax.steps import rewards
from rlhf_jax.storage import pretrained as pretrained_lib
from rlhf_jax.storage import workdir as workdir_lib

# Which models a stage stands on: config field → the stage that makes them.
_NEEDS = {
  "sft": {},
  "reward_model": {"policy": "sft"},
  "ppo": {"policy": "sft", "reward": "reward_model"},
  "dpo": {"policy": "sft"},
  "evaluate": {},
}


_STAGES = {
  "sft": sft_stage,
  "reward_model": reward_model_stage,
  "ppo": ppo_stage,
  "dpo": dpo_stage,
  "evaluate": evaluate_stage,
}


def run(config: ConfigDict, workdir: str, *, resume: bool) -> None:
  """Runs the stage that the config names, and says where the results are."""
  console = rich_console.Console(highlight=False)
  with workdir_lib.Workdir.open(
    workdir, config.to_dict(), resume=resume
  ) as opened:
    if config.stage == "pipeline":
      _pipeline(config, opened, resume=resume, console=console)
    else:
      config = _with_prerequisites(config, opened, resume, console)
      run_stage(config, opened, resume=resume, console=console)
    console.print(f"\nResults: {workdir}", markup=False, soft_wrap=True)
    for line in _next_commands(config, workdir):
      console.print(f"Next:    {line}", markup=False, soft_wrap=True)


def run_stage(
  config: ConfigDict,
  workdir: workdir_lib.Workdir,
  *,
  resume: bool,
  console: rich_console.Console,
) -> dict[str, Any]:
  """Runs one stage, whose models exist, and returns its summary."""
  if config.stage == "ppo" and rules.is_sweep(config):
    return sweep.run(config, workdir, resume=resume, console=console)
  return _STAGES[config.stage].run(config, workdir, console=console)


def _with_prerequisites(config, workdir, resume, console) -> ConfigDict:
  """The config with paths of the models that it left empty and can make."""
  config = config.copy_and_resolve_references()
  for field, stage in _NEEDS[config.stage].items():
    wanted = field != "reward" or config.reward.kind == "model"
    if wanted and not config[field].path and stage in config.pipeline:
      made = config.pipeline[stage].copy_and_resolve_references()
      made.policy.path = config.policy.path if stage != "sft" else ""
      made.pipeline = ConfigDict()
      path = _make(made, workdir, stage, resume, console)
      with config.unlocked():
        config[field].path = str(path)
  return config


def _make(config, workdir, name, resume, console) -> pathlib.Path:
  """Runs a stage in a sub-workdir, unless it has finished there."""
  with workdir.sub(name, config.to_dict(), resume=resume) as opened:
    if not opened.has_ended(config.train.steps):
      run_stage(config, opened, resume=resume, console=console)
    # Absolute: a resumed run may be called from elsewhere.
    return opened.path.absolute()


def _pipeline(config, workdir, *, resume, console) -> None:
  began = time.monotonic()
  last = config.copy_and_resolve_references()
  with last.unlocked():
    last.stage = "ppo"
  last = _with_prerequisites(last, workdir, resume, console)
  _score_start(last)
  with last.unlocked():
    last.pipeline = ConfigDict()
  with workdir.sub("ppo", last.to_dict(), resume=resume) as opened:
    run_stage(last, opened, resume=resume, console=console)
  summaries = {
    name: json.loads((workdir.path / name / "summary.json").read_text())
    for name in (*_NEEDS["ppo"].values(), "ppo")
    if (workdir.path / name).is_dir()
  }
  workdir.write_summary(
    {
      "stage": "pipeline",
      "seed": config.seed,
      "wall_s": time.monotonic() - began,
      "stages": summaries,
    }
  )


def _score_start(config) -> None:
  """Adds the starting policy's score, now that there is a reward model.

  Only for a policy of the built-in language, whose summary has its gold.
  """
  summary_file = pathlib.Path(config.policy.path) / "summary.json"
  if config.data.path or config.reward.kind != "model":
    return
  summary = json.loads(summary_file.read_text())
  policy = pretrained_lib.load_policy(config)
  model = pretrained_lib.load(config.reward.path, config)
  responses = sft_stage.own_responses(policy, config)
  normalised = rewards.from_model(model.model)
  scores = sampling.score(
    model,
    responses,
    config,
    function=lambda params, sequences: normalised(
      params, sequences, jnp.int32(0)
    ),
  )
  summary["metrics"]["reward/score"] = float(scores.mean())
  path = config.policy.path
  with workdir_lib.Workdir.open(
    path, workdir_lib.read_config(path), resume=True
  ) as opened:
    opened.write_summary(summary)


def _next_commands(config, workdir) -> list[str]:
  """What a person may want to do with the results."""
  train = "python -m launch.train --config=configs"
  source = ""
  if config.data.path:
    source = " --config.data.path=FILE.jsonl"
  elif config.data.language != "reviews":
    source = f" --config.data.language={config.data.language}"
  report = f"python -m launch.report --workdir={workdir}"
  if config.stage == "pipeline":
    return [
      report,
      f"{train}/ppo.py --config.policy.path={workdir}/sft "
      f"--config.reward.path={workdir}/reward_model --config.kl.beta=0.01 "
      f"--workdir={workdir}-beta0.01{source}",
    ]
  if config.stage == "sft":
    return [
      f"{train}/reward_model.py --config.policy.path={workdir} "
      f"--workdir={workdir}-reward_model{source}",
      f"{train}/dpo.py --config.policy.path={workdir} "
      f"--workdir={workdir}-dpo{source}",
    ]
  if config.stage == "reward_model":
    return [
      f"{train}/ppo.py --config.policy.path={config.policy.path} "
      f"--config.reward.path={workdir} --workdir={workdir}-ppo{source}"
    ]
  if config.stage == "evaluate":
    return []
  if rules.is_sweep(config):
    return [report]
  # DPO had no reward model that its policy could be judged by.
  reward = " --config.reward.path=DIR" if config.stage == "dpo" else ""
  return [
    f"python -m launch.evaluate --config=configs/evaluate.py "
    f"--config.policy.path={workdir} --workdir={workdir}-evaluate{reward}"
    f"{source}",
    f"python -m launch.export --output=DIR --workdir={workdir}",
  ]
