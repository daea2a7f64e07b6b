"""Small tokenizers, models and rows for tests."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\n' -}}"
    "{%- if message.role == 'assistant' -%}{%- generation -%}"
    "{{- message.content + '<|im_end|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- message.content + '<|im_end|>' -}}{%- endif -%}{{- '\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
TEXT = [
    "the quick brown fox jumps over the lazy dog",
    "where is my parcel with the lamp",
    "refund Billing B-417 please answer in one line",
    "user assistant system 0 1 2 3 4 5 6 7 8 9 plus is equal to what about the invoice of the kettle",
]


def make_tokenizer(template=CHATML, eos="<|im_end|>", pad="<|pad|>", bos=None):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|bos|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(TEXT * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=eos,
        pad_token=pad,
        bos_token=bos,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


def make_model(vocab_size=400, *, layers=2, hidden=32, seed=0, dropout=0.0, tie=False, **options):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tie,
        attention_dropout=dropout,
        initializer_range=0.2,  # large enough for mistakes in attention to show
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
        **options,
    )
    return LlamaForCausalLM(config)


def make_rows(count=24):
    words = ["parcel", "lamp", "kettle", "invoice", "refund", "dog", "fox", "line", "quick", "lazy", "brown", "answer"]
    return [
        {"input": f"where is the {words[n % 12]} {n}" + " please" * (n % 5), "output": f"{words[(n * 5) % 12]} {n % 7}"}
        for n in range(count)
    ]
