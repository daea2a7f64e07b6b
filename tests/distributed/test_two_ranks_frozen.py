"""Ranks share what they keep of the frozen layers: from the second epoch on each reads the other's rows too."""

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
def test_rows_of_the_other_rank_are_read(model_folder, tmp_path):
    """Rows are shuffled, so a rank's rows of the second epoch are the other's of the first in part."""
    first, second = run(model_folder, tmp_path)
    assert first["counts"] == second["counts"] == (12, 24)
    for name, value in first["weights"].items():
        assert torch.equal(second["weights"][name], value)
