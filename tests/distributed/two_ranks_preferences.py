"""Runs on one or two processes: `python two_ranks_preferences.py one|ddp|fsdp MODEL ADAPTER OUT NAMES`."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import torch
from preference_runs import Records, make_labeled, make_pairs
from ranks import trainer_options
from tiny import make_tokenizer
from transformers import AutoModelForCausalLM

from lightning_ft import DPO, KTO, ExportModel, PreferenceDataModule, RewardModeling
from lightning_ft._lightning import Trainer

LORA = {"r": 4, "lora_alpha": 8}


class RecordsSizes(Records):
    def compute_loss(self, batch):
        self.sizes = [*getattr(self, "sizes", []), len(batch)]
        return super().compute_loss(batch)


class RecordingDPO(RecordsSizes, DPO):
    pass


class RecordingKTO(RecordsSizes, KTO):
    pass


class RecordingReward(RecordsSizes, RewardModeling):
    pass


CASES = {
    "dpo full": lambda model, adapter: RecordingDPO(model, learning_rate=1e-3),
    "dpo object": lambda model, adapter: RecordingDPO(
        AutoModelForCausalLM.from_pretrained(model), tokenizer=make_tokenizer(), learning_rate=1e-3
    ),
    "dpo lora": lambda model, adapter: RecordingDPO(model, lora=LORA, learning_rate=3e-3, dtype="float32"),
    "dpo continued": lambda model, adapter: RecordingDPO(adapter, learning_rate=3e-3, dtype="float32"),
    "reward full": lambda model, adapter: RecordingReward(model, learning_rate=1e-3, centering=0.01),
    "reward lora": lambda model, adapter: RecordingReward(model, lora=LORA, learning_rate=3e-3, dtype="float32"),
    "kto": lambda model, adapter: RecordingKTO(model, learning_rate=1e-3),
    "precomputed": lambda model, adapter: RecordingDPO(model, learning_rate=1e-3, precompute_reference=True),
}


def run(strategy, name, model, adapter, out):
    module = CASES[name](model, adapter)
    module._cache_dir = f"{out}/reference"
    rows = make_labeled(28) if name == "kto" else make_pairs(28)
    data = PreferenceDataModule(
        rows[:21],  # steps of 8, 8 and 5: in the last micro-batch one rank has a row, the other none
        validation=rows[21:],
        batch_size=4 if strategy == "one" else 2,
        shuffle=False,
        cache_dir=False,
    )
    trainer = Trainer(
        **trainer_options(strategy, out),
        accumulate_grad_batches=2,
        callbacks=[ExportModel(f"{out}/export")],
    )
    trainer.fit(module, data)
    trainer.save_checkpoint(f"{out}/end.ckpt")
    return {
        "steps": module.steps,
        "losses": module.step_losses,
        "metrics": {key: float(value) for key, value in trainer.callback_metrics.items()},
        "sizes": module.sizes,
    }


def main(strategy, model, adapter, out, names):
    torch.set_num_threads(1)
    for name in names.split(","):
        folder = f"{out}/{name}"
        found = run(strategy, name, model, adapter, folder)
        torch.save(found, f"{folder}/{os.environ.get('LOCAL_RANK', '0')}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
