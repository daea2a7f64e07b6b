"""A module with one parameter that records its batches."""

import torch

from lightning_ft._lightning import LightningModule


class Recorder(LightningModule):
    def __init__(self, tokenizer=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.tokenizer = tokenizer
        self.seen = []
        self.loaded = False

    def configure_model(self):
        self.loaded = True

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch.input_ids.tolist(), batch.targets.tolist()))
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.seen.append(("validation", batch.num_targets))

    def test_step(self, batch, batch_idx):
        self.seen.append(("test", batch.num_targets))

    def predict_step(self, batch, batch_idx):
        return batch

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class BatchRecorder(Recorder):
    """Records whole batches and their splits."""

    def training_step(self, batch, batch_idx):
        self.seen.append(("train", batch))
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.seen.append(("validation", batch))

    def test_step(self, batch, batch_idx):
        self.seen.append(("test", batch))
