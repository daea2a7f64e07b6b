"""A LightningModule and a DataLoader as people write them, without anything of this package."""

import warnings

import torch
from peft import LoraConfig, get_peft_model
from tiny import make_model, make_rows
from torch.utils.data import DataLoader

from lightning_ft import PairDataModule
from lightning_ft._lightning import LightningModule, Trainer
from lightning_ft.modules.exact_resume import ExactResume


class Theirs(LightningModule):
    """A module as people write it."""

    def __init__(self, tokenizer=None, lora=True, dropout=0.0):
        super().__init__()
        self.tokenizer, self.model = tokenizer, make_model()
        if lora:
            config = LoraConfig(r=4, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
            torch.manual_seed(3)
            self.model = get_peft_model(self.model, config)
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = self.model(**batch).loss
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


class Resumable(ExactResume, Theirs):
    pass


def hf_loader(tokenizer, count=16, batch_size=4, shuffle=False):
    data = PairDataModule(make_rows(count), batch_size=1, batch_format="hf", tokenizer=tokenizer, shuffle=False)
    data.setup("fit")
    rows = [{name: value[0] for name, value in batch.items()} for batch in data.train_dataloader()]

    def collate(part):
        fill = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0, "labels": -100}
        return {
            name: torch.nn.utils.rnn.pad_sequence([row[name] for row in part], batch_first=True, padding_value=value)
            for name, value in fill.items()
        }

    return DataLoader(rows, batch_size=batch_size, shuffle=shuffle, collate_fn=collate)


def fit(trainer_options, module, loader, *callbacks, ckpt_path=None, **options):
    trainer = Trainer(callbacks=list(callbacks), **{"max_steps": 2, **trainer_options, **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, loader, ckpt_path=ckpt_path)
    return trainer
