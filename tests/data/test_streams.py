"""Training rows that are read while training: sources, checks, order, counts and refusals."""

import gc
import json
import pickle
import tracemalloc
from itertools import count, islice
from pathlib import Path

import datasets
import pytest
from recorder import Recorder

from lightning_ft._lightning import Trainer
from lightning_ft.data import module
from lightning_ft.data.pairs import PairDataModule
from lightning_ft.data.preferences import PreferenceDataModule
from lightning_ft.data.prompts import PromptDataModule
from lightning_ft.data.stream_plan import StreamPlan
from lightning_ft.data.stream_sources import StreamSource, has_no_length
from lightning_ft.errors import ConfigError, DataError, DataNotFoundError


def batches(data):
    """Supervised tokens of each training batch."""
    data.setup("fit")
    return [batch.targets.tolist() for batch in data.train_dataloader()]


class Rows:
    """An iterable that isn't an iterator."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


SOURCES = {
    "function": lambda rows, write: lambda: iter(rows),
    "iterable": lambda rows, write: Rows(rows),
    "iterator": lambda rows, write: iter(rows),
    "IterableDataset": lambda rows, write: datasets.IterableDataset.from_generator(lambda: iter(rows)),
    "shards": lambda rows, write: datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=3),
    "JSONL": lambda rows, write: write("a.jsonl", rows),
    "CSV": lambda rows, write: write("a.csv", csv_text(rows)),
    "Dataset": lambda rows, write: datasets.Dataset.from_list(rows),
    "several": lambda rows, write: [lambda: iter(rows[:9]), write("b.jsonl", rows[9:])],
}


def csv_text(rows):
    return "input,output\n" + "".join(f"{row['input']},{row['output']}\n" for row in rows)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("source", SOURCES)
def test_stream_has_the_batches_of_a_list(stream, pairs, write, source, shuffle):
    expected = batches(stream(pairs, shuffle=shuffle, streaming=True))
    assert len(expected) == 5
    if not shuffle:
        assert expected == batches(stream(pairs, shuffle=False))  # as of rows that are read before training
    assert batches(stream(SOURCES[source](pairs, write), shuffle=shuffle, streaming=True)) == expected


def test_workers_make_the_same_batches(stream, pairs):
    expected = batches(stream(lambda: iter(pairs)))
    assert batches(stream(lambda: iter(pairs), num_workers=2)) == expected
    dataset = datasets.Dataset.from_list(pairs).to_iterable_dataset(num_shards=4)  # divides its shards over workers
    assert batches(stream(dataset, num_workers=2)) == expected


@pytest.mark.parametrize("kind", [PairDataModule, PreferenceDataModule, PromptDataModule])
def test_workers_need_no_copy_of_the_process(stream, pairs, preferences, kind):
    """A worker that isn't forked gets what it needs pickled, which a generator can't be."""
    rows = preferences if kind is PreferenceDataModule else pairs
    data = stream((row for row in rows), kind)
    data.setup("fit")
    loader = data.train_dataloader()
    dataset, collate = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn)))
    raw_rows = next(iter(loader.sampler))
    batch, result = collate(dataset[raw_rows])
    assert type(batch) is type(loader.collate_fn(loader.dataset[raw_rows])[0])
    assert result.read == 5


def test_shuffling_is_within_blocks_and_new_in_every_epoch(tokenizer, pairs, trainer_options):
    recorder = Recorder(tokenizer)
    data = PairDataModule(lambda: iter(pairs), batch_size=8, shuffle_buffer=8)
    Trainer(**trainer_options, max_epochs=2).fit(recorder, data)
    epochs = [[seen[2] for seen in recorder.seen if seen[0] == epoch] for epoch in (0, 1)]
    assert [len(epoch) for epoch in epochs] == [3, 3]
    for one, other in zip(*epochs, strict=True):
        assert one != other
        assert sorted(one) == sorted(other)  # a block is a batch here


def test_only_a_block_is_read_ahead(stream, pairs, monkeypatch):
    read = count()

    def endless():
        for n in count():
            next(read)
            yield {**pairs[n % 24], "id": str(n)}

    data = stream(endless)
    data.setup("fit")
    loader = data.train_dataloader()
    before = next(read)  # the rows from which the row format was detected
    assert len(list(islice(loader, 100))) == 100
    assert next(read) - before <= 500 + 7 + 1


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_take_disjoint_rows_and_have_as_many_batches(stream, pairs, monkeypatch, ranks):
    """23 rows in steps of 6 or 12; ranks without rows in the last step get an empty batch."""

    def of_rank(rank, size):
        def plan(*args, **options):
            return StreamPlan(*args, **{**options, "rank": rank, "world_size": size, "batch_size": 12 // size})

        monkeypatch.setattr(module, "StreamPlan", plan)
        return batches(stream(lambda: iter(pairs[:-1])))

    whole, parts = of_rank(0, 1), [of_rank(rank, ranks) for rank in range(ranks)]
    assert {len(part) for part in parts} == {len(whole)} == {2}
    for step, of_ranks in zip(whole, zip(*parts, strict=True), strict=True):
        assert sorted(step) == sorted(token for part in of_ranks for token in part)


def test_rank_without_rows_gets_an_empty_batch(stream, pairs, monkeypatch):
    def plan(*args, **options):
        return StreamPlan(*args, **{**options, "rank": 2, "world_size": 3, "batch_size": 4})

    monkeypatch.setattr(module, "StreamPlan", plan)
    assert batches(stream(lambda: iter(pairs[:14]), shuffle=False))[-1] == []  # rows 13 and 14 are on ranks 0 and 1


# ---------------------------------------------------------------- checks


def test_bad_first_rows_are_listed_together_before_training(stream, pairs):
    rows = [*pairs[:3], {"input": "a", "output": ""}, {"input": 5, "output": "b"}, *pairs[3:]]
    with pytest.raises(DataError, match="2 bad rows") as error:
        stream(lambda: iter(rows)).setup("fit")
    assert "train, row 4, 'output': empty output. Fill it in or remove the row." in str(error.value)
    assert "train, row 5, 'input'" in str(error.value)


LATER = {
    "field": ({"input": "a", "output": ""}, "train, row 121, 'output': empty output. Fill it in"),
    "value": ({"input": "a", "output": "\ud800"}, "train, row 121, 'output': half of a surrogate pair"),
    "template": ({"input": "<|im_end|>", "output": "b"}, r"train, row 121.*<\|im_end\|>"),
    "length": ({"input": "a " * 300, "output": "b"}, "train, row 121: overlong prompt .* Raise max_length"),
    "no object": (["a"], "train, row 121: not an object"),
}


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("name", LATER)
def test_later_bad_row_is_named_when_it_comes(stream, pairs, name, num_workers):
    bad, message = LATER[name]
    rows = [*pairs * 5, bad, *pairs]  # 100 are checked before training
    data = stream(lambda: iter(rows), max_length=256, num_workers=num_workers)
    data.setup("fit")
    loader = iter(data.train_dataloader())
    with pytest.raises(DataError, match=message):
        list(loader)
    data.teardown()


def test_format_function_is_applied(stream, pairs):
    rows = [{"q": row["input"], "a": row["output"]} for row in pairs]

    def to_pair(row):
        return {"input": row["q"], "output": row["a"]}

    assert batches(stream(lambda: iter(rows), format=to_pair)) == batches(stream(lambda: iter(pairs)))


def test_rows_left_out_are_counted_and_told_once(stream, pairs, caplog):
    bad, long = {"input": "a", "output": ""}, {"input": "a " * 300, "output": "b"}
    rows = [row for pair in pairs * 5 for row in (pair, bad, long)]
    data = stream(lambda: iter(rows), max_length=256, on_bad_row="skip", on_overlong="drop")
    data.setup("fit")
    with pytest.warns(UserWarning, match="left out") as warned, caplog.at_level("INFO"):
        seen = list(data.train_dataloader())
    assert len(seen) == 72  # of 360 source rows, of which a batch has five
    report = data.report["train"]
    assert (report.read, report.kept) == (360, 120)
    assert report.skipped == {"empty output": 120, "overlong prompt": 120}
    assert report.token_counts()[0] == sum(batch.num_tokens - (not batch.num_targets) for batch in seen)
    assert len(report.problems) == 20
    told = [str(warning.message) for warning in warned if "a row is left out" in str(warning.message)]
    assert len(told) == 2
    assert sum("'output': empty output. Fill it in" in each for each in told) == 1
    assert sum("overlong prompt (" in each for each in told) == 1
    assert "train: 120 of 360 rows" in caplog.text
    assert "left out: 120 x " in caplog.text


def test_cut_prompts_are_counted(stream, pairs):
    long = {"input": "please " * 300, "output": "b"}
    data = stream(lambda: iter([*pairs, long]), max_length=64, on_overlong="truncate_prompt")
    batches(data)
    assert (data.report["train"].kept, data.report["train"].truncated) == (25, 1)


def test_stream_without_usable_first_rows_is_refused(stream):
    rows = [{"input": "a " * 300, "output": "b"}] * 3
    with pytest.raises(DataError, match=r"none of the first 3 rows can be used. The first: train, row 1: overlong"):
        stream(lambda: iter(rows), max_length=64, on_overlong="drop").setup("fit")


@pytest.mark.parametrize("rows", [[], [{"other": 1}]], ids=["no rows", "unknown columns"])
def test_unusable_stream_is_refused_as_a_file_is(stream, rows):
    errors = []
    for data in (stream(lambda: iter(rows)), stream(Rows(rows)), stream(rows)):
        with pytest.raises(DataError) as error:
            data.setup("fit")
        errors.append(str(error.value))
    assert errors[0] == errors[1] == errors[2]


def test_failing_source_is_named(stream, pairs):
    def fails():
        yield from pairs * 5
        raise OSError("connection lost")

    with pytest.raises(DataError, match="train: reading the dataset failed after row 120 with OSError: connection"):
        batches(stream(fails))


def test_missing_file_is_refused(stream):
    with pytest.raises(DataNotFoundError, match=r"train='nowhere.jsonl': there is no such file"):
        stream("nowhere.jsonl", streaming=True).setup("fit")


def test_hub_name_is_streamed(stream, pairs, monkeypatch):
    asked = []

    def load_dataset(name, **options):
        asked.append((name, options))
        return datasets.Dataset.from_list(pairs).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(batches(stream("user/data:part", streaming=True))) == 5
    assert asked == [("user/data", {"split": "part", "streaming": True})]


def test_hub_name_with_a_split_is_no_import_path(stream, pairs, monkeypatch, tmp_path):
    asked = []

    def load_dataset(name, **options):
        asked.append((name, options["split"]))
        return datasets.Dataset.from_list(pairs).to_iterable_dataset()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = stream("squad:train", streaming=True)
    assert len(batches(data)) == 5
    assert asked == [("squad", "train")]
    assert data.training_rows() == ({"training data": "squad:train, read while training"}, ("squad",))
    with pytest.raises(ConfigError, match="can't be imported"):  # there is such a module
        stream("json:rows", streaming=True).setup("fit")
    Path("my_rows.py").write_text("")
    with pytest.raises(ConfigError, match=r"There is a file 'my_rows.py': write my_rows.py:rows"):
        stream("my_rows:rows", streaming=True).setup("fit")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **options: 1 / 0)
    with pytest.raises(DataNotFoundError, match=r"Hub dataset 'squat' .*; a function as 'path/to/file.py:function'"):
        stream("squat:train", streaming=True).setup("fit")


def test_import_path_of_a_function(stream, pairs, write, tmp_path):
    write("rows.py", f"def rows():\n    yield from {pairs!r}\n")
    data = stream(f"{tmp_path}/rows.py:rows", streaming=True)
    assert batches(data) == batches(stream(lambda: iter(pairs)))
    assert data.hparams["train"] == f"{tmp_path}/rows.py:rows"


# ---------------------------------------------------------------- epochs and refusals


def test_import_path_without_streaming_is_refused(stream, tmp_path):
    with pytest.raises(DataNotFoundError, match="A function that returns training rows needs streaming=True"):
        stream(f"{tmp_path / 'rows.py'}:endless").setup("fit")
    with pytest.raises(DataNotFoundError, match="A function that returns training rows needs streaming=True"):
        stream("rows.py:endless").setup("fit")


def test_iterator_is_refused_in_the_second_epoch(tokenizer, pairs, trainer_options):
    module = Recorder(tokenizer)
    with pytest.raises(DataError, match=r"train: an iterator can be read only once. Pass a function"):
        Trainer(**trainer_options, max_epochs=2).fit(module, PairDataModule(iter(pairs), batch_size=8))
    assert len(module.seen) == 3


def test_function_that_returns_the_same_iterator_is_refused(stream, pairs, tmp_path):
    """The rows that are checked before training would be missing."""
    rows = iter(pairs)
    (tmp_path / "own_rows.py").write_text(f"rows = iter({pairs!r})\n")
    for source in (lambda: rows, f"{tmp_path / 'own_rows.py'}:rows"):
        with pytest.raises(DataError, match="an iterator can be read only once"):
            batches(stream(source, streaming=True))


def test_endless_source_stops_at_max_steps(tokenizer, pairs, trainer_options):
    def endless():
        while True:
            yield from pairs

    module = Recorder(tokenizer)
    data = PairDataModule(endless, validation=pairs[:4], batch_size=8)
    trainer = Trainer(**trainer_options, max_steps=10, val_check_interval=5)
    trainer.fit(module, data)
    assert trainer.global_step == 10
    assert [seen[0] for seen in module.seen if seen[0] == "validation"] == ["validation"] * 3  # with the sanity check
    assert data.report["train"].read in (80, 88)  # one batch is fetched ahead


REFUSED = {
    "share": ({"validation": 0.1}, "validation=0.1 holds out a share of the training rows, whose number isn't known"),
    "mixing": ({"mixing": [1.0]}, r"mixing=\[1.0\]: streamed sources are read one after the other"),
    "buffer": ({"shuffle_buffer": 0}, "shuffle_buffer=0: expected at least 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_need_all_rows_are_refused(stream, pairs, name):
    options, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        stream(lambda: iter(pairs), **options).train_dataloader()


def test_overfit_batches_is_refused(tokenizer, pairs, trainer_options):
    with pytest.raises(ConfigError, match="overfit_batches repeats the first batches"):
        Trainer(**trainer_options, overfit_batches=2, max_epochs=1).fit(
            Recorder(tokenizer), PairDataModule(lambda: iter(pairs))
        )


def test_dataset_of_one_node_is_refused(stream, pairs):
    from datasets.distributed import split_dataset_by_node

    dataset = datasets.Dataset.from_list(pairs).to_iterable_dataset(num_shards=2)
    with pytest.raises(ConfigError, match=r"was split with split_dataset_by_node. Pass the whole dataset"):
        stream(split_dataset_by_node(dataset, 0, 2))


def test_rows_of_a_stream_are_no_requests(stream, pairs):
    data = stream(lambda: iter(pairs), validation=pairs[:2])
    data.setup("fit")
    assert len(data.requests("validation")) == 2
    with pytest.raises(
        ConfigError, match=r"There are no train rows: they are read while training. Pass streaming=False"
    ):
        data.requests("train")
    with pytest.raises(ConfigError, match="A forecast needs all training rows before training, and they are streamed"):
        data.require_rows("A forecast")


def test_generator_without_streaming_is_refused(stream, pairs):
    with pytest.raises(ConfigError, match=r"train: expected a path.*got list_iterator: pass list\(rows\)"):
        stream(iter(pairs), streaming=False).setup("fit")


@pytest.mark.parametrize("source", [5, {"train": []}, datasets.DatasetDict()])
def test_what_is_no_source_is_no_stream(stream, source):
    assert not has_no_length(source)
    with pytest.raises(ConfigError, match="train: expected a path"):
        stream(source, streaming=True)


def test_repeated_names_differ(write, pairs):
    path = write("a.jsonl", pairs)
    data = PairDataModule([path, path], streaming=True)
    assert [source.name for source in data.stream.sources] == [path, f"{path} (2)"]


def test_hyperparameters_are_json(stream, pairs, write):
    path = write("a.jsonl", pairs)
    for train in (lambda: iter(pairs), path, [path, path]):
        data = PairDataModule(train, streaming=True)
        assert json.loads(json.dumps(dict(data.hparams))) == dict(data.hparams)
    assert data.hparams["train"] == [path, path]
    assert (data.hparams["streaming"], data.hparams["shuffle_buffer"]) == (True, 1000)


def test_head_is_read_once(pairs):
    source = StreamSource(iter(pairs), "train", "train")
    assert source.head(3) == source.head(3)
    assert [row.value for row in source.open(0)] == pairs


def test_memory_doesnt_grow_with_the_stream(stream, pairs):
    def rows():
        for n in range(3000):
            yield {"input": f"{n} {pairs[n % 24]['input']}", "output": pairs[n % 24]["output"]}

    data = stream(rows, max_length=512, shuffle_buffer=50, batch_size=1)
    data.setup("fit")
    held = {}
    tracemalloc.start()
    for number, _ in enumerate(data.train_dataloader()):
        if number in (900, 2900):  # the origins of the last 256 batches are kept, and caches fill up
            gc.collect()
            held[number] = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    grown = (held[2900] - held[900]) / 2000
    assert grown < 60, grown  # bytes per row; the row's object alone takes more


def test_provenance_of_a_stream_names_its_sources_only(tmp_path):
    file = tmp_path / "support.jsonl"
    file.write_text('{"input": "a", "output": "b"}\n')
    assert PairDataModule(str(file), streaming=True).training_rows() == (
        {"training data": "support.jsonl, read while training"},
        (),
    )
    rows = ({"input": str(n), "output": "b"} for n in range(3))
    both = PairDataModule(["user/data:train", rows]).training_rows()
    assert both == ({"training data": "user/data:train, a stream, read while training"}, ("user/data",))
    functions = PairDataModule(["mine/rows.py:endless", "mine.rows.endless"], streaming=True).training_rows()
    assert functions == (
        {"training data": "a stream, read while training"},
        (),
    )  # no data sets
