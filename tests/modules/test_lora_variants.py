"""Every LoRA variant of PEFT: training, checkpoints, exports, and reloading in plain PEFT."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import make_model, make_rows, make_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lightning_ft import FullFineTuning, LoRAFineTuning, PairDataModule, PreferenceDataModule, RewardModeling
from lightning_ft._lightning import Trainer, _pl
from lightning_ft.errors import ConfigError, ExportError, ModelError
from lightning_ft.models.load import load_causal_lm

ROWS = make_rows(24)
PROMPTS = [row["input"] for row in ROWS[:4]]
VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "eva": {"init_lora_weights": "eva", "eva_config": {"rho": 1.0}},
    "eva_moves_ranks": {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "rank_pattern": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 16}},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "on_the_head": {"target_modules": ["q_proj", "lm_head"]},
    "on_the_embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "some_layers": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "with_bias": {"lora_bias": True},
}


def logits_of_plain_peft(base, folder, ids):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(folder)).eval()(ids).logits


COVERED = ("rslora", "gaussian", "orthogonal", "pissa_niter", "some_layers")  # covered by similar variants


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in COVERED else []) for name in VARIANTS]
)
@torch.no_grad()
def test_lora_variant_trains_and_reloads(fit, model_folder, tmp_path, name):
    module = LoRAFineTuning(model_folder, lora={"r": 4, **VARIANTS[name]}, learning_rate=1e-2, dtype="float32")
    with torch.enable_grad():
        trainer = fit(module, ROWS, max_epochs=4)
    assert module.model.active_peft_config.r == 4
    ids = torch.randint(4, 300, (2, 12))
    module.model.eval()
    live = module.model(ids).logits
    with module.model.disable_adapter():
        untrained = module.model(ids).logits
    assert float((live - untrained).abs().max()) > 1e-2

    exported = module.export(tmp_path / "adapter")
    torch.testing.assert_close(logits_of_plain_peft(model_folder, exported, ids), live, rtol=1e-4, atol=1e-4)
    assert all(file.suffix not in (".bin", ".pt") for file in exported.iterdir())

    if name == "with_bias":  # the base has no bias to merge it into
        with pytest.raises(ExportError, match="unmerged"):
            module.export(tmp_path / "merged", merge=True)
        return
    merged = module.export(tmp_path / "merged", merge=True)
    plain = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    torch.testing.assert_close(plain(ids).logits, live, rtol=1e-3, atol=1e-3)

    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = LoRAFineTuning.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    torch.testing.assert_close(again.model.eval()(ids).logits, live, rtol=0, atol=1e-5)
    assert again.generate(PROMPTS) == module.generate(PROMPTS)


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_export_of_adapters_that_change_the_base_fits_the_original_base(fit, model_folder, tmp_path, name):
    """At rank 4 the variant removes four directions from the base, so the export needs rank 8 to restore them."""
    module = LoRAFineTuning(model_folder, lora={"r": 4, **VARIANTS[name]}, learning_rate=1e-2, dtype="float32")
    fit(module, ROWS)
    folder = module.export(tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == 8
    assert config["init_lora_weights"] is True

    again = module.export(tmp_path / "again")  # ExportModel exports twice: the last and the best weights
    assert (again / "adapter_config.json").read_text() == (folder / "adapter_config.json").read_text()
    first, second = (load_file(made / "adapter_model.safetensors") for made in (folder, again))
    assert all(torch.equal(second[key], value) for key, value in first.items())


@torch.no_grad()
def test_loftq_export_is_merged(fit, model_folder, tmp_path, monkeypatch):
    """PEFT computes LoftQ on CUDA only, so a plain implementation of its rounding is used here."""

    def rounded(weight, num_bits, reduced_rank, num_iter):
        step = weight.abs().max() / 2 ** (num_bits - 1)
        quantized = (weight / step).round() * step
        u, s, v = torch.linalg.svd(weight - quantized, full_matrices=False)
        root = s[:reduced_rank].sqrt()
        return quantized, root[:, None] * v[:reduced_rank], u[:, :reduced_rank] * root

    monkeypatch.setattr("peft.tuners.lora.layer.loftq_init", rounded)
    lora = {"r": 4, "init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}
    module = LoRAFineTuning(model_folder, lora=lora, learning_rate=1e-2, dtype="float32")
    with torch.enable_grad():
        trainer = fit(module, ROWS)
    ids = torch.randint(4, 300, (2, 12))
    live = module.model.eval()(ids).logits
    with pytest.raises(ExportError, match="merge=True"):
        module.export(tmp_path / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(module.export(tmp_path / "merged", merge=True), dtype=torch.float32)
    torch.testing.assert_close(merged.eval()(ids).logits, live, rtol=1e-3, atol=1e-3)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = LoRAFineTuning.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    torch.testing.assert_close(again.model.eval()(ids).logits, live, rtol=0, atol=1e-5)


@pytest.mark.parametrize("quantization", ["4bit", "8bit", {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}])
def test_qlora_trains_over_a_quantized_base(fit, tmp_path, quantization):
    pytest.importorskip("bitsandbytes")
    make_model(hidden=64).save_pretrained(tmp_path / "base")  # quantized blocks hold 64 weights
    make_tokenizer().save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    module = LoRAFineTuning(base, quantization=quantization, lora={"r": 4}, learning_rate=1e-2)
    trainer = fit(module, ROWS, max_epochs=4)
    assert trainer.callback_metrics["train/loss"] < 3.5
    assert "bit" in type(module.model.get_base_model().model.layers[0].self_attn.q_proj.base_layer).__name__
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = LoRAFineTuning.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    again.configure_model()
    assert again.generate(PROMPTS) == module.generate(PROMPTS)
    folder = module.export(tmp_path / "adapter")
    assert load_file(folder / "adapter_model.safetensors")
    with pytest.raises(ExportError, match="quantized"):
        module.export(tmp_path / "merged", merge=True)


def test_quantized_checkpoint_is_not_trained_without_an_adapter(fit, tmp_path):
    pytest.importorskip("bitsandbytes")
    make_model(hidden=64).save_pretrained(tmp_path / "base")
    model = load_causal_lm(str(tmp_path / "base"), quantization="4bit")
    model.save_pretrained(tmp_path / "4bit")
    make_tokenizer().save_pretrained(tmp_path / "4bit")
    for each in (str(tmp_path / "4bit"), model):  # quantized by its configuration, or as it was passed
        module = FullFineTuning(each, tokenizer=make_tokenizer())
        with pytest.raises(ModelError, match=r"14 of 21 parameters of the LlamaForCausalLM are integers.*Train an ada"):
            fit(module, ROWS, max_steps=1)
    fit(LoRAFineTuning(str(tmp_path / "4bit"), lora={"r": 2}), ROWS, max_steps=1)
    for other in ("8bit", {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}):
        with pytest.raises(
            ModelError, match=r"are quantized already, with (load_in_4bit=True|bnb_4bit_quant_type=nf4)"
        ):
            load_causal_lm(str(tmp_path / "4bit"), quantization=other)
    load_causal_lm(str(tmp_path / "4bit"), quantization="4bit")


def test_checkpoints_in_4_bits_are_not_repacked_in_evaluation(tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    make_model(hidden=64).save_pretrained(tmp_path / "base")
    load_causal_lm(str(tmp_path / "base"), quantization="4bit").save_pretrained(tmp_path / "4bit")
    model = load_causal_lm(str(tmp_path / "4bit")).eval()  # quantized by its configuration, not by an argument
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            assert not module.support_avx512bf16_for_cpu  # whether this CPU would repack or not
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7]]))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("optimizer", ["loraplus", "lorafa"])
def test_lora_optimizers_train_only_the_adapter(fit, model_folder, optimizer):
    module = LoRAFineTuning(model_folder, lora={"r": 4}, optimizer=optimizer, learning_rate=1e-3, dtype="float32")
    module.configure_model()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    fit(module, ROWS)
    changed = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert any("lora_B" in name for name in changed)
    assert any("lora_A" in name for name in changed) == (optimizer == "loraplus")  # LoRA-FA freezes A
    assert not any("lora_" not in name for name in changed)
    rates = {group["lr"] for group in module.optimizers().param_groups}
    assert len(rates) == (1 if optimizer == "lorafa" else 2) or rates == {0.0}
    if optimizer == "loraplus":
        assert sorted(module.lr_schedulers().base_lrs)[-1] == pytest.approx(16e-3)


def test_lorafa_resumes_and_loads(fit, model_folder, tmp_path):
    options = {"lora": {"r": 4}, "optimizer": "lorafa", "learning_rate": 1e-2}
    whole, resumed = (LoRAFineTuning(model_folder, **options) for _ in range(2))
    saver = _pl.callbacks.ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, filename="{epoch}")
    fit(whole, ROWS, max_epochs=2, callbacks=[saver], enable_checkpointing=True)
    fit(resumed, ROWS, max_epochs=2, ckpt_path=tmp_path / "epoch=0.ckpt")
    loaded = LoRAFineTuning.load_from_checkpoint(tmp_path / "epoch=1.ckpt", seed=1)  # its own A would be another
    for name, value in whole.named_parameters():
        assert torch.equal(resumed.get_parameter(name), value), name
        assert torch.equal(loaded.get_parameter(name), value), name


def test_lora_on_a_tied_head_keeps_it_tied(fit, tmp_path):
    make_model(tie=True).save_pretrained(tmp_path / "tied")
    make_tokenizer().save_pretrained(tmp_path / "tied")
    base = str(tmp_path / "tied")
    module = LoRAFineTuning(base, lora={"r": 4, "modules_to_save": ["lm_head"]}, learning_rate=1e-2, dtype="float32")
    fit(module, ROWS)
    model = module.model.get_base_model()
    assert model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    ids = torch.randint(4, 300, (2, 12))
    folder = module.export(tmp_path / "adapter")
    with torch.no_grad():
        live = module.model.eval()(ids).logits
        torch.testing.assert_close(logits_of_plain_peft(base, folder, ids), live, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["as the model", "as the adapter"])
def test_lora_continues_an_adapter(fit, model_folder, tmp_path, how):
    first = LoRAFineTuning(model_folder, lora={"r": 4}, learning_rate=1e-2, dtype="float32")
    fit(first, ROWS)
    folder = str(first.export(tmp_path / "first"))
    given = {"model": folder} if how == "as the model" else {"model": model_folder, "adapter": folder}
    second = LoRAFineTuning(**given, learning_rate=1e-2, dtype="float32")
    second.configure_model()
    assert second.generate(PROMPTS) == first.generate(PROMPTS)
    start = load_file(f"{folder}/adapter_model.safetensors")
    fit(second, ROWS)
    end = load_file(second.export(tmp_path / "second") / "adapter_model.safetensors")
    assert start.keys() == end.keys()
    assert all(not torch.equal(start[name], end[name]) for name in start)


def test_lora_accepts_a_peft_config_and_checkpoints_plain_values(fit, model_folder, tmp_path):
    config = LoraConfig(r=3, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights="olora")
    trainer = fit(LoRAFineTuning(model_folder, lora=config), ROWS)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    hyper = torch.load(tmp_path / "a.ckpt", weights_only=True)["hyper_parameters"]
    assert hyper["lora"]["r"] == 3
    assert hyper["lora"]["init_lora_weights"] == "olora"
    assert sorted(hyper["lora"]["target_modules"]) == ["q_proj", "v_proj"]


def test_eva_resumes_with_its_ranks(fit, model_folder, tmp_path):
    lora = {"r": 4, "init_lora_weights": "eva"}  # by default, PEFT redistributes ranks
    whole, first, resumed = (LoRAFineTuning(model_folder, lora=lora, learning_rate=1e-2) for _ in range(3))
    fit(whole, ROWS, max_epochs=2)
    assert whole.model.active_peft_config.rank_pattern
    saver = _pl.callbacks.ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    fit(first, ROWS, max_epochs=2, callbacks=[saver], enable_checkpointing=True)
    fit(resumed, ROWS, max_epochs=2, ckpt_path=tmp_path / "step=4.ckpt")
    for name, value in whole.named_parameters():
        assert torch.equal(dict(resumed.named_parameters())[name], value), name


@pytest.mark.parametrize("before", ["validate", "generate", "load_state_dict"])
def test_eva_initializes_an_adapter_that_was_loaded_before_the_fit(fit, model_folder, trainer_options, before):
    class Start(_pl.callbacks.Callback):
        def on_train_start(self, trainer, module):
            self.a = {name: p.detach().clone() for name, p in module.named_parameters() if "lora_A" in name}

    def start(prepare):
        module, callback = LoRAFineTuning(model_folder, lora={"r": 4, "init_lora_weights": "eva"}), Start()
        prepare(module)
        trainer = fit(module, ROWS, callbacks=[callback], max_steps=1)
        trainer.save_checkpoint(f"{trainer_options['default_root_dir']}/a.ckpt")
        return callback.a

    def validate(module):
        Trainer(**trainer_options).validate(module, PairDataModule(ROWS, validation=ROWS[:2]), verbose=False)

    def trained(module):
        module.configure_model()
        module.load_state_dict({n: p + 1 for n, p in module.named_parameters() if "lora_" in n}, strict=False)

    expected = start(lambda module: None)
    prepare = {
        "validate": validate,
        "generate": lambda m: m.generate(["where is the lamp"]),
        "load_state_dict": trained,
    }
    found = start(prepare[before])
    same = {name: p.shape for name, p in found.items()} == {name: p.shape for name, p in expected.items()}
    same = same and all(torch.equal(found[name], p) for name, p in expected.items())
    assert same == (before != "load_state_dict")  # weights that were trained elsewhere stay


def test_eva_needs_a_datamodule(trainer_options, model_folder, fit):
    module = LoRAFineTuning(model_folder, lora={"init_lora_weights": "eva"})
    data = PairDataModule(ROWS, tokenizer=module.tokenizer, cache_dir=False)
    data.setup("fit")
    with pytest.raises(ConfigError, match="DataModule"):
        Trainer(**trainer_options, max_steps=1).fit(module, data.train_dataloader())


@pytest.mark.parametrize("second", [FullFineTuning, LoRAFineTuning])
def test_a_loaded_model_that_another_module_has_adapted_is_refused(fit, second):
    base, tokenizer = make_model(), make_tokenizer()
    fit(LoRAFineTuning(base, tokenizer=tokenizer), ROWS, max_steps=1)
    with pytest.raises(ModelError, match=r"holds layers of an adapter \(the first is model\.layers\.0\."):
        fit(second(base, tokenizer=tokenizer), ROWS, max_steps=1)


def test_lora_rejects_unknown_targets_and_missing_adapters(fit, model_folder, tmp_path):
    with pytest.raises(ModelError, match="nowhere_proj"):
        fit(LoRAFineTuning(model_folder, lora={"target_modules": ["nowhere_proj"]}), ROWS)
    with pytest.raises(ConfigError, match="leave out lora="):
        LoRAFineTuning(model_folder, adapter=str(tmp_path), lora={"r": 2})
    with pytest.raises(ModelError, match="No adapter could be loaded"):
        fit(LoRAFineTuning(model_folder, adapter=str(tmp_path)), ROWS)


def test_lora_rejects_unknown_modules_to_save_and_names_unknown_targets(fit, model_folder):
    with pytest.raises(ModelError, match=r"has no module 'lm_hed'.* Did you mean 'lm_head'\?"):
        fit(LoRAFineTuning(model_folder, lora={"r": 2, "modules_to_save": ["lm_hed"]}), ROWS, max_steps=1)
    with pytest.warns(UserWarning, match=r"no module named 'v_porj', so only the others .* Did you mean 'v_proj'\?"):
        fit(LoRAFineTuning(model_folder, lora={"r": 2, "target_modules": ["q_proj", "v_porj"]}), ROWS, max_steps=1)


@pytest.mark.parametrize("as_dict", [False, True])
def test_a_saved_configuration_can_be_trained_with(trainer_options, model_folder, tmp_path, as_dict):
    """PEFT saves `inference_mode`, and for classification names of heads of which a model has one."""
    model = AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=1)
    adapted = get_peft_model(model, LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["inference_mode"] is True
    assert set(saved["modules_to_save"]) == {"classifier", "score"}
    lora = saved if as_dict else LoraConfig.from_pretrained(tmp_path)
    module = RewardModeling(model_folder, lora=lora, dtype="float32")
    rows = [{"prompt": row["input"], "chosen": row["output"], "rejected": "no"} for row in ROWS]
    Trainer(**trainer_options, max_steps=1).fit(module, PreferenceDataModule(rows, batch_size=4))
    trained = {name for name, parameter in module.model.named_parameters() if parameter.requires_grad}
    assert any("score" in name for name in trained)
    assert any("lora_A" in name for name in trained)


def test_merged_export_generates_in_transformers(fit, model_folder, tmp_path):
    module = LoRAFineTuning(model_folder, lora={"r": 4}, learning_rate=1e-2, dtype="float32")
    fit(module, ROWS, max_epochs=10)
    folder = module.export(tmp_path / "merged", merge=True)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for prompt, answer in zip(PROMPTS, module.generate(PROMPTS), strict=True):
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=False)
        out = model.generate(ids, max_new_tokens=64, do_sample=False, attention_mask=torch.ones_like(ids))
        assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == answer
