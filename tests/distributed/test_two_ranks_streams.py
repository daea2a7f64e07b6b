"""Two ranks that read a stream take the steps of one process, whichever rows are left out, and resume exactly."""

import itertools

import datasets
import pytest
import torch
from ranks import as_rank, free_port, run_ranks, trainer_options
from recording import RecordsLosses
from resumed_runs import Stops, differences, end, train
from tiny import make_rows

from lightning_ft import FullFineTuning, PairDataModule


class Recording(RecordsLosses, FullFineTuning):
    pass


LONG = {"input": "a " * 300, "output": "b"}


def source(name):
    """Rows of which the ranks keep different numbers: of the last step, rank 1 keeps none."""
    rows = make_rows(14)
    rows[5:5] = [LONG, LONG]
    rows += [LONG]  # 17 rows in steps of 4
    if name == "endless":
        return lambda: itertools.cycle(rows)
    if name == "dataset":
        return datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=3)
    return lambda: iter(rows)


def one_rank(rank, name, strategy, model, folder, port=None, ckpt_path=None, stop=None, num_workers=0):
    as_rank(rank, port)
    module = Recording(model, learning_rate=1e-2, dtype="float32", lr_schedule="constant", warmup_ratio=0)
    data = PairDataModule(
        source(name),
        batch_size=4 if strategy == "one" else 2,
        max_length=64,
        on_overlong="drop",
        shuffle_buffer=6,
        num_workers=num_workers,
        cache_dir=False,
    )
    limits = {"max_steps": 7, "max_epochs": -1} if name == "endless" else {"max_epochs": 2}
    trainer = train(
        module,
        data,
        {**trainer_options(strategy, folder), **limits},
        callbacks=[Stops(stop)] if stop is not None else [],
        accumulate_grad_batches=2,
        ckpt_path=ckpt_path,
        **limits,
    )
    if stop is not None:
        trainer.save_checkpoint(folder / "a.ckpt")
    report = data.report["train"]
    counts = {"read": report.read, "kept": report.kept, "losses": torch.tensor(module.losses)}
    torch.save({"end": end(trainer), "counts": counts}, folder / f"{rank}.pt")


def ranks(name, model, folder, **options):
    folder.mkdir(exist_ok=True)
    run_ranks(one_rank, (name, "ddp", model, folder, free_port(), *options.values()))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", ["finite", "endless"])
def test_two_ranks_take_the_steps_of_one_process(model_folder, tmp_path, name):
    (tmp_path / "one").mkdir()
    one_rank(0, name, "one", model_folder, tmp_path / "one")
    one = torch.load(tmp_path / "one/0.pt", weights_only=True)
    two = ranks(name, model_folder, tmp_path / "two")
    for rank in two:
        assert rank["end"]["steps"] == one["end"]["steps"] == (7 if name == "endless" else 6)
        torch.testing.assert_close(rank["counts"]["losses"], one["counts"]["losses"], rtol=0, atol=1e-5)
        for key, value in one["end"].items():
            torch.testing.assert_close(rank["end"][key], value, rtol=0, atol=1e-4)
    if name == "finite":
        counts = [(rank["counts"]["read"], rank["counts"]["kept"]) for rank in two]
        assert (one["counts"]["read"], one["counts"]["kept"]) == (17, 14)
        assert sum(read for read, _ in counts) == 17
        assert sum(kept for _, kept in counts) == 14


@pytest.mark.parametrize("name", ["finite", "dataset"])
def test_two_ranks_resume_a_stream(model_folder, tmp_path, name):
    """Stopped in an accumulation window of the second epoch."""
    whole = ranks(name, model_folder, tmp_path / "whole")
    ranks(name, model_folder, tmp_path / "stopped", ckpt_path=None, stop=8)
    resumed = ranks(name, model_folder, tmp_path / "resumed", ckpt_path=tmp_path / "stopped/a.ckpt")
    for rank in (0, 1):
        assert not differences(resumed[rank]["end"], whole[rank]["end"]), rank
