"""A LightningModule and a DataLoader as people write them, before anything of lightning_ft is added."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytorch_lightning as L
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer


class CausalLM(L.LightningModule):
    """A language model with an adapter."""

    def __init__(self, name: str, learning_rate: float = 2e-3) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        self.model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """The model's own loss."""
        loss = self.model(**batch).loss
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW on the adapter."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.learning_rate)


def make_loader(tokenizer: Any, path: str | Path, batch_size: int = 8, limit: int | None = None) -> DataLoader:
    """A DataLoader of questions and answers, padded to the longest of each batch."""
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()[:limit]]

    def collate(rows: list[dict[str, str]]) -> dict[str, torch.Tensor]:
        ids, labels = [], []
        for row in rows:
            turns = [{"role": "user", "content": row["input"]}]
            prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
            answer = tokenizer(row["output"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
            ids.append(torch.tensor(prompt + answer))
            labels.append(torch.tensor([-100] * len(prompt) + answer))
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
        return {
            "input_ids": padded,
            "attention_mask": torch.nn.utils.rnn.pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
            "labels": torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100),
        }

    return DataLoader(rows, batch_size=batch_size, shuffle=True, collate_fn=collate)
