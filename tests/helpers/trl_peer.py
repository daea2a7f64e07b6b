"""Runs of TRL's trainers and of ours on the same rows in the same order, and the comparison of what comes out."""

import datasets
import torch
from tiny import CHATML
from torch.utils.data import SequentialSampler
from transformers import get_scheduler

from lightning_ft import PreferenceDataModule
from lightning_ft._lightning import Trainer

STEPS = 20
TOLERANCE = 1e-5
# Nothing after the end token: TRL counts what a template writes there among the completion's tokens.
ENDING = CHATML.replace("{{- '\n' -}}{%- endfor -%}", "{%- endfor -%}")
LORA = {"r": 4, "lora_alpha": 8}


class InOrder:
    """Mixed into a trainer of TRL's: rows in their order, each micro-batch's loss unrounded, no step at rate 0."""

    def create_scheduler(self, num_training_steps, optimizer=None):
        """transformers' own schedule, one step on, of a run that is a step longer and warms up a step longer."""
        self.lr_scheduler = one_step_on(self.args, num_training_steps, optimizer or self.optimizer)
        return self.lr_scheduler

    def _get_train_sampler(self, dataset=None):
        return SequentialSampler(dataset if dataset is not None else self.train_dataset)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.micro_losses = [*getattr(self, "micro_losses", []), loss.item()]
        return loss


def one_step_on(args, steps, optimizer):
    """The schedule that transformers' own gives from its second step, so that no step is taken at rate 0.

    Both sides of a comparison then have the same rates, each by its own arithmetic.
    """
    theirs = get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=args.get_warmup_steps(steps) + 1,
        num_training_steps=steps + 1,
    )
    factor = theirs.lr_lambdas[0]
    for group in optimizer.param_groups:
        group.pop("initial_lr")
        group["lr"] = args.learning_rate
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step + 1))


def settings(folder, *, batch_size, accumulation, learning_rate):
    """Arguments of TRL's configurations that make its run ours."""
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


def by_trl(trainer, accumulation):
    """Train; the loss of each step, and the trained weights.

    AdamW makes noise of a gradient that is noise itself. A new adapter's A has no gradient before its B has moved, and
    a tiny one then: learning rates are chosen so low that this stays far below the tolerance.
    """
    trainer.train()
    losses = torch.tensor(trainer.micro_losses, dtype=torch.float64).view(STEPS, accumulation).sum(1)
    return losses, {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}


def by_us(module, rows, trainer_options, *, batch_size, accumulation):
    """The same of a module that records."""
    data = PreferenceDataModule(rows, batch_size=batch_size, shuffle=False, cache_dir=False)
    trainer = Trainer(**trainer_options, max_steps=STEPS, max_epochs=-1, accumulate_grad_batches=accumulation)
    trainer.fit(module, data)
    weights = {n.removeprefix("model."): p.detach() for n, p in module.named_parameters() if p.requires_grad}
    return torch.tensor(module.step_losses, dtype=torch.float64), weights


def assert_same(ours, theirs, *, learnt):
    """Losses and weights agree, and the loss fell by `learnt`, so that agreement means something."""
    (our_losses, our_weights), (their_losses, their_weights) = ours, theirs
    assert len(our_losses) == len(their_losses) == STEPS
    assert their_losses[-3:].mean() < their_losses[:3].mean() - learnt
    torch.testing.assert_close(our_losses, their_losses, rtol=0, atol=TOLERANCE)
    assert our_weights.keys() == their_weights.keys()
    for name, want in their_weights.items():
        torch.testing.assert_close(
            our_weights[name], want, rtol=0, atol=TOLERANCE, msg=lambda m, name=name: f"{name}: {m}"
        )


def assert_same_metrics(module, trainer, names):
    """What both log of a step under the same name agrees, at every step without accumulation."""
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(history) == len(module.step_metrics) == STEPS
    for name in names:
        ours = torch.tensor([figures[f"train/{name}"] for figures in module.step_metrics])
        theirs = torch.tensor([entry[name] for entry in history])
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=TOLERANCE, msg=lambda m, name=name: f"{name}: {m}")
        assert ours.std() > 0, name
