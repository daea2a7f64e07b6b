"""A run on one or two processes: `python two_ranks.py one|ddp|fsdp full|lora MODEL OUT`; see test_two_ranks.py."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import torch
from ranks import trainer_options
from recording import RecordsGradients, RecordsLosses
from tiny import make_rows

from lightning_ft import ExportModel, FullFineTuning, LoRAFineTuning, PairDataModule, PromptBaseline, TokenSavings
from lightning_ft._lightning import Trainer


class RecordingFull(RecordsGradients, RecordsLosses, FullFineTuning):
    pass


class RecordingLoRA(RecordsGradients, RecordsLosses, LoRAFineTuning):
    pass


def main(strategy, method, model, out):
    torch.set_num_threads(1)
    module = {"full": RecordingFull, "lora": RecordingLoRA}[method](model, learning_rate=1e-2, dtype="float32")
    data = PairDataModule(
        make_rows(20),
        validation=make_rows(7),
        test=make_rows(31)[24:],
        batch_size=4 if strategy == "one" else 2,
        shuffle=False,
        cache_dir=False,
    )
    savings = TokenSavings(
        PromptBaseline(system="Say what it is."),
        scorer=lambda output, reference: 1 / (1 + len(output)),
        max_new_tokens=6,
        batch_size=3,
        output_dir=f"{out}/savings",
        timed_requests=0,
        resamples=200,
    )
    trainer = Trainer(
        **trainer_options(strategy, out),
        accumulate_grad_batches=2,  # 8 rows per step; the last step has 4
        callbacks=[savings, ExportModel(f"{out}/export")],
    )
    trainer.fit(module, data)
    trainer.save_checkpoint(f"{out}/end.ckpt")
    answers = module.generate([row["input"] for row in make_rows(4)], max_new_tokens=8)
    if trainer.is_global_zero:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        torch.save(
            {
                "savings": savings.result.metrics(),
                "steps": module.steps,
                "losses": module.losses,
                "answers": answers,
                "metrics": metrics,
            },
            f"{out}/r.pt",
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
