"""Metrics of TokenSavings and Retention that something monitors: measured in time, and never of an earlier epoch."""

import pytest
from plain_module import WORDS, Plain, loader
from tiny import make_model

from lightning_ft import PromptBaseline, Retention, TokenSavings
from lightning_ft._lightning import Trainer, _pl
from lightning_ft.errors import ConfigError
from lightning_ft.types import Message, Request

REQUESTS = [Request(word, (Message(role="user", content=f"where is the {word}"),), "here") for word in WORDS[:2]]
QUICK = {"resamples": 9, "output_dir": False, "progress": False}


def savings(scorer="exact", **options):
    answers = {"requests": REQUESTS, "max_new_tokens": 2, "timed_requests": 0}
    return TokenSavings(PromptBaseline("In one word."), scorer=scorer, **answers, **QUICK, **options)


def retention(**options):
    return Retention(["where is my parcel with the lamp"], **QUICK, **options)


def fit(trainer_options, tokenizer, *callbacks, **options):
    options = {"enable_checkpointing": True, "max_epochs": 2, "limit_train_batches": 1, **options}
    trainer = Trainer(callbacks=list(callbacks), **{**trainer_options, **options})
    trainer.fit(Plain(make_model(), tokenizer), loader(tokenizer))
    return trainer


def failing_after(calls):
    """A scorer that fails after a number of calls."""
    made = []

    def scorer(output, reference):
        made.append(output)
        if len(made) > calls:
            raise ValueError("no JSON")
        return 0.5

    return scorer


@pytest.mark.parametrize(
    ("measuring", "metric", "options", "message"),
    [
        (savings(), "total", {}, r"TokenSavings measures when training has ended. Pass every_n_epochs=1 to Token"),
        (retention(), "kl_general", {}, r"Retention measures when training has ended"),
        (savings(every_n_epochs=2), "total", {}, r"in every epoch, and TokenSavings measures it every 2: an old value"),
        (retention(every_n_epochs=2), "ppl_ratio", {"every_n_epochs": 3}, r"every 3 epochs, and .* it every 2: an old"),
        (savings(every_n_epochs=1), "total", {"save_on_train_epoch_end": False}, r"Pass save_on_train_epoch_end=True"),
    ],
)
def test_metrics_that_are_not_measured_in_time_cannot_be_monitored(
    trainer_options, tokenizer, tmp_path, measuring, metric, options, message
):
    checkpoint = _pl.callbacks.ModelCheckpoint(tmp_path, monitor=f"{measuring.name}/{metric}", **options)
    with pytest.raises(ConfigError, match=rf"ModelCheckpoint monitors {measuring.name}/{metric}.*{message}"):
        fit(trainer_options, tokenizer, measuring, checkpoint)


def test_metrics_of_every_second_epoch_can_be_monitored_in_those(trainer_options, tokenizer, tmp_path):
    checkpoint = _pl.callbacks.ModelCheckpoint(
        tmp_path, monitor="token_savings/total", every_n_epochs=2, save_top_k=-1, filename="{epoch}"
    )
    fit(trainer_options, tokenizer, savings(every_n_epochs=2), checkpoint, max_epochs=2)
    assert [path.rpartition("/")[2] for path in checkpoint.best_k_models] == ["epoch=1.ckpt"]


def test_failed_measurement_leaves_no_metrics_of_an_earlier_epoch(trainer_options, tokenizer):
    before_epoch_1 = 3 * len(REQUESTS) + len(REQUESTS)  # three arms, and the constant answer
    callback = savings(failing_after(before_epoch_1), every_n_epochs=1)
    trainer = fit(trainer_options, tokenizer, callback, enable_checkpointing=False)
    assert [failure.partition(" is undefined")[0] for failure in callback.failures] == [
        "Token savings after epoch 1",
        "Token savings",
    ]
    found = {name for name in trainer.callback_metrics if name.startswith("token_savings/")}
    assert found == {"token_savings/gate_passed"}  # which is 0, since the final weights weren't measured


def test_failed_measurement_that_is_monitored_ends_training(trainer_options, tokenizer):
    callback = savings(failing_after(8), every_n_epochs=1)
    stopping = _pl.callbacks.EarlyStopping("token_savings/quality_tuned", mode="max")
    message = (
        "Token savings after epoch 1 is undefined, and EarlyStopping monitors token_savings/quality_tuned, so .* JSON"
    )
    with pytest.raises(ConfigError, match=message):
        fit(trainer_options, tokenizer, callback, stopping)
