"""A failure on one rank is reported on both, and neither waits for the other."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "two_ranks_failing.py"


@pytest.mark.slow
@pytest.mark.parametrize("where", ["generation", "retention", "export"])
def test_measurement_failing_on_one_rank_fails_on_both(model_folder, tmp_path, where):
    command = [sys.executable, str(SCRIPT), where, model_folder, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    reported = [json.loads((tmp_path / f"reported-{rank}.json").read_text()) for rank in (0, 1)]
    assert reported[0] == reported[1]
    failed = {"generation": "savings"}.get(where, where)
    assert "broken on one rank" in reported[0].pop(failed)
    assert not any(reported[0].values())
    assert (tmp_path / "export" / "last" / "README.md").is_file() == (where != "export")
    assert (tmp_path / failed / "undefined.json").is_file() == (where != "export")
