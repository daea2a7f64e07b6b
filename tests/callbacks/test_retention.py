"""Retention with a Trainer, in a Fabric loop and in a manual loop."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from plain_module import WORDS, Plain, batches, loader
from tiny import TEXT, make_model, make_rows

from lightning_ft import DPO, FullFineTuning, LoRAFineTuning, PairDataModule, PreferenceDataModule
from lightning_ft._lightning import NAMESPACE, Trainer, _pl
from lightning_ft.callbacks.retention import Retention
from lightning_ft.errors import RetentionError
from lightning_ft.evaluation.retention.arithmetic import RetentionResult
from lightning_ft.evaluation.retention.measurement import RetentionMeasurement
from lightning_ft.types import Message, Request

TEXTS = [f"{line} {n}" for n, line in enumerate(TEXT * 2)]
TASK = [Request(word, (Message(role="user", content=f"where is the {word}"),), "here") for word in WORDS]
QUICK = {"resamples": 99, "batch_size": 3}


def make(adapter, dropout=0.0):
    torch.manual_seed(0)
    model = make_model(dropout=dropout)
    if adapter == "lora":
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    return model.train()


def fit(trainer_options, tokenizer, *callbacks, model=None, ckpt_path=None, **options):
    module = Plain(make("full") if model is None else model, tokenizer)
    trainer = Trainer(callbacks=list(callbacks), **{"max_epochs": 2, **trainer_options, **options})
    torch.manual_seed(0)
    trainer.fit(module, loader(tokenizer), ckpt_path=ckpt_path)
    return trainer, module


def fabric_loop(tokenizer, model, callback):
    fabric_type = pytest.importorskip("lightning.fabric" if NAMESPACE == "lightning" else "lightning_fabric").Fabric
    fabric = fabric_type(accelerator="cpu", devices=1, callbacks=[callback])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model, optimizer = fabric.setup(model, optimizer)
    fabric.call("on_train_start", fabric, model)
    for _ in range(2):
        for ids in batches(tokenizer):
            optimizer.zero_grad()
            fabric.backward(model(input_ids=ids[None], labels=ids[None]).loss)
            optimizer.step()
    fabric.call("on_train_end", fabric, model)
    return callback


def manual_loop(tokenizer, model):
    measurement = RetentionMeasurement(tokenizer, TEXTS, TASK, progress=False, **QUICK)
    measurement.before(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        for ids in batches(tokenizer):
            optimizer.zero_grad()
            model(input_ids=ids[None], labels=ids[None]).loss.backward()
            optimizer.step()
    assert model.training
    return measurement.after(model)


@pytest.mark.parametrize(("adapter", "base"), [("full", "step_0"), ("lora", "adapter_off")])
def test_retention_agrees_between_trainer_fabric_and_manual_loop(trainer_options, tokenizer, adapter, base):
    manual = manual_loop(tokenizer, make(adapter))
    with_trainer = Retention(TEXTS, task=TASK, **QUICK)
    fit(trainer_options, tokenizer, with_trainer, model=make(adapter))
    with_fabric = Retention(TEXTS, task=TASK, tokenizer=tokenizer, progress=False, **QUICK)
    fabric_loop(tokenizer, make(adapter), with_fabric)
    assert manual.metrics() == with_trainer.result.metrics() == with_fabric.result.metrics()
    assert manual == with_fabric.result
    assert with_trainer.result.base == base
    assert with_trainer.result.step == 16
    assert manual.kl_general.value > 1e-3
    assert manual.kl_task.value > manual.kl_general.value  # the task that was trained on changed most


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_retention_does_not_change_training(trainer_options, tokenizer, adapter):
    model = make(adapter, dropout=0.3)
    _, plain = fit(trainer_options, tokenizer, model=copy.deepcopy(model))
    callback = Retention(TEXTS, task=TASK, every_n_steps=3, every_n_epochs=1, **QUICK)
    _, measured = fit(trainer_options, tokenizer, callback, model=copy.deepcopy(model))
    assert callback.result.kl_general.value > 1e-3
    for ours, theirs in zip(measured.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.requires_grad == theirs.requires_grad


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_retention_of_resumed_run_equals_uninterrupted_one(trainer_options, tmp_path, tokenizer, adapter):
    uninterrupted = Retention(TEXTS, task=TASK, **QUICK)
    checkpoint = _pl.callbacks.ModelCheckpoint(tmp_path / "ckpt", filename="{epoch}", save_top_k=-1)
    options = {**trainer_options, "enable_checkpointing": True}
    fit(options, tokenizer, uninterrupted, checkpoint, model=make(adapter))
    path = tmp_path / "ckpt" / "epoch=0.ckpt"
    state = torch.load(path, weights_only=True)["callbacks"]["Retention('retention')"]
    assert state["base"] == ("step_0" if adapter == "full" else "adapter_off")
    assert len(state["kept"]) == (2 if adapter == "full" else 0)

    resumed = Retention(TEXTS, task=TASK, **QUICK)
    fit(trainer_options, tokenizer, resumed, model=make(adapter), ckpt_path=path)
    assert resumed.result == uninterrupted.result

    with pytest.raises(RetentionError, match="on other texts or task rows"):
        fit(trainer_options, tokenizer, Retention(TEXTS[1:], task=TASK, **QUICK), ckpt_path=path, model=make(adapter))


def test_retention_refuses_trained_weights_as_base(trainer_options, tmp_path, tokenizer):
    path = tmp_path / "last.ckpt"
    fit(trainer_options, tokenizer, model=make("lora"))[0].save_checkpoint(path)
    options = {**trainer_options, "max_epochs": 3}
    with pytest.raises(RetentionError, match="These weights have been trained"):
        fit(options, tokenizer, Retention(TEXTS, **QUICK), model=make("lora"), ckpt_path=path)
    explicit = Retention(TEXTS, base="adapter_off", **QUICK)
    fit(options, tokenizer, explicit, model=make("lora"), ckpt_path=path)
    uninterrupted = Retention(TEXTS, **QUICK)
    fit(options, tokenizer, uninterrupted, model=make("lora"))
    assert explicit.result.kl_general == uninterrupted.result.kl_general


def test_retention_refuses_trained_adapter_as_base(trainer_options, tokenizer):
    _, module = fit(trainer_options, tokenizer, model=make("lora"))
    with pytest.raises(RetentionError, match="base='step_0'"):
        fit(trainer_options, tokenizer, Retention(TEXTS, base="adapter_off", **QUICK), model=module.model)


def test_retention_keeps_base_in_continued_fit_and_replaces_it_in_new_one(trainer_options, tokenizer):
    callback = Retention(TEXTS, **QUICK)
    trainer, module = fit(trainer_options, tokenizer, callback, max_epochs=1)
    first = callback.result
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(tokenizer))
    uninterrupted = Retention(TEXTS, **QUICK)
    fit(trainer_options, tokenizer, uninterrupted)
    assert first != callback.result == uninterrupted.result

    fit(trainer_options, tokenizer, callback, max_epochs=1)  # another model with the same callback
    assert callback.result == first
    in_fabric = Retention(TEXTS, tokenizer=tokenizer, progress=False, **QUICK)
    metrics = [fabric_loop(tokenizer, make("full"), in_fabric).result.metrics() for _ in range(2)]
    assert metrics[0] == metrics[1]


class Recorder(_pl.loggers.logger.DummyLogger):
    """Logger that records the metrics of Retention."""

    def __init__(self):
        super().__init__()
        self.logged = []

    def log_metrics(self, metrics, step=None):
        if any(name.startswith("retention/") for name in metrics):
            self.logged.append((step, dict(metrics)))


def test_retention_logs_and_writes_metrics(trainer_options, tmp_path, tokenizer):
    logger = Recorder()
    callback = Retention(TEXTS, task=TASK, every_n_steps=3, every_n_epochs=2, **QUICK)
    trainer, _ = fit({**trainer_options, "logger": logger}, tokenizer, callback, accumulate_grad_batches=2)
    assert [step for step, _ in logger.logged] == [3, 6, 8]  # the end of epoch 2 is also that of training
    assert all(set(metrics) == {f"retention/{n}" for n in callback.result.metrics()} for _, metrics in logger.logged)
    assert float(trainer.callback_metrics["retention/kl_general"]) == pytest.approx(callback.result.kl_general.value)
    written = json.loads((tmp_path / "retention" / "retention.json").read_text())
    assert RetentionResult.from_dict(written) == callback.result
    assert (written["lower_bound"], written["top_k"], written["step"]) == (True, 64, 8)


def test_retention_metrics_can_be_monitored_every_epoch(trainer_options, tmp_path, tokenizer):
    callback = Retention(TEXTS, every_n_epochs=1, output_dir=False, **QUICK)
    checkpoint = _pl.callbacks.ModelCheckpoint(tmp_path, monitor="retention/kl_general", save_top_k=-1)
    fit({**trainer_options, "enable_checkpointing": True}, tokenizer, callback, checkpoint)
    assert len(checkpoint.best_k_models) == 2
    assert float(checkpoint.best_model_score) > 1e-3
    assert not (tmp_path / "retention").exists()


def test_retention_warns_on_exceeded_limits(trainer_options, tokenizer):
    callback = Retention(TEXTS, max_kl=1e-6, max_ppl_ratio=1e-6, min_top1_agreement=0.9999, every_n_steps=5, **QUICK)
    expected = r"step 5: kl_general is .* at most 1e-06 was allowed; ppl_ratio is .*; top1_agreement is .* at least"
    with pytest.warns(UserWarning, match=expected):
        trainer, _ = fit(trainer_options, tokenizer, callback)
    assert trainer.global_step == 16
    assert len(callback.breached) == 3


def test_retention_stops_training_on_exceeded_limit(trainer_options, tokenizer):
    callback = Retention(TEXTS, max_kl=1e-6, on_breach="stop", every_n_steps=5, **QUICK)
    with pytest.warns(UserWarning, match="Training stops"):
        trainer, _ = fit(trainer_options, tokenizer, callback)
    assert trainer.global_step == 5
    assert callback.result.step == 5


def test_run_that_retention_stopped_takes_no_more_steps_with_the_same_limits(trainer_options, tokenizer, tmp_path):
    options = {**trainer_options, "enable_checkpointing": True}

    def run(max_kl, ckpt_path=None):
        callback = Retention(TEXTS, max_kl=max_kl, on_breach="stop", every_n_steps=5, **QUICK)
        saver = _pl.callbacks.ModelCheckpoint(tmp_path, save_last=True)
        return fit(options, tokenizer, callback, saver, ckpt_path=ckpt_path)[0].global_step, callback

    last = str(tmp_path / "last.ckpt")
    assert run(1e-6)[0] == 5
    for _ in range(2):
        steps, callback = run(1e-6, last)
        assert (steps, callback.result.step, callback.gate_failed) == (5, 5, True)
    steps, callback = run(1e6, last)
    assert steps > 5
    assert not callback.gate_failed


def test_retention_is_silent_within_limits(trainer_options, tokenizer, recwarn):
    limits = {"max_kl": 1e6, "max_ppl_ratio": 1e6, "min_top1_agreement": 0.0}
    callback = Retention(TEXTS, on_breach="stop", every_n_steps=5, **limits, **QUICK)
    trainer, _ = fit(trainer_options, tokenizer, callback)
    assert (trainer.global_step, callback.breached) == (16, ())
    assert not [w for w in recwarn if "Retention" in str(w.message)]


def test_retention_warns_on_exceeded_limit_in_fabric(tokenizer):
    callback = Retention(TEXTS, max_kl=1e-6, on_breach="stop", tokenizer=tokenizer, progress=False, **QUICK)
    with pytest.warns(UserWarning, match="Retention: kl_general is"):
        fabric_loop(tokenizer, make("full"), callback)
    assert len(callback.breached) == 1


@pytest.mark.parametrize(("module_type", "base"), [(FullFineTuning, "step_0"), (LoRAFineTuning, "adapter_off")])
def test_retention_with_fine_tuning_modules(trainer_options, model_folder, module_type, base):
    callback = Retention(TEXTS, max_task_rows=5, **QUICK)
    module = module_type(model_folder, learning_rate=1e-2, lr_schedule="constant")
    trainer = Trainer(callbacks=[callback], max_epochs=2, **trainer_options)
    trainer.fit(module, PairDataModule(make_rows(12), validation=make_rows(8), cache_dir=False))
    assert (callback.result.base, callback.result.task_rows) == (base, 5)
    assert callback.result.kl_task.value > 1e-3
    measurement = RetentionMeasurement(module.tokenizer, TEXTS, progress=False, **QUICK)
    result = measurement.against(module.model, module_type(model_folder)._load_base())
    assert result.ppl_ratio.value == pytest.approx(callback.result.ppl_ratio.value, rel=1e-4)
    assert result.kl_general.value >= callback.result.kl_general.value - 1e-5


def test_retention_without_validation_rows_has_no_task_divergence(trainer_options, model_folder):
    callback = Retention(TEXTS, **QUICK)
    trainer = Trainer(callbacks=[callback], max_epochs=1, **trainer_options)
    trainer.fit(LoRAFineTuning(model_folder), PairDataModule(make_rows(4), cache_dir=False))
    assert callback.result.kl_task is None
    assert "retention/kl_task" not in trainer.callback_metrics


@pytest.mark.parametrize(
    ("lora", "base"), [(None, "step_0"), (True, "adapter_off"), ({"init_lora_weights": "pissa"}, "step_0")]
)
def test_retention_with_dpo(trainer_options, model_folder, lora, base):
    rows = [{"prompt": f"where is the {w}", "chosen": "here", "rejected": f"the {w}"} for w in WORDS]
    callback = Retention(TEXTS, **QUICK)
    trainer = Trainer(callbacks=[callback], max_epochs=2, **trainer_options)
    module = DPO(model_folder, lora=lora, learning_rate=1e-2, lr_schedule="constant")
    trainer.fit(module, PreferenceDataModule(rows, batch_size=4, cache_dir=False))
    assert (callback.result.base, callback.result.kl_task) == (base, None)
    assert callback.result.kl_general.value > 1e-5


def test_retention_refuses_invalid_setup_before_first_step(trainer_options, tokenizer):
    for options, message in (
        ({"texts": None}, "needs general texts .*Pass texts="),
        ({"every_n_steps": 0}, "every_n_steps=0"),
        ({"every_n_epochs": 0}, "every_n_epochs=0"),
        ({"on_breach": "raise"}, "on_breach='raise'"),
    ):
        with pytest.raises(RetentionError, match=message):
            Retention(**{"texts": TEXTS, **options})
    model = make("full")
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    for callback, message in (
        (Retention("missing.jsonl"), "can't be read"),
        (Retention(["fox " * 900], max_tokens=600), "the model's context is 512"),
    ):
        with pytest.raises(RetentionError, match=message):
            fit(trainer_options, tokenizer, callback, model=model)
    not_started = Retention(TEXTS, **QUICK)
    with pytest.raises(RetentionError, match="no tokenizer"):
        not_started.on_train_start(None, make_model())
    not_started.on_train_end(None, make_model())
    assert "Call its on_train_start before" in not_started.undefined
    not_started.tokenizer = tokenizer
    with pytest.raises(RetentionError, match=r"fabric\.call"):
        not_started.on_train_start()


def test_retention_is_configured_from_yaml():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_argument("--callbacks", type=list[_pl.Callback])
    config = """
- class_path: lightning_ft.callbacks.retention.Retention
  init_args: {texts: general.jsonl, max_kl: 0.1, on_breach: stop}
- class_path: lightning_ft.callbacks.retention.Retention
  init_args: {texts: [one text, another], name: other}
"""
    first, second = parser.instantiate(parser.parse_args([f"--callbacks={config}"])).callbacks
    assert (first.texts, first.max_kl, first.on_breach) == ("general.jsonl", 0.1, "stop")
    assert (second.texts, second.state_key) == (["one text", "another"], "Retention('other')")
