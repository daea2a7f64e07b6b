"""Quality against compute of adapters in the top layers only, at several depths and ranks.

    OMP_NUM_THREADS=1 python benchmarks/activation_cache_quality.py --plot docs/images/activation-cache.png
    make smollm2 && python benchmarks/activation_cache_quality.py --task legal_citation --tops 30 15 8 4 2 --rates 1e-3

Full fine-tuning, LoRA in all layers, and adapters of rank r in the top k layers over cached activations, each for the
same number of epochs and at the best of a few learning rates, chosen on validation rows with the first seed. Operations
are those that ComputeMeter counts, including the first pass through the frozen layers.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from harness import quiet, write_json
from training import silent_trainer
from transformers import AutoConfig

from lightning_ft import ComputeMeter, FullFineTuning, LoRAFineTuning, PairDataModule
from lightning_ft.evaluation.savings.arms import run_arm
from lightning_ft.evaluation.savings.plan import answer_plan

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Task:
    """What is trained, and how its answers are graded.

    Args:
        model: Folder of the base model.
        data: Folder of the rows.
        scorer: Scorer of the answers.
        max_new_tokens: Maximum number of tokens per answer.
        batch_size: Rows per optimizer step.
        full_rate: Learning rate of full fine-tuning: the best that `lightning-ft compare` found.
        rows: Number of training rows, the file's first; None for all.
        requests: Maximum numbers of requests answered, by split.
        trainer: Further arguments of the Trainer.
    """

    model: str
    data: Path
    scorer: str
    max_new_tokens: int
    batch_size: int
    full_rate: float
    rows: int | None = None
    requests: Mapping[str, int] = field(default_factory=dict)
    trainer: Mapping[str, Any] = field(default_factory=dict)

    @property
    def layers(self) -> int:
        """Number of the base's layers."""
        return int(AutoConfig.from_pretrained(self.model).num_hidden_layers)

    def datamodule(self, folder: Path) -> PairDataModule:
        """The rows, with the first of the training rows copied to `folder` if not all are trained on."""
        files = {split: self.data / f"{split}.jsonl" for split in SPLITS}
        if self.rows is not None:
            with files["train"].open(encoding="utf-8") as lines:
                (folder / "train.jsonl").write_text("".join(islice(lines, self.rows)), encoding="utf-8")
            files["train"] = folder / "train.jsonl"
        return PairDataModule(
            **{split: str(file) for split, file in files.items()}, batch_size=self.batch_size, packing=False
        )


TASKS = {
    "support": Task(
        model="examples/tiny_base",
        data=Path("examples/support/data"),
        scorer="exact",
        max_new_tokens=12,
        batch_size=32,
        full_rate=5e-4,
        requests={"validation": 200},
    ),
    "legal_citation": Task(
        model="examples/smollm2/model",
        data=Path("examples/smollm2/data/legal_citation"),
        scorer="examples/smollm2/legal_citation.py:score",
        max_new_tokens=48,
        batch_size=8,
        full_rate=1.5e-4,
        rows=600,
        requests={"validation": 100, "test": 400},
        trainer={"precision": "bf16-mixed"},
    ),
}


@dataclass(frozen=True)
class Point:
    """A training configuration and its results.

    Args:
        top: Number of top layers with adapters, all layers for ordinary LoRA; None for full fine-tuning.
        rank: Rank of the adapters; None for full fine-tuning.
        learning_rate: Learning rate at the peak of the schedule.
        seed: Seed of the row order and of the adapters' initial weights.
        validation: Share of validation requests that are answered correctly.
        test: Share of test requests that are answered correctly.
        flops: Operations of the training.
        frozen_flops: Operations of the first pass through the frozen layers, which `flops` includes.
        seconds: Duration of the training, in seconds.
    """

    top: int | None
    rank: int | None
    learning_rate: float
    seed: int = 0
    validation: float = 0.0
    test: float = 0.0
    flops: float = 0.0
    frozen_flops: float = 0.0
    seconds: float = 0.0

    @property
    def key(self) -> tuple[Any, ...]:
        """The configuration, without the results."""
        return self.top, self.rank, self.learning_rate, self.seed

    def label(self, layers: int) -> str:
        """The configuration in words, for a base of `layers` layers."""
        if self.top is None:
            return "all weights"
        where = f"all {layers} layers" if self.top == layers else f"top {self.top} layers"
        return f"LoRA, {where}, r = {self.rank}"


def module_of(task: Task, point: Point, folder: str) -> Any:
    if point.top is None:
        return FullFineTuning(task.model, learning_rate=point.learning_rate)
    frozen = {} if point.top == task.layers else {"top_layers": point.top, "activation_cache": folder}
    lora = {"r": point.rank, "lora_alpha": 2 * (point.rank or 1)}
    return LoRAFineTuning(task.model, dtype="float32", lora=lora, learning_rate=point.learning_rate, **frozen)


def measured(task: Task, point: Point, epochs: int) -> Point:
    """Train with a point's configuration, and measure quality on validation and test requests."""
    torch.manual_seed(point.seed)
    with tempfile.TemporaryDirectory() as folder:
        module = module_of(task, point, folder)
        data = task.datamodule(Path(folder))
        data.reorder(point.seed)
        meter = ComputeMeter(output_dir=False, every_n_steps=25)
        meter.reports = False
        options = {"max_epochs": epochs, "limit_val_batches": 0, "gradient_clip_val": 1.0, **task.trainer}
        trainer = silent_trainer(**options, default_root_dir=folder, callbacks=[meter])
        trainer.fit(module, data)
        quality = {}
        for split in ("validation", "test"):
            plan = answer_plan(
                module.tokenizer,
                data.requests(split),
                scorer=task.scorer,
                max_new_tokens=task.max_new_tokens,
                max_requests=task.requests.get(split),
            )
            with trainer.precision_plugin.forward_context():
                arm = run_arm(
                    "tuned", module.model, module.tokenizer, plan, timed_requests=0, batch_size=128, progress=False
                )
            quality[split] = arm.quality
        compute = meter.result
        assert compute is not None
        return replace(
            point,
            validation=quality["validation"],
            test=quality["test"],
            flops=compute.flops,
            frozen_flops=float(getattr(module, "frozen_flops", 0)),
            seconds=compute.train_seconds,
        )


@dataclass(frozen=True)
class Summary:
    """A configuration at its best learning rate, over the seeds.

    Args:
        runs: One run per seed.
    """

    runs: list[Point]

    def mean(self, metric: str) -> float:
        """Mean over the seeds of a field of the runs."""
        return fmean(getattr(run, metric) for run in self.runs)

    @property
    def first(self) -> Point:
        """The run of the first seed."""
        return self.runs[0]

    def row(self, full: Summary, layers: int) -> str:
        """The table's row, with metrics relative to full fine-tuning."""
        tests = [run.test for run in self.runs]
        correct = f"{self.mean('test'):.1%}" + (f" ({min(tests):.1%} to {max(tests):.1%})" if len(tests) > 1 else "")
        shares = [f"{self.mean(metric) / full.mean(metric):.3f}" for metric in ("test", "flops", "seconds")]
        return f"| {self.first.label(layers)} | {self.first.learning_rate:g} | {correct} | " + " | ".join(shares) + " |"


def draw(summaries: list[Summary], full: Summary, layers: int, path: Path) -> None:
    """Plot quality against compute, both relative to full fine-tuning."""
    from lightning_ft.document.blocks import Plot
    from lightning_ft.document.plotting import add_legend_below, marker_styles, render_plot

    names = {None: "full", layers: "lora"}
    tops = {summary.first.top for summary in summaries}
    methods = {top: names.get(top, f"adapters in the top {top}") for top in sorted(tops, key=lambda top: top or 0)}
    styles = marker_styles(list(methods.values()))
    labels = {"full": "full fine-tuning", "lora": f"LoRA in all {layers} layers"}
    scale = full.mean("test")
    offsets = {layers: (0, 9), layers - 1: (0, -18)}  # of labels whose points are close together

    def paint(axes: Any) -> None:
        for top, method in methods.items():
            mine = sorted((s for s in summaries if s.first.top == top), key=lambda s: s.first.rank or 0)
            xs = [summary.mean("flops") / full.mean("flops") for summary in mine]
            ys = [summary.mean("test") / scale for summary in mine]
            ends = [[run.test / scale for run in summary.runs] for summary in mine]
            reach = [
                [y - min(end) for y, end in zip(ys, ends, strict=True)],
                [max(end) - y for y, end in zip(ys, ends, strict=True)],
            ]
            marker_style = styles[method]
            style = {"marker": marker_style.marker, "color": marker_style.color, "markersize": 7, "capsize": 3}
            axes.errorbar(xs, ys, yerr=reach, label=labels.get(method, method), **style)
            for summary, x, y in zip(mine, xs, ys, strict=True):
                if summary.first.rank is not None:
                    text_style = {"xytext": offsets.get(top, (9, -4)), "ha": "left" if top not in offsets else "center"}
                    axes.annotate(
                        f"r {summary.first.rank}", (x, y), textcoords="offset points", fontsize=8, **text_style
                    )
        axes.axhline(0.95, color="#666666", linestyle="--", linewidth=1)
        axes.annotate("95% of full", (0.02, 0.955), fontsize=9, color="#444444")
        axes.set(xlim=(0, 1.08 * max(s.mean("flops") for s in summaries) / full.mean("flops")), ylim=(0, 1.12))
        axes.set(xlabel="operations, relative to full fine-tuning", ylabel="quality, relative to full fine-tuning")
        add_legend_below(axes)

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(render_plot(Plot("activation-cache", "Quality for compute", "", paint)).png)


class Runs:
    """Finished runs, kept in a file.

    Args:
        task: Task of all runs.
        epochs: Number of epochs per run.
        path: File of finished runs, which aren't run again; None to keep them in memory only.
    """

    def __init__(self, task: Task, epochs: int, path: Path | None) -> None:
        self._task, self._epochs, self._path = task, epochs, path
        found = json.loads(path.read_text()) if path is not None and path.exists() else []
        self._finished = {point.key: point for point in (Point(**values) for values in found)}

    def of(self, point: Point) -> Point:
        """The finished run of a configuration, trained now unless the file has it."""
        if point.key not in self._finished:
            self._finished[point.key] = measured(self._task, point, self._epochs)
            write_json([asdict(finished) for finished in self._finished.values()], self._path)
        print(self._finished[point.key], flush=True)
        return self._finished[point.key]

    def over_seeds(self, candidates: list[Point], seeds: list[int]) -> Summary:
        """Runs with all seeds of the candidate that is best on validation rows with the first seed."""
        best = max((self.of(replace(point, seed=seeds[0])) for point in candidates), key=lambda point: point.validation)
        return Summary([best, *(self.of(Point(best.top, best.rank, best.learning_rate, seed)) for seed in seeds[1:])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="support", help="model and rows")
    parser.add_argument("--epochs", type=int, default=3, help="epochs per run")
    parser.add_argument("--tops", type=int, nargs="*", help="numbers of top layers with adapters; all by default")
    parser.add_argument("--ranks", type=int, nargs="*", default=[8, 16, 64], help="ranks of the adapters")
    parser.add_argument("--rates", type=float, nargs="*", default=[2e-3, 6e-3], help="learning rates of adapters")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="seeds per configuration")
    parser.add_argument("--rows", type=int, help="number of training rows, instead of the task's")
    parser.add_argument("--json", type=Path, help="file of finished runs; runs that it contains are not repeated")
    parser.add_argument("--plot", type=Path, help="write the plot to this PNG file")
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    task = TASKS[options.task] if options.rows is None else replace(TASKS[options.task], rows=options.rows)
    runs = Runs(task, options.epochs, options.json)
    full = runs.over_seeds([Point(None, None, task.full_rate)], options.seeds)
    summaries = [full] + [
        runs.over_seeds([Point(top, rank, rate) for rate in options.rates], options.seeds)
        for rank in options.ranks
        for top in options.tops or range(task.layers, 0, -1)
    ]
    print("\n| trained | learning rate | correct | relative to full | operations, relative | time, relative |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    print("\n".join(summary.row(full, task.layers) for summary in summaries))
    if options.plot is not None:
        draw(summaries, full, task.layers, options.plot)


if __name__ == "__main__":
    main()
