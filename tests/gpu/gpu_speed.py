"""Checks of speed and memory against TRL: supervised fine-tuning, DPO and GRPO."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from gpu_runner import Outcome
from gpu_setup import Setup, lora_options, tokenizer
from gpu_timing import Clock, Timing, compare, needed_flops, timed_fit, utilization

from lightning_ft import DPO, GRPO, FullFineTuning, LoRAFineTuning
from lightning_ft.data.batches import PreferenceBatch, PromptBatch
from lightning_ft.data.layout import Example
from lightning_ft.models.adapt import lora_config

LEAST_MFU = {True: 0.30, False: 0.40}
"""Required model-FLOPs utilization with an adapter, and of all weights."""


def trl_settings(setup: Setup, **more: Any) -> dict[str, Any]:
    """Arguments of TRL's configurations at its best: fused AdamW, no activation checkpointing, half precision."""
    return {
        "output_dir": tempfile.gettempdir(),  # nothing is written
        "use_cpu": not setup.on_gpu,
        "bf16": setup.on_gpu,
        "gradient_checkpointing": False,
        "optim": "adamw_torch_fused",
        "lr_scheduler_type": "constant",
        "learning_rate": 1e-4,
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "max_steps": setup.work.warm + setup.work.timed,
        "logging_steps": 1000,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": setup.on_gpu,
        **more,
    }


def timed_trl(setup: Setup, build: Callable[..., Any], trainer_class: type, count: Callable[[Any], int]) -> Timing:
    """Train with a TRL trainer and time its steps.

    Args:
        setup: Where to train.
        build: Function that makes the trainer, given its class.
        trainer_class: Class of the trainer.
        count: Function from the inputs of a step to its amount of work.
    """
    from transformers import PrinterCallback

    clock = Clock(setup, setup.work.warm)

    class Timed(trainer_class):  # type: ignore[misc, valid-type]
        """Times steps from before their first micro-batch."""

        def training_step(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
            self.amount = count(inputs)
            return super().training_step(model, inputs, *args, **options)

    class Steps(_callback_class()):  # type: ignore[misc]
        """Tells the clock when steps begin and end."""

        def on_step_begin(self, *args: Any, **options: Any) -> None:
            clock.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
            clock.end(trainer.amount)
            if state.global_step == args.max_steps:
                trainer.timing = clock.read()

    trainer = build(Timed)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Steps())
    trainer.train()
    timing: Timing = trainer.timing
    return timing


def _callback_class() -> type:
    from transformers import TrainerCallback

    return TrainerCallback


def _free(setup: Setup) -> None:
    """Give back what an earlier training held."""
    import gc

    gc.collect()
    if setup.on_gpu:
        torch.cuda.empty_cache()


# ---------------------------------------------------------------- supervised fine-tuning


def sft_module(setup: Setup, *, lora: bool, attention: str | None = None, **options: Any) -> Any:
    """Module for supervised fine-tuning in the precision that a GPU is best used with."""
    half = torch.bfloat16 if setup.on_gpu and lora else torch.float32
    model = setup.model(attention=setup.attention if attention is None else attention, dtype=half)
    settings = {"tokenizer": tokenizer(), "lr_schedule": "constant", "warmup_ratio": 0.0, "learning_rate": 1e-4}
    if lora:
        return LoRAFineTuning(model, lora=lora_options(), **settings, **options)
    return FullFineTuning(model, **settings, **options)


def sft(setup: Setup, *, lora: bool) -> Outcome:
    """Tokens per second, peak memory and utilization of supervised fine-tuning, against TRL."""
    outcome = Outcome({"attention": setup.attention})
    work = setup.work
    batches = setup.batches(work.warm + work.timed)
    module = sft_module(setup, lora=lora)
    ours = timed_fit(setup, module, batches, [batch.num_tokens for batch in batches])
    utilization(outcome, ours, needed_flops(module.model, batches[work.warm :]), LEAST_MFU[lora], setup.device)
    del module
    _free(setup)
    compare(outcome, ours, _trl_sft(setup, lora=lora), "tokens")
    return outcome


def sft_lora(setup: Setup) -> Outcome:
    """:func:`sft` with an adapter."""
    return sft(setup, lora=True)


def sft_full(setup: Setup) -> Outcome:
    """:func:`sft` of all weights."""
    return sft(setup, lora=False)


def _trl_sft(setup: Setup, *, lora: bool) -> Timing:
    """TRL with packing (rows of a step's tokens), the same attention, and its chunked head."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    work = setup.work
    rows = setup.examples(2 * (work.warm + work.timed) * work.rows)
    half = torch.bfloat16 if setup.on_gpu and lora else torch.float32

    def build(trainer_class: Any) -> Any:
        return trainer_class(
            model=setup.model(attention=setup.attention, dtype=half),
            processing_class=tokenizer(),
            peft_config=lora_config(lora_options()) if lora else None,
            train_dataset=datasets.Dataset.from_dict(
                {
                    "input_ids": [row.input_ids.tolist() for row in rows],
                    "completion_mask": [row.supervised.int().tolist() for row in rows],
                }
            ),
            args=SFTConfig(
                **trl_settings(
                    setup,
                    per_device_train_batch_size=1,
                    packing=True,
                    packing_strategy="bfd",
                    max_length=max(setup.tokens_per_step, setup.longest),
                    completion_only_loss=True,
                )
            ),
        )

    return timed_trl(setup, build, SFTTrainer, lambda inputs: int(inputs["input_ids"].numel()))


# ---------------------------------------------------------------- DPO


def dpo(setup: Setup) -> Outcome:
    """Pairs per second and peak memory of DPO with an adapter, against TRL."""
    outcome = Outcome({"attention": shared_attention(setup)})
    case = _pairs_case(setup)
    from pairs import rows

    drawn = rows(case)
    batches = [_preference_batch(drawn[i : i + case.batch], i) for i in range(0, len(drawn), case.batch)]
    module = DPO(
        setup.model(attention=shared_attention(setup), dtype=_half(setup)),
        lora=lora_options(),
        tokenizer=tokenizer(),
        lr_schedule="constant",
        warmup_ratio=0.0,
    )
    ours = timed_fit(setup, module, batches, [len(batch) for batch in batches])
    del module
    _free(setup)
    compare(outcome, ours, _trl_dpo(setup, case, drawn), "pairs")
    return outcome


def shared_attention(setup: Setup) -> str:
    """Best attention that can compute a prompt once for several completions."""
    return "flex_attention" if "flex_attention" in setup.attentions() else "sdpa"


def _half(setup: Setup) -> torch.dtype:
    return torch.bfloat16 if setup.on_gpu else torch.float32


def _pairs_case(setup: Setup) -> Any:
    work = setup.work
    return SimpleNamespace(
        size=SimpleNamespace(vocabulary=setup.vocabulary),
        prompt=work.prompt,
        answer=work.answer,
        spread=0.5,
        batch=work.pairs,
        steps=work.warm + work.timed,
        seed=0,
    )


def _preference_batch(part: Sequence[dict[str, list[int]]], first: int) -> PreferenceBatch:
    def example(ids: list[int]) -> Example:
        return Example(torch.tensor(ids), torch.ones(len(ids), dtype=torch.bool))

    return PreferenceBatch(
        [torch.tensor(row["prompt_ids"]) for row in part],
        [(example(row["chosen_ids"]), example(row["rejected_ids"])) for row in part],
        torch.tensor([True, False] * len(part)),
        None,
        torch.arange(first, first + len(part)),
    )


def _trl_dpo(setup: Setup, case: Any, drawn: list[dict[str, list[int]]]) -> Timing:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    def build(trainer_class: Any) -> Any:
        settings = trl_settings(setup, per_device_train_batch_size=case.batch, max_length=None)
        return trainer_class(
            model=setup.model(attention=_padded_attention(setup), dtype=_half(setup)),
            processing_class=tokenizer(),
            peft_config=lora_config(lora_options()),
            train_dataset=Dataset.from_list(drawn),
            args=DPOConfig(**settings),
        )

    pretokenized = type("Pretokenized", (_InOrder, DPOTrainer), {})
    return timed_trl(setup, build, pretokenized, lambda inputs: case.batch)


class _InOrder:
    """Mixin for a TRL trainer: keeps rows that are tokenized already, in their order."""

    train_dataset: Any

    def _prepare_dataset(self, dataset: Any, *more: Any, **options: Any) -> Any:
        return dataset

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        from torch.utils.data import SequentialSampler

        return SequentialSampler(dataset if dataset is not None else self.train_dataset)


def _padded_attention(setup: Setup) -> str:
    """Best attention for padded rows: FlashAttention where it is installed, since it skips the padding."""
    return setup.attention if setup.attention.startswith("flash") else "sdpa"


# ---------------------------------------------------------------- GRPO


def grpo(setup: Setup) -> Outcome:
    """Completions per second and peak memory of a GRPO update, its rollouts being drawn beforehand, against TRL."""
    from grpo import ReplayEngine, rollouts
    from training import reward

    work = setup.work
    case = SimpleNamespace(
        size=SimpleNamespace(vocabulary=setup.vocabulary),
        prompt=work.prompt,
        completion=work.answer,
        group=work.group,
        prompts=work.pairs,
        steps=work.warm + work.timed,
        seed=0,
    )
    recorded = rollouts(case)

    class Engine(ReplayEngine):  # type: ignore[misc]
        """Recorded completions, which don't depend on the weights."""

        def sync_weights(self, *args: Any, **options: Any) -> None:
            pass

    outcome = Outcome({"attention": shared_attention(setup)})
    batches = [
        PromptBatch([""] * case.prompts, [torch.tensor(ids) for ids in each.prompts], columns={}) for each in recorded
    ]
    module = GRPO(
        setup.model(attention=shared_attention(setup), dtype=_half(setup)),
        lora=lora_options(),
        tokenizer=tokenizer(),
        rewards=reward,
        engine=Engine(recorded),
        num_completions=case.group,
        max_new_tokens=case.completion,
        kl_coef=0.0,
        lr_schedule="constant",
        warmup_ratio=0.0,
    )
    completions = case.prompts * case.group
    ours = timed_fit(setup, module, batches, [completions] * case.steps)
    del module
    _free(setup)
    compare(outcome, ours, _trl_grpo(setup, case, recorded), "completions")
    return outcome


def _trl_grpo(setup: Setup, case: Any, recorded: Sequence[Any]) -> Timing:
    from datasets import Dataset
    from training import reward
    from trl import GRPOConfig, GRPOTrainer

    class Replayed(GRPOTrainer):  # type: ignore[misc]
        """Takes recorded completions instead of sampling."""

        calls = 0

        def _tokenize_prompts(self, prompts: Sequence[Any]) -> Any:
            each = recorded[self.calls]
            return [ids for ids in each.prompts for _ in range(case.group)], None, {}

        def _generate_single_turn(self, *args: Any, **options: Any) -> Any:
            self.calls += 1
            return recorded[self.calls - 1].completions, None

    def build(trainer_class: Any) -> Any:
        settings = trl_settings(
            setup,
            per_device_train_batch_size=case.prompts * case.group,
            num_generations=case.group,
            max_completion_length=case.completion,
            shuffle_dataset=False,
            beta=0.0,
        )
        return trainer_class(
            model=setup.model(attention=_padded_attention(setup), dtype=_half(setup)),
            processing_class=tokenizer(),
            reward_funcs=reward,
            train_dataset=Dataset.from_dict({"prompt": [""] * case.prompts}),
            peft_config=lora_config(lora_options()),
            args=GRPOConfig(**settings),
        )

    return timed_trl(setup, build, Replayed, lambda inputs: case.prompts * case.group)
