"""Subcommands that need no Trainer."""

import json
import signal

import pytest
from tiny import make_rows

from lightning_ft import __main__ as command_line
from lightning_ft.__main__ import main
from lightning_ft.cli import FineTuningCLI
from lightning_ft.evaluation.savings.arithmetic import token_savings
from lightning_ft.evaluation.savings.records import ArmRecords


@pytest.fixture
def run_folder(tmp_path):
    """Folder of a run with a result of TokenSavings."""
    ids = tuple(map(str, range(200)))
    prompted = ArmRecords(ids, (500,) * 200, (20,) * 200, (1.0,) * 200, (False,) * 200)
    tuned = ArmRecords(ids, (50,) * 200, (15,) * 200, (1.0,) * 200, (False,) * 200)
    token_savings(prompted, tuned, resamples=99).save(tmp_path / "token_savings", png=False)
    return tmp_path


def test_report_writes_report_and_prints_its_path(run_folder, capsys):
    main(["report", str(run_folder)])
    written = capsys.readouterr().out.splitlines()
    assert str(run_folder / "report" / "report.html") in written
    assert "87.5% fewer tokens per request" in (run_folder / "report" / "report.html").read_text()


def test_report_writes_to_output_folder(run_folder, tmp_path):
    main(["report", str(run_folder), "--output", str(tmp_path / "there")])
    assert (tmp_path / "there" / "report.md").exists()


def test_report_refuses_missing_folder_without_traceback(tmp_path):
    with pytest.raises(SystemExit, match="DataNotFoundError"):
        main(["report", str(tmp_path / "none")])


def test_compare_names_missing_arguments(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--config", "c.yaml"])
    assert "output" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--config", "none.yaml"], "ComparisonError: The configuration 'none.yaml' can't be read"),
        (["--config", "none.yaml", "--seeds", "a,b"], "expected whole numbers"),
        (["--config", "none.yaml", "--budget", "soon"], "expected a duration"),
    ],
)
def test_compare_refuses_invalid_arguments_before_any_run(tmp_path, more, message):
    with pytest.raises(SystemExit, match=message):
        main(["compare", "--methods", "lora", "--output", str(tmp_path / "out"), *more])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "goes_on"), [("compare", True), ("plan", True), ("report", False)])
def test_interrupted_command_ends_without_traceback(monkeypatch, capsys, name, goes_on):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line, "run_command", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main([name])
    assert stopped.value.code == command_line.INTERRUPTED
    printed = capsys.readouterr().err
    assert printed.startswith("lightning-ft: Interrupted.")
    assert ("The same command goes on" in printed) == goes_on


@pytest.mark.parametrize(("sent", "said", "status"), [("SIGTERM", "Terminated", 143), ("SIGINT", "Interrupted", 130)])
@pytest.mark.parametrize(("command", "hook"), [("fit", "on_after_backward"), ("validate", "on_validation_batch_start")])
@pytest.mark.parametrize(
    ("program", "run"),
    [("lightning-ft", main), ("support", lambda args: FineTuningCLI(args, parser_kwargs={"prog": "support"}))],
)
def test_stopped_command_does_not_exit_as_a_completed_or_failed_one(
    tmp_path, model_folder, capsys, monkeypatch, program, run, command, hook, sent, said, status
):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(row) for row in make_rows(8)))
    (tmp_path / f"{command}_{sent}.py").write_text(
        "import os, signal\nfrom lightning_ft._lightning import Callback\nclass Sends(Callback):\n"
        f"    def {hook}(self, *args):\n        os.kill(os.getpid(), signal.{sent})\n"
    )
    trainer = {"accelerator": "cpu", "devices": 1, "max_steps": 3, "logger": False, "enable_checkpointing": False}
    trainer["default_root_dir"] = str(tmp_path)
    arguments = [f"--trainer.{name}={value}" for name, value in trainer.items()]
    arguments += ["--model=LoRAFineTuning", f"--model.model={model_folder}", "--data=PairDataModule"]
    arguments += [f"--data.train={rows}", f"--data.validation={rows}", "--data.cache_dir=false", "--data.batch_size=2"]
    arguments += [f"--trainer.callbacks={command}_{sent}.Sends", "--trainer.num_sanity_val_steps=0"]
    monkeypatch.syspath_prepend(str(tmp_path))
    on_interrupt = signal.getsignal(signal.SIGINT)  # Lightning ignores it from then on
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a process that a shell starts with & ignores it
    try:
        with pytest.raises(SystemExit) as stopped:
            run([command, *arguments])
    finally:
        signal.signal(signal.SIGINT, on_interrupt)
    assert stopped.value.code == status
    goes_on = " `--ckpt_path last` goes on from the last checkpoint." if command == "fit" else ""
    assert f"{program}: {said}.{goes_on}\n" in capsys.readouterr().err


def test_help_lists_subcommands_without_trainer(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "`compare`" in printed
    assert "`report`" in printed
