"""Ranks share the activation cache: from the second epoch on, each reads activations that the other computed."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "two_ranks_frozen.py"


def run(model, folder):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), model, str(folder)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.slow
def test_activation_cache_is_shared_between_ranks(model_folder, tmp_path):
    """Rows are shuffled, so that some rows of a rank's second epoch were in the other's first epoch."""
    first, second = run(model_folder, tmp_path)
    assert first["counts"] == second["counts"] == (12, 24)
    for name, value in first["weights"].items():
        assert torch.equal(second["weights"][name], value)
