"""Each optional package: without it, the error names the extra to install, and the extra exists."""

import argparse
import re
import sys
from pathlib import Path

import pytest
from tiny import make_model

from lightning_ft import Endpoint
from lightning_ft.completion import completion_script
from lightning_ft.document.plotting import Plot, render_plot
from lightning_ft.errors import MissingDependencyError
from lightning_ft.evaluation.savings.plots import plot_savings
from lightning_ft.models.gguf_export import check_gguf
from lightning_ft.models.load import load_causal_lm
from lightning_ft.rollout.structured import check_grammar
from lightning_ft.rollout.vllm import VLLMEngine

PYPROJECT = (Path(__file__).parents[1] / "pyproject.toml").read_text()
SECTION = PYPROJECT.split("[project.optional-dependencies]")[1].split("[project.scripts]")[0]
EXTRAS = set(re.findall(r"^(\w+) = \[", SECTION, re.MULTILINE)) - {"dev"}
USES = [
    ("report", "matplotlib", lambda: render_plot(Plot("line", "A line", "", lambda axes: None))),
    ("report", "matplotlib", lambda: plot_savings(None, None)),
    ("quant", "bitsandbytes", lambda: load_causal_lm("base/", quantization="4bit")),
    ("structured", "llguidance", lambda: check_grammar('start: "a"')),
    ("gguf", "gguf", lambda: check_gguf(make_model())),
    ("endpoint", "openai", lambda: Endpoint("http://localhost:1", "model", api_key_variable=None).client()),
    ("vllm", "vllm", lambda: VLLMEngine(end_token_ids=[2])),
    ("completion", "shtab", lambda: completion_script("lightning-ft", {"fit": argparse.ArgumentParser()}, "bash")),
]
WITHOUT_CODE = {"ray", "docs"}
"""Extras of what runs the package's code or its documentation; no code of the package imports it."""


@pytest.mark.parametrize(("extra", "package", "use"), USES)
def test_missing_package_names_its_extra(monkeypatch, extra, package, use):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=rf"pip install 'lightning-ft\[{extra}\]'"):
        use()


def test_every_extra_is_tried():
    assert {extra for extra, *_ in USES} | WITHOUT_CODE == EXTRAS


def test_extras_that_messages_name_exist():
    package = Path(__file__).parents[1] / "lightning_ft"
    named = {name for path in package.rglob("*.py") for name in re.findall(r"lightning-ft\[(\w+)\]", path.read_text())}
    assert named <= EXTRAS
