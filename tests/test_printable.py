"""Escaping of text that reaches terminals, pages and plots."""

import ast
import functools
import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from lightning_ft.__main__ import _print_traceback
from lightning_ft.callbacks.samples import samples_markdown, samples_table
from lightning_ft.data.raw_rows import Problem, raise_problems
from lightning_ft.data.rows import load_source
from lightning_ft.distributed import rank_zero_info, rank_zero_warn, warn
from lightning_ft.document.blocks import Answers, Document, Headline, Plot, Section, SideBySide, Table
from lightning_ft.document.html import html_page
from lightning_ft.document.markdown import markdown_document, markdown_table, markdown_text
from lightning_ft.document.plotting import escape_unprintable, render_plot
from lightning_ft.errors import DataError, DataNotFoundError, SavingsError
from lightning_ft.printable import json_text, printable

NASTY = "a\x1b[2J\x1b]0;title\x07\r\x08\x9b31m\u202egpj\u2066\u2028\x00"
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u202a-\u202e\u2060-\u2069\u2028\U000e0041]")
HIDDEN = f"{NASTY}b\u200bc\u2060\U000e0041\u200d"
SAFE = r"a\x1b[2J\x1b]0;title\x07\x0d\x08\x9b31m\u202egpj\u2066\u2028\x00"


def test_printable_escapes_terminal_control_characters():
    assert printable(NASTY) == SAFE
    assert printable("a\tb\nc") == "a\tb\nc"
    assert printable("a\nb\r\n", one_line=True) == r"a\nb\x0d\n"
    assert printable("half \ud83d").encode() == rb"half \ud83d"


@pytest.mark.parametrize(
    "text",
    [
        "caf\u00e9 na\u0308ive",
        "\u4f60\u597d",
        "\u05e9\u05dc\u05d5\u05dd",
        "\U0001f468\u200d\U0001f469",
        "[bold]x[/bold]",
        r"\x1b",
    ],
)
def test_printable_keeps_ordinary_text(text):
    assert printable(text) == text


def test_problems_are_printable():
    problem = Problem(NASTY, 1, NASTY, "x", NASTY + "\n", NASTY)
    with pytest.raises(DataError) as error:
        raise_problems([problem])
    assert "\x1b" not in str(error.value)
    assert str(problem).count("\n") == 0
    assert SAFE in str(problem)


def test_column_names_are_printable(caplog):
    with caplog.at_level("INFO"):
        load_source([{"input": "a", "output": "b", NASTY: 1}], "train", "train")
    assert f"ignored columns: {SAFE}" in caplog.text
    with pytest.raises(DataError) as error:
        load_source([{NASTY: 1, "x\x1b": "y"}], "train", "train")
    assert "\x1b" not in str(error.value)


def test_samples_table_is_printable():
    row = {"step": 3, "prompt": NASTY, "completion": NASTY, "rewards": {NASTY: 1.0}, "reward": 1.0}
    row |= {"advantage": 0.5, "truncated": False, "length": 2}
    file = io.StringIO()
    Console(file=file, width=200).print(samples_table([row]))
    assert not {"\x1b", "\x07", "\u202e", "\r", "\x00"} & set(file.getvalue())
    assert r"\x1b[2J" in file.getvalue()


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a\u200bb\u2060\ufeff", r"a\u200bb\u2060\ufeff"),
        ("hidden\U000e0041", r"hidden\U000e0041"),
        ("a\u200db", r"a\u200db"),
        ("\U0001f468\u200d\u200d", r"\U0001f468\u200d\u200d".replace(r"\U0001f468", "\U0001f468")),
        ("soft\u00adhyphen", r"soft\xadhyphen"),
    ],
)
def test_printable_escapes_invisible_characters(text, escaped):
    assert printable(text) == escaped


def test_json_text_is_json_without_control_characters():
    value = {"text": HIDDEN, "half": "\ud83d", "plain": "caf\u00e9 \u4f60"}
    assert json.loads(json_text(value, indent=1)) == value
    assert not RAW.search(json_text(value))
    assert "caf\u00e9 \u4f60" in json_text(value)


@pytest.mark.parametrize("error_type", [DataError, DataNotFoundError, SavingsError])
def test_errors_are_printable(error_type, capsys):
    error = error_type(f"row 3: {NASTY}")
    assert str(error) == f"row 3: {SAFE}"
    _print_traceback(ValueError, ValueError(HIDDEN), None)
    assert not RAW.search(capsys.readouterr().err)


def test_warnings_and_logs_are_printable(caplog):
    for warning_function in (rank_zero_warn, functools.partial(warn, stacklevel=1)):
        with pytest.warns(UserWarning, match="title") as warned:
            warning_function(NASTY)
        assert (str(warned[0].message), warned[0].filename) == (SAFE, __file__)
    with caplog.at_level("INFO"):
        rank_zero_info(NASTY)
    assert caplog.records[-1].getMessage() == SAFE
    assert caplog.records[-1].pathname == __file__


def hostile_document():
    text = f"<img src=x> [a](b) {HIDDEN}"
    answers = Answers(text, text, text, text, text, 1.0, 0.0)
    blocks = (text, Table((text, text), ((text, text),), text), SideBySide((answers,), text))
    return Document((Headline("FAIL", text, text),), (text,), (), (Section(text, blocks),))


def test_pages_and_markdown_are_printable():
    document = hostile_document()
    row = {"step": 3, "prompt": HIDDEN, "completion": f"<b>[a](b)\n{HIDDEN}", "rewards": {HIDDEN: 1.0}, "reward": 1.0}
    row |= {"advantage": 0.5, "truncated": False, "length": 2}
    table = "\n".join(markdown_table([HIDDEN, "n"], [[HIDDEN, "1"]]))
    pages = [html_page(document, {}), markdown_document(document, "Report", []), samples_markdown([row]), table]
    for page in pages:
        assert not RAW.search(page), RAW.search(page)
        assert "<img" not in page
    for page in pages[1:]:
        assert "[a](b)" not in page  # links, or images that would be downloaded
    assert r"&lt;img src=x> \[a\](b)" in pages[1]  # of an answer, too
    assert "&lt;b>\\[a\\](b)<br>" in pages[2]
    assert markdown_text("a\n b") == "a b"


def test_plots_are_printable():
    pytest.importorskip("matplotlib")
    seen = []

    def draw(axes):
        axes.set_title(HIDDEN)
        axes.plot([0, 1], label=HIDDEN)
        axes.legend()
        seen.append(axes.get_figure())

    render_plot(Plot("a", "", "", draw))
    from matplotlib.text import Text

    assert not any(RAW.search(text.get_text()) for text in seen[0].findobj(Text))
    assert any(r"\x1b[2J" in text.get_text() for text in seen[0].findobj(Text))
    escape_unprintable(seen[0])


def test_package_warns_and_logs_only_through_distributed_module():
    package = Path(__file__).parents[1] / "lightning_ft"
    for file in package.rglob("*.py"):
        if file.name in ("distributed.py", "_lightning.py"):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.module != "lightning_utilities.core.rank_zero", file
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                assert ast.unparse(node.func) != "warnings.warn", file
