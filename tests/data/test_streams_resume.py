"""A run on a stream that is stopped within an epoch resumes with the next batch, bit for bit."""

import datasets
import pytest
import torch
from recorder import Recorder

from lightning_ft._lightning import _pl
from lightning_ft.data.pairs import PairDataModule
from lightning_ft.data.stream_plan import StreamPlan, StreamReader
from lightning_ft.data.stream_sources import StreamSource
from lightning_ft.errors import DataError

READ = []  # rows that sources have yielded


def read(rows):
    for row in rows:
        READ.append(row)
        yield row


def sharded(rows):
    return datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=3)


SOURCES = {
    "function": lambda rows: lambda: read(rows),
    "two functions": lambda rows: [lambda: read(rows[:10]), lambda: read(rows[10:])],
    "dataset": sharded,
    "mapped dataset": lambda rows: sharded(rows).map(lambda row: {"input": row["input"] + "?"}).filter(bool),
    "interleaved datasets": lambda rows: datasets.interleave_datasets([sharded(rows[:12]), sharded(rows[12:])]),
    "shuffled dataset": lambda rows: sharded(rows).shuffle(seed=1, buffer_size=5),
    "dataset and function": lambda rows: [sharded(rows[:10]), lambda: read(rows[10:])],
}
EXACT_STATE = ("dataset", "mapped dataset", "interleaved datasets")


@pytest.mark.parametrize(
    ("name", "stop", "num_workers"),
    [
        *(("function", stop, workers) for stop in (2, 5, 6, 9) for workers in (0, 2)),  # 5: the last is fetched ahead
        *((name, stop, 0) for name in SOURCES if name != "function" for stop in (5, 9)),
        ("dataset", 9, 2),
    ],
)
def test_streams_resume_mid_epoch(trainer_options, tokenizer, pairs, tmp_path, name, stop, num_workers):
    """24 rows in batches of 4 are 6 steps per epoch, in blocks of 7 rows."""

    def run(steps, checkpoint=None):
        module = Recorder(tokenizer)
        source = SOURCES[name](pairs)
        data = PairDataModule(source, batch_size=4, num_workers=num_workers, seed=3, shuffle_buffer=7)
        trainer = _pl.Trainer(**trainer_options, max_steps=steps, max_epochs=-1)
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
        return trainer, module.seen

    _, whole = run(13)
    first, before = run(stop)
    first.save_checkpoint(tmp_path / "a.ckpt")
    torch.manual_seed(99)  # the global generator has no effect
    _, after = run(13, tmp_path / "a.ckpt")
    assert [seen[1:] for seen in before + after] == [seen[1:] for seen in whole]


@pytest.mark.parametrize("name", SOURCES)
def test_state_of_a_source_is_used_where_it_is_exact(pairs, name, caplog):
    """Position after 16 rows: with a state, reading continues at row 14, where a block begins."""

    def plan():
        data = SOURCES[name](pairs)
        named = data if isinstance(data, list) else [data]
        sources = [StreamSource(source, f"train[{n}]", "train") for n, source in enumerate(named)]
        options = {"batch_size": 4, "shuffle": True, "buffer": 7, "seed": 0, "rank": 0, "world_size": 1}
        return StreamPlan(sources, **options)

    one = plan()
    expected = [[row.value for row in rows] for rows in one]
    marks = one.bookmarks(4)
    other = plan()
    other.load_bookmarks(marks)
    other.start_at(0, 4)
    READ.clear()
    with caplog.at_level("INFO"):
        assert [[row.value for row in rows] for rows in other] == expected[4:]
    if name in EXACT_STATE:
        assert [mark["row"] for mark in marks] == [7, 14]
        assert "skipped" not in caplog.text
    elif name == "dataset and function":
        assert [mark["row"] for mark in marks] == [7]
        assert "continues at row 15 of the stream: 7 rows are read and skipped" in caplog.text
        assert len(READ) == 14  # the function's rows only
    else:
        assert marks == []
        assert "continues at row 15 of the stream: 14 rows are read and skipped" in caplog.text
        assert "function" not in name or len(READ) == len(pairs)


class Counter:
    """A source with a state, which `state_dict` doesn't copy; as an iterator it is read once."""

    def __init__(self):
        self.state = {"next": 0}

    def __iter__(self):
        while self.state["next"] < 40:
            self.state["next"] += 1
            yield {"input": str(self.state["next"]), "output": "a"}
        self.state["next"] = 0

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = dict(state)


class CounterIterator(Counter):
    def __iter__(self):
        return self

    def __next__(self):
        self.state["next"] += 1
        if self.state["next"] > 40:
            raise StopIteration
        return {"input": str(self.state["next"]), "output": "a"}


@pytest.mark.parametrize(("kind", "marked"), [(Counter, [7, 14]), (CounterIterator, [])])
def test_state_of_another_source(kind, marked):
    options = {"batch_size": 4, "shuffle": True, "buffer": 7, "seed": 0, "rank": 0, "world_size": 1}

    def plan():
        source = StreamSource(kind(), "train", "train")
        if marked == []:
            source.head(10)  # is read from the iterator itself
        return StreamPlan([source], **options)

    one = plan()
    expected = [[row.value for row in rows] for rows in one]
    assert len(expected) == 10
    marks = one.bookmarks(4)
    assert [mark["row"] for mark in marks] == marked
    other = plan()
    other.load_bookmarks(marks)
    other.start_at(0, 4)
    assert [[row.value for row in rows] for rows in other] == expected[4:]


def test_position_before_a_batch_fetched_ahead_has_a_bookmark(tokenizer, pairs):
    """Blocks of one row: there are as many bookmarks as rows, and a Trainer saves the batch before the last fetched."""
    data = PairDataModule(sharded(pairs), tokenizer=tokenizer, batch_size=6, shuffle_buffer=1, cache_dir=False)
    data.setup("fit")
    loader = data.train_dataloader()
    batches = iter(loader)
    for number in range(3):
        loader.trained = lambda number=number: number
        next(batches)
    assert loader.state_dict()["batch"] == 2
    assert [mark["row"] for mark in loader.state_dict()["bookmarks"]][-1] == 12


def test_stream_that_is_shorter_than_the_position_is_refused(pairs):
    source = StreamSource(lambda: iter(pairs), "train", "train")
    options = {"batch_size": 4, "shuffle": False, "buffer": 4, "seed": 0, "rank": 0, "world_size": 1}
    plan = StreamPlan([source], **options)
    plan.start_at(0, 8)
    with pytest.raises(DataError, match=r"ends after 24 rows, before the row 33 at which the checkpoint continues"):
        list(plan)
    plan.start_at(0, 6)
    assert list(plan) == []  # its end


def test_reader_counts_rows_of_all_sources(pairs):
    sources = [StreamSource(sharded(part), str(n), "train") for n, part in enumerate((pairs[:10], pairs[10:]))]
    reader = StreamReader(sources, 0)
    assert len(reader.take(15)) == 15
    mark = reader.bookmark()
    assert (mark["row"], mark["source"], mark["number"]) == (15, 1, 5)
    again = StreamReader(sources, 0, mark)
    assert [(row.number, row.value) for row in again.take(3)] == [(6 + n, pairs[15 + n]) for n in range(3)]
