"""Export as GGUF: read back by transformers, for each architecture and type, from modules and callbacks; refusals."""

import warnings

import pytest
import torch
from tiny import make_model, make_rows, make_tokenizer
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lightning_ft import ExportModel, FullFineTuning, LoRAFineTuning, PairDataModule
from lightning_ft._lightning import Trainer
from lightning_ft.errors import ExportError
from lightning_ft.models import gguf_export
from lightning_ft.models.gguf_export import FILE_NAME, export_gguf

SIZES = {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_theta=5000.0, tie_word_embeddings=True)),
    "llama untied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False, head_dim=32)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=128, tie_word_embeddings=True)),
}


QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def tokenizer_of(name):
    """A tokenizer that splits text as those of the architecture do."""
    tokenizer = make_tokenizer()
    if name.startswith("qwen"):
        split = pre_tokenizers.Split(Regex(QWEN), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def make(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases and norms that aren't all 0 or 1
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_file_that_is_read_back_has_the_same_logits(name, tmp_path):
    model, tokenizer = make(name), tokenizer_of(name)
    assert export_gguf(model, tokenizer, tmp_path, dtype="f32") == 1.0
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=FILE_NAME).eval()
    ids = torch.arange(4, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_smaller_types_agree_and_take_less_space(tmp_path, dtype):
    model, tokenizer = make("llama"), make_tokenizer()
    share = export_gguf(model, tokenizer, tmp_path, dtype=dtype)
    assert share >= gguf_export.MIN_AGREEMENT[dtype]
    written = (tmp_path / FILE_NAME).stat().st_size
    whole = sum(p.numel() * 4 for p in model.parameters())
    assert written < 0.75 * whole


def test_tokenizer_and_template_are_in_the_file(tmp_path):
    tokenizer = make_tokenizer()
    export_gguf(make("llama"), tokenizer, tmp_path, dtype="f16")
    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file=FILE_NAME)
    turns = [{"role": "user", "content": "where is the lamp"}]
    rendered = [t.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) for t in (tokenizer, read)]
    assert rendered[0] == rendered[1]
    assert read(rendered[0])["input_ids"] == tokenizer(rendered[0])["input_ids"]
    assert (read.eos_token, read.pad_token) == (tokenizer.eos_token, tokenizer.pad_token)


@pytest.mark.parametrize("module_type", [LoRAFineTuning, FullFineTuning])
def test_modules_and_callback_export_it(model_folder, tmp_path, trainer_options, module_type):
    module = module_type(model_folder, dtype="float32", learning_rate=1e-2)
    data = PairDataModule(make_rows(16), batch_size=8, cache_dir=False)
    export = ExportModel(str(tmp_path / "out"), format="gguf", gguf_dtype="f32")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Trainer(max_steps=3, callbacks=[export], **trainer_options).fit(module, data)
    folder = tmp_path / "out" / "last"
    assert [path.name for path in folder.iterdir()] == [FILE_NAME]
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE_NAME).eval()
    ids = torch.arange(4, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, module.model.eval()(ids).logits, rtol=1e-3, atol=1e-3)
    module.export(folder, overwrite=True)  # as a folder again
    assert not (folder / FILE_NAME).exists()


def test_file_that_disagrees_is_refused_and_not_left_behind(model_folder, tmp_path, monkeypatch):
    module = FullFineTuning(model_folder)
    monkeypatch.setattr(gguf_export, "_reordered", lambda values, heads: values)  # as if forgotten
    with pytest.raises(ExportError, match=r"finds the model's own token most probable at .* expected at least 98%"):
        module.export(tmp_path / "out", format="gguf")
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_what_cannot_be_written_is_refused(model_folder, tmp_path, trainer_options):
    tokenizer = make_tokenizer()
    sizes = {**SIZES, "head_dim": 16}
    with pytest.raises(ExportError, match="supports llama, mistral, qwen2, qwen3; Gemma2ForCausalLM is 'gemma2'"):
        export_gguf(Gemma2ForCausalLM(Gemma2Config(**sizes)), tokenizer, tmp_path)
    with pytest.raises(ExportError, match=r"attention windows \(sliding_window=8\)"):
        export_gguf(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)), tokenizer, tmp_path)
    scaled = LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(ExportError, match="scaled positions"):
        export_gguf(LlamaForCausalLM(scaled), tokenizer, tmp_path)
    spaced = make_tokenizer()
    spaced.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(ExportError, match="adds a space before each text"):
        export_gguf(make_model(), spaced, tmp_path)
    with pytest.raises(ExportError, match="dtype='int4': a GGUF export writes f32, f16, bf16, q8_0"):
        export_gguf(make_model(), tokenizer, tmp_path, dtype="int4")
    unread = Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=32))  # transformers reads Qwen3 with 128 only
    with pytest.raises(ExportError, match=r"transformers can't read model.gguf back"):
        export_gguf(unread, tokenizer_of("qwen3"), tmp_path)
    for options, refused in (
        ({"gguf_dtype": "int4"}, "gguf_dtype='int4'"),
        ({"tokenizer": spaced}, "adds a space before each text"),
    ):
        module = FullFineTuning(model_folder, tokenizer=options.pop("tokenizer", None))
        export = ExportModel(str(tmp_path / "out"), format="gguf", **options)
        trainer = Trainer(max_steps=1, callbacks=[export], **trainer_options)
        with pytest.raises(ExportError, match=refused):
            trainer.fit(module, PairDataModule(make_rows(8), cache_dir=False))
        assert trainer.global_step == 0  # before training
    with pytest.raises(ExportError, match="format='onnx': expected 'safetensors' or 'gguf'"):
        FullFineTuning(model_folder).export(tmp_path / "x", format="onnx")
