"""Parts for models that this package doesn't train itself: compiled, encoder-decoders, classifiers, PEFT's methods."""

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from their_module import Theirs, fit, hf_loader
from tiny import make_model, make_rows
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from lightning_ft import (
    AnswerQuality,
    ExportModel,
    PairDataModule,
    PromptBaseline,
    Retention,
    RetentionFrontier,
    TokenMeanAccumulation,
    TokenSavings,
)
from lightning_ft._lightning import Callback
from lightning_ft.errors import ConfigError, ExportError, LightningFTError
from lightning_ft.models.unwrap import model_of
from lightning_ft.types import Message, Request

REQUESTS = [
    Request(str(n), (Message(role="user", content=row["input"]),), row["output"]) for n, row in enumerate(make_rows(3))
]
SIZES = {"vocab_size": 400, "num_heads": 2, "num_layers": 1, "d_model": 16, "d_kv": 8, "d_ff": 32}


def encoder_decoder():
    torch.manual_seed(0)
    config = T5Config(**SIZES, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, dropout_rate=0.0)
    return T5ForConditionalGeneration(config)


def classifier():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(vocab_size=400, num_labels=3, **sizes, **dropout))


def module_of(model, tokenizer=None):
    module = Theirs(tokenizer)
    module.model = model
    return module


def batches(labels):
    ids = torch.arange(5, 13)[None]
    return DataLoader([{"input_ids": ids + n, "labels": each} for n, each in enumerate(labels)], batch_size=None)


SEQUENCES = [torch.tensor([[7, 8, 9, 10, 11]]), torch.tensor([[12, -100]]), torch.tensor([[13, 14, 15]])]
CLASSES = [torch.tensor([0]), torch.tensor([2]), torch.tensor([1])]


# ---------------------------------------------------------------- finding the model


def test_model_is_found_in_torch_compile_and_under_other_attributes():
    model = make_model()

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.module, self.model = nn.Linear(2, 2), model

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = model

    assert model_of(torch.compile(model)) is model
    assert model_of(module_of(torch.compile(model))) is model
    assert model_of(Both()) is model
    assert model_of(module_of(Wrapper())) is model
    assert model_of(nn.DataParallel(Both())) is model


def test_compiled_model_is_exported_and_answers(trainer_options, tokenizer, tmp_path):
    module = module_of(torch.compile(make_model(), backend="eager"), tokenizer)
    quality = AnswerQuality("exact", requests=REQUESTS, max_new_tokens=2, progress=False)
    fit(trainer_options, module, hf_loader(tokenizer, 8), quality, ExportModel(str(tmp_path)), max_steps=1)
    assert quality.result is not None
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "last")
    assert torch.equal(loaded.lm_head.weight, model_of(module).lm_head.weight)


def test_tokenizer_of_another_type_is_refused_before_training(trainer_options, tokenizer, tmp_path):
    export = ExportModel(str(tmp_path / "out"), tokenizer="a name")
    with pytest.raises(ConfigError, match="ExportModel: the tokenizer is a str, expected one of transformers"):
        fit(trainer_options, Theirs(tokenizer), hf_loader(tokenizer), export)


def test_tokenizer_may_be_loaded_in_setup_of_the_module(trainer_options, tokenizer, tmp_path):
    class Late(Theirs):
        def setup(self, stage):
            self.tokenizer = tokenizer

    texts, few = ["where is my parcel with the lamp"], {"resamples": 9, "output_dir": False}
    callbacks = [
        AnswerQuality("exact", requests=REQUESTS, max_new_tokens=2),
        TokenSavings(PromptBaseline("answer"), requests=REQUESTS, max_new_tokens=2, timed_requests=0, **few),
        Retention(texts, **few),
        RetentionFrontier(texts, requests=REQUESTS, max_new_tokens=2, scales=(0.5, 1), **few),
    ]
    fit(trainer_options, Late(), hf_loader(tokenizer), *callbacks)
    assert all(each.result is not None and not each.failures for each in callbacks)
    for each in callbacks:  # a module that never gets one is refused before training
        with pytest.raises(LightningFTError, match="has no tokenizer"):
            fit(trainer_options, module := Theirs(), hf_loader(tokenizer), each)
        assert not module.losses


# ---------------------------------------------------------------- PEFT


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"), "b"),
        (IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"), "default"),
        (LoHaConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"), "default"),
        (PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "default"),
    ],
    ids=["LoRA of another name", "IA3", "LoHa", "prompt tuning"],
)
def test_adapters_of_other_methods_and_names_are_exported(
    trainer_options, tokenizer, tmp_path, model_folder, config, name
):
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    module = module_of(get_peft_model(base, config, adapter_name=name), tokenizer)
    fit(trainer_options, module, hf_loader(tokenizer), ExportModel(str(tmp_path)))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), tmp_path / "last")
    ids = torch.arange(5, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(ids).logits, module.model.eval()(ids).logits)
    method = {"b": "LoRA"}.get(name, config.peft_type.value.replace("_", " ").lower())
    assert f"{method} adapter for" in (tmp_path / "last" / "README.md").read_text()


def test_merge_of_an_adapter_that_is_no_change_of_weights_is_refused_before_training(
    trainer_options, tokenizer, tmp_path
):
    module = module_of(
        get_peft_model(make_model(), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")), tokenizer
    )
    with pytest.raises(ExportError, match="can't merge an adapter of the method PROMPT_TUNING"):
        fit(trainer_options, module, hf_loader(tokenizer), ExportModel(str(tmp_path), merge=True))
    assert not module.losses


# ---------------------------------------------------------------- encoder-decoders and classifiers


@pytest.mark.parametrize("make", [encoder_decoder, classifier])
def test_token_mean_counts_labels_that_are_not_shifted(trainer_options, make):
    labels = SEQUENCES if make is encoder_decoder else CLASSES

    class Keep(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            self.gradients = {n: p.grad.clone() for n, p in module.model.named_parameters() if p.grad is not None}

    keep, loader = Keep(), batches(labels)
    fit(
        trainer_options,
        module_of(make()),
        loader,
        TokenMeanAccumulation(),
        keep,
        max_steps=1,
        accumulate_grad_batches=3,
    )
    expected, counts = make().train(), [int((each != -100).sum()) for each in labels]
    losses = [expected(**batch).loss * count for batch, count in zip(loader, counts, strict=True)]
    (sum(losses) / sum(counts)).backward()
    assert keep.gradients
    for name, gradient in keep.gradients.items():
        torch.testing.assert_close(gradient, expected.get_parameter(name).grad, rtol=1e-4, atol=1e-6)


def test_token_mean_takes_the_count_of_batches_that_have_one(trainer_options, tokenizer):
    """Batches of this package's DataModules have it with any model; their tokens are no labels."""
    rows = PairDataModule(make_rows(4), batch_size=2, tokenizer=tokenizer, cache_dir=False)
    model = make_model().model  # a backbone, with a head of the module's own
    counts = []

    class Headed(Theirs):
        def training_step(self, batch, batch_idx):
            counts.append((callback._tokens, batch.num_targets))
            return self.model(input_ids=batch.input_ids).last_hidden_state.square().mean()

    module, callback = Headed(), TokenMeanAccumulation()
    module.model = model
    fit(trainer_options, module, rows, callback)
    assert counts
    assert all(counted == targets for counted, targets in counts)


def test_token_mean_refuses_one_label_per_row_of_an_unknown_model(trainer_options, tokenizer):
    module = module_of(nn.ModuleList([classifier()]))
    module.training_step = lambda batch, index: module.model[0](**batch).loss
    with pytest.raises(ConfigError, match=r"have the shape \(1,\), one per row as for a classifier"):
        fit(trainer_options, module, batches(CLASSES), TokenMeanAccumulation())


@pytest.mark.parametrize("make", [encoder_decoder, classifier])
@pytest.mark.parametrize(
    "measuring",
    [
        lambda: AnswerQuality("exact", requests=REQUESTS),
        lambda: TokenSavings(PromptBaseline("answer"), requests=REQUESTS, output_dir=False),
        lambda: Retention(["a general text of some words"], output_dir=False),
    ],
    ids=["AnswerQuality", "TokenSavings", "Retention"],
)
def test_measurements_of_answers_refuse_other_models_before_training(trainer_options, tokenizer, make, measuring):
    module = module_of(make(), tokenizer)
    with pytest.raises(LightningFTError, match="needs a causal language model, which continues a prompt"):
        fit(trainer_options, module, batches(CLASSES if make is classifier else SEQUENCES), measuring())
    assert not module.losses


@pytest.mark.parametrize("merge", [False, True])
def test_export_of_a_classifier_with_several_labels(trainer_options, tokenizer, tmp_path, merge):
    classifier().save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    module = module_of(adapted, tokenizer)
    fit(trainer_options, module, batches(CLASSES), ExportModel(str(tmp_path / "out"), merge=merge))
    card = (tmp_path / "out" / "last" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace('"last"', repr(str(tmp_path / "out" / "last")))
    names = {"base": tmp_path / "base"}
    exec(code.replace('base = "base"', "").split("inputs =")[0], names)
    ids = torch.arange(5, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(names["model"](ids).logits, adapted.eval()(ids).logits, rtol=1e-4, atol=1e-5)


def test_card_of_an_encoder_decoder_loads_it(trainer_options, tokenizer, tmp_path):
    module = module_of(encoder_decoder(), tokenizer)
    fit(trainer_options, module, batches(SEQUENCES), ExportModel(str(tmp_path / "out")))
    card = (tmp_path / "out" / "last" / "README.md").read_text()
    assert "AutoModelForSeq2SeqLM.from_pretrained" in card
    assert "output[0], skip" in card  # the answer alone, not after the prompt
