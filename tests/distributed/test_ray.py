"""The example on Ray: two workers take the steps of two plain ranks, and one that is killed changes nothing."""

import json
import os
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_rows

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).parent / "ray_runs.py"
EPOCHS, STEPS = 2, 5  # of each epoch: 20 rows on two ranks with two rows each
SAVED, KILLED = 6, 8  # steps of the checkpoint and of the kill, both inside the second epoch


def run(how, config, folder):
    path = folder / f"{how}.json"
    path.write_text(json.dumps(config))
    paths = [str(ROOT), str(ROOT / "examples/cluster"), os.environ.get("PYTHONPATH", "")]  # workers inherit them
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
    }
    done = subprocess.run(
        [sys.executable, str(SCRIPT), how, str(path)], env=environment, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr[-5000:]


def attempts(folder):
    """Number of optimizer steps of each process that was rank 0 of a run."""
    lines = (folder / "steps").read_text().split()
    return [len(list(steps)) for _, steps in groupby(lines)]


@pytest.mark.slow
def test_ray_workers_match_plain_ranks_and_recover_from_a_kill(model_folder, tmp_path):
    pytest.importorskip("ray.train", reason="Ray isn't installed: pip install 'lightning-ft[ray]'")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in make_rows(20)))
    shared = {"model": model_folder, "train": str(rows), "max_epochs": EPOCHS, "batch_size": 2, "every_n_steps": 3}
    plain, whole, killed = (
        {**shared, "output": str(tmp_path / name), "notes": str(tmp_path / f"notes of {name}"), "killed_at": killed_at}
        for name, killed_at in (("plain", None), ("whole", None), ("killed", KILLED))
    )
    run("plain", plain, tmp_path)
    run("ray", [whole, killed], tmp_path)

    assert attempts(Path(whole["notes"])) == [EPOCHS * STEPS]
    assert attempts(Path(killed["notes"])) == [KILLED, EPOCHS * STEPS - SAVED]
    expected, *found = (load_file(f"{c['output']}/last/adapter_model.safetensors") for c in (plain, whole, killed))
    assert any(weight.abs().max() > 1e-3 for name, weight in expected.items() if "lora_B" in name)  # it was trained
    for weights in found:
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], weight) for name, weight in expected.items())
