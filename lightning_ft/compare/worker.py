"""Process of one run of a comparison: `python -m lightning_ft.compare.worker FOLDER`.

The folder contains `config.yaml`, a configuration of `lightning-ft fit`, and `plan.json`; the run writes `result.json`
when it is complete. A run that was killed resumes from its last checkpoint.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from lightning_ft._lightning import NAMESPACE
from lightning_ft.callbacks.base import precision_of
from lightning_ft.callbacks.compute import ComputeMeter
from lightning_ft.callbacks.retention import Retention
from lightning_ft.cli import FineTuningCLI
from lightning_ft.compare.plan import PlannedRun
from lightning_ft.compare.recorder import RunRecorder
from lightning_ft.compare.run_files import (
    CHECKPOINT,
    CONFIG,
    EXPORT,
    PLAN,
    RESULT,
    find_checkpoint,
    read_plan,
    write_results,
)
from lightning_ft.data.pairs import PairDataModule
from lightning_ft.data.prompt_baseline import PromptBaseline
from lightning_ft.data.splits import SplitName
from lightning_ft.errors import ComparisonError, ConfigError, LightningFTError, NonFiniteError
from lightning_ft.evaluation.comparison.result import RunResult
from lightning_ft.evaluation.savings.arms import run_arm
from lightning_ft.evaluation.savings.first_token import TIMED_REQUESTS
from lightning_ft.evaluation.savings.plan import MeasurementPlan, measurement_plan
from lightning_ft.evaluation.savings.records import ArmRecords
from lightning_ft.models.head import CausalLM
from lightning_ft.modules.base import FineTuning

KEEP_MODEL = "--keep_model"
"""Argument of the process that keeps the exported model."""
_PLAN_OPTIONS = ("scorer", "max_new_tokens", "max_requests", "seed", "structured_outputs")


def measurement_plans(
    tokenizer: PreTrainedTokenizerBase, data: PairDataModule, settings: Mapping[str, Any]
) -> dict[str, MeasurementPlan]:
    """Plan the measurements of token savings on the validation rows and on the test rows.

    Args:
        tokenizer: Tokenizer of the model.
        data: DataModule whose rows are loaded.
        settings: `Settings` as JSON types.

    Returns:
        The plan of each split that has rows, ``validation`` and ``test``.

    Raises:
        SavingsError: For problems that can be found without the model.
    """
    savings = settings["savings"]
    baseline = savings.get("baseline")
    if isinstance(baseline, str):
        baseline = PromptBaseline.from_file(baseline)
    elif isinstance(baseline, dict):
        baseline = PromptBaseline(**_without_class(baseline))
    test_options = {name: _without_class(savings[name]) for name in _PLAN_OPTIONS if name in savings}
    validation_options = (
        test_options
        if settings["validation_requests"] is None
        else {**test_options, "max_requests": settings["validation_requests"]}
    )
    options: dict[SplitName, dict[str, Any]] = {"validation": validation_options, "test": test_options}
    return {
        split: measurement_plan(tokenizer, data.requests(split), baseline, **options[split])
        for split in options
        if split in data.splits.rows
    }


def _without_class(value: Any) -> Any:
    """The arguments of an object in a configuration; other values are returned unchanged."""
    return value.get("init_args", value) if isinstance(value, dict) else value


def execute(folder: Path, *, keep_model: bool = False) -> list[RunResult]:
    """Execute the planned run of a folder.

    Args:
        folder: Folder of the run.
        keep_model: Whether to keep the exported model.

    Returns:
        The result; for the original weights, one for each of their two arms.
    """
    started = time.perf_counter()
    plan = read_plan(folder)
    if plan is None:
        raise ComparisonError(f"{folder / PLAN} is missing or damaged. Start the comparison again to write it.")
    run = PlannedRun(**plan["run"])
    savings = plan["settings"]["savings"]
    cli = FineTuningCLI(["--config", str(folder / CONFIG)], run=False, save_config=False)
    data: PairDataModule = cli.datamodule
    data.load_rows()
    data.reorder(run.seed)  # not the seed of the held-out split, so that all methods and seeds train on the same rows
    if run.size is not None:
        data.splits.sample("train", run.size)
    plans = measurement_plans(data.share_tokenizer(cli.model), data, plan["settings"])

    def answer(name: str, split: str) -> Callable[[CausalLM], ArmRecords]:
        options = {"batch_size": savings.get("batch_size", 64), "progress": False}
        timed = savings.get("timed_requests", TIMED_REQUESTS) if split == "test" else 0

        def measure(model: CausalLM) -> ArmRecords:
            with precision_of(cli.trainer):  # as in training: the arms of the original weights, too
                return run_arm(name, model, cli.model.tokenizer, plans[split], timed_requests=timed, **options)

        return measure

    def result(method: str, earlier: float = 0.0, **fields: Any) -> RunResult:
        return RunResult(
            method,
            run.seed,
            run.learning_rate,
            plan["rows"] if run.learning_rate is not None else None,
            wall_seconds=time.perf_counter() - started + earlier,
            config_hash=plan["hash"],
            search=run.search,
            **fields,
        )

    if run.learning_rate is None:
        cli.model.configure_model()
        model = cli.model.model  # a new adapter doesn't change the output yet
        results: list[RunResult] = []
        for name in ("untuned", "prompted"):
            validation = answer(name, "validation")(model)
            test = None if run.search else answer(name, "test")(model)
            counted = sum(each.wall_seconds for each in results)  # so that the time of the first arm counts once
            results.append(result(name, -counted, validation_quality=validation.quality, test=test))
        return results
    meter = ComputeMeter(output_dir=False)
    # A search only chooses the learning rate, and measuring forgetting would take longer than its training.
    settings = None if run.search else plan["settings"]["retention"]
    retention = Retention(**{**settings, "output_dir": False}) if settings else None
    recorder = RunRecorder(
        folder,
        meter,
        lambda model: answer("tuned", "validation")(model).quality,
        1 if run.search else plan["settings"]["evaluations"],
        plan["hash"],
    )
    trainer: Any = cli.trainer
    trainer.callbacks = [meter, *trainer.callbacks, *([retention] if retention else []), recorder]
    try:
        trainer.fit(cli.model, datamodule=data, ckpt_path=find_checkpoint(folder, plan["hash"]))
    except NonFiniteError as error:  # an outcome of a learning rate: that it is too high
        compute = None
        with suppress(ConfigError):  # not a single micro-batch was completed
            compute = meter.so_far()
        failed = {"validation_quality": 0.0, "test": None, "compute": compute, "diverged": str(error)}
        return [result(run.method, recorder.earlier_seconds, **failed)]
    if trainer.interrupted:
        raise ComparisonError(
            "The run was interrupted. Start the comparison again to resume it from its last checkpoint."
        )
    if reasons := [
        callback.undefined or f"{callback.title} was not measured."
        for callback in (meter, retention)
        if callback and callback.result is None
    ]:
        raise ComparisonError(f"{' '.join(reasons)} Start the comparison again to repeat the measurements.")
    return [
        result(
            run.method,
            earlier=recorder.earlier_seconds,
            validation_quality=recorder.curve[-1].quality,
            test=None if run.search else answer("tuned", "test")(cli.model.model),
            curve=tuple(recorder.curve),
            compute=meter.result,
            retention=retention.result if retention else None,
            checkpoint_bytes=_exported_bytes(cli.model, folder, keep=keep_model),
        )
    ]


def _exported_bytes(module: FineTuning, folder: Path, *, keep: bool) -> int:
    exported: Path = module.export(folder / EXPORT, overwrite=True)
    size = sum(file.stat().st_size for file in exported.glob("*.safetensors"))
    if not keep:
        shutil.rmtree(exported)
    return size


def main() -> None:
    """Execute a run once; a second process waits for the first, and finds its result."""
    folder = Path(sys.argv[1])
    with FileLock(folder / "lock"):
        if (folder / RESULT).exists():
            return
        try:
            write_results(folder, execute(folder, keep_model=KEEP_MODEL in sys.argv[2:]))
        except LightningFTError as error:
            sys.exit(f"{type(error).__name__}: {error}")
        (folder / CHECKPOINT).unlink(missing_ok=True)
    print(f"Executed with {NAMESPACE}")


if __name__ == "__main__":
    main()
