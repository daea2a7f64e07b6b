"""Models with random weights, and tokenised rows with the lengths of real ones, for every benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from lightning_ft.data.layout import Example, Segment, TokenBatch, lay_out
from lightning_ft.data.tokenizers import load_tokenizer

TOKENIZER = "examples/tiny_base"


@dataclass(frozen=True)
class Size:
    """The shape of a Llama-like model.

    Args:
        vocabulary: Tokens that it knows.
        hidden: Width.
        layers: Depth.
        tied: Whether the head is the embeddings.
    """

    vocabulary: int = 32_000
    hidden: int = 256
    layers: int = 8
    tied: bool = True

    @property
    def no_token(self) -> int:
        """An end token that is never written, because the model has no such token."""
        return self.vocabulary

    def __str__(self) -> str:
        return f"vocabulary {self.vocabulary:,}, hidden {self.hidden}, {self.layers} layers"


UNTIED = Size(tied=False)
"""For generation: with tied embeddings random weights would write the last token for ever, whatever went before."""


def model(size: Size, *, attention: str = "sdpa", seed: int = 0) -> LlamaForCausalLM:
    """A Llama of a size, with the same random weights for the same seed; fp32."""
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
    made = LlamaForCausalLM(config)
    made.generation_config.pad_token_id = 1
    return made


def tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer, which trainers want to have; no row is tokenised with it."""
    return load_tokenizer(TOKENIZER)


def lengths(count: int, mean: float, spread: float, generator: torch.Generator) -> list[int]:
    """Log-normal lengths of at least 2.

    Args:
        count: How many.
        mean: Of them.
        spread: Standard deviation of their logarithm.
        generator: Where the chance comes from.
    """
    mu = torch.log(torch.tensor(mean)) - spread**2 / 2
    drawn = torch.exp(mu + spread * torch.randn(count, generator=generator))
    return [max(2, round(value)) for value in drawn.tolist()]


def one_row(examples: Sequence[Example]) -> TokenBatch:
    """All examples side by side in a single packed row."""
    return lay_out([[Segment(example, group=i) for i, example in enumerate(examples)]])


def rows(
    count: int, vocabulary: int, *, prompt: float = 170, answer: float = 35, spread: float = 0.6, seed: int = 0
) -> list[Example]:
    """Tokenised pairs of random tokens, with log-normal lengths; the answers are supervised."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for asked, answered in zip(
        lengths(count, prompt, spread, generator), lengths(count, answer, spread, generator), strict=True
    ):
        ids = torch.randint(2, vocabulary, (asked + answered,), generator=generator)  # 0 and 1 are special
        made.append(Example(ids, torch.arange(len(ids)) >= asked))
    return made
