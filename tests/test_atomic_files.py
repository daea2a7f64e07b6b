"""Atomic writes: after any failure, a file has either its earlier or its complete new contents."""

import os
import subprocess
import sys

import pytest
from full_disk import full_disk

from lightning_ft.atomic_files import atomic_write, is_temporary_path, remove_leftovers, temporary_path, write_text
from lightning_ft.errors import FileWriteError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_atomic_write_replaces_file_at_end_of_block(tmp_path):
    file = tmp_path / "new" / "a.json"
    write_text(file, "first")
    with atomic_write(file) as temporary:
        temporary.write_text("second")
        assert file.read_text() == "first"
        assert temporary.parent == file.parent  # a rename between file systems isn't atomic
    assert file.read_text() == "second"
    assert names(file.parent) == ["a.json"]


@pytest.mark.parametrize("error", [KeyError("a"), KeyboardInterrupt()])
def test_atomic_write_keeps_earlier_file_when_block_fails(tmp_path, error):
    write_text(tmp_path / "a", "first")
    with pytest.raises(type(error)), atomic_write(tmp_path / "a") as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise error
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "first"


def test_write_text_on_full_disk_names_file_and_reason(tmp_path):
    file = tmp_path / "a"
    write_text(file, "first")
    with full_disk(1000), pytest.raises(FileWriteError, match=r"/a' can't be written \(File too large\)"):
        write_text(file, "x" * 5000)
    assert names(tmp_path) == ["a"]
    assert file.read_text() == "first"


def test_write_text_names_folder_that_cannot_be_created(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileWriteError, match=r"file/a' can't be written \((Not a directory|File exists)\)"):
        write_text(tmp_path / "file" / "a", "")


def test_remove_leftovers_keeps_files_of_running_processes(tmp_path):
    imports = "from lightning_ft.atomic_files import temporary_path; from pathlib import Path"
    code = f"{imports}; temporary_path(Path({str(tmp_path)!r}))"
    left = subprocess.run([sys.executable, "-c", f"{code}.write_text('half')"], check=False)
    assert left.returncode == 0
    (of_dead,) = tmp_path.iterdir()
    of_parent = of_dead.with_name(of_dead.name.replace(of_dead.name.split("-")[-2], str(os.getppid())))
    of_parent.write_text("written by a running process")
    restarted = temporary_path(tmp_path)  # same process ID as one before a restart of the container
    restarted = restarted.with_name(restarted.name[:-8] + "00000000")
    restarted.mkdir()
    elsewhere = tmp_path / ".writing-another.host-1-01234567"
    elsewhere.write_text("")
    stale = tmp_path / ".writing-another.host-1-0123456f"
    stale.write_text("")
    os.utime(stale, (0, 0))
    theirs = tmp_path / ".writing-something"
    theirs.write_text("")
    with atomic_write(tmp_path / "a") as temporary:
        temporary.write_text("")
        remove_leftovers(tmp_path)
        assert is_temporary_path(temporary)
        assert set(tmp_path.iterdir()) == {of_parent, elsewhere, theirs, temporary}
