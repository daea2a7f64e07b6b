"""What a reader sees first, and that no number reaches a reader as `inf`, `nan` or with an exponent."""

import io
import math
import re
from dataclasses import replace

import pytest
from rich.console import Console

from lightning_ft.evaluation.bootstrap import Interval
from lightning_ft.evaluation.comparison.claims import evaluate_claims
from lightning_ft.evaluation.retention.frontier import FrontierPoint, FrontierResult
from lightning_ft.evaluation.savings.arithmetic import ArmRecords, Prices, token_savings
from lightning_ft.report.collect import RunReport
from lightning_ft.report.write import write_files, write_report

UNREADABLE = re.compile(r"(?<![\w-])[+-]?(?:inf|nan)(?![\w])|\d[eE][+-]?\d{2}\b", re.IGNORECASE)
BILLIONS = Prices(3.5e9, 1.25e10, training=1e12, currency="IDR", date="2026-01-31")


def arm(right, tokens=50, *, n=300, **more):
    scores = tuple(float(i < right) for i in range(n))
    return ArmRecords(tuple(map(str, range(n))), (tokens,) * n, (5,) * n, scores, (False,) * n, **more)


def extremes():
    """Arms without any success, large and tiny numbers, prices in a currency of small units."""
    large = {
        "prefill_flops": 3.13e12,
        "kv_cache_bytes": 3.28e9,
        "first_token_seconds": {"cold": (3.1304,) * 6, "warm": (1e-9,) * 6},
    }
    prompted = arm(240, 999_950, **large)
    untuned = arm(0, 12, prefill_flops=0.99996e12, first_token_seconds={"cold": (0.9999, 1e4), "warm": (0.0,)})
    yield token_savings(prompted, arm(0, 12), untuned, resamples=99, prices=BILLIONS)
    yield token_savings(prompted, arm(1, 12), untuned, resamples=99, prices=replace(BILLIONS, tuned_input=1e15))
    yield token_savings(arm(0, 50), arm(40, 50), untuned, resamples=99)
    yield token_savings(prompted, arm(250, 12), untuned, resamples=99, prices=BILLIONS, min_quality=0.0)


def forgotten(make, value, high):
    values = Interval(value, value, high)
    return replace(make.retention(), kl_general=values, ppl_ratio=values, kl_task=values)


def assert_readable(text):
    found = [text[max(0, m.start() - 60) : m.end() + 20] for m in UNREADABLE.finditer(text)]
    assert not found, found


def text_of_page(page):
    return re.sub(r"<style>.*?</style>|data:image/[^\"]*|<[^>]*>", " ", page, flags=re.DOTALL)


def alt_texts(page):
    return "\n".join(re.findall(r'alt="([^"]*)"', page))


@pytest.mark.parametrize("number", range(4))
def test_no_number_of_a_page_is_unreadable(make, tmp_path, number):
    result = list(extremes())[number]
    tiny, infinite = forgotten(make, 1.2e-9, 3e-8), forgotten(make, math.inf, math.inf)
    frontier = FrontierResult(
        tuple(FrontierPoint(scale, Interval(0.5, 0.4, 0.6), kept) for scale, kept in ((0.5, tiny), (1.0, infinite))),
        {},
        0.5,
        100,
    )
    report = RunReport(
        savings={"a/token_savings": result},
        retention={"a/retention": tiny if number % 2 else infinite},
        compute={"a/compute": make.compute(flops=9.9996e20, seconds=0.0004)},
        frontiers={"a/frontier": frontier},
    )
    written = {path.name: path for path in write_files(report, tmp_path)}
    page = written["report.html"].read_text()
    assert_readable(text_of_page(page))
    assert_readable(alt_texts(page))
    assert_readable(re.sub(r"\]\([^)]*\)", "", written["report.md"].read_text()))
    output = io.StringIO()
    result.print(Console(file=output, width=200))
    assert_readable(output.getvalue())
    assert_readable(f"{tiny.headline} {infinite.headline} {make.compute().headline}")


def test_no_number_of_a_comparison_is_unreadable(make, comparison, tmp_path):
    lost = Interval(math.inf, 2.0, math.inf)
    ratios = {
        method: {name: lost if name == "flops" else Interval(math.nan, math.nan, math.nan) for name in found}
        for method, found in comparison.ratios.items()
    }
    runs = tuple(
        run if run.retention is None else replace(run, retention=forgotten(make, math.inf, math.inf))
        for run in comparison.runs
    )
    broken = replace(comparison, ratios=ratios, runs=runs)
    broken = replace(broken, claims=evaluate_claims(broken, margin=0.05))
    page = write_files(RunReport(comparison=broken), tmp_path)[0].read_text()
    # a learning rate is written as its users write it
    assert_readable(re.sub(r"\b\de-0\d\b", "", text_of_page(page)))


def test_page_begins_with_model_data_date_and_advice(make, tmp_path):
    result = make.savings()
    provenance = {**result.provenance, "split": "test", "training_data": "support.jsonl (4,000 rows)"}
    make.write(tmp_path, "token_savings.json", replace(result, provenance=provenance, date="2026-02-03"))
    page, markdown = (path.read_text() for path in write_report(tmp_path)[:2])
    seen = " ".join(text_of_page(page).split())
    parts = (
        "Model Qwen/Qwen3-0.6B",
        "Data trained on support.jsonl (4,000 rows); measured on 300 test requests",
        "Date 2026-02-03",
        "Ship: ",
        "PASS",
    )
    positions = [seen.index(part) for part in parts]
    assert positions == sorted(positions)
    assert positions[-1] < 400
    first = markdown.split("\n\n")
    assert first[1].startswith("Model: Qwen/Qwen3-0.6B · Data: trained on support.jsonl")
    assert first[2].startswith("**Ship: ")
    assert first[3].startswith("**PASS: ")


def test_terminal_has_the_advice_after_the_verdict(make):
    output = io.StringIO()
    make.savings().print(Console(file=output, width=300))
    lines = output.getvalue().splitlines()
    assert lines[0].startswith("PASS: ")
    assert lines[1].startswith("Ship: ")


def test_page_of_several_results_advises_on_each(make, tmp_path):
    for name, tuned in (("good", 0.93), ("bad", 0.4)):
        make.write(tmp_path / name / "token_savings", "token_savings.json", make.savings(tuned=tuned))
    seen = text_of_page(write_report(tmp_path)[0].read_text())
    assert "good: Ship: " in seen
    assert "bad: Don't ship: quality was not kept" in seen.replace("&#39;", "'")


def test_page_has_no_contradiction_about_half_of_the_tokens(make, tmp_path):
    make.write(tmp_path, "token_savings.json", make.savings(tuned=0.4))
    page = write_report(tmp_path)[0].read_text().replace("&#39;", "'")
    assert "At least half of the tokens saved: yes, but quality isn't shown to be kept." in page
