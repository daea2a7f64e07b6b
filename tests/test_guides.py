"""The code of the guides in docs/ runs as it is printed, from the root of the repository."""

import re
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GUIDES = ("distillation", "forgetting", "parts")


@pytest.mark.parametrize("guide", GUIDES)
def test_code_of_the_guide_runs(guide, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # what it writes stays out of the repository
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "existing_project"))
    text = (ROOT / "docs" / f"{guide}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert blocks
    namespace = {}
    for number, block in enumerate(blocks):
        code = compile(block, f"docs/{guide}.md, block {number}", "exec")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(code, namespace)
