"""Runs of TRL's trainers and of our modules on the same rows in the same order, and checks that they agree."""

import datasets
import torch
from tiny import CHATML
from torch.utils.data import SequentialSampler
from transformers import get_scheduler

from lightning_ft import PreferenceDataModule
from lightning_ft._lightning import Trainer

STEPS = 20
TOLERANCE = 1e-5
# Nothing after the end token: TRL counts the tokens after it as part of the completion.
ENDING = CHATML.replace("{{- '\n' -}}{%- endfor -%}", "{%- endfor -%}")
LORA = {"r": 4, "lora_alpha": 8}


class InOrder:
    """Mixin for a TRL trainer: rows in order, unrounded losses of micro-batches, no step at learning rate 0."""

    def create_scheduler(self, num_training_steps, optimizer=None):
        """The schedule of transformers, shifted by one step."""
        self.lr_scheduler = schedule_from_second_step(self.args, num_training_steps, optimizer or self.optimizer)
        return self.lr_scheduler

    def _get_train_sampler(self, dataset=None):
        return SequentialSampler(dataset if dataset is not None else self.train_dataset)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.micro_losses = [*getattr(self, "micro_losses", []), loss.item()]
        return loss


def schedule_from_second_step(args, steps, optimizer):
    """The schedule of transformers from its second step on, for a run that is longer by one step of warmup.

    No step is then taken at learning rate 0, and both runs have the same learning rates, each by its own arithmetic.
    """
    schedule = get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=args.get_warmup_steps(steps) + 1,
        num_training_steps=steps + 1,
    )
    factor = schedule.lr_lambdas[0]
    for group in optimizer.param_groups:
        group.pop("initial_lr")
        group["lr"] = args.learning_rate
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step + 1))


def trl_settings(folder, *, batch_size, accumulation, learning_rate):
    """Arguments of TRL's configurations that match the settings of our runs."""
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
        "max_steps": STEPS,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 4,
        "weight_decay": 0.01,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def as_messages(rows):
    """Rows of strings as TRL's conversations."""
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant", "completion": "assistant"}
    return datasets.Dataset.from_list(
        [
            {name: [{"role": roles[name], "content": v}] if name in roles else v for name, v in row.items()}
            for row in rows
        ]
    )


def train_with_trl(trainer, accumulation):
    """Train with TRL, and return the loss of each step and the trained weights.

    AdamW amplifies gradients that are mostly rounding error. The A matrix of a new adapter has no gradient until B has
    changed, and then a tiny one. Learning rates are low enough to keep the effect far below the tolerance.
    """
    trainer.train()
    losses = torch.tensor(trainer.micro_losses, dtype=torch.float64).view(STEPS, accumulation).sum(1)
    return losses, {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}


def train_with_ours(module, rows, trainer_options, *, batch_size, accumulation):
    """Train our module, which records its losses, and return the same."""
    data = PreferenceDataModule(rows, batch_size=batch_size, shuffle=False, cache_dir=False)
    trainer = Trainer(**trainer_options, max_steps=STEPS, max_epochs=-1, accumulate_grad_batches=accumulation)
    trainer.fit(module, data)
    weights = {n.removeprefix("model."): p.detach() for n, p in module.named_parameters() if p.requires_grad}
    return torch.tensor(module.step_losses, dtype=torch.float64), weights


def assert_same(ours, theirs, *, learned):
    """Losses and weights agree, and the loss fell by `learned`, which shows that the runs trained at all."""
    (our_losses, our_weights), (their_losses, their_weights) = ours, theirs
    assert len(our_losses) == len(their_losses) == STEPS
    assert their_losses[-3:].mean() < their_losses[:3].mean() - learned
    torch.testing.assert_close(our_losses, their_losses, rtol=0, atol=TOLERANCE)
    assert our_weights.keys() == their_weights.keys()
    for name, expected in their_weights.items():
        # A gradient near 0 moves a weight by Adam's whole step, so a few show how the processor rounds.
        torch.testing.assert_close(
            our_weights[name], expected, rtol=0, atol=5 * TOLERANCE, msg=lambda m, name=name: f"{name}: {m}"
        )


def assert_same_metrics(module, trainer, names):
    """The metrics that both log under the same name agree at every step."""
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(history) == len(module.step_metrics) == STEPS
    for name in names:
        ours = torch.tensor([metrics[f"train/{name}"] for metrics in module.step_metrics])
        theirs = torch.tensor([entry[name] for entry in history])
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=TOLERANCE, msg=lambda m, name=name: f"{name}: {m}")
        assert ours.std() > 0, name
