import builtins
import importlib.util
import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from lightning_ft.errors import MissingDependencyError
from lightning_ft.evaluation.savings.arithmetic import ArmRecords, Prices, token_savings
from lightning_ft.evaluation.savings.files import load_savings, savings_markdown


def make_result(n=200, tuned_score=1.0, **options):
    def arm(tokens, out, score, system):
        return ArmRecords(
            tuple(f"r{i}" for i in range(n)),
            tuple(tokens + i % 3 for i in range(n)),
            (out,) * n,
            (score,) * n,
            (False,) * n,
            parts={"system": system * n, "few_shot": 0, "template": 5 * n, "request": tokens * n - system * n},
            first_token_seconds={"cold": (0.1, 0.3, 0.2)},
            prefill_flops=1e9,
        )

    return token_savings(
        arm(500, 20, 1.0, 400), arm(60, 10, tuned_score, 0), arm(60, 30, 0.0, 0), resamples=99, **options
    )


@pytest.fixture
def result():
    prices = Prices(0.15, 0.6, 0.015, training=5, currency="USD", date="2026-01-31")
    return make_result(prices=prices, provenance={"model": "tiny", "seed": 3})


def test_print_shows_the_result(result):
    console = Console(width=100, record=True, file=io.StringIO())
    result.print(console)
    text = console.export_text()
    for part in ("PASS: 86.4% fewer tokens", "prompted", "untuned", "all tokens", "95% interval", "USD", "2026-01-31"):
        assert part in text
    assert "never" not in text
    assert "none right" in text  # the untuned arm's tokens per success


def test_failed_gate_appears_in_every_format(tmp_path):
    result = make_result(n=20)
    assert result.headline.startswith("FAIL: 86.4% fewer tokens per request")
    assert "too few requests to assess quality" in result.headline
    markdown = savings_markdown(result)
    assert "**FAIL" in markdown
    assert "> Underpowered: 20 requests" in markdown
    assert json.loads(result.save(tmp_path, png=False)[0].read_text())["gate_passed"] is False
    assert "quality not kept: 0.500 against 1.000" in make_result(tuned_score=0.5).headline


def test_save_writes_json_markdown_and_plot(result, tmp_path):
    written = result.save(tmp_path / "new" / "folder")
    assert [path.name for path in written] == ["token_savings.json", "token_savings.md", "token_savings.png"]
    assert load_savings(written[0]) == result
    markdown = written[1].read_text()
    for part in ("![", "token_savings.png", "| system prompt | 400.0 | 0.0 | 0.0 |", "| seed | 3 |", "in USD"):
        assert part in markdown
    assert written[2].read_bytes().startswith(b"\x89PNG")
    assert written[2].stat().st_size > 20_000


def test_save_without_a_plot_removes_that_of_an_earlier_result(result, tmp_path):
    result.save(tmp_path)
    make_result(n=20).save(tmp_path, png=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["token_savings.json", "token_savings.md"]


def test_parts_of_an_arm_that_did_not_count_them_are_unknown(result):
    arms = {**result.arms, "prompted": replace(result.arms["prompted"], parts={})}  # as an endpoint answers
    markdown = savings_markdown(replace(result, arms=arms))
    assert "| system prompt | unknown | 0.0 | 0.0 |" in markdown
    assert "| answer | 20.0 | 10.0 | 30.0 |" in markdown


def test_save_plot_is_deterministic(result, tmp_path):
    one, other = (result.save(tmp_path / name)[2].read_bytes() for name in ("a", "b"))
    assert one == other


@pytest.mark.parametrize("tuned_score", [0.0, 0.001])  # infinite, and hundreds of times as many, tokens per success
def test_save_plots_extreme_results(tmp_path, tuned_score):
    assert make_result(tuned_score=tuned_score).save(tmp_path)[2].stat().st_size > 20_000


def test_save_without_matplotlib(result, tmp_path, monkeypatch, caplog):
    find, imported = importlib.util.find_spec, builtins.__import__

    def no_import(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    monkeypatch.setattr(builtins, "__import__", no_import)
    with caplog.at_level("INFO"):
        assert [path.suffix for path in result.save(tmp_path)] == [".json", ".md"]
    assert "lightning-ft[report]" in caplog.text
    assert "![" not in (tmp_path / "token_savings.md").read_text()
    with pytest.raises(MissingDependencyError, match=r"lightning-ft\[report\]"):
        result.save(tmp_path, png=True)
