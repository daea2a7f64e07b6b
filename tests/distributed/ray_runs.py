"""Runs of examples/cluster/ray_train.py: `python ray_runs.py plain|ray CONFIG`; see test_ray.py."""

import json
import os
import signal
import sys
import tempfile
from pathlib import Path

import ray
import ray_train
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_ft import ExportModel

own_worker = ray_train.train_worker  # by reference: in a worker's process, the module has the example's


def plain(config):
    """Train the same on two ranks of Lightning, without Ray."""
    trainer = ray_train.L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ray_train.L.strategies.DDPStrategy(process_group_backend="gloo"),
        max_epochs=config["max_epochs"],
        callbacks=[ExportModel(config["output"], overwrite=True)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        logger=False,
    )
    trainer.fit(*ray_train.make_run(config))


def watched_worker(config):
    """Train as the example does; note each optimizer step of rank 0, and kill rank 1 once, before one of its steps."""
    torch.set_num_threads(1)
    rank = ray.train.get_context().get_world_rank()
    notes = Path(config["notes"])
    killed, steps = notes / "killed", 0

    def before_step(*args):
        nonlocal steps
        steps += 1
        if rank == 1 and steps == config["killed_at"] and not killed.exists():
            ray.train.get_all_reported_checkpoints()  # waits until Ray has taken the checkpoint of an earlier step
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 0:
            with (notes / "steps").open("a") as file:
                file.write(f"{os.getpid()}\n")

    register_optimizer_step_pre_hook(before_step)
    own_worker(config)


def on_ray(configs):
    """Train each config on a cluster of two workers on this machine."""
    ray_train.train_worker = watched_worker
    with tempfile.TemporaryDirectory(prefix="ray") as folder:  # paths of sockets must be short
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=100 * 2**20,
            log_to_driver=False,
            _node_ip_address="127.0.0.1",
            _temp_dir=folder,
        )
        try:
            for config in configs:
                Path(config["notes"]).mkdir()
                ray_train.train(config, workers=2, use_gpu=False, storage=Path(config["notes"]) / "storage")
        finally:
            ray.shutdown()


if __name__ == "__main__":
    how, path = sys.argv[1:]
    loaded = json.loads(Path(path).read_text())
    (plain if how == "plain" else on_ray)(loaded)
