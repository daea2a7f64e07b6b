"""One run of a comparison in a process of its own: `python -m lightning_ft.compare.worker FOLDER`.

The folder holds `config.yaml`, a configuration of `lightning-ft fit`, and `plan.json`; the run writes `result.json`,
once it is complete. A run that was killed goes on from its last checkpoint.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from lightning_ft._lightning import NAMESPACE
from lightning_ft.callbacks.compute import ComputeMeter
from lightning_ft.callbacks.retention import Retention
from lightning_ft.cli import FineTuningCLI
from lightning_ft.compare.plan import PlannedRun
from lightning_ft.compare.recorder import RunRecorder
from lightning_ft.compare.run_files import CHECKPOINT, CONFIG, PLAN, RESULT, checkpoint_of, read_plan, write_results
from lightning_ft.errors import ComparisonError, LightningFTError
from lightning_ft.evaluation.comparison.result import RunResult
from lightning_ft.evaluation.savings.arms import run_arm
from lightning_ft.evaluation.savings.plan import MeasurementPlan, measurement_plan
from lightning_ft.evaluation.savings.prompt import PromptBaseline
from lightning_ft.evaluation.savings.records import ArmRecords

_OF_THE_PLAN = ("scorer", "max_new_tokens", "max_requests", "seed")


def savings_plans(tokenizer: Any, data: Any, settings: Mapping[str, Any]) -> dict[str, MeasurementPlan]:
    """What is asked of the validation rows and of the test rows.

    Args:
        tokenizer: The model's.
        data: The DataModule, its rows loaded.
        settings: `Settings` as JSON types.

    Raises:
        SavingsError: For everything that can be known without the model.
    """
    savings = settings["savings"]
    baseline = savings.get("baseline")
    if isinstance(baseline, str):
        baseline = PromptBaseline.from_file(baseline)
    elif isinstance(baseline, dict):
        baseline = PromptBaseline(**baseline.get("init_args", baseline))
    options = {name: savings[name] for name in _OF_THE_PLAN if name in savings}
    fewer = (
        options
        if settings["validation_requests"] is None
        else {**options, "max_requests": settings["validation_requests"]}
    )
    return {
        split: measurement_plan(tokenizer, data.requests(split), baseline, **asked)
        for split, asked in (("validation", fewer), ("test", options))
    }


def make(folder: Path) -> list[RunResult]:
    """Make the run that a folder plans.

    Returns:
        Its result; for the original weights one for each of their two arms.
    """
    started = time.perf_counter()
    plan = read_plan(folder)
    if plan is None:
        raise ComparisonError(f"{folder / PLAN} is missing or damaged: start the comparison again, which writes it.")
    run = PlannedRun(**plan["run"])
    savings = plan["settings"]["savings"]
    cli = FineTuningCLI(["--config", str(folder / CONFIG)], run=False, save_config=False)
    data: Any = cli.datamodule
    data.load_rows()
    data.reorder(run.seed)  # and not the seed that rows are held out by: methods and seeds share their rows
    if run.size is not None:
        data.splits.sample("train", run.size)
    plans = savings_plans(data.share_tokenizer(cli.model), data, plan["settings"])

    def answer(name: str, split: str) -> Callable[[Any], ArmRecords]:
        options = {"batch_size": savings.get("batch_size", 64), "progress": False}
        timed = savings.get("timed_requests", 3) if split == "test" else 0
        return lambda model: run_arm(name, model, cli.model.tokenizer, plans[split], timed_requests=timed, **options)

    def result(method: str, earlier: float = 0.0, **figures: Any) -> RunResult:
        return RunResult(
            method,
            run.seed,
            run.learning_rate,
            plan["rows"] if run.learning_rate is not None else None,
            wall_seconds=time.perf_counter() - started + earlier,
            config_hash=plan["hash"],
            **figures,
        )

    if run.learning_rate is None:
        cli.model.configure_model()
        model = cli.model.model  # where it has an adapter, that does nothing yet
        made: list[RunResult] = []
        for name in ("untuned", "prompted"):
            validation, test = answer(name, "validation")(model), answer(name, "test")(model)
            counted = sum(earlier.wall_seconds for earlier in made)  # the second arm's time is that since the first
            made.append(result(name, -counted, validation_quality=validation.quality, test=test))
        return made
    meter = ComputeMeter(output_dir=False)
    settings = plan["settings"]["retention"]
    retention = Retention(**{**settings, "output_dir": False}) if settings else None
    recorder = RunRecorder(
        folder,
        meter,
        lambda model: answer("tuned", "validation")(model).quality,
        plan["settings"]["evaluations"],
        plan["hash"],
    )
    trainer: Any = cli.trainer
    trainer.callbacks = [meter, *trainer.callbacks, *([retention] if retention else []), recorder]
    trainer.fit(cli.model, datamodule=data, ckpt_path=checkpoint_of(folder, plan["hash"]))
    if trainer.interrupted:
        raise ComparisonError("The run was interrupted; it goes on from its last checkpoint when started again.")
    if undefined := [told for callback in (meter, retention) if callback and (told := callback.undefined)]:
        raise ComparisonError(f"{' '.join(undefined)} Start the comparison again: the run goes on from its end.")
    return [
        result(
            run.method,
            earlier=recorder.earlier_seconds,
            validation_quality=recorder.curve[-1].quality,
            test=answer("tuned", "test")(cli.model.model),
            curve=tuple(recorder.curve),
            compute=meter.result,
            retention=retention.result if retention else None,
            checkpoint_bytes=_exported_bytes(cli.model, folder),
        )
    ]


def _exported_bytes(module: Any, folder: Path) -> int:
    exported: Path = module.export(folder / "export", overwrite=True)
    size = sum(file.stat().st_size for file in exported.glob("*.safetensors"))
    shutil.rmtree(exported)
    return size


def main() -> None:
    """Make a run once: who comes second waits for the first, and finds its result."""
    folder = Path(sys.argv[1])
    with FileLock(folder / "lock"):
        if (folder / RESULT).exists():
            return
        try:
            write_results(folder, make(folder))
        except LightningFTError as error:
            sys.exit(f"{type(error).__name__}: {error}")
        (folder / CHECKPOINT).unlink(missing_ok=True)
    print(f"made with {NAMESPACE}")


if __name__ == "__main__":
    main()
