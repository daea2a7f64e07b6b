"""Make a comparison: the runs that are still missing, within a budget, then its figures and report."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from lightning_ft._lightning import NAMESPACE, VARIABLE
from lightning_ft.atomic_files import write_text
from lightning_ft.cli import FineTuningCLI
from lightning_ft.compare.plan import (
    EPOCHS_CAP,
    Method,
    PlannedRun,
    Settings,
    config_hash,
    planned_methods,
    read_config,
    read_settings,
    rounded,
    run_config,
    weights_hash,
)
from lightning_ft.compare.run_files import CONFIG, PLAN, read_plan, read_results, write_plan
from lightning_ft.compare.worker import savings_plans
from lightning_ft.errors import ComparisonError
from lightning_ft.evaluation.comparison.methods import EvaluationSet, choose_learning_rates, compare_methods
from lightning_ft.evaluation.comparison.result import Comparison, RunResult
from lightning_ft.evaluation.savings.cost import Prices
from lightning_ft.evaluation.savings.gate import overlap_text
from lightning_ft.evaluation.savings.overlap import request_overlap
from lightning_ft.evaluation.savings.prompt import content_hash
from lightning_ft.importing import import_object
from lightning_ft.printable import json_text
from lightning_ft.report.write import write_report

EXTENSIONS = 2
"""How often a grid is extended where its best learning rate is at its edge."""
NAME = "comparison.json"
ORIGINAL = PlannedRun("original")


def compare(
    config: str,
    methods: str | list[str],
    output: str,
    learning_rates: dict[str, list[float]] | None = None,
    seeds: str | list[int] = "0,1,2",
    sizes: str | list[int] | None = None,
    curve_seeds: int | None = None,
    budget: str | None = None,
    metrics: str | None = None,
    evaluations: int = 8,
    validation_requests: int | None = None,
    workers: int = 1,
    threads: int | None = None,
) -> Comparison:
    """Compare ways to train on the same rows: what each reached, what it took, and what it forgot.

    Every method has its own grid of learning rates; the best by validation quality is run with every seed, and, with
    `sizes`, on fewer rows. Runs are processes of their own, in folders below `output`; those that are complete are
    never made again, and one that was killed goes on from its last checkpoint.

    Args:
        config: A configuration of `lightning-ft fit` with TokenSavings among its callbacks: its prompt, scorer, margin
            and prices are what methods are measured by.
        methods: ``prompted``, ``full``, ``lora``, or YAML files, as ``prompted,full,lora``.
        output: Folder of runs, figures and report.
        learning_rates: Grid of each method; by default a third, once and three times the configured one. Where the best
            is at the edge, the grid is extended up to twice.
        seeds: At least three, or differences between methods may be chance.
        sizes: Training rows of a learning curve, such as ``100,500,1000``.
        curve_seeds: How many of the seeds the learning curve is run with; by default all.
        budget: Time that all runs together may take, as ``90m`` or ``2h``; a run that would not fit isn't begun.
        metrics: Figures of the domain: where to import ``f(outputs, references) -> dict`` from.
        evaluations: Measurements on the validation rows during a run.
        validation_requests: How many of the validation rows to ask, drawn by TokenSavings' seed; by default all.
        workers: Runs side by side. More than one slows all of them down, so wall times mean less.
        threads: Threads of each run; by default torch's choice.

    Returns:
        The comparison; it is also written to ``comparison.json``, with a report beside it.

    Raises:
        ComparisonError: For methods that can't be compared, and for a run that failed.
    """
    return _Comparer(
        config,
        _listed(methods),
        Path(output),
        grids=learning_rates or {},
        seeds=_numbers("seeds", seeds),
        sizes=_numbers("sizes", sizes or []),
        curve_seeds=curve_seeds,
        budget=None if budget is None else seconds_of(budget),
        metrics=metrics,
        evaluations=evaluations,
        validation_requests=validation_requests,
        workers=workers,
        threads=threads,
    ).run()


def seconds_of(text: str) -> float:
    """A time such as ``90m``.

    Raises:
        ComparisonError: If it is none.

    Example:
        >>> seconds_of("90m"), seconds_of("1.5h"), seconds_of("20")
        (5400.0, 5400.0, 20.0)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    if found is None:
        raise ComparisonError(f"--budget {text!r}: expected a time such as 90m, 2h or 600s.")
    return float(found[1]) * {"s": 1, "": 1, "m": 60, "h": 3600}[found[2]]


def _listed(given: str | Sequence[Any]) -> list[str]:
    return [part.strip() for part in given.split(",")] if isinstance(given, str) else [str(part) for part in given]


def _numbers(name: str, given: str | Sequence[int]) -> list[int]:
    try:
        return [int(part) for part in _listed(given)]
    except ValueError as error:
        raise ComparisonError(f"--{name} {given!r}: expected whole numbers such as 0,1,2.") from error


def _text_of(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):  # missing, or not text
        return None


class _Comparer:
    """The state of one call of :func:`compare`."""

    def __init__(
        self,
        config: str,
        names: Sequence[str],
        output: Path,
        *,
        grids: Mapping[str, Sequence[float]],
        seeds: Sequence[int],
        sizes: Sequence[int],
        curve_seeds: int | None,
        budget: float | None,
        metrics: str | None,
        evaluations: int,
        validation_requests: int | None,
        workers: int,
        threads: int | None,
    ) -> None:
        if not seeds or len(set(seeds)) < len(seeds) or workers < 1 or evaluations < 1:
            raise ComparisonError("compare: expected different seeds, at least one; workers and evaluations from 1.")
        self.config, self.output, self.budget = read_config(config), output, budget
        self.config_path, self.seeds, self.curve_seeds = config, list(seeds), list(seeds)[:curve_seeds]
        self.workers, self.threads = workers, threads
        self.settings: Settings = read_settings(self.config, config, evaluations, validation_requests)
        self.methods = {m.name: m for m in planned_methods(self.config, config, names, grids)}
        self.metrics = None if metrics is None else import_object(metrics, argument="metrics", error=ComparisonError)
        self.complete = True
        self.results: dict[PlannedRun, list[RunResult]] = {}
        self._weights: dict[Any, str] = {}
        self.plan, self.rows, self.data_report = self._check()
        too_many = [size for size in sizes if size >= self.rows]
        if too_many:
            print(
                f"Sizes {too_many} are at least the {self.rows:,} training rows: those runs are the ones on all rows."
            )
        self.sizes = sorted({size for size in sizes if size < self.rows})

    def _check(self) -> tuple[Any, int, dict[str, Any]]:
        """Load rows and prompts once, before anything is trained.

        Raises:
            LightningFTError: For whatever a run would fail with that can be known without weights.
        """
        folder = self.output / "runs" / "checked"
        folder.mkdir(parents=True, exist_ok=True)
        first = next(iter(self.methods.values()))
        write_text(folder / CONFIG, yaml.safe_dump(run_config(first, ORIGINAL, folder), sort_keys=False))
        cli = FineTuningCLI(["--config", str(folder / CONFIG)], run=False, save_config=False)
        data: Any = cli.datamodule
        data.load_rows()
        for split in ("validation", "test"):
            if split not in data.splits.rows:
                raise ComparisonError(
                    f"{self.config_path!r} has no {split} rows: learning rates are chosen on validation rows, methods "
                    "are compared on test rows."
                )
        plans = savings_plans(data.share_tokenizer(cli.model), data, asdict(self.settings))
        report = {
            name: {"read": r.read, "kept": r.kept, **{what: count for count, what in r.overlap}}
            for name, r in data.report.items()
        }
        index = data.splits.training_index()
        self.overlap = {split: request_overlap(plan.requests, index) for split, plan in plans.items()}
        train = [[[dict(turn) for turn in r.messages], r.reference] for r in data.requests("train")]
        self.measured = [content_hash(train), *(plan.fingerprint for plan in plans.values())]
        return plans["test"], data.report["train"].kept, report

    def run(self) -> Comparison:
        """Make what is missing, and compare."""
        names = list(self.methods)
        self._make([ORIGINAL])
        grid = [PlannedRun(m, rate, self.seeds[0]) for m in names for rate in self.methods[m].rates]
        self._make(grid)
        for _ in range(EXTENSIONS):
            beyond = [run for name in names if (run := self._beyond(name)) is not None]
            if not beyond:
                break
            self._make(beyond)
        chosen = choose_learning_rates(self._found())
        self._make([PlannedRun(m, chosen[m], seed) for seed in self.seeds[1:] for m in names if m in chosen])
        curve = [(seed, m, size) for seed in self.curve_seeds for size in self.sizes for m in names if m in chosen]
        self._make([PlannedRun(m, chosen[m], seed, size) for seed, m, size in curve])
        return self._finish()

    def _beyond(self, name: str) -> PlannedRun | None:
        """The next learning rate where the best so far is at the edge of those tried."""
        tried = [
            run.learning_rate
            for run in self.results
            if run.method == name and run.size is None and run.seed == self.seeds[0] and run.learning_rate is not None
        ]
        best = choose_learning_rates(self._found()).get(name)
        if best is None or len(tried) < 2 or best not in (min(tried), max(tried)):
            return None
        return PlannedRun(name, rounded(best / 3 if best == min(tried) else best * 3), self.seeds[0])

    def _found(self) -> list[RunResult]:
        return [result for results in self.results.values() for result in results]

    # ---------------------------------------------------------------- running

    def _make(self, runs: Iterable[PlannedRun]) -> None:
        """Make runs that aren't there yet, `workers` side by side, while the budget lasts."""
        waiting: list[PlannedRun] = []
        for run in runs:
            named = self._prepare(run)
            if not self._read(run):
                waiting.append(run)
            elif any(result.config_hash != named for result in self.results[run]):
                raise self._other_configuration(run)
        going: dict[PlannedRun, subprocess.Popen[bytes]] = {}
        begun: dict[PlannedRun, float] = {}
        try:
            while waiting or going:
                while waiting and len(going) < self.workers:
                    if not self._affordable(waiting[0], [time.monotonic() - t for t in begun.values()]):
                        self.complete = False
                        waiting.clear()
                        break
                    run = waiting.pop(0)
                    going[run], begun[run] = self._start(run), time.monotonic()
                for run, process in list(going.items()):
                    if process.poll() is not None:
                        del going[run], begun[run]
                        self._end(run, process.returncode)
                time.sleep(0.2 if going else 0)
        finally:
            for process in going.values():
                process.terminate()

    def _affordable(self, run: PlannedRun, going: Sequence[float]) -> bool:
        if self.budget is None:
            return True
        spent = sum(result.wall_seconds for result in self._found()) + sum(going)
        alike = [r.wall_seconds for r in self._found() if r.method == run.method]
        expected = mean(alike) if alike else 0.0
        return spent + expected <= self.budget

    def _folder(self, run: PlannedRun) -> Path:
        return self.output / "runs" / run.name

    def _other_configuration(self, run: PlannedRun) -> ComparisonError:
        return ComparisonError(
            f"{self._folder(run)} holds a run of another configuration: give another --output, or remove it."
        )

    def _prepare(self, run: PlannedRun) -> str:
        """Write a run's plan, or check that the one there is the same.

        Returns:
            The name of its configuration.
        """
        folder = self._folder(run)
        method = self.methods.get(run.method) or next(iter(self.methods.values()))
        factor = 1.0 if run.size is None else min(EPOCHS_CAP, self.rows / run.size)
        config = run_config(method, run, folder, factor)
        named = config_hash(config, self.settings, run.size, self._inputs(method))
        written = yaml.safe_dump(config, sort_keys=False)
        if (found := read_plan(folder)) is not None:
            if found["hash"] != named:
                raise self._other_configuration(run)
            if _text_of(folder / CONFIG) == written:
                return named
        elif (folder / PLAN).exists():
            print(f"{folder / PLAN} is damaged: it is written again.")
        write_text(folder / CONFIG, written)
        content = {
            "run": asdict(run),
            "rows": self.rows if run.size is None else run.size,
            "hash": named,
            "settings": asdict(self.settings),
        }
        write_plan(folder, content)
        return named

    def _inputs(self, method: Method) -> list[str]:
        """Names of the rows, prompts and weights that a method's configuration points to."""
        model = method.config["model"].get("init_args", {}).get("model")
        if model not in self._weights:
            self._weights[model] = weights_hash(model)
        return [*self.measured, self._weights[model]]

    def _start(self, run: PlannedRun) -> subprocess.Popen[bytes]:
        folder = self._folder(run)
        print(f"{run.name} ...", flush=True)
        environment = {**os.environ, VARIABLE: NAMESPACE}
        if self.threads is not None:
            environment["OMP_NUM_THREADS"] = str(self.threads)
        with (folder / "log.txt").open("ab") as log:
            command = [sys.executable, "-m", "lightning_ft.compare.worker", str(folder)]
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)

    def _end(self, run: PlannedRun, code: int) -> None:
        folder = self._folder(run)
        if code != 0 or not self._read(run):
            lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
            raise ComparisonError(
                f"The run {run.name} ended with exit status {code}; the last lines of {folder / 'log.txt'}:\n"
                + "\n".join(lines[-12:])
            )
        for result in self.results[run]:
            print(
                f"{run.name}: {result.method} has {result.validation_quality:.4f} on validation rows, "
                f"{result.wall_seconds:.0f} s",
                flush=True,
            )

    def _read(self, run: PlannedRun) -> bool:
        """Take the results of a run; False where it isn't complete."""
        if (found := read_results(self._folder(run))) is not None:
            self.results[run] = found
        return found is not None

    # ---------------------------------------------------------------- figures

    def _finish(self) -> Comparison:
        savings = self.settings.savings
        prices = savings.get("prices")
        test_set = EvaluationSet(
            requests=tuple(request.messages[-1]["content"] for request in self.plan.requests),
            references=tuple(request.reference for request in self.plan.requests),
            margin=float(savings.get("margin", 0.02)),
            prices=None if prices is None else Prices(**prices),
            metrics=self.metrics,
            in_training=self.overlap["test"].in_training,
            warnings=self._request_warnings(),
        )
        result = compare_methods(self._found(), test_set, complete=self.complete, provenance=self._provenance())
        text = json_text(result.to_dict())
        write_text(self.output / NAME, text + "\n")
        write_report(self.output)
        return result

    def _request_warnings(self) -> tuple[str, ...]:
        """What test and validation requests have in common with the training rows; the verdicts count the former."""
        validation = self.overlap["validation"]
        found = overlap_text(len(validation.in_training), validation.n)
        return (
            *self.overlap["test"].cluster_warnings,
            *([f"Of the validation rows, by which learning rates are chosen, {found}."] if found else ()),
        )

    def _provenance(self) -> dict[str, Any]:
        first = next(iter(self.methods.values()))
        return {
            "model": first.config["model"].get("init_args", {}).get("model"),
            "config": self.config_path,
            "measured": self.plan.fingerprint,
            "baseline": self.plan.baseline_hash,
            "scorer": self.plan.scorer_name,
            "test requests": len(self.plan.requests),
            "rows": self.data_report,
            "seeds": self.seeds,
            "grids": {name: list(method.rates) for name, method in self.methods.items()},
            "side by side": self.workers,
            "threads of a run": self.threads,
            "versions": {name: version(name) for name in ("lightning-ft", "torch", "transformers", "peft")},
        }
