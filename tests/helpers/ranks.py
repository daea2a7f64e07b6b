"""Two processes on this machine, as ranks of one run."""

import os
import socket
import time
import warnings

import pytest
import torch
import torch.multiprocessing as mp

from lightning_ft._lightning import _pl

_STRATEGIES = {
    "one": lambda: "auto",
    "ddp": lambda: _pl.strategies.DDPStrategy(process_group_backend="gloo"),
    "fsdp": lambda: _pl.strategies.ModelParallelStrategy(
        data_parallel_size=2,
        tensor_parallel_size=1,
        save_distributed_checkpoint=False,
        process_group_backend="gloo",
    ),
    "folders": lambda: _pl.strategies.ModelParallelStrategy(),
}


def trainer_options(how, folder):
    """Arguments of a quiet Trainer on one process (`one`), or on two by DDP or FSDP2 (`ddp`, `fsdp`, and `folders`).

    FSDP2 writes checkpoints to a file each, or with its defaults to folders.
    """
    return {
        "accelerator": "cpu",
        "devices": 1 if how == "one" else 2,
        "strategy": _STRATEGIES[how](),
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "default_root_dir": str(folder),
    }


def as_rank(rank, port=None):
    """Use one thread; with a port, also set up the environment of a rank that was launched externally."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if port is not None:
        os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_ranks(function, args, count=2, limit=240):
    """Call `function(rank, *args)` in forked processes, and wait for all of them, `limit` seconds at most."""
    running = mp.start_processes(function, args, nprocs=count, join=False, start_method="fork")
    end = time.monotonic() + limit
    while not running.join(timeout=max(0.0, end - time.monotonic())):
        if time.monotonic() > end:
            for process in running.processes:
                process.kill()
            pytest.fail(f"{function.__name__}{args} had not ended after {limit} seconds")
