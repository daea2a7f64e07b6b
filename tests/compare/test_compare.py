"""Complete comparisons of small models: results, resumption after a kill, budgets, and refused configurations."""

import json
import os
import re
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from comparable_config import write_config
from forked import ForkedProcess
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lightning_ft.callbacks.base import RunsLast
from lightning_ft.compare.plan import PlannedRun
from lightning_ft.compare.run import FILE_NAME, Comparer, compare
from lightning_ft.compare.run_files import RESULT, write_results
from lightning_ft.compare.worker import execute
from lightning_ft.errors import ComparisonError
from lightning_ft.evaluation.comparison.methods import compare_methods
from lightning_ft.evaluation.comparison.result import Comparison, RunResult
from lightning_ft.evaluation.savings import arms
from lightning_ft.evaluation.savings.cost import Prices

pytestmark = pytest.mark.filterwarnings("ignore:.*fork")
QUICK = {"seeds": "0,1", "learning_rates": {"full": [1e-3], "lora": [5e-3]}, "evaluations": 2, "threads": 1}


@pytest.fixture
def config(tmp_path, model_folder):
    return write_config(tmp_path, model_folder)


@pytest.fixture
def forked(monkeypatch):
    """Executes runs in forked processes, which need no imports."""
    monkeypatch.setattr(subprocess, "Popen", ForkedProcess)


def test_compare_measures_prompt_full_and_lora(tmp_path, config, capsys, forked):
    output = tmp_path / "out"
    metrics = f"{tmp_path / 'shares_letters.py'}:metrics"
    result = compare(config, "prompted,full,lora", str(output), sizes="8,500", metrics=metrics, **QUICK)

    completed = {path.parent.relative_to(output / "runs").as_posix() for path in output.rglob(RESULT)}
    assert completed == {
        "original",
        *(f"{m}-seed{s}{n}" for m in ("full/lr0.001", "lora/lr0.005") for s in (0, 1) for n in ("", "-n8")),
    }
    assert "Sizes [500] are skipped, since runs on all 24 training rows" in capsys.readouterr().out
    assert set(result.quality) == {"untuned", "prompted", "full", "lora"}
    assert [run.seed for run in result.final_runs("lora")] == [0, 1]
    assert set(result.learning_curve["lora"]) == {8, 24}
    assert set(result.metrics["prompted"]) == {"longest"}
    ratios = result.ratios["lora"]
    lora, full = result.final_runs("lora")[0], result.final_runs("full")[0]
    assert ratios["trainable_parameters"].value == lora.compute.trainable_parameters / full.compute.trainable_parameters
    assert 0.5 < ratios["flops"].value < 1
    assert lora.checkpoint_bytes < full.checkpoint_bytes
    assert [point.step for point in full.curve] == [3, 6]
    assert full.curve[-1].flops == pytest.approx(full.compute.flops, rel=1e-6)
    assert full.curve[0].flops == pytest.approx(full.compute.flops / 2, rel=0.2)
    assert lora.retention.kl_general.value > 0
    first, second = result.final_runs("full")
    assert first.retention.kl_general != second.retention.kl_general, "the seed changes the order of the rows only"
    assert result.savings["lora"].n == 16  # 8 requests, two seeds
    assert result.savings["lora"].gate.n == 8
    assert result.complete
    written = json.loads((output / FILE_NAME).read_text())
    assert Comparison.from_dict(written).to_dict() == written
    assert (output / "report" / "report.html").exists()
    small = yaml.safe_load((output / "runs/lora/lr0.005-seed0-n8/config.yaml").read_text())
    assert small["trainer"]["max_epochs"] == 6  # a third of the rows, three times the epochs

    before = {path: path.stat().st_mtime_ns for path in output.rglob(RESULT)}
    again = compare(config, "prompted,full,lora", str(output), sizes="8", metrics=metrics, **QUICK)
    assert {path: path.stat().st_mtime_ns for path in output.rglob(RESULT)} == before
    assert again.quality == result.quality


def test_compare_tries_learning_rates_on_fewer_rows(tmp_path, config, forked, capsys):
    output = tmp_path / "out"
    options = {**QUICK, "learning_rates": {"lora": [1e-3, 5e-3]}, "seeds": "0,1"}
    result = compare(config, "lora", str(output), search_rows=8, **options)

    chosen = result.chosen["lora"]
    completed = {path.parent.relative_to(output / "runs").as_posix() for path in output.rglob(RESULT)}
    searched = {name for name in completed if name.endswith("-search8")}
    assert {"lora/lr0.001-seed0-search8", "lora/lr0.005-seed0-search8"} <= searched
    assert completed - searched == {"original", *(f"lora/lr{chosen:g}-seed{seed}" for seed in (0, 1))}
    config_of_search = yaml.safe_load((output / "runs/lora/lr0.005-seed0-search8/config.yaml").read_text())
    assert config_of_search["trainer"]["max_epochs"] == 2  # as configured: a search is meant to be cheap
    runs = [run for run in result.runs if run.search]
    assert {run.size for run in runs} == {8}
    assert all(run.test is None and len(run.curve) == 1 for run in runs)
    assert [run.size for run in result.final_runs("lora")] == [24, 24]
    assert chosen == max(runs, key=lambda run: (run.validation_quality, -run.learning_rate)).learning_rate
    assert set(result.learning_curve["lora"]) == {24}
    assert result.sweep_flops == sum(run.compute.flops for run in runs)
    written = json.loads((output / FILE_NAME).read_text())
    assert Comparison.from_dict(written).to_dict() == written
    assert not list(output.rglob("export"))

    again = compare(config, "lora", str(output), search_rows=8, **options, keep_models=True)
    assert again.quality == result.quality
    assert f"The model of lora/lr{chosen:g}-seed0 wasn't kept when it ran" in capsys.readouterr().out


def test_compare_keeps_models_of_runs_on_all_rows(tmp_path, config, forked, model_folder):
    output = tmp_path / "out"
    options = {**QUICK, "learning_rates": {"lora": [5e-3]}, "seeds": "0"}
    result = compare(config, "lora", str(output), sizes="8", search_rows=8, keep_models=True, **options)
    assert not list(output.rglob("*-search8"))  # of one learning rate there is nothing to choose
    exported = output / "runs/lora/lr0.005-seed0/export"
    assert list(output.rglob("export")) == [exported]
    size = sum(file.stat().st_size for file in exported.glob("*.safetensors"))
    assert size == result.final_runs("lora")[0].checkpoint_bytes
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    assert PeftModel.from_pretrained(base, exported).active_adapter == "default"


@pytest.mark.parametrize("count", [0, 25])
def test_compare_refuses_search_on_more_rows_than_there_are(tmp_path, config, count):
    with pytest.raises(ComparisonError, match=f"--search_rows {count}: expected a number from 1 to the 24"):
        compare(config, "full,lora", str(tmp_path / "out"), search_rows=count, **QUICK)


def test_compare_without_test_rows_names_no_share_of_them(tmp_path, config):
    """`test` is no share of the training rows, as `validation` may be."""
    content = yaml.safe_load(Path(config).read_text())
    del content["data"]["init_args"]["test"]
    Path(config).write_text(yaml.safe_dump(content))
    with pytest.raises(ComparisonError, match=r"no test rows\. Add them, since .* compared on them: a file in `data`"):
        compare(config, "full,lora", str(tmp_path / "out"), **QUICK)


def test_compare_measures_every_arm_in_the_precision_of_training(tmp_path, config, forked, monkeypatch):
    content = yaml.safe_load(Path(config).read_text())
    content["trainer"]["precision"] = "bf16-mixed"
    Path(config).write_text(yaml.safe_dump(content))
    measured = tmp_path / "measured.txt"

    def run_arm(name, *args, **options):
        with measured.open("a") as file:
            file.write(f"{name} {torch.is_autocast_enabled('cpu')}\n")
        return original(name, *args, **options)

    original = arms.run_arm
    monkeypatch.setattr(arms, "run_arm", run_arm)  # a run imports it from there
    compare(config, "full,lora", str(tmp_path / "out"), **{**QUICK, "seeds": "0"})
    assert set(measured.read_text().splitlines()) == {"untuned True", "prompted True", "tuned True"}


def test_compare_resamples_as_token_savings_is_configured(tmp_path, config, forked, monkeypatch):
    content = yaml.safe_load(Path(config).read_text())
    content["trainer"]["callbacks"][0]["init_args"].update(resamples=50, seed=3)
    Path(config).write_text(yaml.safe_dump(content))
    passed = {}

    def recorded(*args, **options):
        passed.update(options)
        return compare_methods(*args, **options)

    monkeypatch.setattr("lightning_ft.compare.run.compare_methods", recorded)
    compare(config, "full,lora", str(tmp_path / "out"), **{**QUICK, "seeds": "0"})
    assert (passed["resamples"], passed["seed"]) == (50, 3)


def test_compare_ends_its_runs_when_it_is_terminated(tmp_path, config, monkeypatch):
    ended = []

    class Endless:
        def __init__(self, command, **options):
            pass

        def poll(self):
            os.kill(os.getpid(), signal.SIGTERM)

        def terminate(self):
            ended.append(self)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", Endless)
        with pytest.raises(SystemExit, match="143"):
            compare(config, "full,lora", str(tmp_path / "out"), **QUICK)
    assert signal.getsignal(signal.SIGTERM) == before
    assert len(ended) == 1


def test_compare_resumes_killed_run(tmp_path, config, forked, monkeypatch):
    folders = [tmp_path / "uninterrupted", tmp_path / "killed"]
    options = {**QUICK, "seeds": "0", "evaluations": 6, "learning_rates": {"lora": [5e-3]}}
    uninterrupted = compare(config, "lora", str(folders[0]), **options)

    run_folder = folders[1] / "runs/lora/lr0.005-seed0"

    class Killed(ForkedProcess):
        def poll(self):
            if (run_folder / "last.ckpt").exists():
                self.kill()
            return super().poll()

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", Killed)
        with pytest.raises(ComparisonError, match="ended with exit status -9"):
            compare(config, "lora", str(folders[1]), **options)
    assert not (run_folder / RESULT).exists()
    plan = run_folder / "plan.json"
    text = plan.read_text()
    plan.write_text(text[: len(text) // 2])  # as a full disk may leave it
    resumed = compare(config, "lora", str(folders[1]), **options)

    first, second = (result.final_runs("lora")[0] for result in (uninterrupted, resumed))
    assert plan.read_text() == text
    assert second.test.outputs == first.test.outputs
    assert [(p.step, p.quality) for p in second.curve] == [(p.step, p.quality) for p in first.curve]
    assert second.compute.tokens == first.compute.tokens
    log = (run_folder / "log.txt").read_text()
    assert log.count("step 1: quality") == 1, "it started from scratch"


def test_compare_measures_a_run_that_was_killed_after_its_last_step(tmp_path, config, forked, monkeypatch):
    content = yaml.safe_load(Path(config).read_text())
    content["trainer"] |= {"max_epochs": None, "max_steps": 6}  # so that no epoch is left to be ended
    Path(config).write_text(yaml.safe_dump(content))
    options = {**QUICK, "seeds": "0", "learning_rates": {"lora": [5e-3]}}
    answer = arms.run_arm

    def kill(name, model, tokenizer, plan, **more):
        if name == "tuned" and plan.requests[0].id.startswith("test"):
            os.kill(os.getpid(), signal.SIGKILL)
        return answer(name, model, tokenizer, plan, **more)

    with monkeypatch.context() as patch:
        patch.setattr(arms, "run_arm", kill)  # a run imports it from there
        with pytest.raises(ComparisonError, match="ended with exit status -9"):
            compare(config, "lora", str(tmp_path / "out"), **options)
    with monkeypatch.context() as patch:
        patch.setattr(RunsLast, "on_fit_end", lambda *_: None)
        with pytest.raises(ComparisonError, match=r"Compute was not measured\. Retention was not measured\."):
            compare(config, "lora", str(tmp_path / "out"), **options)
    (resumed,) = compare(config, "lora", str(tmp_path / "out"), **options).final_runs("lora")
    assert resumed.compute.steps == 6
    assert resumed.retention is not None
    assert resumed.test is not None


def test_compare_stops_at_budget_and_continues_with_larger_one(tmp_path, config, forked, capsys):
    output = str(tmp_path / "out")
    with pytest.raises(ComparisonError, match="nothing to compare"):
        compare(config, "lora", output, budget="0.001s", **{**QUICK, "learning_rates": {"lora": [5e-3]}})
    completed = sorted(path.parent.name for path in Path(output).rglob(RESULT))
    assert completed == ["original"]
    printed = capsys.readouterr().out
    assert "The same command with a larger --budget goes on." in printed
    assert re.search(r"The runs took \d+ s, more than the --budget of 0 s: how long the first run of a method", printed)
    result = compare(config, "lora", output, budget="1h", **{**QUICK, "learning_rates": {"lora": [5e-3]}})
    assert result.complete
    assert len(result.final_runs("lora")) == 2
    assert f"Report written: {output}/report/report.html" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("run", "fits"),
    [
        (PlannedRun("full", 1e-4), False),  # its own earlier runs: 10 + 10 of 19 seconds
        (PlannedRun("lora", 1e-3), False),  # that of another method
        (PlannedRun("original"), True),
    ],
)
def test_compare_expects_a_first_run_to_take_as_long_as_those_of_other_methods(monkeypatch, run, fits):
    earlier = SimpleNamespace(method="full", learning_rate=1e-3, wall_seconds=10.0, diverged="")
    monkeypatch.setattr(Comparer, "__init__", lambda comparer: None)
    comparer = Comparer()
    comparer.results, comparer.budget = {PlannedRun("full", 1e-3): [earlier]}, 19.0
    assert comparer._fits_budget(run, []) == fits


def test_run_that_diverges_has_a_result_with_its_reason_and_cost(tmp_path, config):
    comparer = Comparer(config, ["lora"], tmp_path, grids={"lora": [1e9]}, seeds=[0])
    run = PlannedRun("lora", 1e9)
    comparer._prepare(run)
    (result,) = execute(comparer._folder(run))
    assert result.diverged.startswith("Optimizer step 2 is not finite")
    assert (result.validation_quality, result.test, result.compute.steps) == (0.0, None, 1)


@pytest.mark.parametrize(("rates", "seeds"), [((1e-3, 3e-3), [0]), ((1e-3,), [0, 1])])
def test_compare_ends_where_no_learning_rate_is_left_or_another_seed_diverged(
    tmp_path, config, monkeypatch, rates, seeds
):
    def start(comparer, run):
        method = "untuned" if run.learning_rate is None else run.method
        found = RunResult(method, run.seed, run.learning_rate, 24, 0.5, None, config_hash=digests[run])
        lost = run.learning_rate is not None and (len(rates) > 1 or run.seed > 0)
        write_results(comparer._folder(run), [replace(found, diverged="Step 2 is not finite." if lost else "")])
        return SimpleNamespace(poll=lambda: 0, returncode=0)

    digests, prepare = {}, Comparer._prepare
    monkeypatch.setattr(Comparer, "_prepare", lambda c, run: digests.setdefault(run, prepare(c, run)))
    monkeypatch.setattr(Comparer, "_start", start)
    monkeypatch.setattr("lightning_ft.compare.run.time.sleep", lambda seconds: None)
    comparer = Comparer(config, ["lora"], tmp_path / "out", grids={"lora": rates}, seeds=seeds)
    several = (
        r"of lora diverged at every learning rate \(0.001, 0.003, 0.00033, 0.00011\)\. Pass lower ones: --learning_r"
    )
    another = r"The run lora/lr0.001-seed1 diverged\. Lower the learning rate of lora: .* Step 2 is not finite\."
    with pytest.raises(ComparisonError, match=several if len(rates) > 1 else another):
        comparer.run()


def test_compare_refuses_folder_of_another_configuration(tmp_path, config, forked):
    output = tmp_path / "out"
    options = {**QUICK, "seeds": "0", "learning_rates": {"lora": [5e-3]}}
    compare(config, "lora", str(output), **options)
    content = yaml.safe_load(Path(config).read_text())
    content["trainer"]["max_epochs"] = 1
    Path(config).write_text(yaml.safe_dump(content))
    with pytest.raises(ComparisonError, match="contains a run of another configuration"):
        compare(config, "lora", str(output), **options)


def test_the_untrained_weights_are_measured_once_for_methods_added_later(tmp_path, config, forked, capsys):
    output, longer = tmp_path / "out", tmp_path / "longer.yaml"
    options = {**QUICK, "seeds": "0"}
    compare(config, "lora", str(output), **{**options, "learning_rates": {"lora": [5e-3]}})
    longer.write_text(yaml.safe_dump({"trainer": {"max_epochs": 1}}))
    capsys.readouterr()
    found = compare(config, str(longer), str(output), **{**options, "learning_rates": {"longer": [5e-3]}})
    assert "original" not in capsys.readouterr().out
    assert {result.method for result in found.runs} >= {"untuned", "prompted", "longer"}


@pytest.mark.parametrize("changed", ["train.jsonl", "shares_letters.py"])
def test_compare_refuses_folder_of_other_rows_or_scorer(tmp_path, config, forked, changed):
    options = {**QUICK, "seeds": "0", "learning_rates": {"lora": [5e-3]}}
    with pytest.raises(ComparisonError, match="nothing to compare"):
        compare(config, "lora", str(tmp_path / "out"), budget="0.001s", **options)
    lines = (tmp_path / changed).read_text().splitlines(keepends=True)
    (tmp_path / changed).write_text("".join(lines[:-1]))
    with pytest.raises(
        ComparisonError, match=r"another configuration, or the contents of a file .*scorer\) have changed"
    ):
        compare(config, "lora", str(tmp_path / "out"), **options)


@pytest.mark.parametrize("changed", ["anchor.txt", "general.txt", "questions.jsonl"])
def test_compare_refuses_folder_of_other_texts(tmp_path, config, forked, changed):
    anchor, texts, questions = (tmp_path / name for name in ("anchor.txt", "general.txt", "questions.jsonl"))
    anchor.write_text("The sea is calm.")
    texts.write_text("The cat slept.")
    questions.write_text(json.dumps({"input": "The sea is", "choices": ["calm", "red"], "answer": 0}) + "\n")
    method, measured = tmp_path / "anchored.yaml", tmp_path / "measured.yaml"
    method.write_text(yaml.safe_dump({"model": {"init_args": {"anchor": {"texts": str(anchor)}}}}))
    arguments = {"texts": str(texts), "choices": str(questions)}
    retention = {"class_path": "lightning_ft.Retention", "init_args": arguments}
    savings = yaml.safe_load(Path(config).read_text())["trainer"]["callbacks"][0]
    measured.write_text(yaml.safe_dump({"trainer": {"callbacks": [savings, retention]}}))
    options = {**QUICK, "seeds": "0", "learning_rates": {"anchored": [5e-3]}, "budget": "0.001s"}
    file = tmp_path / changed
    content = file.read_text()
    for now, message in (
        (content, "nothing to compare"),
        (content, "nothing to compare"),
        (content.replace("calm", "cold").replace("cat", "cow"), "another config"),
    ):
        file.write_text(now)
        with pytest.raises(ComparisonError, match=message):
            compare(f"{config},{measured}", str(method), str(tmp_path / "out"), **options)


@pytest.mark.parametrize(
    "prices",
    [
        "{input: 1e0, output: '2', training: 1e3, currency: EUR, date: 2026-01-31}",
        "{class_path: lightning_ft.Prices, init_args: {input: 1, output: 2, training: 1000, currency: EUR, "
        "date: '2026-01-31'}}",
    ],
)
def test_comparer_takes_prices_as_fit_does(tmp_path, config, prices):
    content = yaml.safe_load(Path(config).read_text())
    arguments = content["trainer"]["callbacks"][0]["init_args"]
    arguments |= {"prices": "PRICES", "margin": "MARGIN"}
    text = yaml.safe_dump(content).replace("PRICES", prices).replace("MARGIN", "5e-2")
    Path(config).write_text(text + "ckpt_path: null\nweights_only: null\n")  # as `fit` saves it
    options = Comparer(config, ["lora"], tmp_path / "out", grids={}, seeds=[0]).options
    assert options["prices"] == Prices(1.0, 2.0, training=1000.0, currency="EUR", date="2026-01-31")
    assert (options["margin"], options["min_quality"]) == (0.05, None)


def test_compare_calls_the_metrics_before_any_run(tmp_path, config):
    (tmp_path / "mine.py").write_text("def metrics(outputs, references):\n    return {'f1': None}\n")
    with pytest.raises(ComparisonError, match="function 'metrics' returned None for 'f1'"):
        compare(config, "lora", str(tmp_path / "out"), metrics=f"{tmp_path / 'mine.py'}:metrics")
    assert not list((tmp_path / "out").rglob("plan.json"))


def test_compare_quotes_log_of_failed_run(tmp_path, config):
    content = yaml.safe_load(Path(config).read_text())
    content["model"]["init_args"]["lora"] = {"r": 2, "target_modules": ["no_such_layer"]}
    Path(config).write_text(yaml.safe_dump(content))
    with pytest.raises(ComparisonError, match=r"(?s)ended with exit status 1.*no_such_layer"):
        compare(config, "lora", str(tmp_path / "out"), **{**QUICK, "learning_rates": {"lora": [5e-3]}})


@pytest.mark.filterwarnings("ignore:(test|validation) has")
def test_comparer_finds_requests_in_training_rows_before_any_run(tmp_path, config):
    own, test, validation = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "test", "validation")
    )
    rows = [*own, *({**row, "output": "lamp", "id": f"copy {row['id']}"} for row in (*test[:2], *validation[:4]))]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({**row, "cluster": "Ann"}) + "\n" for row in rows))
    (tmp_path / "test.jsonl").write_text(
        "".join(json.dumps({**row, "cluster": "Ann" if n == 7 else n}) + "\n" for n, row in enumerate(test))
    )
    options = {
        "grids": {},
        "seeds": [0],
        "search_rows": None,
        "sizes": [],
        "curve_seeds": None,
        "budget": None,
        "metrics": None,
    }
    options |= {"evaluations": 2, "validation_requests": None, "workers": 1, "threads": 1}
    comparer = Comparer(config, ["lora"], tmp_path / "out", **options)
    assert comparer.overlap["test"].in_training == ("test-0", "test-1")
    assert comparer.overlap["test"].in_training_clusters == ("test-7",)
    warnings = comparer._request_warnings()
    assert warnings[0].startswith("1 of 8 requests belong to a cluster that also has training rows")
    assert warnings[1] == (
        "Of the validation rows, on which learning rates are chosen, 4 of 8 requests (50%) also appear in the training "
        "rows."
    )
    row_counts = comparer._provenance()["rows"]
    assert row_counts["test"]["rows whose question appears in train"] == 2
    assert row_counts["validation"]["rows whose question appears in train"] == 4
