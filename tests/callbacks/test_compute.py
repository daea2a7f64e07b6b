"""ComputeMeter with a Trainer, in a Fabric loop and in a manual loop."""

import copy
import json
import logging

import pytest
import torch
from tiny import make_model, make_rows
from torch.utils._python_dispatch import _get_current_dispatch_mode

from lightning_ft import GRPO, FullFineTuning, LoRAFineTuning, PairDataModule, PromptDataModule
from lightning_ft._lightning import NAMESPACE, Callback, LightningModule, Trainer, _pl
from lightning_ft.callbacks.compute import ComputeMeter
from lightning_ft.errors import ConfigError
from lightning_ft.evaluation.compute.arithmetic import ComputeResult
from lightning_ft.evaluation.compute.measurement import ComputeMeasurement

BATCHES, ROWS, LENGTH = 6, 2, 16
DETERMINISTIC = (
    "flops",
    "tokens",
    "supervised_tokens",
    "steps",
    "sampled_steps",
    "trainable_parameters",
    "parameters",
    "dtype",
)


class Plain(LightningModule):
    """Any LightningModule with a model."""

    def __init__(self, fails_at=None, skips_at=None):
        super().__init__()
        self.model = make_model()
        self.fails_at, self.skips_at = fails_at, skips_at

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == self.skips_at else None

    def training_step(self, batch, batch_idx):
        if batch_idx == self.fails_at:
            raise RuntimeError("out of memory")
        return self.model(**batch, use_cache=False).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def batches(count=BATCHES):
    ids = torch.randint(0, 400, (count, ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": batch, "labels": torch.where(batch % 2 == 0, batch, -100)} for batch in ids]


def fit(options, *callbacks, module=None, ckpt_path=None, **more):
    module = module or Plain()
    trainer = Trainer(**{"max_epochs": 1, **options, **more}, callbacks=list(callbacks))
    loader = torch.utils.data.DataLoader(batches(), batch_size=None, collate_fn=None)
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return trainer


def deterministic_fields(result):
    return {name: getattr(result, name) for name in DETERMINISTIC}


def manual_loop():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    measurement = ComputeMeasurement()
    measurement.start(model)
    for batch in batches():
        with measurement.step(batch):
            model(**batch, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return measurement.stop()


def fabric_loop(meter):
    fabric_type = pytest.importorskip("lightning.fabric" if NAMESPACE == "lightning" else "lightning_fabric").Fabric
    fabric = fabric_type(accelerator="cpu", devices=1, callbacks=[meter])
    model = make_model()
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.01))
    fabric.call("on_train_start", fabric, model)
    for index, batch in enumerate(batches()):
        fabric.call("on_train_batch_start", fabric, model, batch, index)
        fabric.backward(model(**batch, use_cache=False).loss)
        optimizer.step()
        optimizer.zero_grad()
        fabric.call("on_train_batch_end", fabric, model, None, batch, index)
    fabric.call("on_train_end", fabric, model)
    return meter.result


def test_meter_agrees_between_trainer_fabric_and_manual_loop(trainer_options, tmp_path):
    meter = ComputeMeter()
    fit(trainer_options, meter)
    manual = manual_loop()
    targets = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches())
    assert (manual.tokens, manual.supervised_tokens, manual.steps) == (BATCHES * ROWS * LENGTH, targets, BATCHES)
    assert (
        deterministic_fields(meter.result)
        == deterministic_fields(manual)
        == deterministic_fields(fabric_loop(ComputeMeter(output_dir=tmp_path / "fabric")))
    )
    written = [tmp_path / "compute" / "compute.json", tmp_path / "fabric" / "compute.json"]
    read = [ComputeResult.from_dict(json.loads(path.read_text(encoding="utf-8"))) for path in written]
    assert read[0] == meter.result
    assert deterministic_fields(read[1]) == deterministic_fields(manual)


@pytest.mark.parametrize("module_type", [FullFineTuning, LoRAFineTuning])
def test_meter_does_not_change_weights(model_folder, trainer_options, module_type):
    ends = []
    for callbacks in ([], [ComputeMeter(every_n_steps=1)]):
        torch.manual_seed(0)
        module = module_type(model_folder, learning_rate=1e-2)
        trainer = Trainer(**trainer_options, max_epochs=2, callbacks=callbacks)
        trainer.fit(module, PairDataModule(train=make_rows(), validation=0.2, batch_size=4))
        ends.append(module.model.state_dict())
    assert all(torch.equal(ends[0][name], value) for name, value in ends[1].items())
    result = callbacks[0].result
    assert result.uncounted == ()
    assert 0 < result.supervised_tokens < result.tokens
    assert (result.trainable_parameters < result.parameters) == (module_type is LoRAFineTuning)


def test_meter_counts_accumulated_micro_batches_as_one_step(trainer_options):
    meter, plain = ComputeMeter(), ComputeMeter()
    fit(trainer_options, meter, accumulate_grad_batches=3)
    fit(trainer_options, plain)
    assert (meter.result.steps, meter.result.tokens) == (2, plain.result.tokens)
    assert meter.result.flops == plain.result.flops


def test_meter_resumes_sums_from_checkpoint(trainer_options, tmp_path):
    uninterrupted = ComputeMeter()
    fit(trainer_options, uninterrupted, max_epochs=2)
    half = fit(trainer_options, ComputeMeter())
    half.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)["callbacks"]["ComputeMeter('compute')"]
    assert json.loads(json.dumps(saved)) == saved
    resumed = ComputeMeter()
    fit(trainer_options, resumed, max_epochs=2, ckpt_path=tmp_path / "half.ckpt")
    assert deterministic_fields(resumed.result) == deterministic_fields(uninterrupted.result)
    assert resumed.result.train_seconds > saved["total"]["seconds"] - saved["slowed"]["seconds"]


def test_meter_continues_with_same_trainer_and_restarts_with_new_one(trainer_options):
    meter = ComputeMeter()
    trainer = fit(trainer_options, meter)
    first = meter.result
    trainer.fit_loop.max_epochs = 2
    trainer.fit(Plain(), torch.utils.data.DataLoader(batches(), batch_size=None))
    assert (meter.result.steps, meter.result.tokens) == (2 * BATCHES, 2 * first.tokens)
    fit(trainer_options, meter)
    assert deterministic_fields(meter.result) == deterministic_fields(first)


class Busy(Callback):
    """Allocates memory in one hook."""

    def __init__(self, where):
        self.where = where

    def on_train_start(self, *_):
        self.use("start")

    def on_validation_end(self, *_):
        self.use("validation")

    def on_train_end(self, *_):
        self.use("end")

    def use(self, where):
        if where == self.where:
            torch.ones(512 * 2**20 // 4)


def test_meter_measures_peak_memory_of_training_only(trainer_options):
    peaks = {}
    for where in ("nowhere", "start", "end"):
        meter = ComputeMeter()
        fit(trainer_options, Busy(where), meter)
        if meter.result.memory_source != "resident":
            pytest.skip("this system can't reset the peak")
        peaks[where] = meter.result.peak_memory_bytes - meter.result.memory_at_start_bytes
    assert max(peaks.values()) < 256 * 2**20


def test_meter_logs_and_prints_metrics(trainer_options, tmp_path, caplog):
    logger = _pl.loggers.CSVLogger(tmp_path, name="logs", version="v")
    meter = ComputeMeter(peak_flops=1e12, log_every_n_steps=2, name="cost")
    with caplog.at_level(logging.INFO):
        trainer = fit({**trainer_options, "logger": logger}, meter)
    assert "Training took" in caplog.text
    lines = (tmp_path / "logs" / "v" / "metrics.csv").read_text(encoding="utf-8").splitlines()
    names = {name for name in lines[0].split(",") if name.startswith("cost/")}
    assert {f"cost/{n}" for n in ("flops", "flops_per_token", "tokens_per_second", "peak_memory_bytes", "mfu")} <= names
    steps = [line.split(",")[lines[0].split(",").index("step")] for line in lines[1:]]
    assert steps == ["2", "4", "6", "6"]  # the last is that of the end of training
    assert float(trainer.callback_metrics["cost/flops"]) == pytest.approx(meter.result.flops, rel=1e-6)
    assert (tmp_path / "logs" / "v" / "cost" / "compute.json").exists()


@pytest.mark.parametrize("skips_at", [3, 0])
def test_meter_supports_skipped_rest_of_epoch(trainer_options, skips_at):
    meter = ComputeMeter(every_n_steps=1)
    if skips_at == 0:
        with pytest.warns(UserWarning, match="Compute is undefined: .*no training step"):
            fit(trainer_options, meter, module=Plain(skips_at=skips_at))
        assert meter.result is None
    else:
        fit(trainer_options, meter, module=Plain(skips_at=skips_at))
        assert meter.result.steps == skips_at
    assert _get_current_dispatch_mode() is None


def test_meter_leaves_dispatch_mode_after_error(trainer_options):
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(trainer_options, ComputeMeter(every_n_steps=1), module=Plain(fails_at=2))
    assert _get_current_dispatch_mode() is None


def test_meter_includes_rollouts(model_folder, trainer_options):
    meter = ComputeMeter(every_n_steps=1)
    torch.manual_seed(0)
    module = GRPO(
        model_folder,
        rewards=lambda prompts, completions, **_: [float(len(c)) for c in completions],
        num_completions=2,
        max_new_tokens=4,
        learning_rate=1e-3,
    )
    prompts = [{"prompt": row["input"]} for row in make_rows(4)]
    Trainer(**trainer_options, max_epochs=1, callbacks=[meter]).fit(
        module, PromptDataModule(train=prompts, batch_size=2)
    )
    result = meter.result
    assert (result.steps, result.uncounted) == (2, ())
    assert 0 < result.supervised_tokens <= 4 * 2 * 4
    assert result.tokens > result.supervised_tokens


def test_meter_uses_formula_for_compiled_modules(model_folder, trainer_options):
    meter = ComputeMeter()
    module = FullFineTuning(model_folder, torch_compile={"backend": "eager"})
    Trainer(**trainer_options, max_steps=2, callbacks=[meter]).fit(
        module, PairDataModule(train=make_rows(8), batch_size=4)
    )
    assert (meter.result.flops_source, meter.result.sampled_steps) == ("formula", 0)
    assert meter.result.flops > 0


def test_meter_refuses_invalid_arguments_and_missing_start():
    for options in ({"every_n_steps": 0}, {"peak_flops": -1.0}, {"log_every_n_steps": 0}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            ComputeMeter(**options)
    with pytest.raises(ConfigError, match="Call its on_train_start before"):
        ComputeMeter().on_train_batch_start()


def test_meter_keeps_loaded_state_before_training():
    meter = ComputeMeter()
    state = {"total": {}}
    meter.load_state_dict(copy.deepcopy(state))
    assert meter.state_dict() == state
    assert ComputeMeter().state_dict() == {}
    assert ComputeMeter(name="other").state_key != meter.state_key
