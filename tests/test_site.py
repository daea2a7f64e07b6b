"""The site: what its hooks change, and that it has what it should. `make docs` builds it with warnings as errors."""

import doctest
import importlib.util
import re
from types import SimpleNamespace

import pytest
from guide_code import PAGES, ROOT

import lightning_ft

pytest.importorskip("mkdocstrings")
SITE = ROOT / "docs" / "_site"


def load(name):
    spec = importlib.util.spec_from_file_location(name, SITE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["hooks", "docstrings"])
def test_examples_of_the_extensions_are_right(name):
    result = doctest.testmod(load(name))
    assert result.attempted
    assert not result.failed


class Files:
    """Pages of the site, as mkdocs has them."""

    def get_file_from_path(self, path):
        known = {"index.md", "data.md", "images/plot.png", "examples/support/README.md"}
        return path if path in known else None


@pytest.mark.parametrize(
    ("source", "written", "shown"),
    [
        ("index.md", "[rules](docs/data.md#held-out-rows)", "[rules](data.md#held-out-rows)"),
        ("index.md", "![plot](docs/images/plot.png)", "![plot](images/plot.png)"),
        ("data.md", "[limits](../README.md#limits)", "[limits](index.md#limits)"),
        ("data.md", "[it](../examples/support)", "[it](examples/support/README.md)"),
        ("data.md", "[`a.py`](../tests/test_site.py)", "`a.py`"),
        ("data.md", "[a test](../tests/test_site.py)", "a test (`tests/test_site.py`)"),
        ("data.md", "[paper](https://arxiv.org/abs/1)", "[paper](https://arxiv.org/abs/1)"),
        ("data.md", "```\n[x](../README.md)\n```", "```\n[x](../README.md)\n```"),
        ("examples/support/README.md", "[all](../../docs/data.md)", "[all](../../data.md)"),
    ],
)
def test_links_by_paths_in_the_repository_become_links_of_the_site(source, written, shown):
    generated = source == "index.md" or source.startswith("examples/")
    page = SimpleNamespace(file=SimpleNamespace(src_uri=source, generated_by="hook" if generated else None))
    assert load("hooks").on_page_markdown(written, page, None, Files()) == shown


def test_reference_has_every_public_name():
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    described = {path.rpartition(".")[2] for path in re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)}
    assert set(lightning_ft.__all__) - {"__version__"} <= described


def test_navigation_has_every_page():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    pages = {path.name for path in PAGES if path.parent == ROOT / "docs"}
    assert {name for name in pages if f": {name}\n" not in navigation} == set()
