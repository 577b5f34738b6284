r"""The table of docs/families.md: every family against `transformers`.

    python -m tests.models.table --write [--older=PYTHON]

`--older` is a Python with torch and transformers 4, which loads every exported
directory and must give the same logits. Takes two minutes; needs torch.
"""

import argparse
import pathlib
import re
import subprocess
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models import families, layouts
from tests.models import test_parity, zoo

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "families.md"
COLUMNS = (
  "model",
  "logits",
  "gradient",
  "greedy",
  "round trip",
  "transformers 5",
  "transformers 4",
)
_OLDER = """
import sys, numpy, torch, transformers
tokens = torch.as_tensor(numpy.load(sys.argv[2]))
model = transformers.AutoModelForCausalLM.from_pretrained(
    sys.argv[1], attn_implementation="eager", dtype=torch.float32).eval()
with torch.no_grad():
    numpy.save(sys.argv[3], model(tokens).logits.numpy())
"""


def logits_of(model):
  """Torch's, of the tests' tokens."""
  import torch

  with torch.no_grad():
    return model(torch.as_tensor(test_parity.TOKENS)).logits.numpy()


def gradient_error(model, params, config, family) -> float:
  """The largest difference, over the largest entry."""
  import torch

  model.zero_grad()
  tokens = torch.as_tensor(test_parity.TOKENS)
  found = model(tokens).logits[:, :-1].reshape(-1, 13)
  torch.nn.functional.cross_entropy(found, tokens[:, 1:].reshape(-1)).backward()
  ours = jax.jit(
    jax.grad(lambda p: test_parity.loss(p, config, test_parity.TOKENS))
  )(jax.tree.map(jnp.asarray, params))
  ours = layouts.to_hf(jax.tree.map(np.asarray, ours), family.weights)
  theirs = {k: p.grad.numpy() for k, p in model.named_parameters()}
  if "embed_out.weight" in ours:  # In GPT-NeoX's files, and not in its module.
    theirs["embed_out.weight"] = theirs.pop("lm_head.weight")
  largest = max(np.abs(x).max() for x in theirs.values())
  return max(np.abs(ours[k] - x).max() for k, x in theirs.items()) / largest


def older_error(python, directory, wanted) -> str:
  """What transformers 4 makes of the directory."""
  with tempfile.TemporaryDirectory() as work:
    files = [f"{work}/tokens.npy", f"{work}/logits.npy"]
    np.save(files[0], test_parity.TOKENS)
    command = [python, "-c", _OLDER, str(directory), *files]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
      return "no: " + done.stderr.strip().splitlines()[-1][:60]
    return mark(np.abs(np.load(files[1]) - wanted).max())


def mark(error: float) -> str:
  """An error below 1e-5 as a number; a larger one is told apart."""
  return f"{error:.0e}" if error < 1e-5 else f"**{error:.0e}**"


def row(name: str, older: str | None) -> tuple[str, ...]:
  """One model's measurements."""
  model = test_parity.torch_model(name)
  wanted = logits_of(model)
  kind = zoo.CONFIGS[name].model_type
  (family,) = (f for f in families.FAMILIES if f.model_type == kind)
  with tempfile.TemporaryDirectory() as work:
    theirs, ours = pathlib.Path(work) / "theirs", pathlib.Path(work) / "ours"
    model.save_pretrained(theirs)
    params, config = test_parity.load(theirs)
    test_parity.save(ours, params, config)
    again = test_parity.torch_again(type(model), ours)
    pairs = zip(again.state_dict().values(), model.state_dict().values())
    same = all(np.array_equal(a.numpy(), b.numpy()) for a, b in pairs)
    prompts = [test_parity.TOKENS[0, :3], test_parity.TOKENS[1, :7]]
    texts = test_parity.torch_greedy(model, prompts, 12)
    found = test_parity.greedy(params, config, prompts, 12)
    logits = test_parity.logits(params, config, test_parity.TOKENS)
    gradient = gradient_error(model, params, config, family)
    return (
      f"`{name}`",
      mark(np.abs(np.asarray(logits) - wanted).max()),
      mark(gradient) if gradient > 1e-4 else f"{gradient:.0e}",
      "equal" if np.array_equal(found, texts) else "**differs**",
      "bitwise" if same else "**differs**",
      mark(np.abs(logits_of(again) - wanted).max()),
      older_error(older, ours, wanted) if older else "not tried",
    )


def main() -> None:
  """Prints the table, or writes it into the page."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--write", action="store_true")
  parser.add_argument("--older")
  parser.add_argument("--only", default="", help="A part of the models' names.")
  options = parser.parse_args()
  rows = [COLUMNS, ("---",) * len(COLUMNS)]
  for name in (name for name in zoo.CONFIGS if options.only in name):
    rows.append(row(name, options.older))
    print(" | ".join(rows[-1]), flush=True)
  table = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
  if options.write:
    begin, end = "<!-- table -->\n", "\n<!-- end -->"
    text = PAGE.read_text()
    pattern = f"(?s)({re.escape(begin)}).*?({re.escape(end)})"
    PAGE.write_text(re.sub(pattern, lambda m: m[1] + table + m[2], text))


if __name__ == "__main__":
  main()
