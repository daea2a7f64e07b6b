"""Two ranks with activation caches in the same folder: `python two_ranks_frozen.py MODEL OUT`."""

import os
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import torch
from ranks import trainer_options
from tiny import make_rows

from lightning_ft import LoRAFineTuning, PairDataModule
from lightning_ft._lightning import Trainer


class SlowToWrite(LoRAFineTuning):
    """Rank 1 writes long after rank 0 has finished its epoch."""

    def on_train_epoch_end(self):
        if self.global_rank == 1:
            time.sleep(1.5)
        super().on_train_epoch_end()


def main(model, out):
    torch.set_num_threads(1)
    torch.manual_seed(1)
    module = SlowToWrite(model, lora={"r": 4}, top_layers=1, activation_cache=f"{out}/states", learning_rate=1e-2)
    trainer = Trainer(**{**trainer_options("ddp", out), "max_epochs": 3})
    trainer.fit(module, PairDataModule(make_rows(24), batch_size=2, cache_dir=False))
    counts = (module._activations.reader.computed, module._activations.reader.read)
    weights = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    torch.save({"counts": counts, "weights": weights}, f"{out}/rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
