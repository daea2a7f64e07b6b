"""Sizes, models with random weights, rows and Trainers that the checks share."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

ROOT = Path(__file__).parents[2]
if str(ROOT / "benchmarks") not in sys.path:
    sys.path.append(str(ROOT / "benchmarks"))

from lightning_ft.data.layout import Example, TokenBatch, collate_examples  # noqa: E402

VARLEN = ("flash_attention_3", "flash_attention_2")
"""Attention implementations for sequences of different lengths in one row, the best one first."""


@dataclass(frozen=True)
class Size:
    """Shape of a model and of the work that it is measured with.

    Args:
        model: Arguments of the transformers configuration, `model_type` included.
        rows: Number of rows per optimizer step of supervised fine-tuning.
        prompt: Mean number of tokens per prompt.
        answer: Mean number of tokens per answer.
        warm: Number of steps before the measurement.
        timed: Number of measured steps.
        pairs: Number of preference pairs, or of prompts with groups, per step.
        group: Number of completions per prompt.
    """

    model: dict[str, Any]
    rows: int
    prompt: int
    answer: int
    warm: int
    timed: int
    pairs: int
    group: int


_QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": True,
}
_SMOLLM2 = {
    "model_type": "llama",
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
_TINY = {
    "model_type": "llama",
    "vocab_size": 3072,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
SIZES = {
    "qwen3-0.6b": Size(_QWEN3, rows=32, prompt=400, answer=112, warm=4, timed=8, pairs=8, group=8),
    "smollm2-135m": Size(_SMOLLM2, rows=64, prompt=400, answer=112, warm=4, timed=8, pairs=8, group=8),
    "tiny": Size(_TINY, rows=4, prompt=20, answer=8, warm=1, timed=2, pairs=2, group=2),
}


@dataclass(frozen=True)
class Setup:
    """Where the checks run, and on what.

    Args:
        device: ``cuda``, or ``cpu`` to find mistakes in the checks themselves.
        size: Key of :data:`SIZES`.
    """

    device: str = "cuda"
    size: str = "qwen3-0.6b"

    @property
    def work(self) -> Size:
        """The size."""
        return SIZES[self.size]

    @property
    def on_gpu(self) -> bool:
        """Whether the checks run on a GPU."""
        return self.device == "cuda"

    @property
    def precision(self) -> str:
        """Precision of Trainers."""
        return "bf16-mixed" if self.on_gpu else "32-true"

    @property
    def vocabulary(self) -> int:
        """Number of tokens in the vocabulary."""
        return int(self.work.model["vocab_size"])

    @property
    def attention(self) -> str:
        """Best attention for packed rows that can be trained with here."""
        return self.attentions()[0]

    def attentions(self) -> list[str]:
        """Attention implementations that packed rows can be trained with here, the best one first."""
        from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

        if not self.on_gpu:
            return ["sdpa", "eager"]
        found = {"flash_attention_3": is_flash_attn_3_available, "flash_attention_2": is_flash_attn_2_available}
        return [*(name for name in VARLEN if found[name]()), "flex_attention", "sdpa", "eager"]

    def model(
        self, *, attention: str = "sdpa", dtype: torch.dtype = torch.float32, layers: int | None = None
    ) -> PreTrainedModel:
        """Build the model with random weights, always the same, on the CPU in train mode.

        Args:
            attention: Attention implementation.
            dtype: Dtype of the weights.
            layers: Number of layers, where not all of them are needed.
        """
        shape = {**self.work.model, **({} if layers is None else {"num_hidden_layers": layers})}
        special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1}
        config = AutoConfig.for_model(shape.pop("model_type"), **shape, **special)
        torch.manual_seed(0)
        with torch.device(self.device):  # drawing half a billion numbers takes a CPU seconds
            built = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
        return built.train()

    def examples(self, count: int, *, spread: float = 0.6, seed: int = 0) -> list[Example]:
        """Draw rows of random tokens with log-normal lengths, whose answers are supervised."""
        from models import rows

        work = self.work
        drawn = rows(count, self.vocabulary, prompt=work.prompt, answer=work.answer, spread=spread, seed=seed)
        return [Example(row.input_ids[: self.longest], row.supervised[: self.longest]) for row in drawn]

    @property
    def longest(self) -> int:
        """Largest number of tokens per row."""
        return 8 * (self.work.prompt + self.work.answer)

    @property
    def tokens_per_step(self) -> int:
        """Average number of tokens per step."""
        return self.work.rows * (self.work.prompt + self.work.answer)

    def batches(self, steps: int, *, packing: bool = True) -> list[TokenBatch]:
        """Batches of the work's rows."""
        drawn = self.examples(steps * self.work.rows)
        parts = [drawn[i : i + self.work.rows] for i in range(0, len(drawn), self.work.rows)]
        return [collate_examples(part, packing=packing, pad_token_id=1) for part in parts]

    def trainer(self, **options: Any) -> Any:
        """Trainer that writes and prints nothing."""
        from training import silent_trainer

        accelerator = "gpu" if self.on_gpu else "cpu"
        return silent_trainer(**{"accelerator": accelerator, "precision": self.precision, **options})

    def fit(self, module: Any, batches: Sequence[Any], **options: Any) -> Any:
        """Train once on each batch, from pinned memory on a GPU; returns the Trainer."""
        from torch.utils.data import DataLoader

        kept = [batch.pin_memory() if self.on_gpu and isinstance(batch, TokenBatch) else batch for batch in batches]
        trainer = self.trainer(max_epochs=1, **options)
        trainer.fit(module, DataLoader(kept, batch_size=None))  # type: ignore[arg-type]
        return trainer

    def synchronize(self) -> None:
        """Wait until the device has done everything."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def described(self) -> dict[str, Any]:
        """Device, size and versions, for the report."""
        import peft
        import transformers
        import trl

        packages = {module.__name__: module.__version__ for module in (torch, transformers, peft, trl)}
        name = torch.cuda.get_device_name() if self.on_gpu and torch.cuda.is_available() else self.device
        return {"device": name, "size": self.size, "attentions": self.attentions(), **packages}


def lora_options() -> dict[str, Any]:
    """The adapter that both libraries train."""
    return {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}


def tokenizer() -> Any:
    """A tokenizer, which trainers require; no row is tokenized with it."""
    from lightning_ft.data.tokenizers import load_tokenizer

    return load_tokenizer(str(ROOT / "examples" / "tiny_base"))
