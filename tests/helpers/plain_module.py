"""A LightningModule that isn't this package's, and rows for it."""

import torch

from lightning_ft._lightning import LightningModule
from lightning_ft.data.encode import encode_conversation
from lightning_ft.types import Message

WORDS = ("parcel", "lamp", "kettle", "invoice", "refund", "dog", "fox", "line")


class Plain(LightningModule):
    """Any LightningModule with a model and a tokenizer."""

    def __init__(self, model, tokenizer):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def batches(tokenizer):
    rows = [
        [Message(role="user", content=f"where is the {w}"), Message(role="assistant", content="here")] for w in WORDS
    ]
    return [encode_conversation(tokenizer, row).input_ids for row in rows]


def loader(tokenizer):
    return torch.utils.data.DataLoader(batches(tokenizer), batch_size=1)
