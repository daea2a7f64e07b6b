"""Collection of results below a folder."""

import json

import pytest

from lightning_ft.errors import DataError, DataNotFoundError
from lightning_ft.report.collect import collect, run_names, same_run_result


def test_collect_finds_all_results_of_a_run(run_folder):
    found = collect(run_folder)
    assert (list(found.savings), list(found.retention), list(found.compute)) == (
        ["token_savings"],
        ["retention"],
        ["compute"],
    )
    assert found.comparison is None
    assert not found.empty
    assert found.to_dict()["retention"]["retention"]["texts"] == 64


def test_run_names_distinguish_runs_below_one_folder(tmp_path, run_folder):
    for name in ("b", "a"):
        folder = tmp_path / name / "token_savings"
        folder.mkdir(parents=True)
        (folder / "token_savings.json").write_bytes((run_folder / "token_savings/token_savings.json").read_bytes())
    found = collect(tmp_path)
    assert list(found.savings) == ["a/token_savings", "b/token_savings"]
    assert run_names(found.savings) == {"a/token_savings": "a", "b/token_savings": "b"}


def test_collect_restores_a_comparison(comparison_folder, comparison):
    assert collect(comparison_folder).comparison == comparison


def test_same_run_result_matches_the_parent_folder():
    others = {"a/retention": 1, "b/retention": 2, "b/other": 3}
    assert same_run_result("a/token_savings", others) == 1
    assert same_run_result("b/token_savings", others) is None  # ambiguous: there are two
    assert same_run_result("c/token_savings", others) is None


def test_collect_refuses_a_missing_folder(tmp_path):
    with pytest.raises(DataNotFoundError, match="is not a folder"):
        collect(tmp_path / "nothing")


@pytest.mark.parametrize("text", ["not json", '{"arms": {}}', "[]"])
def test_collect_names_a_file_that_is_not_a_result(tmp_path, text):
    (tmp_path / "token_savings.json").write_text(text)
    with pytest.raises(DataError, match=r"token_savings\.json.*Expected a result file that this package wrote"):
        collect(tmp_path)


def test_collect_refuses_two_comparisons(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "comparison.json").write_text(json.dumps({}))
    with pytest.raises(DataError, match=r"contains 2 comparisons \(a/comparison\.json, b/comparison\.json\)"):
        collect(tmp_path)
