"""A run that is stopped within an epoch resumes with the next batch."""

import pytest
import torch
from recorder import Recorder

from lightning_ft._lightning import _pl
from lightning_ft.data.pairs import PairDataModule


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("stop", [3, 6, 9, 12], ids=["first epoch", "its end", "second epoch", "its end too"])
def test_data_modules_resume_mid_epoch(trainer_options, tokenizer, pairs, tmp_path, num_workers, stop):
    """24 rows in batches of 4 are 6 steps per epoch."""

    def run(steps, checkpoint=None):
        module = Recorder(tokenizer)
        data = PairDataModule(
            [pairs[:10], pairs[10:]], mixing=[1.0, 1.0], batch_size=4, num_workers=num_workers, seed=3
        )
        trainer = _pl.Trainer(**trainer_options, max_steps=steps, max_epochs=-1)
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
        return trainer, module.seen

    _, whole = run(15)
    first, before = run(stop)
    first.save_checkpoint(tmp_path / "a.ckpt")
    torch.manual_seed(99)  # the global generator has no effect
    _, after = run(15, tmp_path / "a.ckpt")
    # A Trainer that was stopped by max_steps counts the epoch as run, so its numbers differ; the batches don't.
    assert [seen[1:] for seen in before + after] == [seen[1:] for seen in whole]


def test_checkpoint_of_a_callback_resumes_mid_epoch(trainer_options, tokenizer, pairs, tmp_path):
    """Checkpoints are written by ModelCheckpoint during the epoch, with validation within it."""

    def run(checkpoint=None, **options):
        module = Recorder(tokenizer)
        data = PairDataModule(pairs, 0.25, batch_size=3, seed=1)
        trainer = _pl.Trainer(
            **{**trainer_options, "enable_checkpointing": True, "num_sanity_val_steps": 0},
            max_epochs=3,
            val_check_interval=2,
            callbacks=_pl.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1),
            **options,
        )
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
        return [seen for seen in module.seen if seen[0] != "validation"]

    whole = run()
    assert len(whole) == 18
    for step in (4, 8, 12):  # in the first epoch, in the second, and at its end
        assert run(tmp_path / f"step={step}.ckpt") == whole[step:]
