"""Small runs of every method that are stopped, resumed and compared with the uninterrupted one."""

import contextlib
import os
import random
import signal
import sys

import numpy as np
import torch
from preference_runs import make_labeled, make_pairs
from tiny import make_rows
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

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
    RewardModeling,
)
from lightning_ft._lightning import Trainer, _pl

DROPOUT = {"r": 4, "lora_dropout": 0.3}  # so that resuming needs the random state too


def dice(completions, **columns):
    """A reward that draws from every random state that rewards may use."""
    draws = torch.rand(()), random.random(), np.random.rand()
    return [text.count("e") - 0.1 * len(text) + float(sum(draws)) for text in completions]


ROLLOUT = {
    "rewards": dice,
    "num_completions": 2,
    "max_new_tokens": 5,
    "epochs_per_rollout": 2,
    "steps_per_rollout": 2,
    "micro_batch_size": 3,
}
METHODS = {
    "full": (FullFineTuning, {}),
    "lora": (LoRAFineTuning, {"lora": DROPOUT}),
    "cached activations": (LoRAFineTuning, {"lora": DROPOUT, "top_layers": 1, "activation_cache": "states"}),
    "reward": (RewardModeling, {"lora": DROPOUT}),
    "dpo": (DPO, {}),
    "dpo precomputed": (DPO, {"lora": DROPOUT, "precompute_reference": True, "cache_dir": "reference"}),
    "kto": (KTO, {"lora": DROPOUT}),
    "grpo": (GRPO, {**ROLLOUT, "kl_coef": 0.05}),
    "ppo": (PPO, {**ROLLOUT, "kl_target": 0.5, "kl_horizon": 50}),
}
ROLLS_OUT = ("grpo", "ppo")


def make(method, model, folder, **options):
    """Module and data; five batches per epoch, three for policy-gradient methods."""
    kind, settings = METHODS[method]
    settings = dict(settings)
    for name in ("activation_cache", "cache_dir"):
        if name in settings:
            settings[name] = str(folder / settings[name])
    options = {"batch_size": 4, "cache_dir": False, **options}
    if kind in (FullFineTuning, LoRAFineTuning):
        rows = make_rows(20)
        mixed = {"mixing": [1.0, 0.5]} if options.pop("mixed", False) else {}
        train = [rows[:14], rows[14:]] if mixed else rows
        data = PairDataModule(train, validation=make_rows(24)[20:], **mixed, **options)
    elif kind in (GRPO, PPO):
        data = PromptDataModule(make_rows(9), validation=make_rows(11)[9:], **{**options, "batch_size": 3})
    else:
        rows = (make_labeled if method == "kto" else make_pairs)(24)
        data = PreferenceDataModule(rows[:20], validation=rows[20:], **options)
    return kind(model, learning_rate=1e-2, **settings), data


class Lines(_pl.loggers.logger.Logger):
    """Records logged metrics except for durations."""

    def __init__(self):
        super().__init__()
        self.lines = []

    name = version = "lines"

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        kept = {n: v for n, v in metrics.items() if not n.endswith(("second", "seconds"))}
        self.lines.append((step, kept))


class Stops(_pl.Callback):
    """Raises at the start of a batch after a number of batches."""

    def __init__(self, after):
        self.left = after

    def on_train_batch_start(self, *args):
        if self.left == 0:
            raise InterruptedError
        self.left -= 1


def train(module, data, options, *, callbacks=(), ckpt_path=None, logger=None, seed=0, **settings):
    """Fit with all random states seeded by `seed`, which must not affect a resumed run."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    settings = {"max_epochs": 3, "num_sanity_val_steps": 0, "log_every_n_steps": 1, **settings}
    settings["enable_checkpointing"] = any(isinstance(c, _pl.callbacks.Checkpoint) for c in callbacks)
    trainer = Trainer(**{**options, "callbacks": list(callbacks), "logger": logger or False, **settings})
    with contextlib.suppress(InterruptedError):
        trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


def end(trainer):
    """Steps, trained weights and optimizer state."""
    module = trainer.lightning_module
    state = {
        f"{key}.{name}": v
        for key, values in trainer.optimizers[0].state_dict()["state"].items()
        for name, v in values.items()
    }
    trained = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    return {
        "steps": torch.tensor(trainer.global_step),
        **trained,
        **{n: torch.as_tensor(v).clone() for n, v in state.items()},
    }


def differences(one, other):
    """Names of the values in which two ends differ."""
    assert one.keys() == other.keys()
    return [name for name, value in one.items() if not torch.equal(value, other[name])]


def killed(run, at=None):
    """Run in a process of its own, which is killed at its `at`-th event; how many there were, or None where it died.

    Events are what a kill may fall between: forward passes of modules, optimizer steps, and whatever is done to files.
    """
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        events = 0

        def count(*args):
            nonlocal events
            events += 1
            if events == at:
                os.kill(os.getpid(), signal.SIGKILL)

        status = 1
        try:
            register_module_forward_pre_hook(count)
            register_module_forward_hook(count)
            register_optimizer_step_pre_hook(count)
            register_optimizer_step_post_hook(count)
            sys.addaudithook(lambda event, args: count() if event.startswith(("open", "os.", "shutil.")) else None)
            run()
            os.write(write, str(events).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read) as pipe:
        made = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    return int(made) if status == 0 else None
