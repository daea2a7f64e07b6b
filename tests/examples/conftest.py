"""Fixtures of the examples' tests. Examples are scripts, not a package, so their folders are put on the path."""

import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
FOLDERS = (".", "tiny_base", "support")
EXAMPLE_MODULES = (
    *("english", "corpus", "build", "choosing", "distilling"),
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
