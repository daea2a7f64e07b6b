"""What commands print: nothing of other libraries that a user can't act on."""

import json
import logging
import os
import subprocess
import sys

import pytest
import yaml
from tiny import make_rows

from lightning_ft import RewardModeling
from lightning_ft.console import LOG_MESSAGES, WARNINGS


def run(*args, cwd, **environment):
    """A command in a process of its own, since Lightning's log writes to the stderr that it was imported with."""
    call = [sys.executable, *args]
    return subprocess.run(
        call, capture_output=True, text=True, check=True, cwd=cwd, timeout=300, env={**os.environ, **environment}
    )


@pytest.fixture
def config(tmp_path, model_folder):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in make_rows(24)))
    rows = str(tmp_path / "rows.jsonl")
    content = {
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 2,
            "log_every_n_steps": 1,
            "default_root_dir": str(tmp_path),
        },
        "model": {"class_path": "lightning_ft.LoRAFineTuning", "init_args": {"model": model_folder}},
        "data": {
            "class_path": "lightning_ft.PairDataModule",
            "init_args": {"train": rows, "test": rows, "cache_dir": False, "batch_size": 4},
        },
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def assert_only_own_lines(output):
    for part in ("site-packages", "Warning", "Tip:", "pip install", "deprecated", "across ranks"):
        assert part not in output


def test_fit_and_test_print_no_line_that_no_one_can_act_on(config, tmp_path):
    fit = run("-m", "lightning_ft", "fit", "--config", config, cwd=tmp_path)
    assert "`Trainer.fit` stopped" in fit.stderr
    assert_only_own_lines(fit.stdout + fit.stderr)
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    test = run("-m", "lightning_ft", "test", "--config", config, "--ckpt_path", str(checkpoint), cwd=tmp_path)
    assert "Loaded model weights" in test.stderr
    assert_only_own_lines(test.stdout + test.stderr)


def test_program_with_arguments_of_its_own_is_not_warned(config, tmp_path):
    """As `lightning-ft compare ...` and the processes of its runs are."""
    code = (
        "from lightning_ft.cli import FineTuningCLI\n"
        f"FineTuningCLI(['--config', {config!r}], run=False, save_config=False)\n"
    )
    assert_only_own_lines(run("-c", code, "--own", "argument", cwd=tmp_path).stderr)


@pytest.mark.parametrize(
    "name",
    ["bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions", "pytorch_lightning.utilities.rank_zero"],
)
def test_log_messages_of_others_are_hidden_by_their_text_only(name, caplog):
    texts = [
        "Failed to load CPU gemm_4bit_forward from kernels-community: No module named 'kernels'.",
        "MatMul8bitLt: inputs will be cast from torch.bfloat16 to float16 during quantization",
        "💡 Tip: For seamless cloud logging and experiment tracking, try installing [litlogger]",
    ]
    hidden = {
        text for text in texts for pattern in LOG_MESSAGES if text.startswith(pattern) and name in LOG_MESSAGES[pattern]
    }
    assert len(hidden) == 1
    with caplog.at_level(logging.INFO, logger=name):
        for text in [*texts, "GPU available: False"]:
            logging.getLogger(name).warning(text)
    assert {record.getMessage() for record in caplog.records} == {*texts, "GPU available: False"} - hidden


def test_warnings_are_shown_where_python_is_told_to(tmp_path):
    code = "import warnings, lightning_ft; print(len(warnings.filters))"
    counts = [int(run(*options, "-c", code, cwd=tmp_path).stdout) for options in ([], ["-W", "always::ImportWarning"])]
    plain = [
        int(run(*o, "-c", code.replace(", lightning_ft", ""), cwd=tmp_path).stdout)
        for o in ([], ["-W", "always::ImportWarning"])
    ]
    assert [count - before for count, before in zip(counts, plain, strict=True)] == [len(WARNINGS), 0]


def test_loading_a_new_head_prints_no_report_and_other_messages_of_that_logger_stay(model_folder, caplog):
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging as transformers_logging

    transformers_logging.enable_propagation()
    try:
        RewardModeling(model_folder, dtype="float32").configure_model()
        assert "LOAD REPORT" not in caplog.text
        AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=1)
        assert "LOAD REPORT" in caplog.text
    finally:
        transformers_logging.disable_propagation()
