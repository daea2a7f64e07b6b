"""Report files: their content, that they are deterministic, and reports without matplotlib."""

import importlib.util
import json
import re

import pytest

from lightning_ft.errors import DataError
from lightning_ft.evaluation.savings.result import SavingsResult
from lightning_ft.report.write import SCHEMA_VERSION, write_report


def contents(files):
    return {path.name: path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def files(run_folder, tmp_path_factory):
    return contents(write_report(run_folder, tmp_path_factory.mktemp("report")))


@pytest.fixture(scope="module")
def compared(comparison_folder, tmp_path_factory):
    return contents(write_report(comparison_folder, tmp_path_factory.mktemp("compared")))


def test_write_report_files_of_a_run(files):
    assert list(files) == [
        "report.html",
        "report.md",
        "report.json",
        "quality.png",
        "tokens.png",
        "cost_cached.png",
        "cost_uncached.png",
        "forgetting.png",
    ]
    assert all(data.startswith(b"\x89PNG") for name, data in files.items() if name.endswith(".png"))


def test_write_report_writes_into_the_folder_by_default(make, tmp_path):
    make.write(tmp_path / "retention", "retention.json", make.retention())
    assert {path.parent for path in write_report(tmp_path)} == {tmp_path / "report"}
    again = write_report(tmp_path)  # an existing report isn't collected as a result
    assert [path.name for path in again] == ["report.html", "report.md", "report.json"]


def test_page_has_every_section(files, run_folder):
    page = files["report.html"].decode()
    result = SavingsResult.from_dict(json.loads((run_folder / "token_savings/token_savings.json").read_text()))
    for part in (
        result.headline.split(": ", 1)[1],
        ">PASS</strong>",
        "system prompt",
        "95% interval of break-even",
        "prices of 2026-01-31",
        "0.0310 (0.0267 to 0.0363)",  # KL
        "240 TFLOP",
        "counted in 9 micro-batches",
        "Answers that changed",
        "Worse: ",
        "Better: ",
        "9d2b1f0c44aa8e05",  # hash of the data
        "77aa10c2d3e4f506",  # hash of the texts
        "requests left out",
        "truncated answers, tuned",
        "versions.torch",
    ):
        assert part in page, part
    assert page.count("<img ") == page.count('<img src="data:image/svg+xml;base64,') == 5
    assert all(len(alt) > 40 for alt in re.findall(r'alt="([^"]*)"', page))


def test_page_escapes_answers(files):
    page = files["report.html"].decode()
    assert "&lt;script&gt;document.title=&#34;hacked&#34;&lt;/script&gt;" in page
    assert "<script" not in page
    assert "&lt;b&gt;It&#39;s urgent &amp; late&lt;/b&gt;" in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "default-src &#39;none&#39;" in page


def test_markdown_is_brief(files):
    markdown = files["report.md"].decode()
    for part in ("**PASS: ", "| all tokens |", "](quality.png)", "](forgetting.png)", "[report.html](report.html)"):
        assert part in markdown, part
    assert set(re.findall(r"\]\((\w+\.png)\)", markdown)) == {name for name in files if name.endswith(".png")}
    assert "9d2b1f0c44aa8e05" not in markdown  # provenance is only in the page
    assert len(markdown) < 9000


def test_page_and_markdown_show_answers_that_changed_in_both_directions(files, run_folder):
    result = SavingsResult.from_dict(json.loads((run_folder / "token_savings/token_savings.json").read_text()))
    before, after = (result.arms[name].scores for name in ("prompted", "tuned"))
    pairs = list(zip(before, after, strict=True))
    worse, better = sum(a < b for b, a in pairs), sum(a > b for b, a in pairs)
    assert worse > 0
    assert better > 3
    counts = (
        f"{worse} ({worse / 300:.1%}) scored lower tuned than prompted, {better} ({better / 300:.1%}) scored higher"
    )
    page, markdown = files["report.html"].decode(), files["report.md"].decode()
    columns = page.split('<div class="changes">')[1].split("</section>")[0].split("<p>")
    summaries = [re.findall(r"prompted scored ([\d.]+), tuned ([\d.]+)", column) for column in columns[1:]]
    assert [len(column) for column in summaries] == [min(worse, 10), min(better, 10)]
    assert set(summaries[0]) == {("1", "0")}
    assert set(summaries[1]) == {("0", "1")}
    assert counts in page
    assert counts in markdown
    for caption, scores in (
        (
            "Worse: ",
            "1 | ",
        ),
        ("Better: ", "0 | "),
    ):
        table = markdown.split(caption)[1].split("\n\n")[1].splitlines()
        assert table[0] == "| id | request | reference answer | prompted | score | tuned | score |"
        assert len(table) == 2 + 3
        assert all(f" | {scores}" in row for row in table[2:])


def test_markdown_escapes_answers(files):
    markdown = files["report.md"].decode()
    assert "<script" not in markdown
    assert '&lt;script>document.title="hacked"&lt;/script>' in markdown
    assert "&lt;b>It's urgent &amp; late&lt;/b>" in markdown


def test_json_contains_all_results(files, run_folder):
    found = json.loads(files["report.json"])
    assert found["schema_version"] == SCHEMA_VERSION
    assert found["headlines"][0]["verdict"] == "PASS"
    assert found["comparison"] is None
    for measurement, key in (("savings", "token_savings"), ("retention", "retention"), ("compute", "compute")):
        written = json.loads((run_folder / key / f"{key}.json").read_text())
        assert found[measurement] == {key: written}
    assert [plot["file"] for plot in found["pictures"]] == [name for name in files if name.endswith(".png")]


def test_write_report_is_deterministic(files, run_folder, tmp_path):
    assert contents(write_report(run_folder, tmp_path / "elsewhere")) == files


def test_write_report_removes_plots_of_an_earlier_report(make, tmp_path):
    make.run(tmp_path / "run")
    write_report(tmp_path / "run", tmp_path / "out")
    (tmp_path / "out" / "mine.png").write_bytes(b"kept")
    (tmp_path / "run/retention/retention.json").unlink()
    written = write_report(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out/forgetting.png").exists()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in written} | {"mine.png"}


def test_page_starts_with_a_failed_gate_and_its_warning(make, tmp_path):
    make.write(tmp_path, "token_savings.json", make.savings(n=40, prices=None))
    page = write_report(tmp_path)[0].read_text()
    assert ">FAIL</strong>" in page
    assert page.index("Underpowered: 40 requests") < page.index("<section>")
    assert "Costs" not in page


def test_write_report_with_only_compute(make, tmp_path):
    make.write(tmp_path / "compute", "compute.json", make.compute())
    written = write_report(tmp_path)
    assert [path.suffix for path in written] == [".html", ".md", ".json"]
    page = written[0].read_text()
    assert "Token savings were not measured, so there is no verdict." in page
    assert "badge" not in page.split("</style>")[1]


def test_page_warns_of_an_incomplete_comparison(make, tmp_path):
    from lightning_ft.evaluation.comparison.result import Comparison

    unfinished = Comparison((), {}, {}, {}, {}, {}, complete=False, warnings=("Not all planned runs were made.",))
    make.write(tmp_path, "comparison.json", unfinished)
    page = write_report(tmp_path)[0].read_text()
    assert "Not all planned runs were made." in page
    assert "there is no verdict" in page
    assert "<section>" not in page


def test_write_report_refuses_a_folder_without_results(tmp_path):
    with pytest.raises(DataError, match=r"contains no results: none of token_savings\.json, retention\.json"):
        write_report(tmp_path)


def test_write_report_with_several_runs(make, tmp_path):
    for name, tuned in (("narrow run", 0.93), ("narrow-run", 0.8)):  # both have the same slug
        make.write(tmp_path / name / "token_savings", "token_savings.json", make.savings(tuned=tuned, resamples=99))
    written = write_report(tmp_path)
    names = [path.name for path in written]
    assert len(set(names)) == len(names) == 3 + 2 * 4
    page = written[0].read_text()
    for part in ("<b>narrow run:</b>", "<b>narrow-run:</b>", "Costs: narrow run", ">PASS<", ">FAIL<"):
        assert part in page, part


def test_page_of_a_comparison(compared, comparison):
    page = compared["report.html"].decode()
    for name in ("methods.png", "quality.png", "resources.png", "learning.png", "training.png", "forgetting.png"):
        assert name in compared
    assert {f"{method}-tokens.png" for method in ("full", "lora", "frozen-trunk")} <= set(compared)
    for claim in comparison.claims:
        assert claim.name in page
    assert "held only if compute means" in page
    for part in (
        "intent accuracy",
        "share of full&#39;s gain over untuned",
        "never",  # one method doesn't reach 95% of full's quality
        "lora, seed 2",
        "The same in all runs: ",
        "The search for learning rates took",
        "900 answers",
        "0c44aa8e059d2b1f",
    ):
        assert part in page, part
    assert page.index("Claims and verdicts") < page.index("Methods side by side") < page.index("Tokens per request")
    assert json.loads(compared["report.json"])["comparison"] == json.loads(json.dumps(comparison.to_dict()))


def test_write_report_without_matplotlib(run_folder, tmp_path, monkeypatch, caplog):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    with caplog.at_level("INFO"):
        written = write_report(run_folder, tmp_path)
    assert [path.name for path in written] == ["report.html", "report.md", "report.json"]
    for path in written[:2]:
        text = path.read_text()
        assert "pip install 'lightning-ft[report]'" in text.replace("&#39;", "'")
        assert "<img" not in text
        assert "![" not in text
    assert "lightning-ft[report]" in caplog.text
    assert json.loads(written[2].read_text())["pictures"] == []


def test_import_of_write_does_not_import_matplotlib():
    import subprocess
    import sys

    code = (
        "import sys, lightning_ft.report.write; print([name for name in ('matplotlib', 'trl') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
