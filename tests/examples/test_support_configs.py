"""Every config of the support example runs: a step, validation and export, from the tiny base model."""

import pytest
from safetensors import safe_open

from lightning_ft.__main__ import main

DATA = "examples/support/data"
SMALL = {
    "sft": {"train": "replies_validation", "validation": "replies_validation"},
    "reward": {"train": "preferences_validation", "validation": "preferences_validation", "test": None},
    "narrow": {"train": "narrow_validation", "validation": "narrow_validation"},
    "dpo": {"train": "preferences_validation", "validation": "preferences_validation", "test": None},
    "grpo": {"train": "validation", "validation": "validation"},
    "ppo": {"train": "validation", "validation": "validation"},
    "hacked": {"train": "validation", "validation": "validation"},
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "hacked" else name for name in SMALL]
)
def test_config_runs(name, support, tmp_path, monkeypatch):
    monkeypatch.chdir(support.parents[1])
    arguments = ["fit", "--config", f"examples/support/{name}.yaml", "--model.model", "examples/tiny_base"]
    for split, file in SMALL[name].items():
        arguments += [f"--data.{split}", "null" if file is None else f"{DATA}/{file}.jsonl"]
    options = {
        "accelerator": "cpu",
        "max_steps": "2",
        "max_epochs": "1",
        "limit_train_batches": "2",
        "val_check_interval": "2",
        "limit_val_batches": "1",
        "enable_progress_bar": "false",
        "logger": "false",
        "enable_checkpointing": "false",
        "callbacks": f"[{{class_path: lightning_ft.ExportModel, init_args: {{output: {tmp_path / 'export'}}}}}]",
        "default_root_dir": str(tmp_path),
    }
    for option, value in options.items():
        arguments += [f"--trainer.{option}", value]
    if name in ("grpo", "ppo", "hacked"):
        arguments += ["--model.rewards", "examples/support/rewards.py:true", "--model.num_completions", "2"]
    main([*arguments, "--data.batch_size", "4", "--data.cache_dir", "false"])
    with safe_open(tmp_path / "export" / "last" / "model.safetensors", "pt") as weights:
        names = weights.keys()
    assert ("score.weight" in names) == (name in ("reward", "narrow"))
