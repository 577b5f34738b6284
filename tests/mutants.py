r"""Faults that the tests must see, each planted in a copy of the tree.

    python -m tests.mutants [--only NAME] [--jobs 2] [--list]

A mutant is one edit: a sign, a mask, a key, a temperature. Its test must pass
on the tree as it is and fail on the copy with the edit. The exit code is 1 if
a mutant survives, if its old text does not stand exactly once in its file, or
if a test fails without any edit. `tests/test_mutants.py` holds the list to the
code, so that it cannot go stale in silence.

Left out: mutants by rule (every `+` a `−`). Those here are faults that someone
made somewhere, or that a refactoring makes easily.
"""

import argparse
from collections.abc import Iterable, Iterator, Sequence
import concurrent.futures
import contextlib
import os
import pathlib
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
TREES = ("rlhf_jax", "configs", "launch", "tests")
FILES = ("pyproject.toml",)
CACHE = pathlib.Path(".cache", "jax")  # Compiled programs; see conftest.py.
LIMIT_S = 3600  # of one run of pytest: a mutant may loop for ever


class Mutant(NamedTuple):
  """One edit, and who must see it.

  Attributes:
    name: What is wrong then.
    file: Below the root.
    old: Stands exactly once in the file.
    new: Takes its place.
    test: A test file or one of its tests, as pytest takes it.
  """

  name: str
  file: str
  old: str
  new: str
  test: str


MUTANTS = (
  # Objective: masks, the shift by one, the last token.
  Mutant(
    "shift-of-the-states",
    "rlhf_jax/objective/masking.py",
    "hidden[:, -response_size - 1 : -1]",
    "hidden[:, -response_size:]",
    (
      "tests/objective/test_masking.py"
      "::test_the_state_before_a_token_predicts_it"
    ),
  ),
  Mutant(
    "stop-token-masked-out",
    "rlhf_jax/objective/masking.py",
    "jnp.arange(size) < lengths[:, None]",
    "jnp.arange(size) < lengths[:, None] - 1",
    (
      "tests/objective/test_masking.py"
      "::test_prompts_end_at_the_last_column_and_responses_begin_at_the_first"
    ),
  ),
  Mutant(
    "last-token-index",
    "rlhf_jax/objective/masking.py",
    "jnp.maximum(lengths - 1, 0)",
    "jnp.minimum(lengths, x.shape[1] - 1)",
    (
      "tests/objective/test_masking.py"
      "::test_last_token_of_stopped_full_and_empty_rows"
    ),
  ),
  Mutant(
    "score-on-the-pad",
    "rlhf_jax/objective/masking.py",
    "== lengths[:, None] - 1",
    "== lengths[:, None]",
    (
      "tests/objective/test_masking.py"
      "::test_a_score_lands_on_the_last_real_token"
    ),
  ),
  Mutant(
    "mean-over-the-padding",
    "rlhf_jax/objective/masking.py",
    "jnp.maximum(mask.sum(), 1)",
    "mask.size",
    "tests/objective/test_masking.py",
  ),
  Mutant(
    "attention-to-the-future",
    "rlhf_jax/objective/masking.py",
    "same & causal & (",
    "same & (",
    (
      "tests/objective/test_masking.py"
      "::test_attention_is_causal_within_a_text_and_never_to_padding"
    ),
  ),
  # Objective: logits, logprobs, tokens.
  Mutant(
    "temperature-inverted",
    "rlhf_jax/objective/logprobs.py",
    "logits if temperature == 1.0 else logits / temperature",
    "logits if temperature == 1.0 else logits * temperature",
    "tests/objective/test_logprobs.py::test_token_logprobs",
  ),
  Mutant(
    "temperature-not-of-the-token",
    "rlhf_jax/objective/logprobs.py",
    "chosen = _scaled(chosen, head, temperature)",
    "chosen = _scaled(chosen, head, 1.0)",
    "tests/objective/test_logprobs.py::test_token_logprobs",
  ),
  Mutant(
    "nucleus-one-token-short",
    "rlhf_jax/objective/logprobs.py",
    "before < top_p",
    "before + mass < top_p",
    "tests/objective/test_logprobs.py::test_filters_against_a_loop",
  ),
  Mutant(
    "sampling-within-a-block",
    "rlhf_jax/objective/logprobs.py",
    "target - before)",
    "target)",
    (
      "tests/objective/test_logprobs.py"
      "::test_evenly_spread_uniforms_draw_each_token_in_proportion"
    ),
  ),
  Mutant(
    "exact-kl-not-normalised",
    "rlhf_jax/objective/logprobs.py",
    "p_sum - shift,",
    "p_sum + shift,",
    "tests/objective/test_logprobs.py::test_comparison",
  ),
  Mutant(
    "gradient-of-the-forward-kl",
    "rlhf_jax/objective/logprobs.py",
    "lambda: p - jnp.exp(log_q)",
    "lambda: jnp.exp(log_q) - p",
    (
      "tests/objective/test_logprobs.py"
      "::test_gradients_of_all_statistics_add_up"
    ),
  ),
  # Objective: the penalty.
  Mutant(
    "k3-sign",
    "rlhf_jax/objective/kl.py",
    "jnp.expm1(-log_ratio) + log_ratio",
    "jnp.expm1(log_ratio) - log_ratio",
    "tests/objective/test_kl.py::test_k3_by_hand_and_never_negative",
  ),
  Mutant(
    "penalty-sign",
    "rlhf_jax/objective/kl.py",
    "nats.shape[1]) - penalty",
    "nats.shape[1]) + penalty",
    "tests/objective/test_kl.py::test_rewards_token_by_token",
  ),
  Mutant(
    "penalty-not-detached",
    "rlhf_jax/objective/kl.py",
    "importance_ratio * lax.stop_gradient(weight)",
    "importance_ratio * weight",
    "tests/objective/test_gradients.py::test_a_target_has_its_gradient",
  ),
  Mutant(
    "penalty-of-the-wrong-state",
    "rlhf_jax/objective/kl.py",
    "[:, 1:], ((0, 0), (0, 1))",
    "[:, :-1], ((0, 0), (1, 0))",
    "tests/objective/test_kl.py::test_the_next_state_by_hand",
  ),
  Mutant(
    "penalty-beyond-the-end",
    "rlhf_jax/objective/kl.py",
    "jnp.where(mask, penalty.in_reward(terms, mask), 0.0)",
    "penalty.in_reward(terms, mask)",
    "tests/objective/test_kl.py::test_no_penalty_is_paid_beyond_the_end",
  ),
  # Objective: advantages and losses.
  Mutant(
    "gae-recursion",
    "rlhf_jax/objective/advantages.py",
    "delta + gamma * gae_lambda * advantage",
    "delta + gamma * advantage",
    "tests/objective/test_advantages.py::test_gae_is_the_double_sum",
  ),
  Mutant(
    "gae-next-value",
    "rlhf_jax/objective/advantages.py",
    "rewards + gamma * next_values - values",
    "rewards + next_values - values",
    "tests/objective/test_advantages.py::test_gae_is_the_double_sum",
  ),
  Mutant(
    "rloo-counts-itself",
    "rlhf_jax/objective/advantages.py",
    "totals) / (group_size - 1)",
    "totals) / group_size",
    "tests/objective/test_advantages.py::test_leave_one_out_by_hand",
  ),
  Mutant(
    "grpo-divides-the-penalty",
    "rlhf_jax/objective/advantages.py",
    "relative - (totals - totals.mean(1, keepdims=True))",
    (
      "relative - (totals - totals.mean(1, keepdims=True)) / "
      "jnp.where(divisor > 0, divisor, 1.0)"
    ),
    (
      "tests/objective/test_advantages.py"
      "::test_normalisation_leaves_the_penalty_alone"
    ),
  ),
  Mutant(
    "whitening-hides-its-scale",
    "rlhf_jax/objective/advantages.py",
    "return centred * scale, scale",
    "return centred * scale, jnp.ones_like(scale)",
    (
      "tests/objective/test_advantages.py"
      "::test_whiten_returns_what_it_multiplied_by"
    ),
  ),
  Mutant(
    "whitening-counts-the-padding",
    "rlhf_jax/objective/advantages.py",
    "masking.masked_mean(jnp.square(centred), mask)",
    "jnp.square(centred).mean()",
    "tests/objective/test_advantages.py::test_whiten_by_hand",
  ),
  Mutant(
    "clipping-min",
    "rlhf_jax/objective/policy_loss.py",
    "jnp.maximum(-ratio * advantages",
    "jnp.minimum(-ratio * advantages",
    "tests/objective/test_policy_loss.py::test_policy_loss_by_hand",
  ),
  Mutant(
    "ratio-inverted",
    "rlhf_jax/objective/policy_loss.py",
    "jnp.clip(new_logprobs - logprobs,",
    "jnp.clip(logprobs - new_logprobs,",
    "tests/objective/test_policy_loss.py::test_policy_loss_by_hand",
  ),
  Mutant(
    "value-clipping-min",
    "rlhf_jax/objective/policy_loss.py",
    "0.5 * jnp.maximum(*errors)",
    "0.5 * jnp.minimum(*errors)",
    "tests/objective/test_policy_loss.py::test_value_loss_by_hand",
  ),
  Mutant(
    "dpo-sign",
    "rlhf_jax/objective/preference_loss.py",
    "jax.nn.log_sigmoid(chosen - rejected)",
    "jax.nn.log_sigmoid(rejected - chosen)",
    "tests/objective/test_preference_loss.py::test_by_hand",
  ),
  Mutant(
    "kto-baseline-learns",
    "rlhf_jax/objective/preference_loss.py",
    "lax.stop_gradient(jnp.maximum(mismatched.mean(), 0.0))",
    "jnp.maximum(mismatched.mean(), 0.0)",
    (
      "tests/objective/test_preference_loss.py"
      "::test_ktos_baseline_is_a_detached_mean_from_0_up"
    ),
  ),
  # Objective: what moves β, and the oracle.
  Mutant(
    "controller-direction",
    "rlhf_jax/objective/beta.py",
    "jnp.clip((kl - target) / target",
    "jnp.clip((target - kl) / target",
    "tests/objective/test_beta.py::test_ziegler_by_hand",
  ),
  Mutant(
    "controller-windup",
    "rlhf_jax/objective/beta.py",
    'jnp.where(stuck, state["integral"], total)',
    "total",
    "tests/objective/test_beta.py::test_nothing_winds_up_at_a_bound",
  ),
  Mutant(
    "controller-reads-nan",
    "rlhf_jax/objective/beta.py",
    "_where(jnp.isfinite(kl), advance",
    "_where(~jnp.isinf(kl), advance",
    "tests/objective/test_beta.py::test_a_kl_that_is_none_holds_the_state",
  ),
  Mutant(
    "oracle-beta",
    "rlhf_jax/objective/exact.py",
    "jnp.where(end, reward / beta,",
    "jnp.where(end, reward * beta,",
    "tests/objective/test_exact.py::test_a_bandit_by_hand",
  ),
  # Models.
  Mutant(
    "rope-sign",
    "rlhf_jax/models/transformer.py",
    "first * cos - second * sin",
    "first * cos + second * sin",
    "tests/models/test_transformer.py::test_forward_is_that_of_numpy",
  ),
  Mutant(
    "attention-scale",
    "rlhf_jax/models/transformer.py",
    "queries / math.sqrt(scalar)",
    "queries / scalar",
    "tests/models/test_transformer.py::test_forward_is_that_of_numpy",
  ),
  Mutant(
    "cache-written-one-late",
    "rlhf_jax/models/transformer.py",
    "new.astype(old.dtype), index, axis=2",
    "new.astype(old.dtype), index + 1, axis=2",
    "tests/models/test_transformer.py::test_cached_decode_is_the_full_forward",
  ),
  Mutant(
    "norm-without-its-scale",
    "rlhf_jax/models/transformer.py",
    "y = x32 * lax.rsqrt(variance + config.norm_epsilon) * scale",
    "y = x32 * lax.rsqrt(variance + config.norm_epsilon)",
    "tests/models/test_transformer.py::test_norms_against_numpy",
  ),
  Mutant(
    "window-one-wider",
    "rlhf_jax/models/transformer.py",
    "distance < config.window",
    "distance <= config.window",
    "tests/models/test_parity.py::test_logits_and_round_trip",
  ),
  Mutant(
    "local-layers-turn-as-global",
    "rlhf_jax/models/transformer.py",
    'if kind == "local" and config.local_rope_theta is not None:',
    'if kind == "nowhere":',
    "tests/models/test_parity.py::test_logits_and_round_trip",
  ),
  Mutant(
    "parallel-mlp-reads-the-sum",
    "rlhf_jax/models/transformer.py",
    "read = x if config.parallel_residual else x + y",
    "read = x + y",
    "tests/models/test_parity.py::test_logits_and_round_trip",
  ),
  Mutant(
    "scanned-layers-of-one-kind",
    "rlhf_jax/models/transformer.py",
    "jax.tree.map(lambda x: x[place], stacked)",
    "jax.tree.map(lambda x: x[0], stacked)",
    "tests/models/test_parity.py::test_scanned_layers_are_the_unrolled_ones",
  ),
  Mutant(
    "cap-after-the-temperature",
    "rlhf_jax/objective/logprobs.py",
    "logits = head.softcap * jnp.tanh(logits / head.softcap)",
    "logits = head.softcap * jnp.tanh(logits / temperature / head.softcap)",
    "tests/objective/test_logprobs.py::test_capped_logits_and_ids_that_are_no_tokens",
  ),
  Mutant(
    "ids-without-text-are-drawn",
    "rlhf_jax/objective/logprobs.py",
    "if head.tokens is not None:",
    "if False:",
    "tests/steps/test_ppo.py::test_what_families_differ_in_goes_through_the_whole_step",
  ),
  Mutant(
    "chosen-logit-uncapped",
    "rlhf_jax/objective/logprobs.py",
    "chosen = _scaled(chosen, head, temperature)",
    "chosen = chosen / temperature",
    "tests/objective/test_logprobs.py::test_capped_logits_and_ids_that_are_no_tokens",
  ),
  Mutant(
    "yarn-without-its-attention-factor",
    "rlhf_jax/models/rope.py",
    "return stretched, _yarn_attention(scaling, factor)",
    "return stretched, 1.0",
    "tests/models/test_parity.py::test_logits_and_round_trip",
  ),
  Mutant(
    "keys-and-values-swapped-in-one-tensor",
    "rlhf_jax/models/layouts.py",
    "np.array([wide - 2, wide - 1])",
    "np.array([wide - 2, wide - 2])",
    "tests/models/test_parity.py::test_logits_and_round_trip",
  ),
  Mutant(
    "eos-before-the-end-of-turn",
    "rlhf_jax/text/tokenizer.py",
    "first = chat.end_of_turn(tokenizer), own",
    "first = own, chat.end_of_turn(tokenizer)",
    "tests/text/test_chat.py::test_a_response_ends_with_the_turn",
  ),
  Mutant(
    "answer-with-the-end-of-its-turn-twice",
    "rlhf_jax/text/chat.py",
    "return found[: len(found) - 1 - found[::-1].index(end)]",
    "return found",
    "tests/text/test_chat.py::test_an_answer_goes_on_from_its_prompt",
  ),
  Mutant(
    "bos-lost-with-the-beginning",
    "rlhf_jax/data/arrays.py",
    "return [*ids[:1], *ids[1 - size :]]",
    "return ids[-size:]",
    "tests/data/test_arrays.py::test_a_prompt_that_is_cut_keeps_its_bos",
  ),
  Mutant(
    "pad-that-ends-scored-texts",
    "rlhf_jax/storage/export.py",
    "if tokenizer.pad_token_id not in (*stop_ids, None):",
    "if True:",
    "tests/storage/test_export.py::test_transformers_scores_what_we_score",
  ),
  Mutant(
    "tied-head-untied",
    "rlhf_jax/models/convert.py",
    'f"|{head}" * config.tie_embeddings',
    'f"|{head}"',
    (
      "tests/models/test_convert.py"
      "::test_lm_head_of_an_untied_reward_model_is_extra"
    ),
  ),
  # Text.
  Mutant(
    "bos-of-a-response",
    "rlhf_jax/text/tokenizer.py",
    "joint_ids[len(prompt_ids) :]",
    "joint_ids[len(prompt_ids) - 1 :]",
    "tests/text/test_tokenizer.py::test_pair",
  ),
  Mutant(
    "gold-pays-faults",
    "rlhf_jax/text/toy_language.py",
    "bent - self.gold_price * faults",
    "bent + self.gold_price * faults",
    "tests/text/test_toy_language.py::test_gold_of_hand_worked_texts",
  ),
  Mutant(
    "judge-prefers-the-worse",
    "rlhf_jax/text/toy_language.py",
    "(gold_first - gold_second) / temperature",
    "(gold_second - gold_first) / temperature",
    (
      "tests/text/test_toy_language.py"
      "::test_preferences_are_drawn_by_bradley_and_terry"
    ),
  ),
  Mutant(
    "nan-reward-passes",
    "rlhf_jax/text/rewards.py",
    "if not abs(float(score)) <= _LARGEST:",
    "if abs(float(score)) > _LARGEST:",
    (
      "tests/text/test_rewards.py"
      "::test_what_is_wrong_with_a_return_is_said_after_the_step"
    ),
  ),
  Mutant(
    "reward-reads-the-padding",
    "rlhf_jax/text/rewards.py",
    "self._decode(row[len(row) - length :])",
    "self._decode(row)",
    "tests/text/test_rewards.py::test_the_function_reads_the_texts",
  ),
  # Storage.
  Mutant(
    "manifest-not-checked",
    "rlhf_jax/storage/checkpoint.py",
    "if _sum(file) != wanted:",
    "if not _sum(file):",
    "tests/storage/test_checkpoint.py::test_a_flipped_bit_anywhere_falls_back",
  ),
  Mutant(
    "oldest-checkpoint-restored",
    "rlhf_jax/storage/checkpoint.py",
    "for step in reversed(steps):",
    "for step in steps:",
    "tests/storage/test_checkpoint.py::test_restores_the_newest_bit_for_bit",
  ),
  Mutant(
    "hash-without-the-numbers",
    "rlhf_jax/storage/checkpoint.py",
    "digest.update(array.reshape(-1).view(np.uint8).data)",
    "del array",
    "tests/storage/test_checkpoint.py::test_tree_hash_tells_trees_apart",
  ),
  Mutant(
    "newest-checkpoints-deleted",
    "rlhf_jax/storage/checkpoint.py",
    "[-self._keep :]",
    "[: self._keep]",
    (
      "tests/storage/test_checkpoint.py"
      "::test_keeps_the_newest_and_forgets_the_future"
    ),
  ),
  Mutant(
    "cache-of-another-reference",
    "rlhf_jax/storage/reference_cache.py",
    "(then := header[what]) != now",
    '(then := header[what]) != now and what != "reference"',
    "tests/storage/test_reference_cache.py::test_a_stale_cache_is_refused",
  ),
  Mutant(
    "rewind-keeps-one-too-many",
    "rlhf_jax/storage/workdir.py",
    'row["step"] < step',
    'row["step"] <= step',
    "tests/storage/test_workdir.py::test_rewind_forgets_what_is_done_again",
  ),
  Mutant(
    "secrets-in-the-workdir",
    "rlhf_jax/storage/workdir.py",
    "if value and _SECRET.search(name):",
    "if value and _SECRET.fullmatch(name):",
    "tests/storage/test_workdir.py::test_secrets_are_masked",
  ),
  Mutant(
    "resumed-as-another-run",
    "rlhf_jax/storage/workdir.py",
    '"mesh.*",',
    '"mesh.*",\n  "kl.*",',
    "tests/storage/test_workdir.py::test_resume_with_another_config",
  ),
  # Settings.
  Mutant(
    "schedule-counts-steps",
    "rlhf_jax/settings/static.py",
    "config.train.steps * updates_per_step",
    "config.train.steps",
    "tests/settings/test_static.py::test_the_schedule_counts_updates",
  ),
  Mutant(
    "warmup-counts-steps",
    "rlhf_jax/settings/static.py",
    "warmup_steps * updates_per_step",
    "warmup_steps",
    "tests/settings/test_static.py::test_the_schedule_counts_updates",
  ),
  Mutant(
    "penalty-of-another-estimator",
    "rlhf_jax/settings/static.py",
    "kl.PENALTIES[config.kl.gradient, config.kl.estimator]",
    'kl.PENALTIES[config.kl.gradient, "sampled"]',
    (
      "tests/settings/test_static.py"
      "::test_the_step_is_compiled_with_the_penalty_and_the_groups"
    ),
  ),
  Mutant(
    "drawn-at-temperature-1",
    "rlhf_jax/settings/static.py",
    "temperature=config.rollout.temperature,",
    "temperature=1.0,",
    (
      "tests/settings/test_static.py"
      "::test_responses_are_drawn_as_the_config_says"
    ),
  ),
  Mutant(
    "stop-ids-of-the-config-ignored",
    "rlhf_jax/settings/static.py",
    "== (-1,) else stop_ids",
    "== (-1,) else pretrained.stop_ids",
    (
      "tests/settings/test_static.py"
      "::test_responses_are_drawn_as_the_config_says"
    ),
  ),
  Mutant(
    "anchor-never-charged",
    "rlhf_jax/settings/static.py",
    "anchored=config.kl.anchored",
    "anchored=False",
    "tests/stages/test_ppo.py::test_a_prefix_and_the_kl_that_it_cannot_hide",
  ),
  Mutant(
    "policy-as-every-reference",
    "rlhf_jax/settings/roles.py",
    "if not config.reference.path:",
    "if config.reference.path is not None:",
    "tests/stages/test_ppo.py::test_another_reference",
  ),
  Mutant(
    "biased-recipe-unasked",
    "rlhf_jax/settings/validate.py",
    "if not config.kl.allow_biased:",
    "if config.kl.allow_biased is None:",
    "tests/settings/test_validate.py::test_a_biased_recipe_needs_open_eyes",
  ),
  Mutant(
    "prefix-before-bos",
    "rlhf_jax/settings/prefix.py",
    "prompt[: self.begin] + self.ids +",
    "self.ids + prompt[: self.begin] +",
    "tests/settings/test_prefix.py::test_the_prefix_follows_bos",
  ),
  # Data.
  Mutant(
    "pairs-split-by-row",
    "rlhf_jax/data/preferences.py",
    "by=prompts_of(pairs)",
    "by=None",
    (
      "tests/data/test_preferences.py"
      "::test_a_prompt_is_on_one_side_with_all_its_pairs"
    ),
  ),
  Mutant(
    "pairs-without-a-stop",
    "rlhf_jax/data/preferences.py",
    "(prompt, chosen + stop, rejected + stop)",
    "(prompt, chosen, rejected)",
    "tests/data/test_preferences.py::test_both_sides_as_the_file_has_them",
  ),
  Mutant(
    "texts-without-a-stop",
    "rlhf_jax/data/texts.py",
    "response + stop)",
    "response)",
    (
      "tests/data/test_preferences.py"
      "::test_responses_of_texts_end_with_the_stop"
    ),
  ),
  Mutant(
    "sides-swapped",
    "rlhf_jax/data/preferences.py",
    "(pick(first_wins), pick(~first_wins))",
    "(pick(~first_wins), pick(first_wins))",
    (
      "tests/data/test_preferences.py"
      "::test_a_sure_judge_prefers_what_gold_prefers"
    ),
  ),
  Mutant(
    "both-answers-from-one-draw",
    "rlhf_jax/data/preferences.py",
    "for offset in (2, 3)",
    "for offset in (2, 2)",
    (
      "tests/data/test_preferences.py"
      "::test_a_sure_judge_prefers_what_gold_prefers"
    ),
  ),
  Mutant(
    "one-draw-for-all-batches",
    "rlhf_jax/data/sampling.py",
    "jax.random.fold_in(key, index)",
    "key",
    (
      "tests/data/test_preferences.py"
      "::test_a_sure_judge_prefers_what_gold_prefers"
    ),
  ),
  Mutant(
    "mix-reads-what-is-held-out",
    "rlhf_jax/data/mix.py",
    "seen, _ = texts.read(",
    "_, seen = texts.read(",
    (
      "tests/data/test_mix.py"
      "::test_they_are_the_texts_of_sft_without_those_held_out"
    ),
  ),
  Mutant(
    "ppo-asks-held-out-prompts",
    "rlhf_jax/data/prompts.py",
    "path, config.data.heldout_fraction",
    "path, 0.0",
    "tests/measures/test_evaluation.py::test_prompts_of_a_file",
  ),
  Mutant(
    "equal-rows-on-both-sides",
    "rlhf_jax/data/batches.py",
    "held[members[group]] = True",
    "held[members[group][0]] = True",
    "tests/data/test_batches.py::test_equal_rows_stay_on_one_side",
  ),
  Mutant(
    "one-order-for-all-epochs",
    "rlhf_jax/data/batches.py",
    "_FIRST_EPOCH + epoch",
    "_FIRST_EPOCH",
    "tests/data/test_batches.py::test_every_row_once_an_epoch",
  ),
  Mutant(
    "filled-rows-not-dropped",
    "rlhf_jax/data/batches.py",
    "np.concatenate(parts)[:count]",
    "np.concatenate(parts)",
    (
      "tests/data/test_batches.py"
      "::test_map_rows_gives_every_row_once_and_in_order"
    ),
  ),
  Mutant(
    "prompts-padded-right",
    "rlhf_jax/data/arrays.py",
    "real[:, ::-1] if left else real",
    "real",
    "tests/data/test_arrays.py::test_prompts_by_hand",
  ),
  Mutant(
    "prompt-in-the-sft-loss",
    "rlhf_jax/data/arrays.py",
    "start + max(len(texts[text][0]), 1)",
    "start + 1",
    "tests/data/test_arrays.py::test_packing_by_hand",
  ),
  Mutant(
    "packed-texts-share-positions",
    "rlhf_jax/data/arrays.py",
    "np.arange(stop - start)",
    "np.arange(start, stop)",
    "tests/data/test_arrays.py::test_packing_by_hand",
  ),
  Mutant(
    "chosen-and-rejected-of-a-file",
    "rlhf_jax/data/readers.py",
    'return PairText(_field(where, row, "prompt"), chosen, rejected)',
    'return PairText(_field(where, row, "prompt"), rejected, chosen)',
    (
      "tests/data/test_readers.py"
      "::test_prompts_are_cut_off_where_all_responses_repeat_them"
    ),
  ),
  # Steps.
  Mutant(
    "ratio-to-the-learner",
    "rlhf_jax/steps/ppo.py",
    "logprobs=rollout.logprobs",
    "logprobs=charged.comparison.logprobs",
    "tests/steps/test_ppo.py::test_the_ratio_is_to_the_policy_that_sampled",
  ),
  Mutant(
    "errors-ignore-groups",
    "rlhf_jax/steps/ledger.py",
    "masking.mean_and_error(per_response, group_size=group_size)",
    "masking.mean_and_error(per_response)",
    "tests/stages/test_ppo.py::test_errors_are_over_prompts",
  ),
  Mutant(
    "one-key-for-all-steps",
    "rlhf_jax/steps/ppo.py",
    "jax.random.fold_in(key, state.step)",
    "jax.random.fold_in(key, 0)",
    "tests/steps/test_ppo.py::test_noise_is_new_in_every_row_and_step",
  ),
  Mutant(
    "whitening-changes-the-price",
    "rlhf_jax/steps/ppo.py",
    "scale * beta",
    "scale * 0 + beta",
    (
      "tests/steps/test_penalties.py"
      "::test_whitening_scales_the_penalty_as_it_scales_the_rewards"
    ),
  ),
  Mutant(
    "reference-shares-buffers",
    "rlhf_jax/steps/reference.py",
    'jax.tree.map(jnp.copy, policy["transformer"])',
    'policy["transformer"]',
    (
      "tests/steps/test_ppo.py"
      "::test_donation_takes_the_state_and_spares_the_frozen"
    ),
  ),
  Mutant(
    "loss-divided-by-tokens",
    "rlhf_jax/steps/learner.py",
    "mask / (rows * config.rollout.response_length)",
    "mask / mask.sum()",
    "tests/steps/test_ppo.py::test_microbatches_add_up_to_the_whole",
  ),
  Mutant(
    "reference-at-another-temperature",
    "rlhf_jax/steps/reference.py",
    "temperature=config.rollout.temperature",
    "temperature=1.0",
    "tests/steps/test_ppo.py::test_ledger_is_that_of_the_full_logits",
  ),
  Mutant(
    "decoded-beyond-the-stop",
    "rlhf_jax/steps/rollout.py",
    "alive & ~jnp.isin(token, stop_ids)",
    "alive",
    (
      "tests/steps/test_rollout.py"
      "::test_a_response_ends_with_its_first_stop_token"
    ),
  ),
  Mutant(
    "stop-token-not-counted",
    "rlhf_jax/steps/rollout.py",
    'loop["lengths"] + alive',
    'loop["lengths"] + still',
    (
      "tests/steps/test_rollout.py"
      "::test_a_response_ends_with_its_first_stop_token"
    ),
  ),
  Mutant(
    "decode-positions-with-padding",
    "rlhf_jax/steps/rollout.py",
    "(prompts.lengths + t - 1)",
    "(prompt_size + 0 * prompts.lengths + t - 1)",
    "tests/steps/test_rollout.py::test_more_left_padding_changes_nothing",
  ),
  Mutant(
    "reward-not-centred",
    "rlhf_jax/steps/rewards.py",
    '(raw - moments["mean"]) / moments["std"]',
    'raw / moments["std"]',
    (
      "tests/steps/test_rewards.py"
      "::test_a_models_score_is_normalised_by_its_own_moments"
    ),
  ),
  Mutant(
    "reward-before-the-last-token",
    "rlhf_jax/steps/rewards.py",
    "sequences.prompt_tokens.shape[1] + sequences.response_lengths",
    "sequences.prompt_tokens.shape[1] + sequences.response_lengths - 1",
    "tests/steps/test_rewards.py::test_raw_scores_read_the_last_real_token",
  ),
  Mutant(
    "two-rules-for-a-parameter",
    "rlhf_jax/steps/sharding.py",
    '(r"(^|/)final_norm/(scale|bias)$", P())',
    '(r"norm/(scale|bias)$", P())',
    (
      "tests/steps/test_sharding.py"
      "::test_every_parameter_matches_one_rule_and_every_rule_is_needed"
    ),
  ),
  Mutant(
    "decay-of-norms",
    "rlhf_jax/steps/optimizer.py",
    'path[-1].key in ("kernel", "tokens")',
    'path[-1].key != "bias"',
    (
      "tests/steps/test_optimizer.py"
      "::test_weights_decay_and_norms_and_biases_do_not"
    ),
  ),
  Mutant(
    "sft-mask-not-shifted",
    "rlhf_jax/steps/sft.py",
    ".loss_mask[:, 1:]",
    ".loss_mask[:, :-1]",
    "tests/steps/test_sft.py::test_the_loss_is_the_mean_over_predicted_tokens",
  ),
  Mutant(
    "dpo-counts-the-padding",
    "rlhf_jax/steps/dpo.py",
    "masking.per_response(per_token, mask), 2",
    "per_token.sum(1), 2",
    "tests/steps/test_dpo.py::test_what_is_masked_changes_no_bit",
  ),
  Mutant(
    "kl-of-the-prefix-itself",
    "rlhf_jax/steps/anchor.py",
    "columns < padding + prefix.begin",
    "columns < padding",
    (
      "tests/steps/test_anchor.py"
      "::test_without_prefix_is_the_prompts_as_they_were"
    ),
  ),
  Mutant(
    "mix-not-rescaled",
    "rlhf_jax/steps/text_mix.py",
    "mix.coefficient * scale / tokens",
    "mix.coefficient / tokens",
    (
      "tests/steps/test_text_mix.py"
      "::test_a_nat_costs_reward_units_beside_whitened_advantages"
    ),
  ),
  # Stages.
  Mutant(
    "dpo-reference-at-temperature-1",
    "rlhf_jax/stages/dpo.py",
    "score(reference, batch, asked)",
    "score(reference, batch, dpo.DPOConfig(held.model, config.dpo.loss))",
    (
      "tests/stages/test_dpo.py"
      "::test_the_reference_is_scored_at_the_policys_temperature"
    ),
  ),
  Mutant(
    "reward-normalised-on-training-prompts",
    "rlhf_jax/stages/reward_model.py",
    "preferences.prompts_of(heldout)",
    "preferences.prompts_of(train)",
    (
      "tests/stages/test_reward_model.py"
      "::test_what_is_held_out_judges_and_normalises"
    ),
  ),
  Mutant(
    "ppo-schedule-counts-epochs",
    "rlhf_jax/stages/ppo.py",
    "updates_per_step=updates",
    "updates_per_step=config.ppo.epochs",
    (
      "tests/stages/test_ppo.py"
      "::test_the_rate_falls_over_updates_and_not_over_steps"
    ),
  ),
  Mutant(
    "loop-never-rewinds",
    "rlhf_jax/stages/loop.py",
    "    rewind(first)\n",
    "",
    (
      "tests/stages/test_loop.py"
      "::test_a_signal_saves_and_a_resumed_run_is_the_same"
    ),
  ),
  Mutant(
    "stages-never-rewind",
    "rlhf_jax/stages/training.py",
    "rewind=self.workdir.rewind",
    "rewind=lambda step: None",
    (
      "tests/stages/test_sft.py"
      "::test_steps_beyond_the_checkpoint_are_in_no_file_twice"
    ),
  ),
  Mutant(
    "ppo-never-rewinds",
    "rlhf_jax/stages/ppo.py",
    "member.workdir.rewind(index)",
    "del member",
    "tests/stages/test_sweep.py::test_resume_does_the_chunk_that_is_missing",
  ),
  Mutant(
    "frontier-shares-the-draw",
    "rlhf_jax/stages/sweep_frontier.py",
    "_MEMBERS, _REFERENCE, _BEST_OF_N = range(3)",
    "_MEMBERS, _REFERENCE, _BEST_OF_N = 0, 0, 2",
    (
      "tests/stages/test_sweep.py"
      "::test_an_untrained_member_does_not_tie_with_its_reference"
    ),
  ),
  Mutant(
    "another-reference-on-resume",
    "rlhf_jax/stages/loop.py",
    "if metadata != run.metadata:",
    "if metadata.keys() != run.metadata.keys():",
    "tests/stages/test_loop.py::test_another_reference_is_refused",
  ),
  Mutant(
    "groups-of-other-prompts",
    "rlhf_jax/stages/ppo.py",
    "np.repeat(x, config.ppo.group_size, axis=0)",
    "np.concatenate([x] * config.ppo.group_size)",
    "tests/stages/test_ppo.py::test_responses_come_in_groups",
  ),
  Mutant(
    "members-share-their-noise",
    "rlhf_jax/stages/ppo.py",
    "jax.random.key(place.config.seed)",
    "jax.random.key(config.seed + 0 * place.config.seed)",
    "tests/stages/test_sweep.py::test_chunks_and_single_runs",
  ),
  Mutant(
    "alarm-too-early",
    "rlhf_jax/stages/alarms.py",
    "< -3 * figure",
    "< -2 * figure",
    "tests/stages/test_alarms.py::test_each_alarm_begins_above_its_threshold",
  ),
  Mutant(
    "dpo-ledger-asks-training-prompts",
    "rlhf_jax/stages/dpo.py",
    "preferences.prompts_of(sides[1])",
    "preferences.prompts_of(sides[0])",
    "tests/stages/test_dpo.py::test_what_is_held_out_is_judged_and_asked",
  ),
  Mutant(
    "dpo-judged-on-what-it-learned",
    "rlhf_jax/stages/dpo.py",
    "_heldout(stage, state, heldout, compiled.step)",
    "_heldout(stage, state, train, compiled.step)",
    "tests/stages/test_dpo.py::test_what_is_held_out_is_judged_and_asked",
  ),
  Mutant(
    "dpo-sees-one-batch",
    "rlhf_jax/stages/dpo.py",
    "stage.batch(train, index)",
    "stage.batch(train, 0)",
    "tests/stages/test_dpo.py::test_what_is_held_out_is_judged_and_asked",
  ),
  Mutant(
    "dpo-saves-its-start",
    "rlhf_jax/stages/dpo.py",
    "stage.trained(state.params)",
    "stage.start",
    "tests/stages/test_dpo.py::test_it_leaves_what_the_contract_names",
  ),
  Mutant(
    "dpo-alarms-are-silent",
    "rlhf_jax/stages/dpo.py",
    "in self._watch.alarms(index, looked.scalars):",
    "in ():",
    "tests/stages/test_dpo.py::test_alarms_are_printed",
  ),
  Mutant(
    "reward-model-judged-on-what-it-learned",
    "rlhf_jax/stages/reward_model.py",
    "batch, settings), heldout",
    "batch, settings), train",
    (
      "tests/stages/test_reward_model.py"
      "::test_what_is_held_out_judges_and_normalises"
    ),
  ),
  Mutant(
    "sft-measured-on-what-it-read",
    "rlhf_jax/stages/sft.py",
    "batch, settings), heldout",
    "batch, settings), train",
    "tests/stages/test_sft.py::test_it_is_measured_on_what_it_did_not_read",
  ),
  Mutant(
    "stages-see-one-batch",
    "rlhf_jax/stages/training.py",
    "seed=config.seed, step=index",
    "seed=config.seed, step=0",
    (
      "tests/stages/test_sft.py"
      "::test_steps_beyond_the_checkpoint_are_in_no_file_twice"
    ),
  ),
  Mutant(
    "reward-model-sees-one-batch",
    "rlhf_jax/stages/reward_model.py",
    "stage.batch(train, index)",
    "stage.batch(train, 0)",
    (
      "tests/stages/test_reward_model.py"
      "::test_steps_beyond_the_checkpoint_are_in_no_file_twice"
    ),
  ),
  Mutant(
    "ppo-sees-one-batch",
    "rlhf_jax/stages/ppo.py",
    "seed=config.seed, step=index",
    "seed=config.seed, step=0",
    (
      "tests/stages/test_ppo.py"
      "::test_the_rate_falls_over_updates_and_not_over_steps"
    ),
  ),
  Mutant(
    "ppo-saves-its-start",
    "rlhf_jax/stages/ppo.py",
    'params={"transformer": params}',
    "params=models.policy.params",
    "tests/stages/test_pipeline.py::test_each_stage_leaves_what_it_trained",
  ),
  Mutant(
    "sft-saves-its-start",
    "rlhf_jax/stages/sft.py",
    "stage.trained(state.params)",
    "stage.start",
    (
      "tests/stages/test_sft.py"
      "::test_steps_beyond_the_checkpoint_are_in_no_file_twice"
    ),
  ),
  Mutant(
    "reward-model-from-a-random-start",
    "rlhf_jax/stages/pipeline.py",
    'config.policy.path if stage != "sft" else ""',
    '""',
    "tests/stages/test_pipeline.py::test_each_stage_leaves_what_it_trained",
  ),
  Mutant(
    "another-reward-on-resume",
    "rlhf_jax/stages/ppo.py",
    '"reward": models.reward.identity',
    '"reward": ""',
    "tests/stages/test_ppo.py::test_another_reward_is_refused_on_resume",
  ),
  Mutant(
    "another-start-on-resume",
    "rlhf_jax/stages/reward_model.py",
    "checkpoint.tree_hash(policy.params)",
    '""',
    (
      "tests/stages/test_reward_model.py"
      "::test_another_policy_to_stand_on_is_refused_on_resume"
    ),
  ),
  Mutant(
    "frontier-asks-training-prompts",
    "rlhf_jax/stages/sweep_frontier.py",
    "shared=True",
    "shared=False",
    (
      "tests/stages/test_sweep.py"
      "::test_an_untrained_member_does_not_tie_with_its_reference"
    ),
  ),
  Mutant(
    "opponent-as-reference",
    "rlhf_jax/stages/evaluate.py",
    "against(models.policy, models.reference, _POLICY)",
    "against(models.policy, opponent, _POLICY)",
    "tests/stages/test_evaluate.py::test_another_opponent",
  ),
  Mutant(
    "opponent-shares-the-draw",
    "rlhf_jax/stages/evaluate.py",
    "_POLICY, _OPPONENT, _BEST_OF_N = range(3)",
    "_POLICY, _OPPONENT, _BEST_OF_N = 0, 0, 2",
    "tests/stages/test_evaluate.py::test_another_opponent",
  ),
  # Measures.
  Mutant(
    "ties-are-losses",
    "rlhf_jax/measures/evaluation.py",
    "np.where(ties, 0.5, mine > theirs)",
    "np.where(ties, 0.0, mine > theirs)",
    "tests/measures/test_evaluation.py::test_who_wins",
  ),
  Mutant(
    "mean-of-ratios",
    "rlhf_jax/measures/evaluation.py",
    "ratio = x.sum() / n.sum()",
    "ratio = (x / n).mean()",
    "tests/measures/test_evaluation.py::test_error_of_a_ratio",
  ),
  Mutant(
    "evaluated-on-training-seeds",
    "rlhf_jax/measures/evaluation.py",
    "seed = HELD_OUT + config.seed",
    "seed = config.seed",
    (
      "tests/measures/test_evaluation.py"
      "::test_heldout_prompts_are_of_no_training_seed"
    ),
  ),
  Mutant(
    "retention-of-training-texts",
    "rlhf_jax/measures/retention.py",
    "evaluation.HELD_OUT + config.seed",
    "config.seed",
    "tests/measures/test_retention.py::test_the_built_in_language",
  ),
  Mutant(
    "best-of-n-with-repetition",
    "rlhf_jax/measures/best_of_n.py",
    "math.comb(rank, n - 1) / subsets",
    "((rank + 1) ** n - rank**n) / size**n",
    "tests/measures/test_best_of_n.py::test_scores_are_means_over_all_subsets",
  ),
  Mutant(
    "dominated-on-the-front",
    "rlhf_jax/measures/frontier.py",
    "np.logical_and(gain >= 0, cost <= 0)",
    "np.logical_and(gain >= 0, cost >= 0)",
    "tests/measures/test_frontier.py::test_the_front_of_hand_made_points",
  ),
  Mutant(
    "retention-of-the-reference",
    "rlhf_jax/measures/retention.py",
    '(("nll", policy), ("reference_nll", reference))',
    '(("nll", reference), ("reference_nll", policy))',
    "tests/measures/test_retention.py::test_files",
  ),
  Mutant(
    "enumerated-at-temperature-1",
    "rlhf_jax/measures/enumeration.py",
    "temperature=temperature)",
    "temperature=1.0)",
    (
      "tests/measures/test_enumeration.py"
      "::test_levels_are_those_of_a_plain_forward"
    ),
  ),
  Mutant(
    "smallest-beta-recommended",
    "rlhf_jax/measures/recommendation.py",
    "if gain >= enough][-1]",
    "if gain >= enough][0]",
    (
      "tests/measures/test_recommendation.py"
      "::test_without_gold_most_of_the_gain_is_kept"
    ),
  ),
)


class Outcome(NamedTuple):
  """What became of a mutant, or of the tests without one."""

  verdict: str
  seconds: float
  output: str = ""


CAUGHT = "caught"
# A mutant that no Python runs is no fault that a test has seen.
_BROKEN = re.compile(r"^E +(Name|Import|ModuleNotFound|Syntax)Error", re.M)


def fault_of(mutant: Mutant) -> str | None:
  """Why an edit cannot be made, or None if it can."""
  file = ROOT / mutant.file
  if not file.is_file():
    return f"{mutant.file}: no such file"
  count = file.read_text().count(mutant.old)
  if count != 1:
    return f"{mutant.file}: {mutant.old!r} stands {count} times; wanted once"
  return None


@contextlib.contextmanager
def copied_tree() -> Iterator[pathlib.Path]:
  """A copy of all that the tests read, with the same compilation cache."""
  with tempfile.TemporaryDirectory(prefix="mutants-") as directory:
    tree = pathlib.Path(directory) / "tree"
    ignored = shutil.ignore_patterns("__pycache__", ".*")
    for name in TREES:
      shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for name in FILES:
      shutil.copy(ROOT / name, tree / name)
    (ROOT / CACHE).resolve().mkdir(parents=True, exist_ok=True)
    (tree / CACHE).parent.mkdir(parents=True)
    (tree / CACHE).symlink_to((ROOT / CACHE).resolve())
    yield tree


def passes(tree: pathlib.Path, tests: Iterable[str]) -> Outcome:
  """Runs tests in a tree; the verdict is pytest's, in words."""
  command = [sys.executable, "-m", "pytest", "-x", "-q"]
  command += ["-n", "0", "-p", "no:cacheprovider", *tests]
  # No bytecode: a file that is edited and restored within a second may keep
  # its size and its time, by which Python knows a stale one.
  environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
  began = time.monotonic()
  try:
    found = subprocess.run(
      command,
      cwd=tree,
      env=environment,
      capture_output=True,
      text=True,
      timeout=LIMIT_S,
    )
  except subprocess.TimeoutExpired:
    return Outcome(f"more than {LIMIT_S} s", time.monotonic() - began)
  # Of pytest: 1 is a test that failed; what is not 0 or 1 is no verdict (2 an
  # import that failed, 4 and 5 no such test).
  verdict = {0: "passed", 1: "failed"}.get(
    found.returncode, f"pytest ended with {found.returncode}"
  )
  seconds = time.monotonic() - began
  return Outcome(verdict, seconds, found.stdout + found.stderr)


def outcome_of(tree: pathlib.Path, mutant: Mutant) -> Outcome:
  """Plants one mutant, runs its test, and puts the file back."""
  file = tree / mutant.file
  whole = file.read_text()
  file.write_text(whole.replace(mutant.old, mutant.new))
  try:
    found = passes(tree, [mutant.test])
  finally:
    file.write_text(whole)
  verdict = {"failed": CAUGHT, "passed": "SURVIVES"}.get(found.verdict)
  if verdict == CAUGHT and _BROKEN.search(found.output):
    verdict = "does not run"
  return found._replace(verdict=verdict or found.verdict)


def run(mutants: Sequence[Mutant], jobs: int) -> bool:
  """Runs the tests unmutated and then mutated; whether all is as it should."""
  trees: queue.Queue[pathlib.Path] = queue.Queue()

  def in_a_tree(function, *arguments):
    tree = trees.get()
    try:
      return function(tree, *arguments)
    finally:
      trees.put(tree)

  with contextlib.ExitStack() as stack:
    for _ in range(jobs):
      trees.put(stack.enter_context(copied_tree()))
    pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(jobs))
    shares = [pool.submit(in_a_tree, passes, s) for s in _shares(mutants, jobs)]
    unmutated = [share.result() for share in shares]
    seconds = max(found.seconds for found in unmutated)
    if faults := [found for found in unmutated if found.verdict != "passed"]:
      for found in faults:
        print(f"{found.output}\nunmutated: {found.verdict}")
      return False
    print(f"unmutated: passed in {seconds:.0f} s\n", flush=True)
    outcomes = [pool.submit(in_a_tree, outcome_of, m) for m in mutants]
    for mutant, future in zip(mutants, outcomes):
      print(_row(mutant, future.result()), flush=True)
    verdicts = [future.result().verdict for future in outcomes]
  caught = verdicts.count(CAUGHT)
  print(f"\n{caught} of {len(mutants)} mutants are caught")
  return caught == len(mutants)


def _shares(mutants: Sequence[Mutant], jobs: int) -> list[list[str]]:
  """The tests of the mutants, those of a file together, in `jobs` shares."""
  by_file: dict[str, set[str]] = {}
  for mutant in mutants:
    by_file.setdefault(mutant.test.partition("::")[0], set()).add(mutant.test)
  shares: list[list[str]] = [[] for _ in range(min(jobs, len(by_file)))]
  for index, tests in enumerate(by_file.values()):
    shares[index % len(shares)] += sorted(tests)
  return shares


def _row(mutant: Mutant, found: Outcome) -> str:
  cells = mutant.name, mutant.file, mutant.test, found.verdict
  return f"{' · '.join(cells)} · {found.seconds:.0f} s"


def main(arguments: Sequence[str] | None = None) -> int:
  """The command; returns its exit code."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument(
    "--only", action="append", metavar="NAME", help="a mutant; may be repeated"
  )
  parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
  parser.add_argument("--list", action="store_true", help="show and do nothing")
  options = parser.parse_args(arguments)
  names = options.only or [mutant.name for mutant in MUTANTS]
  if unknown := set(names) - {mutant.name for mutant in MUTANTS}:
    parser.error(f"no mutants of these names: {', '.join(sorted(unknown))}")
  chosen = [mutant for mutant in MUTANTS if mutant.name in names]
  if options.list:
    for mutant in chosen:
      print(f"{mutant.name} · {mutant.file} · {mutant.test}")
    return 0
  if faults := list(filter(None, map(fault_of, chosen))):
    print("\n".join(faults))
    return 1
  return 0 if run(chosen, options.jobs) else 1


if __name__ == "__main__":
  sys.exit(main())
