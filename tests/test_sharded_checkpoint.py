"""Folders of sharded checkpoints: complete or absent, verified, and read without running their code."""

import os
import pickle
import shutil
import zlib

import pytest
import torch
from full_disk import full_disk

from lightning_ft.atomic_files import replace_folder
from lightning_ft.checkpoint_file import read_checkpoint, write_checkpoint
from lightning_ft.errors import CheckpointError, FileWriteError
from lightning_ft.sharded_checkpoint import (
    as_file,
    is_sharded_checkpoint,
    open_sharded_checkpoint,
    read_any_checkpoint,
    write_sharded_checkpoint,
)

VERSION = "2.6.0"


class Code:
    """Writes a file named `ran` when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.fixture
def adam():
    """A layer and its optimizer after a step."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW([{"params": [layer.bias], "lr": 0.1}, {"params": [layer.weight]}])
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return layer, optimizer


def named(layer, optimizer):
    """A checkpoint as ranks write it: states and groups of the optimizer name parameters."""
    names = {id(p): name for name, p in layer.named_parameters()}
    groups = [{**group, "params": [names[id(p)] for p in group["params"]]} for group in optimizer.param_groups]
    state = {names[id(p)]: {**value, "note": "plain"} for p, value in optimizer.state.items()}
    return {
        "state_dict": {name: p.detach() for name, p in layer.named_parameters()},
        "optimizer_states": [{"state": state, "param_groups": groups}],
        "pytorch-lightning_version": VERSION,
        "epoch": 3,
    }


def write(path, adam):
    write_sharded_checkpoint(named(*adam), path)
    return path


def test_sharded_checkpoint_reads_as_a_file(tmp_path, adam):
    layer, optimizer = adam
    found = read_any_checkpoint(write(tmp_path / "a" / "b.ckpt", adam))
    assert found["epoch"] == 3
    for name, weight in layer.state_dict().items():
        assert torch.equal(found["state_dict"][name], weight)
    (state,) = found["optimizer_states"]
    assert state["state"][0].pop("note") == state["state"][1].pop("note") == "plain"
    expected = optimizer.state_dict()
    assert state["param_groups"] == expected["param_groups"]
    for number, values in expected["state"].items():
        for key, value in values.items():
            assert torch.equal(state["state"][number][key], value)
    assert "optimizer_states" not in read_any_checkpoint(tmp_path / "a" / "b.ckpt", optimizers=False)
    with as_file(tmp_path / "a" / "b.ckpt") as file:
        assert torch.equal(read_checkpoint(file)["state_dict"]["weight"], layer.weight)


def test_sharded_checkpoint_replaces_an_earlier_one(tmp_path, adam):
    folder, layer = write(tmp_path / "last.ckpt", adam), adam[0]
    with torch.no_grad():
        layer.weight.add_(1.0)
    write(folder, adam)
    assert torch.equal(read_any_checkpoint(folder)["state_dict"]["weight"], layer.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    shutil.rmtree(folder)
    write_checkpoint({"state_dict": {}}, folder)  # a file of that name
    write(folder, adam)
    assert is_sharded_checkpoint(folder)


def test_folders_are_replaced_where_the_system_cannot_exchange_them(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_ft.atomic_files._exchange", lambda one, other: False)
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text(name)
    replace_folder(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old" / "a").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_sharded_checkpoint_on_a_full_disk_leaves_the_earlier_one(tmp_path, adam):
    folder, before = write(tmp_path / "last.ckpt", adam), adam[0].weight.detach().clone()
    with torch.no_grad():
        adam[0].weight.add_(1.0)
    with full_disk(5000), pytest.raises(FileWriteError, match=r"last\.ckpt' can't be written \(File too large\)"):
        write(folder, adam)
    assert torch.equal(read_any_checkpoint(folder)["state_dict"]["weight"], before)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def damage(folder, how):
    shards, metadata = folder / "__0_0.distcp", folder / ".metadata"
    if how == "missing shards":
        shards.unlink()
    elif how == "half of the shards":
        shards.write_bytes(shards.read_bytes()[:500])
    elif how == "one bit":
        content = bytearray(shards.read_bytes())
        content[700] ^= 1
        shards.write_bytes(content)
    elif how == "missing metadata":
        metadata.unlink()
    elif how == "other metadata":
        metadata.write_bytes(metadata.read_bytes()[:-1] + b"!")
    elif how == "half of meta.pt":
        meta = folder / "meta.pt"
        meta.write_bytes(meta.read_bytes()[:300])
    elif how == "of another program":
        torch.save({"state_dict": {}, "pytorch-lightning_version": VERSION}, folder / "meta.pt")


@pytest.mark.parametrize(
    "how",
    [
        "missing shards",
        "half of the shards",
        "one bit",
        "missing metadata",
        "other metadata",
        "half of meta.pt",
        "of another program",
    ],
)
def test_damaged_sharded_checkpoint_is_refused(tmp_path, adam, how):
    folder = write(tmp_path / "a.ckpt", adam)
    damage(folder, how)
    with pytest.raises(CheckpointError, match="is damaged or isn't a checkpoint"):
        open_sharded_checkpoint(folder)


def test_code_in_a_sharded_checkpoint_does_not_run(tmp_path, adam, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path / "a.ckpt", adam)
    meta = torch.load(folder / "meta.pt", weights_only=True)
    (folder / ".metadata").write_bytes(pickle.dumps(Code()))
    meta["lightning_ft_files"][".metadata"] = zlib.crc32((folder / ".metadata").read_bytes())
    torch.save(meta, folder / "meta.pt")
    with pytest.raises(CheckpointError, match=r"contains posix\.system, which describes no tensor"):
        read_any_checkpoint(folder)
    torch.save({**meta, "extra": Code()}, folder / "meta.pt")
    with pytest.raises(CheckpointError, match=r"contains posix\.system"):
        read_any_checkpoint(folder)
    assert not (tmp_path / "ran").exists()


def test_files_outside_of_a_sharded_checkpoint_are_not_read(tmp_path, adam):
    folder = write(tmp_path / "a.ckpt", adam)
    meta = torch.load(folder / "meta.pt", weights_only=True)
    (tmp_path / "secret").write_text("secret")
    meta["lightning_ft_files"]["../secret"] = 0
    torch.save(meta, folder / "meta.pt")
    with pytest.raises(CheckpointError, match=r"'\.\./secret' is missing"):
        open_sharded_checkpoint(folder)
