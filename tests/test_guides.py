"""Every code block of the README and of docs/ runs as it is printed; only models and numbers of steps are replaced."""

import functools
import re
import sys
import warnings
from importlib import import_module

import pytest
import torch
import yaml
from guide_code import LANGUAGES, PAGES, ROOT, WITH_COMMANDS, all_blocks, blocks, commands, runnable, write_files
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_ft import PairDataModule, PromptBaseline
from lightning_ft import __main__ as command_line
from lightning_ft._lightning import NAMESPACE
from lightning_ft.compare import run as compare_run
from lightning_ft.planning import command as plan_command

L = import_module(NAMESPACE if NAMESPACE != "lightning" else "lightning.pytorch")
Fabric = import_module("lightning.fabric" if NAMESPACE == "lightning" else "lightning_fabric").Fabric

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")

NOT_RUN = 0
"""Blocks with a comment that says why they aren't run. Each needs a reason that a reader would accept."""


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """A folder with the files that pages name, as the working directory."""
    write_files(tmp_path)
    monkeypatch.chdir(tmp_path)  # what code writes stays out of the repository
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "existing_project"))
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] in ("my_package", "project")]:
        del sys.modules[name]


WITH_PYTHON = [
    path for path in PAGES if list(blocks(path, "python")) and path.stem != "tutorial"
]  # it has its own test


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda path: path.stem)
def test_python_of_the_page_runs(page, folder):
    namespace = {"__name__": "guide"}
    for block in blocks(page, "python"):
        if block.reason is not None:
            continue
        namespace.update(names_of(page.stem, block))
        code = compile("\n" * (block.line - 1) + runnable(block.code), block.page, "exec")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(code, namespace)


def names_of(page, block):
    """Names that a block takes from the reader's own program, made for it."""
    return {name: make() for name, make in NAMES.get(page, {}).items() if re.search(rf"\b{name}\b", block.code)}


def prompt():
    return PromptBaseline.from_file("prompt.json")


def tokenizer():
    return AutoTokenizer.from_pretrained("examples/tiny_base")


def model():
    return AutoModelForCausalLM.from_pretrained("examples/tiny_base", dtype=torch.float32)


def loader():
    data = PairDataModule("train.jsonl", tokenizer="examples/tiny_base", batch_format="hf", cache_dir=False)
    data.setup("fit")
    return list(data.train_dataloader())


def short(completions, **columns):
    return [-float(len(text)) for text in completions]


NAMES = {
    "README": {
        "Fabric": lambda: functools.partial(Fabric, accelerator="cpu", devices=1),
        "prompt": prompt,
        "tokenizer": tokenizer,
        "model": model,
        "my_reward": lambda: short,
        "trainer": lambda: L.Trainer(max_steps=1, logger=False, enable_checkpointing=False),
    },
    "measuring": {
        "Fabric": lambda: functools.partial(Fabric, accelerator="cpu", devices=1),
        "L": lambda: L,
        "prompt": prompt,
        "tokenizer": tokenizer,
        "model": model,
        "loader": loader,
        "batches": loader,
    },
}
"""By page: what its reader has already."""


@pytest.mark.parametrize("block", all_blocks("yaml"), ids=lambda block: block.name)
def test_configuration_is_accepted(block, folder, capsys):
    """A whole configuration is read alone, and a part of one over that of the support example."""
    if block.reason is not None:
        pytest.skip(block.reason)
    (folder / "part.yaml").write_text(block.code)
    whole = {"model", "data"} <= yaml.safe_load(block.code).keys()
    configs = ["--config", "part.yaml"]
    if not whole:
        configs = ["--config", "examples/support/lora.yaml", *configs]
    assert_parses(["fit", *configs], capsys)
    printed = capsys.readouterr().out
    (folder / "printed.yaml").write_text(printed)
    assert_parses(["fit", "--config", "printed.yaml"], capsys)
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize("block", all_blocks("yaml"), ids=lambda block: block.name)
def test_configuration_runs(block, folder):
    """A whole configuration trains for a step; of a part of one, the rows are shown."""
    if "accelerator: gpu" in block.code or block.page == "docs/tutorial.md":
        pytest.skip("needs GPUs, or is trained in test_tutorial.py")
    (folder / "part.yaml").write_text(runnable(block.code))
    if {"model", "data"} <= yaml.safe_load(block.code).keys():
        command_line.main(["fit", "--config", "part.yaml", *ONE_STEP])
    else:
        command_line.main(["preview", "--config", "examples/support/lora.yaml", "--config", "part.yaml"])


ONE_STEP = [
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=1",
    "--trainer.limit_val_batches=1",
    "--trainer.accelerator=cpu",
]

COMMANDS = [block for block in all_blocks("", pages=WITH_COMMANDS) if list(commands(block))]


@pytest.mark.parametrize("block", COMMANDS, ids=lambda block: block.name)
def test_commands_are_accepted(block, folder, capsys, monkeypatch):
    for path in PAGES:
        write_titled(path, folder)
    for program, *arguments in commands(block):
        CHECKS[program](arguments, capsys, monkeypatch)


def write_titled(path, folder):
    """Write the blocks of a page that have a file's name as their title."""
    for block in blocks(path, "yaml", "json", "python"):
        if block.title:
            (folder / block.title).write_text(block.code)


def assert_parses(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        command_line.main([*arguments, "--print_config"])
    assert stop.value.code == 0, capsys.readouterr().err[-2000:]


def check_lightning_ft(arguments, capsys, monkeypatch):
    if arguments[0] not in command_line.COMMANDS:
        assert_parses(arguments, capsys)
        return
    called = []
    for module, name in ((compare_run, "compare"), (plan_command, "plan"), (command_line, "report")):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, functools.wraps(function)(lambda **options: called.append(options)))
    command_line.main(arguments)
    assert called


def check_make(arguments, *_):
    targets = re.findall(r"^([\w%-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in arguments:
        assert any(re.fullmatch(name.replace("%", r"[\w-]+"), target) for name in targets), target


def check_python(arguments, *_):
    assert (ROOT / arguments[0]).is_file()


def check_pip(arguments, *_):
    _, _, section = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]\n")
    extras = set(re.findall(r"^(\w+) = \[", section.partition("\n[")[0], re.MULTILINE))
    for argument in arguments:
        if match := re.fullmatch(r"(?:\.|lightning-ft)\[(.*)\]", argument):
            assert set(match[1].split(",")) <= extras


def check_torchrun(arguments, *fixtures):
    module = arguments.index("-m")
    check_flags("--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id", "--max-restarts")(
        arguments[:module]
    )
    assert arguments[module + 1] == "lightning_ft"
    check_lightning_ft(arguments[module + 2 :], *fixtures)


def check_flags(*known):
    """Programs that aren't installed with the tests: the flags were looked up in their documentation."""

    def check(arguments, *_):
        assert {argument for argument in arguments if argument.startswith("-")} <= set(known)

    return check


CHECKS = {
    "lightning-ft": check_lightning_ft,
    "make": check_make,
    "python": check_python,
    "pip": check_pip,
    "torchrun": check_torchrun,
    "vllm": check_flags(
        "--enable-lora", "--lora-modules", "--max-lora-rank", "--weight-transfer-config", "--logprobs-mode"
    ),
    "transformers": check_flags("--host", "--port", "--device", "--dtype"),
    "llama-server": check_flags("-m", "--host", "--port", "--alias"),
    "ollama": check_flags("-f"),
}
"""How the arguments of each program are checked."""


def test_few_blocks_are_not_run():
    skipped = [block for block in all_blocks("python", "yaml", "") if block.reason is not None]
    assert len(skipped) == NOT_RUN, "\n".join(f"{block.name}: {block.reason}" for block in skipped)


def test_every_block_has_a_known_language():
    fences = {path.name: len(re.findall(r"^```\w*", path.read_text(), re.MULTILINE)) for path in PAGES}
    found = {path.name: 2 * len(list(blocks(path, *LANGUAGES))) for path in PAGES}
    assert found == fences
