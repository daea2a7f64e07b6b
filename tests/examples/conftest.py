"""The examples are scripts, not a package: their folders are put on the path while these tests run."""

import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
FOLDERS = (".", "tiny_base", "support", "medical_coding", "legal_citation", "api_calls", "domain_base")
OF_A_DOMAIN = ("language", "pretraining", "generate", "metrics", "choose_baseline")
OF_THE_EXAMPLES = (
    *("english", "corpus", "build"),
    *(f"{domain}_{part}" for domain in ("medical", "legal", "api") for part in OF_A_DOMAIN),
    *("api_company", "api_frames", "medical_frames", "pretrain", "choosing"),
    *("wording", "generate", "choose_baseline", "replies", "rewards", "preferences", "evaluate", "support_metrics"),
)


@pytest.fixture(scope="session", autouse=True)
def _modules_of_the_examples():
    """`import english` and the like work while these tests run, and leave nothing behind."""
    path, before = list(sys.path), set(sys.modules)
    sys.path[:0] = [str(EXAMPLES / folder) for folder in FOLDERS]
    yield
    sys.path[:] = path
    for name in OF_THE_EXAMPLES:
        if name not in before:
            sys.modules.pop(name, None)


@pytest.fixture(scope="session")
def tiny_base():
    return EXAMPLES / "tiny_base"


@pytest.fixture(scope="session")
def support():
    return EXAMPLES / "support"
