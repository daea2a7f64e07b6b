"""`lightning-ft plan`: whether fine-tuning is worth it, before any training."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedTokenizerBase

from lightning_ft import __version__
from lightning_ft.atomic_files import write_text
from lightning_ft.compare.option_values import integers
from lightning_ft.compare.plan import PlannedRun, read_config, run_config
from lightning_ft.compare.processes import LOG, last_lines, run_environment
from lightning_ft.compare.run import Comparer
from lightning_ft.compare.run_files import CONFIG
from lightning_ft.errors import ComparisonError
from lightning_ft.evaluation.forecast import (
    Forecast,
    MoneyForecast,
    Pilot,
    QualityForecast,
    RequestTokens,
    Resources,
    advise,
    extrapolate,
    forecast_money,
)
from lightning_ft.evaluation.savings.cost import Prices
from lightning_ft.evaluation.savings.plan import MeasurementPlan
from lightning_ft.planning.probe import RESULT
from lightning_ft.planning.table import forecast_text
from lightning_ft.printable import json_text

FILE_NAME = "forecast.json"
_METHODS = {"FullFineTuning": "full", "LoRAFineTuning": "lora"}
_PROMPTS = PlannedRun("original", search=True)


def plan(
    config: str,
    output: str,
    pilot: str | list[int] | None = None,
    steps: int | None = None,
    requests_planned: float | None = None,
    cached: bool | None = None,
    hourly: float | None = None,
    validation_requests: int | None = None,
    threads: int | None = None,
) -> Forecast:
    """Forecast what fine-tuning saves, takes and reaches, before any training, and say whether it is worth it.

    Tokens per request are counted exactly, time and memory are extrapolated from a few real steps, and with `pilot`
    quality is extrapolated from runs on a few rows. Only validation rows are answered. Tokens are those of the test
    rows, if there are any, or else of the validation rows. Steps are measured without callbacks and validation.

    Args:
        config: Path of a configuration of `lightning-ft fit` with TokenSavings among its callbacks, whose prompt,
            scorer, margin, `min_quality` and prices are used. Several paths, separated by commas, are merged.
        output: Folder of the measurements and of ``forecast.json``. Complete pilot runs in it are not repeated.
        pilot: Numbers of training rows of the pilot runs, such as ``100,300``; none by default.
        steps: Number of micro-batches to measure for time and memory; 0 for none. By default 8, and 24 on a CPU, whose
            memory grows with the number of sizes of batches that a run has had.
        requests_planned: Number of requests that the model will answer.
        cached: Whether your provider caches the prompt; by default if the prices have one for cached tokens.
        hourly: Price of an hour of the device that trains, in the currency of the prices.
        validation_requests: Number of validation rows that the pilot answers; all by default.
        threads: Number of threads per run; torch's default if None.

    Returns:
        The forecast, which is also written to ``forecast.json``.

    Raises:
        ComparisonError: For a configuration that isn't one of supervised fine-tuning, and for a run that failed.
    """
    folder = Path(output)
    sizes = sorted(set(integers("pilot", pilot or [])))
    if hourly is not None and steps == 0:
        raise ComparisonError(f"--hourly {hourly:g} is the price of measured time: leave out --steps 0.")
    if len(sizes) == 1 or (sizes and sizes[0] < 1):
        raise ComparisonError(f"--pilot {pilot!r}: expected at least two numbers of rows, such as 100,300.")
    name, rate = _method(config)
    comparer = Comparer(
        config,
        [name],
        folder,
        grids={name: [rate]},
        seeds=[0],
        validation_requests=validation_requests,
        threads=threads,
        needs_test=False,
    )
    if sizes and sizes[-1] > comparer.rows:
        raise ComparisonError(f"--pilot {sizes[-1]}: there are only {comparer.rows:,} training rows.")
    prices: Prices | None = comparer.options["prices"]
    if prices is None and (hourly is not None or cached is not None):
        raise ComparisonError("--hourly and --cached need prices: add them to TokenSavings in the configuration.")
    if cached and prices is not None and prices.cached_input is None:
        raise ComparisonError("--cached true needs the price of cached tokens: add cached_input to the prices.")
    tokens = request_tokens(comparer.plan, comparer.tokenizer)
    resources = None if steps == 0 else _probe(comparer, PlannedRun(name, rate), folder / "probe", steps)
    margin: float = comparer.options["margin"]
    money: MoneyForecast | None = None
    if prices is not None:
        seconds = None if resources is None else resources.seconds
        money = forecast_money(tokens, prices, hourly=hourly, seconds=seconds)
    found: Pilot | None = None
    quality: QualityForecast | None = None
    if sizes:
        found = _pilot(comparer, name, rate, sizes)
        quality = extrapolate(found.tuned, comparer.rows, found.requests)
    advice, reasons = advise(
        tokens,
        money=money,
        pilot=found,
        quality=quality,
        margin=margin,
        min_quality=comparer.options["min_quality"],
        requests_planned=requests_planned,
        cached=cached,
    )
    forecast = Forecast(
        advice,
        reasons,
        tokens,
        money,
        resources,
        found,
        quality,
        margin,
        {"config": config, "method": name, "learning_rate": rate, "lightning-ft": __version__},
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / FILE_NAME, json_text(forecast.to_dict()) + "\n")
    print(forecast_text(forecast))
    return forecast


def request_tokens(plan: MeasurementPlan, tokenizer: PreTrainedTokenizerBase) -> RequestTokens:
    """Count the tokens of requests, and of their reference answers with the token that ends each.

    Args:
        plan: Requests with the prompts of both arms.
        tokenizer: Tokenizer of the model.
    """
    references = tokenizer([request.reference for request in plan.requests], add_special_tokens=False, verbose=False)
    assert plan.prompted is not None  # a comparison needs a prompt
    n = len(plan.requests)
    return RequestTokens(
        requests=n,
        prompted=sum(map(len, plan.prompted.prompts)) / n,
        tuned=sum(map(len, plan.bare.prompts)) / n,
        prefix=float(plan.prompted.prefix_length),
        tuned_prefix=float(plan.bare.prefix_length),
        output=sum(len(ids) + 1 for ids in references["input_ids"]) / n,
    )


def _method(config: str) -> tuple[str, float]:
    """Name of the configured method and its learning rate."""
    from lightning_ft.modules.sft import FullFineTuning, LoRAFineTuning

    model = read_config(config)["model"]
    class_name = str(model.get("class_path", "")).rpartition(".")[2]
    if class_name not in _METHODS:
        raise ComparisonError(
            f"{config!r} trains {class_name or 'no class'}: a forecast is for supervised fine-tuning, so expected "
            f"{' or '.join(_METHODS)}."
        )
    default = (FullFineTuning if class_name == "FullFineTuning" else LoRAFineTuning).default_learning_rate
    return _METHODS[class_name], float(model.get("init_args", {}).get("learning_rate") or default)


def _probe(comparer: Comparer, run: PlannedRun, folder: Path, steps: int | None) -> Resources:
    """Measure a few training steps in a process of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = run_config(comparer.methods[run.method], run, folder)
    trainer = config["trainer"]  # callbacks may monitor a validation, and stop or tune the run
    trainer |= {"callbacks": [], "num_sanity_val_steps": 0}
    for name in ("val_check_interval", "check_val_every_n_epoch", "fast_dev_run", "max_time"):
        trainer.pop(name, None)
    write_text(folder / CONFIG, yaml.safe_dump(config, sort_keys=False))
    print(f"measuring {'a few' if steps is None else f'up to {steps}'} training steps ...", flush=True)
    command = [sys.executable, "-m", "lightning_ft.planning.probe", str(folder)]
    command += [] if steps is None else [str(steps)]
    with (folder / LOG).open("wb") as log:
        environment = run_environment(comparer.threads)
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False)
    if done.returncode:
        raise ComparisonError(f"The training steps could not be measured. {last_lines(folder)}")
    return Resources(**json.loads((folder / RESULT).read_text(encoding="utf-8")))


def _pilot(comparer: Comparer, name: str, rate: float, sizes: list[int]) -> Pilot:
    """Train on a few rows, and answer the validation rows with and without the prompt, and after training."""
    runs = {size: PlannedRun(name, rate, 0, size, search=True) for size in sizes}
    comparer.execute([_PROMPTS, *runs.values()])
    original = {result.method: result.validation_quality for result in comparer.results[_PROMPTS]}
    return Pilot(
        requests=len(comparer.plans["validation"].requests),
        prompted=original["prompted"],
        untuned=original["untuned"],
        tuned={size: comparer.results[run][0].validation_quality for size, run in runs.items()},
    )
