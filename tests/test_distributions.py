"""The wheel and the source distribution: every file of the package, and nothing else."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from tiny import make_rows

ROOT = Path(__file__).parents[1]
COPIED = ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "CHANGELOG.md", "constraints.txt")
SOURCES = {
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "lightning_ft").rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
}


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """Folder with the wheel and the source distribution, built with what pyproject.toml names."""
    pytest.importorskip("setuptools", minversion="77")
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in COPIED:
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "lightning_ft", source / "lightning_ft", ignore=ignored)
    (source / "tests").mkdir()
    shutil.copy(__file__, source / "tests")
    code = f"from setuptools import build_meta as b; b.build_wheel({str(built)!r}); b.build_sdist({str(built)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    return built


def test_wheel_contains_every_file_of_the_package_and_no_other(distributions):
    (wheel,) = distributions.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if ".dist-info/" not in name} == SOURCES
    assert {"lightning_ft/py.typed", "lightning_ft/document/page.html.jinja"} <= names


def test_source_distribution_contains_the_package_and_no_tests(distributions):
    (archive,) = distributions.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert names >= {*SOURCES, *COPIED}
    assert not [name for name in names if name.startswith(("tests", "examples"))]


@pytest.mark.slow
def test_wheel_trains_outside_of_the_clone(distributions, tmp_path, model_folder):
    (wheel,) = distributions.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in make_rows(8)))
    arguments = ["--model=LoRAFineTuning", f"--model.model={model_folder}", "--data=PairDataModule"]
    arguments += ["--data.train=rows.jsonl", "--trainer.max_steps=2", "--trainer.callbacks+=ComputeMeter"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    for more in (["--help"], ["fit", *arguments]):
        call = [sys.executable, "-m", "lightning_ft", *more]
        subprocess.run(call, cwd=tmp_path, env=environment, check=True, capture_output=True)
    (report,) = tmp_path.rglob("report.html")  # made of a template that the wheel contains
    assert "<html" in report.read_text()
