"""Compares methods: executes the missing runs within a budget, then writes the result and the report."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import mean

import yaml

from lightning_ft import __version__
from lightning_ft.atomic_files import write_text
from lightning_ft.callbacks.token_savings import TokenSavings
from lightning_ft.cli import FineTuningCLI
from lightning_ft.compare.option_values import integers, parse_duration, split_names
from lightning_ft.compare.plan import (
    EPOCHS_CAP,
    Method,
    PlannedRun,
    Settings,
    checked_config,
    config_hash,
    original_hash,
    planned_methods,
    read_config,
    read_settings,
    round_rate,
    run_config,
    scorer_hashes,
    text_hashes,
    weights_hash,
)
from lightning_ft.compare.processes import LOG, exit_on_sigterm, last_lines, run_environment
from lightning_ft.compare.run_files import CONFIG, EXPORT, PLAN, read_plan, read_results, read_text, write_plan
from lightning_ft.compare.worker import KEEP_MODEL, measurement_plans
from lightning_ft.data.pairs import PairDataModule
from lightning_ft.errors import ComparisonError
from lightning_ft.evaluation.comparison.methods import (
    EvaluationSet,
    choose_learning_rates,
    compare_methods,
    compute_metrics,
)
from lightning_ft.evaluation.comparison.result import Comparison, RunResult
from lightning_ft.evaluation.savings.arms import constant_scores
from lightning_ft.evaluation.savings.gate import overlap_text
from lightning_ft.evaluation.savings.overlap import request_overlap
from lightning_ft.evaluation.savings.plan import MeasurementPlan
from lightning_ft.importing import import_object
from lightning_ft.printable import content_hash, json_text, printable
from lightning_ft.report.write import write_report

EXTENSIONS = 2
"""Largest number of times that a grid is extended because its best learning rate is at its edge."""
FILE_NAME = "comparison.json"
ORIGINAL = PlannedRun("original")


def compare(
    config: str,
    methods: str | list[str],
    output: str,
    learning_rates: dict[str, list[float]] | None = None,
    seeds: str | list[int] = "0,1,2",
    search_rows: int | None = None,
    sizes: str | list[int] | None = None,
    curve_seeds: int | None = None,
    budget: str | None = None,
    metrics: str | None = None,
    evaluations: int = 8,
    validation_requests: int | None = None,
    workers: int = 1,
    threads: int | None = None,
    keep_models: bool = False,
) -> Comparison:
    """Compare methods trained on the same rows: quality, tokens and cost, training compute, and forgetting.

    Each method has its own grid of learning rates. The best one by validation quality, never one at which training
    diverged, is run with every seed and, with `sizes`, on fewer rows. Each run is a process of its own with a folder in
    `output`. Complete runs are not repeated, and a run that was killed resumes from its last checkpoint.

    Args:
        config: Path of a configuration of `lightning-ft fit` with TokenSavings among its callbacks, whose prompt,
            scorer, margin and prices are used for all methods. Several paths, separated by commas, are merged.
        methods: Methods to compare: ``prompted``, ``full``, ``lora``, or paths of YAML files, separated by commas. A
            file without a model or data contains what differs from `config`.
        output: Folder of the runs, the result and the report.
        learning_rates: Learning rates to try for each method; by default 1/3, 1 and 3 times the configured one. If the
            best is at the edge, the grid is extended up to twice.
        search_rows: Number of training rows of the runs that try learning rates, where trying them on all rows would
            take too long; each takes the configured epochs over these rows. All rows by default.
        seeds: Seeds of the runs with the best learning rate. Use at least three: with fewer, differences between
            methods may be chance.
        sizes: Numbers of training rows of a learning curve, such as ``100,500,1000``.
        curve_seeds: Number of seeds that the learning curve is run with; all by default.
        budget: Total duration of all runs, such as ``90m`` or ``2h``; a run that would exceed it isn't started,
            by the mean time of its method's earlier runs, or else of other methods'. The first runs have no such
            estimate, and may exceed it.
        metrics: Import path of a function ``f(outputs, references) -> dict`` that computes metrics of the domain, such
            as ``package.module.function`` or ``path/to/file.py:function``. It is called with the references as answers
            before any run.
        evaluations: Number of measurements on the validation rows during a run.
        validation_requests: Number of validation rows to measure on, drawn with TokenSavings' seed; all by default.
        workers: Number of runs at the same time. With more than one, all are slower and wall times less meaningful.
        threads: Number of threads per run; torch's default if None.
        keep_models: Whether to keep the exported model of each run on all rows, in ``export/`` in its folder. By
            default only its size is measured.

    Returns:
        The comparison, which is also written to ``comparison.json``, next to a report.

    Raises:
        ComparisonError: For methods that can't be compared, for a run that failed, and for training that diverged with
            the chosen learning rate and another seed, or at every learning rate.
    """
    return Comparer(
        config,
        split_names(methods),
        Path(output),
        grids=learning_rates or {},
        seeds=integers("seeds", seeds),
        search_rows=search_rows,
        sizes=integers("sizes", sizes or []),
        curve_seeds=curve_seeds,
        budget=None if budget is None else parse_duration(budget),
        metrics=metrics,
        evaluations=evaluations,
        validation_requests=validation_requests,
        workers=workers,
        threads=threads,
        keep_models=keep_models,
    ).run()


class Comparer:
    """State of one call of :func:`compare`."""

    def __init__(
        self,
        config: str,
        names: Sequence[str],
        output: Path,
        *,
        grids: Mapping[str, Sequence[float]],
        seeds: Sequence[int],
        search_rows: int | None = None,
        sizes: Sequence[int] = (),
        curve_seeds: int | None = None,
        budget: float | None = None,
        metrics: str | None = None,
        evaluations: int = 1,
        validation_requests: int | None = None,
        workers: int = 1,
        threads: int | None = None,
        keep_models: bool = False,
        needs_test: bool = True,
    ) -> None:
        if not seeds or len(set(seeds)) < len(seeds) or workers < 1 or evaluations < 1:
            raise ComparisonError(
                "compare: expected at least one seed, no seed twice, and workers and evaluations of at least 1."
            )
        self.config, self.output, self.budget = read_config(config), output, budget
        self.config_path, self.seeds, self.curve_seeds = config, list(seeds), list(seeds)[:curve_seeds]
        self.workers, self.threads, self.keep_models = workers, threads, keep_models
        self.settings: Settings = read_settings(self.config, config, evaluations, validation_requests)
        self.methods = {m.name: m for m in planned_methods(self.config, config, names, grids)}
        self.metrics = None if metrics is None else import_object(metrics, argument="metrics", error=ComparisonError)
        self.complete = True
        self.results: dict[PlannedRun, list[RunResult]] = {}
        self._weights: dict[Hashable, str] = {}
        self.plan, self.rows, self.data_report = self._check(needs_test=needs_test)
        if self.metrics is not None:  # an error would come after the last run
            references = [request.reference for request in self.plan.requests]
            compute_metrics(self.metrics, references, references)
        self.search_rows = self._check_search_rows(search_rows)
        if too_large := [size for size in sizes if size >= self.rows]:
            print(f"Sizes {too_large} are skipped, since runs on all {self.rows:,} training rows are included anyway.")
        self.sizes = sorted({size for size in sizes if size < self.rows})

    def _check(self, *, needs_test: bool) -> tuple[MeasurementPlan, int, dict[str, dict[str, int]]]:
        """Load rows and prompts before anything is trained.

        Returns:
            The measurement plan of the test rows, the number of training rows, and a report on the rows of each split.

        Raises:
            LightningFTError: For errors of a run that can be found without weights.
        """
        folder = self.output / "runs" / "checked"
        if file := next((str(path) for path in (self.output, *self.output.parents) if path.is_file()), None):
            raise ComparisonError(f"--output {str(self.output)!r}: {file!r} is a file. Choose another folder.")
        folder.mkdir(parents=True, exist_ok=True)
        first = next(iter(self.methods.values()))
        write_text(folder / CONFIG, yaml.safe_dump(checked_config(first, self.config, folder), sort_keys=False))
        cli = FineTuningCLI(["--config", str(folder / CONFIG)], run=False, save_config=False)
        self.options = next(c.options for c in cli.trainer.callbacks if isinstance(c, TokenSavings))
        data: PairDataModule = cli.datamodule
        data.require_rows("lightning-ft compare")
        data.load_rows()
        for split, reason in (
            ("validation", "since choices are made on them"),
            *([("test", "since methods are compared on them")] if needs_test else []),
        ):
            if split not in data.splits.rows:
                share = ", or a share of the training rows (validation: 0.1)" if split == "validation" else ""
                raise ComparisonError(
                    f"{self.config_path!r} has no {split} rows. Add them, {reason}: a file{share} in `data`."
                )
        self.tokenizer = data.share_tokenizer(cli.model)
        self.plans = plans = measurement_plans(self.tokenizer, data, asdict(self.settings))
        report = {
            name: {"read": r.read, "kept": r.kept, **{what: count for count, what in r.overlap}}
            for name, r in data.report.items()
        }
        index = data.splits.training_index()
        assert index is not None  # the training rows were loaded
        self.overlap = {split: request_overlap(plan.requests, index) for split, plan in plans.items()}
        train = [[[dict(turn) for turn in r.messages], r.reference] for r in data.requests("train")]
        plan = plans.get("test", plans["validation"])
        self.data_hashes = [content_hash(train), *(each.fingerprint for each in plans.values())]
        self.data_hashes += scorer_hashes(plan.scorer_name, plan.scorer)
        return plan, data.report["train"].kept, report

    def run(self) -> Comparison:
        """Execute the missing runs, and compare."""
        names = list(self.methods)
        searched = [ORIGINAL, *(self._search_run(m, rate) for m in names for rate in self.methods[m].rates)]
        self.execute(searched, may_diverge=True)
        for _ in range(EXTENSIONS):
            extended = [run for name in names if (run := self._extend_grid(name)) is not None]
            if not extended:
                break
            self.execute(extended, may_diverge=True)
        chosen = choose_learning_rates(self._all_results())
        self._check_converged(chosen)
        self.execute([PlannedRun(m, chosen[m], seed) for seed in self.seeds for m in names if m in chosen])
        curve = [(seed, m, size) for seed in self.curve_seeds for size in self.sizes for m in names if m in chosen]
        self.execute([PlannedRun(m, chosen[m], seed, size) for seed, m, size in curve])
        return self._finish()

    def _check_converged(self, chosen: Mapping[str, float]) -> None:
        """Refuse to go on without a method all of whose learning rates diverged."""
        for name in self.methods.keys() - chosen.keys():
            lost = [result for result in self._all_results() if result.method == name]
            if len(lost) >= len(self.methods[name].rates):
                rates = ", ".join(f"{result.learning_rate:g}" for result in lost)
                raise ComparisonError(
                    f"Training of {name} diverged at every learning rate ({rates}). Pass lower ones: "
                    f"--learning_rates.{name} '[...]'. {lost[-1].diverged}"
                )

    def _check_search_rows(self, count: int | None) -> int | None:
        if count is not None and not 1 <= count <= self.rows:
            raise ComparisonError(
                f"--search_rows {count}: expected a number from 1 to the {self.rows:,} training rows."
            )
        return count

    def _search_run(self, method: str, rate: float) -> PlannedRun:
        """The run that tries a learning rate: one of the final runs if all rows are used, or no other rate is tried."""
        if self.search_rows is None or len(self.methods[method].rates) < 2:
            return PlannedRun(method, rate, self.seeds[0])
        return PlannedRun(method, rate, self.seeds[0], self.search_rows, search=True)

    def _extend_grid(self, name: str) -> PlannedRun | None:
        """Return a run with the next learning rate if the best so far is at the edge of those tried."""
        tried = [
            run.learning_rate
            for run in self.results
            if run.method == name and run.learning_rate is not None and run == self._search_run(name, run.learning_rate)
        ]
        if len(tried) < 2:
            return None
        best = choose_learning_rates(self._all_results()).get(name, min(tried))  # if all diverged, a lower one
        if best not in (min(tried), max(tried)):
            return None
        return self._search_run(name, round_rate(best / 3 if best == min(tried) else best * 3))

    def _all_results(self) -> list[RunResult]:
        return [result for results in self.results.values() for result in results]

    # ---------------------------------------------------------------- runs

    def execute(self, runs: Iterable[PlannedRun], *, may_diverge: bool = False) -> None:
        """Execute the runs without results, `workers` at a time, while the budget lasts.

        Args:
            runs: Runs to execute.
            may_diverge: Whether a run that diverges is a result, as that of a learning rate that is tried.

        Raises:
            ComparisonError: For a run that failed, one of another configuration, and one that diverged.
        """
        waiting: list[PlannedRun] = []
        planned = list(runs)
        for run in planned:
            digest = self._prepare(run)
            if not self._read(run):
                waiting.append(run)
                continue
            if any(result.config_hash != digest for result in self.results[run]):
                raise self._other_configuration(run)
            if self._keeps_model(run) and not (self._folder(run) / EXPORT).exists():
                print(f"The model of {run.name} wasn't kept when it ran. Remove {self._folder(run)} to train it again.")
        running: dict[PlannedRun, subprocess.Popen[bytes]] = {}
        try:
            with exit_on_sigterm():
                self._execute(waiting, running)
        finally:
            for process in running.values():
                process.terminate()
        for run in planned if not may_diverge else ():
            if (reason := next((r.diverged for r in self.results.get(run, []) if r.diverged), None)) is not None:
                raise ComparisonError(
                    f"The run {run.name} diverged. Lower the learning rate of {run.method}: in its configuration, or "
                    f"those of `lightning-ft compare` in --learning_rates. {reason}"
                )

    def _execute(self, waiting: list[PlannedRun], running: dict[PlannedRun, subprocess.Popen[bytes]]) -> None:
        started: dict[PlannedRun, float] = {}
        while waiting or running:
            while waiting and len(running) < self.workers:
                if not self._fits_budget(waiting[0], [time.monotonic() - t for t in started.values()]):
                    self.complete = False
                    print(
                        f"The budget is spent, or too small for the next run, {waiting[0].name}. "
                        "The same command with a larger --budget goes on."
                    )
                    waiting.clear()
                    break
                run = waiting.pop(0)
                running[run], started[run] = self._start(run), time.monotonic()
            for run, process in list(running.items()):
                if process.poll() is not None:
                    del running[run], started[run]
                    self._collect(run, process.returncode)
            time.sleep(0.2 if running else 0)

    def _keeps_model(self, run: PlannedRun) -> bool:
        return self.keep_models and run.learning_rate is not None and run.size is None and not run.search

    def _fits_budget(self, run: PlannedRun, elapsed: Sequence[float]) -> bool:
        if self.budget is None:
            return True
        trained = [r for r in self._all_results() if r.learning_rate is not None and not r.diverged]
        similar = [r.wall_seconds for r in trained if r.method == run.method] or [r.wall_seconds for r in trained]
        expected = mean(similar) if similar and run.learning_rate is not None else 0.0
        return self._spent() + sum(elapsed) + expected <= self.budget

    def _spent(self) -> float:
        return sum(result.wall_seconds for result in self._all_results())

    def _folder(self, run: PlannedRun) -> Path:
        return self.output / "runs" / run.name

    def _other_configuration(self, run: PlannedRun) -> ComparisonError:
        return ComparisonError(
            f"{self._folder(run)} contains a run of another configuration, or the contents of a file that it names "
            "(rows, prompt, texts, weights, scorer) have changed. Choose another --output, or remove the folder."
        )

    def _prepare(self, run: PlannedRun) -> str:
        """Write the plan of a run, or check that an existing one is the same.

        Returns:
            Hash of the run's configuration.
        """
        folder = self._folder(run)
        method = self.methods.get(run.method) or next(iter(self.methods.values()))
        factor = 1.0 if run.size is None or run.search else min(EPOCHS_CAP, self.rows / run.size)
        config = run_config(method, run, folder, factor)
        inputs = self._input_hashes(method)
        if run.learning_rate is None:
            digest = original_hash(config, self.settings, inputs)
        else:
            digest = config_hash(config, self.settings, run.size, [*inputs, *text_hashes(config, self.settings)])
        written = yaml.safe_dump(config, sort_keys=False)
        if (found := read_plan(folder)) is not None:
            if found["hash"] != digest:
                raise self._other_configuration(run)
            if read_text(folder / CONFIG) == written:
                return digest
        elif (folder / PLAN).exists():
            print(f"{folder / PLAN} is damaged, and is written again.")
        write_text(folder / CONFIG, written)
        content = {
            "run": asdict(run),
            "rows": self.rows if run.size is None else run.size,
            "hash": digest,
            "settings": asdict(self.settings),
        }
        write_plan(folder, content)
        return digest

    def _input_hashes(self, method: Method) -> list[str]:
        """Return hashes of the rows, prompts, scorer and weights that a method's configuration refers to."""
        model = method.config["model"].get("init_args", {}).get("model")
        if model not in self._weights:
            self._weights[model] = weights_hash(model)
        return [*self.data_hashes, self._weights[model]]

    def _start(self, run: PlannedRun) -> subprocess.Popen[bytes]:
        folder = self._folder(run)
        print(f"{run.name} ...", flush=True)
        with (folder / LOG).open("ab") as log:
            command = [sys.executable, "-m", "lightning_ft.compare.worker", str(folder)]
            command += [KEEP_MODEL] if self._keeps_model(run) else []
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=run_environment(self.threads))

    def _collect(self, run: PlannedRun, code: int) -> None:
        folder = self._folder(run)
        if code != 0 or not self._read(run):
            raise ComparisonError(f"The run {run.name} ended with exit status {code}. {last_lines(folder)}")
        for result in self.results[run]:
            if result.diverged:
                print(f"{run.name}: {result.method} diverged. {result.diverged}", flush=True)
                continue
            print(
                f"{run.name}: {result.method} reached quality {result.validation_quality:.4f} on validation rows in "
                f"{result.wall_seconds:.0f} s",
                flush=True,
            )
        if self.budget is not None and self._spent() > self.budget:
            print(
                f"The runs took {self._spent():.0f} s, more than the --budget of {self.budget:.0f} s: how long the "
                "first run of a method takes isn't known before it."
            )

    def _read(self, run: PlannedRun) -> bool:
        """Read the results of a run; return whether it is complete."""
        if (found := read_results(self._folder(run))) is not None:
            self.results[run] = found
        return found is not None

    # ---------------------------------------------------------------- result

    def _finish(self) -> Comparison:
        test_set = EvaluationSet(
            requests=tuple(request.messages[-1]["content"] for request in self.plan.requests),
            references=tuple(request.reference for request in self.plan.requests),
            margin=self.options["margin"],
            prices=self.options["prices"],
            metrics=self.metrics,
            in_training=self.overlap["test"].in_training,
            warnings=self._request_warnings(),
            constant=constant_scores(self.plan),
            min_quality=self.options["min_quality"],
        )
        result = compare_methods(
            self._all_results(),
            test_set,
            complete=self.complete,
            provenance=self._provenance(),
            resamples=self.options["resamples"],
            seed=self.options["seed"],
        )
        write_text(self.output / FILE_NAME, json_text(result.to_dict()) + "\n")
        print(printable(f"Report written: {write_report(self.output)[0]}"))
        return result

    def _request_warnings(self) -> tuple[str, ...]:
        """Warn about clusters of the test set and requests of the validation set that are among the training rows.

        Test requests among the training rows are counted in the verdicts.
        """
        validation = self.overlap["validation"]
        overlap = overlap_text(len(validation.in_training), validation.n)
        return (
            *self.overlap["test"].cluster_warnings,
            *([f"Of the validation rows, on which learning rates are chosen, {overlap}."] if overlap else ()),
        )

    def _provenance(self) -> dict[str, object]:
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
            "versions": {
                "lightning-ft": __version__,
                **{name: version(name) for name in ("torch", "transformers", "peft")},
            },
        }
