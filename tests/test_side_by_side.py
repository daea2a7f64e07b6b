"""The tables of docs/from_trl.md and docs/from_axolotl.md name arguments that exist."""

import inspect
import re

import pytest
import trl
from guide_code import ROOT

import lightning_ft
from lightning_ft._lightning import Trainer

CONFIGS = ("SFTConfig", "DPOConfig", "KTOConfig", "RewardConfig", "GRPOConfig", "RLOOConfig")
TRAINERS = ("SFTTrainer", "DPOTrainer", "KTOTrainer", "RewardTrainer", "GRPOTrainer", "RLOOTrainer")
OF_SECTION = {
    "Arguments of every trainer": (*CONFIGS, *TRAINERS),
    "Supervised fine-tuning": ("SFTConfig", "SFTTrainer"),
    "Preferences": ("DPOConfig", "DPOTrainer", "KTOConfig", "RewardConfig"),
    "Rewards": ("GRPOConfig", "GRPOTrainer", "RLOOConfig"),
}
"""Classes of TRL whose arguments a section's first column names."""


def rows(page):
    """The rows of a page's tables with the section that they are in, as cells."""
    section, text = "", (ROOT / "docs" / page).read_text(encoding="utf-8")
    for line in text.splitlines():
        section = line.removeprefix("## ") if line.startswith("## ") else section
        if line.startswith("|") and not line.startswith(("|---", "| TRL |", "| axolotl |")):
            yield section, [cell.strip() for cell in line.strip("|").split("|")]


def arguments(cell):
    return re.findall(r"`(\w+)=`", cell)


def parameters(*classes):
    return {name for cls in classes for name in inspect.signature(cls).parameters}


@pytest.mark.parametrize("section", OF_SECTION)
def test_arguments_of_trl_exist(section):
    named = {name for title, cells in rows("from_trl.md") if title == section for name in arguments(cells[0])}
    assert named
    assert named - parameters(*(getattr(trl, name) for name in OF_SECTION[section])) == set()


def test_losses_of_both_exist():
    text = (ROOT / "docs" / "from_trl.md").read_text(encoding="utf-8")
    line = re.search(r"^Losses of both: (.*?)\.", text, re.MULTILINE)[1]
    documented = inspect.getdoc(trl.DPOConfig)
    for name in re.findall(r"`(\w+)`", line):
        assert name in lightning_ft.DPO("examples/tiny_base", loss=name).hparams["loss"]
        assert f"'{name}'" in documented


@pytest.mark.parametrize(("page", "column"), [("from_trl.md", 2), ("from_axolotl.md", 1)])
def test_arguments_of_this_package_exist(page, column):
    classes = [getattr(lightning_ft, name) for name in lightning_ft.__all__ if name != "__version__"]
    named = {name for _, cells in rows(page) if len(cells) > column for name in arguments(cells[column])}
    assert len(named) > 30
    assert named - parameters(Trainer, *classes) == set()


def test_defaults_that_differ_are_those_of_both():
    """The numbers of the tables that a change of either package would make wrong."""
    fields = trl.GRPOConfig.__dataclass_fields__
    ours = inspect.signature(lightning_ft.GRPO).parameters
    assert (fields["max_completion_length"].default, ours["max_new_tokens"].default) == (512, 128)
    assert (fields["num_generations"].default, ours["num_completions"].default) == (8, 8)
    assert (fields["disable_dropout"].default, ours["disable_dropout"].default) == (False, True)
    fields, ours = trl.SFTConfig.__dataclass_fields__, inspect.signature(lightning_ft.PairDataModule).parameters
    assert (fields["packing"].default, ours["packing"].default) == (False, True)
    assert (fields["max_length"].default, ours["max_length"].default) == (1024, 2048)
    rates = {name: getattr(trl, name).__dataclass_fields__["learning_rate"].default for name in CONFIGS}
    assert rates == {**dict.fromkeys(CONFIGS, 1e-6), "SFTConfig": 2e-5, "RewardConfig": 1e-4}
    names = ("FullFineTuning", "DPO", "KTO", "RewardModeling", "GRPO")
    assert [getattr(lightning_ft, name).default_learning_rate for name in names] == [2e-5, 1e-6, 1e-6, 1e-5, 1e-6]
