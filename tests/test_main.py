"""The subcommands that need no Trainer."""

import pytest

from lightning_ft.__main__ import main
from lightning_ft.evaluation.savings.arithmetic import token_savings
from lightning_ft.evaluation.savings.records import ArmRecords


@pytest.fixture
def measured(tmp_path):
    """A run's folder with a result in it."""
    ids = tuple(map(str, range(200)))
    prompted = ArmRecords(ids, (500,) * 200, (20,) * 200, (1.0,) * 200, (False,) * 200)
    tuned = ArmRecords(ids, (50,) * 200, (15,) * 200, (1.0,) * 200, (False,) * 200)
    token_savings(prompted, tuned, resamples=99).save(tmp_path / "token_savings", png=False)
    return tmp_path


def test_report_writes_the_page_of_a_folder_and_says_where(measured, capsys):
    main(["report", str(measured)])
    written = capsys.readouterr().out.splitlines()
    assert str(measured / "report" / "report.html") in written
    assert "87.5% fewer tokens per request" in (measured / "report" / "report.html").read_text()


def test_report_writes_elsewhere(measured, tmp_path):
    main(["report", str(measured), "--output", str(tmp_path / "there")])
    assert (tmp_path / "there" / "report.md").exists()


def test_report_of_a_folder_that_isnt_there_ends_with_an_error_and_no_traceback(tmp_path):
    with pytest.raises(SystemExit, match="DataNotFoundError"):
        main(["report", str(tmp_path / "none")])


def test_compare_without_its_arguments_says_which(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--config", "c.yaml"])
    assert "output" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--config", "none.yaml"], "ComparisonError: The configuration 'none.yaml' can't be read"),
        (["--config", "none.yaml", "--seeds", "a,b"], "expected whole numbers"),
        (["--config", "none.yaml", "--budget", "soon"], "expected a time"),
    ],
)
def test_compare_refuses_before_anything_runs(tmp_path, more, message):
    with pytest.raises(SystemExit, match=message):
        main(["compare", "--methods", "lora", "--output", str(tmp_path / "out"), *more])
    assert not (tmp_path / "out").exists()


def test_the_help_of_the_command_line_tells_of_them(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "`compare`" in said
    assert "`report`" in said
