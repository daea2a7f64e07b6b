"""Activations are read back bit for bit, whichever process wrote them, and the folder stays within its limit."""

import os

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lightning_ft.models import activation_store, tensors
from lightning_ft.models.activation_store import ActivationStore, sequence_digest

ROOM = 2**20
SAID = "Error while serializing: I/O error: No space left on device (os error 28)"
ROW = 4 * 10 * 8  # bytes of a row's activations, in float32


def states(seed=0, length=10, dtype=torch.float32):
    return torch.randn(length, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)


def name_of(number):
    return sequence_digest(torch.tensor([number]))


def filled(root, key, numbers, *, limit=ROOM):
    """Make a store with rows, and flush it."""
    store = ActivationStore(root, key, limit=limit)
    for number in numbers:
        assert store.put(name_of(number), states(number))
    store.flush()
    return store


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def size_of(folder):
    return sum(path.stat().st_size for path in shards(folder))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_store_returns_activations_bit_for_bit(tmp_path, dtype):
    store = ActivationStore(tmp_path, "a", limit=ROOM)
    kept = {name_of(length): states(length, length, dtype) for length in (1, 7, 30)}
    for digest, value in kept.items():
        assert store.get(digest) is None
        assert store.put(digest, value)
        assert torch.equal(store.get(digest), value)  # from memory
    store.flush()
    for reader in (store, ActivationStore(tmp_path, "a", limit=ROOM)):
        assert len(reader) == 3
        for digest, value in kept.items():
            found = reader.get(digest)
            assert found.dtype == dtype
            assert torch.equal(found, value)
        assert reader.get(name_of(99)) is None
    assert ActivationStore(tmp_path, "b", limit=ROOM).get(name_of(1)) is None


def test_store_detaches_activations(tmp_path):
    store = ActivationStore(tmp_path, "a", limit=ROOM)
    store.put(name_of(0), states().requires_grad_())
    assert not store.get(name_of(0)).requires_grad


def test_digest_depends_on_all_tokens_and_their_order():
    rows = ([1, 2, 3], [1, 2], [3, 2, 1], [1, 2, 3, 0], [1])
    digests = {sequence_digest(torch.tensor(row)) for row in rows}
    assert len(digests) == 5
    assert {len(digest) for digest in digests} == {16}
    padded = torch.tensor([[1, 9], [2, 9], [3, 9]])[:, 0]  # not contiguous
    assert sequence_digest(padded) == sequence_digest(torch.tensor([1, 2, 3]))


def test_store_writes_nothing_before_flush(tmp_path):
    store = ActivationStore(tmp_path, "a", limit=ROOM)
    store.flush()
    store.put(name_of(0), states())
    assert shards(store.folder) == []
    assert len(ActivationStore(tmp_path, "a", limit=ROOM)) == 0
    store.flush()
    store.flush()
    assert len(shards(store.folder)) == 1
    assert len(ActivationStore(tmp_path, "a", limit=ROOM)) == 1
    assert oct(shards(store.folder)[0].stat().st_mode & 0o777) == "0o644"  # readable for all users of a shared folder


def test_store_writes_a_file_once_it_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(activation_store, "_SHARD", 2 * ROW)
    store = ActivationStore(tmp_path, "a", limit=ROOM)
    for number in range(5):
        store.put(name_of(number), states(number))
        assert len(shards(store.folder)) == (number + 1) // 2
    store.flush()
    assert len(shards(store.folder)) == 3
    for number in range(5):
        assert torch.equal(store.get(name_of(number)), states(number))


def test_store_refresh_reads_rows_of_other_instances(tmp_path):
    one, two = (ActivationStore(tmp_path, "a", limit=ROOM) for _ in range(2))
    for store, numbers in ((one, (0, 1)), (two, (1, 2))):  # one row is in both
        for number in numbers:
            store.put(name_of(number), states(number))
    two.flush()
    assert one.get(name_of(2)) is None
    one.refresh()
    one.flush()
    two.refresh()
    assert len(shards(one.folder)) == 2
    for store in (one, two):
        assert len(store) == 3
        for number in range(3):
            assert torch.equal(store.get(name_of(number)), states(number))


@pytest.mark.parametrize("broken", ["half", "no header", "nothing", "another's"])
def test_store_removes_unreadable_files_with_their_rows(tmp_path, broken):
    store = filled(tmp_path, "a", [0, 1])
    (good,) = shards(store.folder)
    content = good.read_bytes()
    bad = store.folder / "0.safetensors"
    if broken == "another's":
        save_file({"weight": torch.ones(2)}, bad)
    else:
        bad.write_bytes({"half": content[: len(content) // 2], "no header": content[40:], "nothing": b""}[broken])
    again = ActivationStore(tmp_path, "a", limit=ROOM)
    assert not bad.exists()
    assert torch.equal(again.get(name_of(1)), states(1))  # from the other file
    good.write_bytes(content[:-1])
    last = ActivationStore(tmp_path, "a", limit=ROOM)
    assert last.get(name_of(0)) is None
    assert len(last) == 0
    assert shards(last.folder) == []
    last.put(name_of(0), states(0))
    last.flush()
    assert torch.equal(ActivationStore(tmp_path, "a", limit=ROOM).get(name_of(0)), states(0))


def test_store_ignores_partial_files_of_killed_processes(tmp_path):
    store = filled(tmp_path, "a", [0])
    (good,) = shards(store.folder)
    leftover = store.folder / ".writing-abc"
    leftover.write_bytes(good.read_bytes()[:-5])
    again = ActivationStore(tmp_path, "a", limit=ROOM)
    assert len(again) == 1
    assert leftover.exists()  # another process may be writing it
    again.put(name_of(1), states(1))
    again.flush()
    assert sorted(path.name for path in again.folder.glob(".writing-*")) == [".writing-abc"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError(SAID)])
def test_store_stops_writing_when_the_disk_is_full(tmp_path, monkeypatch, error):
    store = filled(tmp_path, "a", [0])
    store.put(name_of(1), states(1))

    def fails(*_):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(tensors, "save_file", fails)
        store.flush()
    assert "No space left on device" in store.failure
    assert list(store.folder.glob(".writing-*")) == []
    assert len(shards(store.folder)) == 1
    assert torch.equal(store.get(name_of(0)), states(0))  # cached rows are still readable
    assert store.get(name_of(1)) is None
    assert not store.put(name_of(1), states(1))
    assert len(ActivationStore(tmp_path, "a", limit=ROOM)) == 1


@pytest.mark.parametrize("harm", ["zeros", "one bit", "starts", "of another model"])
def test_store_removes_corrupted_files(tmp_path, harm):
    store = filled(tmp_path, "a", [0, 1])
    (file,) = shards(store.folder)
    held = load_file(file)
    if harm == "zeros":
        held["states"][10:] = 0
    elif harm == "one bit":
        held["states"].view(torch.int32)[-1, -1] ^= 1
    elif harm == "starts":
        held["starts"][2] = -3
    other = filled(tmp_path, "b", [2])
    if harm == "of another model":
        (of_b,) = shards(other.folder)
        file.write_bytes(of_b.read_bytes())
    else:
        save_file(held, file)
    again = ActivationStore(tmp_path, "a", limit=ROOM)
    assert again.get(name_of(2 if harm == "of another model" else 1)) is None
    assert shards(again.folder) == []
    assert len(again) == 0
    assert len(ActivationStore(tmp_path, "b", limit=ROOM)) == 1


# -------------------------------------------------------------------- disk space


def test_store_refuses_rows_without_space_and_keeps_others(tmp_path):
    store = ActivationStore(tmp_path, "a", limit=2 * ROW + 10)
    assert [store.put(name_of(n), states(n)) for n in range(3)] == [True, True, False]
    assert store.full
    assert store.get(name_of(2)) is None
    assert torch.equal(store.get(name_of(0)), states(0))
    store.flush()
    assert not store.put(name_of(3), states(3))  # files on disk count too
    assert not ActivationStore(tmp_path, "a", limit=2 * ROW + 10).put(name_of(3), states(3))
    assert len(ActivationStore(tmp_path, "a", limit=ROOM)) == 2


def test_store_counts_space_of_other_writers(tmp_path):
    one = ActivationStore(tmp_path, "a", limit=3 * ROW)
    filled(tmp_path, "a", [0, 1])
    assert not one.full
    one.refresh()
    assert not one.put(name_of(2), states(2))


def used(store, when):
    os.utime(store.folder, (when, when))
    return store


def test_store_removes_least_recently_used_keys_first(tmp_path):
    old, new = (used(filled(tmp_path, key, range(4)), when) for key, when in (("z", 1), ("b", 2)))
    each = size_of(old.folder)
    store = ActivationStore(tmp_path, "m", limit=2 * each + ROW)
    store.put(name_of(0), states(0))
    assert old.folder.exists()
    store.put(name_of(1), states(1))
    assert not old.folder.exists()
    assert new.folder.exists()
    assert not store.full
    assert torch.equal(ActivationStore(tmp_path, "b", limit=ROOM).get(name_of(3)), states(3))


def test_store_updates_last_use_of_keys(tmp_path):
    first, second = (used(filled(tmp_path, key, range(4)), when) for key, when in (("a", 1), ("b", 2)))
    ActivationStore(tmp_path, "a", limit=ROOM)
    ActivationStore(tmp_path, "m", limit=size_of(first.folder) + ROW).put(name_of(0), states(0))
    assert first.folder.exists()
    assert not second.folder.exists()


def test_store_never_removes_its_own_key(tmp_path):
    store = used(filled(tmp_path, "a", range(4)), 1)
    other = filled(tmp_path, "b", range(4))
    again = used(ActivationStore(tmp_path, "a", limit=size_of(store.folder) + 2 * ROW), 1)
    assert again.put(name_of(8), states(8))
    assert not other.folder.exists()
    assert not again.put(name_of(9), torch.cat([states(9)] * 4))
    again.flush()
    assert len(ActivationStore(tmp_path, "a", limit=ROOM)) == 5


def test_store_removes_nothing_for_rows_that_cannot_fit(tmp_path):
    other = filled(tmp_path, "b", range(4))
    store = ActivationStore(tmp_path, "a", limit=ROW)
    assert not store.put(name_of(0), torch.cat([states()] * 2))
    with pytest.raises(OSError, match="more than the 320 that may be kept"):
        store.reserve(ROW + 1)
    assert other.folder.exists()


def test_store_ignores_foreign_folders(tmp_path):
    """Other contents of the folder, such as models, are kept."""
    from safetensors.torch import save_file

    models = tmp_path / "some-model"
    models.mkdir()
    save_file({"weight": torch.ones(100, ROW)}, models / "model.safetensors")
    store = ActivationStore(tmp_path, "a", limit=4 * ROW)
    store.reserve(4 * ROW)
    assert store.put(name_of(0), states(0))
    assert (models / "model.safetensors").exists()


def test_store_reserves_space_in_advance(tmp_path, monkeypatch):
    other = filled(tmp_path, "b", range(4))
    store = ActivationStore(tmp_path, "a", limit=5 * ROW)
    store.reserve(ROW)
    assert not other.folder.exists()
    store.reserve(5 * ROW)
    with pytest.raises(OSError, match="1,601 bytes of states are more than the 1,600 that may be kept"):
        store.reserve(5 * ROW + 1)

    class Nearly:
        free = 2 * ROW

    monkeypatch.setattr(activation_store.shutil, "disk_usage", lambda path: Nearly)
    store.reserve(2 * ROW)
    with pytest.raises(OSError, match="more than the 640 free on the disk"):
        store.reserve(2 * ROW + 1)
    written = filled(tmp_path, "a", [0], limit=5 * ROW)
    written.reserve(2 * ROW + size_of(written.folder))  # rows on disk need no more space


def test_store_survives_removal_of_its_folder(tmp_path):
    store = filled(tmp_path, "a", range(4))
    store.put(name_of(4), states(4))
    used(store, 1)
    ActivationStore(tmp_path, "b", limit=2 * ROW).put(name_of(0), states(0))
    assert not store.folder.exists()
    assert torch.equal(store.get(name_of(0)), states(0))  # its file is still open
    store.flush()
    assert [n for n in range(5) if ActivationStore(tmp_path, "a", limit=ROOM).get(name_of(n)) is not None] == [4]
