"""Checkpoints that a sharding strategy loads without its checkpoint plugin are checked too."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "sharded_checkpoints.py"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_sharded_model_resumes_from_intact_checkpoints_only(model_folder, tmp_path, kind):
    call = [sys.executable, str(SCRIPT), model_folder, str(tmp_path), kind]
    done = subprocess.run(call, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert "same True" in lines
    assert sum(line.startswith("refused The checkpoint 'some.ckpt' is damaged") for line in lines) == 1
    assert sum(line.startswith("refused The checkpoint 'k' is a folder") for line in lines) == 1
    assert "ran False ['last.ckpt', 'step=1.ckpt', 'step=2.ckpt', 'step=3.ckpt']" in lines
    assert "newest whole checkpoint of the run is used instead: 'k/step=2.ckpt'" in done.stderr.replace(
        str(tmp_path) + "/", ""
    )
