"""What the ranks of a sharded model send to each other in training: counted, with the dtypes."""

import torch
from collectives import Collectives
from ranks import as_rank, free_port, run_ranks, trainer_options
from recording import RecordsLosses
from tiny import make_rows

from lightning_ft import FullFineTuning, PairDataModule
from lightning_ft._lightning import Callback, Trainer, _pl

LAYER, EMBEDDINGS, NORM = 9_280, 400 * 32, 32  # weights of a decoder layer, of embeddings or head, of the last norm


class Recording(RecordsLosses, FullFineTuning):
    pass


class PerBatch(Callback):
    """Records the collectives of each micro-batch, up to the end of its backward pass."""

    def __init__(self):
        self.batches, self._mode = [], None

    def on_train_batch_start(self, *args):
        self._mode = Collectives()
        self._mode.__enter__()

    def on_after_backward(self, *args):
        self._mode.__exit__(None, None, None)
        self.batches.append(self._mode.seen)


def one_rank(rank, how, model, folder, port):
    as_rank(rank, port)
    recorder = PerBatch()
    options = trainer_options("one", folder)
    if how == "fsdp":
        options |= {"devices": 2, "strategy": _pl.strategies.ModelParallelStrategy()}
    trainer = Trainer(**options, precision="bf16-mixed", accumulate_grad_batches=3, callbacks=[recorder])
    module = Recording(model, learning_rate=1e-2, dtype="float32", lr_schedule="constant", warmup_ratio=0.0)
    data = PairDataModule(make_rows(24), batch_size=2 if how == "fsdp" else 4, shuffle=False, cache_dir=False)
    trainer.fit(module, data)
    found = {
        "batches": [[tuple(one) for one in batch] for batch in recorder.batches],
        "losses": module.losses,
        "world_size": trainer.world_size,
    }
    torch.save(found, folder / f"{how}{rank}.pt")


def test_fsdp_gathers_in_half_precision_and_reduces_once_per_accumulation_window(model_folder, tmp_path):
    run_ranks(one_rank, ("one", model_folder, tmp_path, free_port()), count=1)
    run_ranks(one_rank, ("fsdp", model_folder, tmp_path, free_port()))
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one0.pt", "fsdp1.pt"))
    assert two["world_size"] == 2
    assert len(two["batches"]) == 6
    for number, batch in enumerate(two["batches"]):
        reduced = [(dtype, numel) for name, dtype, numel in batch if "reduce_scatter" in name]
        gathered = [(dtype, numel) for name, dtype, numel in batch if "allgather" in name]
        last = number % 3 == 2
        sizes = [EMBEDDINGS, EMBEDDINGS, LAYER, LAYER, NORM]  # embeddings and head apart from each other and the norm
        assert sorted(reduced) == sorted((torch.float32, size) for size in sizes) if last else not reduced
        # A layer is gathered for each direction; the embeddings have no use for weights in the backward pass.
        sizes = sorted([EMBEDDINGS, EMBEDDINGS, *[LAYER] * 4, NORM])
        if number:  # the first batch is also run through several paths, to compare them
            assert sorted(numel for _, numel in gathered) == sizes
        assert {dtype for dtype, _ in gathered} == {torch.bfloat16}
    assert len(two["losses"]) == len(one["losses"]) == 2
    for mine, expected in zip(two["losses"], one["losses"], strict=True):
        assert abs(mine - expected) < 2e-2
