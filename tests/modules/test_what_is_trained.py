"""Parts of a model that a run trains, and the table that it logs; models with experts and towers."""

import copy
import logging

import pytest
import torch
from dpo_cases import PAIRS
from many_models import make, make_multimodal
from recording import RecordsGradients, RecordsLosses
from tiny import make_model, make_rows, make_tokenizer
from transformers import AutoModelForCausalLM

from lightning_ft import DPO, FullFineTuning, LoRAFineTuning, PairDataModule, PreferenceDataModule
from lightning_ft._lightning import Trainer
from lightning_ft.errors import ConfigError
from lightning_ft.models import adaptation
from lightning_ft.models.reach import Reach
from lightning_ft.models.router import OwnLoss
from lightning_ft.modules import base as base_module

ROWS = make_rows(8)
ASKED = {"output_router_logits": True, "router_aux_loss_coef": 0.5}


class RecordingFull(RecordsGradients, RecordsLosses, FullFineTuning):
    def log(self, name, value, **kwargs):
        if name == "train/router_loss":
            self.router_losses = [*getattr(self, "router_losses", []), value]
        super().log(name, value, **kwargs)


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.mark.parametrize("kind", [FullFineTuning, LoRAFineTuning])
def test_optimizer_parameters_all_get_gradients(fit, tokenizer, kind):
    class Watched(RecordsGradients, kind):
        pass

    module = Watched(make_multimodal("gemma3"), tokenizer=tokenizer)
    trainer = fit(module, ROWS, max_steps=2)
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for name, p in module.named_parameters() if name in module.steps[0]}
    assert not any("vision" in name or "projector" in name for name in module.steps[0])


def test_exported_adapter_excludes_the_tower(fit, tokenizer, tmp_path):
    from safetensors.torch import load_file

    base = make_multimodal("gemma3")
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    module = LoRAFineTuning(str(tmp_path / "base"), lora={"r": 2}, learning_rate=1e-2)
    fit(module, ROWS, max_steps=2)
    module.export(tmp_path / "out")
    assert not any("vision" in name for name in load_file(tmp_path / "out" / "adapter_model.safetensors"))
    again = LoRAFineTuning(str(tmp_path / "base"), adapter=str(tmp_path / "out"))
    assert again.generate(["where is my parcel"]) == module.generate(["where is my parcel"])


def test_layers_frozen_in_a_passed_model_stay_frozen(trainer_options, tokenizer):
    model = make_model()
    model.model.layers[0].requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    module = DPO(model, tokenizer=tokenizer, learning_rate=1e-2)
    data = PreferenceDataModule(PAIRS[:4], tokenizer=tokenizer, batch_size=2, cache_dir=False)
    with pytest.warns(UserWarning, match="are frozen, the first model.layers.0"):
        Trainer(**trainer_options, max_steps=2).fit(module, data)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".layers.0." not in name}


def test_checkpoint_of_a_half_frozen_model_is_read_where_the_model_is_loaded_by_name(fit, tokenizer, tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.model.layers[0].requires_grad_(False)
    model.model.layers[0].mlp.up_proj.weight.data.mul_(2)  # trained before, for example
    options = {"learning_rate": 1e-2, "lr_schedule": "constant"}
    trainer = fit(FullFineTuning(model, tokenizer=tokenizer, **options), ROWS, max_steps=1)
    trainer.save_checkpoint(path := tmp_path / "half.ckpt")
    saved = {name: p.detach().clone() for name, p in model.named_parameters()}
    loaded = FullFineTuning.load_from_checkpoint(path).model
    assert all(torch.equal(p, saved[name]) for name, p in loaded.named_parameters())
    again = FullFineTuning(str(tmp_path / "base"), **options)
    fit(again, ROWS, max_steps=2, ckpt_path=path)
    moved = {name for name, p in again.model.named_parameters() if not torch.equal(p, saved[name])}
    assert moved == {name for name in saved if ".layers.0." not in name}


def test_model_frozen_as_a_whole_is_trained(fit, tokenizer, recwarn):
    model = make_model().requires_grad_(False)
    fit(FullFineTuning(model, tokenizer=tokenizer), ROWS, max_steps=1)
    assert all(p.requires_grad for p in model.parameters())
    assert not [w for w in recwarn if "are frozen" in str(w.message)]


def test_model_passed_again_keeps_its_tower_frozen_without_a_warning(fit, tokenizer, recwarn):
    model = make_multimodal("gemma3")
    for _ in range(2):
        fit(FullFineTuning(model, tokenizer=tokenizer), ROWS, max_steps=1)
    assert {p.requires_grad for n, p in model.named_parameters() if "vision" in n} == {False}
    assert not [w for w in recwarn if "are frozen" in str(w.message)]


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}])
@pytest.mark.parametrize("kind", [FullFineTuning, LoRAFineTuning])
def test_probing_does_not_change_training(fit, tokenizer, monkeypatch, kind, options):
    def trained():
        torch.manual_seed(3)
        module = kind(make_model(dropout=0.2), tokenizer=tokenizer, learning_rate=1e-2, **options)
        fit(module, ROWS, max_steps=2)
        return {name: p.detach().clone() for name, p in module.named_parameters()}

    asked = trained()
    monkeypatch.setattr(adaptation, "find_reach", lambda model: Reach())
    monkeypatch.setattr(base_module, "find_own_loss", lambda model: OwnLoss())
    for name, value in trained().items():
        assert torch.equal(asked[name], value), name


@pytest.mark.parametrize("kind", [FullFineTuning, LoRAFineTuning])
def test_parts_table_is_logged_once(fit, tokenizer, caplog, kind):
    with caplog.at_level(logging.INFO):
        fit(kind(make_multimodal("gemma3"), tokenizer=tokenizer), ROWS, max_steps=1)
    caught = [record.getMessage() for record in caplog.records if "What is trained" in record.getMessage()]
    assert len(caught) == 1
    assert "encoders" in caught[0]
    assert "model.vision_tower: " in caught[0]


# ---------------------------------------------------------------- router loss


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "granitemoe"])
def test_router_loss_step_matches_transformers(fit, tokenizer, kind):
    model = make(kind, **ASKED)
    reference = copy.deepcopy(model)
    data = PairDataModule(ROWS[:4], tokenizer=tokenizer, batch_size=1, shuffle=False, cache_dir=False)
    data.setup("fit")
    batches = list(data.train_dataloader())
    aux = []
    total = sum(batch.num_targets for batch in batches)
    for batch in batches:
        labels = torch.full_like(batch.input_ids, -100)
        labels.view(-1)[batch.predictors + 1] = batch.targets
        own = reference(input_ids=batch.input_ids, labels=labels, use_cache=False)
        (own.loss * batch.num_targets / total).backward()
        aux.append(float(own.aux_loss) * batch.num_targets / total)
    expected = {f"model.{name}": p.grad for name, p in reference.named_parameters() if p.grad is not None}

    module = RecordingFull(model, tokenizer=tokenizer)
    fit(module, ROWS[:4], data={"batch_size": 1}, accumulate_grad_batches=4, max_steps=1)
    (have,) = module.steps
    assert have.keys() == expected.keys()
    for name, want in expected.items():
        torch.testing.assert_close(have[name], want, rtol=1e-3, atol=1e-5)
    assert module.router_losses == pytest.approx([sum(aux)], rel=1e-5)


def test_router_loss_is_logged_only_if_enabled(fit, tokenizer):
    asked = RecordingFull(make("mixtral", **ASKED), tokenizer=tokenizer)
    plain = RecordingFull(make("mixtral"), tokenizer=tokenizer)
    for module in (asked, plain):
        fit(module, ROWS, max_steps=1)
    assert asked.losses == pytest.approx(plain.losses, rel=1e-5)
    assert asked.router_losses
    assert not hasattr(plain, "router_losses")


def test_evaluation_excludes_the_router_loss(fit, tokenizer):
    found = []
    for options in (ASKED, {}):
        module = FullFineTuning(make("mixtral", **options), tokenizer=tokenizer, learning_rate=1e-12)
        found.append(float(fit(module, ROWS, data={"validation": 0.25}).callback_metrics["val/loss"]))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_activation_cache_refuses_a_router_loss(fit, tokenizer, tmp_path):
    lora = LoRAFineTuning(make("mixtral", **ASKED), tokenizer=tokenizer, top_layers=1, activation_cache=str(tmp_path))
    with pytest.raises(ConfigError, match="output_router_logits=False"):
        fit(lora, ROWS, max_steps=1)


def test_preference_modules_report_the_missing_router_loss(tokenizer, trainer_options, recwarn):
    module = DPO(make("mixtral", **ASKED), tokenizer=tokenizer, lora={"r": 2})
    data = PreferenceDataModule(PAIRS[:4], tokenizer=tokenizer, batch_size=2, cache_dir=False)
    Trainer(**trainer_options, max_steps=1).fit(module, data)
    caught = [str(w.message) for w in recwarn if "router loss" in str(w.message)]
    assert len(caught) == 1
    assert "is not part of DPO's loss" in caught[0]
