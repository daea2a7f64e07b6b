"""The same run by TRL's RewardTrainer: same weights and head, rows and order; losses and final weights must agree."""

import pytest
import torch
from preference_runs import RecordsMetrics, make_pairs
from tiny import make_model, make_tokenizer
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification
from trl import RewardConfig, RewardTrainer
from trl_peer import LORA, STEPS, InOrder, as_messages, assert_same, assert_same_metrics, by_trl, by_us, settings

from lightning_ft import RewardModeling
from lightning_ft.models.adapt import add_lora, lora_config


class TrlReward(InOrder, RewardTrainer):
    pass


class RecordingReward(RecordsMetrics, RewardModeling):
    pass


@pytest.fixture(scope="module")
def scorer_folder(tmp_path_factory):
    """A model with a score head: a new one would be drawn anew by each side."""
    folder = tmp_path_factory.mktemp("scorer")
    config = make_model().config
    config.num_labels = 1
    torch.manual_seed(3)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def with_margins(rows):
    return [{**row, "margin": n % 4 / 2} for n, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("kind", "accumulation", "margins", "centering"),
    [("full", 1, False, 0.0), ("full", 4, True, 0.01), ("lora", 1, True, 0.01), ("lora", 4, False, 0.0)],
)
def test_losses_and_weights(kind, accumulation, margins, centering, scorer_folder, tmp_path, trainer_options):
    batch_size = 4 if accumulation == 1 else 2
    rate = 1e-3 if kind == "full" else 3e-3
    rows = make_pairs(batch_size * accumulation * STEPS)
    rows = with_margins(rows) if margins else rows
    model = AutoModelForSequenceClassification.from_pretrained(scorer_folder)
    if kind == "lora":
        model = add_lora(model, lora_config({**LORA, "task_type": "SEQ_CLS"}), seed=0)
    trainer = TrlReward(
        model=model,
        processing_class=make_tokenizer(),
        train_dataset=as_messages(rows),
        args=RewardConfig(
            center_rewards_coefficient=centering or None,
            **settings(tmp_path, batch_size=batch_size, accumulation=accumulation, learning_rate=rate),
        ),
    )
    theirs = by_trl(trainer, accumulation)
    module = RecordingReward(
        scorer_folder,
        lora=LORA if kind == "lora" else None,
        centering=centering,
        learning_rate=rate,
        weight_decay=0.01,
        warmup_ratio=0.2,
    )
    ours = by_us(module, rows, trainer_options, batch_size=batch_size, accumulation=accumulation)
    assert_same(ours, theirs, learnt=0.1)
    if accumulation == 1:
        assert_same_metrics(module, trainer, ("accuracy", "margin"))
