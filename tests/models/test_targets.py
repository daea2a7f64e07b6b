"""New adapters cover every linear layer and expert that text reaches, and reload as saved."""

import copy

import pytest
import torch
from many_models import make, make_multimodal
from peft import LoraConfig, PeftModel
from tiny import make_model
from torch import nn

from lightning_ft.errors import ConfigError, ModelError
from lightning_ft.models.adapt import add_lora, lora_config
from lightning_ft.models.adaptation import Adaptation
from lightning_ft.models.parts import adapted_parameters, expert_tensors
from lightning_ft.models.reach import Reach, find_reach
from lightning_ft.models.targets import adapted_names, fitted, skeleton

MOE = ["gpt_oss", "mixtral", "qwen2_moe", "qwen3_moe", "granitemoe", "phimoe", "olmoe", "jamba", "llama4_text"]
DENSE_TOO = ["deepseek_v3", "glm4_moe", "ernie4_5_moe"]  # in these, PEFT mistakes linear layers for experts
IDS = torch.tensor([[5, 9, 33, 120, 7, 64, 250, 11]])


def adapted(base, lora=None, top_layers=None):
    return Adaptation(base, {"r": 2, **(lora or {})}, None, top_layers).apply(base, seed=0)[0]


def names(model):
    ids = adapted_parameters(model)
    return {n for n, p in model.get_base_model().named_parameters() if id(p) in ids}


def plain(name):
    return name.replace(".base_layer", "")


def step(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        optimizer.step()
        optimizer.zero_grad()
    return without


@pytest.mark.parametrize("kind", [*MOE, *DENSE_TOO])
def test_fitted_adapts_every_linear_layer_and_every_expert(kind):
    base = make(kind)
    head = base.get_output_embeddings()
    linear = {f"{n}.weight" for n, m in base.named_modules() if isinstance(m, nn.Linear) and m is not head}
    experts = set(expert_tensors(base))
    assert experts
    model = adapted(base)
    found = {plain(name) for name in names(model)}
    assert found - {name for name in found if "gate" in name or "router" in name} <= linear | experts
    assert linear | experts <= found
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {module.r["default"] for module in model.modules() if hasattr(module, "r")} == {2}


@pytest.mark.parametrize("kind", [*MOE, *DENSE_TOO])
def test_fitted_adapters_learn_and_reload(kind, tmp_path):
    base = make(kind)
    untouched = copy.deepcopy(base)
    model = adapted(base).train()
    assert step(model) == []
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(untouched, tmp_path).eval()
    with torch.no_grad():
        ours = model(input_ids=IDS).logits
        with model.disable_adapter():
            assert (model(input_ids=IDS).logits - ours).abs().max() > 1e-3
        torch.testing.assert_close(again(input_ids=IDS).logits, ours, rtol=0, atol=1e-6)
        merged = copy.deepcopy(model).merge_and_unload(safe_merge=True)
        torch.testing.assert_close(merged(input_ids=IDS).logits, ours, rtol=1e-4, atol=1e-5)


def test_fitted_keeps_adapters_of_experts_in_fp32_over_bf16():
    model = adapted(make("gpt_oss").bfloat16())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("kind", ["gpt_oss", "qwen3_moe", "deepseek_v3"])
def test_fitted_adapts_the_top_layers_only(kind):
    model = adapted(make(kind), top_layers=1)
    assert {plain(name).split(".")[2] for name in names(model)} == {"1"}
    assert any("experts" in name for name in names(model))


@pytest.mark.parametrize(
    "lora",
    [{"lora_dropout": 0.1}, {"use_dora": True}, {"init_lora_weights": "pissa"}],
    ids=lambda lora: next(iter(lora)),
)
@pytest.mark.parametrize("kind", ["gpt_oss", "qwen3_moe", "phimoe", "deepseek_v3"])
def test_fitted_reports_skipped_experts_once(kind, lora, recwarn):
    model = adapted(make(kind), lora)
    caught = [str(w.message) for w in recwarn if "no adapter" in str(w.message)]
    assert len(caught) == 1
    assert "experts.down_proj" in caught[0]
    assert next(iter(lora)) in caught[0]
    assert not any("experts" in name for name in names(model))
    assert any("self_attn" in name for name in names(model))


def test_fitted_reports_experts_whose_weights_bypass_their_module():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up = nn.Parameter(torch.randn(4, 32, 32))

    class Outside(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = Holder()

        def forward(self, hidden):
            return hidden @ self.experts.gate_up[0]

    base = make_model()
    base.config.num_local_experts = 4
    for layer in base.model.layers:
        layer.mlp = Outside()
    with pytest.warns(UserWarning, match=r"model.layers.0.mlp.experts.gate_up.*can't reach"):
        model = adapted(base)
    assert not any("experts" in name for name in names(model))
    assert step(model.train()) == []


def test_adapter_that_breaks_the_model_is_refused():
    class GivesTwo(nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden), None

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.odd = GivesTwo(32, 32)

        def forward(self, hidden):
            return self.odd(hidden)[0]

    base = make_model()
    base.model.layers[0].mlp = Block()
    with pytest.raises(ModelError, match=r"doesn't run with this adapter.*target_modules"):
        adapted(copy.deepcopy(base), {"target_modules": ["odd"]})
    model = adapted(base)  # "all-linear" would target it as a parameter
    assert "model.layers.0.mlp.odd.base_layer.weight" in names(model)
    assert step(model.train()) == []


def test_fitted_skips_layers_that_peft_refuses(recwarn):
    model = adapted(make("mamba"))
    assert {name.split(".")[-3] for name in names(model)} == {"in_proj", "x_proj", "dt_proj"}
    caught = [str(w.message) for w in recwarn if "no adapter" in str(w.message)]
    assert len(caught) == 1
    assert "mixer.out_proj.weight" in caught[0]


def test_fitted_refuses_a_model_without_token_inputs():
    class Tower(type(make_model())):
        def get_input_embeddings(self):
            raise NotImplementedError

    base = make_model()
    base.__class__ = Tower
    with pytest.raises(ModelError, match="Tower has no token embeddings"):
        adapted(base)


def test_fitted_keeps_target_modules_of_the_user():
    config = lora_config({"r": 2, "target_modules": ["q_proj"]})
    base = make("gpt_oss")
    assert fitted(config, base, find_reach(base)).target_parameters is None
    own = lora_config({"r": 2, "target_parameters": ["mlp.experts.down_proj"]})
    model = add_lora(base, fitted(own, base, find_reach(base)))
    assert {name.rpartition(".")[2] for name in names(model) if "experts" in name} == {"down_proj"}


@pytest.mark.parametrize("excluded", [["q_proj"], r".*\.q_proj"])
@pytest.mark.parametrize("kind", ["llama", "gpt_oss"])
def test_fitted_skips_excluded_modules(kind, excluded):
    model = adapted(make(kind), {"exclude_modules": excluded})
    assert not any("q_proj" in name for name in names(model))
    assert any("k_proj" in name for name in names(model))


@pytest.mark.parametrize("kind", ["gemma3", "llava", "qwen3_vl"])
@pytest.mark.parametrize("lora", [{}, {"target_modules": ["q_proj", "v_proj"]}, {"exclude_modules": ["v_proj"]}])
def test_fitted_skips_towers(kind, lora, tmp_path):
    base = make_multimodal(kind)
    untouched, text = copy.deepcopy(base), {id(p) for p in base.get_decoder().parameters()}
    model = adapted(base, lora)
    assert adapted_parameters(model) <= text
    assert any("v_proj" in name for name in names(model)) == ("exclude_modules" not in lora)
    assert step(model.train()) == []
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(untouched, tmp_path)
    assert {n for n, _ in again.named_parameters()} == {n for n, _ in model.named_parameters()}


@pytest.mark.parametrize(
    ("lora", "named"),
    [
        ({"target_modules": ["q_proj", "fc1"]}, "fc1"),
        ({"target_modules": r".*vision_tower.*q_proj"}, "vision_tower"),
        ({"modules_to_save": ["multi_modal_projector"]}, "multi_modal_projector"),
    ],
)
def test_fitted_refuses_targets_on_towers_only(lora, named):
    with pytest.raises(ConfigError, match=named):
        adapted(make_multimodal("gemma3"), lora)


def test_saved_adapter_on_a_tower_stays_frozen(tmp_path):
    base = make_multimodal("gemma3")
    add_lora(copy.deepcopy(base), lora_config({"r": 2})).save_pretrained(tmp_path)
    model = Adaptation(base, None, str(tmp_path)).apply(base, seed=0)[0]
    towers = [p.requires_grad for name, p in model.named_parameters() if "vision" in name and "lora_" in name]
    assert towers
    assert not any(towers)
    assert step(model.train()) == []


def test_fitted_does_not_change_the_passed_config():
    config = lora_config({"r": 2})
    before = copy.deepcopy(config)
    base = make("qwen3_moe")
    fitted(config, base, find_reach(base))
    assert config == before


def test_fitted_names_what_peft_refuses():
    base = make_multimodal("gemma3")
    with pytest.raises(ModelError, match="nowhere"):
        fitted(LoraConfig(target_modules=["nowhere"]), base, find_reach(base))


def test_skeleton_has_no_weights_and_does_not_change_the_model():
    base = make("gpt_oss")
    before = {name: value.clone() for name, value in base.state_dict().items()}
    copied = skeleton(base)
    assert {p.device.type for p in [*copied.parameters(), *copied.buffers()]} == {"meta"}
    state = torch.get_rng_state()
    assert "model.layers.0.self_attn.q_proj.weight" in adapted_names(base, LoraConfig(target_modules=["q_proj"]))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


def test_fitted_does_not_change_adapter_initialization():
    """If text reaches everything and there are no experts, the adapter equals PEFT's own."""
    model = adapted(make_model())
    expected = add_lora(make_model().requires_grad_(False), lora_config({"r": 2}), seed=0)
    for (name, ours), (other, theirs) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(ours, theirs)
    assert fitted(lora_config(None), make_model(), Reach()) == lora_config(None)
