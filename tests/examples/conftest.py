"""Fixtures of the examples' tests. Examples are scripts, not a package, so their folders are put on the path."""

import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parents[2] / "examples"
FOLDERS = (".", "tiny_base", "support", "medical_coding", "legal_citation", "api_calls", "domain_base")
DOMAIN_PARTS = ("language", "pretraining", "generate", "metrics", "choose_baseline")
EXAMPLE_MODULES = (
    *("english", "corpus", "build"),
    *(f"{domain}_{part}" for domain in ("medical", "legal", "api") for part in DOMAIN_PARTS),
    *("api_company", "api_frames", "medical_frames", "pretrain", "choosing"),
    *("wording", "generate", "choose_baseline", "replies", "rewards", "preferences", "evaluate", "support_metrics"),
)


@pytest.fixture(scope="session", autouse=True)
def example_modules():
    """Make the examples' modules importable during these tests, and remove them afterwards."""
    path, before = list(sys.path), set(sys.modules)
    sys.path[:0] = [str(EXAMPLES / folder) for folder in FOLDERS]
    yield
    sys.path[:] = path
    for name in EXAMPLE_MODULES:
        if name not in before:
            sys.modules.pop(name, None)


@pytest.fixture(scope="session")
def tiny_base():
    return EXAMPLES / "tiny_base"


@pytest.fixture(scope="session")
def support():
    return EXAMPLES / "support"


@pytest.fixture
def run_config(tmp_path, monkeypatch):
    """Function that trains a domain's config for two steps on a few rows, and returns the exported weights."""
    from lightning_ft.__main__ import main

    def run(domain):
        monkeypatch.chdir(EXAMPLES.parent)
        arguments = ["fit", "--config", f"examples/{domain}/lora.yaml", "--model.model", "examples/tiny_base"]
        for split in ("train", "validation", "test"):
            few = tmp_path / f"{split}.jsonl"
            rows = (EXAMPLES / domain / "data" / f"{split}.jsonl").read_text("utf-8").splitlines(True)
            few.write_text("".join(rows[:8]), "utf-8")
            arguments += [f"--data.{split}", str(few)]
        options = {
            "accelerator": "cpu",
            "max_steps": "2",
            "limit_val_batches": "1",
            "enable_progress_bar": "false",
            "logger": "false",
            "enable_checkpointing": "false",
            "callbacks": f"[{{class_path: lightning_ft.ExportModel, init_args: {{output: {tmp_path / 'export'}}}}}]",
            "default_root_dir": str(tmp_path),
        }
        arguments += [part for name, value in options.items() for part in (f"--trainer.{name}", value)]
        main([*arguments, "--data.batch_size", "4", "--data.cache_dir", "false"])
        return load_file(tmp_path / "export" / "last" / "adapter_model.safetensors")

    return run
