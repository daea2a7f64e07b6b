"""Documents as Markdown: what a brief one, for a pull request, leaves out."""

from lightning_ft.document.blocks import Answers, Document, Section, SideBySide
from lightning_ft.document.markdown import markdown_document

LONG = "word " * 100


def lines_of(brief):
    answers = tuple(Answers(f"r{k}", LONG, None, f"short\n{k}", LONG, 1.0, 0.25) for k in range(5))
    document = Document((), (), (), (Section("Changes", (SideBySide(answers, "All of them."),)),))
    return markdown_document(document, "Report", [], brief=brief).splitlines()


def example_rows(brief):
    return [line for line in lines_of(brief) if line.startswith("| r") and "reference" not in line]


def test_markdown_document_has_whole_answers():
    assert len(example_rows(brief=False)) == 5
    assert example_rows(brief=False)[4] == f"| r4 | {LONG.strip()} |  | short 4 | 1 | {LONG.strip()} | 0.25 |"


def test_markdown_document_in_brief_has_three_examples_shortened():
    assert len(example_rows(brief=True)) == 3
    assert example_rows(brief=True)[2] == f"| r2 | {LONG[:120]}... |  | short 2 | 1 | {LONG[:120]}... | 0.25 |"
    assert "All of them. 3 of them are shown here." in lines_of(brief=True)
    assert "All of them." in lines_of(brief=False)
