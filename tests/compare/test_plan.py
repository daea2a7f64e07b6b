"""Plans of a comparison: methods and grids from a configuration, and what is refused before any run."""

import copy
import sys
from pathlib import Path

import pytest
import yaml

from lightning_ft.compare.option_values import parse_duration
from lightning_ft.compare.plan import (
    PlannedRun,
    Settings,
    config_hash,
    original_hash,
    planned_methods,
    read_config,
    read_settings,
    run_config,
    scorer_hashes,
    weights_hash,
)
from lightning_ft.errors import ComparisonError
from lightning_ft.evaluation.scorers import resolve_scorer

CONFIG = {
    "trainer": {
        "max_epochs": 2,
        "callbacks": [
            {"class_path": "lightning_ft.TokenSavings", "init_args": {"baseline": "b.json", "scorer": "exact"}},
            {"class_path": "lightning_ft.ExportModel"},
            {"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss"}},
        ],
    },
    "model": {
        "class_path": "lightning_ft.LoRAFineTuning",
        "init_args": {"model": "m", "dtype": "float32", "learning_rate": 2e-3, "lora": {"r": 4}, "weight_decay": 0.1},
    },
    "data": {"class_path": "lightning_ft.PairDataModule", "init_args": {"train": "t.jsonl", "batch_size": 4}},
}


def changed(path, value):
    config = copy.deepcopy(CONFIG)
    section = config
    for key in path[:-1]:
        section = section[key]
    section[path[-1]] = value
    return config


def test_planned_methods_derives_full_from_lora_configuration():
    full, lora = planned_methods(CONFIG, "c.yaml", ["prompted", "full", "lora"], {})
    assert full.config["model"]["class_path"] == "lightning_ft.FullFineTuning"
    assert full.config["model"]["init_args"] == {
        "model": "m",
        "dtype": "float32",
        "learning_rate": 5e-4,
        "weight_decay": 0.1,
    }
    assert full.rates == (1.7e-4, 5e-4, 1.5e-3)
    assert lora.config["model"]["init_args"]["lora"] == {"r": 4}
    assert lora.rates == (6.7e-4, 2e-3, 6e-3)


def test_planned_methods_accepts_grids_and_yaml_files(tmp_path):
    other = changed(("model", "init_args", "lora"), {"r": 2})
    other["trainer"] = {"callbacks+": [{"class_path": "lightning_ft.Retention"}]}
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(other))
    lora, small = planned_methods(CONFIG, "c.yaml", ["lora", str(file)], {"lora": [3e-3, 1e-3]})
    assert lora.rates == (1e-3, 3e-3)
    assert (small.name, small.config["model"]["init_args"]["lora"]) == ("small", {"r": 2})
    assert small.config["trainer"] == {"callbacks": [{"class_path": "lightning_ft.Retention"}]}  # of no other file


def test_a_method_file_may_contain_only_what_differs(tmp_path):
    file = tmp_path / "anchor.yaml"
    file.write_text(yaml.safe_dump({"model": {"init_args": {"anchor": {"texts": "general.jsonl"}}}}))
    lora, anchor = planned_methods(CONFIG, "c.yaml", ["lora", str(file)], {})
    arguments = dict(anchor.config["model"]["init_args"])
    assert arguments.pop("anchor") == {"texts": "general.jsonl"}
    assert arguments == CONFIG["model"]["init_args"]
    assert (anchor.config["data"], anchor.rates) == (CONFIG["data"], lora.rates)


@pytest.mark.parametrize(
    ("names", "grids", "message"),
    [
        (["prompted"], {}, "contains no method that trains"),
        (["qlora"], {}, "'qlora' is neither prompted, full, lora nor a YAML file"),
        (["lora", "lora"], {}, "contains lora more than once"),
        (["lora"], {"full": [1e-3]}, "contains full, but --methods doesn't"),
        (["lora"], {"lora": [0.0]}, "expected numbers above 0"),
    ],
)
def test_planned_methods_refuses_invalid_names_and_grids(names, grids, message):
    with pytest.raises(ComparisonError, match=message):
        planned_methods(CONFIG, "c.yaml", names, grids)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("data", "init_args", "train"), "other.jsonl", "different data sections"),
        (("trainer", "precision"), "bf16-mixed", "different precision"),
        (("model", "init_args", "dtype"), "bfloat16", "different precision"),
    ],
)
def test_planned_methods_refuses_different_data_or_precision(tmp_path, path, value, message):
    file = tmp_path / "other.yaml"
    file.write_text(yaml.safe_dump(changed(path, value)))
    with pytest.raises(ComparisonError, match=message):
        planned_methods(CONFIG, "c.yaml", ["lora", str(file)], {})


def test_planned_methods_refuses_classes_with_different_default_precision():
    config = copy.deepcopy(CONFIG)
    del config["model"]["init_args"]["dtype"]
    with pytest.raises(ComparisonError, match=r"Set model\.init_args\.dtype"):
        planned_methods(config, "c.yaml", ["full", "lora"], {})


def test_planned_methods_accepts_different_batch_sizes(tmp_path):
    file = tmp_path / "other.yaml"
    file.write_text(yaml.safe_dump(changed(("data", "init_args", "batch_size"), 8)))
    assert len(planned_methods(CONFIG, "c.yaml", ["lora", str(file)], {})) == 2


def test_read_settings_requires_token_savings():
    config = copy.deepcopy(CONFIG)
    config["trainer"]["callbacks"] = []
    with pytest.raises(ComparisonError, match="has no TokenSavings"):
        read_settings(config, "c.yaml", 8)


SAVINGS, RETENTION = "lightning_ft.TokenSavings", "Retention"


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({"class_path": SAVINGS, "init_args": {"name": "long"}}, r"2 TokenSavings .*\(without a name, long\)"),
        ({"class_path": RETENTION, "init_args": {"name": "b"}}, r"2 Retention .*\(a, b\).*Leave the others out"),
    ],
)
def test_read_settings_refuses_several_measurements_of_one_type(added, message):
    callbacks = [
        *CONFIG["trainer"]["callbacks"],
        {"class_path": f"lightning_ft.{RETENTION}", "init_args": {"name": "a"}},
        added,
    ]
    with pytest.raises(ComparisonError, match=message):
        read_settings(changed(("trainer", "callbacks"), callbacks), "c.yaml", 8)


def test_read_settings_refuses_to_monitor_what_is_measured_after_training():
    def stopping(monitor, name="token_savings"):
        savings = {"class_path": SAVINGS, "init_args": {"baseline": "b.json", "name": name}}
        return changed(
            ("trainer", "callbacks"), [savings, {"class_path": "EarlyStopping", "init_args": {"monitor": monitor}}]
        )

    for config in (stopping("token_savings/quality_tuned"), stopping("mine/total", "mine")):
        with pytest.raises(ComparisonError, match=r"EarlyStopping monitors \S+, which .* after training only"):
            read_settings(config, "c.yaml", 8)
    assert read_settings(stopping("val/loss"), "c.yaml", 8).savings["name"] == "token_savings"


def test_read_settings_refuses_an_endpoint():
    def savings(endpoint):
        arguments = {"baseline": "b.json", "endpoint": endpoint}
        return changed(("trainer", "callbacks"), [{"class_path": SAVINGS, "init_args": arguments}])

    assert read_settings(savings(None), "c.yaml", 8).savings["baseline"] == "b.json"  # as `fit` writes it
    served = {"class_path": "lightning_ft.Endpoint", "init_args": {"url": "http://localhost/v1", "model": "m"}}
    with pytest.raises(ComparisonError, match=r"endpoint of TokenSavings can't answer .* Leave endpoint out"):
        read_settings(savings(served), "c.yaml", 8)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"requests": [{"messages": [{"role": "user", "content": "a"}]}]}, "requests of TokenSavings"),
        ({"train_rows": "rows.jsonl"}, "train_rows of TokenSavings"),
        ({"split": "validation"}, "split of TokenSavings"),
    ],
)
def test_read_settings_refuses_other_rows_than_those_of_the_data(argument, message):
    def settings(**arguments):
        callback = {"class_path": SAVINGS, "init_args": {"baseline": "b.json", **arguments}}
        return read_settings(changed(("trainer", "callbacks"), [callback]), "c.yaml", 8)

    assert settings(requests=None, train_rows=None, split="test").savings["split"] == "test"  # as `fit` writes them
    with pytest.raises(ComparisonError, match=message + " .* Leave .* out"):
        settings(**argument)


@pytest.mark.parametrize(
    ("text", "message"),
    [("model: 1", "has no data"), ("trainer: {}", "has no data and no model"), ("[1]", "expected a mapping")],
)
def test_read_config_refuses_other_files(tmp_path, text, message):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ComparisonError, match=message):
        read_config(file)
    with pytest.raises(ComparisonError, match="can't be read"):
        read_config(tmp_path / "none.yaml")


def test_read_config_takes_what_fit_saved(tmp_path):
    file = tmp_path / "config.yaml"
    saved = {**CONFIG, "optimizer": None, "ckpt_path": None, "weights_only": None}
    file.write_text(yaml.safe_dump(saved))
    assert read_config(file) == {**CONFIG, "optimizer": None}


def test_read_config_reads_numbers_as_fit_does(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("model: {init_args: {weight_decay: 1e-1}}\ndata: {}\n")
    assert read_config(file)["model"]["init_args"]["weight_decay"] == 0.1


def test_read_config_merges_files_as_the_command_line_does(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(yaml.safe_dump({"fit": CONFIG}))
    second.write_text(
        yaml.safe_dump({"trainer": {"max_epochs": 5, "callbacks+": [{"class_path": "lightning_ft.Retention"}]}})
    )
    merged = read_config(f"{first}, {second}")
    names = [callback["class_path"].rpartition(".")[2] for callback in merged["trainer"]["callbacks"]]
    assert names == ["TokenSavings", "ExportModel", "EarlyStopping", "Retention"]
    assert merged["trainer"]["max_epochs"] == 5
    assert {**merged, "trainer": None} == {**CONFIG, "trainer": None}
    assert read_config(first) == CONFIG
    second.write_text(
        yaml.safe_dump({"model": {"class_path": "lightning_ft.FullFineTuning", "init_args": {"model": "m"}}})
    )
    assert read_config(f"{first},{second}")["model"]["init_args"] == {"model": "m"}  # arguments belong to their class


def test_run_config_keeps_own_callbacks_and_sets_seed_and_epochs():
    (lora,) = planned_methods(CONFIG, "c.yaml", ["lora"], {})
    config = run_config(lora, PlannedRun("lora", 1e-3, 7, 100), Path("there"), epochs_factor=10)
    assert [c["class_path"] for c in config["trainer"]["callbacks"]] == ["EarlyStopping"]
    assert (config["seed_everything"], config["model"]["init_args"]["seed"]) == (7, 7)
    assert config["model"]["init_args"]["learning_rate"] == 1e-3
    assert config["trainer"]["max_epochs"] == 20
    assert CONFIG["trainer"]["max_epochs"] == 2  # the method's configuration is unchanged


def test_config_hash_depends_on_everything_but_folder():
    (lora,) = planned_methods(CONFIG, "c.yaml", ["lora"], {})
    run, settings = PlannedRun("lora", 1e-3, 0), Settings({"scorer": "exact"})
    here, there = (run_config(lora, run, Path(folder)) for folder in ("here", "there"))
    assert config_hash(here, settings, None) == config_hash(there, settings, None)
    seeded = run_config(lora, PlannedRun("lora", 1e-3, 1), Path("here"))
    hashes = {
        config_hash(here, settings, None),
        config_hash(seeded, settings, None),
        config_hash(here, Settings({"scorer": "json"}), None),
        config_hash(here, settings, 100),
        config_hash(here, settings, None, ["other rows"]),
    }
    assert len(hashes) == 5


def test_hash_of_the_untrained_weights_does_not_depend_on_training():
    settings = Settings({"scorer": "exact"}, {"texts": "general.jsonl"}, 8, 10)
    before = original_hash(CONFIG, settings)
    other = changed(("trainer", "max_epochs"), 7)
    other["model"]["init_args"] |= {"learning_rate": 1.0, "anchor": {"texts": "general.jsonl"}, "seed": 5}
    assert original_hash(other, Settings({"scorer": "exact"}, {}, 2, 10)) == before
    for path, value in (
        (("model", "init_args", "adapter"), "other"),
        (("model", "init_args", "dtype"), "bfloat16"),
        (("trainer", "precision"), "bf16-mixed"),
    ):
        assert original_hash(changed(path, value), settings) != before
    assert original_hash(CONFIG, Settings({"scorer": "json"}, {}, 8, 10)) != before
    assert original_hash(CONFIG, Settings({"scorer": "exact"}, {}, 8, 11)) != before
    assert original_hash(CONFIG, settings, ["other rows"]) != before


def test_weights_hash_depends_on_file_contents(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"one")
    before = weights_hash(str(tmp_path))
    assert weights_hash(str(tmp_path)) == before
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert weights_hash(str(tmp_path)) != before
    assert weights_hash("user/model") == "user/model"


def test_scorer_hashes_depend_on_the_files_that_define_it(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [*sys.path, str(tmp_path)])
    rules, file = tmp_path / "rules_of_scorer.py", tmp_path / "named_scorer.py"
    rules.write_text("class Same:\n    def __call__(self, a, b):\n        return a == b\n")
    file.write_text("from rules_of_scorer import Same\n\nscore = Same()\n")
    name = f"{file}:score"
    scorer = resolve_scorer(name, [])[1]
    before = scorer_hashes(name, scorer)
    assert len(before) == 2
    for path in (file, rules):
        path.write_text(path.read_text() + "# other\n")
        assert scorer_hashes(name, scorer) != before
        before = scorer_hashes(name, scorer)
    for other in ("exact", "label", "operator.eq"):
        assert scorer_hashes(*resolve_scorer(other, ["a"])) == []


def test_parse_duration_refuses_other_text():
    with pytest.raises(ComparisonError, match="expected a duration"):
        parse_duration("soon")
