"""What is found below a folder, and what is refused."""

import json

import pytest

from lightning_ft.errors import DataError, DataNotFoundError
from lightning_ft.report.collect import beside, collect, run_names


def test_all_results_of_a_run_are_found(run_folder):
    found = collect(run_folder)
    assert (list(found.savings), list(found.retention), list(found.compute)) == (
        ["token_savings"],
        ["retention"],
        ["compute"],
    )
    assert found.comparison is None
    assert not found.empty
    assert found.to_dict()["retention"]["retention"]["texts"] == 64


def test_several_runs_below_one_folder_are_told_apart(tmp_path, run_folder):
    for name in ("b", "a"):
        folder = tmp_path / name / "token_savings"
        folder.mkdir(parents=True)
        (folder / "token_savings.json").write_bytes((run_folder / "token_savings/token_savings.json").read_bytes())
    found = collect(tmp_path)
    assert list(found.savings) == ["a/token_savings", "b/token_savings"]
    assert run_names(found.savings) == {"a/token_savings": "a", "b/token_savings": "b"}


def test_a_comparison_is_read_back_as_it_was(comparison_folder, comparison):
    assert collect(comparison_folder).comparison == comparison


def test_measurements_of_one_run_belong_together():
    others = {"a/retention": 1, "b/retention": 2, "b/other": 3}
    assert beside("a/token_savings", others) == 1
    assert beside("b/token_savings", others) is None  # there are two, and neither is meant more than the other
    assert beside("c/token_savings", others) is None


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(DataNotFoundError, match="is no folder"):
        collect(tmp_path / "nothing")


@pytest.mark.parametrize("text", ["not json", '{"arms": {}}', "[]"])
def test_a_file_that_is_something_else_is_named(tmp_path, text):
    (tmp_path / "token_savings.json").write_text(text)
    with pytest.raises(DataError, match=r"token_savings\.json.*Expected a result file that this package wrote"):
        collect(tmp_path)


def test_two_comparisons_are_refused(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "comparison.json").write_text(json.dumps({}))
    with pytest.raises(DataError, match=r"holds 2 comparisons \(a/comparison\.json, b/comparison\.json\)"):
        collect(tmp_path)
