"""Two ranks with four rows each take the same steps as one process with eight."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).parent / "two_ranks.py"


def run(strategy, method, model, folder):
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, str(SCRIPT), strategy, method, model, str(folder)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "r.pt", weights_only=True)


@pytest.mark.parametrize(
    ("method", "strategy"),
    [
        ("full", "ddp"),
        pytest.param("lora", "fsdp", marks=pytest.mark.slow),
        pytest.param("full", "fsdp", marks=pytest.mark.slow),
        pytest.param("lora", "ddp", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_match_one_process_in_sft(model_folder, tmp_path, method, strategy):
    one = run("one", method, model_folder, tmp_path / "one")
    assert len(one["steps"]) == 3
    two = run(strategy, method, model_folder, tmp_path / strategy)
    assert len(two["steps"]) == 3
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-5)
    for expected, actual in zip(one["steps"], two["steps"], strict=True):
        assert expected.keys() == actual.keys()
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=1e-5)
    for name in ("val/loss", "val/token_accuracy"):
        assert two["metrics"][name] == pytest.approx(one["metrics"][name], abs=1e-5)
    assert two["answers"] == one["answers"]
    assert two["savings"] == pytest.approx(one["savings"], abs=1e-9)

    checkpoints = [
        torch.load(tmp_path / run_name / "end.ckpt", weights_only=True)["state_dict"] for run_name in ("one", strategy)
    ]
    assert checkpoints[0].keys() == checkpoints[1].keys()
    for name, value in checkpoints[0].items():
        # Adam changes a weight by about the learning rate (1e-2) whatever its gradient, so rounding of tiny ones shows.
        torch.testing.assert_close(checkpoints[1][name], value, rtol=0, atol=5e-5)
    file = "export/last/" + ("adapter_model.safetensors" if method == "lora" else "model.safetensors")
    exports = [load_file(tmp_path / run_name / file) for run_name in ("one", strategy)]
    assert exports[0].keys() == exports[1].keys()
    for name, value in exports[0].items():
        torch.testing.assert_close(exports[1][name], value, rtol=0, atol=5e-5)
