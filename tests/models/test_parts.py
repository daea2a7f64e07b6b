"""Part types are derived from the model's structure, and every weight is counted once."""

import pytest
import torch
from many_models import make, make_multimodal
from tiny import make_model
from torch import nn

from lightning_ft.models.adaptation import Adaptation
from lightning_ft.models.parts import count_parts, find_parts, parts_table

LAYER = "model.layers.1"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("llama", {"self_attn.q_proj.weight": "attention", "mlp.up_proj.weight": "MLP"}),
        (
            "gpt_oss",
            {"mlp.router.weight": "router", "mlp.experts.down_proj": "experts"},
        ),
        ("qwen3_moe", {"mlp.gate.weight": "router", "mlp.experts.gate_up_proj": "experts"}),
        ("qwen2_moe", {"mlp.shared_expert.up_proj.weight": "MLP", "mlp.gate.weight": "router"}),
        ("granitemoe", {"block_sparse_moe.router.weight": "router", "block_sparse_moe.experts.down_proj": "experts"}),
        ("jetmoe", {"mlp.input_linear.weight": "experts", "self_attention.kv_proj.weight": "attention"}),
        ("jamba", {"self_attn.q_proj.weight": "attention", "feed_forward.router.weight": "router"}),
    ],
)
def test_part_types_match_architecture(kind, expected):
    kinds = find_parts(make(kind))
    assert {name: kinds[f"{LAYER}.{name}"] for name in expected} == expected
    assert kinds["model.embed_tokens.weight"] == "embeddings"
    norms = {kinds[name] for name in kinds if name.endswith("norm.weight")}
    assert norms == {"norms"}
    assert kinds.get("lm_head.weight", "head") == ("embeddings" if kind == "jetmoe" else "head")  # tied in jetmoe


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_vl", "llava", "idefics3"])
def test_part_types_call_modules_outside_the_language_model_encoders(kind):
    model = make_multimodal(kind)
    kinds, text = find_parts(model), {id(p) for p in model.get_decoder().parameters()}
    head = {id(p) for p in model.get_output_embeddings().parameters()}
    for name, parameter in model.named_parameters():
        assert (kinds[name] == "encoders") == (id(parameter) not in text | head), name


def test_part_types_recognize_experts_in_a_list():
    model = make_model()
    model.config.num_local_experts = 3
    for layer in model.model.layers:
        layer.mlp = nn.Module()
        layer.mlp.gate, layer.mlp.experts = nn.Linear(32, 3), nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
    kinds = find_parts(model)
    assert kinds["model.layers.0.mlp.experts.2.weight"] == "experts"
    assert kinds["model.layers.0.mlp.gate.weight"] == "router"


@pytest.mark.parametrize("lora", [None, {"r": 2}, {"r": 2, "modules_to_save": ["lm_head"]}])
@pytest.mark.parametrize("kind", ["llama", "gpt_oss", "deepseek_v3"])
def test_count_parts_counts_every_weight_once(kind, lora):
    base = make(kind)
    total = sum(p.numel() for p in base.parameters())
    adaptation = Adaptation(base, lora, None)
    model, _ = adaptation.apply(base, seed=0)
    parts = count_parts(model, adaptation.parts, adaptation.reach.unreached)
    assert sum(amounts.total for amounts in parts.values()) == total
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(amounts.trained for amounts in parts.values()) == trained
    frozen = sum(a.frozen for a in parts.values())
    assert frozen == (total if lora else total - trained)
    if lora:
        adapted = {kind for kind, amounts in parts.items() if amounts.adapted}
        experts = {"experts"} if kind != "llama" else set()
        dense = {"MLP"} if kind != "gpt_oss" else set()
        assert adapted == {"attention"} | experts | dense
        assert ("lm_head.weight" in adaptation.parts) == (parts["head"].trained > 0 or "modules_to_save" not in lora)


def test_count_parts_counts_unpacked_four_bit_weights():
    packed = nn.Parameter(torch.zeros(8, dtype=torch.uint8), requires_grad=False)
    packed.quant_state = type("State", (), {"shape": (4, 4)})()
    model = nn.Module()
    model.weight = packed
    assert count_parts(model, {}, frozenset())["other"].total == 16
    model.quant_state = packed.__dict__.pop("quant_state")  # as FSDP2 leaves it
    assert count_parts(model, {}, frozenset())["other"].total == 16


def test_parts_table_has_sums():
    base = make_multimodal("gemma3")
    adaptation = Adaptation(base, {"r": 2}, None)
    model, _ = adaptation.apply(base, seed=0)
    lines = parts_table(count_parts(model, adaptation.parts, adaptation.reach.unreached)).splitlines()
    assert lines[0].split() == ["total", "trained", "adapted", "frozen", "unreached"]
    rows = {line.split()[0]: line.split()[1:] for line in lines[1:]}
    assert rows["encoders"][0] == rows["encoders"][4] == rows["all"][4]
    assert rows["encoders"][1:3] == ["0", "0"]


def test_describe_names_groups_that_no_text_reaches():
    base = make_multimodal("gemma3")
    adaptation = Adaptation(base, None, None)
    model, _ = adaptation.apply(base, seed=0)
    tower = [p for name, p in model.named_parameters() if "vision_tower" in name]
    text = adaptation.describe(model)
    assert f"model.vision_tower: {len(tower)} parameters, " in text
    assert "no text reaches them, so they stay frozen." in text
    assert not any(p.requires_grad for p in tower)
