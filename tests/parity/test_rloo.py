"""The same completions by TRL's RLOOTrainer: advantages, losses, gradients and final weights must agree."""

import pytest
from policy_parity import by_trl, by_us, distances, largest
from trl import RLOOConfig, RLOOTrainer

from lightning_ft import GRPO

TOLERANCE = 1e-5
CASES = {
    "kl": ({"kl_coef": 0.3}, {"beta": 0.3}),
    "kl-lora": ({"kl_coef": 0.3, "lora": True}, {"beta": 0.3, "lora": True}),
    "no-kl": ({"kl_coef": 0.0, "clip_high": 0.3}, {"beta": 0.0, "epsilon_high": 0.3}),
    "normalised": ({"kl_coef": 0.1, "scale_rewards": "batch"}, {"beta": 0.1, "normalize_advantages": True}),
    "temperature": ({"kl_coef": 0.1, "temperature": 0.7}, {"beta": 0.1, "temperature": 0.7}),
}


@pytest.mark.parametrize("case", CASES)
def test_advantages_losses_and_gradients(case, model_folder, tmp_path, trainer_options):
    ours_has, theirs_has = CASES[case]
    steps = {"iterations": 2, "rate": 0.01}
    theirs = by_trl(RLOOTrainer, RLOOConfig, model_folder, tmp_path, **steps, **theirs_has)
    ours = by_us(GRPO, model_folder, trainer_options, loss_type="rloo", **steps, **ours_has)
    found = distances(ours, theirs)
    assert max(found.values()) < TOLERANCE, found
    assert all(largest(step) > 0.1 for step in theirs.gradients[::2])
    clipped = [metrics["clip_ratio/region_mean"] for metrics in theirs.metrics]
    assert max(clipped[1::2]) > 0.2  # the second pass over a rollout finds a policy that has moved


def test_masked_truncated_completions(model_folder, tmp_path, trainer_options):
    """A completion without a token still adds its advantage to TRL's value, without a gradient, so losses differ."""
    theirs = by_trl(
        RLOOTrainer, RLOOConfig, model_folder, tmp_path, iterations=2, beta=0.0, mask_truncated_completions=True
    )
    ours = by_us(GRPO, model_folder, trainer_options, loss_type="rloo", iterations=2, kl_coef=0.0, mask_truncated=True)
    found = distances(ours, theirs)
    assert max(value for name, value in found.items() if name != "losses") < TOLERANCE, found
