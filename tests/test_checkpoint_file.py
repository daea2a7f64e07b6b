"""Checkpoint files: invalid ones are refused by name without running their code; writes are atomic."""

import http.server
import io
import os
import pickle
import threading
import zipfile
from functools import partial

import pytest
import torch
from full_disk import full_disk

from lightning_ft.checkpoint_file import checked_file, read_checkpoint, write_checkpoint
from lightning_ft.errors import CheckpointError, CheckpointNotFoundError, ConfigError, FileWriteError

CHECKPOINT = {"state_dict": {"weight": torch.arange(600.0)}, "pytorch-lightning_version": "2.6.0"}


class Code:
    """Writes a file named `ran` when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch ran",)


def to_bytes(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def foreign_zip():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", "hello")
    return file.getvalue()


def flip_bit(content):
    changed = bytearray(content)
    changed[content.index(torch.tensor(300.0).numpy().tobytes())] ^= 1
    return bytes(changed)


FILES = {
    "empty": (b"", "is empty"),
    "text": (b"step: 3\n", "is damaged or isn't a checkpoint"),
    "zip of another": (foreign_zip(), "is damaged or isn't a checkpoint"),
    "plain pickle": (pickle.dumps({"state_dict": {}}), "is damaged or isn't a checkpoint"),
    "pickle with code": (pickle.dumps(Code()), "is damaged or isn't a checkpoint"),
    "old format with code": (b"", ""),
    "code": (to_bytes({"state_dict": Code()}), r"contains posix\.system, which is neither a tensor"),
    "class": (to_bytes({"state_dict": {}, "x": pytest.Item}), "which is neither a tensor nor a plain value"),
    "one bit": (flip_bit(to_bytes(CHECKPOINT)), "checksum of"),
    "zeros": (to_bytes(CHECKPOINT)[:1500] + bytes(800) + to_bytes(CHECKPOINT)[2300:], "damaged"),
    "no dict": (to_bytes([1, 2]), "contains no 'state_dict'"),
    "other dict": (to_bytes({"a": 1}), "contains no 'state_dict'"),
    "weights by number": (to_bytes({"state_dict": {1: torch.ones(1)}}), "isn't a dict of tensors"),
    "no tensors": (to_bytes({"state_dict": {"a": 1}}), "isn't a dict of tensors"),
    "list of hyperparameters": (to_bytes({**CHECKPOINT, "hyper_parameters": []}), "'hyper_parameters' isn't a dict"),
    "no version": (to_bytes({"state_dict": {}}), "name the version of Lightning"),
    "odd version": (to_bytes({**CHECKPOINT, "pytorch-lightning_version": "two"}), "name the version of Lightning"),
}


@pytest.mark.parametrize("case", FILES)
def test_read_checkpoint_refuses_invalid_files_without_running_code(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    content, message = FILES[case]
    if case == "old format with code":
        torch.save({"state_dict": Code()}, "some.ckpt", _use_new_zipfile_serialization=False)
    else:
        (tmp_path / "some.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"some\.ckpt' .*{message}"):
        read_checkpoint("some.ckpt", from_trainer=True)
    assert not (tmp_path / "ran").exists()


def test_read_checkpoint_refuses_truncated_files(tmp_path):
    content = to_bytes(CHECKPOINT)
    for end in {*range(0, len(content), 53), len(content) - 1}:
        (tmp_path / "cut.ckpt").write_bytes(content[:end])
        with pytest.raises(CheckpointError, match=r"cut\.ckpt'"):
            read_checkpoint(tmp_path / "cut.ckpt")


def test_read_checkpoint_refuses_folders_and_missing_files(tmp_path):
    with pytest.raises(CheckpointError, match=r"is a folder\. Pass a checkpoint file"):
        read_checkpoint(tmp_path)
    for missing in (tmp_path / "none.ckpt", "memory://none.ckpt"):
        with pytest.raises(CheckpointNotFoundError, match=r"The checkpoint '.*none\.ckpt' doesn't exist"):
            read_checkpoint(missing)


def test_write_checkpoint_round_trips_and_restores_checksum_setting(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        write_checkpoint(CHECKPOINT, tmp_path / "new" / "a.ckpt")
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    found = read_checkpoint(tmp_path / "new" / "a.ckpt", from_trainer=True)
    assert torch.equal(found["state_dict"]["weight"], CHECKPOINT["state_dict"]["weight"])
    with (tmp_path / "new" / "a.ckpt").open("rb") as file:
        assert read_checkpoint(file).keys() == CHECKPOINT.keys()


def test_write_checkpoint_keeps_earlier_file_on_full_disk(tmp_path):
    write_checkpoint(CHECKPOINT, tmp_path / "a.ckpt")
    with full_disk(5000), pytest.raises(FileWriteError, match=r"a\.ckpt' can't be written \(File too large\)"):
        write_checkpoint({"state_dict": {"weight": torch.zeros(50_000)}}, tmp_path / "a.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]
    assert read_checkpoint(tmp_path / "a.ckpt").keys() == CHECKPOINT.keys()


@pytest.fixture
def url(tmp_path):
    """URL at which an HTTP server serves the temporary folder."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_read_checkpoint_downloads_urls(tmp_path, monkeypatch, url):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "*")
    for number in (1, 2):  # two files of the same name
        write_checkpoint({"state_dict": {"weight": torch.tensor(number)}}, f"{number}/last.ckpt")
    assert [int(read_checkpoint(f"{url}/{n}/last.ckpt")["state_dict"]["weight"]) for n in (1, 2)] == [1, 2]
    (tmp_path / "evil.ckpt").write_bytes(FILES["code"][0])
    (tmp_path / "cut.ckpt").write_bytes(to_bytes(CHECKPOINT)[:-9])
    for name, message in {
        "evil": "posix.system",
        "cut": "is damaged",
        "missing": r"can't be downloaded \(.*404",
    }.items():
        with (
            pytest.raises(CheckpointError, match=f"http://.*/{name}.ckpt' .*{message}"),
            checked_file(f"{url}/{name}.ckpt"),
        ):
            pass
    assert not (tmp_path / "ran").exists()


def test_checked_file_refuses_weights_only_false(tmp_path):
    with pytest.raises(ConfigError, match="weights_only=False would run"), checked_file(tmp_path, weights_only=False):
        pass
