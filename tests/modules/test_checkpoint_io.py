"""Checkpoints are written atomically, checked on reading, and never execute code."""

import importlib
import os
import re
import warnings

import fsspec
import pytest
import torch
from full_disk import full_disk
from tiny import make_rows

from lightning_ft import DPO, FullFineTuning, LoRAFineTuning, PairDataModule, PreferenceDataModule, RewardModeling
from lightning_ft._lightning import Trainer, _pl
from lightning_ft.checkpoint_file import read_checkpoint
from lightning_ft.errors import CheckpointError, ConfigError, FileWriteError, RewardError
from lightning_ft.modules.checkpoint_io import WholeCheckpointIO
from lightning_ft.rewards.resolve import _load_checkpoint

ROWS = make_rows(12)


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


class Code:
    """Writes a file named `ran` when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.fixture
def module(model_folder):
    alike = {"lr_schedule": "constant", "warmup_ratio": 0.0}  # independent of the run's length
    return lambda: LoRAFineTuning(model_folder, lora={"r": 2}, learning_rate=1e-2, **alike)


@pytest.fixture
def run(fit, module, tmp_path):
    """Resume from the last checkpoint, and return the weights."""

    def run(steps, folder=tmp_path / "k", ckpt_path="last", every=1):
        trained = module()
        saver = _pl.callbacks.ModelCheckpoint(
            dirpath=folder, save_last=True, every_n_train_steps=every, save_top_k=-1, filename="{step}"
        )
        options = {"max_steps": steps, "max_epochs": -1, "enable_checkpointing": True, "callbacks": [saver]}
        fit(trained, ROWS, ckpt_path=ckpt_path, **options)
        return weights(trained)

    return run


@pytest.mark.parametrize("harm", ["half", "code"])
def test_damaged_last_checkpoint_falls_back_to_the_newest_intact_one(run, tmp_path, monkeypatch, harm):
    monkeypatch.chdir(tmp_path)
    run(3)
    whole = run(4, folder=tmp_path / "whole")
    last = tmp_path / "k" / "last.ckpt"
    content = last.read_bytes()
    if harm == "code":
        torch.save({"state_dict": Code()}, last)
    else:
        last.write_bytes(content[: len(content) // 2])
    (tmp_path / "k" / "step=3.ckpt").write_bytes(b"")  # the newest of the others is damaged too
    for number in (1, 2):
        os.utime(tmp_path / "k" / f"step={number}.ckpt", (number, number))
    with pytest.warns(UserWarning, match=r"last\.ckpt' .*newest whole checkpoint of the run.*step=2\.ckpt"):
        found = run(4)
    assert same(found, whole)
    assert not (tmp_path / "ran").exists()


def test_damaged_checkpoint_without_alternative_is_named(run, tmp_path):
    run(1)
    for file in (tmp_path / "k").iterdir():
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"last\.ckpt' is damaged"):
        run(2)
    with pytest.raises(CheckpointError, match=r"step=1\.ckpt' is damaged"):
        run(2, ckpt_path=str(tmp_path / "k" / "step=1.ckpt"))


def test_full_disk_error_names_the_checkpoint_and_keeps_earlier_ones(run, tmp_path):
    run(1)
    before = {path.name: path.read_bytes() for path in (tmp_path / "k").iterdir()}
    with full_disk(10_000), pytest.raises(FileWriteError, match=r"step=2\.ckpt' can't be written \(File too large\)"):
        run(2)
    assert {path.name: path.read_bytes() for path in (tmp_path / "k").iterdir()} == before
    assert same(run(2), run(2, folder=tmp_path / "whole"))


@pytest.mark.parametrize(
    ("call", "content"), [("fit", "folder"), ("validate", b""), ("test", b"text"), ("predict", "code")]
)
def test_trainer_error_names_a_file_that_is_not_a_checkpoint(
    module, trainer_options, tmp_path, monkeypatch, call, content
):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "some.ckpt"
    if content == "folder":
        file.mkdir()
    elif content == "code":
        torch.save({"state_dict": Code()}, file)
    else:
        file.write_bytes(content)
    data = PairDataModule(ROWS, validation=ROWS, test=ROWS, predict=ROWS, cache_dir=False)
    with pytest.raises(CheckpointError, match=r"some\.ckpt'"):
        getattr(Trainer(**trainer_options), call)(module(), data, ckpt_path=str(file))
    assert not (tmp_path / "ran").exists()


def test_weights_only_checkpoint_cannot_be_resumed(fit, module, trainer_options, tmp_path):
    trained = module()
    fit(trained, ROWS, max_steps=1).save_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    with pytest.raises(CheckpointError, match=r"a\.ckpt' contains weights only.*load_checkpoint"):
        fit(module(), ROWS, ckpt_path=tmp_path / "a.ckpt")
    again = module()
    again.load_checkpoint(tmp_path / "a.ckpt")
    assert same(weights(again), weights(trained))


def test_foreign_checkpoints_are_refused(fit, module, model_folder, trainer_options, tmp_path):
    fit(module(), ROWS, max_steps=1).save_checkpoint(tmp_path / "a.ckpt")
    larger = LoRAFineTuning(model_folder, lora={"r": 4})
    with pytest.raises(CheckpointError, match=r"lora_A\.default\.weight is \(2, \d+\) in it and \(4, \d+\) here"):
        larger.load_checkpoint(tmp_path / "a.ckpt")
    boring = importlib.import_module(f"{_pl.__name__}.demos.boring_classes").BoringModel()
    trainer = Trainer(**trainer_options, max_steps=1)
    trainer.fit(boring)
    trainer.save_checkpoint(tmp_path / "b.ckpt")
    for kind, missing in ((LoRAFineTuning, "model"), (PairDataModule, "train")):
        with pytest.raises(CheckpointError, match=rf"b\.ckpt' was written by another class.*no '{missing}'"):
            kind.load_from_checkpoint(tmp_path / "b.ckpt")
    found = torch.load(tmp_path / "a.ckpt")
    for change in ({"loops": {}}, {"optimizer_states": []}, {"optimizer_states": [{}]}, {"lr_schedulers": 1}):
        torch.save({**found, **change}, tmp_path / "c.ckpt")
        with pytest.raises(CheckpointError, match=r"c\.ckpt' contains .*an incomplete state of a run"):
            fit(module(), ROWS, ckpt_path=tmp_path / "c.ckpt")


def test_run_of_another_method_is_not_continued(fit, module, model_folder, trainer_options, tmp_path):
    fit(module(), ROWS, max_steps=1).save_checkpoint(tmp_path / "a.ckpt")
    rows = [{"prompt": row["input"], "chosen": row["output"], "rejected": f"{row['output']} no"} for row in ROWS]
    data = PreferenceDataModule(rows, validation=0.25, batch_size=3, cache_dir=False)
    policy = DPO(model_folder, lora={"r": 2})  # its adapter's weights have the same names and shapes
    with pytest.raises(CheckpointError, match=r"of a run of LoRAFineTuning, which DPO can't.*model= to DPO"):
        Trainer(**trainer_options, max_steps=2).fit(policy, data, ckpt_path=tmp_path / "a.ckpt")
    Trainer(**trainer_options).validate(DPO(model_folder, lora={"r": 2}), data, ckpt_path=tmp_path / "a.ckpt")
    renamed = type("Renamed", (LoRAFineTuning,), {})(model_folder, lora={"r": 2})
    assert fit(renamed, ROWS, max_steps=2, ckpt_path=tmp_path / "a.ckpt").global_step == 2
    # Of a method with other weights the error names the method, too, rather than the weights.
    reward = RewardModeling(model_folder, lora={"r": 2})
    with pytest.raises(CheckpointError, match=r"of a run of LoRAFineTuning, which RewardModeling can't"):
        Trainer(**trainer_options, max_steps=2).fit(reward, data, ckpt_path=tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    ("rows", "options", "told"),
    [
        (ROWS, {}, None),
        (ROWS[:8], {}, "12 training rows are now 8 others"),
        (ROWS, {"chat_template": "plain"}, "12 training rows are now 12 others or with other tokens"),
        (ROWS, {"batch_size": 2}, r"batch_size=4 on 1 rank is now 2 on 1"),
        (ROWS, {"shuffle": True, "seed": 5}, r"shuffle=False is now True; seed=0 is now 5"),
    ],
    ids=["same", "fewer", "template", "batch_size", "order"],
)
def test_continuing_with_other_batches_is_told(fit, module, tmp_path, recwarn, rows, options, told):
    fit(module(), ROWS, max_steps=2).save_checkpoint(tmp_path / "a.ckpt")
    fit(module(), rows, max_steps=3, ckpt_path=tmp_path / "a.ckpt", data=options)
    messages = [str(w.message) for w in recwarn if "other batches" in str(w.message)]
    assert len(messages) == (told is not None)
    assert told is None or re.search(told, messages[0])


def test_load_from_checkpoint_executes_no_code(fit, module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained = module()
    fit(trained, ROWS, max_steps=1).save_checkpoint("good.ckpt")
    torch.save({"state_dict": Code()}, "evil.ckpt")
    for kind in (LoRAFineTuning, PairDataModule):
        with pytest.raises(CheckpointError, match=r"evil\.ckpt' contains posix\.system"):
            kind.load_from_checkpoint("evil.ckpt")
        with open("evil.ckpt", "rb") as file, pytest.raises(CheckpointError, match=r"posix\.system"):
            kind.load_from_checkpoint(file)
        with pytest.raises(ConfigError, match="leave the argument out"):
            kind.load_from_checkpoint("good.ckpt", weights_only=False)
    with pytest.raises(RewardError, match=r"evil\.ckpt' .*posix\.system"):
        _load_checkpoint("evil.ckpt")
    assert not os.path.exists("ran")
    with open("good.ckpt", "rb") as file:
        found = [LoRAFineTuning.load_from_checkpoint(source) for source in ("good.ckpt", file)]
    assert all(same(weights(trained), weights(one)) for one in found)
    assert PairDataModule.load_from_checkpoint("good.ckpt").hparams["batch_size"] == 4
    with pytest.raises(TypeError, match="cannot be called on an instance"):
        trained.load_from_checkpoint("good.ckpt")


def test_checkpoint_names_no_instantiator(fit, module, tmp_path, monkeypatch):
    """Lightning's own instantiator is allowed by Lightning, and imports every class that the arguments name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "named_by_file.py").write_text("open('ran', 'a')\n\nclass Config: ...\n")
    fit(module(), ROWS, max_steps=1).save_checkpoint("good.ckpt")
    saved = torch.load("good.ckpt", weights_only=True)
    named = {"_instantiator": f"{_pl.__name__}.cli.instantiate_module", "_class_path": "lightning_ft.LoRAFineTuning"}
    saved["hyper_parameters"] |= {**named, "lora": {"class_path": "named_by_file.Config"}}
    saved["datamodule_hyper_parameters"] |= named
    torch.save(saved, "evil.ckpt")
    for kind in (LoRAFineTuning, PairDataModule):
        with pytest.raises(CheckpointError, match="name an instantiator"):
            kind.load_from_checkpoint("evil.ckpt")
    assert not os.path.exists("ran")


class Own(_pl.plugins.TorchCheckpointIO):
    """A user's checkpoint plugin that counts its calls."""

    saved = loaded = 0

    def save_checkpoint(self, *args, **kwargs):
        self.saved += 1
        super().save_checkpoint(*args, **kwargs)

    def load_checkpoint(self, *args, **kwargs):
        self.loaded += 1
        assert kwargs["weights_only"] is True
        return super().load_checkpoint(*args, **kwargs)


@pytest.mark.parametrize("plugin", [Own, _pl.plugins.AsyncCheckpointIO])
def test_checkpoint_plugins_of_the_user_are_kept(fit, module, tmp_path, plugin):
    own = plugin()
    trained = module()
    saver = _pl.callbacks.ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, filename="{step}", save_top_k=-1)
    options = {"plugins": [own], "enable_checkpointing": True, "callbacks": [saver]}
    fit(trained, ROWS, max_steps=1, **options)
    again = module()
    fit(again, ROWS, max_steps=2, ckpt_path=tmp_path / "step=1.ckpt", **options)
    assert read_checkpoint(tmp_path / "step=2.ckpt", from_trainer=True)["global_step"] == 2
    if plugin is Own:
        assert (own.saved, own.loaded) == (2, 1)
    else:
        assert isinstance(own.checkpoint_io, WholeCheckpointIO)


def test_checkpoints_support_other_file_systems(fit, module):
    trained = module()
    trainer = fit(trained, ROWS, max_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.save_checkpoint("memory://runs/a.ckpt")
        again = module()
        fit(again, ROWS, max_steps=1, ckpt_path="memory://runs/a.ckpt")
    assert same(weights(again), weights(trained))
    with fsspec.open("memory://runs/a.ckpt", "wb") as file:
        torch.save({"state_dict": Code()}, file)
    with pytest.raises(CheckpointError, match=r"memory://runs/a\.ckpt' contains posix\.system"):
        fit(module(), ROWS, max_steps=1, ckpt_path="memory://runs/a.ckpt")


def test_checkpoint_checks_apply_to_full_fine_tuning(fit, model_folder, tmp_path):
    trainer = fit(FullFineTuning(model_folder), ROWS, max_steps=1)
    assert isinstance(trainer.strategy.checkpoint_io, WholeCheckpointIO)


def test_checkpoint_does_not_request_remote_code(fit, model_folder, tmp_path):
    for kind in (LoRAFineTuning, PairDataModule):
        module = LoRAFineTuning(model_folder, trust_remote_code=True)
        trainer = fit(module, make_rows(4), max_steps=1, data={"trust_remote_code": True})
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        assert not kind.load_from_checkpoint(tmp_path / "a.ckpt").hparams["trust_remote_code"]
        asked = kind.load_from_checkpoint(tmp_path / "a.ckpt", trust_remote_code=True)
        assert asked.hparams["trust_remote_code"]
