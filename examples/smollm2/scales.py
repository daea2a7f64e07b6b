r"""Scale what training changed in an exported model: quality against forgetting, without further training.

    python examples/smollm2/scales.py legal_citation runs/results/legal_citation/runs/lora/lr0.002-seed0/export

`quality` is the share of right answers to test requests. `kl_general` is the divergence from the base on general texts,
in nats per token, and `ppl_ratio` how many times as high their perplexity is. Intervals are 95%. Scale 1 is the trained
model, 0 the base; see `lightning_ft.models.update_scale`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from policies import domain_plan, quality_and_forgetting
from transformers import AutoModelForCausalLM

from lightning_ft import FullFineTuning, LoRAFineTuning
from lightning_ft.models.update_scale import UpdateScale, copy_weights

HERE = Path(__file__).parent
BASE = str(HERE / "model")


def load(folder: str) -> tuple[Any, Any, UpdateScale]:
    """Load an exported adapter or model; returns its module, its base, and the scale of what training changed."""
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    adapter = (Path(folder) / "adapter_config.json").exists()
    module = (LoRAFineTuning if adapter else FullFineTuning)(folder, dtype="float32")
    module.configure_model()
    module.eval()
    return module, base, UpdateScale(module.model, copy_weights(base))


def main() -> None:
    """Measure every scale and print a line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("domain")
    parser.add_argument("model", help="folder of an exported adapter or model")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 0.85, 0.7, 0.55, 0.4])
    parser.add_argument("--requests", type=int, help="number of test requests, instead of all")
    parser.add_argument("--texts", default=str(HERE / "data" / "general" / "texts.jsonl"))
    parser.add_argument("--max-texts", type=int, help="number of general texts, instead of all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    module, base, update = load(options.model)
    plan = domain_plan(options.domain, module.tokenizer, max_requests=options.requests)
    results: list[dict[str, Any]] = []
    for scale in options.scales:
        update.set(scale)
        found = quality_and_forgetting(module, plan, texts=options.texts, max_texts=options.max_texts, original=base)
        results.append({"scale": scale, **found})
        print(json.dumps(results[-1]), flush=True)
        if options.output is not None:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
