r"""Make preference pairs from a model's own mistakes: `python examples/smollm2/legal_preferences.py MODEL OUTPUT`.

The model of `legal_citation.yaml` answers training and validation requests several times, at temperature 1. A wrong
answer makes a pair with the right citation; a request that is always answered right makes none.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from policies import load, sample

from lightning_ft import PairDataModule
from lightning_ft.evaluation.savings.plan import answer_plan

HERE = Path(__file__).parent
DATA = HERE / "data" / "legal_citation"


def main() -> None:
    """Write `train.jsonl`, `validation.jsonl` and the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="exported adapter of the supervised model")
    parser.add_argument("output", type=Path, help="folder of the pairs")
    parser.add_argument("--requests", type=int, nargs=2, default=[800, 200], metavar=("TRAIN", "VALIDATION"))
    parser.add_argument("--samples", type=int, default=2, help="number of answers to each request")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    module = load(options.model)
    sources = {split: str(DATA / f"{split}.jsonl") for split in ("train", "validation")}
    data = PairDataModule(train=sources["train"], validation=sources["validation"], tokenizer=module.tokenizer)
    data.load_rows()
    options.output.mkdir(parents=True, exist_ok=True)
    for split, count in zip(sources, options.requests, strict=True):
        requests = data.requests(split)
        chosen = random.Random(0).sample(requests, min(count, len(requests)))
        plan = answer_plan(module.tokenizer, chosen, max_new_tokens=48)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            answers = sample(module, [list(prompt) for prompt in plan.bare.prompts], plan, options.samples)
        texts = module.tokenizer.batch_decode([list(a.tokens) for a in answers], skip_special_tokens=True)
        pairs = []
        for number, request in enumerate(chosen):
            own = texts[number * options.samples : (number + 1) * options.samples]
            for wrong in sorted({text.strip() for text in own} - {request.reference, ""}):
                prompt = request.messages[-1]["content"]
                pairs.append({"prompt": prompt, "chosen": request.reference, "rejected": wrong})
        with (options.output / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(pair) + "\n" for pair in pairs)
        print(f"{split}: {len(pairs)} pairs of {len(chosen)} requests")


if __name__ == "__main__":
    main()
