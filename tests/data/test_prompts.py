"""PromptDataModule in a Trainer."""

import json

import datasets
import pytest
from recorder import BatchRecorder

from lightning_ft._lightning import _pl, cli_module
from lightning_ft.data.batches import PromptBatch
from lightning_ft.data.encode import encode_prompt
from lightning_ft.data.prompts import PromptDataModule
from lightning_ft.errors import ConfigError, DataError


@pytest.fixture
def rows(pairs):
    return [
        {"id": n, "prompt": row["input"], "answer": {"text": row["output"], "n": [n]}} for n, row in enumerate(pairs)
    ]


@pytest.fixture
def trainer(trainer_options):
    return lambda **options: _pl.Trainer(**{"max_epochs": 1, **trainer_options, **options})


def content(batches):
    """Rows that batches were made of, and their tokens."""
    rows, tokens = [], []
    for batch in batches:
        assert isinstance(batch, PromptBatch)
        for i, prompt in enumerate(batch.prompts):
            rows.append({"prompt": prompt, **{name: values[i] for name, values in batch.columns.items()}})
            tokens.append(batch.input_ids[i].tolist())
    return rows, tokens


def encoded(tokenizer, rows):
    return [encode_prompt(tokenizer, [{"role": "user", "content": row["prompt"]}]) for row in rows]


def test_prompt_loader_yields_every_row_once_with_its_columns(tokenizer, rows):
    data = PromptDataModule(rows, tokenizer=tokenizer, batch_size=5, cache_dir=False)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert [len(batch) for batch in batches] == [5, 5, 5, 5, 4]
    seen, tokens = content(batches)
    assert tokens == encoded(tokenizer, seen)
    assert sorted(seen, key=lambda row: row["id"]) == rows != seen


def test_prompt_data_module_serves_all_stages(trainer, tokenizer, rows, write):
    data = PromptDataModule(
        write("train.jsonl", rows[:16]), write("validation.jsonl", rows[16:20]), rows[20:], batch_size=4
    )
    module = BatchRecorder(tokenizer)
    trainer(max_epochs=2, num_sanity_val_steps=0).fit(module, data)
    assert [name for name, _ in module.seen] == ["train"] * 4 + ["validation"] + ["train"] * 4 + ["validation"]
    assert content([module.seen[4][1]]) == (rows[16:20], encoded(tokenizer, rows[16:20]))
    first, second = ([r["id"] for r in content(b for _, b in module.seen[s : s + 4])[0]] for s in (0, 5))
    assert sorted(first) == sorted(second) == list(range(16))
    assert first != second
    trainer().test(module, data, verbose=False)
    assert content([module.seen[-1][1]])[0] == rows[20:]
    trainer().validate(module, data, verbose=False)
    assert content([module.seen[-1][1]])[0] == rows[16:20]


def test_bf16_true_keeps_dtypes_of_columns(trainer, tokenizer):
    given = [{"prompt": "where is it", "spans": range(3), "score": 0.3}]
    module = BatchRecorder(tokenizer)
    trainer(precision="bf16-true").fit(module, PromptDataModule(given))
    assert module.seen[0][1].columns == {"spans": [range(3)], "score": [0.3]}


def test_column_missing_in_a_row_is_none(tokenizer, rows):
    del rows[3]["answer"]
    rows[4]["answer"] = None  # an explicit None is a value
    rows[5]["tests"] = ["a"]
    data = PromptDataModule([rows[:4], rows[4:]], tokenizer=tokenizer, cache_dir=False)
    data.setup("fit")
    seen = {row["id"]: row for row in content(data.train_dataloader())[0]}
    assert all(row.keys() == {"prompt", "id", "answer", "tests"} for row in seen.values())
    assert sorted(n for n, row in seen.items() if row["answer"] is None) == [3, 4]
    assert [row["tests"] for n, row in seen.items() if row["tests"] is not None] == [["a"]]
    summary = data.report["train"].summary("train")
    assert "1 x no 'answer' column, treated as None" in summary
    assert "23 x no 'tests' column, treated as None" in summary


def test_held_out_prompts_have_the_columns_of_train(tokenizer, rows):
    rows[0]["tests"] = ["a"]
    data = PromptDataModule(rows, 0.25, tokenizer=tokenizer, cache_dir=False, batch_size=6)
    data.setup("fit")
    (batch,) = data.val_dataloader()
    assert batch.columns.keys() == next(iter(data.train_dataloader())).columns.keys() == {"id", "answer", "tests"}


@pytest.mark.parametrize("name", ["prompts", "completions", "completion_ids", "trainer_state"])
def test_columns_named_like_reward_arguments_are_rejected(rows, name):
    rows[7][name] = 3
    with pytest.raises(DataError, match=f"train: the column {name!r} is named like an argument of reward functions"):
        PromptDataModule(rows, on_bad_row="skip").load_rows()


def test_prompts_of_a_split_must_be_of_one_type(tokenizer, rows):
    """Reward functions look at the first prompt of a batch to distinguish strings from messages."""
    rows[3]["system"] = "be brief"
    data = PromptDataModule([rows[:8], rows[8:]], rows[8:], tokenizer=tokenizer, cache_dir=False)
    data.setup("fit")
    seen, _ = content(data.train_dataloader())
    by_id = {row["id"]: row["prompt"] for row in seen}
    assert [turn["role"] for turn in by_id[3]] == ["system", "user"]
    assert by_id[20] == [{"role": "user", "content": rows[20]["prompt"]}]
    assert all(isinstance(row["prompt"], str) for row in content(data.val_dataloader())[0])


def test_answers_after_the_last_question_are_counted(tokenizer):
    turns = [{"role": role, "content": role[0]} for role in ("user", "assistant")]
    data = PromptDataModule([{"messages": turns}, {"messages": turns[:1]}], tokenizer=tokenizer, cache_dir=False)
    data.setup("fit")
    assert data.report["train"].notes == {"answer after the last question, left out": 1}


def test_truncated_prompts_keep_their_whole_text(tokenizer, rows):
    long = {"id": 99, "prompt": "parcel " * 99 + "lamp", "answer": None}
    options = {"tokenizer": tokenizer, "max_length": 64, "cache_dir": False, "shuffle": False, "batch_size": 25}
    with pytest.raises(DataError, match=r"1 bad row \(1 x overlong prompt\)"):
        PromptDataModule([long, *rows], **options).setup("fit")
    data = PromptDataModule([long, *rows], on_overlong="drop", **options)
    data.setup("fit")
    assert content(data.train_dataloader())[0] == rows
    data = PromptDataModule([long, *rows], on_overlong="truncate_prompt", **options)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert batch.prompts[0] == long["prompt"]
    assert len(batch.input_ids[0]) <= 64
    assert "lamp<|im_end|>" in tokenizer.decode(batch.input_ids[0])
    assert data.report["train"].truncated == 1


def test_prompt_loader_splits_batches_over_two_ranks(tokenizer, rows, loader_of_rank):
    """25 prompts in steps of 8: the last step has one row, so the second rank gets none."""
    rows = [*rows, {"id": 24, "prompt": "where is it", "answer": "here"}]
    (one,), two = (
        [list(loader_of_rank(PromptDataModule(rows, tokenizer=tokenizer), rank, ranks)) for rank in range(ranks)]
        for ranks in (1, 2)
    )
    assert [len(batches) for batches in two] == [len(one), len(one)]
    for whole, *halves in zip(one, *two, strict=True):
        assert content(halves) == content([whole])
    empty = two[1][-1]
    assert (len(empty), empty.prompts, empty.input_ids, empty.columns) == (0, [], [], {"id": [], "answer": []})


def test_prompt_loader_supports_workers(tokenizer, rows):
    def made(workers):
        data = PromptDataModule(rows, tokenizer=tokenizer, batch_size=5, num_workers=workers, cache_dir=False)
        data.setup("fit")
        batches = content(data.train_dataloader())
        data.teardown()
        return batches

    assert made(2) == made(0)


def test_prompts_are_encoded_once(tokenizer, rows, tmp_path, monkeypatch):
    from lightning_ft.data import tokenize

    times = []
    original = tokenize._encode_all
    monkeypatch.setattr(tokenize, "_encode_all", lambda *a: times.append(1) or original(*a))

    def batches(given):
        data = PromptDataModule(given, tokenizer=tokenizer, cache_dir=str(tmp_path))
        data.setup("fit")
        return content(data.train_dataloader())

    first = batches(rows)
    assert batches(rows) == first
    changed, tokens = batches([{**row, "answer": 5} for row in rows])  # columns aren't in the cache
    assert len(times) == 1
    assert tokens == first[1]
    assert {row["answer"] for row in changed} == {5}


def test_prompt_data_module_reads_files_and_datasets(tokenizer, rows, write):
    flat = [{"prompt": row["prompt"], "n": str(row["id"])} for row in rows]
    csv = "prompt,n\n" + "".join(f"{row['prompt']},{row['n']}\n" for row in flat)
    options = {"tokenizer": tokenizer, "cache_dir": False, "shuffle": False}
    for given in (write("a.csv", csv), datasets.Dataset.from_list(flat)):
        data = PromptDataModule(given, **options)
        data.setup("fit")
        assert content(data.train_dataloader())[0] == flat


def test_prompt_data_module_hyperparameters_are_json(trainer, tokenizer, rows, write, tmp_path):
    data = PromptDataModule(write("train.jsonl", rows), 0.25, batch_size=3, tokenizer=tokenizer)
    assert json.loads(json.dumps(dict(data.hparams))) == dict(data.hparams)
    one = trainer(limit_val_batches=0)
    one.fit(BatchRecorder(tokenizer), data)
    one.save_checkpoint(tmp_path / "a.ckpt")
    again = PromptDataModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert dict(again.hparams) == dict(data.hparams)


def test_prompt_data_module_is_read_from_the_command_line(write, rows):
    path = write("a.jsonl", rows)
    arguments = [f"--data.train={path}", "--data.validation=0.25", "--data.max_length=64"]
    cli = cli_module().LightningCLI(
        BatchRecorder, PromptDataModule, run=False, save_config_callback=None, args=arguments
    )
    assert cli.datamodule.splits.sources == {"train": path, "validation": 0.25}
    assert cli.datamodule.rules.max_length == 64


def test_missing_splits_and_tokenizer_are_named_in_errors(trainer, tokenizer, rows):
    with pytest.raises(ConfigError, match="PromptDataModule has no test rows: pass test="):
        trainer().test(BatchRecorder(tokenizer), PromptDataModule(rows))
    with pytest.raises(ConfigError, match="PromptDataModule has no tokenizer"):
        trainer().fit(BatchRecorder(), PromptDataModule(rows))
