"""Tokenizers with various chat templates; rows, files of rows, and DataModules that read them while training."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lightning_ft.data import module
from lightning_ft.data.pairs import PairDataModule
from lightning_ft.data.sampler import BatchPlan

_HEAD = "{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\n' -}}"
_TAIL = "{{- '\n' -}}{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
_MARKED = (
    "{%- if message.role == 'assistant' -%}"
    "{%- generation -%}{{- message.content + '<|im_end|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- message.content + '<|im_end|>' -}}{%- endif -%}"
)
_LLAMA = (
    "{{- bos_token -}}{%- for m in messages -%}"
    "{%- if m.role == 'system' -%}{{- raise_exception('System role not supported') -}}"
    "{%- elif m.role == 'user' -%}{{- '[INST] ' + m.content | trim + ' [/INST]' -}}"
    "{%- else -%}{{- ' ' + m.content | trim + eos_token -}}{%- endif -%}{%- endfor -%}"
)
_HEADERS_ONLY = (  # no token ends a turn
    "{%- for m in messages -%}{{- '<|im_start|>' + m.role + ': ' + m.content -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant: ' -}}{%- endif -%}"
)
TEMPLATES = {
    "chatml": _HEAD + _MARKED + _TAIL,
    "chatml_without_markers": _HEAD + "{{- message.content + '<|im_end|>' -}}" + _TAIL,
    "llama": _LLAMA,
    "headers_only": _HEADERS_ONLY,
    "drops_answers": _HEAD + "{%- if message.role != 'assistant' -%}{{- message.content -}}{%- endif -%}" + _TAIL,
    "changes_answers": _HEAD + _MARKED.replace("message.content + '<", "message.content | upper + '<") + _TAIL,
    "other_prompt": (_HEAD + _MARKED + _TAIL).replace("{%- generation", "{{- '<think></think>' -}}{%- generation"),
    "none": None,
}
_TEXT = [
    "the quick brown fox jumps over the lazy dog",
    "where is my parcel with the lamp",
    "refund Billing B-417 please answer in one line",
    "User: Assistant: user assistant system 0 1 2 3 4 5 6 7 8 9 plus is equal to what about the invoice of the kettle",
]


@pytest.fixture(scope="session")
def make_tokenizer():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|bos|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(_TEXT * 4, trainer)
    saved = core.to_str()

    def make(template="chatml", eos="<|im_end|>", pad="<|pad|>", bos="<|bos|>"):
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(saved), eos_token=eos, pad_token=pad, bos_token=bos
        )
        tokenizer.chat_template = TEMPLATES.get(template, template)
        return tokenizer

    return make


@pytest.fixture
def tokenizer(make_tokenizer):
    return make_tokenizer()


@pytest.fixture
def write(tmp_path):
    """Function that writes a file: bytes and text unchanged, a list of rows as JSONL."""

    def write(name, content):
        path = tmp_path / name
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


@pytest.fixture
def pairs():
    """24 different rows of different lengths."""
    words = ["parcel", "lamp", "kettle", "invoice", "refund", "dog", "fox", "line", "quick", "lazy", "brown", "answer"]
    return [
        {"input": f"where is the {words[n % 12]} {n}" + " please" * (n % 5), "output": f"{words[(n * 5) % 12]} {n}"}
        for n in range(24)
    ]


@pytest.fixture
def loader_of_rank(monkeypatch):
    """Function that returns the training loader of one of several ranks, which share batches of 8."""

    def loader(data, rank, ranks):
        def plan(*args, **options):
            return BatchPlan(*args, **{**options, "rank": rank, "world_size": ranks, "batch_size": 8 // ranks})

        monkeypatch.setattr(module, "BatchPlan", plan)
        data.setup("fit")
        return data.train_dataloader()

    return loader


@pytest.fixture
def preferences(pairs):
    """24 pairs whose tokens all differ between rows."""
    return [
        {"prompt": row["input"], "chosen": row["output"], "rejected": f"{n} nothing", "margin": n / 4}
        for n, row in enumerate(pairs)
    ]


@pytest.fixture
def labeled_completions(pairs):
    return [{"prompt": row["input"], "completion": row["output"], "label": n % 3 == 0} for n, row in enumerate(pairs)]


@pytest.fixture
def stream(tokenizer):
    def make(train, kind=PairDataModule, **options):
        options = {"tokenizer": tokenizer, "batch_size": 5, "cache_dir": False, "shuffle_buffer": 7, **options}
        return kind(train, **options)

    return make
