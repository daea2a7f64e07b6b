"""The notebooks run from their first cell to their last, as in a clone, and are committed without outputs."""

import shutil

import pytest
from guide_code import ROOT

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
CLAIMS = {  # what the last cells must show, for the text around them to be true
    "savings_in_ten_minutes": ["fewer tokens per request", "tuned: ", "## Token savings"],
    "rlhf_in_ten_minutes": ["reward of validation prompts: ", "GRPO: "],
}
SECONDS = 1800  # of a cell, on a machine that does other things; none takes more than two minutes of one core


def test_every_notebook_is_run():
    assert {path.stem for path in NOTEBOOKS} == CLAIMS.keys()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not [cell for cell in cells if cell.outputs or cell.execution_count]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    folder = tmp_path / "examples" / "notebooks"  # what it writes stays out of the repository
    folder.mkdir(parents=True)
    for name in ("support", "tiny_base"):
        (tmp_path / "examples" / name).symlink_to(ROOT / "examples" / name)
    notebook = nbformat.read(shutil.copy(path, folder), as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    shown = "".join(
        output.get("text", "") for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    )
    for claim in CLAIMS[path.stem]:
        assert claim in shown, claim
    if path.stem == "rlhf_in_ten_minutes":
        before, after = (float(word) for word in shown.split("reward of validation prompts: ")[1].split()[:3:2])
        assert after > before
