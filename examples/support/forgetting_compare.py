"""Ways to forget less, on the support example: quality against forgetting, in one plot.

    python examples/support/forgetting_compare.py

Plain LoRA, lower learning rates, the scale of the trained update (no further training), an anchor during training, and
distillation of the prompt. Quality is the share of right answers to the 600 test requests. Forgetting is the KL
divergence from the base on general texts that no anchor saw.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytorch_lightning as L
import torch

from lightning_ft import LoRAFineTuning, PairDataModule, PromptBaseline, PromptDataModule, PromptDistillation
from lightning_ft.data.texts import load_texts
from lightning_ft.evaluation.retention.measurement import measure_retention
from lightning_ft.evaluation.savings.arms import run_arm
from lightning_ft.evaluation.savings.plan import answer_plan
from lightning_ft.models.update_scale import UpdateScale

FOLDER = Path(__file__).parent
BASE = str(FOLDER.parent / "tiny_base")
DATA = FOLDER / "data"
RATE = 2e-3
SCALES = (0.4, 0.55, 0.7, 0.85)
COEFS = (0.3, 1.0, 3.0)
MAX_NEW_TOKENS = 12
MARKERS = {"lora": "o", "lower rate": "v", "scale": ".", "anchor": "s", "distillation": "D"}


def fit(module: Any, data: Any, seed: int) -> None:
    """Train for three epochs."""
    L.seed_everything(seed)
    L.Trainer(
        accelerator="cpu",
        max_epochs=3,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, data)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Draw a point per run, and a line through the scales of each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for seed in sorted({r["seed"] for r in results}):
        line = [r for r in results if r["seed"] == seed and r["method"] in ("lora", "scale")]
        line.sort(key=lambda r: r["kl"])
        axes.plot([r["kl"] for r in line], [r["quality"] for r in line], color="#888888", linewidth=1)
    for number, (method, marker) in enumerate(MARKERS.items()):
        points = [r for r in results if r["method"] == method]
        if points:
            axes.scatter(
                [r["kl"] for r in points], [r["quality"] for r in points], marker=marker, label=method, c=f"C{number}"
            )
    axes.set_xlim(left=0)
    axes.set_xlabel("forgotten: KL on general text (nats per token), lower is better")
    axes.set_ylabel("share of right answers")
    axes.set_title("Quality against forgetting")
    axes.legend()
    figure.savefig(path)


def main() -> None:
    """Run every method with every seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/forgetting_compare"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    texts = load_texts(str(FOLDER.parent / "tiny_base" / "general.jsonl"))
    anchored, measured = texts[::2], texts[1::2]
    base = LoRAFineTuning(BASE, dtype="float32")
    rows = PairDataModule(train=str(DATA / "train.jsonl"), test=str(DATA / "test.jsonl"), tokenizer=base.tokenizer)
    rows.load_rows()
    plan = answer_plan(base.tokenizer, rows.requests("test"), scorer="exact", max_new_tokens=MAX_NEW_TOKENS)
    results: list[dict[str, Any]] = []

    def record(method: str, seed: int, setting: float, module: Any) -> None:
        arm = run_arm("tuned", module.model, module.tokenizer, plan, timed_requests=0, batch_size=128, progress=False)
        kept = measure_retention(module.model, module.tokenizer, texts=measured, progress=False)
        found = {
            "method": method,
            "seed": seed,
            "setting": setting,
            "quality": arm.quality,
            "kl": kept.kl_general.value,
        }
        results.append(found)
        print(json.dumps(found), flush=True)
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        draw(results, options.output / "forgetting.png")

    def supervised(seed: int, rate: float = RATE, **more: Any) -> LoRAFineTuning:
        module = LoRAFineTuning(BASE, dtype="float32", learning_rate=rate, seed=seed, **more)
        fit(module, PairDataModule(str(DATA / "train.jsonl"), batch_size=32), seed)
        return module

    for seed in options.seeds:
        plain = supervised(seed)
        record("lora", seed, 1.0, plain)
        update = UpdateScale(plain.model)
        for scale in SCALES:
            update.set(scale)
            record("scale", seed, scale, plain)
        for rate in (RATE / 2, RATE / 4):
            record("lower rate", seed, rate, supervised(seed, rate))
        for coef in COEFS:
            anchor = {"texts": anchored, "coef": coef, "texts_per_batch": 2}
            record("anchor", seed, coef, supervised(seed, anchor=anchor))
        distilled = PromptDistillation(
            BASE,
            prompt=PromptBaseline.from_file(FOLDER / "baseline.json"),
            lora=True,
            dtype="float32",
            learning_rate=RATE,
            temperature=0.0,
            max_new_tokens=MAX_NEW_TOKENS,
            seed=seed,
        )
        fit(distilled, PromptDataModule(str(DATA / "train.jsonl"), batch_size=32), seed)
        record("distillation", seed, 1.0, distilled)


if __name__ == "__main__":
    main()
