"""RLOO against TRL's RLOOTrainer on the same completions: advantages, losses, gradients and final weights."""

import pytest
from policy_parity import largest, max_differences, train_with_ours, train_with_trl
from trl import RLOOConfig, RLOOTrainer

from lightning_ft import GRPO

TOLERANCE = 1e-5
CASES = {
    "kl": ({"kl_coef": 0.3}, {"beta": 0.3}),
    "kl-lora": ({"kl_coef": 0.3, "lora": True}, {"beta": 0.3, "lora": True}),
    "no-kl": ({"kl_coef": 0.0, "clip_high": 0.3}, {"beta": 0.0, "epsilon_high": 0.3}),
    "normalized": ({"kl_coef": 0.1, "scale_rewards": "batch"}, {"beta": 0.1, "normalize_advantages": True}),
    "temperature": ({"kl_coef": 0.1, "temperature": 0.7}, {"beta": 0.1, "temperature": 0.7}),
}


@pytest.mark.parametrize("case", CASES)
def test_rloo_matches_trl(case, model_folder, tmp_path, trainer_options):
    our_options, their_options = CASES[case]
    steps = {"iterations": 2, "rate": 0.01}
    theirs = train_with_trl(RLOOTrainer, RLOOConfig, model_folder, tmp_path, **steps, **their_options)
    ours = train_with_ours(GRPO, model_folder, trainer_options, loss_type="rloo", **steps, **our_options)
    differences = max_differences(ours, theirs)
    assert max(differences.values()) < TOLERANCE, differences
    assert all(largest(step) > 0.1 for step in theirs.gradients[::2])
    clipped = [metrics["clip_ratio/region_mean"] for metrics in theirs.metrics]
    assert max(clipped[1::2]) > 0.2  # in the second epoch over a rollout the policy has changed


def test_rloo_with_masked_truncated_completions_matches_trl(model_folder, tmp_path, trainer_options):
    """TRL's loss includes the advantage of a completion without tokens, which has no gradient, so losses differ."""
    theirs = train_with_trl(
        RLOOTrainer, RLOOConfig, model_folder, tmp_path, iterations=2, beta=0.0, mask_truncated_completions=True
    )
    ours = train_with_ours(
        GRPO, model_folder, trainer_options, loss_type="rloo", iterations=2, kl_coef=0.0, mask_truncated=True
    )
    differences = max_differences(ours, theirs)
    assert max(value for name, value in differences.items() if name != "losses") < TOLERANCE, differences
