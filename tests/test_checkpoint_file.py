"""What isn't a whole checkpoint is named, and nothing in it is run."""

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

WHOLE = {"state_dict": {"weight": torch.arange(600.0)}, "pytorch-lightning_version": "2.6.0"}


class Code:
    """Whoever unpickles it writes a file named `ran`."""

    def __reduce__(self):
        return os.system, ("touch ran",)


def saved(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def foreign_zip():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", "hello")
    return file.getvalue()


def changed_bit(content):
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
    "code": (saved({"state_dict": Code()}), r"contains posix\.system, which is neither a tensor"),
    "class": (saved({"state_dict": {}, "x": pytest.Item}), "which is neither a tensor nor a plain value"),
    "one bit": (changed_bit(saved(WHOLE)), "checksum of"),
    "zeros": (saved(WHOLE)[:1500] + bytes(800) + saved(WHOLE)[2300:], "damaged"),
    "no dict": (saved([1, 2]), "holds no 'state_dict'"),
    "other dict": (saved({"a": 1}), "holds no 'state_dict'"),
    "weights by number": (saved({"state_dict": {1: torch.ones(1)}}), "isn't a dict of tensors"),
    "no tensors": (saved({"state_dict": {"a": 1}}), "isn't a dict of tensors"),
    "list of hyperparameters": (saved({**WHOLE, "hyper_parameters": []}), "'hyper_parameters' isn't a dict"),
    "no version": (saved({"state_dict": {}}), "name the version of Lightning"),
    "odd version": (saved({**WHOLE, "pytorch-lightning_version": "two"}), "name the version of Lightning"),
}


@pytest.mark.parametrize("kind", FILES)
def test_read_checkpoint_names_what_is_none_and_runs_nothing(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    content, says = FILES[kind]
    if kind == "old format with code":
        torch.save({"state_dict": Code()}, "some.ckpt", _use_new_zipfile_serialization=False)
    else:
        (tmp_path / "some.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"some\.ckpt' .*{says}"):
        read_checkpoint("some.ckpt", of_trainer=True)
    assert not (tmp_path / "ran").exists()


def test_read_checkpoint_names_one_that_is_cut_at_any_byte(tmp_path):
    content = saved(WHOLE)
    for end in {*range(0, len(content), 53), len(content) - 1}:
        (tmp_path / "cut.ckpt").write_bytes(content[:end])
        with pytest.raises(CheckpointError, match=r"cut\.ckpt'"):
            read_checkpoint(tmp_path / "cut.ckpt")


def test_read_checkpoint_takes_folders_and_missing_files_for_what_they_are(tmp_path):
    with pytest.raises(CheckpointError, match="is a folder: give a checkpoint file"):
        read_checkpoint(tmp_path)
    for missing in (tmp_path / "none.ckpt", "memory://none.ckpt"):
        with pytest.raises(CheckpointNotFoundError, match=r"There is no checkpoint '.*none\.ckpt'"):
            read_checkpoint(missing)


def test_write_checkpoint_gives_back_what_was_written_whatever_torch_was_set_to(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        write_checkpoint(WHOLE, tmp_path / "new" / "a.ckpt")
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    found = read_checkpoint(tmp_path / "new" / "a.ckpt", of_trainer=True)
    assert torch.equal(found["state_dict"]["weight"], WHOLE["state_dict"]["weight"])
    with (tmp_path / "new" / "a.ckpt").open("rb") as file:
        assert read_checkpoint(file).keys() == WHOLE.keys()


def test_write_checkpoint_on_a_full_disk_says_so_and_leaves_the_earlier_one(tmp_path):
    write_checkpoint(WHOLE, tmp_path / "a.ckpt")
    with full_disk(5000), pytest.raises(FileWriteError, match=r"a\.ckpt' can't be written \(File too large\)"):
        write_checkpoint({"state_dict": {"weight": torch.zeros(50_000)}}, tmp_path / "a.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]
    assert read_checkpoint(tmp_path / "a.ckpt").keys() == WHOLE.keys()


@pytest.fixture
def address(tmp_path):
    """Where files of a folder are served."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_read_checkpoint_of_an_address(tmp_path, monkeypatch, address):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "*")
    for number in (1, 2):  # of the same last name
        write_checkpoint({"state_dict": {"weight": torch.tensor(number)}}, f"{number}/last.ckpt")
    assert [int(read_checkpoint(f"{address}/{n}/last.ckpt")["state_dict"]["weight"]) for n in (1, 2)] == [1, 2]
    (tmp_path / "evil.ckpt").write_bytes(FILES["code"][0])
    (tmp_path / "cut.ckpt").write_bytes(saved(WHOLE)[:-9])
    for name, says in {"evil": "posix.system", "cut": "is damaged", "missing": r"can't be downloaded \(.*404"}.items():
        with (
            pytest.raises(CheckpointError, match=f"http://.*/{name}.ckpt' .*{says}"),
            checked_file(f"{address}/{name}.ckpt"),
        ):
            pass
    assert not (tmp_path / "ran").exists()


def test_checked_file_refuses_to_unpickle(tmp_path):
    with pytest.raises(ConfigError, match="weights_only=False would run"), checked_file(tmp_path, weights_only=False):
        pass
