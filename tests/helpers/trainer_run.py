"""A module with its rows and a Trainer in a folder, and what the features of a Trainer are checked with."""

import io

import torch
from preference_runs import make_pairs
from tiny import make_model, make_rows, make_tokenizer
from tiny_scorer import make_scorer

from lightning_ft import (
    DPO,
    GRPO,
    KTO,
    PPO,
    FullFineTuning,
    LoRAFineTuning,
    PairDataModule,
    PreferenceDataModule,
    PromptDataModule,
    PromptDistillation,
    RewardModeling,
)
from lightning_ft._lightning import Trainer, _pl

BATCHES = 4
MODULES = {
    "full": FullFineTuning,
    "lora": LoRAFineTuning,
    "distillation": PromptDistillation,
    "reward": RewardModeling,
    "dpo": DPO,
    "kto": KTO,
    "grpo": GRPO,
    "ppo": PPO,
}
"""Classes by the name of a column."""


def length(completion_ids, **_):
    return [len(ids) / 8 for ids in completion_ids]


class Run:
    """A module, its rows, and a Trainer in a folder.

    Args:
        name: One of `MODULES`.
        folder: Folder of the run.
        changed: Function that derives the module's class from the given one.
    """

    def __init__(self, name, folder, changed=lambda kind: kind):
        self.name, self.folder = name, folder
        self.sampled = name in ("grpo", "ppo")
        self.monitor = "val/reward" if self.sampled else "val/loss"
        options = {"tokenizer": make_tokenizer(), "learning_rate": 1e-2, "lr_schedule": "constant", "warmup_ratio": 0.0}
        if self.sampled:
            options |= {"rewards": length, "max_new_tokens": 4}
        if name == "grpo":
            options |= {"num_completions": 2}
        if name == "ppo":
            options |= {"epochs_per_rollout": 1, "steps_per_rollout": 1}
        if name == "distillation":
            options |= {"prompt": {"system": "be brief"}, "max_new_tokens": 4}
        self.options = options
        self.kind = changed(MODULES[name])
        self.module = self.new()
        self.data = self.new_data()

    def new(self):
        return self.kind(make_scorer() if self.name == "reward" else make_model(), **self.options)

    def new_data(self, batch_size=2):
        settings = {"cache_dir": False, "batch_size": batch_size}
        if self.name in ("full", "lora"):
            rows = make_rows(20)
            return PairDataModule(rows[:8], validation=rows[8:12], test=rows[12:16], **settings)
        if self.sampled or self.name == "distillation":
            rows = [{"prompt": row["input"]} for row in make_rows(12)]
            return PromptDataModule(rows[:8], validation=rows[8:10], test=rows[10:], **settings)
        rows = make_pairs(12)
        return PreferenceDataModule(rows[:8], validation=rows[8:10], test=rows[10:], **settings)

    def trainer(self, *callbacks, **options):
        quiet = {
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "max_epochs": 1,
            "num_sanity_val_steps": 0,
        }
        if options.get("barebones"):
            quiet = {"max_epochs": 1}
        fixed = {"accelerator": "cpu", "devices": 1, "default_root_dir": str(self.folder)}
        options = {**fixed, **quiet, **({"callbacks": list(callbacks)} if callbacks else {}), **options}
        return Trainer(**options)

    def fit(self, *callbacks, ckpt_path=None, module=None, **options):
        trainer = self.trainer(*callbacks, **options)
        trainer.fit(module or self.module, self.data, ckpt_path=ckpt_path)
        return trainer


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def content(batch):
    """The tensors of a batch, as bytes."""
    file = io.BytesIO()
    torch.save(batch, file)
    return file.getvalue()


class Seen(_pl.Callback):
    """Records batches, validations, gradient norms after clipping, and learning rates."""

    def __init__(self):
        self.batches, self.validations, self.norms, self.rates = [], 0, [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.batches.append(content(batch))

    def on_validation_end(self, trainer, module):
        self.validations += 1

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        if gradients:
            self.norms.append(float(torch.nn.utils.get_total_norm(gradients)))
