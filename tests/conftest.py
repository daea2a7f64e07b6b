"""Fixtures of all tests; none reaches a network."""

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from results import comparison, comparison_folder, make, run_folder  # noqa: F401 fixtures
from tiny import make_model, make_rows, make_tokenizer
from transformers import AutoModelForCausalLM, Glm4MoeConfig


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def _same_start(tmp_path_factory, monkeypatch):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    monkeypatch.setattr(sys, "path", sys.path.copy())  # the folder of an imported file stays on it
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer):
    """A tiny random model with its tokenizer, as a local folder."""
    folder = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def routed_folder(tmp_path, tokenizer):
    """A mixture of experts whose routers have biases that bfloat16 would round."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "head_dim": 8}
    experts = {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
    }
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = AutoModelForCausalLM.from_config(
        Glm4MoeConfig(vocab_size=400, eos_token_id=2, **sizes, **experts, **layers)
    )
    for layer in model.model.layers:
        layer.mlp.gate.e_score_correction_bias.normal_(0, 0.1)
    model.save_pretrained(tmp_path / "routed")
    tokenizer.save_pretrained(tmp_path / "routed")
    return str(tmp_path / "routed")


@pytest.fixture
def rows():
    return make_rows()


@pytest.fixture
def trainer_options(tmp_path):
    return {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": str(tmp_path),
    }
