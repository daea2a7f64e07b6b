"""Print the tables of `docs/scaling.md`: python docs/scaling_tables.py > tables.md.

They are computed from the shapes of models by `lightning_ft.planning`, and were not measured on GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from transformers import LlamaConfig, PreTrainedConfig

from lightning_ft.document.markdown import markdown_table
from lightning_ft.document.numbers import format_bytes, format_count, format_si
from lightning_ft.models.flops import formula_flops_per_token
from lightning_ft.models.head import CausalLM
from lightning_ft.planning.activations import activation_bytes
from lightning_ft.planning.ranks import Strategy, rank_memory, rank_traffic
from lightning_ft.planning.shapes import shape_model

_VOCABULARY = {"vocab_size": 128_256, "num_key_value_heads": 8, "max_position_embeddings": 131_072}
MODELS: dict[str, PreTrainedConfig] = {
    "1B": LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        tie_word_embeddings=True,
        **_VOCABULARY,
    ),
    "8B": LlamaConfig(
        hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32, **_VOCABULARY
    ),
    "70B": LlamaConfig(
        hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80, num_attention_heads=64, **_VOCABULARY
    ),
}
"""Shapes of Llama 3.2 1B, and Llama 3.1 8B and 70B."""

METHODS: dict[str, bool] = {"full": False, "LoRA": True}
COLUMNS: tuple[tuple[str, int, Strategy], ...] = (
    ("one GPU", 1, "ddp"),
    ("DDP, 8", 8, "ddp"),
    ("DDP, 1,024", 1024, "ddp"),
    ("FSDP2, 8", 8, "fsdp"),
    ("FSDP2, 64", 64, "fsdp"),
    ("FSDP2, 256", 256, "fsdp"),
    ("FSDP2, 1,024", 1024, "fsdp"),
)
LENGTH = 2048
POSITIONS = 8192


@cache
def model_of(size: str, method: str) -> CausalLM:
    """The weights of a model, without memory."""
    return shape_model(MODELS[size], METHODS[method])


def table(header: list[str], row: Callable[[str, str], list[str]]) -> str:
    """A table with a row per model and method."""
    rows = [[f"{size}, {method}", *row(size, method)] for size in MODELS for method in METHODS]
    return "\n".join(markdown_table(["", *header], rows))


def memory() -> str:
    """Bytes of a rank, without activations."""

    def row(size: str, method: str) -> list[str]:
        model = model_of(size, method)
        return [format_bytes(rank_memory(model, ranks, strategy).total) for _, ranks, strategy in COLUMNS]

    return table([name for name, *_ in COLUMNS], row)


def activations() -> str:
    """Bytes of activations per 1,024 positions."""

    def row(size: str, method: str) -> list[str]:
        found = [activation_bytes(MODELS[size], METHODS[method], sharded=sharded) for sharded in (False, True)]
        values = [each.kept for each in found] + [each.checkpointed for each in found]
        return [format_bytes(1024 * value) for value in values]

    return table(["DDP", "FSDP2", "DDP, checkpointing", "FSDP2, checkpointing"], row)


def traffic() -> str:
    """Bytes that a rank sends in an optimizer step of one micro-batch."""

    def row(size: str, method: str) -> list[str]:
        model = model_of(size, method)
        return [format_bytes(rank_traffic(model, ranks, strategy).total) for _, ranks, strategy in COLUMNS[1:]]

    return table([name for name, *_ in COLUMNS[1:]], row)


def intensity() -> str:
    """Operations per byte that a rank sends."""

    def row(size: str, method: str) -> list[str]:
        model = model_of(size, method)
        flops = formula_flops_per_token(model, LENGTH)
        sent = [rank_traffic(model, 1024, strategy).total for strategy in ("ddp", "fsdp")]
        return [format_si(flops, "FLOP"), *(format_count(flops * POSITIONS / each) for each in sent)]

    return table(["per position", "per byte, DDP on 1,024", "per byte, FSDP2 on 1,024"], row)


TABLES = (memory, activations, traffic, intensity)

if __name__ == "__main__":
    print("\n\n".join(make() for make in TABLES))
