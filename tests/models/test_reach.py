"""`find_reach` finds the parameters that text doesn't reach, in all architectures, without changing the model."""

import importlib.util

import pytest
import torch
from many_models import make, make_multimodal
from tiny import make_model
from torch import nn
from transformers import BitsAndBytesConfig

from lightning_ft.models.adapt import add_lora, lora_config
from lightning_ft.models.reach import Reach, find_reach


class Routed(nn.Module):
    """A list of experts whose router always chooses the first one."""

    def __init__(self, size, count=3):
        super().__init__()
        self.router = nn.Linear(size, count, bias=False)
        self.experts = nn.ModuleList(nn.Linear(size, size) for _ in range(count))

    def forward(self, hidden):
        weight = self.router(hidden).softmax(-1)[..., :1]
        return weight * self.experts[0](hidden)


class Compressing(nn.Module):
    """A model with a module that merges several tokens, and isn't reached in a short row."""

    def __init__(self, size, every=100):
        super().__init__()
        self.plain, self.compressor, self.every = nn.Linear(size, size), nn.Linear(size, size), every

    def forward(self, hidden):
        out = self.plain(hidden)
        whole = hidden.shape[1] // self.every * self.every
        return out + self.compressor(hidden[:, :whole]).sum(1, keepdim=True) if whole else out


class HalfUsed(nn.Module):
    def __init__(self, size, used):
        super().__init__()
        self.always, self.shared, self.used = nn.Linear(size, size), nn.Linear(size, size), used

    def forward(self, hidden):
        return self.shared(self.always(hidden)) if self.used else self.always(hidden)


@pytest.mark.parametrize("kind", ["gemma3", "mistral3", "idefics3", "qwen3_vl", "llava", "mllama"])
def test_find_reach_names_the_towers_of_a_multimodal_model(kind):
    model = make_multimodal(kind)
    unreached = find_reach(model).unreached
    text = {id(p) for part in (model.get_decoder(), model.get_output_embeddings()) for p in part.parameters()}
    crossing = {id(p) for p in model.get_decoder().layers[1].parameters()} if kind == "mllama" else set()
    assert unreached == {name for name, p in model.named_parameters() if id(p) not in text - crossing}
    assert unreached


@pytest.mark.parametrize("kind", ["gpt_oss", "mixtral", "granitemoe"])
def test_find_reach_counts_a_tensor_of_experts_as_a_whole(kind):
    assert (
        find_reach(make(kind, num_local_experts=64)).unreached == frozenset()
    )  # more experts than the probe has tokens


def test_find_reach_counts_experts_that_no_token_was_routed_to():
    model = make_model()
    for layer in model.model.layers:
        layer.mlp = Routed(32)
    model.tower = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    assert find_reach(model).unreached == {f"tower.{i}.{name}" for i in range(3) for name in ("weight", "bias")}


def test_find_reach_distinguishes_layers():
    model = make_model()
    for number, layer in enumerate(model.model.layers):
        layer.mlp = HalfUsed(32, used=number == 0)
    assert find_reach(model).unreached == {f"model.layers.1.mlp.shared.{name}" for name in ("weight", "bias")}


def test_find_reach_tries_a_longer_row_for_partly_reached_layers():
    model = make_model()
    model.model.layers[1].mlp = Compressing(32)
    assert find_reach(model).unreached == frozenset()


def test_find_reach_includes_adapters_with_zero_product():
    model = make_model()
    model.tower = nn.Linear(4, 4)
    model = add_lora(model, lora_config({"r": 2}))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in find_reach(model).unreached if name in trained} == {
        f"base_model.model.tower.lora_{part}.default.weight" for part in "AB"
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_find_reach_does_not_change_the_model(dtype, reentrant):
    model = make_model(dropout=0.3).to(dtype)
    model.tower = nn.Linear(4, 4)
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    model.model.layers[0].eval()
    model.model.norm.register_buffer("count", torch.zeros(()))
    model.model.norm.register_forward_hook(lambda module, args, out: module.count.add_(1) and None)

    def state():
        return (
            [(module.training, getattr(module, "gradient_checkpointing", None)) for module in model.modules()],
            [(p.requires_grad, p.grad) for p in model.parameters()],
            [b.tolist() for b in model.buffers()],
            torch.get_rng_state().tolist(),
            model.config._attn_implementation,
            [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        )

    before = state()
    assert find_reach(model).unreached == {"tower.weight", "tower.bias"}
    assert state() == before


def test_find_reach_resets_recurrent_layers():
    model = make("recurrent_gemma", block_types=["recurrent", "attention"])
    held = [getattr(m, "recurrent_states", None) for m in model.modules() if hasattr(m, "recurrent_states")]
    assert find_reach(model) == Reach()
    after = [getattr(m, "recurrent_states", None) for m in model.modules() if hasattr(m, "recurrent_states")]
    assert held
    assert all(a is b for a, b in zip(held, after, strict=True))


def test_find_reach_works_without_gradients_and_under_another_default_device():
    model = make_model()
    model.tower = nn.Linear(4, 4)
    with torch.inference_mode():
        assert find_reach(model).unreached == {"tower.weight", "tower.bias"}
    with torch.no_grad(), torch.device("meta"):
        assert find_reach(model).unreached == {"tower.weight", "tower.bias"}


def test_find_reach_needs_no_gpu_kernel():
    model = make_model()
    model.config._attn_implementation = "flash_attention_2"
    assert find_reach(model) == find_reach(make_model())
    assert model.config._attn_implementation == "flash_attention_2"


def test_find_reach_reports_why_probing_failed():
    model = make_model()
    model.model.layers[0].mlp = nn.Linear(7, 7)
    reach = find_reach(model)
    assert reach.unreached == frozenset()
    assert "RuntimeError" in reach.unknown


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("settings", [{"load_in_4bit": True}, {"load_in_8bit": True}])
def test_find_reach_follows_quantized_layers(tmp_path, settings):
    from transformers import AutoModelForImageTextToText

    make_multimodal("llava").save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**settings), device_map={"": "cpu"}
    )
    unreached = find_reach(model).unreached
    assert unreached == {name for name, _ in model.named_parameters() if "vision" in name or "projector" in name}
    assert any(not p.is_floating_point() for name, p in model.named_parameters() if name in unreached)


def test_find_reach_names_linear_layers_with_several_outputs():
    assert find_reach(make("phimoe")).unlike_linear == {f"model.layers.{i}.mlp.router" for i in range(2)}
    assert find_reach(make("llama")).unlike_linear == frozenset()
