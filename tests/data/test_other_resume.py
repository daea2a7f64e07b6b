"""Preference and prompt modules resume with the next batch, as pairs do."""

import pytest
import torch
from recorder import BatchRecorder

from lightning_ft._lightning import _pl
from lightning_ft.data.preferences import PreferenceDataModule
from lightning_ft.data.prompts import PromptDataModule


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("stop", [4, 6, 9], ids=["first epoch", "its end", "second epoch"])
@pytest.mark.parametrize("datamodule", [PreferenceDataModule, PromptDataModule])
def test_data_modules_resume_mid_epoch(trainer_options, tokenizer, pairs, tmp_path, datamodule, num_workers, stop):
    """24 rows in batches of 4 are 6 steps per epoch."""
    rows = [{"prompt": p["input"], "chosen": p["output"], "rejected": f"no {n}"} for n, p in enumerate(pairs)]

    def run(steps, checkpoint=None):
        module = BatchRecorder(tokenizer)
        data = datamodule([rows[:10], rows[10:]], mixing=[1.0, 1.0], batch_size=4, num_workers=num_workers, seed=3)
        trainer = _pl.Trainer(**trainer_options, max_steps=steps, max_epochs=-1)
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
        return trainer, [
            batch.rows.tolist() if datamodule is PreferenceDataModule else batch.columns["rejected"]
            for _, batch in module.seen
        ]

    _, whole = run(14)
    first, before = run(stop)
    first.save_checkpoint(tmp_path / "a.ckpt")
    torch.manual_seed(99)  # the global generator has no effect
    _, after = run(14, tmp_path / "a.ckpt")
    assert len(whole) == 14
    assert before + after == whole
