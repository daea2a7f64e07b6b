"""Work at the end of training: on the final weights, in any order of the callbacks, and despite failures."""

import errno
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from plain_module import WORDS
from safetensors.torch import load_file
from tiny import make_model

from lightning_ft import (
    ComputeMeter,
    ExportModel,
    LoRAFineTuning,
    PairDataModule,
    PromptBaseline,
    Retention,
    SampleCompletions,
    TokenSavings,
)
from lightning_ft.__main__ import GATE_FAILED, main
from lightning_ft._lightning import NAMESPACE, Trainer, _pl
from lightning_ft.errors import ConfigError, ExportError, LightningFTError
from lightning_ft.evaluation.retention.arithmetic import RetentionResult
from lightning_ft.evaluation.savings.result import SavingsResult
from lightning_ft.models.card_facts import MeasuredResult
from lightning_ft.modules.samples import RolloutSamples, read_samples
from lightning_ft.report.collect import collect
from lightning_ft.report.compose import compose_document
from lightning_ft.report.for_card import results_of_run
from lightning_ft.rewards.batch import Rewards

ROWS = [{"input": f"where is the {word}", "output": "here"} for word in WORDS]
TESTS = [{"input": f"what is a {word}", "output": "here"} for word in WORDS[:4]]
LIMIT = {"max_kl": 1e9, "resamples": 50}


class Scorer:
    """Scores the share of correct letters; raises `failure` if it is set."""

    failure = None

    def __call__(self, output, reference):
        if self.failure is not None:
            raise self.failure
        return (1 + len(set(output) & set(reference))) / 5


class CallAtEpochEnd(_pl.Callback):
    """Calls a function at the end of each epoch, to make a later measurement fail."""

    def __init__(self, function):
        self.function = function

    def on_train_epoch_end(self, trainer, pl_module):
        self.function()


def measuring_callbacks(scorer, **options):
    savings = {"scorer": scorer, "max_new_tokens": 2, "timed_requests": 0, "resamples": 50, **options}
    return [
        TokenSavings(PromptBaseline("Answer."), **savings),
        Retention(
            ["the quick brown fox jumps"], **LIMIT, **{n: v for n, v in options.items() if n == "every_n_epochs"}
        ),
        ComputeMeter(),
    ]


def fit(trainer_options, model_folder, callbacks, **options):
    module = LoRAFineTuning(model_folder, learning_rate=1e-2, lr_schedule="constant")
    trainer = Trainer(**{**trainer_options, "max_epochs": 1, **options}, callbacks=list(callbacks))
    data = PairDataModule(ROWS, test=TESTS, validation=TESTS, cache_dir=False, batch_size=4)
    trainer.fit(module, data)
    return trainer, module


def exported(tmp_path, module):
    """Whether the export contains the final weights of the module."""
    saved = load_file(tmp_path / "out" / "last" / "adapter_model.safetensors")
    final = {n.removeprefix("model.").replace(".default", ""): p for n, p in module.named_parameters()}
    return all(torch.equal(value, final[name]) for name, value in saved.items())


AVERAGES = {
    "ema": lambda: _pl.callbacks.EMAWeightAveraging(decay=0.5),
    "swa": lambda: _pl.callbacks.StochasticWeightAveraging(1e-2, swa_epoch_start=1, annealing_epochs=1),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("average", AVERAGES)
def test_final_weights_are_measured_and_exported(trainer_options, tmp_path, model_folder, average):
    export, (savings, retention, meter) = (
        ExportModel(str(tmp_path / "out")),
        measuring_callbacks(Scorer(), every_n_epochs=1),
    )
    savings.output_dir = retention.output_dir = meter.output_dir = False
    order = [savings, AVERAGES[average](), export, retention, meter]  # before and after weight averaging
    _, module = fit(trainer_options, model_folder, order if average == "ema" else order[::-1], max_epochs=2)
    assert exported(tmp_path, module)
    again = savings._measurement.after(module.model)
    assert again.arms["tuned"] == savings.result.arms["tuned"]
    assert retention._measurement.after(module.model).kl_general == retention.result.kl_general
    assert meter.result is not None


def fails_to_save(monkeypatch, **failures):
    for name, error in failures.items():
        owner = {"savings": SavingsResult, "retention": RetentionResult}[name]

        def save(self, *args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(owner, "save", save)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("position", [0, 3])
def test_finish_writes_reason_of_failed_measurement(trainer_options, tmp_path, model_folder, position):
    scorer = Scorer()
    callbacks = measuring_callbacks(scorer)
    savings, retention, meter = callbacks
    callbacks.insert(position, ExportModel(str(tmp_path / "out")))
    stale = tmp_path / "token_savings" / "token_savings.json"
    stale.parent.mkdir()
    stale.write_text("of an earlier run")
    make_fail = CallAtEpochEnd(lambda: setattr(scorer, "failure", RuntimeError("no \x1b[2J scorer")))
    trainer, module = fit(trainer_options, model_folder, [*callbacks, make_fail])
    assert exported(tmp_path, module)
    assert (savings.result, retention.undefined, meter.undefined) == (None, None, None)
    assert "RuntimeError: no \\x1b[2J scorer" in savings.undefined
    assert savings.failures == (f"Token savings is undefined: {savings.undefined}",)
    assert float(trainer.callback_metrics["token_savings/gate_passed"]) == 0
    assert not stale.exists()
    undefined = json.loads((tmp_path / "token_savings" / "undefined.json").read_text())
    assert undefined == {"Token savings": savings.undefined}
    assert "**FAIL: Token savings is undefined: " in (tmp_path / "report" / "report.md").read_text()
    card = (tmp_path / "out" / "last" / "README.md").read_text()
    assert "## Token savings\n\nThe measurement failed, so nothing is known about it." in card
    assert "Not measured" not in card
    assert results_of_run(str(tmp_path), "")[-1] == MeasuredResult("Token savings", failed=True)  # of a later export

    scorer.failure = None  # a later success removes the reason
    if position == 0:
        fit(trainer_options, model_folder, [savings])
        assert savings.undefined is None
        assert collect(tmp_path).undefined == {}


@pytest.mark.filterwarnings("ignore")
def test_a_shared_folder_keeps_the_reason_of_each_failure(tmp_path, tokenizer):
    model, options = make_model(), {"output_dir": str(tmp_path), "tokenizer": tokenizer, "progress": False}
    retention = Retention(["the quick brown fox jumps"], **LIMIT, **options)
    meter = ComputeMeter(output_dir=str(tmp_path))
    retention.finish(None, model)  # fails, since it wasn't started
    meter.finish(None, model)  # so does this
    (failed,) = collect(tmp_path).undefined.values()
    assert [each.measurement for each in failed] == ["Retention", "Compute"]
    headlines = compose_document(collect(tmp_path)).headlines
    assert [line.text.split(":")[0] for line in headlines] == ["Retention is undefined", "Compute is undefined"]
    meter.on_train_start(None, model)
    meter.on_train_batch_start()
    model(input_ids=torch.tensor([[5, 6]])).logits.sum().backward()
    meter.on_train_batch_end(batch={"input_ids": torch.tensor([[5, 6]])})
    meter.finish(None, model)
    assert (meter.undefined, meter.unwritten) == (None, None)
    (failed,) = collect(tmp_path).undefined.values()
    assert [each.measurement for each in failed] == ["Retention"]
    retention.on_train_start(None, model)
    retention.finish(None, model)
    assert (retention.undefined, retention.unwritten) == (None, None)
    assert collect(tmp_path).undefined == {}


@pytest.mark.filterwarnings("ignore")
def test_finish_on_full_disk_keeps_other_results(trainer_options, tmp_path, model_folder, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")
    fails_to_save(monkeypatch, savings=full, retention=full)

    def no_report(*_):
        raise full

    monkeypatch.setattr("lightning_ft.callbacks.measuring.write_files", no_report)
    callbacks = [*measuring_callbacks(Scorer()), ExportModel(str(tmp_path / "out"))]
    _, module = fit(trainer_options, model_folder, callbacks)
    assert exported(tmp_path, module)
    savings, retention, meter, _ = callbacks
    assert None not in (savings.result, retention.result, meter.result)
    assert [len(callback.failures) for callback in callbacks] == [1, 1, 1, 0]
    assert "No space left on device" in savings.failures[0]
    assert f"Token savings was not written to {tmp_path / 'token_savings'}" in savings.failures[0]
    assert "The report was not written" in meter.failures[0]


@pytest.mark.filterwarnings("ignore")
def test_savings_after_epoch_reports_failure_and_continues(trainer_options, model_folder):
    scorer = Scorer()
    savings = TokenSavings(
        PromptBaseline("Answer."),
        scorer=scorer,
        max_new_tokens=2,
        timed_requests=0,
        resamples=50,
        every_n_epochs=1,
        output_dir=False,
    )
    make_fail = CallAtEpochEnd(lambda: setattr(scorer, "failure", RuntimeError if scorer.failure is None else None))
    fit(trainer_options, model_folder, [make_fail, savings], max_epochs=2)
    assert savings.result is not None
    assert [failure.split(":")[0] for failure in savings.failures] == ["Token savings after epoch 0 is undefined"]


@pytest.mark.filterwarnings("ignore")
def test_export_raises_after_other_work_is_done(trainer_options, tmp_path, model_folder, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lightning_ft.modules.exporting.export", full)
    savings, *_ = measuring_callbacks(Scorer())
    with pytest.raises(ExportError, match=r"The last weights were not exported to .*No space left"):
        fit(trainer_options, model_folder, [ExportModel(str(tmp_path / "out")), savings])
    assert savings.result is not None
    assert (tmp_path / "token_savings" / "token_savings.json").is_file()


def test_attempt_propagates_keyboard_interrupt(trainer_options, tmp_path, model_folder):
    scorer = Scorer()
    savings, *_ = measuring_callbacks(scorer)
    make_fail = CallAtEpochEnd(lambda: setattr(scorer, "failure", KeyboardInterrupt()))
    with pytest.raises(SystemExit):
        fit(trainer_options, model_folder, [make_fail, savings, ExportModel(str(tmp_path / "out"))])
    assert savings.failures == ()
    assert (tmp_path / "out" / "last" / "README.md").is_file()  # exports come first


def test_setup_refuses_unwritable_folder(trainer_options, tmp_path, model_folder):
    (tmp_path / "file").write_text("")
    for callback in (
        ComputeMeter(output_dir=tmp_path / "file" / "below"),
        Retention(["a b"], output_dir=tmp_path / "file"),
    ):
        with pytest.raises(ConfigError, match=f"{type(callback).__name__} can't write .*file' is a file"):
            fit(trainer_options, model_folder, [callback])


@pytest.mark.parametrize("name", ["batch_size", "resamples", "seed"])
def test_retention_refuses_invalid_numbers_before_training(trainer_options, model_folder, name):
    callback = Retention(["a b"], **{name: -1})
    with pytest.raises(LightningFTError, match=r"=-1: expected at least \d"):
        fit(trainer_options, model_folder, [callback])
    assert callback.result is None
    for limit in ({"max_kl": -1}, {"min_top1_agreement": 95}):
        with pytest.raises(LightningFTError, match=f"{next(iter(limit))}=.*expected a number (from|of at least) 0"):
            Retention(["a b"], **limit)


def test_finish_with_fabric_warns_on_failure(tokenizer):
    fabric_type = pytest.importorskip("lightning.fabric" if NAMESPACE == "lightning" else "lightning_fabric").Fabric
    scorer = Scorer()
    options = {"tokenizer": tokenizer, "progress": False, "output_dir": False}
    from lightning_ft.types import Message, Request

    requests = [Request("a", (Message(role="user", content="where"),), "here")]
    savings = TokenSavings(
        PromptBaseline("Answer."), scorer=scorer, requests=requests, timed_requests=0, max_new_tokens=2, **options
    )
    retention = Retention(["the quick brown fox"], **options, **LIMIT)
    fabric = fabric_type(accelerator="cpu", devices=1, callbacks=[savings, retention])
    model, _ = fabric.setup(make_model(), torch.optim.SGD(make_model().parameters(), lr=0.1))
    fabric.call("on_train_start", fabric, model)
    scorer.failure = RuntimeError("gone")
    with pytest.warns(UserWarning, match="Token savings is undefined: .*gone"):
        fabric.call("on_train_end", fabric, model)
    assert (savings.result, retention.undefined) == (None, None)


def test_samples_write_failure_does_not_stop_training(tmp_path, monkeypatch):
    rewards = Rewards(("short",), torch.tensor([[1.0]]), torch.tensor([1.0]))
    callback, tables = SampleCompletions(tmp_path / "samples.jsonl"), []
    logger = SimpleNamespace(log_table=lambda **table: tables.append(table), log_dir=str(tmp_path))
    trainer = SimpleNamespace(
        log_dir=str(tmp_path), global_step=0, is_global_zero=True, loggers=[logger], callback_metrics={}
    )
    callback.on_train_start(trainer, None)

    def show(step):
        record = RolloutSamples(step, ["2+2?"], ["4"], rewards, [0.0], [False], [2])
        callback.on_train_batch_end(trainer, SimpleNamespace(last_rollout=record), None, None, 0)

    show(0)
    with monkeypatch.context() as full:
        full.setattr("lightning_ft.modules.samples._line", lambda row: 1 / 0)
        with pytest.warns(UserWarning, match="SampleCompletions could not write .*Training continues"):
            show(1)
        show(2)
    show(3)
    assert len(callback.failures) == 1
    assert [row["step"] for row in read_samples(tmp_path / "samples.jsonl")] == [0, 3]
    assert len(tables) == 4


SCORER = """
class Scorer:
    calls = 0

    def __call__(self, output, reference):
        self.calls += 1
        if self.calls > {limit}:
            raise RuntimeError("the scorer gave up")
        return 0.5

score = Scorer()
"""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("limit", "status"), [(12, 1), (99, GATE_FAILED), (99, 0)], ids=["failure", "gate", "dev run"])
def test_main_exit_status_reflects_failures_and_gates(tmp_path, model_folder, monkeypatch, capsys, limit, status):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TESTS))
    (tmp_path / "mine.py").write_text(SCORER.format(limit=limit))
    init = {
        "baseline": {"class_path": "lightning_ft.PromptBaseline", "init_args": {"system": "Answer."}},
        "scorer": f"{tmp_path}/mine.py:score",
        "max_new_tokens": 2,
        "timed_requests": 0,
        "resamples": 50,
        "output_dir": False,
    }
    config = {
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(tmp_path),
            "callbacks": [
                {"class_path": "lightning_ft.TokenSavings", "init_args": init},
                {"class_path": "lightning_ft.ExportModel", "init_args": {"output": str(tmp_path / "out")}},
            ],
        },
        "model": {"class_path": "lightning_ft.LoRAFineTuning", "init_args": {"model": model_folder}},
        "data": {
            "class_path": "lightning_ft.PairDataModule",
            "init_args": {
                "train": f"{tmp_path}/train.jsonl",
                "test": f"{tmp_path}/test.jsonl",
                "cache_dir": str(tmp_path / "cache"),
            },
        },
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    arguments = ["fit", "--config", "run.yaml"]
    if status == 0:
        arguments.append("--trainer.fast_dev_run=true")
    monkeypatch.setattr(sys, "argv", ["lightning-ft", *arguments])
    if status == 0:
        main(arguments)  # the same gate
        return
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    if status == GATE_FAILED:
        assert stopped.value.code == GATE_FAILED
        assert "token_savings" in capsys.readouterr().err
    else:
        assert "MeasurementError: " in stopped.value.code  # printed, with exit status 1
        assert "the scorer gave up" in stopped.value.code
    assert (tmp_path / "out" / "last" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("name", ["", "../../elsewhere", "/elsewhere", "a/../b"])
def test_name_may_not_lead_out_of_the_folder(name, tmp_path):
    trainer = Trainer(default_root_dir=tmp_path, logger=False, enable_progress_bar=False)
    with pytest.raises(ConfigError, match="expected a name such as 'refunds'"):
        ComputeMeter(name=name).setup(trainer, None, "fit")
    assert list(tmp_path.iterdir()) == []


def test_results_that_would_replace_those_of_another_callback_are_refused(trainer_options, tmp_path, model_folder):
    retention, again = (
        Retention(["the quick brown fox jumps"], name=name, output_dir=tmp_path / "results") for name in "ab"
    )
    message = r"Two Retention callbacks, 'a' and 'b', write the same files into .*results'.*a different output_dir="
    with pytest.raises(ConfigError, match=message):
        fit(trainer_options, model_folder, [retention, again])
    meter = ComputeMeter(output_dir=tmp_path / "results")  # writes another file
    fit(trainer_options, model_folder, [meter, retention])
    assert (tmp_path / "results" / "retention.json").is_file()
