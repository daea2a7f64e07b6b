"""`--print_config` writes a configuration that can be read again, of every example."""

from pathlib import Path

import pytest
import yaml

from lightning_ft.cli import FineTuningCLI

EXAMPLES = sorted(
    path
    for path in Path("examples").rglob("*.yaml")
    if {"model", "data"} <= set(yaml.safe_load(path.read_text(encoding="utf-8")))
)


@pytest.mark.parametrize("path", EXAMPLES, ids=str)
def test_printed_configuration_is_complete(path, capsys, tmp_path):
    with pytest.raises(SystemExit):
        FineTuningCLI(args=["fit", "--config", str(path), "--print_config"])
    printed = capsys.readouterr().out
    assert "Unable to serialize" not in printed
    again = tmp_path / "printed.yaml"
    again.write_text(printed, encoding="utf-8")
    with pytest.raises(SystemExit):
        FineTuningCLI(args=["fit", "--config", str(again), "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(printed)
    class_path = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["class_path"]
    assert yaml.safe_load(printed)["model"]["class_path"].endswith(class_path.rpartition(".")[2])


@pytest.mark.parametrize(("part", "texts"), [("general", "texts.jsonl"), ("anchor", "anchor.jsonl")])
def test_part_of_a_configuration_can_be_added(part, texts, capsys):
    paths = [f"examples/smollm2/{name}.yaml" for name in ("legal_citation", part)]
    with pytest.raises(SystemExit):
        FineTuningCLI(args=["fit", *(option for path in paths for option in ("--config", path)), "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert f"examples/smollm2/data/general/{texts}" in yaml.safe_dump(printed)
    assert printed["model"]["init_args"]["learning_rate"] == 1e-3  # of the configuration that it was added to
