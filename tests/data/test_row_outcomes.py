"""Rows encoded by several processes: the same bytes in the cache as from one."""

import os
import pickle

import pytest
import torch

from lightning_ft import PairDataModule
from lightning_ft.data import row_outcomes
from lightning_ft.data.overlong import RowEncoder
from lightning_ft.data.raw_rows import Problem

ROWS = [
    {
        "input": f"where is the lamp {n}" + " parcel" * (40 * (n % 9 == 0)),  # some are longer than max_length
        "output": f"line {n % 7}" + "<|im_end|>" * (n % 50 == 7),  # and some have a control token
    }
    for n in range(350)
]


@pytest.fixture
def processes(monkeypatch, tmp_path):
    """Processes that encoded rows."""
    original = row_outcomes._outcome

    def noted(*arguments):
        (tmp_path / f"{os.getpid()}.process").touch()
        return original(*arguments)

    monkeypatch.setattr(row_outcomes, "_outcome", noted)

    def found():
        paths = list(tmp_path.glob("*.process"))
        for path in paths:
            path.unlink()
        return {int(path.stem) for path in paths}

    return found


@pytest.mark.parametrize("on_overlong", ["drop", "truncate_prompt"])
def test_cached_rows_are_the_same_bytes_from_any_number_of_processes(tokenizer, tmp_path, processes, on_overlong):
    files, reports = [], []
    for workers in (0, 1, 2, 3):
        folder = tmp_path / str(workers)
        data = PairDataModule(
            ROWS,
            tokenizer=tokenizer,
            max_length=60,
            on_overlong=on_overlong,
            on_bad_row="skip",
            num_workers=workers,
            cache_dir=str(folder),
        )
        state = torch.get_rng_state()
        data.setup("fit")
        assert torch.equal(torch.get_rng_state(), state)
        assert processes() == {os.getpid()} if workers < 2 else os.getpid() not in processes()
        files.append({path.relative_to(folder): path.read_bytes() for path in folder.glob("*/*") if path.is_file()})
        reports.append(data.report["train"])
    assert len(files[0]) >= 2
    assert files[0] == files[1] == files[2] == files[3]
    assert reports[0] == reports[1] == reports[2] == reports[3]
    assert reports[0].truncated if on_overlong == "truncate_prompt" else reports[0].kept < len(ROWS)


def test_few_rows_are_encoded_by_this_process(tokenizer, processes):
    PairDataModule(ROWS[:90], tokenizer=tokenizer, on_bad_row="skip", num_workers=4, cache_dir=False).setup("fit")
    assert processes() == {os.getpid()}


def test_encoder_is_pickled_by_its_arguments(tokenizer):
    data = PairDataModule(ROWS[:20], tokenizer=tokenizer, on_bad_row="skip")
    data.load_rows()
    encoder = RowEncoder(tokenizer, 60, "error")
    copy = pickle.loads(pickle.dumps(encoder))
    for row in data.splits.rows["train"][0]:
        mine, others = encoder(row), copy(row)
        if isinstance(mine, Problem):
            assert mine == others
            continue
        assert torch.equal(mine[0].example.input_ids, others[0].example.input_ids)
        assert torch.equal(mine[0].example.supervised, others[0].example.supervised)
