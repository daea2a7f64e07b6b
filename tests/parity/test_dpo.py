"""DPO against TRL's DPOTrainer with the same weights, rows, order and settings: losses and final weights."""

import pytest
import torch
from preference_runs import RecordsMetrics, make_pairs
from tiny import make_model, make_tokenizer
from trl import DPOConfig, DPOTrainer
from trl_peer import (
    ENDING,
    LORA,
    STEPS,
    InOrder,
    as_messages,
    assert_same,
    assert_same_metrics,
    train_with_ours,
    train_with_trl,
    trl_settings,
)

from lightning_ft import DPO
from lightning_ft.models.adapt import add_lora, lora_config

LOSSES = {
    "sigmoid": {},
    # The loss of IPO starts at 1 / (2 beta) ** 2. With the default beta that is 25, where a tolerance of 1e-5 is no
    # larger than the rounding of fp32.
    "ipo": {"beta": 0.5},
    "hinge": {},
    "robust": {"label_smoothing": 0.1},
}


class TrlDPO(InOrder, DPOTrainer):
    pass


class RecordingDPO(RecordsMetrics, DPO):
    pass


def trained_adapter():
    """An adapter whose B isn't 0, so that the reference differs from the base model."""
    torch.manual_seed(5)
    model = add_lora(make_model(), lora_config(LORA), seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def their_models(mode):
    if mode == "full":
        return make_model(), make_model()
    # TRL keeps a frozen copy of the adapter as the reference; the copy of a new adapter has no effect.
    return (trained_adapter() if mode == "continued" else add_lora(make_model(), lora_config(LORA), seed=0)), None


def our_module(mode, folder, **options):
    if mode == "continued":
        make_model().save_pretrained(folder / "base")
        adapter = trained_adapter()
        adapter.peft_config["default"].base_model_name_or_path = str(folder / "base")
        adapter.save_pretrained(folder / "adapter")
        return RecordingDPO(str(folder / "adapter"), dtype="float32", **options)
    return RecordingDPO(make_model(), lora=LORA if mode == "lora" else None, **options)


@pytest.mark.parametrize(
    ("loss", "mode", "accumulation"),
    [
        pytest.param("sigmoid", "full", 1, marks=pytest.mark.slow),
        ("sigmoid", "full", 4),
        ("sigmoid", "lora", 1),
        pytest.param("sigmoid", "lora", 4, marks=pytest.mark.slow),
        ("sigmoid", "continued", 1),
        pytest.param("ipo", "full", 4, marks=pytest.mark.slow),
        ("ipo", "lora", 1),
        ("hinge", "full", 1),
        pytest.param("hinge", "lora", 1, marks=pytest.mark.slow),
        pytest.param("robust", "full", 1, marks=pytest.mark.slow),
        ("robust", "lora", 1),
    ],
)
def test_dpo_matches_trl(loss, mode, accumulation, tmp_path, trainer_options):
    batch_size = 4 if accumulation == 1 else 2
    rate = 1e-3 if mode == "full" else 3e-3
    rows = make_pairs(batch_size * accumulation * STEPS)
    model, reference = their_models(mode)
    trainer = TrlDPO(
        model=model,
        ref_model=reference,
        processing_class=make_tokenizer(ENDING),
        train_dataset=as_messages(rows),
        args=DPOConfig(
            loss_type=[loss],
            **LOSSES[loss],
            **trl_settings(tmp_path, batch_size=batch_size, accumulation=accumulation, learning_rate=rate),
        ),
    )
    theirs = train_with_trl(trainer, accumulation)
    module = our_module(
        mode,
        tmp_path,
        loss=loss,
        **LOSSES[loss],
        tokenizer=make_tokenizer(ENDING),
        learning_rate=rate,
        weight_decay=0.01,
        warmup_ratio=0.2,
    )
    ours = train_with_ours(module, rows, trainer_options, batch_size=batch_size, accumulation=accumulation)
    assert_same(ours, theirs, learned=0.1)
    if accumulation == 1:
        names = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "entropy")
        assert_same_metrics(module, trainer, (*names, "logps/chosen", "logps/rejected"))
