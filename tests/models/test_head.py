"""Log-probabilities of packed batches match single examples for many architectures, or the plain path is used."""

import re
import warnings
from types import SimpleNamespace

import pytest
import torch
from tiny import make_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lightning_ft.data.layout import Example, collate_examples
from lightning_ft.errors import ModelError
from lightning_ft.models.adapt import add_lora, lora_config
from lightning_ft.models.head import SOFT_CAPS, attention_bias, completion_logprobs, logit_transform
from lightning_ft.models.logprob_model import LogProbModel

SMALL = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": 4},
    "gemma2": {"final_logit_softcapping": 5.0, "sliding_window": 4},
    "gemma3_text": {"sliding_window": 4},
    "phi3": {"tie_word_embeddings": True},
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.3},
    "hyperclovax": {"logits_scaling": 0.3},  # it multiplies by what Granite divides by
    "gpt_neox": {},
    "llama4_text": {
        "num_local_experts": 2,
        "intermediate_size_mlp": 48,
        "attention_chunk_size": 16,
    },  # without a named backbone
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
UNPACKED = {
    "mamba": {"state_size": 4},
    "rwkv": {"attention_hidden_size": 32, "context_length": 128},  # accepts no positions
    "bert": {"is_decoder": True, **NO_DROPOUT},  # its head is more than a linear layer
    "roberta": {
        "is_decoder": True,
        **NO_DROPOUT,
        "max_position_embeddings": 64,
    },  # its positions start after the padding token's id
}


def build(name, options, attention="sdpa"):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**SMALL, **options})
    return AutoModelForCausalLM.from_config(config, **({} if attention is None else {"attn_implementation": attention}))


def examples():
    generator = torch.Generator().manual_seed(1)
    made = []
    for length in (7, 12, 3, 9):
        ids = torch.randint(3, 100, (length,), generator=generator)
        supervised = torch.rand(length, generator=generator) < 0.6
        supervised[-1] = True
        made.append(Example(ids, supervised))
    return made


def one_by_one(model):
    found = []
    for example in examples():
        logits = model(input_ids=example.input_ids[None], use_cache=False).logits[0, :-1].float()
        picked = logits.log_softmax(-1).gather(-1, example.input_ids[1:, None])[:, 0]
        found.append(picked[example.supervised[1:]])
    return torch.cat(found)


def gradients(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize(
    ("name", "attention"),
    [(name, kind) for name in ARCHITECTURES for kind in ("sdpa", "eager") if (name, kind) != ("gemma2", "sdpa")],
)
def test_logprobs_and_gradients_match_single_examples(name, attention):
    model = build(name, ARCHITECTURES[name], attention).train()
    want = one_by_one(model)
    want.sum().backward()
    expected = gradients(model)
    for packing in (True, False):
        logprob_model = LogProbModel()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # a fallback would warn
            scored = logprob_model(model, collate_examples(examples(), packing=packing), "none")
        torch.testing.assert_close(scored.logprobs, want, rtol=0, atol=1e-5)
        scored.logprobs.sum().backward()
        for key, value in gradients(model).items():
            torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [0.25, 1.01])
def test_factor_of_the_logits_is_applied(scale):
    options = {"lm_head_multiplier": scale, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8}
    model = build("falcon_h1", {**options, "mamba_n_groups": 1, "mamba_d_state": 8, "initializer_range": 0.1}).train()
    assert logit_transform(model.config).scale == scale
    scored = LogProbModel()(model, collate_examples(examples(), packing=False), "none").logprobs
    torch.testing.assert_close(scored, one_by_one(model), rtol=0, atol=1e-5)


def test_soft_cap_far_above_the_logits_is_applied():
    """Without its cap of 30 this model's log-probs are off by 2e-4, less than a probe allows for rounding."""
    model = build("recurrent_gemma", {"initializer_range": 0.2}).train()
    batch = collate_examples(examples(), packing=False)
    scored = LogProbModel()(model, batch, "none").logprobs
    torch.testing.assert_close(scored, one_by_one(model), rtol=0, atol=1e-5)


def test_soft_caps_of_all_architectures_are_known():
    other = {"attn_logit_softcapping", "router_logit_softcapping", "moe_router_logit_softcapping"}  # not of the head
    names = set()
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            config = AutoConfig.for_model(kind).get_text_config()
        except Exception:  # some have no default configuration
            continue
        names |= {name for name in vars(config) if re.search("logit.*cap|cap.*logit", name)}
    assert {"final_logit_softcapping"} <= names - other <= set(SOFT_CAPS)


@pytest.mark.parametrize(("window", "ours"), [(None, True), (12, True), (4, False)])
def test_packed_batch_shares_one_mask_over_layers(window, ours):
    """SDPA would convert a boolean mask in every layer, and keep the result for the backward pass."""
    model = build("mistral", {"sliding_window": window}).train()
    masks, kept = [], {}
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(lambda m, a, k: masks.append(k["attention_mask"]), with_kwargs=True)
    batch = collate_examples(examples())
    square = batch.input_ids.shape[1] ** 2 * len(batch.input_ids)

    def keep(tensor):
        if tensor.numel() == square and tensor.dtype == torch.float32 and not tensor.requires_grad:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    logprob_model = LogProbModel()
    logprob_model.exactness(model)
    masks.clear()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logprob_model(model, batch, "sum")
    assert len({mask.data_ptr() for mask in masks}) == 1
    assert masks[0].dtype == (torch.float32 if ours else torch.bool)
    assert len(kept) == (1 if ours else len(masks))


def test_attention_mask_has_the_dtype_of_the_queries():
    """On a GPU, a mask of another dtype is an error."""
    allowed = torch.ones(1, 1, 2, 2, dtype=torch.bool).tril()
    model = build("llama", {})
    assert attention_bias(model, allowed).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention_bias(model, allowed).dtype == torch.bfloat16
    model.bfloat16()
    adapted = add_lora(model.requires_grad_(False), lora_config({"target_modules": "all-linear"}))
    bias = attention_bias(adapted.get_base_model(), allowed)
    assert bias.dtype == torch.bfloat16
    assert (bias == 0).tolist() == allowed.tolist()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ModelError, match=r"need attn_implementation .* or 'flex_attention', not 'flash_attention_2'"):
        attention_bias(model, allowed)


@pytest.mark.parametrize("name", UNPACKED)
def test_model_that_mixes_packed_rows_gets_unpacked_batches(name):
    model = build(name, UNPACKED[name], None)
    logprob_model = LogProbModel()
    with pytest.warns(UserWarning, match="doesn't keep packed sequences apart"):
        scored = logprob_model(model, collate_examples(examples()), "none")
    torch.testing.assert_close(scored.logprobs, one_by_one(model), rtol=0, atol=1e-4)


def test_logprobs_use_the_models_forward_for_unknown_heads():
    class Shifted(type(make_model())):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * torch.linspace(0.5, 2.0, out.logits.shape[-1])
            return out

    model = Shifted(make_model(100).config)
    logprob_model = LogProbModel()
    with pytest.warns(UserWarning, match="in an unknown way"):
        scored = logprob_model(model, collate_examples(examples()), "none")
    torch.testing.assert_close(scored.logprobs, one_by_one(model), rtol=0, atol=1e-4)


def is_plain(model, match):
    """Log-probabilities by the model's own forward pass match single examples, with one warning of the reason."""
    logprob_model = LogProbModel()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for packing in (True, False):
            scored = logprob_model(model, collate_examples(examples(), packing=packing), "none")
            torch.testing.assert_close(scored.logprobs, one_by_one(model), rtol=0, atol=1e-4)
            logprob_model(model, collate_examples(examples(), packing=packing), "sum").logprobs.backward()
    (why,) = [str(w.message) for w in caught if "its own forward pass is used" in str(w.message)]
    assert match in why
    assert "holds the logits of the whole batch" in why
    return logprob_model.exactness(model)


class Strange(type(make_model())):
    """A model whose backbone output is unusable and whose head is used twice."""

    def forward(self, input_ids, position_ids=None, **kwargs):
        backbone = self.__dict__.get("kept") or self.base_model
        hidden = backbone(input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
        return SimpleNamespace(logits=self.lm_head(hidden) + self.lm_head(hidden.flip(-1)))


def test_logprobs_use_plain_path_for_unknown_backbone_outputs(monkeypatch):
    model = Strange(make_model(100).config)
    own = type(model.model).forward
    model.kept = lambda *a, **k: own(model.model, *a, **k)
    monkeypatch.setattr(type(model.model), "forward", lambda self, **k: {"states": 0})
    known = is_plain(model, "fails on a fast path (AttributeError: 'dict' object has no attribute")
    assert (known.packing, known.rows, known.sharing) == (None, "any", "its own forward pass is used")


def test_logprobs_use_plain_path_for_a_head_that_is_used_twice():
    is_plain(Strange(make_model(100).config), "changes its logits after the head in an unknown way")


def test_nonfinite_model_is_distinguished_from_an_inexact_one():
    model = make_model(100)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    known = LogProbModel().exactness(model)
    assert "not finite" in known.head
    assert known.packing == known.sharing == known.head


@pytest.mark.parametrize("error", [KeyError("pixel_values"), AttributeError("image_outputs"), RuntimeError("shape")])
def test_model_whose_forward_fails_is_refused(error):
    class Broken(type(make_model())):
        def forward(self, *args, **kwargs):
            raise error

    with pytest.raises(ModelError, match=f"Broken: its own forward pass .* fails.*{type(error).__name__}"):
        LogProbModel()(Broken(make_model(100).config), collate_examples(examples()))


def test_model_that_needs_more_inputs_in_train_mode_is_refused():
    class Asking(type(make_model())):
        def forward(self, *args, **kwargs):
            if self.training:
                raise ValueError("`token_type_ids` are required when training")
            return super().forward(*args, **kwargs)

    model = Asking(make_model(100).config)
    model.base_model_prefix = ""  # so that the whole model is the backbone
    with pytest.raises(ModelError, match=r"Asking: its own forward pass .*token_type_ids"):
        LogProbModel()(model.train(), collate_examples(examples()))


def test_model_that_attends_to_later_tokens_is_refused():
    model = build("bert", {"is_decoder": False})
    with pytest.raises(ModelError, match="depends on the tokens after it, so it isn't a causal"):
        LogProbModel()(model, collate_examples(examples()))


@pytest.mark.parametrize("lora", [{}, {"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_adapted_head_is_used_and_trained(lora):
    model = add_lora(make_model(100), lora_config({"r": 2, "init_lora_weights": False, **lora}))
    want = one_by_one(model)
    want.sum().backward()
    expected = gradients(model)
    scored = completion_logprobs(model, collate_examples(examples()))
    torch.testing.assert_close(scored.logprobs, want, rtol=0, atol=1e-5)
    scored.logprobs.sum().backward()
    found = gradients(model)
    assert found.keys() == expected.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-3)


def test_logprobs_never_hold_all_logits():
    """The largest intermediate tensor has the rows of a chunk, not of the batch."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.size = max(self.size, out.numel())
            return out

    model = make_model(5000, tie=True)
    ids = torch.randint(3, 5000, (200,))
    batch = collate_examples([Example(ids, torch.ones(200, dtype=torch.bool))])
    weights = sum(p.numel() for p in [model.get_output_embeddings().weight])
    with Largest() as seen:
        completion_logprobs(model, batch, reduction="sum", chunk=16).logprobs.backward()
    assert seen.size <= max(weights, 16 * 5000)
    assert weights < 199 * 5000  # otherwise the bound above would be trivial
