"""Shell completion, tried in a shell."""

import shutil
import subprocess
import sys

import pytest

from lightning_ft.__main__ import main

TRY = """
source {script}
complete_function=$(complete -p lightning-ft | sed 's/.*-F \\([^ ]*\\).*/\\1/')
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${{#COMP_LINE}}
$complete_function lightning-ft "${{COMP_WORDS[COMP_CWORD]}}" "${{COMP_WORDS[COMP_CWORD - 1]}}"
echo "${{COMPREPLY[*]}}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("completion") / "lightning-ft.bash"
    call = [sys.executable, "-m", "lightning_ft", "--print_completion", "bash"]
    path.write_text(subprocess.run(call, capture_output=True, text=True, check=True).stdout)
    return path


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([""], "fit validate test predict preview export compare plan report"),
        (["fit", "--model", "Lo"], "LoRAFineTuning"),
        (["fit", "--model.learning_r"], "--model.learning_rate"),
        (["fit", "--data", ""], "PairDataModule PreferenceDataModule PromptDataModule"),
        (["fit", "--config", "some.yaml", "--trainer.max_ep"], "--trainer.max_epochs"),
        (["fit", "--config", "some"], "some.yaml"),
        (["export", "--gguf"], "--gguf_dtype"),
        (["compare", "--method"], "--methods --methods+"),
    ],
)
def test_script_completes_in_bash(script, tmp_path, words, expected):
    (tmp_path / "some.yaml").touch()
    call = ["bash", "-c", TRY.format(script=script), "bash", "lightning-ft", *words]
    done = subprocess.run(call, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == expected


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_scripts_of_other_shells_name_subcommands_and_options(shell, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--print_completion", shell])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("preview", "compare", "--config"))


def test_missing_shtab_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit, match=r"MissingDependencyError: .*pip install 'lightning-ft\[completion\]'"):
        main(["--print_completion", "bash"])
