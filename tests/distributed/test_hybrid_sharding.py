"""Hybrid sharding (HSDP): on two nodes of two ranks, each node has the whole model, sharded over its ranks."""

import os

import pytest
import torch
from collectives import Collectives
from ranks import as_rank, free_port, run_ranks, trainer_options
from recording import RecordsGradients, RecordsLosses
from safetensors.torch import load_file
from tiny import make_rows
from torch.distributed.tensor import DTensor, Replicate, Shard

from lightning_ft import FullFineTuning, PairDataModule, ShardedStrategy
from lightning_ft._lightning import Callback, Trainer
from lightning_ft.errors import ConfigError
from lightning_ft.sharded_checkpoint import read_any_checkpoint

HYBRID = "hybrid"
MICRO_BATCHES = 2  # of each optimizer step


class Recording(RecordsGradients, RecordsLosses, FullFineTuning):
    pass


class Sums(Callback):
    """Counts the sums over ranks of each micro-batch's backward pass: within a node, and over nodes."""

    def __init__(self):
        self.batches = []

    def on_before_backward(self, *args):
        self._mode = Collectives()
        self._mode.__enter__()

    def on_after_backward(self, *args):
        self._mode.__exit__(None, None, None)
        sums = [(c.name, c.dtype) for c in self._mode.seen if "allreduce" in c.name or "reduce_scatter" in c.name]
        self.batches.append(sums)


def fit(how, model, folder, *callbacks, ckpt_path=None, max_steps=3, strategy=None):
    options = trainer_options("one", folder)
    if how == HYBRID:
        strategy = strategy or ShardedStrategy(device_mesh=(2, 2))
        options |= {"devices": 2, "num_nodes": 2, "strategy": strategy}
    options |= {"max_epochs": None, "max_steps": max_steps, "callbacks": list(callbacks)}
    trainer = Trainer(**options, accumulate_grad_batches=MICRO_BATCHES, gradient_clip_val=0.5)
    module = Recording(model, learning_rate=1e-2, dtype="float32", lr_schedule="constant", warmup_ratio=0.0)
    rows = PairDataModule(make_rows(24), batch_size=1 if how == HYBRID else 4, shuffle=False, cache_dir=False)
    trainer.fit(module, rows, ckpt_path=ckpt_path)
    return trainer, module


def weights(module):
    whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in module.named_parameters()}
    return {name: weight.detach().clone() for name, weight in whole.items()}


def averages(optimizer_state):
    """Running averages of the gradients, in the order of the parameter groups, which may number them differently."""
    numbers = [number for group in optimizer_state["param_groups"] for number in group["params"]]
    return [optimizer_state["state"][number]["exp_avg"] for number in numbers]


def as_node_rank(rank, port):
    as_rank(rank % 2, port)
    os.environ["NODE_RANK"] = str(rank // 2)


def one_rank(rank, model, folder, port):
    as_node_rank(rank, port)
    with pytest.raises(ConfigError, match=r"mesh of 2 ranks, but the Trainer has 4 .*device_mesh=\[2, 2\]"):
        fit(HYBRID, model, folder, strategy=ShardedStrategy(device_mesh=[1, 2]))
    trainer, module = fit(HYBRID, model, folder, max_steps=2)
    trainer.save_checkpoint(folder / "two.ckpt")
    sums = Sums()
    one_file = ShardedStrategy(device_mesh=(2, 2), save_distributed_checkpoint=False)
    trainer, resumed = fit(HYBRID, model, folder, sums, ckpt_path=folder / "two.ckpt", strategy=one_file)
    trainer.save_checkpoint(folder / "three.ckpt")
    name, sharded = next((n, p) for n, p in resumed.named_parameters() if isinstance(p, DTensor) and p.ndim == 2)
    found = {
        "losses": [*module.losses, *resumed.losses],
        "gradients": [*module.steps, *resumed.steps],
        "clipped": [*module.clipped, *resumed.clipped],
        "weights": weights(resumed),
        "sums": sums.batches,
        "placements": [repr(placement) for placement in sharded.placements],
        "shard": (name, sharded.to_local().detach().clone()),
        "answers": resumed.generate([row["input"] for row in make_rows(3)], max_new_tokens=6),
    }
    resumed.export(folder / "export")
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def hybrid(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hybrid")
    run_ranks(one_rank, (model_folder, folder, free_port()), count=4)
    return folder


def test_hybrid_sharding_takes_the_steps_of_one_process(model_folder, hybrid, tmp_path):
    ranks = [torch.load(hybrid / f"{rank}.pt", weights_only=True) for rank in range(4)]
    _, module = fit("one", model_folder, tmp_path)
    expected = {"gradients": module.steps, "clipped": module.clipped}
    largest = max(gradient.abs().max() for gradient in module.clipped[0].values())
    assert largest < max(gradient.abs().max() for gradient in module.steps[0].values())  # clipping did something
    for rank, found in enumerate(ranks):
        assert found["losses"] == pytest.approx(module.losses, abs=1e-5)
        for key, steps in expected.items():
            assert len(found[key]) == len(steps) == 3
            for actual, whole in zip(found[key], steps, strict=True):
                assert actual.keys() == whole.keys()
                for name in whole:
                    torch.testing.assert_close(actual[name], whole[name], rtol=0, atol=1e-5)
        for name, whole in weights(module).items():
            torch.testing.assert_close(found["weights"][name], whole, rtol=0, atol=5e-5)
        assert found["answers"] == module.generate([row["input"] for row in make_rows(3)], max_new_tokens=6)
        assert found["placements"] == [repr(Replicate()), repr(Shard(0))]
        name, shard = found["shard"]
        assert torch.equal(shard, found["weights"][name].chunk(2)[rank % 2])
        # Gradients are summed in fp32 once per step: over the ranks of a node, and of these sums over the nodes.
        first, second = found["sums"]
        assert not first
        within, over = ([dtype for name, dtype in second if word in name] for word in ("reduce_scatter", "allreduce"))
        assert within == over == [torch.float32] * 5  # layers, embeddings, head, and the last norm


def test_hybrid_checkpoint_holds_each_weight_once_and_resumes_on_one_process(model_folder, hybrid, tmp_path):
    folder = hybrid / "two.ckpt"
    stored = sum(file.stat().st_size for file in folder.glob("*.distcp"))
    content = read_any_checkpoint(folder)["state_dict"]
    size = sum(weight.nbytes for weight in content.values())
    assert size * 3 < stored < size * 3 * 1.5  # with the optimizer's two running averages
    trainer, resumed = fit("one", model_folder, tmp_path, ckpt_path=folder)
    exported = load_file(hybrid / "export" / "model.safetensors")
    saved = torch.load(hybrid / "3.pt", weights_only=True)["weights"]
    for name, whole in saved.items():
        torch.testing.assert_close(resumed.state_dict()[name], whole, rtol=0, atol=5e-5)
        assert torch.equal(exported[name.removeprefix("model.")], whole)
    file = read_any_checkpoint(hybrid / "three.ckpt")
    assert {n: w.tolist() for n, w in file["state_dict"].items()} == {n: w.tolist() for n, w in saved.items()}
    for actual, whole in zip(
        averages(file["optimizer_states"][0]), averages(trainer.optimizers[0].state_dict()), strict=True
    ):
        torch.testing.assert_close(actual, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mesh", [(2,), (2, 0), ("2", 2), (2, 2, 2), 4, (True, 2)])
def test_meshes_other_than_two_sizes_are_refused(mesh):
    with pytest.raises(ConfigError, match="expected two numbers, the number of copies of the weights and"):
        ShardedStrategy(device_mesh=mesh)
