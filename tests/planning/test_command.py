"""`lightning-ft plan`: exact tokens, measured steps, a pilot, and refused configurations."""

import json
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from comparable_config import write_config
from forked import ForkedProcess
from transformers import AutoTokenizer

from lightning_ft import ComputeMeter, LoRAFineTuning, PairDataModule
from lightning_ft.__main__ import main
from lightning_ft._lightning import Trainer
from lightning_ft.compare.run import compare
from lightning_ft.data.layout import Example, collate_examples
from lightning_ft.errors import ComparisonError
from lightning_ft.planning.command import FILE_NAME, plan
from lightning_ft.planning.probe import choose_batches

pytestmark = pytest.mark.filterwarnings("ignore:.*fork")


@pytest.fixture
def config(tmp_path, model_folder):
    return write_config(tmp_path, model_folder)


def changed(config, **sections):
    content = yaml.safe_load(Path(config).read_text())
    for path, value in sections.items():
        *parents, name = path.split("__")
        target = content
        for parent in parents:
            target = target[parent]
        target[name] = value
    file = Path(config).with_name("changed.yaml")
    file.write_text(yaml.safe_dump(content))
    return str(file)


def test_plan_counts_the_tokens_that_token_savings_measures(config, tmp_path, monkeypatch):
    forecast = plan(config, str(tmp_path / "plan"), steps=0)
    monkeypatch.setattr(subprocess, "Popen", ForkedProcess)
    options = {"learning_rates": {"lora": [5e-3]}, "evaluations": 1, "threads": 1, "seeds": "0"}
    measured = compare(config, "prompted,lora", str(tmp_path / "compare"), **options).savings["lora"]
    for arm, tokens in (("prompted", forecast.tokens.prompted), ("tuned", forecast.tokens.tuned)):
        assert sum(measured.arms[arm].input_tokens) / measured.n == tokens
    assert forecast.tokens.requests == measured.n
    assert forecast.tokens.prefix == measured.arms["prompted"].cached_prefix_tokens[0]
    assert forecast.resources is None
    assert forecast.advice == "pilot first"


def test_plan_with_a_pilot_trains_on_few_rows_and_leaves_test_rows_unanswered(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "Popen", ForkedProcess)
    output = tmp_path / "plan"
    options = {"pilot": "8,16", "steps": 0, "threads": 1, "requests_planned": 10}
    forecast = plan(config, str(output), **options)
    assert set(forecast.pilot.tuned) == {8, 16}
    assert forecast.pilot.requests == 8
    assert forecast.quality.rows == 24
    assert forecast.quality.low <= forecast.quality.value <= forecast.quality.high
    for result in output.rglob("result.json"):
        assert all(run["test"] is None for run in json.loads(result.read_text()))
    assert json.loads((output / FILE_NAME).read_text())["advice"] == forecast.advice
    text = capsys.readouterr().out
    assert f"{forecast.advice}: " in text
    assert "after 16 rows" in text
    times = [path.stat().st_mtime_ns for path in sorted(output.rglob("result.json"))]
    assert plan(config, str(output), **options).pilot == forecast.pilot  # complete runs are not repeated
    assert times == [path.stat().st_mtime_ns for path in sorted(output.rglob("result.json"))]


@pytest.mark.parametrize(
    ("once", "limits"),
    [
        ("nothing", {"max_epochs": 2}),
        ("anchor", {"max_epochs": 2}),
        ("cached layers", {"max_epochs": 2}),
        ("cached layers", {"max_epochs": 1, "limit_train_batches": 2}),
    ],
)
def test_plan_predicts_operations_and_memory(config, tmp_path, model_folder, trainer_options, once, limits):
    """Predicted from four of six batches, measured in the whole run."""
    options = {
        "nothing": {"lora": {"r": 2}},
        "anchor": {"lora": {"r": 2}, "anchor": {"texts": [f"refund {n} please" * 20 for n in range(99)]}},
        "cached layers": {"lora": {"r": 2, "target_modules": ["q_proj"]}, "top_layers": 1},
    }[once]
    of_plan, of_run = ({"activation_cache": str(tmp_path / name)} for name in ("planned", "run"))
    if once != "cached layers":
        of_plan, of_run = {}, {}
    changes = {"data__init_args__batch_size": 4, **{f"trainer__{name}": limits[name] for name in limits}}
    planned = changed(
        config,
        **changes,
        **{f"model__init_args__{name}": value for name, value in {**options, **of_plan}.items()},
    )
    forecast = plan(planned, str(tmp_path / "plan"), steps=4, threads=1)
    meter = ComputeMeter(output_dir=False, every_n_steps=1)
    data = PairDataModule(train=str(tmp_path / "train.jsonl"), batch_size=4, cache_dir=False)
    torch.manual_seed(0)
    trainer = Trainer(**trainer_options, **limits, callbacks=[meter])
    module = LoRAFineTuning(str(model_folder), dtype="float32", learning_rate=5e-3, **options, **of_run)
    trainer.fit(module, data)
    assert (module.frozen_flops > 0) == (once != "nothing")
    resources = forecast.resources
    assert resources.rows == 24
    assert resources.tokens == pytest.approx(meter.result.tokens, rel=0.1)  # each epoch draws its batches again
    assert resources.flops == pytest.approx(meter.result.flops, rel=0.15)
    assert resources.peak_memory_bytes > 0
    assert resources.seconds > 0


def test_plan_advises_by_min_quality(config, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", ForkedProcess)
    content = yaml.safe_load(Path(config).read_text())
    content["trainer"]["callbacks"][0]["init_args"]["min_quality"] = 1.0
    Path(config).write_text(yaml.safe_dump(content))
    forecast = plan(config, str(tmp_path / "plan"), pilot="8,16", steps=0, threads=1)
    assert forecast.pilot.prompted < 1
    assert "min_quality=1" in " ".join(forecast.reasons)


def test_command_line_prints_the_forecast(config, tmp_path, capsys):
    main(["plan", "--config", config, "--output", str(tmp_path / "plan"), "--steps", "0"])
    out = capsys.readouterr().out
    assert "pilot first: " in out
    assert "input with the prompt" in out
    assert "What training costs isn't known" in out


PRICES = {"input": 1.0, "output": 2.0, "currency": "EUR", "date": "2026-01-31"}


@pytest.mark.parametrize(
    ("prices", "reason", "saves"),
    [
        ({"cached_input": 0.05, "tuned_input": 9.0}, "more with the prompt cached", "never pays off"),
        ({"input": 0.0, "output": 0.0}, "costs as much as a prompted one", None),
        ({"training": 5.0}, None, "pays off after"),
        ({"training": "5e0"}, None, "pays off after"),
    ],
)
def test_forecast_is_written_whatever_the_prices(config, tmp_path, capsys, prices, reason, saves):
    prices = {**PRICES, "training": 1.0 if saves else 0.0, **prices}
    content = yaml.safe_load(Path(config).read_text())
    content["trainer"]["callbacks"][0]["init_args"]["prices"] = prices
    Path(config).write_text(yaml.safe_dump(content))
    forecast = plan(config, str(tmp_path / "plan"), steps=0)
    assert (forecast.advice == "don't") == (reason is not None)
    out = capsys.readouterr().out
    assert reason is None or reason in out
    assert saves is None or saves in out
    assert "inf" not in out.replace("Infinity", "")
    written = json.loads((tmp_path / "plan" / FILE_NAME).read_text())
    assert written["advice"] == forecast.advice
    assert ("Infinity" in written["money"]["break_even"]) == (reason is not None)


def test_plan_takes_hourly_prices_of_measured_time(config, tmp_path):
    forecast = plan(config, str(tmp_path / "plan"), steps=4, threads=1, hourly=3600.0)
    assert forecast.money.invested == pytest.approx(forecast.resources.seconds)


def test_plan_counts_validation_rows_without_test_rows(config, tmp_path):
    content = yaml.safe_load(Path(config).read_text())
    del content["data"]["init_args"]["test"]
    Path(config).write_text(yaml.safe_dump(content))
    assert plan(config, str(tmp_path / "plan"), steps=0).tokens.requests == 8


def test_comparison_in_the_folder_of_a_plan(config, tmp_path, monkeypatch):
    """The pilot's answers to validation rows are no answers to test rows."""
    monkeypatch.setattr(subprocess, "Popen", ForkedProcess)
    output = str(tmp_path / "out")
    plan(config, output, pilot="8,16", steps=0, threads=1)
    options = {"learning_rates": {"lora": [5e-3]}, "evaluations": 1, "threads": 1, "seeds": "0"}
    assert compare(config, "prompted,lora", output, **options).complete


def test_more_steps_are_measured_on_a_cpu(config, tmp_path):
    """Memory grows there with the number of sizes of batches."""
    content = yaml.safe_load(Path(config).read_text())
    content["data"]["init_args"]["batch_size"] = 1
    Path(config).write_text(yaml.safe_dump(content))
    resources = plan(config, str(tmp_path / "plan"), threads=1).resources
    assert (resources.measured_steps, resources.device) == (24, "cpu")


@pytest.mark.parametrize(
    ("limits", "share"),
    [({"limit_train_batches": 2}, 2 / 3), ({"limit_train_batches": 0.4}, 1 / 3), ({"overfit_batches": 1}, 1 / 3)],
)
def test_plan_follows_limits_and_ignores_validation(config, tmp_path, limits, share):
    whole = plan(config, str(tmp_path / "whole"), steps=3, threads=1).resources
    content = yaml.safe_load(Path(config).read_text())
    stopping = {"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss"}}
    content["trainer"] |= {**limits, "val_check_interval": 1, "callbacks": [*content["trainer"]["callbacks"], stopping]}
    Path(config).write_text(yaml.safe_dump(content))
    limited = plan(config, str(tmp_path / "limited"), steps=3, threads=1).resources
    assert limited.measured_steps == whole.measured_steps == 3
    assert limited.tokens == pytest.approx(whole.tokens * share, abs=1)
    assert limited.flops == pytest.approx(whole.flops * share, rel=1e-3)


def test_plan_counts_references_with_their_end_token(config, tmp_path, model_folder):
    forecast = plan(config, str(tmp_path / "plan"), steps=0)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    assert forecast.tokens.output == len(tokenizer("parcel", add_special_tokens=False)["input_ids"]) + 1


@pytest.mark.parametrize(
    ("sections", "options", "message"),
    [
        ({}, {"pilot": "8"}, "--pilot '8': expected at least two numbers"),
        ({}, {"pilot": "0,8"}, "expected at least two numbers"),
        ({}, {"pilot": "some"}, "--pilot 'some': expected whole numbers"),
        ({}, {"hourly": 2.0}, "--hourly 2 is the price of measured time"),
        ({}, {"cached": True}, "add cached_input to the prices"),
        ({}, {"pilot": "8,400"}, "there are only 24 training rows"),
        ({"model__class_path": "lightning_ft.GRPO"}, {}, "trains GRPO: a forecast is for supervised fine-tuning"),
        ({"trainer__callbacks": []}, {}, "has no TokenSavings"),
        ({"data__init_args__validation": None}, {}, "no validation rows.*: a file, or a share of the training rows"),
        ({"trainer__max_epochs": -1}, {"steps": 2}, "The run has no end"),
    ],
)
def test_plan_refuses(config, tmp_path, sections, options, message):
    with pytest.raises(ComparisonError, match=message):
        plan(changed(config, **sections), str(tmp_path / "plan"), **{"steps": 0, "threads": 1, **options})


def test_output_in_place_of_which_there_is_a_file_is_refused(config):
    with pytest.raises(ComparisonError, match=f"--output '{config}/plan': '{config}' is a file. Choose another folder"):
        plan(config, f"{config}/plan", steps=0)


@pytest.mark.parametrize("count", [2, 3, 8, 50])
def test_chosen_batches_include_the_largest_before_the_last(count):
    epoch = [collate_examples([Example(torch.arange(n), torch.ones(n, dtype=torch.bool))]) for n in range(2, 32)]
    sizes = [batch.input_ids.numel() for batch in choose_batches(epoch, count)]
    assert len(sizes) == min(count, 30)
    assert sizes[-2] == 31
    assert len(set(sizes)) == len(sizes)
    if count > 3:  # in ascending order memory is less fragmented than in training
        assert all((one < other) == (i % 2 == 0) for i, (one, other) in enumerate(pairwise(sizes[:-2])))


def test_chosen_batch_of_a_single_one():
    batch = collate_examples([Example(torch.arange(3), torch.ones(3, dtype=torch.bool))])
    assert choose_batches([batch], 8) == [batch]
