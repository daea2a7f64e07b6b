"""The reference is the model at the start of training, and using it doesn't change the trained model."""

import contextlib

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny import make_model, make_tokenizer
from transformers import AutoModelForCausalLM

from lightning_ft import DPO
from lightning_ft.data.layout import Example, collate_examples
from lightning_ft.errors import ConfigError
from lightning_ft.models.adapt import add_lora, lora_config
from lightning_ft.models.generate import evaluating
from lightning_ft.models.head import base_of
from lightning_ft.models.logprob_model import LogProbModel
from lightning_ft.models.reference import INITIAL, Reference, active_adapter

LORA = {"r": 4, "lora_dropout": 0.2}


def batch():
    draw = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 400, (length,), generator=draw) for length in (9, 5, 12)]
    return collate_examples([Example(i, torch.ones(len(i), dtype=torch.bool)) for i in ids])


def logprobs(model):
    with evaluating(model):
        return LogProbModel()(model, batch()).logprobs


@pytest.fixture(scope="module")
def adapter_folder(tmp_path_factory):
    """A base, and a trained adapter over it."""
    folder = tmp_path_factory.mktemp("continued")
    make_model().save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = add_lora(base, lora_config({**LORA, "modules_to_save": ["lm_head"]}), seed=0)
    shake(model)
    model.save_pretrained(folder / "adapter")
    make_tokenizer().save_pretrained(folder / "adapter")
    return folder


def shake(model):
    """Change all trainable weights, as in training."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=draw)


KINDS = {
    "adapter_off": {"lora": LORA},
    "modules_to_save": {"lora": {**LORA, "modules_to_save": ["lm_head"]}},
    "dora": {"lora": {**LORA, "use_dora": True}},
    "pissa": {"lora": {**LORA, "init_lora_weights": "pissa"}},
    "olora": {"lora": {**LORA, "init_lora_weights": "olora"}},
    "copy": {},
    "continued": {},
}
EXPECTED = {"pissa": "initial_adapter", "olora": "initial_adapter", "continued": "initial_adapter", "copy": "copy"}


def make(kind, folder):
    """A module with its reference, and the expected log-probabilities."""
    name = str(folder / ("adapter" if kind == "continued" else "base"))
    module = DPO(name, dtype="float32", disable_dropout=False, **KINDS[kind])
    module.configure_model()
    original = AutoModelForCausalLM.from_pretrained(folder / "base")
    if kind == "continued":
        original = PeftModel.from_pretrained(original, name)
    return module, logprobs(original)


@pytest.mark.parametrize("kind", KINDS)
def test_reference_is_unaffected_by_training(kind, adapter_folder):
    module, expected = make(kind, adapter_folder)
    reference = module._ref.reference
    assert reference.mode == EXPECTED.get(kind, "adapter_off")
    with reference.use() as model:
        torch.testing.assert_close(logprobs(model), expected, rtol=0, atol=1e-5)
    shake(module.model)
    with reference.use() as model:
        torch.testing.assert_close(logprobs(model), expected, rtol=0, atol=1e-5)
    assert (logprobs(module.model) - expected).abs().max() > 0.05


def fails_in_the_middle(reference):
    with contextlib.suppress(ZeroDivisionError), reference.use() as model:
        assert not any(part.training for part in model.modules())
        assert not torch.is_grad_enabled()
        1 / 0  # noqa: B018
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_reference_does_not_change_the_model(kind, adapter_folder):
    module, _ = make(kind, adapter_folder)
    model = module.model
    shake(model)

    def state():
        adapter = model.active_adapter if isinstance(model, PeftModel) else None
        trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        return trains, {name: part.training for name, part in model.named_modules()}, adapter, logprobs(model).tolist()

    before = state()
    assert all(before[1].values())  # all modules are in train mode again, including dropout
    trained = [name for name, wanted in before[0].items() if wanted]
    assert not any(f".{INITIAL}." in name for name in trained)
    reference = fails_in_the_middle(module._ref.reference)
    assert state() == before
    assert not any(INITIAL in name or "copy" in name for name in module.checkpoint_names())
    assert (reference is model) == (module._ref.reference.mode != "copy")
    if reference is not model:
        assert not set(module.parameters()).intersection(reference.parameters())


@pytest.mark.parametrize("kind", ["adapter_off", "modules_to_save", "pissa", "continued"])
def test_export_excludes_the_reference_adapter(kind, adapter_folder, tmp_path):
    module, _ = make(kind, adapter_folder)
    shake(module.model)
    module.export(tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir() if file.is_dir()) == []
    names = load_file(tmp_path / "out" / "adapter_model.safetensors").keys()
    assert not any(INITIAL in name for name in names)
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(adapter_folder / "base"), str(tmp_path / "out")
    )
    torch.testing.assert_close(logprobs(plain), logprobs(module.model), rtol=0, atol=1e-5)
    module.export(tmp_path / "merged", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logprobs(merged), logprobs(module.model), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_reference_fingerprint_depends_on_its_weights(kind, adapter_folder):
    module, _ = make(kind, adapter_folder)
    reference = module._ref.reference
    first = reference.fingerprint()
    shake(module.model)
    assert reference.fingerprint() == first
    again, _ = make(kind, adapter_folder)
    assert again._ref.reference.fingerprint() == first
    with torch.no_grad():
        (reference._copy or [base_of(module.model)])[0].model.layers[1].mlp.down_proj.weight[3, 3] += 1e-3
    assert reference.fingerprint() != first


def test_reference_copies_a_loaded_model():
    model = make_model()
    module = DPO(model, tokenizer=make_tokenizer())
    module.configure_model()
    expected = logprobs(make_model())
    shake(module.model)
    assert module.model is model
    with module._ref.reference.use() as reference:
        torch.testing.assert_close(logprobs(reference), expected)


def test_reference_free_losses_make_no_copy(model_folder):
    for loss in ("simpo", "orpo", "sft", {"simpo": 1.0, "sft": 0.5}):
        module = DPO(model_folder, loss=loss)
        module.configure_model()
        assert module._ref is None


def test_reference_switches_to_another_adapter():
    model = add_lora(make_model(), lora_config(LORA), seed=0)
    shake(model)
    model.add_adapter("other", lora_config(LORA))
    for name, parameter in model.named_parameters():
        if ".other." in name:
            parameter.requires_grad_(True)  # both are trained, like a policy and its critic
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with active_adapter(model, "other"):
        assert model.active_adapter == "other"
    assert model.active_adapter == "default"
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trains


def test_reference_copy_is_prepared_before_use():
    prepared = []
    model = make_model()
    reference = Reference(model, prepare_copy=prepared.append)
    assert prepared == reference._copy
    assert not any(parameter.requires_grad for parameter in prepared[0].parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_trained_biases_of_the_base_are_refused_since_an_adapter_switched_off_keeps_them():
    model = add_lora(make_model(attention_bias=True), lora_config({"r": 2, "bias": "all"}), seed=0)
    with pytest.raises(ConfigError, match=r"8 weights outside of the adapter are trained .*q_proj.*Leave bias out"):
        Reference(model)
