"""Checked rows are on disk, not in the memory of every rank."""

import gc
import io
import os
import pickle
import tracemalloc
from pathlib import Path

import pytest

from lightning_ft.data import row_store
from lightning_ft.data.pairs import PairDataModule
from lightning_ft.data.preferences import PreferenceDataModule
from lightning_ft.data.prompts import PromptDataModule
from lightning_ft.data.row_store import ChainedRows, MappedRows, SelectedRows, StoredRows


@pytest.fixture(params=["disk", "memory"])
def folder(request, tmp_path):
    return tmp_path / "cache" if request.param == "disk" else None


@pytest.mark.parametrize("count", [0, 1, 999, 1000, 1001, 2500])
def test_stored_rows_are_read_back(folder, count):
    rows, expected = StoredRows(folder), [{"input": f"{n} ä", "n": n} for n in range(count)]
    for row in expected:
        rows.append(row)
    assert len(rows) == count
    assert list(rows) == list(rows) == expected
    assert [rows[i] for i in range(-count, 0)] == rows[:] == expected
    assert rows[5:2000:7] == expected[5:2000:7]
    for index in (count, -count - 1):
        with pytest.raises(IndexError, match=f"Row {index} is out of range: there are {count}"):
            rows[index]


def test_nothing_is_left_in_the_folder(tmp_path):
    rows = StoredRows(tmp_path)
    rows.append("a")
    assert list(rows) == ["a"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="reads Linux's list of open files")
def test_few_files_are_open(tmp_path):
    def opened(*counts):
        before = len(os.listdir("/proc/self/fd"))
        stores = [StoredRows(tmp_path) for _ in counts]
        for rows, count in zip(stores, counts, strict=True):
            for n in range(count):
                rows.append(n)
            assert rows[-1] == count - 1
        return len(os.listdir("/proc/self/fd")) - before

    assert opened(*[5] * 20) == 0  # of small sources there may be hundreds
    assert opened(2500, 1000) == 2


def test_stored_rows_can_be_sent_to_another_process(folder):
    rows = StoredRows(folder)
    for n in range(1200):
        rows.append(n)
    assert list(pickle.loads(pickle.dumps(rows))) == list(range(1200))


def test_rows_are_kept_in_memory_where_the_folder_cant_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    rows = StoredRows(tmp_path / "file" / "folder")
    with pytest.warns(UserWarning, match="Rows can't be written to the cache's folder .*pass another cache_dir="):
        fill(rows)
    assert list(rows) == list(range(6500))


class FullFile(io.FileIO):
    """Takes the rows of two chunks, then the disk is full."""

    left = 60_000

    def write(self, data):
        if len(memoryview(data).cast("B")) > self.left:
            raise OSError(28, "No space left on device")
        self.left -= len(memoryview(data).cast("B"))
        return super().write(data)


def fill(rows):
    for n in range(6500):
        rows.append(n)


def test_rows_are_kept_in_memory_where_the_disk_becomes_full(tmp_path, monkeypatch):
    monkeypatch.setattr(row_store.tempfile, "TemporaryFile", lambda dir: FullFile(dir / "a", "w+"))
    rows = StoredRows(tmp_path)
    with pytest.warns(UserWarning, match=r"Rows can't be written to the cache's folder"):
        fill(rows)
    assert list(rows) == list(range(6500))


def test_views_of_rows_are_as_lists():
    rows = StoredRows()
    for n in range(10):
        rows.append(n)
    selected = SelectedRows(rows, [7, 2, 2])
    assert (len(selected), list(selected), selected[-1]) == (3, [7, 2, 2], 2)
    chained = ChainedRows([[], selected, [], rows, []])
    assert list(chained) == [7, 2, 2, *range(10)] == [chained[i] for i in range(len(chained))]
    mapped = MappedRows(chained, lambda n: -n)
    assert (len(mapped), mapped[0], list(mapped)[3:5]) == (13, -7, [0, -1])


KINDS = {
    "pairs": (PairDataModule, {}),
    "held out": (PairDataModule, {"validation": 0.1}),
    "preferences": (PreferenceDataModule, {}),
    "prompts": (PromptDataModule, {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_take_few_bytes_of_memory(pairs, write, tmp_path, kind):
    """As Python objects they take 900 to 1,400 bytes each; where rows are selected, there are eight per row."""
    cls, options = KINDS[kind]

    def held(count):
        rows = [
            {"prompt": f"{n} {pairs[n % 24]['input']}", "chosen": f"{n} a", "rejected": f"{n} b"}
            if cls is PreferenceDataModule
            else {"input": f"{n} {pairs[n % 24]['input']} " + "please " * 20, "output": f"{n} here"}
            for n in range(count)
        ]
        path = write(f"{count}.jsonl", rows)
        del rows
        gc.collect()
        tracemalloc.start()
        data = cls(path, cache_dir=str(tmp_path / "cache"), **options)
        data.load_rows()
        gc.collect()
        used = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert len(ChainedRows(data.splits.rows["train"])) > 0.8 * count
        return used

    held(20)  # what is made once
    assert (held(2500) - held(1500)) / 1000 < 40  # up to 1,000 stay in memory
