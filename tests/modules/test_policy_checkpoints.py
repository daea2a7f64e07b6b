"""Checkpoints of policy-gradient modules: exact resuming and contents."""

import random
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from policies import BATCHES, LORA, PREDRAWN, Policy, by_tokens, make
from predrawn_rollouts import (
    Records,
    draw_prompts,
    run,
    weights,
)
from tiny import make_rows
from transformers import AutoModelForCausalLM

from lightning_ft import GRPO, PPO, PromptDataModule
from lightning_ft._lightning import Trainer, _pl
from lightning_ft.errors import ConfigError
from lightning_ft.models.adapt import add_lora, lora_config


def by_length_and_dice(completions, **columns):
    return [text.count("e") - 0.1 * len(text) + random.random() for text in completions]


@pytest.fixture
def adapter_folder(model_folder, tokenizer, tmp_path):
    """A trained adapter to continue, whose reference is its initial state, not its base."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype="float32")
    model = add_lora(model, lora_config({**LORA, "init_lora_weights": False}), seed=4)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


RLOO = {"loss_type": "rloo", "kl_coef": 0.05}
ADAPTIVE = {"kl_target": 0.5, "kl_horizon": 50}
RESUMED = {
    "grpo": (GRPO, {"kl_coef": 0.05}),
    "grpo-lora": (GRPO, {"kl_coef": 0.05, "lora": LORA}),
    "grpo-continued": (GRPO, {"kl_coef": 0.05}),
    "rloo": (GRPO, RLOO),
    "rloo-lora": (GRPO, {**RLOO, "lora": LORA}),
    "ppo": (PPO, ADAPTIVE),
    "ppo-lora": (PPO, {**ADAPTIVE, "lora": LORA}),
    "ppo-adapter": (PPO, {"critic": "adapter", "lora": LORA}),
}


@pytest.mark.parametrize(
    "which",
    [
        name if name in ("rloo-lora", "grpo-continued") else pytest.param(name, marks=pytest.mark.slow)
        for name in RESUMED
    ],
)
def test_policy_run_resumes_exactly(which, model_folder, adapter_folder, trainer_options, tmp_path):
    """Three rollouts of four steps per epoch; stops within the first and the second rollout."""
    base, options = RESUMED[which]

    class Sampling(Records, base):  # with AdamW
        pass

    def fit(ckpt_path=None, callbacks=()):
        module = Sampling(
            adapter_folder if "continued" in which else model_folder,
            rewards=by_length_and_dice,
            num_completions=2,
            max_new_tokens=5,
            epochs_per_rollout=2,
            steps_per_rollout=2,
            micro_batch_size=3,
            learning_rate=1e-2,
            **options,
        )
        rows = make_rows(9)
        data = PromptDataModule(rows, validation=rows[:2], batch_size=3, cache_dir=False)
        trainer = Trainer(
            **{**trainer_options, "enable_checkpointing": bool(callbacks)},
            max_epochs=2,
            callbacks=list(callbacks),
        )
        trainer.fit(module, data, ckpt_path=ckpt_path)
        assert trainer.global_step == 24
        return module

    torch.manual_seed(1)
    saver = _pl.callbacks.ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=8, save_top_k=-1, filename="{step}")
    whole = fit(callbacks=[saver])
    assert len(whole.samples) == 6
    for step in (8, 16):
        torch.manual_seed(2)  # earlier random draws of the process must not matter
        random.seed(2)
        resumed = fit(ckpt_path=tmp_path / f"step={step}.ckpt")
        assert resumed.samples == whole.samples[step // 4 :]
        for a, b in zip(resumed.advantages, whole.advantages[step // 4 :], strict=True):
            assert torch.equal(a, b)
        ours, theirs = weights(resumed), weights(whole)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        states = [module.optimizers().optimizer.state_dict()["state"] for module in (resumed, whole)]
        for key, state in states[1].items():
            assert all(torch.equal(states[0][key][name], value) for name, value in state.items())
        if "kl_target" in options:
            assert resumed.kl_coef == whole.kl_coef != 0.05


@pytest.mark.parametrize("how", ["full", "lora", "pissa", "continued"])
def test_policy_checkpoint_contains_trainable_weights_only(
    how, model_folder, adapter_folder, trainer_options, tmp_path
):
    """Checkpoints exclude the reference, including a reference adapter."""
    lora = {"lora": LORA, "pissa": {"r": 4, "init_lora_weights": "pissa"}}.get(how)
    folder = adapter_folder if how == "continued" else model_folder
    options = {"lora": lora, "kl_coef": 0.1, "num_completions": 3, "max_new_tokens": 9, "learning_rate": 1e-2}
    options |= {"warmup_ratio": 0.0}
    module = GRPO(folder, rewards=by_tokens, **options)
    kl = []
    measure = module.measure

    def measured(rollout_batch):
        measure(rollout_batch)
        before = rollout_batch.old_logprobs or rollout_batch.sampling_logprobs
        pairs = zip(before, rollout_batch.ref_logprobs, strict=True)
        kl.append(max(float((a - b).abs().max()) for a, b in pairs))

    module.measure = measured
    trainer = run(module, BATCHES, trainer_options)
    assert kl[0] < 1e-4  # the reference is the initial model
    assert kl[1] > 1e-4
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    held = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert held.keys() == weights(module).keys()
    assert all(how == "full" or ".default." in name for name in held)
    again = GRPO.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True, model=folder, rewards=by_tokens)
    assert all(torch.equal(weights(again)[name], value) for name, value in held.items())
    assert again.hparams["num_completions"] == 3
    module.export(tmp_path / "export")
    assert not [path for path in (tmp_path / "export").iterdir() if path.is_dir()]


def test_bf16_reference_is_rounded_like_the_policy(trainer_options):
    """Otherwise the policy would differ from it before the first step."""
    module = make(GRPO, lora=None, kl_coef=0.1, lr_schedule="constant", warmup_ratio=0.0)
    run(module, [draw_prompts(2)], {**trainer_options, "precision": "bf16-true"})
    assert module.trainer.callback_metrics["train/kl"] == 0.0


@pytest.mark.parametrize("argument", ["rewards", "validation_rewards"])
@pytest.mark.parametrize("form", ["{}.reward", ["{}.reward"], {"function": "{}.reward"}, "{}.py:reward"])
def test_checkpoint_runs_no_code_of_its_rewards(argument, form, model_folder, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    name = f"rewards_{argument}_{type(form).__name__}_{len(str(form))}"
    code = "open('ran', 'a')\n\ndef reward(completions, **_): return [0.0 for _ in completions]\n"
    (tmp_path / f"{name}.py").write_text(code)

    def named(value):
        if isinstance(value, str):
            return value.format(name)
        return [named(v) for v in value] if isinstance(value, list) else {k: named(v) for k, v in value.items()}

    options = {"model": model_folder, "tokenizer": tokenizer, "num_completions": 2, "max_new_tokens": 2}
    module = GRPO(**{"rewards": by_tokens, **options, argument: named(form)})
    trainer = Trainer(accelerator="cpu", devices=1, max_steps=1, logger=False, enable_progress_bar=False)
    trainer.fit(module, PromptDataModule([{"prompt": "fox"}], tokenizer=tokenizer, batch_size=1, cache_dir=False))
    trainer.save_checkpoint("a.ckpt")
    Path("ran").unlink()
    sys.modules.pop(name, None)
    kept = {} if argument == "rewards" else {"rewards": by_tokens}
    with pytest.raises(ConfigError, match=rf"The checkpoint names {argument}=.*Pass {argument}= to load_from"):
        GRPO.load_from_checkpoint("a.ckpt", **kept)
    assert not Path("ran").exists()
    assert GRPO.load_from_checkpoint("a.ckpt", **{"rewards": by_tokens, argument: named(form)}).max_new_tokens == 2


def test_policy_refuses_checkpoints_by_time_and_warns_of_fewer_by_steps(trainer_options):
    def fit(**when):
        saver = _pl.callbacks.ModelCheckpoint(save_last=False, **when)
        options = {**trainer_options, "enable_checkpointing": True}
        run(make(Policy, epochs_per_rollout=2), BATCHES, options, rollouts=PREDRAWN, callbacks=[saver])

    with pytest.raises(ConfigError, match=r"train_time_interval=.* writes no checkpoint with Policy.*every_n_train_st"):
        fit(train_time_interval=timedelta(minutes=10))
    with pytest.warns(UserWarning, match="a checkpoint every 6 steps only, since Policy takes 2 steps per rollout"):
        fit(every_n_train_steps=3)
