"""Runs of a TRL trainer and of our module on the same completions, and the differences between their results."""

from types import SimpleNamespace

import datasets
import torch
from predrawn_rollouts import Records, WithSGD, draw_prompts, draw_rollout, run
from tiny import make_tokenizer
from transformers import AutoModelForCausalLM, TrainerCallback

from lightning_ft.models.adapt import add_lora, lora_config

PROMPTS, GROUP, MAX_NEW_TOKENS, ROLLOUTS = 3, 4, 9, 2
LORA = {"r": 4, "lora_alpha": 16}
BATCHES = [draw_prompts(PROMPTS, seed=n) for n in range(ROLLOUTS)]
PREDRAWN = [draw_rollout(PROMPTS * GROUP, seed=n, longest=MAX_NEW_TOKENS) for n in range(ROLLOUTS)]


def reward(prompts, completions, completion_ids, **columns):
    """A reward that differs between completions, and is None for a few."""
    return [None if sum(ids) % 9 == 0 else (sum(ids) % 11) / 4 for ids in completion_ids]


class RecordGradients(TrainerCallback):
    """Records the gradients of each step of a Hugging Face Trainer."""

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


class PredrawnCompletions:
    """Mixin for a TRL trainer: uses predrawn completions, and records losses, advantages and metrics."""

    def _prepare(self):
        self.losses, self.advantages, self.metrics, self.calls = [], [], [], 0

    def _tokenize_prompts(self, prompts):
        ids = [ids.tolist() for ids in BATCHES[self.calls % ROLLOUTS].input_ids for _ in range(GROUP)]
        assert len(ids) == len(prompts)
        return ids, None, {}

    def _generate_single_turn(self, prompt_ids, *args, **options):
        self.calls += 1
        tokens = [list(c.tokens) for c in PREDRAWN[(self.calls - 1) % ROLLOUTS].completions]
        return (tokens, None) if self.returns_logprobs else tokens

    def _generate_and_score_completions(self, inputs):
        outputs = super()._generate_and_score_completions(inputs)
        self.advantages.append(outputs["advantages"].clone())
        return outputs

    def compute_loss(self, *args, **options):
        loss = super().compute_loss(*args, **options)
        self.losses.append(float(loss.detach()))
        self.metrics.append({name: values[-1] for name, values in self._metrics["train"].items() if values})
        return loss


def train_with_trl(
    trainer_class,
    config_class,
    model_folder,
    folder,
    *,
    lora=False,
    parts=1,
    steps=1,
    iterations=1,
    clip=None,
    rate=0.05,
    **options,
):
    """Train with TRL: `parts` micro-batches per rollout, ``parts / steps`` per step; `clip` is the gradient norm."""

    class Theirs(PredrawnCompletions, trainer_class):
        returns_logprobs = trainer_class.__name__ == "GRPOTrainer"

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype="float32")
    model = add_lora(model, lora_config(LORA), seed=0) if lora else model
    recorder = RecordGradients()
    trainer = Theirs(
        model=model,
        processing_class=make_tokenizer(),
        reward_funcs=reward,
        train_dataset=datasets.Dataset.from_dict({"prompt": [p for batch in BATCHES for p in batch.prompts]}),
        args=config_class(
            output_dir=str(folder),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=PROMPTS * GROUP // parts,
            gradient_accumulation_steps=parts // steps,
            steps_per_generation=parts,
            num_generations=GROUP,
            num_iterations=iterations,
            max_completion_length=MAX_NEW_TOKENS,
            max_steps=ROLLOUTS * iterations * steps,
            shuffle_dataset=False,
            lr_scheduler_type="constant",
            max_grad_norm=clip or 0.0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **options,
        ),
        callbacks=[recorder],
        optimizers=(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate), None),
    )
    trainer._prepare()
    trainer.train()
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return SimpleNamespace(
        losses=trainer.losses,
        advantages=trainer.advantages,
        metrics=trainer.metrics,
        gradients=recorder.gradients,
        weights=trained,
    )


def train_with_ours(
    module_class,
    model_folder,
    trainer_options,
    *,
    lora=False,
    parts=1,
    steps=1,
    iterations=1,
    clip=None,
    rate=0.05,
    **options,
):
    """Train with our module; the arguments mean the same."""

    class Ours(Records, WithSGD, module_class):
        pass

    module = Ours(
        model_folder,
        dtype="float32",
        rewards=reward,
        lora=LORA if lora else None,
        num_completions=GROUP,
        max_new_tokens=MAX_NEW_TOKENS,
        epochs_per_rollout=iterations,
        steps_per_rollout=steps,
        micro_batch_size=PROMPTS * GROUP // parts,
        max_grad_norm=clip,
        lr_schedule="constant",
        warmup_ratio=0.0,
        learning_rate=rate,
        **options,
    )
    run(module, BATCHES, trainer_options, rollouts=PREDRAWN)
    return SimpleNamespace(
        losses=[float(result.loss.detach()) for _, result in module.results],
        advantages=module.advantages,
        results=module.results,
        gradients=[{name.removeprefix("model."): g for name, g in step.items()} for step in module.gradients],
        weights={n.removeprefix("model."): p.detach() for n, p in module.named_parameters() if p.requires_grad},
    )


def largest(values):
    """The largest absolute value in a dictionary of tensors."""
    return max(float(value.abs().max()) for value in values.values())


def max_differences(ours, theirs):
    """The largest differences of advantages, losses, gradients and final weights."""
    differences = {
        "advantages": max(float((a - b).abs().max()) for a, b in zip(ours.advantages, theirs.advantages, strict=True)),
        "losses": max(abs(a - b) for a, b in zip(ours.losses, theirs.losses, strict=True)),
        "gradients": 0.0,
        "weights": 0.0,
    }
    for a, b in [*zip(ours.gradients, theirs.gradients, strict=True), (ours.weights, theirs.weights)]:
        assert a.keys() == b.keys()
        name = "weights" if a is ours.weights else "gradients"
        differences[name] = max(differences[name], largest({key: a[key] - b[key] for key in b}))
    return differences
