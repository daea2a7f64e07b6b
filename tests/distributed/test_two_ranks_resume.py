"""A run of two ranks, one of which is killed, resumes to exactly the weights of the uninterrupted run."""

import os
import signal

import pytest
import torch
import torch.multiprocessing as mp
from ranks import as_rank, free_port, run_ranks, trainer_options
from resumed_runs import differences, end, make, train

from lightning_ft._lightning import _pl


class KillsProcess(_pl.Callback):
    """Kills its process during training."""

    def __init__(self, after):
        self.remaining = after

    def on_before_optimizer_step(self, *args):
        self.remaining -= 1
        if self.remaining == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def one_rank(rank, method, strategy, model, folder, port, killed_at):
    as_rank(rank, port)
    options = {**trainer_options(strategy, folder), "accumulate_grad_batches": 2 if method == "lora" else 1}
    checkpointing = _pl.callbacks.ModelCheckpoint(folder, save_last=True, every_n_train_steps=1)
    callbacks = [checkpointing, *([KillsProcess(killed_at)] if killed_at and rank == 1 else [])]
    module, data = make(method, model, folder, batch_size=2)
    trainer = train(module, data, options, callbacks=callbacks, ckpt_path="last", max_epochs=2)
    found = {n: v.full_tensor() if hasattr(v, "full_tensor") else v for n, v in end(trainer).items()}
    torch.save(found, folder / f"{rank}.pt")


def both(method, strategy, model, folder, killed_at=None):
    """Final weights of each rank; None if a rank was killed, after which the other is terminated as a launcher does."""
    folder.mkdir(exist_ok=True)
    try:
        run_ranks(one_rank, (method, strategy, model, folder, free_port(), killed_at))
    except mp.ProcessExitedException as error:
        if killed_at is None or error.signal_name != "SIGKILL":
            raise
        return None
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize(
    ("method", "strategy", "killed_at"),
    [
        ("lora", "ddp", 4),
        pytest.param("lora", "fsdp", 5, marks=pytest.mark.slow),
        pytest.param("full", "folders", 5, marks=pytest.mark.slow),
        pytest.param("dpo", "ddp", 7, marks=pytest.mark.slow),
        pytest.param("grpo", "ddp", 9, marks=pytest.mark.slow),
    ],
)
def test_run_with_a_killed_rank_resumes(method, strategy, killed_at, model_folder, tmp_path):
    uninterrupted = both(method, strategy, model_folder, tmp_path / "uninterrupted")
    assert both(method, strategy, model_folder, tmp_path / "killed", killed_at) is None
    resumed = both(method, strategy, model_folder, tmp_path / "killed")
    for rank in (0, 1):
        assert not differences(resumed[rank], uninterrupted[rank]), rank
