"""The script that checks a GPU: its list, budgets and report, a check that crashes, and every check on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu_check import CHECKS, LIMIT, main
from gpu_kernels import VocabularyProducts, busy_share, within_steps
from gpu_runner import Check, Outcome, run_checks
from gpu_setup import Setup
from gpu_timing import Timing, compare, needed_flops

from lightning_ft.data.layout import Example, collate_examples
from lightning_ft.models.adapt import add_lora, lora_config
from lightning_ft.models.flops import OperationCounter
from lightning_ft.models.logprob_model import LogProbModel

ROOT = Path(__file__).parents[2]


def check(name, seconds=30.0):
    return Check(name, seconds, f"shows {name}", f"gpu_samples:{name}")


def test_checks_that_fail_crash_or_hang_do_not_stop_the_others(tmp_path, capfd):
    report = tmp_path / "runs" / "report.json"
    names = ["raises", "crashes", "is_unmet", "is_skipped", "passes"]
    results = run_checks([check("hangs", 1.0)], 21, report=report, starting=4.0)
    results += run_checks([*map(check, names)], 21, report=report, starting=200.0, limit=2000.0)
    assert [result.status for result in results] == ["fail", "fail", "fail", "fail", "skip", "pass"]
    hanging, raising, crashing, unmet, skipped, passing = results
    assert hanging.reason == "it took more than 5 s"
    assert raising.reason == "ValueError: a typo"
    assert 'raise ValueError("a typo' in raising.trace
    assert crashing.reason == "its process ended unexpectedly, with exit status 7"
    assert (unmet.reason, unmet.measured) == ("25% of what is needed", {"share": 0.25})
    assert skipped.reason == "nothing is installed"
    assert (passing.reason, passing.measured) == ("", {"twice": 42})
    written = json.loads(report.read_text())
    assert [result["name"] for result in written["results"]] == names
    assert written["results"][2]["measured"] == {"share": 0.25}
    assert (tmp_path / "runs" / "report" / "passes.log").read_text() == "printed by a check\n"
    lines = capfd.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["fail", "fail", "fail", "fail", "skip", "pass"]


def test_checks_whose_budget_is_not_left_are_skipped():
    (result,) = run_checks([check("passes", 60.0)], 1, limit=50.0)
    assert result.status == "skip"
    assert "may take 60 s" in result.reason


# ---------------------------------------------------------------- the command line


def test_list_has_every_check_with_its_budget(capsys):
    assert main(["--dry"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*(one.name for one in CHECKS), "all"]
    assert lines[-1].split()[1] == f"{sum(one.seconds for one in CHECKS):.0f}"
    assert sum(one.seconds for one in CHECKS) <= LIMIT == 600
    with pytest.raises(SystemExit):
        main(["--only", "sft_lara", "--dry"])
    assert "sft_lara" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_machine_without_a_gpu_is_told_so(capsys):
    assert main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_make_target_lists_checks_and_fails_without_a_gpu():
    def make(*more):
        # Not the Makefile's environment: INSTALLED exists, and BIN is this interpreter's folder.
        command = ["make", "gpu-check", f"BIN={Path(sys.executable).parent}", "INSTALLED=Makefile", *more]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    listed = make("DRY=1")
    assert listed.returncode == 0
    assert all(one.name in listed.stdout for one in CHECKS)
    if not torch.cuda.is_available():
        found = make()
        assert found.returncode != 0
        assert "no CUDA device" in found.stderr


# ---------------------------------------------------------------- parts of checks


def test_products_over_the_vocabulary_are_counted_by_dtype():
    states, weight = torch.randn(6, 8, requires_grad=True), torch.randn(31, 8, requires_grad=True)
    with VocabularyProducts(31) as products:
        (states @ weight.t()).sum().backward()  # one forward, two backward
        (states.bfloat16() @ weight.bfloat16().t()).sum()
        torch.randn(4, 5) @ torch.randn(5, 6)
    assert products.counts == {torch.float32: 3, torch.bfloat16: 1}


def test_busy_share_is_that_within_steps():
    assert busy_share([(4.0, 5.0), (0.0, 2.0), (1.0, 3.0)]) == pytest.approx(0.8)
    assert busy_share([(1.0, 2.0)]) == 1.0
    assert within_steps([(0.0, 1.0), (0.5, 5.0), (9.5, 10.0)]) == [(1.0, 5.0)]


def test_comparison_requires_speed_and_memory():
    outcome = Outcome()
    compare(outcome, Timing(2.0, 100, 30), Timing(1.0, 60, 20), "tokens")
    assert outcome.measured["speed"] == pytest.approx(50 / 60)
    assert len(outcome.unmet) == 2
    outcome = Outcome()
    compare(outcome, Timing(1.0, 100, 10), Timing(1.0, 60, 20), "tokens")
    assert not outcome.unmet


@pytest.mark.parametrize("lora", [False, True])
def test_needed_flops_agree_with_counted_ones(lora):
    """Of one sequence, but for attention, whose operator counts all pairs and a fifth product in the backward pass."""
    model = Setup("cpu", "tiny").model()
    if lora:
        model = add_lora(model, lora_config({"r": 4}))
    ids = torch.randint(2, 3000, (24,), generator=torch.Generator().manual_seed(0))
    batch = collate_examples([Example(ids, torch.arange(24) >= 12)])
    logprobs = LogProbModel()
    logprobs.exactness(model)
    with OperationCounter() as counter:
        (-logprobs(model, batch, "sum").logprobs).backward()
    assert needed_flops(model, [batch]) == pytest.approx(counter.flops, rel=0.1)


# ---------------------------------------------------------------- the checks


@pytest.mark.slow
@pytest.mark.parametrize("name", [one.name for one in CHECKS])
def test_check_runs_on_a_cpu(name, tmp_path):
    """A typo must not be found on the first GPU: whatever the checks measure here, none of them may raise."""
    (chosen,) = (one for one in CHECKS if one.name == name)
    (result,) = run_checks([chosen], Setup("cpu", "tiny"), report=tmp_path / "report.json", starting=500, limit=2000)
    assert result.trace == "", result.trace
    assert result.status == "pass" or "required" in result.reason or "allowed" in result.reason, result
    assert result.measured


@pytest.mark.gpu
@pytest.mark.parametrize("name", [one.name for one in CHECKS])
def test_check_passes_on_a_gpu(name, tmp_path):
    (chosen,) = (one for one in CHECKS if one.name == name)
    (result,) = run_checks([chosen], Setup("cuda"), report=tmp_path / "report.json")
    if result.status == "skip":
        pytest.skip(result.reason)
    assert result.status == "pass", f"{result.reason}\n{result.trace}"
