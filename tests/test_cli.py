"""The command `lightning-ft`, used as users of LightningCLI would use it."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from full_disk import full_disk
from tiny import make_rows

import lightning_ft
from lightning_ft.__main__ import main
from lightning_ft.cli import FineTuningCLI
from lightning_ft.data.templates import PLAIN_TEMPLATE
from lightning_ft.errors import ConfigError, FileWriteError


@pytest.fixture
def config(tmp_path, model_folder):
    """Function that writes a configuration, with sections replaced by its arguments, and returns the path."""
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in make_rows(24)))

    def write(**changes):
        content = {
            "trainer": {
                "accelerator": "cpu",
                "devices": 1,
                "max_epochs": 1,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "default_root_dir": str(tmp_path),
            },
            "model": {
                "class_path": "lightning_ft.LoRAFineTuning",
                "init_args": {"model": model_folder, "lora": {"r": 4}},
            },
            "data": {
                "class_path": "lightning_ft.PairDataModule",
                "init_args": {
                    "train": str(tmp_path / "rows.jsonl"),
                    "validation": 0.25,
                    "test": str(tmp_path / "rows.jsonl"),
                    "predict": str(tmp_path / "rows.jsonl"),
                    "cache_dir": str(tmp_path / "cache"),
                },
            },
        }
        content.update(changes)
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(content))
        return str(path)

    return write


@pytest.fixture
def run(monkeypatch):
    def call(*args):
        monkeypatch.setattr(sys, "argv", ["lightning-ft", *args])
        return FineTuningCLI()

    return call


def test_cli_runs_fit_validate_test_and_predict(run, config, tmp_path):
    path = config()
    cli = run("fit", "--config", path)
    assert cli.trainer.global_step == 3
    (checkpoint,) = tmp_path.glob("lightning_logs/version_0/checkpoints/*.ckpt")
    assert torch.load(checkpoint, weights_only=True)["hyper_parameters"]["lora"]["r"] == 4
    run("validate", "--config", path, "--ckpt_path", str(checkpoint))
    run("test", "--config", path, "--ckpt_path", str(checkpoint))
    run("predict", "--config", path, "--ckpt_path", str(checkpoint))
    run("predict", "--config", path, "--ckpt_path", str(checkpoint), "--return_predictions", "false")
    run("predict", "--config", path, "--ckpt_path", str(checkpoint), "--trainer.fast_dev_run", "true")
    (written,) = tmp_path.rglob("predictions.jsonl")
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    assert len(rows) == 24
    assert all(isinstance(row["answer"], str) for row in rows)
    assert [row["request"][-1]["content"] for row in rows] == [row["input"] for row in make_rows(24)]
    assert [row["id"] for row in rows] == [f"{tmp_path / 'rows.jsonl'}:{number}" for number in range(1, 25)]


def test_predict_needs_a_model_and_requests_only(run, model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "requests.csv").write_text('id,question\n1,"Where is ""it"",\nplease?"\n2,And now?\n')
    data = ("--data", "PairDataModule", "--data.predict", "requests.csv", "--data.columns", "{input: question}")
    run("predict", "--model", "FullFineTuning", "--model.model", model_folder, *data, "--trainer.accelerator", "cpu")
    (written,) = tmp_path.rglob("predictions.jsonl")
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    assert [(row["id"], row["request"][-1]["content"]) for row in rows] == [
        ("1", 'Where is "it",\nplease?'),
        ("2", "And now?"),
    ]


def test_fit_continues_in_the_folder_of_the_run_before(run, config, tmp_path):
    trainer = {"accelerator": "cpu", "devices": 1, "logger": False, "default_root_dir": str(tmp_path / "runs")}
    path = config(trainer=trainer)
    run("fit", "--config", path, "--ckpt_path", "last", "--trainer.max_epochs", "1")
    run("fit", "--config", path, "--ckpt_path", "last", "--trainer.max_epochs", "2")
    run("fit", "--config", path, "--ckpt_path", "last", "--trainer.max_epochs", "3")
    written = {file.name: yaml.safe_load(file.read_text()) for file in (tmp_path / "runs").glob("*.yaml")}
    epochs = {name: content["trainer"]["max_epochs"] for name, content in written.items()}
    assert epochs == {"config-1.yaml": 1, "config-2.yaml": 2, "config.yaml": 3}
    with pytest.raises(ConfigError, match=r"contains the config\.yaml of another run"):
        run("fit", "--config", path, "--trainer.max_epochs", "4")


def test_full_disk_error_names_the_configuration(run, config, tmp_path):
    content = yaml.safe_load(Path(config()).read_text())
    path = config(trainer={**content["trainer"], "logger": False})
    with full_disk(100), pytest.raises(FileWriteError, match=r"configuration 'config\.yaml' can't be written to"):
        run("fit", "--config", path)


@pytest.mark.parametrize(
    "options", [("logger=CSVLogger", "logger.save_dir={}"), ("logger=false", "default_root_dir={}")]
)
def test_folder_that_cannot_be_written_is_refused_before_rows_are_read(run, config, tmp_path, options):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "runs"
    with pytest.raises(ConfigError, match=rf"can't be written into '{folder}': '{tmp_path}/file' is a file\."):
        run("fit", "--config", config(), "--data.train=none.jsonl", *(f"--trainer.{o.format(folder)}" for o in options))


def test_export_writes_adapter_and_chat_template(run, config, tmp_path, capsys):
    path = config()
    cli = run("fit", "--config", path, "--data.chat_template", "plain")
    (checkpoint,) = tmp_path.glob("lightning_logs/version_0/checkpoints/*.ckpt")
    run("export", "--config", path, "--ckpt_path", str(checkpoint), "--output", str(tmp_path / "out"))
    printed = capsys.readouterr().out
    assert "Exported to" in printed
    assert "export with --merge true" in printed
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name, value in cli.model.named_parameters():
        if value.requires_grad:
            assert torch.equal(saved[name.removeprefix("model.").replace(".default", "")], value)
    text = (tmp_path / "out" / "chat_template.jinja").read_text()
    assert (
        text == PLAIN_TEMPLATE
    )  # the template is saved in the checkpoint only: the configuration no longer contains it


def test_export_refuses_missing_checkpoint(run, config, tmp_path):
    with pytest.raises(ValueError, match="doesn't exist"):
        run("export", "--config", config(), "--ckpt_path", "no.ckpt", "--output", str(tmp_path / "out"))


def test_preview_loads_no_weights(run, config, capsys, monkeypatch):
    monkeypatch.setattr("lightning_ft.modules.base.load_causal_lm", lambda *a, **k: pytest.fail("weights were loaded"))
    run("preview", "--config", config(), "--examples", "1")
    assert "«" in capsys.readouterr().out


@pytest.mark.parametrize(("command", "told"), [("preview", False), ("validate", True)])
def test_preview_does_not_list_accelerators(config, command, told):
    """In a process of its own, since Lightning's log writes to the stderr that it was imported with."""
    call = [sys.executable, "-m", "lightning_ft", command, "--config", config()]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    assert ("GPU available" in done.stderr) == told


def test_preview_prints_trainable_weights(run, config, capsys):
    run("preview", "--config", config(), "--examples", "1", "--weights", "true")
    printed = capsys.readouterr().out
    assert "What is trained" in printed
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.startswith(("attention", "MLP"))}
    assert rows["attention"][0] == rows["attention"][2]  # all of it is adapted


def test_config_contains_model_name_once(run, config, model_folder):
    assert Path(config()).read_text().count(model_folder) == 1


def test_print_config_contains_defaults(config, capsys):
    with pytest.raises(SystemExit) as stopped:
        main_with("fit", "--config", config(), "--print_config")
    assert stopped.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["init_args"]["lora"] == {"r": 4}
    assert printed["model"]["init_args"]["lr_schedule"] == "cosine"
    assert printed["data"]["init_args"]["packing"] is True


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model.learning_rat", "1"], "Option 'learning_rat' is not accepted"),
        (["--modle", "1"], "unrecognized arguments: --modle"),
        (["--model.lr_schedule", "cosinus"], "cosinus"),
        (["--trainer.max_epochz", "1"], "max_epochz"),
    ],
)
def test_parser_rejects_unknown_keys_and_values(config, capsys, args, message):
    with pytest.raises(SystemExit) as stopped:
        main_with("fit", "--config", config(), *args)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.learning_rate", "abc"),
        ("model.lr_schedule", "cosinus"),
        ("trainer.precision", "bf17"),
        ("trainer.callbacks", "TokenSaving"),
        ("data.batch_size", "four"),
    ],
)
def test_parser_refuses_a_value_in_a_few_lines(config, capsys, name, value):
    with pytest.raises(SystemExit):
        main_with("fit", "--config", config(), f"--{name}={value}")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) < 15
    assert all(any(word in line for line in lines) for word in (name.split(".")[-1], value, "fit --help"))


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["--trainer.accelerator", "tpu"], "accelerator|TPU|torch_xla"),
        (["--trainer.strategy", "ddp_of_its_own"], "invalid strategy name"),
        (["--trainer.devices", "0"], "devices"),
    ],
)
def test_main_prints_what_the_trainer_refuses_without_traceback(config, args, reason):
    with pytest.raises(SystemExit, match=rf"lightning-ft: ConfigError: The Trainer refuses (?s:.*)(?:{reason})"):
        main_with("fit", "--config", config(), *args)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model.learning_rat", "1"], "'learning_rat' is not accepted. Did you mean 'learning_rate'?"),
        (["--model.lr", "1"], "'lr' is not accepted. Did you mean 'learning_rate'?"),
        (["--model.batch_size", "1"], "'batch_size' is not accepted. batch_size= is an argument of the DataModule."),
        (["--data.packin", "true"], "'packin' is not accepted. Did you mean 'packing'?"),
        (["--trainer.max_epochz", "1"], "Did you mean 'trainer.max_epochs'?"),
        (["--trainer.callbacks", "lightning_ft.TokenSaving"], "Did you mean 'TokenSavings'?"),
        (
            ["--trainer.callbacks", "lightning_ft.TokenSavings", "--trainer.callbacks.resample", "9"],
            "'resample' is not accepted. Did you mean 'resamples'?",
        ),
        (["--model", "lightning_ft.LoRAFinetuning"], "Did you mean 'LoRAFineTuning'?"),
        (["--model", "LoRAFinetuning"], "path string: LoRAFinetuning. Did you mean 'LoRAFineTuning'?"),
        (["--trainer.callbacks", "EarlyStoping"], "path string: EarlyStoping. Did you mean 'EarlyStopping'?"),
    ],
)
def test_parser_suggests_closest_name_on_command_line(config, capsys, args, message):
    with pytest.raises(SystemExit):
        main_with("fit", "--config", config(), *args)
    assert message in capsys.readouterr().err


def test_parser_says_how_a_reward_in_a_file_is_named(config, capsys):
    path = config()
    loaded = yaml.safe_load(Path(path).read_text())
    options = {"model": "tiny", "rewards": {"class_path": "rewards.py:Short", "init_args": {"length": 3}}}
    loaded["model"] = {"class_path": "GRPO", "init_args": options}
    Path(path).write_text(yaml.safe_dump(loaded))
    with pytest.raises(SystemExit):
        main_with("fit", "--config", path)
    assert "named by `function`: rewards: {function: rewards.py:Short, init_args: ...}" in capsys.readouterr().err


def compare_args(*args):
    return ["compare", "--config", "run.yaml", "--output", "out", "--methods", *args]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (compare_args("lora", "--seeds", "0", "1", "2"), "arguments: 1 2. --seeds takes one value: --seeds 0,1,2."),
        (compare_args("prompted", "lora"), "arguments: lora. --methods takes one value: --methods prompted,lora."),
        (compare_args("lora", "--metrics", "my", "file.py:f"), "--metrics takes one value: 'my file.py:f' in quotes."),
        (compare_args("lora", "--sedes", "0"), "unrecognized arguments: --sedes 0. Did you mean 'seeds'?"),
        (compare_args("lora", "--keep_models"), "--keep_models: expected one argument. Write --keep_models true."),
        (["preview", "--trainer.devices", "0", "1"], "devices takes one value: '0 1' in quotes, or a list '[0, 1]'."),
        (["preview", "--confg", "run.yaml"], "unrecognized arguments: --confg run.yaml. Did you mean 'config'?"),
        (["preview", "run.yaml"], "unrecognized arguments: run.yaml. Write --config run.yaml."),
        (["preview", "--weights"], "argument --weights: expected one argument. Write --weights true."),
        (["plan", "--pilot", "1", "2", "--config", "a", "--output", "b"], "one value: --pilot 1,2."),
    ],
)
def test_parser_says_how_values_are_written(tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main_with(*args)
    assert message in " ".join(capsys.readouterr().err.split())


def test_parser_names_missing_arguments_without_the_whole_configuration(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("model: {class_path: FullFineTuning}\ndata: {class_path: PairDataModule}")
    with pytest.raises(SystemExit):
        main_with("fit", "--config", str(tmp_path / "run.yaml"))
    error = capsys.readouterr().err
    assert "the following arguments are required: model" in error
    assert "Namespace" not in error


def test_parser_suggests_closest_name_in_yaml(config, capsys, model_folder):
    model = {"class_path": "lightning_ft.LoRAFineTuning", "init_args": {"model": model_folder, "learning_rat": 1.0}}
    with pytest.raises(SystemExit):
        main_with("fit", "--config", config(model=model))
    assert "'learning_rat' is not accepted. Did you mean 'learning_rate'?" in capsys.readouterr().err


def test_parser_suggests_closest_key_of_a_yaml_section(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("trainer: {max_epoch: 3}", encoding="utf-8")
    with pytest.raises(SystemExit):
        main_with("preview", "--config", str(tmp_path / "run.yaml"))
    assert "does not accept option 'trainer.max_epoch'. Did you mean 'trainer.max_epochs'?" in capsys.readouterr().err


def test_unknown_subcommand_lists_all_of_them(capsys):
    with pytest.raises(SystemExit):
        main_with("plann")
    error = " ".join(capsys.readouterr().err.split())
    assert "(choose from fit, validate, test, predict, preview, export, compare, plan, report)" in error
    assert "Did you mean 'plan'?" in error


def test_printed_configuration_of_fit_is_one_of_other_subcommands(config, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main_with("fit", "--config", config(), "--print_config")
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    main_with("preview", "--config", "printed.yaml", "--ckpt_path", "best")  # of no run yet, and not needed
    assert "rows used" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"'no\.ckpt' doesn't exist"):
        main_with("export", "--config", "printed.yaml", "--ckpt_path", "no.ckpt", "--output", "out")


def test_help_describes_arguments(capsys):
    with pytest.raises(SystemExit) as stopped:
        main_with("fit", "--model.help", "lightning_ft.LoRAFineTuning")
    assert stopped.value.code == 0
    assert "Learning rate at the peak of the schedule" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", ["FullFineTuning", "LoRAFineTuning", "RewardModeling", "DPO", "KTO", "GRPO", "PPO"])
def test_help_lists_all_module_arguments(name, capsys):
    with pytest.raises(SystemExit):
        main_with("fit", "--model.help", f"lightning_ft.{name}")
    listed = set(re.findall(r"^  --model\.(\w+)\b", capsys.readouterr().out, re.MULTILINE))
    assert listed >= set(inspect.signature(getattr(lightning_ft, name)).parameters)


def main_with(*args):
    main(list(args))


def test_main_prints_package_errors_without_traceback(config, tmp_path, monkeypatch):
    path = config()
    (tmp_path / "rows.jsonl").write_text('{"input": "a", "output": ""}')
    with pytest.raises(SystemExit, match=r"lightning-ft: DataError: (?s:.*)rows\.jsonl.*empty output"):
        main_with("fit", "--config", path)


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [("model", "learning_rate", -1.0), ("data", "batch_size", 0), ("data", "max_length", 1)],
)
def test_main_prints_refused_settings_without_the_configuration(config, section, name, value):
    path = Path(config())
    content = yaml.safe_load(path.read_text())
    content[section]["init_args"][name] = value
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(SystemExit, match=rf"lightning-ft: ConfigError: {name}={value!r}") as error:
        main_with("fit", "--config", str(path))
    assert len(str(error.value).splitlines()) < 4


def test_short_class_names_are_known(tmp_path, model_folder):
    """In a fresh process, since other tests import the classes."""
    arguments = ["fit", "--model", "LoRAFineTuning", f"--model.model={model_folder}", "--data", "PairDataModule"]
    arguments += ["--data.train=rows.jsonl", "--trainer.callbacks+=Retention", "--print_config"]
    done = subprocess.run(
        [sys.executable, "-m", "lightning_ft", *arguments], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    printed = yaml.safe_load(done.stdout)
    assert printed["model"]["class_path"] == "lightning_ft.LoRAFineTuning"
    assert printed["data"]["class_path"] == "lightning_ft.PairDataModule"
    assert printed["trainer"]["callbacks"][0]["class_path"] == "lightning_ft.Retention"


@pytest.mark.parametrize("path", ["{folder}/strange_code.py:reward", "strange_code.reward"])
def test_preview_does_not_import_reward_functions(tmp_path, model_folder, monkeypatch, capsys, path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "where is the lamp"}\n' * 4)
    (tmp_path / "strange_code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n\ndef reward(**_): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    model = {
        "class_path": "lightning_ft.GRPO",
        "init_args": {"model": model_folder, "rewards": [path.format(folder=tmp_path)]},
    }
    data = {"class_path": "lightning_ft.PromptDataModule", "init_args": {"train": str(tmp_path / "prompts.jsonl")}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"model": model, "data": data}))
    main_with("preview", "--config", str(tmp_path / "run.yaml"))
    assert "where is the lamp" in capsys.readouterr().out
    assert not (tmp_path / "ran").exists()


def test_cli_optimizer_and_scheduler_replace_those_of_module(run, config):
    cli = run(
        *["fit", "--config", config()],
        *["--optimizer", "torch.optim.SGD", "--optimizer.lr", "0.5"],  # bitsandbytes has an SGD too
        *["--lr_scheduler", "StepLR", "--lr_scheduler.step_size", "1"],
    )
    optimizer = cli.trainer.optimizers[0]
    assert type(optimizer) is torch.optim.SGD
    optimized = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {id(p) for p in optimized} == {id(p) for p in cli.model.parameters() if p.requires_grad}
    assert cli.trainer.lr_scheduler_configs[0].scheduler.step_size == 1


def test_cli_scheduler_alone_uses_optimizer_of_module(run, config):
    cli = run("fit", "--config", config(), "--lr_scheduler", "StepLR", "--lr_scheduler.step_size", "1")
    assert type(cli.trainer.optimizers[0]) is torch.optim.AdamW
    assert type(cli.trainer.lr_scheduler_configs[0].scheduler).__name__ == "StepLR"


def test_fit_with_same_seed_gives_same_weights(run, config):
    lora = {"class_path": "lightning_ft.FullFineTuning", "init_args": {}}
    lora["init_args"]["model"] = yaml.safe_load(Path(config()).read_text())["model"]["init_args"]["model"]
    weights = [dict(run("fit", "--config", config(model=lora)).model.named_parameters()) for _ in range(2)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_python_m_lists_subcommands():
    done = subprocess.run(
        [sys.executable, "-m", "lightning_ft", "--help"], capture_output=True, text=True, check=True, timeout=300
    )
    for name in ("fit", "validate", "test", "predict", "preview", "export"):
        assert f"\n    {name} " in done.stdout
