"""Sharding of models whose weights have several dtypes."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM

from lightning_ft.errors import ModelError
from lightning_ft.models.kept_float32 import kept_float32
from lightning_ft.models.shard import shard


def shard_several_dtypes(rank, folder):
    """The first rank of two, of which the other isn't there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with pytest.raises(
        ModelError, match=r"Glm4MoeDecoderLayer trains weights in bfloat16 .* and float32 \(mlp.gate.weight\)"
    ):
        shard(model, mesh, "bf16-mixed")
    shard(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), mesh, "bf16-true")
    frozen = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).requires_grad_(False)
    expected = frozen.model.layers[0].mlp.gate.weight.clone()
    shard(frozen, mesh)
    with kept_float32(frozen):
        frozen.to(torch.bfloat16)
    kept = frozen.model.layers[0].mlp.gate.weight
    assert isinstance(kept, DTensor)
    assert torch.equal(kept.to_local(), expected[: len(expected) // 2])
    dist.destroy_process_group()


def test_shard_of_several_dtypes_is_refused_if_trained_and_kept_if_frozen(routed_folder):
    run_ranks(shard_several_dtypes, (routed_folder,), count=1)
