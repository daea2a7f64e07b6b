"""Files of a run: damaged ones are treated as missing, so that the run is repeated or resumed."""

import json

import pytest
import torch

from lightning_ft.compare.run_files import find_checkpoint, read_plan, read_results, write_plan, write_results
from lightning_ft.evaluation.comparison.result import RunResult

PLAN = {"run": {"method": "lora"}, "rows": 3, "hash": "abc", "settings": {}}


@pytest.mark.parametrize("content", ["", "{", json.dumps(PLAN)[:30], "[]", "{}", '{"hash": 3}', "[" * 100_000, "\x00"])
def test_read_plan_returns_none_for_damaged_file(tmp_path, content):
    write_plan(tmp_path, PLAN)
    assert read_plan(tmp_path) == PLAN
    (tmp_path / "plan.json").write_text(content)
    assert read_plan(tmp_path) is None


@pytest.mark.parametrize("content", ["", "[{", "{}", "[1]", '[{"method": "lora"}]'])
def test_read_results_renames_damaged_file(tmp_path, content, capsys):
    assert read_results(tmp_path) is None
    results = [RunResult("lora", 0, 1e-3, 8, 0.5, None, config_hash="abc")]
    write_results(tmp_path, results)
    assert read_results(tmp_path) == results
    (tmp_path / "result.json").write_text(content)
    assert read_results(tmp_path) is None
    assert [path.name for path in tmp_path.iterdir()] == ["result.json.damaged"]
    assert "result.json is damaged" in capsys.readouterr().out


def test_find_checkpoint_requires_valid_file_of_same_configuration(tmp_path, capsys):
    assert find_checkpoint(tmp_path, "abc") is None
    file = tmp_path / "last.ckpt"
    torch.save({"state_dict": {}, "callbacks": {"RunRecorder": {"config_hash": "abc"}}}, file)
    assert find_checkpoint(tmp_path, "abc") == str(file)
    assert find_checkpoint(tmp_path, "other") is None
    assert "is of another configuration. The run starts from scratch." in capsys.readouterr().out
    file.write_bytes(file.read_bytes()[:-1])
    assert find_checkpoint(tmp_path, "abc") is None
    assert "is damaged" in capsys.readouterr().out
