"""Checkpoints of a sharded model, which its strategy loads: `python sharded_checkpoints.py MODEL OUT file|folder`."""

import os
import shutil
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import torch
from tiny import make_rows

from lightning_ft import FullFineTuning, PairDataModule
from lightning_ft._lightning import Trainer, _pl
from lightning_ft.errors import CheckpointError


class Code:
    """Writes a file named `ran` when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch ran",)


def fit(model, steps, kind, ckpt_path=None):
    strategy = _pl.strategies.ModelParallelStrategy(save_distributed_checkpoint=kind == "folder")
    checkpointing = _pl.callbacks.ModelCheckpoint(
        dirpath="k", save_last=True, every_n_train_steps=1, save_top_k=-1, filename="{step}"
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        strategy=strategy,
        max_steps=steps,
        logger=False,
        callbacks=[checkpointing],
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    module = FullFineTuning(model, learning_rate=1e-2, dtype="float32", lr_schedule="constant", warmup_ratio=0.0)
    data = PairDataModule(make_rows(12), batch_size=4, shuffle=False, cache_dir=False)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return {name: p.full_tensor().detach().clone() for name, p in module.named_parameters()}


def damage(last, kind):
    """Cut a checkpoint in half, or put code in place of its weights; returns its content if it is a file."""
    if kind == "file":
        content = last.read_bytes()
        torch.save({"state_dict": Code()}, last)
        return content
    shards = last / "__0_0.distcp"
    shards.write_bytes(shards.read_bytes()[:-100])
    return None


def main(model, out, kind):
    torch.set_num_threads(1)
    os.chdir(out)
    uninterrupted = fit(model, 3, kind)
    last, newest = Path("k/last.ckpt"), Path("k/step=3.ckpt")
    content = damage(last, kind)
    shutil.rmtree(newest) if newest.is_dir() else newest.unlink()
    resumed = fit(model, 3, kind, "last")
    print("same", all(torch.equal(value, resumed[name]) for name, value in uninterrupted.items()))
    if content is not None:
        Path("some.ckpt").write_bytes(content[: len(content) // 2])
    else:
        shutil.copytree("k/step=2.ckpt", "some.ckpt")
        damage(Path("some.ckpt"), kind)
    for path in ("some.ckpt", "k"):
        try:
            fit(model, 4, kind, path)
        except CheckpointError as error:
            print("refused", error)
    print("ran", Path("ran").exists(), sorted(path.name for path in Path("k").iterdir()))


if __name__ == "__main__":
    main(*sys.argv[1:])
