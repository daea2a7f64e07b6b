r"""Train with an anchor at several weights: quality against forgetting, next to training without one.

    python examples/smollm2/anchor.py legal_citation --rows 400 --coefs 0 1

LoRA as the domain's configuration says, on its first rows. The anchor sees every second of the general texts, and
forgetting is measured on the others. `quality` is the share of right answers to test requests, `kl_general` the
divergence from the base in nats per token, `ppl_ratio` how many times as high the texts' perplexity is. Intervals are
95%. Weight 0 is training without an anchor.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytorch_lightning as L
import torch
import yaml
from policies import domain_plan, quality_and_forgetting

from lightning_ft import LoRAFineTuning, PairDataModule
from lightning_ft.data.texts import load_texts

HERE = Path(__file__).parent


def train(config: dict[str, Any], rows: int, epochs: int, rate: float, seed: int, anchor: object) -> LoRAFineTuning:
    """Train on the first rows of a domain's configuration."""
    L.seed_everything(seed)
    arguments = config["model"]["init_args"] | {"learning_rate": rate, "seed": seed}
    module = LoRAFineTuning(**arguments, **({} if anchor is None else {"anchor": anchor}))
    data = config["data"]["init_args"]
    with TemporaryDirectory() as folder:
        first = Path(folder) / "train.jsonl"
        with Path(data["train"]).open(encoding="utf-8") as lines:
            first.write_text("".join(islice(lines, rows)), encoding="utf-8")
        L.Trainer(
            accelerator="cpu",
            precision=config["trainer"]["precision"],
            gradient_clip_val=config["trainer"]["gradient_clip_val"],
            max_epochs=epochs,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(module, PairDataModule(str(first), batch_size=data["batch_size"]))
    return module


def main() -> None:
    """Train and measure with every weight, and print a line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("domain")
    parser.add_argument("--rows", type=int, default=400, help="number of training rows")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--coefs", type=float, nargs="+", default=[0.0, 0.3, 1.0], help="weights of the anchor")
    parser.add_argument("--texts-per-batch", type=int, default=2, help="texts of the anchor per micro-batch")
    parser.add_argument("--requests", type=int, default=300, help="number of test requests")
    parser.add_argument("--texts", default=str(HERE / "data" / "general" / "texts.jsonl"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = yaml.safe_load((HERE / f"{options.domain}.yaml").read_text(encoding="utf-8"))
    texts = load_texts(options.texts)
    anchored, measured = texts[::2], texts[1::2]
    results: list[dict[str, Any]] = []
    for coef in options.coefs:
        anchor = {"texts": anchored, "coef": coef, "texts_per_batch": options.texts_per_batch} if coef else None
        started = time.perf_counter()
        module = train(config, options.rows, options.epochs, options.rate, options.seed, anchor)
        minutes = (time.perf_counter() - started) / 60
        plan = domain_plan(options.domain, module.tokenizer, max_requests=options.requests)
        results.append({"coef": coef, "minutes": minutes, **quality_and_forgetting(module, plan, texts=measured)})
        print(json.dumps(results[-1]), flush=True)
        if options.output is not None:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
