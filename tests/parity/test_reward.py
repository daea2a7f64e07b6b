"""RewardModeling against TRL's RewardTrainer with the same weights, head, rows and order: losses and final weights."""

import pytest
import torch
from preference_runs import RecordsMetrics, make_pairs
from tiny import make_model, make_tokenizer
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification
from trl import RewardConfig, RewardTrainer
from trl_peer import (
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

from lightning_ft import RewardModeling
from lightning_ft.models.adapt import add_lora, lora_config


class TrlReward(InOrder, RewardTrainer):
    pass


class RecordingReward(RecordsMetrics, RewardModeling):
    pass


@pytest.fixture(scope="module")
def reward_model_folder(tmp_path_factory):
    """A model with a reward head. Without one, each run would initialize its own."""
    folder = tmp_path_factory.mktemp("reward_model")
    config = make_model().config
    config.num_labels = 1
    torch.manual_seed(3)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def with_margins(rows):
    return [{**row, "margin": n % 4 / 2} for n, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("mode", "accumulation", "margins", "centering"),
    [("full", 1, False, 0.0), ("full", 4, True, 0.01), ("lora", 1, True, 0.01), ("lora", 4, False, 0.0)],
)
def test_reward_modeling_matches_trl(
    mode, accumulation, margins, centering, reward_model_folder, tmp_path, trainer_options
):
    batch_size = 4 if accumulation == 1 else 2
    rate = 1e-3 if mode == "full" else 3e-3
    rows = make_pairs(batch_size * accumulation * STEPS)
    rows = with_margins(rows) if margins else rows
    model = AutoModelForSequenceClassification.from_pretrained(reward_model_folder)
    if mode == "lora":
        model = add_lora(model, lora_config({**LORA, "task_type": "SEQ_CLS"}), seed=0)
    trainer = TrlReward(
        model=model,
        processing_class=make_tokenizer(),
        train_dataset=as_messages(rows),
        args=RewardConfig(
            center_rewards_coefficient=centering or None,
            **trl_settings(tmp_path, batch_size=batch_size, accumulation=accumulation, learning_rate=rate),
        ),
    )
    theirs = train_with_trl(trainer, accumulation)
    module = RecordingReward(
        reward_model_folder,
        lora=LORA if mode == "lora" else None,
        centering=centering,
        learning_rate=rate,
        weight_decay=0.01,
        warmup_ratio=0.2,
    )
    ours = train_with_ours(module, rows, trainer_options, batch_size=batch_size, accumulation=accumulation)
    assert_same(ours, theirs, learned=0.1)
    if accumulation == 1:
        assert_same_metrics(module, trainer, ("accuracy", "margin"))
