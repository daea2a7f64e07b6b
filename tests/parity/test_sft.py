"""SFT against TRL's SFTTrainer with the same weights, rows, order and settings: losses and final weights."""

import datasets
import pytest
import torch
from recording import RecordsLosses
from tiny import make_model, make_rows, make_tokenizer
from trl import SFTConfig, SFTTrainer
from trl_peer import InOrder

from lightning_ft import FullFineTuning, LoRAFineTuning, PairDataModule
from lightning_ft._lightning import Trainer
from lightning_ft.models.adapt import add_lora, lora_config

STEPS = 20
TOLERANCE = 1e-5
# Nothing after the end token, so that it is the last supervised token in both runs.
TEMPLATE = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\n' -}}"
    "{%- if message.role == 'assistant' -%}{%- generation -%}"
    "{{- message.content + '<|im_end|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- message.content + '<|im_end|>' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
LORA = {"r": 4, "lora_alpha": 8}


class TrlSFT(InOrder, SFTTrainer):
    pass


class RecordingFull(RecordsLosses, FullFineTuning):
    pass


class RecordingLoRA(RecordsLosses, LoRAFineTuning):
    pass


def as_messages(rows):
    return [
        {
            "prompt": [{"role": "user", "content": row["input"]}],
            "completion": [{"role": "assistant", "content": row["output"]}],
        }
        for row in rows
    ]


def train_with_trl(rows, module_class, *, batch_size, accumulation, tmp_path, learning_rate, assistant_only=False):
    model = make_model()
    if module_class is RecordingLoRA:
        model = add_lora(model, lora_config(LORA), seed=0)
    data = as_messages(rows)
    if assistant_only:
        data = [{"messages": row["prompt"] + row["completion"]} for row in data]
    trainer = TrlSFT(
        model=model,
        processing_class=make_tokenizer(TEMPLATE),
        train_dataset=datasets.Dataset.from_list(data),
        args=SFTConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=STEPS,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=2,
            weight_decay=0.01,
            max_grad_norm=0.0,
            completion_only_loss=None if assistant_only else True,
            assistant_only_loss=assistant_only,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
    )
    trainer.train()
    sums = torch.tensor(trainer.micro_losses, dtype=torch.float64).view(STEPS, accumulation).sum(1)
    return sums.tolist(), {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def train_with_ours(rows, module_class, *, batch_size, accumulation, trainer_options, learning_rate, packing=True):
    lora = {"lora": LORA} if module_class is RecordingLoRA else {}
    module = module_class(
        make_model(),
        tokenizer=make_tokenizer(TEMPLATE),
        learning_rate=learning_rate,
        weight_decay=0.01,
        warmup_ratio=0.1,
        **lora,
    )
    data = PairDataModule(rows, batch_size=batch_size, shuffle=False, packing=packing, cache_dir=False)
    trainer = Trainer(**trainer_options, max_steps=STEPS, max_epochs=-1, accumulate_grad_batches=accumulation)
    trainer.fit(module, data)
    weights = {n.removeprefix("model."): p.detach() for n, p in module.named_parameters() if p.requires_grad}
    return module.losses, weights


@pytest.mark.parametrize("module_class", [RecordingFull, RecordingLoRA], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("batch_size", "accumulation", "assistant_only", "packing"),
    [
        (4, 1, False, True),
        pytest.param(4, 4, False, True, marks=pytest.mark.slow),
        (2, 4, False, False),
        (4, 4, True, True),
    ],
    ids=["completion_only", "accumulation_4", "accumulation_4_unpacked", "assistant_only"],
)
def test_sft_matches_trl(module_class, batch_size, accumulation, assistant_only, packing, tmp_path, trainer_options):
    rows = make_rows(2 * batch_size * accumulation * STEPS)[: batch_size * accumulation * STEPS]
    rate = 1e-3 if module_class is RecordingFull else 1e-2
    common = {"batch_size": batch_size, "accumulation": accumulation, "learning_rate": rate}
    theirs, their_weights = train_with_trl(
        rows, module_class, tmp_path=tmp_path, assistant_only=assistant_only, **common
    )
    ours, our_weights = train_with_ours(rows, module_class, trainer_options=trainer_options, packing=packing, **common)
    assert len(ours) == STEPS
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=0, atol=TOLERANCE)
    assert theirs[-1] < theirs[0] - 0.3  # the runs trained at all
    assert our_weights.keys() == their_weights.keys()
    for name, expected in their_weights.items():
        torch.testing.assert_close(
            our_weights[name], expected, rtol=0, atol=TOLERANCE, msg=lambda m, name=name: f"{name}: {m}"
        )
