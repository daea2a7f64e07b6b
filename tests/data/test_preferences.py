"""PreferenceDataModule in a Trainer."""

import json

import datasets
import pytest
import torch
from preference_cases import expected, texts
from recorder import BatchRecorder

from lightning_ft._lightning import _pl, cli_module
from lightning_ft.data.batches import PreferenceBatch
from lightning_ft.data.preferences import PreferenceDataModule
from lightning_ft.data.preview import preview
from lightning_ft.data.prompts import PromptDataModule
from lightning_ft.errors import ConfigError, DataError


@pytest.fixture
def trainer(trainer_options):
    return lambda **options: _pl.Trainer(**{"max_epochs": 1, **trainer_options, **options})


def test_preference_loader_yields_every_row_once_with_its_fields(tokenizer, preferences, labeled_completions):
    for given in (preferences, labeled_completions):
        data = PreferenceDataModule(given, tokenizer=tokenizer, batch_size=5, cache_dir=False)
        data.setup("fit")
        batches = list(data.train_dataloader())
        assert [len(batch) for batch in batches] == [5, 5, 5, 5, 4]
        assert {batch.paired for batch in batches} == {given is preferences}
        seen = [row for batch in batches for row in texts(tokenizer, batch)]
        assert sorted(seen, key=lambda row: row[-1]) == expected(given)
        assert [row[-1] for row in seen] != list(range(24))


def test_preference_data_module_serves_all_stages(trainer, tokenizer, preferences, write):
    data = PreferenceDataModule(
        write("train.jsonl", preferences[:16]),
        write("validation.jsonl", preferences[16:20]),
        preferences[20:],
        batch_size=4,
    )
    module = BatchRecorder(tokenizer)
    trainer(max_epochs=2, num_sanity_val_steps=0).fit(module, data)
    assert [name for name, _ in module.seen] == ["train"] * 4 + ["validation"] + ["train"] * 4 + ["validation"]
    epochs = [[r for _, batch in module.seen[start : start + 4] for r in batch.rows.tolist()] for start in (0, 5)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(16))
    assert epochs[0] != epochs[1]
    trainer().test(module, data, verbose=False)
    assert texts(tokenizer, module.seen[-1][1]) == expected(preferences[20:])


def test_rows_without_questions_to_answer_name_the_data_module_that_has_them(trainer, tokenizer, preferences):
    prompts = [{"prompt": "2 + 2?"}]
    for data_class, rows in ((PreferenceDataModule, preferences), (PromptDataModule, prompts)):
        data = data_class(rows, tokenizer=tokenizer, cache_dir=False)
        with pytest.raises(
            ConfigError, match=rf"{data_class.__name__} has no rows to answer.*PairDataModule.*collate_fn=list"
        ):
            trainer().predict(BatchRecorder(tokenizer), data)


def test_preference_batches_keep_dtypes_with_bf16_true(trainer, tokenizer, preferences):
    """Lightning converts floats in the collections that it knows, and refuses frozen dataclasses in them."""
    module = BatchRecorder(tokenizer)
    trainer(precision="bf16-true").fit(module, PreferenceDataModule(preferences, batch_size=24, shuffle=False))
    ((_, batch),) = module.seen
    assert batch.margins.tolist() == [row["margin"] for row in preferences]
    assert batch.margins.dtype is torch.float32


def test_preferences_are_checked_before_weights_are_loaded(trainer, tokenizer, preferences):
    module = BatchRecorder(tokenizer)
    wrong = {"prompt": "a", "chosen": "b", "rejected": "b"}
    with pytest.raises(DataError, match=r"1 bad row \(1 x chosen and rejected are the same\)"):
        trainer().fit(module, PreferenceDataModule([*preferences, wrong]))
    assert not module.loaded
    data = PreferenceDataModule([*preferences, wrong], on_bad_row="skip")
    trainer().fit(module, data)
    assert data.report["train"].kept == 24
    assert dict(data.report["train"].skipped) == {"chosen and rejected are the same": 1}


def test_completions_with_equal_tokens_are_rejected_or_skipped(make_tokenizer, preferences):
    trims = make_tokenizer("llama")
    given = [*preferences, {"prompt": "a", "chosen": "b", "rejected": " b"}]
    data = PreferenceDataModule(given, tokenizer=trims, cache_dir=False)
    with pytest.raises(DataError, match="train, row 25: chosen and rejected become the same tokens"):
        data.setup("fit")
    data = PreferenceDataModule(given, tokenizer=trims, cache_dir=False, on_bad_row="skip")
    data.setup("fit")
    assert dict(data.report["train"].skipped) == {"chosen and rejected become the same tokens": 1}


def test_pairs_and_labeled_completions_cannot_be_mixed(tokenizer, preferences, labeled_completions, write):
    a, b = write("a.jsonl", preferences), write("b.jsonl", labeled_completions)
    with pytest.raises(
        DataError, match=rf"train mixes pairs \({a}, row 1\) with completions that have a label \({b}, row"
    ):
        PreferenceDataModule([a, b]).load_rows()
    PreferenceDataModule(a, b).load_rows()  # splits are independent
    with pytest.raises(DataError, match="24 x not a pair"):
        PreferenceDataModule([*preferences, *labeled_completions]).load_rows()


def test_missing_margin_is_treated_as_zero(tokenizer, preferences):
    del preferences[3]["margin"]
    preferences[5]["margin"] = None
    data = PreferenceDataModule(preferences, tokenizer=tokenizer, cache_dir=False, shuffle=False, batch_size=24)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert batch.margins.tolist() == [0.0 if n in (3, 5) else n / 4 for n in range(24)]
    assert "2 x no margin, treated as 0" in data.report["train"].summary("train")
    for row in preferences:
        row.pop("margin", None)
    data = PreferenceDataModule(preferences, tokenizer=tokenizer, cache_dir=False, batch_size=24)
    data.setup("fit")
    assert next(iter(data.train_dataloader())).margins is None
    assert not data.report["train"].notes


def test_preference_sources_are_mixed_by_weight(tokenizer, preferences):
    """Row numbers continue over sources; an empty source (all rows held out) is accepted."""
    data = PreferenceDataModule(
        [preferences[:4], preferences[4:]], mixing=[2.0, 0.5], tokenizer=tokenizer, batch_size=3, cache_dir=False
    )
    data.setup("fit")
    seen = [row for batch in data.train_dataloader() for row in texts(tokenizer, batch)]
    assert len(seen) == 18
    assert all(row == expected(preferences)[row[-1]] for row in seen)
    long = {"prompt": "q " * 200, "chosen": "a", "rejected": "b", "margin": 1}
    data = PreferenceDataModule(
        [[long], preferences[:4], [long, *preferences[4:]]],
        tokenizer=tokenizer,
        max_length=64,
        on_overlong="drop",
        cache_dir=False,
    )
    data.setup("fit")
    seen = [row for batch in data.row_batches("train", 7) for row in texts(tokenizer, batch)]
    assert seen == expected(preferences)
    assert dict(data.report["train"].skipped) == {"overlong prompt": 2}


def test_preference_loader_splits_batches_over_two_ranks(tokenizer, preferences, loader_of_rank):
    """25 pairs in steps of 8: the last step has one row, so the second rank gets none."""
    preferences = [*preferences, {"prompt": "where is it", "chosen": "here", "rejected": "there", "margin": 9.0}]
    (one,), two = (
        [
            list(loader_of_rank(PreferenceDataModule(preferences, tokenizer=tokenizer), rank, ranks))
            for rank in range(ranks)
        ]
        for ranks in (1, 2)
    )
    assert [len(batches) for batches in two] == [len(one), len(one)]
    for whole, *halves in zip(one, *two, strict=True):
        both = [row for half in halves for row in texts(tokenizer, half)]
        assert both == texts(tokenizer, whole)
    empty = two[1][-1]
    assert (len(empty), empty.labels.tolist(), empty.margins.tolist(), empty.rows.tolist()) == (0, [], [], [])


def test_hold_out_keeps_rows_of_a_prompt_together(tokenizer, preferences):
    given = [{**row, "rejected": f"{row['rejected']} {n}"} for row in preferences for n in range(3)]
    data = PreferenceDataModule(given, 0.25, tokenizer=tokenizer, cache_dir=False)
    data.setup("fit")
    prompts = [{row.prompt[0]["content"] for row in data.splits.rows[name][0]} for name in ("train", "validation")]
    assert not prompts[0] & prompts[1]
    assert (data.report["train"].kept, data.report["validation"].kept) == (54, 18)


def test_overlong_pairs_are_dropped_whole(tokenizer, preferences):
    long = {"prompt": "lamp", "chosen": "a", "rejected": "parcel " * 99, "margin": 1}
    options = {"tokenizer": tokenizer, "max_length": 64, "cache_dir": False}
    with pytest.raises(DataError, match=r"1 bad row \(1 x overlong answer\)"):
        PreferenceDataModule([long, *preferences], **options).setup("fit")
    data = PreferenceDataModule([long, *preferences], on_overlong="drop", **options)
    data.setup("fit")
    assert [row for batch in data.row_batches("train", 9) for row in texts(tokenizer, batch)] == expected(preferences)
    assert len(data.report["train"].lengths) == 48
    data = PreferenceDataModule(
        [{**long, "prompt": "q " * 200, "rejected": "b"}, *preferences], on_overlong="truncate_prompt", **options
    )
    data.setup("fit")
    assert (data.report["train"].truncated, data.report["train"].kept) == (1, 25)


def test_preference_loader_workers_get_no_rows(tokenizer, preferences):
    data = PreferenceDataModule(preferences, tokenizer=tokenizer, batch_size=5, num_workers=2, cache_dir=False)
    data.setup("fit")
    alone = PreferenceDataModule(preferences, tokenizer=tokenizer, batch_size=5, cache_dir=False)
    alone.setup("fit")
    for one, other in zip(data.train_dataloader(), alone.train_dataloader(), strict=True):
        assert isinstance(one, PreferenceBatch)
        assert texts(tokenizer, one) == texts(tokenizer, other)
    data.teardown()


def test_preference_data_module_reads_files_and_datasets(tokenizer, preferences, write, tmp_path):
    csv = "prompt,chosen,rejected,margin\n" + "".join(
        f"{row['prompt']},{row['chosen']},{row['rejected']},{row['margin']}\n" for row in preferences
    )
    sources = [write("a.jsonl", preferences), write("a.json", json.dumps(preferences)), write("a.csv", csv)]
    for given in (*sources, datasets.Dataset.from_list(preferences)):
        data = PreferenceDataModule(given, tokenizer=tokenizer, cache_dir=False)
        assert [row for batch in data.row_batches("train", 9) for row in texts(tokenizer, batch)] == expected(
            preferences
        )


def test_preference_data_module_hyperparameters_are_json(trainer, tokenizer, preferences, write, tmp_path):
    path = write("train.jsonl", preferences)
    data = PreferenceDataModule(path, 0.25, batch_size=3, tokenizer=tokenizer)
    assert json.loads(json.dumps(dict(data.hparams))) == dict(data.hparams)
    one = trainer(limit_val_batches=0)
    one.fit(BatchRecorder(tokenizer), data)
    one.save_checkpoint(tmp_path / "a.ckpt")
    again = PreferenceDataModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert dict(again.hparams) == dict(data.hparams)


def test_preference_data_module_is_read_from_the_command_line(write, preferences, capsys):
    def cli(*arguments):
        module = cli_module().LightningCLI(
            BatchRecorder, PreferenceDataModule, run=False, save_config_callback=None, args=list(arguments)
        )
        return module.datamodule

    path = write("a.jsonl", preferences)
    data = cli(f"--data.train={path}", "--data.validation=0.25", "--data.columns.margin=by", "--data.batch_size=3")
    assert data.splits.sources == {"train": path, "validation": 0.25}
    assert data.rules.columns == {"margin": "by"}
    assert data.hparams["batch_size"] == 3
    with pytest.raises(SystemExit):
        cli("--help")
    said = " ".join(capsys.readouterr().out.split())
    assert "Maximum number of tokens per row: of the prompt with its longest completion" in said
    assert "--data.on_overlong {error,drop,truncate_prompt}" in said


def test_preference_data_module_rejects_invalid_arguments(preferences):
    with pytest.raises(ConfigError, match="max_length=1: expected at least 2"):
        PreferenceDataModule(preferences, max_length=1)
    with pytest.raises(TypeError, match="packing"):
        PreferenceDataModule(preferences, packing=True)
    with pytest.raises(ConfigError, match="PreferenceDataModule has no tokenizer"):
        PreferenceDataModule(preferences).setup("fit")


def test_preview_accepts_preference_data_modules(tokenizer, preferences, capsys):
    assert preview(PreferenceDataModule(preferences, cache_dir=False), tokenizer, examples=1)["train"].kept == 24
    assert "chosen: " in capsys.readouterr().out
