"""ExportModel: exports of the final and best weights, and checks before training."""

import pytest
import torch
from safetensors.torch import load_file
from their_module import Theirs, hf_loader
from tiny import make_rows

from lightning_ft import ExportModel, FullFineTuning, LoRAFineTuning, PairDataModule
from lightning_ft._lightning import LightningModule, Trainer, _pl
from lightning_ft.callbacks import base as callbacks_base
from lightning_ft.callbacks import export as export_callback
from lightning_ft.errors import ConfigError, ExportError

ROWS = make_rows(24)


def run(module, trainer_options, tmp_path, *, monitor="val/loss", others=(), **export):
    # mode="max" keeps the epoch with the largest loss, which isn't the last one
    saver = _pl.callbacks.ModelCheckpoint(tmp_path / "ckpt", monitor=monitor, mode="max")
    callback = ExportModel(str(tmp_path / "out"), **export)
    options = {**trainer_options, "enable_checkpointing": True}
    trainer = Trainer(**options, max_epochs=3, callbacks=[*others, saver, callback])
    trainer.fit(module, PairDataModule(ROWS, validation=ROWS, cache_dir=False))
    return callback, saver


@pytest.mark.parametrize("module_type", [FullFineTuning, LoRAFineTuning])
def test_export_writes_last_and_best_weights(trainer_options, tmp_path, model_folder, module_type):
    module = module_type(model_folder, learning_rate=1e-2)
    callback, saver = run(module, trainer_options, tmp_path)
    assert callback.exported == {part: tmp_path / "out" / part for part in ("last", "best")}
    final = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    for part, weights in (("last", final), ("best", torch.load(saver.best_model_path)["state_dict"])):
        name = "adapter_model.safetensors" if module_type is LoRAFineTuning else "model.safetensors"
        saved = load_file(tmp_path / "out" / part / name)
        for key, value in weights.items():
            stored = saved[key.removeprefix("model.").replace(".default", "")]
            assert torch.equal(stored, value), (part, key)
    assert any(not torch.equal(final[name], value) for name, value in weights.items())


def test_export_merges_adapter(trainer_options, tmp_path, model_folder):
    callback, _ = run(LoRAFineTuning(model_folder, dtype="float32"), trainer_options, tmp_path, merge=True)
    assert (callback.exported["best"] / "model.safetensors").is_file()


def test_export_without_monitor_writes_last_weights_only(trainer_options, tmp_path, model_folder):
    callback, _ = run(FullFineTuning(model_folder), trainer_options, tmp_path, monitor=None)
    assert list(callback.exported) == ["last"]


def test_export_writes_best_weights_of_the_checkpoints_with_a_monitor(trainer_options, tmp_path, model_folder):
    resumable = _pl.callbacks.ModelCheckpoint(tmp_path / "resumable", every_n_train_steps=1)
    newest = _pl.callbacks.ModelCheckpoint(tmp_path / "newest", monitor="step", mode="max", save_top_k=1)
    module = LoRAFineTuning(model_folder, learning_rate=1e-2)
    callback, saver = run(module, trainer_options, tmp_path, others=[resumable, newest])
    assert list(callback.exported) == ["last", "best"]
    saved = load_file(callback.exported["best"] / "adapter_model.safetensors")
    for key, value in torch.load(saver.best_model_path)["state_dict"].items():
        assert torch.equal(saved[key.removeprefix("model.").replace(".default", "")], value)


def test_export_of_the_best_weights_leaves_the_final_module(trainer_options, tmp_path, tokenizer):
    """Buffers of the best checkpoint, such as running means, must not stay in the trained module."""

    class Normalized(Theirs):
        def __init__(self):
            super().__init__(tokenizer)
            self.norm = torch.nn.BatchNorm1d(2)

        def training_step(self, batch, batch_idx):
            self.norm(torch.randn(4, 2) + self.global_step)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            self.log("val/epoch", float(self.current_epoch))

    module, loader = Normalized(), hf_loader(tokenizer)
    saver = _pl.callbacks.ModelCheckpoint(tmp_path / "ckpt", monitor="val/epoch", mode="min")
    options = {**trainer_options, "enable_checkpointing": True, "max_epochs": 2}
    Trainer(**options, callbacks=[saver, ExportModel(str(tmp_path / "out"))]).fit(module, loader, loader)
    assert (tmp_path / "out" / "best").is_dir()
    assert int(module.norm.num_batches_tracked) == 2 * len(loader)


def test_export_refuses_best_weights_by_several_metrics_before_training(trainer_options, tmp_path, model_folder):
    other = _pl.callbacks.ModelCheckpoint(tmp_path / "other", monitor="val/loss_per_byte")
    module = FullFineTuning(model_folder)
    with pytest.raises(ConfigError, match=r"monitor 'val/loss_per_byte' and 'val/loss': .* pass best=False"):
        run(module, trainer_options, tmp_path, others=[other])
    assert module.trainer.global_step == 0


@pytest.mark.parametrize("output", ["out", None])
def test_two_exports_to_one_folder_are_refused_before_training(trainer_options, tmp_path, model_folder, output):
    folder = None if output is None else str(tmp_path / output)
    callbacks = [ExportModel(folder, overwrite=True), ExportModel(folder, merge=True, overwrite=True)]
    trainer = Trainer(**{**trainer_options, "default_root_dir": tmp_path}, max_steps=1, callbacks=callbacks)
    with pytest.raises(ConfigError, match=r"Two ExportModel callbacks export to .* Pass a different output="):
        trainer.fit(LoRAFineTuning(model_folder), PairDataModule(ROWS, cache_dir=False))
    assert trainer.global_step == 0


def test_export_refuses_nonempty_folder_before_training(trainer_options, tmp_path, model_folder):
    (tmp_path / "out" / "best").mkdir(parents=True)
    (tmp_path / "out" / "best" / "mine.txt").write_text("keep")
    module = FullFineTuning(model_folder)
    with pytest.raises(ExportError, match="overwrite=True"):
        run(module, trainer_options, tmp_path)
    assert module.trainer.global_step == 0
    run(FullFineTuning(model_folder), trainer_options, tmp_path, overwrite=True)


def test_export_refuses_folders_that_cannot_be_made_before_training(trainer_options, tmp_path, model_folder):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        trainer = Trainer(**trainer_options, max_steps=1, callbacks=[ExportModel(folder)])
        with pytest.raises(ExportError, match=r"can't be made, since .*file is a file"):
            trainer.fit(FullFineTuning(model_folder), PairDataModule(ROWS, cache_dir=False))
        assert trainer.global_step == 0
    with pytest.raises(ConfigError, match="output=5: expected the path of a folder"):
        ExportModel(5)


def test_export_of_fast_dev_run_is_tried_out_and_not_kept(trainer_options, tmp_path, model_folder, monkeypatch):
    for name in ("check_hub", "warn_of_local_base", "upload_export"):
        monkeypatch.setattr(export_callback, name, lambda *_, name=name, **__: calls.append(name))
    calls, written = [], []
    monkeypatch.setattr(ExportModel, "_write_card", lambda self, *_: written.append(self.exported["last"]))
    (tmp_path / "out" / "last").mkdir(parents=True)
    (tmp_path / "out" / "last" / "model.safetensors").write_text("of a real run")
    callback = ExportModel(str(tmp_path / "out"), overwrite=True, push_to_hub="organization/name")
    trainer = Trainer(**trainer_options, fast_dev_run=True, callbacks=[callback])
    trainer.fit(FullFineTuning(model_folder), PairDataModule(ROWS, cache_dir=False))
    assert [path.read_text() for path in (tmp_path / "out").rglob("*.*")] == ["of a real run"]
    assert "upload_export" not in calls
    assert "check_hub" in calls, "what would refuse the upload of a real run is found"
    assert [path.exists() for path in written] == [False], "it was exported to a folder that is removed"
    assert (callback.exported, callback.failures) == ({}, ())


def test_export_refuses_other_modules(trainer_options, tmp_path):
    class Other(LightningModule):
        def training_step(self, batch, batch_idx):
            raise AssertionError

        def configure_optimizers(self):
            return None

    trainer = Trainer(**trainer_options, callbacks=[ExportModel(str(tmp_path))])
    with pytest.raises(ConfigError, match="Other"):
        trainer.fit(Other(), torch.utils.data.DataLoader([0]))


def test_export_refuses_merge_that_changes_output(fit_module, tmp_path, monkeypatch):
    """A merge with large simulated rounding errors; with float32 weights, the message doesn't blame the dtype."""
    from peft.tuners.lora import LoraModel

    merge = LoraModel.merge_and_unload

    def rounded(self, **options):
        merged = merge(self, **options)
        with torch.no_grad():
            for parameter in merged.parameters():
                parameter.add_(torch.randn_like(parameter))
        return merged

    monkeypatch.setattr(LoraModel, "merge_and_unload", rounded)
    with pytest.raises(ExportError, match="weights are float32"):
        fit_module.export(tmp_path / "merged", merge=True)
    fit_module.model.to(torch.bfloat16)
    with pytest.raises(ExportError, match=r"Merging in torch.bfloat16 loses too much precision. .* dtype='float32'"):
        fit_module.export(tmp_path / "merged", merge=True)


@pytest.fixture
def fit_module(trainer_options, model_folder):
    module = LoRAFineTuning(model_folder, learning_rate=1e-2)
    Trainer(**trainer_options, max_epochs=2).fit(module, PairDataModule(ROWS, cache_dir=False))
    return module


def test_export_that_failed_on_another_rank_is_not_listed(trainer_options, tmp_path, model_folder, monkeypatch):
    """Only the rank that writes fails; the others would go on to write cards with it, and wait forever."""
    monkeypatch.setattr(callbacks_base, "first_over_ranks", lambda reason: "disk full on rank 0")
    callback = ExportModel(str(tmp_path / "out"))
    trainer = Trainer(**trainer_options, max_steps=1, callbacks=[callback])
    with pytest.raises(ExportError, match="disk full on rank 0"):
        trainer.fit(FullFineTuning(model_folder), PairDataModule(ROWS, cache_dir=False))
    assert callback.exported == {}
    assert len(callback.failures) == 1
