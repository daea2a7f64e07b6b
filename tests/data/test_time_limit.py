"""A limit of time and memory that works in any thread and process, and raises nothing after its block."""

import multiprocessing
import threading
import time

import pytest
import torch

from lightning_ft.data import time_limit
from lightning_ft.data.time_limit import MemoryLimitError, TimeLimitError, within


def spin(seconds=60.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def stopped(seconds=0.1):
    """Whether an endless loop is interrupted, without a late exception."""
    start = time.monotonic()
    try:
        with within(seconds):
            spin()
    except TimeLimitError:
        spin(0.15)  # two checks of the watchdog
        return time.monotonic() - start < 30
    return False


def test_within_interrupts_a_loop_but_not_a_short_block():
    assert stopped()
    with within(60):
        pass
    assert stopped()


def test_within_in_a_thread_interrupts_that_thread_only():
    found = []
    threads = [threading.Thread(target=lambda: found.append(stopped())) for _ in range(3)]
    for thread in threads:
        thread.start()
    with within(60):
        for thread in threads:
            thread.join()
    assert found == [True] * 3


def _child(found):
    found.put(stopped())


def test_within_works_after_a_fork():
    assert stopped()  # the watchdog thread runs here, but not in the child
    context = multiprocessing.get_context("fork")
    found = context.Queue()
    with within(60):  # a block of the parent is not inherited by the child
        child = context.Process(target=_child, args=(found,))
        child.start()
        assert found.get(timeout=60)
        child.join()


class Loops(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return stopped()


def test_within_works_in_data_loader_workers():
    loader = torch.utils.data.DataLoader(Loops(), num_workers=2, multiprocessing_context="fork")
    assert [bool(batch) for batch in loader] == [True, True]


def test_within_raises_nothing_after_a_block_that_ends_just_in_time():
    """Blocks that end at about the limit: each may be interrupted, but the code after it never is."""
    interrupted = 0
    for number in range(40):
        try:
            with within(0.001):
                spin(0.02 + 0.0007 * number)
        except TimeLimitError:
            interrupted += 1
        spin(0.01)  # a late exception would be raised here
    assert interrupted > 0


def test_within_interrupts_again_a_block_that_catches_it():
    caught = []
    with pytest.raises(TimeLimitError), within(0.05):  # noqa: PT012
        for _ in range(2):
            try:
                spin()
            except TimeLimitError:
                caught.append(time.monotonic())
                if len(caught) == 2:
                    raise
    assert 0.5 < caught[1] - caught[0] < 30


def test_within_nested_keeps_the_outer_limit():
    with pytest.raises(TimeLimitError), within(0.1):  # noqa: PT012
        with within(60):
            pass
        spin()


@pytest.mark.skipif(time_limit._memory() == 0, reason="the system doesn't say how much memory a process has")
def test_within_interrupts_code_that_allocates_memory():
    kept = []
    with pytest.raises(MemoryLimitError), within(60, grows=50_000_000):  # noqa: PT012
        while True:
            kept.append(bytearray(b"x" * 100_000))
            time.sleep(0.0005)
    assert sum(map(len, kept)) < 4_000_000_000
