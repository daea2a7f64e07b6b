"""`--ckpt_path last` and `best` in commands that are processes of their own."""

import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import make_model, make_rows, make_tokenizer

from lightning_ft import ComputeMeter, FullFineTuning, PairDataModule
from lightning_ft._lightning import Trainer, _pl
from lightning_ft.cli import FineTuningCLI
from lightning_ft.errors import CheckpointError, CheckpointNotFoundError
from lightning_ft.run_checkpoints import find_checkpoint, run_folder
from lightning_ft.sharded_checkpoint import write_sharded_checkpoint


@pytest.fixture
def command(tmp_path, model_folder, monkeypatch):
    """Function that runs a subcommand in a folder with rows, a configuration, and a logger that counts versions."""
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("\n".join(json.dumps(row) for row in make_rows(8)))
    rows = dict.fromkeys(("train", "validation", "test", "predict"), "rows.jsonl")
    trainer = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "runs", "name": "support"}},
    }
    config = {
        "trainer": trainer,
        "model": {"class_path": "lightning_ft.LoRAFineTuning", "init_args": {"model": model_folder}},
        "data": {"class_path": "lightning_ft.PairDataModule", "init_args": {**rows, "cache_dir": False}},
    }
    Path("run.yaml").write_text(yaml.safe_dump(config))
    return lambda name, *more: FineTuningCLI([name, "--config", "run.yaml", *more])


def checkpoint(folder, *, best="", age=0):
    """Write a checkpoint that names another as the best of its run."""
    path = Path(folder) / "a.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {}, "callbacks": {"ModelCheckpoint{}": {"best_model_path": str(best)}}}, path)
    os.utime(path, (1e9 - age, 1e9 - age))
    return path


@pytest.mark.parametrize("name", ["validate", "test", "predict"])
def test_evaluation_uses_checkpoint_of_earlier_run(command, capsys, name):
    trained = command("fit", "--model.learning_rate=0.1").model.model.state_dict()
    evaluated = command(name, "--ckpt_path=last")
    for key, value in evaluated.model.model.state_dict().items():
        assert torch.equal(value, trained[key])
    (found,) = Path("runs").rglob("*.ckpt")
    assert f"ckpt_path='last': {found}" in capsys.readouterr().out


def test_export_writes_best_checkpoint(command, capsys):
    command("fit")
    command("export", "--ckpt_path=best", "--output=out")
    assert Path("out", "adapter_model.safetensors").is_file()


def test_export_reads_checkpoint_of_a_sharded_model(command):
    command("fit")
    (file,) = Path("runs").rglob("*.ckpt")
    command("export", f"--ckpt_path={file}", "--output=from_file")
    checkpoint = torch.load(file, weights_only=True)
    del checkpoint["optimizer_states"]  # which would name parameters in a sharded one
    file.unlink()
    write_sharded_checkpoint(checkpoint, file)
    for name in ("last", "best"):
        command("export", f"--ckpt_path={name}", f"--output={name}")
        expected, found = (load_file(Path(folder, "adapter_model.safetensors")) for folder in ("from_file", name))
        assert expected.keys() == found.keys()
        assert all(torch.equal(value, found[key]) for key, value in expected.items())


def test_fit_resumes_from_last_checkpoint_and_starts_without_one(command):
    assert command("fit", "--ckpt_path=last").trainer.global_step == 1
    assert command("fit", "--ckpt_path=last", "--trainer.max_epochs=3").trainer.global_step == 3


@pytest.mark.parametrize("name", ["last", "best"])
@pytest.mark.parametrize("subcommand", ["validate", "test", "predict", "export"])
def test_missing_checkpoint_names_the_folder(command, subcommand, name):
    more = ["--output=out"] if subcommand == "export" else []
    with pytest.raises(CheckpointNotFoundError, match=rf"ckpt_path='{name}': no file matches 'runs/support/\*/check"):
        command(subcommand, f"--ckpt_path={name}", *more)


def make_trainer(folder, **options):
    return Trainer(accelerator="cpu", default_root_dir=folder, enable_progress_bar=False, **options)


def test_newest_checkpoint_is_the_last_and_names_the_best(tmp_path):
    best = checkpoint(tmp_path / "lightning_logs" / "version_0" / "checkpoints", age=50)
    moved = checkpoint(tmp_path / "lightning_logs" / "version_10" / "checkpoints", best="/gone/a.ckpt", age=40)
    last = checkpoint(tmp_path / "lightning_logs" / "version_9" / "checkpoints", best=best)
    trainer = make_trainer(tmp_path)
    assert find_checkpoint(trainer, "last") == last
    assert find_checkpoint(trainer, "best") == best
    last.unlink()
    assert find_checkpoint(trainer, "best") == moved  # the file of that name next to it


@pytest.mark.parametrize(("best", "message"), [("", "names no best checkpoint"), ("/gone/b.ckpt", "doesn't exist")])
def test_best_checkpoint_that_is_not_there_is_refused(tmp_path, best, message):
    checkpoint(tmp_path / "checkpoints", best=best)
    with pytest.raises(CheckpointNotFoundError, match=message):
        find_checkpoint(make_trainer(tmp_path, logger=False), "best")


def write_states(folder, **monitored):
    """Write a checkpoint with the states of several ModelCheckpoints, by what each monitors; returns their paths."""
    folder.mkdir()
    paths = {name: checkpoint(folder / name, age=9) for name in monitored}
    states = {name: {"monitor": metric, "best_model_path": str(paths[name])} for name, metric in monitored.items()}
    torch.save({"state_dict": {}, "callbacks": {**states, "EarlyStopping": {"wait_count": 0}}}, folder / "last.ckpt")
    return paths


def test_best_checkpoint_is_that_of_the_monitored_metric(tmp_path, recwarn):
    folder = tmp_path / "checkpoints"
    paths = write_states(folder, newest=None, counted="step", best="val/loss", more_often="val/loss")
    assert find_checkpoint(make_trainer(tmp_path, logger=False), "best") == paths["best"]
    assert not [w for w in recwarn if "newest checkpoint" in str(w.message)]


def test_best_checkpoint_by_several_metrics_is_refused(tmp_path):
    paths = write_states(tmp_path / "checkpoints", newest=None, best="val/loss", other="quality")
    with pytest.raises(CheckpointError, match=rf"{paths['best']}' by 'val/loss', '{paths['other']}' by 'quality'"):
        find_checkpoint(make_trainer(tmp_path, logger=False), "best")


def test_newest_checkpoint_is_the_best_only_where_nothing_is_monitored(tmp_path):
    paths = write_states(tmp_path / "checkpoints", newest=None)
    with pytest.warns(UserWarning, match="is the newest checkpoint of its run, since no ModelCheckpoint monitored"):
        assert find_checkpoint(make_trainer(tmp_path, logger=False), "best") == paths["newest"]
    states = {
        "a": {"monitor": None, "best_model_path": str(paths["newest"])},
        "b": {"monitor": "x", "best_model_path": ""},
    }
    torch.save({"state_dict": {}, "callbacks": states}, tmp_path / "checkpoints" / "last.ckpt")
    with pytest.raises(CheckpointNotFoundError, match="names no best checkpoint"):
        find_checkpoint(make_trainer(tmp_path, logger=False), "best")


def test_folders_and_versions_chosen_by_the_user_are_the_only_ones(tmp_path):
    from pytorch_lightning.callbacks import ModelCheckpoint
    from pytorch_lightning.loggers import CSVLogger

    checkpoint(tmp_path / "runs" / "x" / "other" / "checkpoints")
    version = checkpoint(tmp_path / "runs" / "x" / "mine" / "checkpoints", age=9)
    folder = checkpoint(tmp_path / "mine", age=99)
    logger = CSVLogger(tmp_path / "runs", name="x", version="mine")
    assert find_checkpoint(make_trainer(tmp_path, logger=logger), "last") == version
    callback = ModelCheckpoint(dirpath=tmp_path / "mine")
    assert find_checkpoint(make_trainer(tmp_path, logger=logger, callbacks=[callback]), "last") == folder


class SharedFolderLogger(_pl.loggers.Logger):
    """Logger whose folder is that of all runs, as those of MLflow and Weights & Biases."""

    name, version = "project", None

    def __init__(self, save_dir, version):
        super().__init__()
        self.folder, self.version = save_dir, version

    @property
    def save_dir(self):
        return self.folder

    def log_metrics(self, metrics, step=None):
        if any(name.startswith("compute/") for name in metrics):
            raise ConnectionError("no route to host")

    def log_hyperparams(self, params):
        pass


@pytest.mark.parametrize(
    ("logger", "folder"),
    [
        (lambda root: False, ""),
        (lambda root: _pl.loggers.CSVLogger(root, "csv"), "csv/version_0"),
        (lambda root: _pl.loggers.TensorBoardLogger(root, "tb", version="a"), "tb/a"),
        (lambda root: SharedFolderLogger(root / "all", "af31"), "all/project/af31"),
        (lambda root: SharedFolderLogger(None, 3), "project/version_3"),
    ],
)
def test_run_folder_has_the_checkpoints_of_the_run(tmp_path, trainer_options, logger, folder):
    options = {"logger": logger(tmp_path), "default_root_dir": str(tmp_path), "enable_checkpointing": True}
    trainer = Trainer(**{**trainer_options, **options})
    assert run_folder(trainer) == tmp_path / folder
    saver = trainer.checkpoint_callback
    saver.setup(trainer, None, "fit")
    assert Path(saver.dirpath) == run_folder(trainer) / "checkpoints"


def test_results_of_two_runs_of_a_shared_logger_are_in_a_folder_each(tmp_path, trainer_options):
    for version in ("one", "two"):
        data = PairDataModule(make_rows(4), cache_dir=False, batch_size=2)
        options = {"logger": SharedFolderLogger(tmp_path, version), "max_epochs": 1}
        trainer = Trainer(**{**trainer_options, **options}, callbacks=[ComputeMeter()])
        trainer.fit(FullFineTuning(make_model(), tokenizer=make_tokenizer()), data)
    found = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("compute.json"))
    assert found == ["project/one/compute/compute.json", "project/two/compute/compute.json"]


def test_failing_logger_does_not_stop_training(tmp_path, trainer_options):
    meter = ComputeMeter(log_every_n_steps=1)
    logged = []

    class Healthy(SharedFolderLogger):
        def log_metrics(self, metrics, step=None):
            logged.extend(metrics)

    options = {"logger": [SharedFolderLogger(tmp_path, "a"), Healthy(tmp_path, "b")], "max_epochs": 1}
    trainer = Trainer(**{**trainer_options, **options}, callbacks=[meter])
    data = PairDataModule(make_rows(8), cache_dir=False, batch_size=2)
    with pytest.warns(UserWarning, match="Compute was not logged during training: ConnectionError: no route to host"):
        trainer.fit(FullFineTuning(make_model(), tokenizer=make_tokenizer()), data)
    assert trainer.global_step == 4
    assert [failure.split(":")[0] for failure in meter.failures] == [
        "Compute was not logged during training",
        "Compute was not logged",
    ]
    assert logged.count("compute/tokens_per_second") >= 4  # the second logger got what the first one refused
    assert meter.result is not None
