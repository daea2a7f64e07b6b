"""What quality adapters in the top layers keep, and at what compute: the support example for several depths and ranks.

    OMP_NUM_THREADS=1 python benchmarks/frozen_trunk_quality.py --plot docs/images/frozen-trunk.png

Full fine-tuning, LoRA in all layers, and adapters in the top k layers with rank r over kept states, each for the same
number of epochs and with its best of a few learning rates, chosen on validation rows. Operations are those that
ComputeMeter counts, the first pass through the frozen layers included. One seed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from harness import quiet, write_json
from training import silent_trainer

from lightning_ft import ComputeMeter, FullFineTuning, LoRAFineTuning, PairDataModule
from lightning_ft.functional.prompt import PromptBaseline
from lightning_ft.measurement.arms import run_arm
from lightning_ft.measurement.plan import measurement_plan

MODEL, DATA = "examples/tiny_base", Path("examples/support/data")
LAYERS = 4


@dataclass(frozen=True)
class Point:
    """One way to train, and what came of it.

    Args:
        top: Layers with adapters, all of them for ordinary LoRA; None for full fine-tuning.
        rank: Of the adapters.
        learning_rate: The peak.
        validation: Share of validation requests answered right.
        test: Share of test requests.
        flops: Operations of the training.
        trunk_flops: Of them, those of the first pass through frozen layers.
        seconds: Of the training.
    """

    top: int | None
    rank: int | None
    learning_rate: float
    validation: float = 0.0
    test: float = 0.0
    flops: float = 0.0
    trunk_flops: float = 0.0
    seconds: float = 0.0

    @property
    def name(self) -> str:
        if self.top is None:
            return "full"
        return (
            f"LoRA, all {LAYERS} layers, r = {self.rank}" if self.top == LAYERS else f"top {self.top}, r = {self.rank}"
        )


def module_of(point: Point, folder: str) -> Any:
    if point.top is None:
        return FullFineTuning(MODEL, learning_rate=point.learning_rate)
    frozen = {} if point.top == LAYERS else {"top_layers": point.top, "trunk_cache": folder}
    lora = {"r": point.rank, "lora_alpha": 2 * (point.rank or 1)}
    return LoRAFineTuning(MODEL, dtype="float32", lora=lora, learning_rate=point.learning_rate, **frozen)


def measured(point: Point, epochs: int) -> Point:
    """Train as a point says, and answer validation and test requests."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        module = module_of(point, folder)
        data = PairDataModule(
            *(str(DATA / f"{split}.jsonl") for split in ("train", "validation", "test")), batch_size=32, packing=False
        )
        meter = ComputeMeter(output_dir=False, every_n_steps=25)
        meter.reports = False
        trainer = silent_trainer(
            max_epochs=epochs, limit_val_batches=0, gradient_clip_val=1.0, default_root_dir=folder, callbacks=[meter]
        )
        trainer.fit(module, data)
        quality = {}
        for split, most in (("validation", 200), ("test", None)):
            plan = measurement_plan(
                module.tokenizer,
                data.requests(split),
                PromptBaseline.from_file("examples/support/baseline.json"),
                scorer="exact",
                max_new_tokens=12,
                max_requests=most,
            )
            arm = run_arm("tuned", module.model, module.tokenizer, plan, batch_size=128, progress=False)
            quality[split] = arm.quality
        compute = meter.result
        assert compute is not None
        return replace(
            point,
            validation=quality["validation"],
            test=quality["test"],
            flops=compute.flops,
            trunk_flops=float(getattr(module, "trunk_flops", 0)),
            seconds=compute.train_seconds,
        )


def draw(points: list[Point], path: Path) -> None:
    """Quality against compute, both as shares of full fine-tuning's."""
    from lightning_ft.report.blocks import Picture
    from lightning_ft.report.figures.canvas import drawn, legend_below
    from lightning_ft.report.figures.marks import marks

    full = next(point for point in points if point.top is None)
    names = {None: "full", LAYERS: "lora"}
    kinds = {point.top: names.get(point.top, f"adapters in the top {point.top}") for point in points}
    looks = marks(list(kinds.values()))
    labels = {"full": "full fine-tuning", "lora": f"LoRA in all {LAYERS} layers"}

    def paint(axes: Any) -> None:
        for top, kind in kinds.items():
            mine = sorted((p for p in points if p.top == top), key=lambda p: p.rank or 0)
            xs, ys = [p.flops / full.flops for p in mine], [p.test / full.test for p in mine]
            look = looks[kind]
            axes.plot(xs, ys, marker=look.marker, color=look.colour, label=labels.get(kind, kind), markersize=8)
            for point, x, y in zip(mine, xs, ys, strict=True):
                if point.rank is not None:
                    axes.annotate(f"r {point.rank}", (x, y), textcoords="offset points", xytext=(7, -4), fontsize=9)
        axes.axhline(0.95, color="#666666", linestyle="--", linewidth=1)
        axes.annotate("95% of full", (0.02, 0.955), fontsize=9, color="#444444")
        axes.set(xlim=(0, 1.08), ylim=(0, 1.08))
        axes.set(xlabel="operations, to full fine-tuning's", ylabel="quality, to full fine-tuning's")
        legend_below(axes)

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(drawn(Picture("frozen-trunk", "Quality for compute", "", paint)).png)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--tops", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--ranks", type=int, nargs="*", default=[8, 64])
    parser.add_argument("--rates", type=float, nargs="*", default=[2e-3, 6e-3], help="learning rates of adapters")
    parser.add_argument("--json", type=Path, help="write the points here; those that stand there aren't made again")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    wanted = [Point(None, None, rate) for rate in (5e-4,)]  # full's best of docs/results.md
    wanted += [
        Point(top, rank, rate)
        for top, ranks in [(LAYERS, [16]), *((top, options.ranks) for top in options.tops)]
        for rank in ranks
        for rate in options.rates
    ]
    made: list[Point] = []
    if options.json is not None and options.json.exists():
        made = [Point(**point) for point in json.loads(options.json.read_text())]
    for point in wanted:
        if not any((p.top, p.rank, p.learning_rate) == (point.top, point.rank, point.learning_rate) for p in made):
            made.append(measured(point, options.epochs))
            write_json([asdict(p) for p in made], options.json)
        print(next(p for p in made if (p.name, p.learning_rate) == (point.name, point.learning_rate)), flush=True)
    best: dict[str, Point] = {}
    for point in made:
        if point.name not in best or point.validation > best[point.name].validation:
            best[point.name] = point
    full = best["full"]
    print("\n| trained | learning rate | right | of full's | operations, of full's | time, of full's |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, point in best.items():
        shares = point.test / full.test, point.flops / full.flops, point.seconds / full.seconds
        print(
            f"| {name} | {point.learning_rate:g} | {point.test:.1%} | " + " | ".join(f"{s:.3f}" for s in shares) + " |"
        )
    if options.plot is not None:
        draw(list(best.values()), options.plot)


if __name__ == "__main__":
    main()
