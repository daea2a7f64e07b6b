"""Shards in the memory of the CPU between passes: what of it can be seen without a GPU."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import as_rank, free_port, run_ranks, trainer_options
from recording import RecordsGradients, RecordsLosses
from tiny import make_rows
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy
from torch.distributed.tensor import DTensor, Shard

from lightning_ft import LoRAFineTuning, PairDataModule, ShardedStrategy
from lightning_ft._lightning import Trainer
from lightning_ft.errors import ConfigError
from lightning_ft.models import shard as sharding
from lightning_ft.models.head import input_device


class Recording(RecordsGradients, RecordsLosses, LoRAFineTuning):
    pass


def fit(strategy, model, folder, **options):
    options = {**trainer_options("one", folder), "max_epochs": None, "max_steps": 2, **options}
    if strategy is not None:
        options |= {"devices": 2, "strategy": strategy}
    trainer = Trainer(**options, accumulate_grad_batches=2, gradient_clip_val=0.5)
    module = Recording(model, lora={"r": 4}, learning_rate=1e-2, dtype="float32")
    rows = PairDataModule(make_rows(16), batch_size=4 if strategy is None else 2, shuffle=False, cache_dir=False)
    trainer.fit(module, rows)
    return trainer, module


def one_rank(rank, model, folder, port):
    as_rank(rank, port)
    policies, original = [], sharding.fully_shard

    def recorded(part, **options):
        policies.append(options["offload_policy"])
        return original(part, **options)

    sharding.fully_shard = recorded
    backends, dist.get_backend_config = dist.get_backend_config, lambda: "cuda:nccl"  # of an earlier Trainer
    with pytest.raises(ConfigError, match=r"needs a process group for tensors on the CPU.*'cuda:nccl'"):
        fit(ShardedStrategy(cpu_offload=True), model, folder)
    dist.get_backend_config = backends
    trainer, module = fit(ShardedStrategy(cpu_offload=True), model, folder)
    assert policies == [CPUOffloadPolicy(pin_memory=False)] * 5  # layers, embeddings, head, and the rest
    trained = [p for p in module.parameters() if p.requires_grad]
    assert all(isinstance(p, DTensor) for p in trained)
    for values in trainer.optimizers[0].state.values():
        assert values["exp_avg"].to_local().device.type == "cpu"
    found = {
        "losses": module.losses,
        "gradients": module.steps,
        "clipped": module.clipped,
        "weights": {n: p.full_tensor().detach() for n, p in module.named_parameters() if p.requires_grad},
    }
    torch.save(found, folder / f"{rank}.pt")

    # Another device than the CPU, which this machine has: what would be moved to a GPU, and what stays.
    trainer.strategy.parallel_devices = [torch.device("meta")] * 2
    trainer.strategy.model_to_device()
    assert all(p.to_local().device.type == "cpu" for p in module.parameters())
    assert {buffer.device.type for buffer in module.buffers()} == {"meta"}
    assert module.device.type == "meta"
    mesh = init_device_mesh("meta", (2,))
    shard = DTensor.from_local(torch.zeros(2, 3), mesh, [Shard(0)], run_check=False)
    base = module.model.get_base_model()
    base.get_input_embeddings().weight = torch.nn.Parameter(shard)
    assert input_device(module.model).type == "meta"  # where passes are made, not where the shard is

    policies.clear()
    trainer, module = fit(ShardedStrategy(), model, folder)
    assert {type(policy) for policy in policies} == {OffloadPolicy}
    trainer.strategy.parallel_devices = [torch.device("meta")] * 2
    trainer.strategy.model_to_device()
    assert all(p.to_local().device.type == "meta" for p in module.parameters())


def test_offloaded_training_takes_the_steps_of_one_process(model_folder, tmp_path):
    run_ranks(one_rank, (model_folder, tmp_path, free_port()))
    _, module = fit(None, model_folder, tmp_path)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found["losses"] == pytest.approx(module.losses, abs=1e-5)
        for mine, theirs in ((found["gradients"], module.steps), (found["clipped"], module.clipped)):
            assert len(mine) == len(theirs) == 2
            for actual, whole in zip(mine, theirs, strict=True):
                for name in whole:
                    torch.testing.assert_close(actual[name], whole[name], rtol=0, atol=1e-5)
        for name, weight in found["weights"].items():
            torch.testing.assert_close(weight, module.get_parameter(name), rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("options", "device", "backend"),
    [
        ({"cpu_offload": True}, "cuda", "cpu:gloo,cuda:nccl"),  # NCCL can't sum norms that are on the CPU
        ({"cpu_offload": True, "process_group_backend": "nccl"}, "cuda", "cpu:gloo,cuda:nccl"),
        ({"cpu_offload": True}, "cpu", "gloo"),
        ({}, "cuda", "nccl"),
    ],
)
def test_offloading_adds_a_backend_for_the_cpu(monkeypatch, options, device, backend):
    strategy = ShardedStrategy(**options)
    monkeypatch.setattr(type(strategy), "root_device", torch.device(device, 0))
    assert strategy._get_process_group_backend() == backend


def test_offloading_with_a_gradient_scaler_is_refused():
    strategy = ShardedStrategy(cpu_offload=True)
    strategy.precision_plugin = SimpleNamespace(precision="16-mixed")
    with pytest.raises(ConfigError, match=r"cpu_offload=True can't be used with precision='16-mixed'.*bf16-mixed"):
        strategy.setup_environment()
