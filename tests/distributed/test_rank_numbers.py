"""Checkpoints of sharded models: trainable weights only, never gathered, resumed on another number of ranks."""

import pytest
import torch
from collectives import Collectives
from ranks import as_rank, free_port, run_ranks, trainer_options
from recording import RecordsLosses
from safetensors.torch import load_file
from tiny import make_rows

from lightning_ft import LoRAFineTuning, PairDataModule
from lightning_ft._lightning import Callback, Trainer, _pl
from lightning_ft.errors import ConfigError
from lightning_ft.sharded_checkpoint import is_sharded_checkpoint, read_any_checkpoint

WITHIN = 5e-5
"""Bound of differences: Adam moves a weight by about 1e-2 per step, whatever rounds in a tiny gradient."""


class Recording(RecordsLosses, LoRAFineTuning):
    pass


class Stops(Callback):
    """Ends the run, as a kill does, in the first batch of its second epoch."""

    def on_train_batch_start(self, trainer, *args):
        if trainer.current_epoch == 1:
            raise KeyboardInterrupt


def fit(model, folder, name, ranks, strategy, *, ckpt_path=None, stops=False, sharded=True):
    """Two epochs of three steps with four rows each; the trained weights and optimizer states at their end."""
    options = trainer_options("one", folder)
    if strategy == "sharded":
        strategy = _pl.strategies.ModelParallelStrategy(save_distributed_checkpoint=sharded)
        options |= {"devices": ranks, "strategy": strategy}
    checkpointing = _pl.callbacks.ModelCheckpoint(folder / name, save_last=True, filename="{step}")
    trainer = Trainer(
        **{**options, "enable_checkpointing": True, "max_epochs": 2},
        callbacks=[checkpointing, *([Stops()] if stops else [])],
    )
    # Embeddings and head are trained with the adapter, so that weights of the root and of groups of their own are.
    lora = {"r": 4, "modules_to_save": ["lm_head"]}
    module = Recording(model, lora=lora, learning_rate=1e-2, dtype="float32", lr_schedule="constant", warmup_ratio=0.0)
    data = PairDataModule(make_rows(12), batch_size=4 // ranks, shuffle=False, cache_dir=False)
    try:
        trainer.fit(module, data, ckpt_path=ckpt_path)
    except KeyboardInterrupt:
        assert stops
    except SystemExit:  # of newer versions of Lightning
        assert stops
    return trainer, module


def end(trainer, module):
    names = {id(p): name for name, p in module.named_parameters()}
    found = {name: p for name, p in module.named_parameters() if p.requires_grad}
    for p, state in trainer.optimizers[0].state.items():
        found |= {f"{names[id(p)]}.{key}": value for key, value in state.items()}
    return {name: (v.full_tensor() if hasattr(v, "full_tensor") else v).detach().clone() for name, v in found.items()}


def on_two(rank, model, folder, port):
    """Everything that needs two ranks: write a checkpoint and count what is sent; resume that of one rank."""
    as_rank(rank, port)
    trainer, module = fit(model, folder, "two", 2, "sharded", stops=True)
    sizes = [(p.requires_grad, p.numel()) for p in module.parameters()]
    found = {
        "trained": sum(n for trained, n in sizes if trained),
        "base": sum(n for trained, n in sizes if not trained),
    }
    for kind, distributed in (("folder", True), ("file", False)):
        trainer.strategy._save_distributed_checkpoint = distributed
        with Collectives() as sent:
            trainer.save_checkpoint(folder / f"again.{kind}")
        found[kind] = sum(one.numel for one in sent.seen if one.dtype.is_floating_point)
    state = next(iter(trainer.optimizers[0].state.values()))
    state["quantized"] = torch.zeros(3)  # as optimizers do that know nothing of sharded weights
    with pytest.raises(ConfigError, match="keeps 'quantized' of sharded weights as a tensor of each rank"):
        trainer.save_checkpoint(folder / "local.ckpt")
    trainer, module = fit(model, folder, "one on two", 2, "sharded", ckpt_path=folder / "one" / "last.ckpt")
    found |= {"end": end(trainer, module), "losses": module.losses}
    torch.save(found, folder / f"rank{rank}.pt")


def on_one(rank, model, folder, port):
    """Everything on one rank: an uninterrupted run, and a stopped one that two ranks resume."""
    as_rank(rank, port)
    fit(model, folder, "one", 1, "sharded", stops=True)
    trainer, module = fit(model, folder, "whole", 1, "auto")
    torch.save({"end": end(trainer, module), "losses": module.losses}, folder / "whole.pt")


def resumed_on_one(rank, model, folder, port):
    as_rank(rank, port)
    for strategy in ("sharded", "auto"):
        trainer, module = fit(model, folder, f"two on {strategy}", 1, strategy, ckpt_path=folder / "two" / "last.ckpt")
        torch.save({"end": end(trainer, module), "losses": module.losses}, folder / f"{strategy}.pt")


@pytest.fixture(scope="module")
def runs(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for function, count in ((on_one, 1), (on_two, 2), (resumed_on_one, 1)):
        run_ranks(function, (model_folder, folder, free_port()), count=count)
    return folder


def test_sharded_checkpoint_resumes_on_another_number_of_ranks(runs):
    whole = torch.load(runs / "whole.pt", weights_only=True)
    assert len(whole["losses"]) == 6
    for name in ("sharded", "auto", "rank0", "rank1"):
        resumed = torch.load(runs / f"{name}.pt", weights_only=True)
        assert resumed["losses"] == pytest.approx(whole["losses"][3:], abs=1e-5)
        assert resumed["end"].keys() == whole["end"].keys()
        for key, value in whole["end"].items():
            torch.testing.assert_close(resumed["end"][key], value, rtol=0, atol=WITHIN)


def test_checkpoint_gathers_no_frozen_weight(runs):
    for rank in range(2):
        found = torch.load(runs / f"rank{rank}.pt", weights_only=True)
        assert found["folder"] < 100  # the check for weights that are not finite: one number per weight
        # A single file has each trained weight with its two averages, and none of the base, which has more weights.
        assert 3 * found["trained"] <= found["file"] < 3 * found["trained"] + 500
        assert found["base"] > 2 * found["trained"]


def test_sharded_checkpoint_holds_trainable_weights_only(runs):
    folder = runs / "two" / "last.ckpt"
    assert is_sharded_checkpoint(folder)
    assert sorted(file.name for file in folder.iterdir()) == [".metadata", "__0_0.distcp", "__1_0.distcp", "meta.pt"]
    checkpoint = read_any_checkpoint(folder)
    trained = torch.load(runs / "rank0.pt", weights_only=True)["trained"]
    assert sum(value.numel() for value in checkpoint["state_dict"].values()) == trained
    assert not any(path.name.startswith(".writing") for path in runs.rglob("*"))


def test_sharded_checkpoint_exports_to_a_folder(runs, model_folder, tmp_path):
    checkpoint = runs / "two" / "last.ckpt"
    module = LoRAFineTuning.load_from_checkpoint(checkpoint)
    module.export(tmp_path / "loaded")
    tensors = load_file(tmp_path / "loaded" / "adapter_model.safetensors")
    weights = read_any_checkpoint(checkpoint)["state_dict"]
    assert {value.shape for value in tensors.values()} <= {value.shape for value in weights.values()}
    name = next(name for name in weights if name.endswith("q_proj.lora_A.default.weight"))
    exported = tensors[name.removeprefix("model.").replace(".default", "")]
    assert torch.equal(exported, weights[name])
