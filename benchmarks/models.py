"""Models with random weights, and tokenized rows of realistic lengths, which all benchmarks share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from lightning_ft.data.layout import Example, Segment, TokenBatch, lay_out
from lightning_ft.data.tokenizers import load_tokenizer

TOKENIZER = "examples/tiny_base"


@dataclass(frozen=True)
class Size:
    """The shape of a Llama-like model.

    Args:
        vocabulary: Number of tokens in the vocabulary.
        hidden: Width of the hidden states.
        layers: Number of layers.
        tied: Whether the head shares the weights of the embeddings.
        folder: Folder of a model with trained weights, whose shape this is; empty for random weights.
    """

    vocabulary: int = 32_000
    hidden: int = 256
    layers: int = 8
    tied: bool = True
    folder: str = ""

    @classmethod
    def of(cls, folder: str) -> Size:
        """The shape of a model in a folder."""
        config = AutoConfig.from_pretrained(folder)
        shape = (config.vocab_size, config.hidden_size, config.num_hidden_layers, config.tie_word_embeddings)
        return cls(*shape, folder=folder)

    @property
    def no_token(self) -> int:
        """An end token that is never generated, since its id is not in the vocabulary."""
        return self.vocabulary

    def __str__(self) -> str:
        name = f"{self.folder}, " if self.folder else ""
        return f"{name}vocabulary {self.vocabulary:,}, hidden {self.hidden}, {self.layers} layers"


UNTIED = Size(tied=False)
"""Size for generation: with tied embeddings, a model with random weights would repeat the last token forever."""


def model(size: Size, *, attention: str = "sdpa", seed: int = 0) -> LlamaForCausalLM:
    """Build a Llama in fp32, with the same random weights for the same seed, or load one."""
    if size.folder:
        loaded: LlamaForCausalLM = AutoModelForCausalLM.from_pretrained(
            size.folder, dtype=torch.float32, attn_implementation=attention
        )
        return loaded
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=int(size.hidden * 8 / 3) // 32 * 32,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 64,
        num_key_value_heads=size.hidden // 64,
        max_position_embeddings=8192,
        tie_word_embeddings=size.tied,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        attn_implementation=attention,
    )
    torch.manual_seed(seed)
    built = LlamaForCausalLM(config)
    built.generation_config.pad_token_id = 1
    return built


def tokenizer() -> PreTrainedTokenizerBase:
    """Load a tokenizer, which trainers require; no row is tokenized with it."""
    return load_tokenizer(TOKENIZER)


def lengths(count: int, mean: float, spread: float, generator: torch.Generator) -> list[int]:
    """Draw log-normal lengths of at least 2.

    Args:
        count: Number of lengths.
        mean: Mean length.
        spread: Standard deviation of the lengths' logarithm.
        generator: Source of randomness.
    """
    mu = torch.log(torch.tensor(mean)) - spread**2 / 2
    drawn = torch.exp(mu + spread * torch.randn(count, generator=generator))
    return [max(2, round(value)) for value in drawn.tolist()]


def one_row(examples: Sequence[Example]) -> TokenBatch:
    """Lay out all examples in a single packed row."""
    return lay_out([[Segment(example, group=i) for i, example in enumerate(examples)]])


def rows(
    count: int, vocabulary: int, *, prompt: float = 170, answer: float = 35, spread: float = 0.6, seed: int = 0
) -> list[Example]:
    """Draw pairs of random tokens, with log-normal lengths; the answers are supervised."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for prompt_length, answer_length in zip(
        lengths(count, prompt, spread, generator), lengths(count, answer, spread, generator), strict=True
    ):
        ids = torch.randint(2, vocabulary, (prompt_length + answer_length,), generator=generator)  # 0 and 1 are special
        examples.append(Example(ids, torch.arange(len(ids)) >= prompt_length))
    return examples
