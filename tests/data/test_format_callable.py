"""`format=`: a user's function that converts rows before they are checked."""

import json

import datasets
import pytest
from recorder import Recorder

from lightning_ft._lightning import _pl, cli_module
from lightning_ft.data.pairs import PairDataModule
from lightning_ft.data.preview import preview
from lightning_ft.errors import ConfigError, DataError

FILE = """
def to_messages(row):
    return [{"role": "user", "content": row["q"]}, {"role": "assistant", "content": row["a"]}]

not_a_function = 3
"""


def to_messages(row):
    return [{"role": "user", "content": row["q"]}, {"role": "assistant", "content": row["a"]}]


def to_pair(row):
    return {"input": row["q"], "output": row["a"], "cluster": row["topic"]}


@pytest.fixture
def questions(pairs):
    return [{"q": row["input"], "a": row["output"], "topic": f"t{n % 6}"} for n, row in enumerate(pairs)]


def make(rows, format=to_messages, **options):
    return PairDataModule(rows, format=format, **{"cache_dir": False, **options})


def read(rows, format=to_messages, **options):
    data = make(rows, format, **options)
    data.load_rows()
    return data


def texts(data, split="train"):
    return [[message["content"] for message in row.messages] for part in data.splits.rows[split] for row in part]


def tokens(data, tokenizer):
    data.tokenizer = tokenizer
    data.setup("fit")
    return [example.input_ids.tolist() for part in data.splits.encoded["train"] for example in part]


@pytest.mark.parametrize("format", [to_messages, to_pair, lambda row: tuple(to_messages(row))])
def test_format_determines_the_rows(questions, pairs, tokenizer, format):
    expected = PairDataModule(pairs, cache_dir=False)
    assert tokens(make(questions, format), tokenizer) == tokens(expected, tokenizer)


def test_format_replaces_detection_by_columns():
    def upper(row):
        return {"input": row["input"].upper(), "output": row["output"]}

    assert texts(read([{"input": "q", "output": "a"}], upper)) == [["Q", "a"]]
    plain = read([{"title": "t", "body": "b"}], lambda row: {"text": f"{row['title']}: {row['body']}"})
    assert texts(plain) == [["t: b"]]


def test_format_may_return_any_known_format():
    def to_sharegpt(row):
        turns = [{"from": "human", "value": row["q"]}, {"from": "gpt", "value": row["a"]}]
        return {"conversations": turns, "system": "s", "tools": [{"name": "f", "parameters": {}}]}

    data = read([{"q": "2+2?", "a": "4"}], to_sharegpt)
    assert texts(data) == [["s", "2+2?", "4"]]
    assert data.splits.rows["train"][0][0].template_kwargs["tools"][0]["function"]["name"] == "f"
    assert data.report["train"].formats == {"train": "conversations"}


def test_columns_name_fields_of_returned_rows():
    rows = [{"text": f"{n} -> {n}", "customer": n % 2, "key": f"k{n}"} for n in range(4)]
    columns = {"cluster": "customer", "id": "key"}

    def split(row):
        question, answer = row["text"].split(" -> ")
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    kept = read(rows, split, columns=columns).splits.rows["train"][0]
    assert [(row.id, row.cluster) for row in kept] == [("k0", "0"), ("k1", "1"), ("k2", "0"), ("k3", "1")]

    def to_dict(row):
        return {"asks": row["text"], "output": "a"}

    whole = read(rows, to_dict, columns={"input": "asks"}).splits.rows["train"][0]
    assert [(row.id, row.cluster) for row in whole] == [(f"train:{n}", None) for n in (1, 2, 3, 4)]


def test_format_works_for_every_split(questions, tokenizer, trainer_options):
    data = make(
        questions[:16], validation=questions[16:20], test=questions[20:], tokenizer=tokenizer, batch_size=4,
        predict=[{"q": "where is it", "a": None}],
        format=lambda row: to_messages(row) if row["a"] else to_messages(row)[:1],
    )  # fmt: skip
    trainer = _pl.Trainer(max_epochs=1, **trainer_options)
    trainer.fit(Recorder(tokenizer), data)
    trainer.test(Recorder(tokenizer), data, verbose=False)
    (batch,) = trainer.predict(Recorder(tokenizer), data)
    assert batch == [[{"role": "user", "content": "where is it"}]]
    assert {name: report.kept for name, report in data.report.items() if name != "predict"} == {
        "train": 16, "validation": 4, "test": 4,
    }  # fmt: skip


def test_held_out_share_follows_returned_clusters(questions):
    data = read(questions, to_pair, validation=0.25)
    topics = [{row.cluster for part in data.splits.rows[name] for row in part} for name in ("train", "validation")]
    assert not topics[0] & topics[1]


def test_format_gets_plain_dicts_of_every_source(questions, write, tmp_path):
    datasets.Dataset.from_list(questions).to_parquet(tmp_path / "rows.parquet")
    csv = "q,a,topic\n" + "".join(f"{row['q']},{row['a']},{row['topic']}\n" for row in questions)
    seen = []

    def recording(row):
        seen.append(row)
        return to_messages(row)

    sources = [
        questions, write("rows.jsonl", questions), write("rows.csv", csv), str(tmp_path / "rows.parquet"),
        datasets.Dataset.from_list(questions),
    ]  # fmt: skip
    for source in sources:
        data = read(source, recording)
        assert texts(data) == [[row["q"], row["a"]] for row in questions]
    assert seen == questions * len(sources)
    assert all(type(row) is dict for row in seen)


def test_format_may_change_its_row_without_changing_the_source():
    rows = [{"q": ["2+2?"], "a": "4"}]

    def pop(row):
        return {"input": row["q"].pop(), "output": row.pop("a")}

    assert texts(read(rows, pop)) == texts(read(rows, pop)) == [["2+2?", "4"]]
    assert rows == [{"q": ["2+2?"], "a": "4"}]


def broken(row):
    if row["q"] == "raises":
        raise ValueError("no answer\nin this row")
    if row["q"] == "key":
        return row["absent"]
    if row["q"] == "generator":
        return (message for message in to_messages(row))
    if row["q"] == "surrogate":
        return {"input": "\ud83d", "output": "a"}
    returned = {"none": None, "text": "q", "number": 3, "empty": [], "strings": ["q", "a"], "fields": {"question": "q"}}
    return returned.get(row["q"], to_messages(row))


BAD = [
    ("raises", "row 2: format= raised ValueError (no answer). Fix the function or the row."),
    ("key", "row 2: format= raised KeyError ('absent'). Fix the function or the row."),
    ("none", "row 2: format= returned no row (found NoneType). Return a list of messages, or a dict"),
    ("text", "row 2: format= returned no row (found str)"),
    ("number", "row 2: format= returned no row (found int)"),
    ("generator", "row 2: format= returned no row (found generator)"),
    ("empty", "row 2: no assistant turn (roles: none)"),
    ("strings", "row 2, 'messages[0]': wrong type (found str)"),
    ("fields", "row 2, 'messages': missing field (fields: question)"),
    ("surrogate", "row 2, 'input': half of a surrogate pair"),
    ("", "row 2, 'messages[0].content': empty input"),
]


@pytest.mark.parametrize(("question", "message"), BAD)
def test_bad_results_are_reported_with_file_row_and_reason(write, question, message):
    good = {"q": "2+2?", "a": "4"}
    path = write("rows.jsonl", [good, {"q": question, "a": "a"}, good])
    with pytest.raises(DataError) as error:
        read(path, broken)
    assert f"  {path}, {message}" in str(error.value)
    assert "1 bad row (" in str(error.value)


def test_all_bad_results_are_listed_together_or_skipped():
    rows = [{"q": question, "a": "a"} for question, _ in BAD] + [{"q": "2+2?", "a": "4"}] * 12
    with pytest.raises(DataError, match=rf"^{len(BAD)} bad rows .*4 x format= returned no row"):
        read(rows, broken)
    data = read(rows, broken, on_bad_row="skip")
    report = data.report["train"]
    assert (report.read, report.kept) == (len(rows), 12)
    assert report.skipped["format= returned no row"] == 4


def test_format_failing_for_every_row_is_an_error():
    with pytest.raises(DataError, match=r"2 bad rows \(2 x format= raised KeyError\)"):
        read([{"question": "q"}] * 2)


def test_format_gets_no_rows_that_are_not_objects(write):
    path = write("rows.jsonl", '{"q": "q", "a": "a"}\n[1]\n{"q": broken\n')
    with pytest.raises(DataError) as error:
        read(path)
    assert "row 2: not an object (found list)" in str(error.value)
    assert "row 3: malformed JSON" in str(error.value)


def test_cache_depends_on_what_the_format_returns(questions, tokenizer, tmp_path):
    def encode(format):
        data = make(questions, format, cache_dir=str(tmp_path))
        return tokens(data, tokenizer)

    first = encode(to_messages)
    (entry,) = tmp_path.iterdir()
    written = (entry / "rows.arrow").stat().st_mtime_ns
    assert encode(to_pair) == first  # another function, the same conversations
    assert [(tmp_path / entry.name / "rows.arrow").stat().st_mtime_ns] == [written]
    assert len(list(tmp_path.iterdir())) == 1
    other = encode(lambda row: {"input": row["q"] + "?", "output": row["a"]})
    assert other != first
    assert len(list(tmp_path.iterdir())) == 2


def test_format_accepts_an_import_path(questions, tmp_path, monkeypatch):
    (tmp_path / "mapping_of_rows.py").write_text(FILE)
    monkeypatch.syspath_prepend(str(tmp_path))
    expected = texts(read(questions))
    for path in ("mapping_of_rows.to_messages", "mapping_of_rows:to_messages"):
        assert texts(read(questions, path)) == expected
    assert texts(read(questions, f"{tmp_path}/mapping_of_rows.py:to_messages")) == expected


@pytest.mark.parametrize(
    ("format", "message"),
    [
        ("to_messages", "format='to_messages': expected a function"),
        ("", "format='': expected a function"),
        (3, "format=3: expected a function"),
        ([to_messages], r"format=\[.*: expected a function"),
    ],
)
def test_wrong_format_fails_at_once(format, message):
    with pytest.raises(ConfigError, match=message):
        make([], format)


def test_import_path_errors_say_what_is_missing(questions, tmp_path):
    file = tmp_path / "mapping.py"
    file.write_text(FILE)
    for path, message in (
        ("no.such.module", "format='no.such.module' can't be imported"),
        (f"{file}:absent", "has no 'absent'"),
        (f"{tmp_path}/absent.py:f", "there is no file"),
        (f"{file}:not_a_function", "names an object of type int, not a function"),
    ):
        with pytest.raises(ConfigError, match=message):
            read(questions, path)


def test_hyperparameters_keep_import_paths_only(questions, tmp_path, tokenizer, trainer_options):
    file = tmp_path / "mapping.py"
    file.write_text(FILE)
    assert make(questions).hparams["format"] is None
    path = f"{file}:to_messages"
    data = make(questions, path, tokenizer=tokenizer)
    assert data.hparams["format"] == path
    trainer = _pl.Trainer(max_epochs=1, **trainer_options)
    trainer.fit(Recorder(tokenizer), data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ConfigError, match="a checkpoint doesn't decide which code runs"):
        PairDataModule.load_from_checkpoint(tmp_path / "a.ckpt", train=questions)
    again = PairDataModule.load_from_checkpoint(tmp_path / "a.ckpt", train=questions, format=path)
    again.load_rows()
    assert texts(again) == texts(data)
    without = PairDataModule.load_from_checkpoint(tmp_path / "a.ckpt", train=questions, format=None)
    assert without.rules.format is None


def test_format_is_read_from_yaml_and_the_command_line(questions, write, tmp_path):
    file, rows = tmp_path / "mapping.py", write("rows.jsonl", questions)
    file.write_text(FILE)
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"data": {"train": rows, "format": f"{file}:to_messages", "cache_dir": False}}))
    for arguments in (
        [f"--config={config}"],
        [f"--data.train={rows}", f"--data.format={file}:to_messages", "--data.cache_dir=false"],
    ):
        made = cli_module().LightningCLI(
            Recorder, PairDataModule, run=False, save_config_callback=None, args=arguments
        )  # fmt: skip
        assert made.datamodule.hparams["format"] == f"{file}:to_messages"
        made.datamodule.load_rows()
        assert texts(made.datamodule) == [[row["q"], row["a"]] for row in questions]


def test_preview_shows_what_the_format_returns(questions, tokenizer, capsys):
    data = make([*questions, {"q": "2+2?"}], tokenizer=tokenizer)
    reports = preview(data, examples=1)
    printed = capsys.readouterr().out
    assert "where is the parcel 0" in printed
    assert "format= raised KeyError" in printed
    assert reports["train"].kept == len(questions)


@pytest.mark.parametrize("streaming", [False, True])
def test_function_gets_rows_of_a_dataset_as_they_are_in_it(streaming, tokenizer):
    rows = [
        {"q": "x", "meta": {"answer": None, "k": "1"}, "talk": [{"role": "user", "content": "x", "name": None}]},
        {"q": "y", "meta": {"answer": "z", "k": None}, "talk": [{"role": "user", "content": "y", "name": "Ann"}]},
    ]
    seen = []

    def function(row):
        seen.append(row)
        return [*row["talk"], {"role": "assistant", "content": row["meta"]["answer"] or "none", "tool_calls": None}]

    data = make(datasets.Dataset.from_list(rows), function, streaming=streaming, shuffle=False)
    data.tokenizer = tokenizer
    data.setup("fit")
    assert seen[:2] == rows
    targets = next(iter(data.train_dataloader())).targets
    assert tokenizer.decode(targets) == "none<|im_end|>z<|im_end|>"


def test_nulls_that_a_function_returns_are_kept(tokenizer):
    def function(row):
        call = {"name": "weather", "arguments": json.loads(row["arguments"])}
        return [{"role": "user", "content": row["q"]}, {"role": "assistant", "tool_calls": [call]}]

    data = make(datasets.Dataset.from_list([{"q": "x", "arguments": '{"city": null}'}]), function)
    data.load_rows()
    (call,) = data.splits.rows["train"][0][0].messages[1]["tool_calls"]
    assert call["function"]["arguments"] == {"city": None}
