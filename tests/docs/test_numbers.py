"""The numbers of README and the pages are those of the records.

Each test writes the rows or phrases that a record asks for, and looks for them
in the page: where a record changes, the test says what the page must say.
Mutants that were tried and fail here: a digit of a record; a digit of a page.
"""

import io
import json
import pathlib
import re

import numpy as np
import pytest
from rich import console as rich_console

from configs import ppo
from rlhf_jax.report import figures
from rlhf_jax.studies import collection

ROOT = pathlib.Path(__file__).parents[2]
STUDIES = ROOT / "docs" / "studies"
QUICKSTART = ROOT / "docs" / "quickstart"
MINUS = "−"


def page(name):
  return (ROOT / "docs" / f"{name}.md").read_text()


def read(path):
  return json.loads(path.read_text())


def table(study, name):
  """A table of a study's record, a dict a row."""
  found = read(STUDIES / f"{study}.json")["tables"][name]
  return [dict(zip(found["columns"], row)) for row in found["rows"]]


def typeset(text):
  return text.replace("-", MINUS)


def percent(value, digits):
  return typeset(f"{100 * value:.{digits}f}")


def shares(low, high):
  """An interval of relative errors, such as −3 to +6 %."""
  ends = (f"{100 * end:+.0f}" for end in (low, high))
  return typeset(f"{' to '.join(ends)} %")


# The quickstart: README, For a student.


def shown():
  """What the terminal shows of the quickstart's record, 80 columns wide."""
  file = io.StringIO()
  console = rich_console.Console(file=file, width=80)
  figures.print_members(console, read(QUICKSTART / "frontier.json"))
  return [line.rstrip() for line in file.getvalue().splitlines()]


def test_readme_shows_what_the_quickstart_shows():
  readme = (ROOT / "README.md").read_text()
  block = readme.split("It ends with\n")[1].split("\nwith best-of-n")[0]
  lines = [line[4:].rstrip() for line in block.splitlines() if line.strip()]
  assert len(lines) == 9
  assert [line for line in shown() if line in lines] == lines


def test_the_student_sees_the_quickstarts_figures():
  record, text = read(QUICKSTART / "frontier.json"), page("student")
  start = record["reference"]
  rows = [("the start", start["proxy"], start["gold"], "0.00")]
  for row in record["by_beta"]:
    proxy, gold, kl = (row[of]["mean"] for of in ("proxy", "gold", "kl"))
    kl = f"{kl:.2f}" if kl < 10 else f"{kl:.1f}"
    rows.append((f"{row['beta']:g}", proxy, gold, kl))
  for name, proxy, gold, kl in rows:
    line = typeset(f"| {name} | {proxy:.2f} | {gold:.2f} | {kl} |")
    assert line in text
  best = max(record["by_beta"], key=lambda row: row["gold"]["mean"])
  assert f"| {best['beta']:g} |" in next(
    line for line in text.splitlines() if "the best gold of the four" in line
  )


@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_the_student_reads_the_quickstarts_texts(beta):
  record = read(QUICKSTART / "frontier.json")
  (member,) = (m for m in record["members"] if m["beta"] == beta)
  sample, text = member["sample"], page("student")
  assert f'after the prompt "{sample["prompt"]}"' in text
  row = f"| *{sample['response']}* | {member['proxy']:.2f} | "
  assert row + typeset(f"{member['gold']:.2f}") in text


def test_quickstart_record_is_of_the_quickstart():
  from configs import quickstart

  members = read(QUICKSTART / "summary.json")["stages"]["ppo"]["members"]
  betas = tuple(member["beta"] for member in members)
  assert betas == quickstart.get_config().sweep.betas


# KL said precisely.


def test_the_table_of_gradients():
  rows, text = table("kl_gradients", "gradients"), page("kl")
  models = table("kl_gradients", "models")
  ratios = [m["sampled"] / m["rao_bl"] for m in models]
  gain = f"variance ÷ {min(ratios):.1f} to {max(ratios):.1f}"
  whole = "KL(π‖π_ref) of whole responses"
  lines = {
    "`sequence_reverse`, sampled": whole,
    "`sequence_reverse`, Rao-Blackwellised": f"the same, {gain}",
    "`token_reverse`, both": "KL(π‖π_ref) at each state",
    "`token_forward`, both": "KL(π_ref‖π) at each state",
    "`k1_in_loss`": "nothing: it is 0",
    "`k2_in_loss`, `k1_ratio_in_loss`, `k3_ratio_in_loss`": (
      "KL(π‖π_ref) at each state"
    ),
    "`k3_in_loss` (GRPO as published)": "KL(π_ref‖π) at each state",
    "`k2_ratio_in_loss`": "E[ℓ²/2], no KL",
    "`k2_in_reward`, `k3_in_reward`, `abs_in_reward`": ("nothing with a name"),
    "`exact_detached_reward`": f"{whole}, less that at each state",
  }
  seen = 0
  for first, second in lines.items():
    names = re.findall(r"`(\w+)`", first)
    of = [row for row in rows if row["penalty"] in names]
    if ", " in first and "both" not in first and len(names) == 1:
      estimator = "sampled" if "sampled" in first else "rao_blackwellised"
      of = [row for row in of if row["estimator"] == estimator]
    seen += len(of)
    errors = [row["error"] for row in of if row["error"] is not None]
    own = f"{max(errors):.0e}" if errors else "–"
    least, most = min(r["least"] for r in of), max(r["most"] for r in of)
    span = f"{least:.2f} to {most:.2f}"
    if names == ["sequence_reverse"]:
      span = f"{most:.0e}"
    elif names == ["k1_in_loss"]:
      assert f"{least:.6f}" == f"{most:.6f}" == "1.000000"
      span = "1"
    assert f"| {first} | {second} | {own} | {span} |" in text
  assert seen == len(rows)


def test_the_noise_of_estimates():
  rows = {row["kl"]: row for row in table("kl_gradients", "estimates")}
  for kl in (0.1, 1.0, 6.0):
    cells = [rows[kl][f"sd_{name}"] for name in ("k1", "k3", "exact")]
    line = " | ".join(f"{c:,.0f}" if c > 100 else f"{c:.2f}" for c in cells)
    assert f"| {kl:g} | {line} |" in page("kl")


def test_what_ppo_makes_of_the_gradient():
  rows = table("kl_gradients", "ppo")
  for said, setting, moved in (
    ("λ = 0.95, a critic", "λ = 0.95, critic off by 0.5 sd", 0.0),
    ("γ = 0.9 ", "γ = 0.9", 0.0),
    ("the policy has moved by 0.1 nats", "later", 0.1),
    ("the same, clipped", "later, clipped", 0.1),
  ):
    (row,) = (
      r for r in rows if r["setting"] == setting and r["moved"] == moved
    )
    cells = [f"{percent(row[of], 0)} %" for of in ("error", "error_rb")]
    (line,) = re.findall(rf"(?m)^\| {re.escape(said)}.*$", page("kl"))
    assert line.endswith(f"| {cells[0]} | {cells[1]} |")


def test_rao_blackwells_pairs():
  rows = {row["figure"]: row for row in table("rao_blackwell", "pairs")}
  text = page("kl")
  for share in (50, 75, 90):
    row = rows[f"iterations to {share}% of the gain"]
    ends = (f"{row[of]:+.1f}" for of in ("low", "high"))
    span = " to ".join(ends)
    line = (
      f"| {share} % | {row['sampled']:.1f} | {row['rao_bl']:.1f} |"
      f" {row['difference']:+.1f} ({span}) |"
    )
    assert typeset(line) in text
  gold = rows["gold reward at the end"]
  cells = [f"{gold[of]:.2f}" for of in ("difference", "low", "high")]
  assert "gold is {} higher ({} to {})".format(*cells) in text
  kl = rows["KL at the end, nats per response"]
  cells = [f"{-kl[of]:.2f}" for of in ("difference", "high", "low")]
  assert "the KL {} nats lower ({} to {})".format(*cells) in text
  assert f"*{read(STUDIES / 'rao_blackwell.json')['verdict']}*" in text


ARMS = {
  "PPO, sampled": ("PPO", "sampled"),
  "PPO, Rao-Blackwellised": ("PPO", "rao-bl."),
  "RLOO, sampled": ("RLOO", "sampled"),
  "RLOO, Rao-Blackwellised": ("RLOO", "rao-bl."),
  "REINFORCE++": ("REINFORCE++", "sampled"),
  "GRPO without group normalisation": ("GRPO", "sampled"),
  "DPO on sampled pairs": ("DPO", "pairs"),
  "GRPO with group normalisation": ("GRPO, norm.", "sampled"),
}


def reached(row):
  """A share with as many digits as tell it from all; see the page on type."""
  lacking = 1 - row["share"]
  digits = 2 if lacking >= 5e-5 else 3 if lacking >= 5e-6 else 4
  text = f"{100 * row['share']:.{digits}f} %"
  if row["share"] < 0.9:
    return f"**{text}**"
  return f"*{text}*" if row["low"] < 0.99 else text


@pytest.mark.parametrize("arm", ARMS)
def test_the_shares_of_the_closed_form(arm):
  algorithm, by = ARMS[arm]
  of = [
    reached(row)
    for row in table("closed_form", "arms")
    if (row["algorithm"], row["penalty"], row["by"])
    == (algorithm, "sequence_reverse", by)
  ]
  assert len(of) == 4
  assert f"| {arm} | {' | '.join(of)} |" in page("kl")


def test_wrong_targets_of_the_closed_form():
  rows = {
    row["penalty"]: row
    for row in table("closed_form", "arms")
    if row["algorithm"] == "RLOO" and row["beta"] == 1
  }
  text = page("kl")
  for name, digits in (("token_reverse", 1), ("token_forward", 1)):
    cells = [percent(rows[name][of], digits) for of in ("share", "pred.")]
    assert re.search(
      rf"`{name}` at {cells[0]} % \((predicted )?{cells[1]}\)", text
    )
  cells = [
    percent(rows["exact_detached_reward"][of], 0) for of in ("share", "pred.")
  ]
  assert "`exact_detached_reward` at {} % ({})".format(*cells) in text
  row = rows["k1_in_loss"]
  cells = [percent(row[of], 0) for of in ("share", "low", "high", "pred.")]
  assert "({} %, {} to {}; predicted {})".format(*cells) in text


def test_group_normalisation_and_noise_of_the_closed_form():
  text = page("kl")
  row = {r["beta"]: r for r in table("closed_form", "normalised")}[0.5]
  assert (
    f"is {row['to π*']:.2f} nats from the optimum that was asked for, and"
    f" {row['to π* at effective']:.3f} from the one at β · σ ="
    f" {row['effective']:.3f}."
  ) in text
  noise = {r["beta"]: r for r in table("closed_form", "noise")}[1.0]
  assert noise["end"] < 1e-20
  assert f"there is {noise['end, rao-bl.']:.1f} at β = 1, and 0 for" in text


# β control.


@pytest.mark.parametrize("target", [2, 5, 10])
def test_controllers(target):
  rows = {
    row["controller"]: row
    for row in table("beta_control", "held")
    if row["target"] == target
  }
  cells = [
    f"{rows[name]['kl']:.2f} ({shares(rows[name]['low'], rows[name]['high'])})"
    for name in ("ziegler", "pi", "dual")
  ]
  assert f"| {target} nats | {' | '.join(cells)} |" in page("beta_control")


def test_controllers_without_a_target():
  rows = {r["controller"]: r for r in table("beta_control", "free")}
  text = page("beta_control")
  schedule, trust = rows["schedule"], rows["trust"]
  assert (
    f"`schedule` began at β = {schedule['first']:g} and ended at"
    f" {schedule['beta']:.2f}, with a KL of {schedule['kl']:.2f} nats."
  ) in text
  assert (
    f"`trust` began at β = {trust['first']:g} and relaxed to"
    f" {trust['lowest']:.2f}"
  ) in text
  assert round(3 * trust["pairs_first"]) == 2
  assert (
    f"tightened to {trust['beta']:.2f} as that share fell to"
    f" {percent(trust['pairs'], 0)} %"
  ) in text
  verdict = read(STUDIES / "beta_control.json")["verdict"]
  assert f"Its verdict is *{verdict}*." in text


# Speed.

RESULTS = ROOT / "benchmarks" / "results"


@pytest.mark.parametrize("workload", ["W1", "W2"])
def test_step_time(workload):
  record = read(RESULTS / "cpu_amd_epyc_2_cores.json")
  rounds = [r for r in record["rounds"] if r["workload"] == workload]
  ratios = [r["ratio"] for r in rounds]
  assert np.median(ratios) == record["median_ratio"][workload]
  best = min(rounds, key=lambda r: r["ratio"])
  cells = (
    f"{np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"
    f" {best['ours_s']:.2f} s, {best['torch_s']:.2f} s |"
  )
  (row,) = re.findall(rf"(?m)^\| {workload}: .*$", page("speed"))
  assert row.endswith(cells)
  floor = record["step_time_of_the_last_round"][workload]["times_floor"]
  assert f"at {floor:.1f} times the floor on {workload}" in page("speed")


def test_exact_kl():
  record = read(RESULTS / "exact_kl_cpu_amd_epyc_2_cores.json")
  text, network = page("speed"), record["network"]
  memory = network["temporary_mb"]
  for line in (
    f"| temporaries, whole network | {memory['sampled']:.0f} MB |"
    f" {memory['rao_blackwellised']:.0f} MB |",
    f"| time, whole network | 1 | {network['ratio']:.2f} |",
    "| time, from the final hidden states on | 1 |"
    f" {record['head']['ratio']:.2f} |",
    f"would be {record['array_mb']:.0f} MB",
    f"{record['batch']} × {record['tokens']} tokens",
  ):
    assert line in text
  ends = {
    name: sorted(percent(ratio - 1, 0) for ratio in record["iteration"][name])
    for name in ("W1", "W2")
  }
  ends = {name: sorted(map(int, values)) for name, values in ends.items()}
  assert (
    "{} to {} % longer on W1 and {} to {} % on W2".format(
      *ends["W1"], *ends["W2"]
    )
    in text
  )


def test_sweep_time():
  record = read(RESULTS / "sweep_time_cpu_amd_epyc_2_cores.json")
  assert (record["members"], record["steps"]) == (16, 200)
  sentence = (
    "Sixteen members of 200 steps took"
    f" {record['ratio']:.2f} of the time of sixteen single runs"
  )
  assert sentence in page("speed") and sentence in page("sweeps")
  wall = record["wall_s"]
  assert f"({wall['sweep']:.0f} s against {wall['singles']:.0f} s;" in page(
    "sweeps"
  )


# What configs say of their runs.


def test_the_story_teller_is_that_of_its_config():
  words, text = " ".join(ppo.__doc__.split()), page("your_own")
  found = re.search(
    r"With a ([\d,]+)-parameter Llama of TinyStories: (\d+) s on two cores;"
    r" ([\d.]+) → ([\d.]+) happy words \(([\d.]+) sd .*?\), KL at most ([\d.]+)"
    r" nats, the reference's NLL of the samples ([\d.]+) → ([\d.]+) nats",
    words,
  )
  assert found
  size, seconds, first, last, deviations, kl, before, after = found.groups()
  for phrase in (
    f"a {size}-parameter Llama",
    f", {seconds} s on two cores",
    f"from {first} to {last} words",
    f"is {deviations} standard deviations",
    f"at most {kl} nats",
    f"from {before} to {after} nats per token",
  ):
    assert phrase in text
  stories = ppo.get_config("stories")
  assert f"(β = {stories.kl.beta:g}, {stories.train.steps} steps," in text
  assert f"`{stories.rollout.stop_ids}`" in text


def test_sizes_that_are_told_beside_the_tables():
  """Of captions and docstrings, where they stand as well."""
  arms = read(STUDIES / "closed_form.json")["tables"]["arms"]["caption"]
  for size in ("3 seeds", "102,400 responses"):
    assert size in arms and size in page("kl")
  held = read(STUDIES / "beta_control.json")["tables"]["held"]["caption"]
  assert "4 seeds and the last 20 of 150 steps" in held
  assert "four seeds, 150 steps" in page("beta_control")
  told = (ROOT / "configs" / "defaults.py").read_text()
  low, high, top_p = re.search(
    r"\(([\d.]+) nats read ([\d.]+) at top_p = ([\d.]+)\)", told
  ).groups()
  assert f"({low} nats as {high} at `top_p={top_p}`)" in page("kl")


def test_the_studies_page_has_each_study():
  text = page("studies")
  records = collection.read_records(STUDIES)
  assert collection.table(records) in text
  for record in records:
    name = record["study"]
    section = text.split(f"\n### {name}\n")[1].split("\n### ")[0]
    verdict = record["verdict"][0].upper() + record["verdict"][1:]
    assert f"{record['claim']} **{verdict}.**" in section
    assert f"--config=configs/studies/{name}.py" in section
    assert f"(studies/{name}.png)" in section
  numbers = {15: "fifteen", 16: "sixteen", 17: "seventeen", 18: "eighteen"}
  said = f"{numbers[len(records)]} claims"
  assert said in page("student")
  assert said in (ROOT / "README.md").read_text()
