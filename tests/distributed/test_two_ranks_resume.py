"""Two ranks, one of which is killed: started again, the run ends as the uninterrupted one does, to the bit."""

import os
import signal

import pytest
import torch
import torch.multiprocessing as mp
from ranks import as_rank, free_port, run_ranks, trainer_options
from resumed_runs import differences, end, make, train

from lightning_ft._lightning import _pl


class Dies(_pl.Callback):
    """Kills its process in the middle of training."""

    def __init__(self, after):
        self.left = after

    def on_before_optimizer_step(self, *args):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def one_rank(rank, method, how, model, folder, port, dies):
    as_rank(rank, port)
    options = {**trainer_options(how, folder), "accumulate_grad_batches": 2 if method == "lora" else 1}
    saver = _pl.callbacks.ModelCheckpoint(folder, save_last=True, every_n_train_steps=1)
    callbacks = [saver, *([Dies(dies)] if dies and rank == 1 else [])]
    module, data = make(method, model, folder, batch_size=2)
    trainer = train(module, data, options, callbacks=callbacks, ckpt_path="last", max_epochs=2)
    found = {n: v.full_tensor() if hasattr(v, "full_tensor") else v for n, v in end(trainer).items()}
    torch.save(found, folder / f"{rank}.pt")


def both(method, how, model, folder, dies=None):
    """What each rank ends with; None where one was killed, after which the other is ended as a launcher does."""
    folder.mkdir(exist_ok=True)
    try:
        run_ranks(one_rank, (method, how, model, folder, free_port(), dies))
    except mp.ProcessExitedException as error:
        if dies is None or error.signal_name != "SIGKILL":
            raise
        return None
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize(
    ("method", "how", "dies"),
    [
        ("lora", "ddp", 4),
        pytest.param("lora", "fsdp", 5, marks=pytest.mark.slow),
        pytest.param("dpo", "ddp", 7, marks=pytest.mark.slow),
        pytest.param("grpo", "ddp", 9, marks=pytest.mark.slow),
    ],
)
def test_killed_rank_resumes(method, how, dies, model_folder, tmp_path):
    whole = both(method, how, model_folder, tmp_path / "whole")
    assert both(method, how, model_folder, tmp_path / "killed", dies) is None
    resumed = both(method, how, model_folder, tmp_path / "killed")
    for rank in (0, 1):
        assert not differences(resumed[rank], whole[rank]), rank
