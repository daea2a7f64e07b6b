"""The hand-written loop over ranks gives the metrics of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "custom_loop" / "savings_over_ranks.py"


def run(ranks, folder):
    output = folder / f"{ranks}.json"
    options = ["--ranks", str(ranks), "--steps", "2", "--requests", "12", "--output", str(output)]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder), "PYTHONPATH": str(SCRIPT.parents[2])}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(output.read_text(encoding="utf-8"))


def test_savings_of_two_ranks_are_those_of_one(tmp_path):
    one, two = (run(ranks, tmp_path) for ranks in (1, 2))
    assert one["n"] == two["n"] == 12
    assert one["quality_prompted"] == two["quality_prompted"] > 0
    assert one["input"] == two["input"] > 0.9
    assert one.keys() == two.keys()


@pytest.mark.slow
def test_two_ranks_learn(tmp_path):
    output = tmp_path / "learned.json"
    options = ["--ranks", "2", "--steps", "100", "--requests", "60", "--output", str(output)]
    subprocess.run([sys.executable, str(SCRIPT), *options], check=True, timeout=600, capture_output=True)
    found = json.loads(output.read_text(encoding="utf-8"))
    assert found["quality_tuned"] > found["quality_untuned"] + 0.3
