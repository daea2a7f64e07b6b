"""What fails on one rank has failed on both, and neither waits for the other."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "two_ranks_failing.py"


@pytest.mark.slow
@pytest.mark.parametrize("where", ["generation", "retention", "export"])
def test_ranks_fail_together(model_folder, tmp_path, where):
    command = [sys.executable, str(SCRIPT), where, model_folder, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    told = [json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in (0, 1)]
    assert told[0] == told[1]
    failed = {"generation": "savings"}.get(where, where)
    assert "broken on one rank" in told[0].pop(failed)
    assert not any(told[0].values())
    assert (tmp_path / "export" / "last" / "README.md").is_file() == (where != "export")
    assert (tmp_path / failed / "undefined.json").is_file() == (where != "export")
