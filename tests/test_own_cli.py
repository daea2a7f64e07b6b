"""A command line of a user's own, derived from FineTuningCLI, and options in environment variables."""

import json

import pytest
import yaml
from tiny import make_rows

from lightning_ft.cli import FineTuningCLI


class SupportCLI(FineTuningCLI):
    """Adds an argument, links it to two others, and uses a hook."""

    def add_arguments_to_parser(self, parser):
        parser.add_argument("--length", type=int, default=64, help="Largest number of tokens per row.")
        parser.link_arguments("length", "data.init_args.max_length")
        parser.link_arguments("data.init_args.batch_size", "trainer.log_every_n_steps")

    def before_fit(self):
        self.seen = (self.datamodule.hparams["max_length"], self.trainer.log_every_n_steps)


@pytest.fixture
def arguments(tmp_path, model_folder):
    """Arguments of a short fit with short names of classes."""
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in make_rows(8)))
    model = ["--model", "LoRAFineTuning", f"--model.model={model_folder}"]
    data = ["--data", "PairDataModule", f"--data.train={tmp_path / 'rows.jsonl'}", "--data.cache_dir=false"]
    trainer = [f"--trainer.default_root_dir={tmp_path}", "--trainer.accelerator=cpu", "--trainer.max_steps=1"]
    return [*model, *data, *trainer, "--trainer.callbacks+=ExportModel", "--data.batch_size=3"]


def test_own_cli_adds_and_links_arguments_and_keeps_short_names(arguments):
    cli = SupportCLI(["fit", *arguments, "--length=48"], parser_kwargs={"prog": "support"})
    assert cli.seen == (48, 3)
    assert cli.trainer.global_step == 1
    assert type(cli.model).__name__ == "LoRAFineTuning"


def test_own_cli_takes_defaults_of_the_trainer(arguments):
    cli = SupportCLI(arguments, run=False, trainer_defaults={"max_epochs": 7})
    assert cli.trainer.max_epochs == 7


def test_own_cli_prints_help_with_its_name(capsys):
    with pytest.raises(SystemExit):
        SupportCLI(["fit", "--help"], parser_kwargs={"prog": "support"})
    printed = capsys.readouterr().out
    assert printed.startswith("usage: support")
    assert "Largest number of tokens per row." in printed


def printed_config(capsys, **options):
    with pytest.raises(SystemExit):
        FineTuningCLI(["fit", "--print_config"], **options)
    return yaml.safe_load(capsys.readouterr().out)


@pytest.fixture
def environment(monkeypatch, tmp_path, arguments):
    """A configuration and an option in environment variables."""
    config = {"trainer": {"max_epochs": 3, "max_steps": 5}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    model = {"class_path": "LoRAFineTuning", "init_args": {"model": "base/", "learning_rate": 0.5}}
    data = {"class_path": "PairDataModule", "init_args": {"train": "rows.jsonl"}}
    monkeypatch.setenv("PL_FIT__CONFIG", str(tmp_path / "run.yaml"))
    monkeypatch.setenv("PL_FIT__TRAINER__MAX_EPOCHS", "9")
    monkeypatch.setenv("PL_FIT__MODEL", json.dumps(model))
    monkeypatch.setenv("PL_FIT__DATA", json.dumps(data))


@pytest.mark.parametrize("switch", ["parser_kwargs", "JSONARGPARSE_DEFAULT_ENV"])
def test_environment_variables_override_their_configuration(environment, monkeypatch, capsys, switch):
    options = {"parser_kwargs": {"default_env": True}} if switch == "parser_kwargs" else {}
    if not options:
        monkeypatch.setenv(switch, "true")
    config = printed_config(capsys, **options)
    assert config["trainer"]["max_epochs"] == 9
    assert config["trainer"]["max_steps"] == 5
    assert config["model"]["init_args"]["learning_rate"] == 0.5


def test_command_line_overrides_environment_variables(environment, monkeypatch, capsys):
    monkeypatch.setenv("JSONARGPARSE_DEFAULT_ENV", "true")
    with pytest.raises(SystemExit):
        FineTuningCLI(["fit", "--trainer.max_epochs=4", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["trainer"]["max_epochs"] == 4


def test_environment_variables_are_not_read_by_default(environment, capsys):
    assert printed_config(capsys)["trainer"]["max_epochs"] is None
