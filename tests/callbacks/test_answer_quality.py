"""AnswerQuality: what it logs, what monitors it, and what happens when it fails."""

import pytest
import torch
from their_module import Theirs, fit, hf_loader
from tiny import make_model, make_rows

from lightning_ft import (
    AnswerQuality,
    FullFineTuning,
    PairDataModule,
)
from lightning_ft._lightning import Callback, Trainer, _pl
from lightning_ft.errors import ConfigError, SavingsError
from lightning_ft.types import Message, Request

REQUESTS = [
    Request(str(n), (Message(role="user", content=row["input"]),), row["output"]) for n, row in enumerate(make_rows(6))
]


@pytest.mark.parametrize("first", [True, False])
def test_early_stopping_watches_the_quality_of_answers(trainer_options, tokenizer, first):
    scores = iter([0.1, 0.5, 0.4, 0.3, 0.9])
    quality = AnswerQuality(lambda output, reference: current[0], requests=REQUESTS, max_new_tokens=3, progress=False)
    current = [0.0]

    class Next(Callback):
        def on_train_epoch_start(self, trainer, module):
            current[0] = next(scores)

    stopping = _pl.callbacks.EarlyStopping("val/quality", mode="max", patience=2)
    callbacks = [Next(), quality, stopping] if first else [stopping, Next(), quality]
    trainer = fit(trainer_options, Theirs(tokenizer), hf_loader(tokenizer), *callbacks, max_steps=-1, max_epochs=5)
    assert trainer.current_epoch == 4  # 0.1, 0.5, then two epochs that weren't better
    assert float(stopping.best_score) == 0.5
    assert quality.result.quality == pytest.approx(0.3)


def failing_from_epoch(epoch):
    """AnswerQuality whose scorer fails from an epoch on."""
    graded = []

    def scorer(output, reference):
        graded.append(output)
        if len(graded) > epoch * len(REQUESTS):
            raise ValueError("no JSON")
        return 0.5

    return AnswerQuality(scorer, requests=REQUESTS, max_new_tokens=3, progress=False)


def test_quality_that_fails_does_not_end_training(trainer_options, tokenizer):
    quality = failing_from_epoch(1)
    seen = []

    class Keep(Callback):
        def on_train_epoch_end(self, trainer, module):
            seen.append("val/quality" in trainer.callback_metrics)

    trainer = fit(trainer_options, Theirs(tokenizer), hf_loader(tokenizer), quality, Keep(), max_steps=-1, max_epochs=3)
    assert trainer.current_epoch == 3
    assert seen == [True, False, False]  # an old value isn't left to count again
    assert "val/quality" not in trainer.callback_metrics
    assert quality.result is None
    assert [failure.partition(" is undefined")[0] for failure in quality.failures] == [
        "val/quality after epoch 1",
        "val/quality after epoch 2",
    ]
    assert "failed on request '0': ValueError: no JSON" in quality.failures[0]
    fit(trainer_options, Theirs(tokenizer), hf_loader(tokenizer), quality, max_steps=1)
    assert len(quality.failures) == 1  # of this fit alone


class Plateau(Theirs):
    """Lowers its learning rate when the answers get no better."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max")
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val/quality"}}


@pytest.mark.parametrize("monitoring", ["EarlyStopping", "ModelCheckpoint", "ReduceLROnPlateau"])
def test_quality_that_fails_and_is_monitored_ends_training(trainer_options, tokenizer, tmp_path, monitoring):
    module, callbacks = Theirs(tokenizer), []
    if monitoring == "ReduceLROnPlateau":
        module = Plateau(tokenizer)
    else:
        options = {} if monitoring == "EarlyStopping" else {"dirpath": tmp_path}
        callbacks = [getattr(_pl.callbacks, monitoring)(monitor="val/quality", mode="max", **options)]
    message = rf"val/quality after epoch 1 is undefined, and {monitoring} monitors it, .* ValueError: no JSON\. Correct"
    options = {"enable_checkpointing": True, "max_steps": -1, "max_epochs": 3}
    with pytest.raises(SavingsError, match=message):
        fit(trainer_options, module, hf_loader(tokenizer), failing_from_epoch(1), *callbacks, **options)


def test_quality_that_fails_outside_of_training_raises_an_error(trainer_options, tokenizer):
    module = Theirs(tokenizer)
    module.validation_step = lambda batch, batch_idx: None
    trainer = Trainer(callbacks=[failing_from_epoch(0)], **trainer_options)
    with pytest.raises(SavingsError, match=r"val/quality is undefined: .*ValueError: no JSON"):
        trainer.validate(module, hf_loader(tokenizer), verbose=False)


def test_quality_is_left_out_of_a_validation_of_loaders(trainer_options, model_folder):
    data = PairDataModule(make_rows(8), validation=make_rows(12)[8:], batch_size=4, cache_dir=False)
    quality = AnswerQuality("exact", max_new_tokens=3, progress=False)
    module = FullFineTuning(model_folder, dtype="float32")
    trainer = fit(trainer_options, module, data, quality, max_steps=2)
    assert quality.result is not None
    with pytest.warns(UserWarning, match="val/quality isn't measured in a validation of loaders: pass requests="):
        trainer.validate(module, dataloaders=data.val_dataloader(), verbose=False)
    assert "val/loss" in trainer.callback_metrics
    assert "val/quality" not in trainer.callback_metrics


def test_quality_is_measured_after_validations_of_our_own_modules(trainer_options, model_folder):
    rows = make_rows(24)
    data = PairDataModule(rows[:16], validation=rows[16:], batch_size=8, cache_dir=False)
    quality = AnswerQuality("exact", max_new_tokens=3, every_n_epochs=2, progress=False)
    seen = []

    class Keep(Callback):
        def on_validation_end(self, trainer, module):
            if not trainer.sanity_checking:
                seen.append("val/quality" in trainer.callback_metrics)

    fit(trainer_options, FullFineTuning(model_folder), data, Keep(), quality, max_steps=-1, max_epochs=2)
    assert seen == [False, True]
    assert len(quality.result.scores) == 8


def test_quality_in_a_loop_of_ones_own(tokenizer):
    quality = AnswerQuality("exact", requests=REQUESTS, tokenizer=tokenizer, max_new_tokens=3, progress=False)
    assert quality.measure(None, make_model()) == quality.result.quality
    with pytest.raises(SavingsError, match=r"has no requests. Pass requests="):
        AnswerQuality("exact", tokenizer=tokenizer).measure(None, make_model())
    quality = failing_from_epoch(1)
    quality.tokenizer = tokenizer
    quality.on_validation_epoch_end(None, make_model())
    assert quality.result is not None
    quality.on_validation_epoch_end(None, make_model())
    assert quality.result is None
    assert "val/quality is undefined" in quality.failures[0]


def test_metric_that_is_not_measured_in_every_epoch_cannot_be_monitored(trainer_options, tokenizer):
    quality = AnswerQuality("exact", requests=REQUESTS, every_n_epochs=2, max_new_tokens=3, progress=False)
    stopping = _pl.callbacks.EarlyStopping("val/quality", mode="max")
    with pytest.raises(ConfigError, match="set check_val_every_n_epoch=2 in the Trainer"):
        fit(trainer_options, Theirs(tokenizer), hf_loader(tokenizer), quality, stopping)


def test_two_metrics_of_one_name_are_refused_since_lightning_logs_their_mean(trainer_options, tokenizer):
    def quality(score, **options):
        return AnswerQuality(lambda output, reference: score, requests=REQUESTS, max_new_tokens=2, **options)

    with pytest.raises(ConfigError, match="Two AnswerQuality callbacks log 'val/quality'"):
        fit(trainer_options, Theirs(tokenizer), hf_loader(tokenizer), quality(0.25), quality(0.75))
    callbacks = quality(0.25), quality(0.75, name="val/other")
    trainer = fit(trainer_options, Theirs(tokenizer), hf_loader(tokenizer), *callbacks)
    assert [float(trainer.callback_metrics[each.name]) for each in callbacks] == [0.25, 0.75]


def test_module_without_a_model_is_refused_before_training(trainer_options, tokenizer):
    class Named(Theirs):
        def __init__(self):
            super().__init__(tokenizer)
            self.lm = self.model
            del self.model

    quality = AnswerQuality("exact", requests=REQUESTS, max_new_tokens=3, progress=False)
    with pytest.raises(
        SavingsError, match=r"AnswerQuality found no transformers model in Named: assign it to .*`model`"
    ):
        fit(trainer_options, Named(), hf_loader(tokenizer), quality)
