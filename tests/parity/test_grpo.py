"""GRPO against TRL's GRPOTrainer on the same completions: advantages, losses, KL, gradients and final weights."""

import inspect

import pytest
import torch
from policy_parity import largest, max_differences, reward, train_with_ours, train_with_trl
from trl import GRPOConfig, GRPOTrainer

from lightning_ft import GRPO
from lightning_ft.losses.policy import policy_loss

TOLERANCE = 1e-5
NAMES = {  # our names: TRL's names
    "kl_coef": "beta",
    "clip_low": "epsilon",
    "clip_high": "epsilon_high",
    "mask_truncated": "mask_truncated_completions",
    "importance": "importance_sampling_level",
    "bias_corrected_kl": "use_bias_correction_kl",
}
KL_AND_CLIP = {"kl_coef": 0.1, "clip_low": 0.1, "clip_high": 0.15, "iterations": 2}
SEQUENCE = {"importance": "sequence", "clip_low": 0.03, "clip_high": 0.04}


def compare(settings, model_folder, tmp_path, trainer_options):
    theirs = train_with_trl(
        GRPOTrainer, GRPOConfig, model_folder, tmp_path, **{NAMES.get(k, k): v for k, v in settings.items()}
    )
    ours = train_with_ours(GRPO, model_folder, trainer_options, **settings)
    differences = max_differences(ours, theirs)
    assert max(differences.values()) < TOLERANCE, differences
    return ours, theirs


CASES = {
    **{loss: {**KL_AND_CLIP, "loss_type": loss} for loss in ("grpo", "dapo", "dr_grpo", "bnpo")},
    **{f"{loss}-lora": {**KL_AND_CLIP, "loss_type": loss, "lora": True} for loss in ("grpo", "dapo")},
    "cispo": {**KL_AND_CLIP, "loss_type": "cispo", "clip_high": 1.3},
    "cispo-lora": {**KL_AND_CLIP, "loss_type": "cispo", "clip_high": 1.3, "lora": True},
    "no-kl": {"iterations": 2, "scale_rewards": "none"},
    "sequence": {**KL_AND_CLIP, **SEQUENCE, "loss_type": "grpo"},
    "sequence-lora-by-batch": {
        **SEQUENCE,
        "loss_type": "dapo",
        "lora": True,
        "iterations": 2,
        "scale_rewards": "batch",
        "rate": 0.02,
    },
    "temperature": {**KL_AND_CLIP, "temperature": 0.7, "scale_rewards": "batch"},
    "truncated": {**KL_AND_CLIP, "loss_type": "grpo", "mask_truncated": True, "temperature": 1.3},
    "truncated-dapo": {**KL_AND_CLIP, "mask_truncated": True},
    "plain-kl-two-sided": {**KL_AND_CLIP, "bias_corrected_kl": False, "delta": 1.3},
    "gradients-clipped": {**KL_AND_CLIP, "clip": 0.05},
}


@pytest.mark.parametrize("case", CASES)
def test_grpo_matches_trl(case, model_folder, tmp_path, trainer_options):
    settings = CASES[case]
    ours, theirs = compare(settings, model_folder, tmp_path, trainer_options)
    assert all(largest(step) > 1e-3 for step in theirs.gradients)
    names = {"entropy": lambda batch, result: (batch.entropy * batch.mask).sum()}
    if settings.get("kl_coef"):
        names["kl"] = lambda batch, result: result.kl
    if settings.get("importance") is None:
        cispo = {"cispo_clip_ratio": lambda batch, result: result.clipped_high}
        clip = {
            "clip_ratio/low_mean": lambda batch, result: result.clipped_low,
            "clip_ratio/high_mean": lambda batch, result: result.clipped_high,
        }
        names |= cispo if "cispo" in case else clip
    seen = dict.fromkeys(names, 0.0)
    for (batch, result), metrics in zip(ours.results, theirs.metrics, strict=True):
        for name, total in names.items():
            value = float(total(batch, result) / result.tokens)
            assert value == pytest.approx(metrics[name], abs=TOLERANCE), name
            seen[name] = max(seen[name], value)
    if case not in ("no-kl", "gradients-clipped"):  # these hardly move the policy between the steps
        assert all(value > 0 for value in seen.values()), seen


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo"])
def test_grpo_accumulation_matches_trl(loss_type, model_folder, tmp_path, trainer_options, monkeypatch):
    """Three micro-batches per step with four completions each, in the order of the rollout."""
    monkeypatch.setattr(torch, "randperm", lambda count, **options: torch.arange(count))
    settings = {**KL_AND_CLIP, "loss_type": loss_type, "parts": 3, "kl_coef": 0.0}
    ours, _ = compare(settings, model_folder, tmp_path, trainer_options)
    assert len(ours.losses) == 3 * len(ours.gradients)


def test_grpo_several_steps_per_rollout_match_trl(model_folder, tmp_path, trainer_options, monkeypatch):
    monkeypatch.setattr(torch, "randperm", lambda count, **options: torch.arange(count))
    settings = {**KL_AND_CLIP, "loss_type": "grpo", "parts": 3, "steps": 3, "rate": 0.01}
    ours, _ = compare(settings, model_folder, tmp_path, trainer_options)
    assert len(ours.losses) == len(ours.gradients) == 12


def test_grpo_defaults_equal_trl():
    """Exceptions are CISPO's bound, whose purpose TRL's 0.2 would defeat, and the length of completions."""
    theirs, ours = GRPOConfig(use_cpu=True, bf16=False), GRPO("no/such-model", rewards=reward).hparams
    same = {"loss_type": "loss_type", "scale_rewards": "scale_rewards", "learning_rate": "learning_rate"}
    same |= {"num_completions": "num_generations", "epochs_per_rollout": "num_iterations", "delta": "delta"}
    same |= {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "max_grad_norm": "max_grad_norm"}
    for name, their_name in {**same, **NAMES}.items():
        if name != "importance":  # None means the default of the loss
            assert ours[name] == getattr(theirs, their_name), name
    assert theirs.importance_sampling_level == "token"
    assert inspect.signature(policy_loss).parameters["level"].default is None
