"""Model cards: what they say of training and measurements, and what they never contain."""

import json
import re
from dataclasses import replace
from importlib.metadata import PackageNotFoundError

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from results import make_savings
from tiny import make_model, make_rows, make_tokenizer

from lightning_ft import (
    ExportModel,
    FullFineTuning,
    LoRAFineTuning,
    PairDataModule,
    PromptBaseline,
    Retention,
    TokenSavings,
)
from lightning_ft import __main__ as command_line
from lightning_ft._lightning import Trainer, _pl
from lightning_ft.data.provenance import describe_training_rows
from lightning_ft.evaluation.savings.arithmetic import token_savings
from lightning_ft.evaluation.savings.card import savings_for_card
from lightning_ft.models.card_facts import CardFacts, TrainingRecord, weights_hash
from lightning_ft.models.model_card import model_card
from lightning_ft.modules import training_record

SECRET = "the safe opens with 4711"
ROWS = [{"input": f"{row['input']} {SECRET}", "output": row["output"]} for row in make_rows(24)]
PROMPT = f"{SECRET}. answer in one line"
TEXTS = ["the quick brown fox jumps over the lazy dog", "where is my parcel with the lamp"]


def half(output, reference):
    return 0.5 if len(output) % 2 else 1.0  # an untrained model gives no right answer


def callbacks(output, **export):
    return [
        ExportModel(str(output), **export),  # before the measurements, in whatever order
        TokenSavings(
            PromptBaseline(PROMPT), scorer=half, max_new_tokens=4, timed_requests=0, resamples=50, min_quality=0.0
        ),
        Retention(TEXTS, max_task_rows=0, resamples=50),
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run in a folder of the user's, with an adapter that is exported at its end: its folder and its module."""
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("home-of-someone")
    make_model().save_pretrained(home / "base")
    make_tokenizer().save_pretrained(home / "base")
    for name, rows in (("train", ROWS), ("test", ROWS[:8])):
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    module = LoRAFineTuning(str(home / "base"), learning_rate=1e-2, dtype="float32", lora={"r": 4}, seed=7)
    data = PairDataModule(str(home / "train.jsonl"), test=str(home / "test.jsonl"), batch_size=6, cache_dir=False)
    saver = _pl.callbacks.ModelCheckpoint(filename="run")
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=2,
        accumulate_grad_batches=2,
        default_root_dir=str(home),
        logger=_pl.loggers.CSVLogger(str(home), name="runs"),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[saver, *callbacks(home / "out")],
    )
    trainer.fit(module, data)
    return home, module, saver.best_model_path


def test_card_says_how_the_weights_were_trained(run):
    home, _, _ = run
    card = (home / "out" / "last" / "README.md").read_text()
    for line in (
        "| training data | train.jsonl |",
        "| training rows | 24 |",
        "| method | LoRAFineTuning |",
        "| optimizer steps | 4 |",
        "| epochs | 2 |",
        "| batch size per rank | 6 |",
        "| batches accumulated per step | 2 |",
        "| learning\\_rate | 0.01 |",
        "| seed | 7 |",
        "| precision | 32-true |",
        "| adapter rank | 4 |",
        f"| torch | {torch.__version__} |",
    ):
        assert line in card, line
    assert re.search(r"\| hash of the tokenized rows \| [0-9a-f]{16} \|", card)


def test_card_has_the_verdict_and_what_was_forgotten(run):
    home, module, _ = run
    card = (home / "out" / "last" / "README.md").read_text()
    savings, kept = (c.result for c in module.trainer.callbacks if isinstance(c, (TokenSavings, Retention)))
    plain = card.replace("\\", "")
    assert savings.headline in plain
    assert kept.headline in plain
    assert f"n = {savings.n:,}" in plain
    assert f"| hash of the trained weights | {weights_hash(module.model)} |" in card
    assert savings.weights == kept.weights == weights_hash(module.model)
    assert "Not measured" not in card


def test_card_contains_no_text_of_rows_and_no_path(run):
    home, module, path = run
    module.export(home / "merged", merge=True, overwrite=True)
    command_line.main(["export", *options(home), "--ckpt_path", path, "--output", str(home / "by command")])
    for folder in ("out/last", "merged", "by command"):
        card = (home / folder / "README.md").read_text()
        for private in (SECRET, str(home), home.name, "4711", ROWS[0]["input"][:20], "someone"):
            assert private not in card, (folder, private)


def options(home):
    """Options of the command line for a run like this one."""
    config = {
        "model": {
            "class_path": "LoRAFineTuning",
            "init_args": {"model": str(home / "base"), "dtype": "float32", "lora": {"r": 4}},
        },
        "data": {"class_path": "PairDataModule", "init_args": {"train": str(home / "train.jsonl")}},
    }
    (home / "run.yaml").write_text(json.dumps(config))
    return ["--config", str(home / "run.yaml"), "--overwrite", "true"]


def test_card_of_a_later_export_is_that_of_the_run(run):
    """What was trained is in the checkpoint, and what was measured in the folder of its run."""
    home, _, path = run
    command_line.main(["export", *options(home), "--ckpt_path", path, "--output", str(home / "later" / "last")])
    written = (home / "later" / "last" / "README.md").read_text()
    assert written == (home / "out" / "last" / "README.md").read_text()


def test_card_leaves_out_results_of_other_weights(run):
    _, module, _ = run
    facts = module.card_facts()
    with torch.no_grad():
        weight = next(p for p in module.model.parameters() if p.requires_grad)
        weight += 0.5
        card = module.card_text("name", facts=facts)
        weight -= 0.5
    assert card.count("with other weights than these") == 2
    assert "fewer tokens" not in card
    assert "model-index" not in card


def test_card_of_unknown_training_says_so(model_folder, tmp_path):
    module = FullFineTuning(model_folder)
    card = (module.export(tmp_path / "out") / "README.md").read_text()
    assert "was not recorded" in card
    assert card.count("Not measured.") == 2
    assert "model-index" not in card


def test_metadata_is_what_the_hub_reads(run):
    home, module, _ = run
    card = ModelCard((home / "out" / "last" / "README.md").read_text())
    assert card.data.library_name == "peft"
    assert card.data.license is None  # not known
    assert card.data.tags == ["lightning-ft", "lora"]
    (quality, *_) = card.data.eval_results
    savings = next(c.result for c in module.trainer.callbacks if isinstance(c, TokenSavings))
    assert quality.metric_type == "quality"
    assert quality.metric_value == round(savings.quality["tuned"].value, 4)


def test_metadata_names_datasets_of_the_hub_only():
    record = TrainingRecord(data={"training data": "user/data"}, datasets=("user/data",))
    card = model_card("name", make_model(), facts=CardFacts(record))
    assert yaml.safe_load(card.split("---")[1])["datasets"] == ["user/data"]


@pytest.mark.parametrize(("tuned", "claimed"), [(0.93, True), (0.5, False)])
def test_saving_is_claimed_only_if_the_gate_passed(tuned, claimed):
    metrics = savings_for_card(make_savings(tuned=tuned)).metrics
    assert ("share of tokens saved per request" in metrics) is claimed


def test_savings_on_a_card_have_the_warning_of_a_weak_prompt_and_no_address():
    result = make_savings()
    weak = token_savings(
        *(
            replace(result.arms[name], scores=scores)
            for name, scores in (
                ("prompted", tuple(float(k % 4 == 0) for k in range(300))),
                ("tuned", tuple(float(k % 4 != 1) for k in range(300))),
            )
        ),
        margin=0.05,
        resamples=99,
        provenance={"prompted_by": "gpt-x at https://internal.example/v1", "scorer": "/home/me/scorer.py:f"},
    )
    weak = replace(weak, warnings=(*weak.warnings, "Answered by gpt-x at https://internal.example/v1, which counts."))
    found = savings_for_card(weak)
    assert any("quality is only 0.250" in note for note in found.notes)
    text = " ".join((*found.sentences, *found.notes, *map(str, found.provenance.values())))
    assert "an endpoint" in text
    assert not re.search("internal.example|gpt-x|/home/me", text)


def test_card_of_loaded_weights_is_not_that_of_the_last_step(model_folder, trainer_options, tmp_path):
    """Of weights that were loaded after training, the card says how those were trained."""
    module = FullFineTuning(model_folder, learning_rate=1e-2)
    saver = _pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    options = {**trainer_options, "enable_checkpointing": True}
    trainer = Trainer(**options, max_steps=3, callbacks=[saver])
    trainer.fit(module, PairDataModule(ROWS, batch_size=4, cache_dir=False))
    assert module.card_facts().training.settings["optimizer steps"] == 3
    module.load_checkpoint(next(tmp_path.glob("*step=1.ckpt")))
    assert module.card_facts().training.settings["optimizer steps"] == 1


def test_card_names_the_rows_of_training_after_a_test_on_others(model_folder, trainer_options, tmp_path):
    module, file = LoRAFineTuning(model_folder), tmp_path / "other.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:2]))
    trainer = Trainer(**trainer_options, max_steps=1)
    trainer.fit(module, PairDataModule(ROWS, batch_size=4, cache_dir=False))
    before = module.card_text("name")
    trainer.test(
        module, datamodule=PairDataModule(str(file), test=str(file), batch_size=1, cache_dir=False), verbose=False
    )
    assert module.card_text("name") == before
    assert "rows in memory" in before
    assert module.record_state()["training_record"]["data"]["training data"] == "rows in memory"
    assert not any(isinstance(value, PairDataModule) for value in module.__getstate__().values())  # of a copy


def test_card_names_no_import_path_of_a_stream_as_a_data_set():
    stream = ["company/secret/rows.py:make", "company.rows", "user/data:train", None]
    found, datasets = describe_training_rows(None, stream)
    assert found == {"training data": "user/data:train, a stream, read while training"}
    assert datasets == ("user/data",)


def test_record_needs_no_metadata_of_packages(run, monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(training_record, "version", missing)
    _, module, _ = run
    assert module.record_state()["training_record"]["versions"]["torch"] == "unknown"


def test_record_of_another_version_is_read_as_far_as_it_is_understood():
    values = {"data": {"training rows": 3}, "settings": ["method"], "of a later version": 1, "datasets": None}
    assert TrainingRecord.from_dict(values) == TrainingRecord(data={"training rows": 3})
