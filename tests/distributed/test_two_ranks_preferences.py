"""Two ranks that learn from preferences take the same steps as one process, with every type of reference."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny import make_tokenizer
from transformers import AutoModelForCausalLM

from lightning_ft.models.adapt import add_lora, lora_config

SCRIPT = Path(__file__).parent / "two_ranks_preferences.py"
NAMES = {
    "ddp": ["dpo full", "dpo lora", "dpo continued", "reward lora", "kto", "precomputed"],
    "fsdp": ["dpo full", "dpo object", "dpo lora", "dpo continued", "reward full", "reward lora", "kto", "precomputed"],
}


@pytest.fixture(scope="module")
def adapter_folder(tmp_path_factory, model_folder):
    """Folder of an adapter with non-zero weights."""
    folder = tmp_path_factory.mktemp("adapter")
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    model = add_lora(base, lora_config({"r": 4}), seed=0)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory, model_folder, adapter_folder):
    """Function that runs cases with a strategy, in the same processes, and returns the folder of the results."""

    def start(strategy, names):
        folder = tmp_path_factory.mktemp(strategy)
        command = [sys.executable, str(SCRIPT), strategy, model_folder, adapter_folder, str(folder), ",".join(names)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return folder

    return start


@pytest.fixture(scope="module")
def one(run):
    return run("one", NAMES["fsdp"])


def weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_two_ranks_match_one_process_on_preferences(run, one, strategy):
    folder = run(strategy, NAMES[strategy])
    for name in NAMES[strategy]:
        expected, actual, other = (
            torch.load(path / name / f"{r}.pt") for path, r in ((one, 0), (folder, 0), (folder, 1))
        )
        assert len(expected["steps"]) == len(actual["steps"]) == 3
        assert 0 in other["sizes"], name  # a rank without rows participated in the last step
        assert 0 not in actual["sizes"]
        metrics = actual["metrics"].keys()
        assert metrics == expected["metrics"].keys() == other["metrics"].keys()
        if name == "kto":  # its mismatched completions depend on the batches, so only the two ranks are compared
            assert actual["metrics"] == other["metrics"]
            assert all(math.isfinite(value) for value in actual["metrics"].values())
            assert actual["losses"] == other["losses"]
            continue
        assert actual["losses"] == pytest.approx(expected["losses"], abs=1e-5), name
        for ours, theirs in zip(actual["steps"], expected["steps"], strict=True):
            assert ours.keys() == theirs.keys()
            for key in ours:
                torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-5, msg=f"{name}: {key}")
        for metric in metrics:
            assert actual["metrics"][metric] == pytest.approx(expected["metrics"][metric], abs=1e-4), (
                f"{name}: {metric}"
            )
        assert_same_weights(weights(folder / name / "end.ckpt"), weights(one / name / "end.ckpt"))
        file = next((one / name / "export/last").glob("*.safetensors"))
        assert_same_weights(load_file(folder / name / "export/last" / file.name), load_file(file))
    names = [sorted(file.name for file in (path / "precomputed/reference").iterdir()) for path in (one, folder)]
    assert names[0] == names[1]  # equal weights and rows have equal names, sharded or not
    assert len(names[0]) == 2


def assert_same_weights(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=0, atol=1e-5)


def test_reference_of_a_continued_adapter_is_that_adapter(one, model_folder, adapter_folder):
    """The first loss is log 2, although the adapter differs from its base."""
    first = torch.load(one / "dpo continued" / "0.pt")["losses"][0]
    assert first == pytest.approx(math.log(2), abs=1e-6)
    ids = torch.arange(3, 20)[None]
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        plain = base(ids).logits
        adapted = PeftModel.from_pretrained(base, adapter_folder)(ids).logits
    assert (adapted - plain).abs().max() > 0.05
