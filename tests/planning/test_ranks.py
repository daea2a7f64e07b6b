"""Memory and messages of ranks by formula: against PyTorch's own shards, against real passes, and on the page."""

import importlib.util

import pytest
import torch
import torch.distributed as dist
from guide_code import ROOT
from ranks import run_ranks
from tiny import make_model
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_ft.models.adapt import add_lora, lora_config
from lightning_ft.models.head import base_of
from lightning_ft.models.shard import shard
from lightning_ft.planning.activations import activation_bytes, saved_bytes
from lightning_ft.planning.ranks import rank_memory, rank_traffic
from lightning_ft.planning.shapes import shape_model

LORA = {"r": 3}


def model_of(method, tie=False):
    model = make_model(layers=5, tie=tie)
    return model if method == "full" else add_lora(model.to(torch.bfloat16), lora_config(LORA))


def shard_for_many(rank, cases, folder):
    """The first rank of many that aren't there."""
    for ranks, method, tie in cases:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
        model = model_of(method, tie)
        shard(base_of(model), init_device_mesh("cpu", (ranks,)), "bf16-mixed")
        held = [p.to_local().nbytes for p in model.parameters()]
        trained = [p.to_local().nbytes for p in model.parameters() if p.requires_grad]
        torch.save((sum(held), sum(trained)), folder / f"{ranks}-{method}-{tie}.pt")
        dist.destroy_process_group()


def test_rank_memory_is_that_of_fsdp2_on_any_number_of_ranks(tmp_path):
    cases = [(n, method, tie) for n in (2, 6, 48) for method in ("full", "lora") for tie in (False, True)]
    run_ranks(shard_for_many, (cases, tmp_path), count=1)
    for ranks, method, tie in cases:
        model = shape_model(make_model(layers=5, tie=tie).config, None if method == "full" else LORA)
        planned = rank_memory(model, ranks, "fsdp")
        held, trained = torch.load(tmp_path / f"{ranks}-{method}-{tie}.pt")
        assert (planned.weights, planned.gradients, planned.optimizer) == (held, trained, 2 * trained)


def test_rank_traffic_pads_tensors_with_fewer_rows_than_ranks():
    config = make_model().config
    sent = {rank: rank_traffic(shape_model(config, {"r": rank}), 64, "fsdp").reduced for rank in (4, 64)}
    outputs = [config.hidden_size, 16, 16, config.hidden_size, *[config.intermediate_size] * 2, config.hidden_size]
    of_b = {rank: 2 * sum(-(-rows // 64) * rank for rows in outputs) * 4 * 63 for rank in sent}
    assert sent[4] - of_b[4] == sent[64] - of_b[64]  # A has 4 rows or 64, and is sent as 64 either way


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("sharded", [False, True])
def test_activation_bytes_are_those_that_a_real_pass_saves(method, sharded):
    model = model_of(method)
    base = base_of(model)
    planned = activation_bytes(make_model(layers=5).config, None if method == "full" else LORA, sharded=sharded)
    if sharded:
        model.to(torch.bfloat16)  # as it is gathered

    def per_position():
        return (saved_bytes(base.base_model, 192) - saved_bytes(base.base_model, 64)) / 128

    assert per_position() == planned.kept
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base.enable_input_require_grads()
    assert per_position() == planned.rest_checkpointed + planned.layers * planned.layer_input
    assert planned.checkpointed == per_position() + planned.layer


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("scaling_tables", ROOT / "docs" / "scaling_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.TABLES


@pytest.mark.parametrize("number", range(4))
def test_page_has_the_computed_tables(tables, number):
    assert len(tables) == 4
    assert f"\n{tables[number]()}\n" in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
