"""LoRA on the workers of a Ray cluster: `python examples/cluster/ray_train.py --workers 2`.

Ray starts the workers, on as many machines as they need. If one dies, Ray starts all of them again from the last
checkpoint, and the run ends with the weights that it would have had. Module and DataModule are those of any other run.

Needs `pip install 'lightning-ft[ray]'`. Without a cluster, Ray makes one of this machine.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import ray.train
from ray.train import CheckpointConfig, FailureConfig, Result, RunConfig, ScalingConfig
from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment, RayTrainReportCallback, prepare_trainer
from ray.train.torch import TorchTrainer

try:  # the package that Ray's strategy is a class of: this one wherever it is installed
    import lightning.pytorch as L
except ModuleNotFoundError:
    import pytorch_lightning as L

from lightning_ft import ExportModel, LoRAFineTuning, PairDataModule

ROOT = Path(__file__).parents[2]


class ReportEverySteps(RayTrainReportCallback):
    """Gives a checkpoint to Ray at the end of each epoch, and every few optimizer steps.

    Args:
        every_n_steps: Number of optimizer steps between two checkpoints.
    """

    def __init__(self, every_n_steps: int) -> None:
        super().__init__()
        self.every_n_steps = every_n_steps
        self._saved = 0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object) -> None:
        """Save and report, where a step was taken."""
        if trainer.global_step % self.every_n_steps == 0 and trainer.global_step != self._saved:
            self._saved = trainer.global_step
            self.on_train_epoch_end(trainer, pl_module)


def make_run(config: dict[str, Any]) -> tuple[LoRAFineTuning, PairDataModule]:
    """Make what is trained, and on what; nothing in here knows of Ray.

    Args:
        config: Settings of the run.
    """
    L.seed_everything(0)
    lora = {"r": 16, "lora_dropout": 0.05}
    module = LoRAFineTuning(config["model"], dtype="float32", learning_rate=2e-3, lora=lora)
    data = PairDataModule(config["train"], batch_size=config["batch_size"])
    return module, data


def train_worker(config: dict[str, Any]) -> None:
    """Train as one rank; Ray calls this in each worker, and again in new ones after a failure.

    Args:
        config: Settings of the run.
    """
    module, data = make_run(config)
    trainer = L.Trainer(
        max_epochs=config["max_epochs"],
        strategy=RayDDPStrategy(),
        plugins=[RayLightningEnvironment()],
        callbacks=[ReportEverySteps(config["every_n_steps"]), ExportModel(config["output"], overwrite=True)],
        enable_checkpointing=False,  # no others than those that Ray gets
        enable_progress_bar=False,
        logger=False,
    )
    prepare_trainer(trainer)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        trainer.fit(module, data)
        return
    with checkpoint.as_directory() as folder:
        trainer.fit(module, data, ckpt_path=f"{folder}/{RayTrainReportCallback.CHECKPOINT_NAME}")


def train(config: dict[str, Any], *, workers: int, use_gpu: bool, storage: Path) -> Result:
    """Train in a group of workers.

    Args:
        config: Settings of the run, for :func:`train_worker`.
        workers: Number of workers, each of which is a rank.
        use_gpu: Whether each worker gets a GPU.
        storage: Folder of the checkpoints, which all machines see. A run that is in it is continued.
    """
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu),
        run_config=RunConfig(
            name="lora",
            storage_path=str(storage),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            failure_config=FailureConfig(max_failures=3),
        ),
    )
    return trainer.fit()


def main() -> None:
    """Train as the command line says."""
    parser = argparse.ArgumentParser(description="LoRA on the workers of a Ray cluster.")
    parser.add_argument("--workers", type=int, default=2, help="Number of workers.")
    parser.add_argument("--use_gpu", action="store_true", help="Whether each worker gets a GPU.")
    parser.add_argument("--model", default=str(ROOT / "examples/tiny_base"), help="Folder or name of the model.")
    parser.add_argument("--train", default=str(ROOT / "examples/support/data/train.jsonl"), help="Training rows.")
    parser.add_argument("--max_epochs", type=int, default=3, help="Number of epochs.")
    parser.add_argument("--batch_size", type=int, default=8, help="Number of rows per worker and step.")
    parser.add_argument("--every_n_steps", type=int, default=100, help="Number of steps between two checkpoints.")
    parser.add_argument("--storage", type=Path, default=Path("runs/ray"), help="Folder that all machines see.")
    arguments = vars(parser.parse_args())
    storage = arguments.pop("storage").resolve()
    group = {name: arguments.pop(name) for name in ("workers", "use_gpu")}
    result = train({**arguments, "output": str(storage / "export")}, storage=storage, **group)
    print(f"Last checkpoint: {result.checkpoint}. Exported weights: {storage / 'export' / 'last'}")


if __name__ == "__main__":
    main()
