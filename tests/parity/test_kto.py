"""KTO against TRL's KTOTrainer with the same weights, rows, order and settings: losses and final weights."""

import pytest
from preference_runs import RecordsMetrics, make_labeled
from tiny import make_model, make_tokenizer
from trl import KTOConfig, KTOTrainer
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

from lightning_ft import KTO
from lightning_ft.models.adapt import add_lora, lora_config


class TrlKTO(InOrder, KTOTrainer):
    pass


class RecordingKTO(RecordsMetrics, KTO):
    pass


@pytest.mark.parametrize(
    ("mode", "accumulation", "weights"),
    [
        pytest.param("full", 1, {}, marks=pytest.mark.slow),
        ("full", 4, {"desirable_weight": 1.0, "undesirable_weight": 1.5}),
        ("lora", 1, {"desirable_weight": 1.33, "undesirable_weight": 1.0}),
        pytest.param("lora", 4, {}, marks=pytest.mark.slow),
    ],
)
def test_kto_matches_trl(mode, accumulation, weights, tmp_path, trainer_options):
    batch_size, rate = 4, 1e-3 if mode == "full" else 3e-3
    rows = make_labeled(batch_size * accumulation * STEPS)
    full = mode == "full"
    trainer = TrlKTO(
        model=make_model() if full else add_lora(make_model(), lora_config(LORA), seed=0),
        ref_model=make_model() if full else None,
        processing_class=make_tokenizer(ENDING),
        train_dataset=as_messages(rows),
        args=KTOConfig(
            beta=0.3,
            **weights,
            **trl_settings(tmp_path, batch_size=batch_size, accumulation=accumulation, learning_rate=rate),
        ),
    )
    theirs = train_with_trl(trainer, accumulation)
    module = RecordingKTO(
        make_model(),
        beta=0.3,
        lora=None if full else LORA,
        **weights,
        tokenizer=make_tokenizer(ENDING),
        learning_rate=rate,
        weight_decay=0.01,
        warmup_ratio=0.2,
    )
    ours = train_with_ours(module, rows, trainer_options, batch_size=batch_size, accumulation=accumulation)
    assert_same(ours, theirs, learned=0.05)
    if accumulation == 1:
        names = ("kl", "entropy", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")
        assert_same_metrics(module, trainer, names)
