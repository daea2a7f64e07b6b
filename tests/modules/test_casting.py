"""Casts of a module by the Trainer's precision: what stays exact, in training, in exports and on resuming."""

import pytest
import torch
from tiny import make_rows
from transformers import AutoModelForCausalLM

from lightning_ft import FullFineTuning, LoRAFineTuning

ROWS = make_rows(8)


def test_casting_keeps_the_frequencies_of_rotary_positions(fit, model_folder):
    module = LoRAFineTuning(model_folder, lora={"target_modules": ["q_proj"]})
    fit(module, ROWS, max_steps=1, precision="bf16-true")
    loaded = AutoModelForCausalLM.from_pretrained(model_folder).get_buffer("model.rotary_emb.inv_freq")
    found = {name: buffer for name, buffer in module.named_buffers() if name.endswith("inv_freq")}
    assert found
    assert all(torch.equal(buffer, loaded) and buffer.dtype == torch.float32 for buffer in found.values())


def test_casting_trains_the_model_that_is_exported(fit, model_folder, tmp_path):
    module = FullFineTuning(model_folder, learning_rate=1e-3)
    fit(module, ROWS, max_steps=1, precision="bf16-true")
    module.export(tmp_path / "out")
    ids = torch.randint(3, 300, (1, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")(ids).logits
        assert torch.equal(module.model.eval()(ids).logits, exported)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_casting_keeps_what_transformers_loads_in_float32(fit, routed_folder, dtype):
    module = LoRAFineTuning(routed_folder, dtype=dtype, lora={"target_modules": ["q_proj"]}, learning_rate=1e-12)
    fit(module, ROWS, max_steps=1, precision="bf16-true")
    loaded = AutoModelForCausalLM.from_pretrained(routed_folder, dtype=torch.bfloat16)
    trained = module.model.get_base_model()
    for expected, found in zip(loaded.model.layers, trained.model.layers, strict=True):
        for name, tensor in expected.mlp.gate.state_dict().items():
            assert found.mlp.gate.state_dict()[name].dtype == torch.float32
            assert torch.equal(found.mlp.gate.state_dict()[name], tensor)
    ids = torch.randint(3, 300, (1, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(module.model.eval()(ids).logits, loaded(ids).logits)


def test_casting_rounds_a_router_that_is_trained(fit, routed_folder):
    module = FullFineTuning(routed_folder)
    fit(module, ROWS, max_steps=1, precision="bf16-true")
    gate = module.model.model.layers[0].mlp.gate
    assert (gate.weight.dtype, gate.e_score_correction_bias.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(("dtype", "precision"), [("float32", "64-true"), ("bfloat16", "16-true")])
def test_casting_after_loading_a_checkpoint_rounds_no_weight(fit, model_folder, tmp_path, dtype, precision):
    module = FullFineTuning(model_folder, dtype=dtype, learning_rate=1e-3)
    trainer = fit(module, ROWS, max_steps=1, precision=precision)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    restored = {}

    class Watched(FullFineTuning):
        def on_train_start(self):
            super().on_train_start()
            restored.update({name: p.detach().clone() for name, p in self.named_parameters()})

    options = {"max_steps": 2, "precision": precision, "ckpt_path": tmp_path / "run.ckpt"}
    fit(Watched(model_folder, dtype=dtype, learning_rate=1e-3), ROWS, **options)
    assert all(torch.equal(restored[name], p) for name, p in module.named_parameters())
