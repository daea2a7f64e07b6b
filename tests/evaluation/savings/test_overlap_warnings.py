"""Requests that also appear in the training rows, in results, files, reports and comparisons."""

import json

import pytest
from rich.console import Console

from lightning_ft.document.html import html_page
from lightning_ft.errors import SavingsError
from lightning_ft.evaluation.comparison.methods import EvaluationSet, compare_methods
from lightning_ft.evaluation.comparison.result import Comparison, RunResult
from lightning_ft.evaluation.savings.arithmetic import ArmRecords, SavingsResult, token_savings
from lightning_ft.evaluation.savings.files import savings_markdown
from lightning_ft.evaluation.savings.gate import overlap_text
from lightning_ft.report.collect import RunReport
from lightning_ft.report.compose import compose_document
from lightning_ft.report.write import report_markdown

N = 200
SEEN = tuple(f"r{n}" for n in range(50))
COUNTED = "50 of 200 requests (25%) also appear in the training rows"


def arm(tokens, scores):
    return ArmRecords(tuple(f"r{n}" for n in range(N)), (tokens,) * N, (10,) * N, scores, (False,) * N)


def result(in_training=SEEN, new=0.9):
    """Result of a tuned model that memorized the requests it was trained on."""
    tuned = (1.0,) * 50 + (new,) * 150
    return token_savings(arm(500, (0.8,) * N), arm(50, tuned), resamples=99, margin=0.05, in_training=in_training)


@pytest.mark.parametrize(
    ("count", "n", "share"), [(1, 3, "33.3%"), (8, 8, "100%"), (1, 5000, "under 0.1%"), (1999, 2000, "99.9%")]
)
def test_overlap_text_rounds_down(count, n, share):
    assert f" of {n:,} requests ({share}) also appear" in overlap_text(count, n)
    assert overlap_text(0, n) == ""


def test_headline_counts_requests_in_training():
    found = result()
    assert found.headline.startswith("PASS: 88.2% fewer tokens")
    assert found.headline.endswith(f"margin 0.050); {COUNTED}.")
    assert found.warnings[0].startswith(f"{COUNTED}: the tuned model may have memorized their answers")
    assert found.warnings[1] == (
        "On the 150 requests that don't appear in the training rows, quality is 0.900 tuned against 0.800 prompted."
    )
    assert found.metrics()["requests_in_training"] == 50


def test_headline_with_all_requests_in_training():
    found = result(tuple(f"r{n}" for n in range(N)))
    assert found.headline.endswith("200 of 200 requests (100%) also appear in the training rows.")
    assert len(found.warnings) == 1


def test_headline_without_requests_in_training():
    none, unknown = result(()), result(None)
    for found in (none, unknown):
        assert found.headline.endswith("margin 0.050).")
        assert found.warnings == ()
    assert (none.in_training, none.metrics()["requests_in_training"]) == ((), 0)
    assert unknown.in_training is None
    assert "requests_in_training" not in unknown.metrics()
    assert none != unknown


@pytest.mark.parametrize("in_training", [SEEN, (), None])
def test_in_training_survives_json(in_training):
    found = result(in_training)
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert values["requests_in_training"] == (None if in_training is None else len(in_training))
    assert SavingsResult.from_dict(values) == found
    del values["in_training"]  # as in files of earlier versions
    assert SavingsResult.from_dict(values).in_training is None


def test_in_training_refuses_unknown_ids():
    with pytest.raises(SavingsError, match="in_training has ids that no request has: other"):
        result(("r1", "other"))


def test_requests_in_training_appear_in_every_format():
    found = result()
    report = compose_document(RunReport(savings={"run/token_savings": found}))
    console = Console(record=True, width=400)
    found.print(console)
    page = html_page(report, {})
    for text in (savings_markdown(found), report_markdown(report, ()), page, console.export_text()):
        assert text.count(COUNTED) == 3  # in the advice, in the verdict and as a warning
        assert "quality is 0.900 tuned against 0.800 prompted" in text
    before, after = page.split("Before you rely on this", 1)
    assert COUNTED in before
    assert COUNTED in after.split("</ul>")[0]
    assert "<dt>requests that also appear in the training rows</dt><dd><b>50 of 200</b>" in page


@pytest.mark.parametrize("seeds", [1, 3])
def test_comparison_counts_requests_in_training_and_warns_once(seeds):
    def run(method, score, seed=0, rate=None):
        return RunResult(method, seed, rate, rate and 100, score, arm(50 if rate else 500, (score,) * N))

    runs = [run("untuned", 0.2), run("prompted", 0.8)]
    runs += [run(method, 0.9, seed, 1e-3) for method in ("full", "lora") for seed in range(seeds)]
    evaluation_set = EvaluationSet(
        ("q",) * N, ("a",) * N, margin=0.05, in_training=SEEN, warnings=("Of the requests, this is known.",)
    )
    found = compare_methods(runs, evaluation_set, resamples=99)
    for result in found.savings.values():
        assert len(result.in_training) == 50 * seeds
        assert f"{50 * seeds} of {N * seeds} requests (25%) also appear in the training rows" in result.headline
    report = compose_document(RunReport(comparison=found))
    assert sum("(25%) also appear in the training rows" in warning for warning in report.warnings) == 1
    assert report.warnings[0] == "Of the requests, this is known."
    assert Comparison.from_dict(json.loads(json.dumps(found.to_dict()))) == found
