"""Read the rows of a file with the reader that its format needs, and explain why a file can't be read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from os import stat_result
from pathlib import Path

from lightning_ft.data.file_readers import BOM, read_csv, read_json, read_jsonl, read_parquet
from lightning_ft.data.raw_rows import RawRow, check_values
from lightning_ft.errors import DataError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
"""Suffixes of files that can be read."""

COMPRESSED = {".gz": "gunzip", ".bz2": "bunzip2", ".xz": "unxz", ".zst": "unzstd", ".zip": "unzip"}
"""Suffixes of compressed files, and the commands that unpack them."""

_HEAD = 64  # bytes at the start of a file that tell its format
_OTHER_FORMATS = {
    b"PAR1": "Parquet",
    b"PARE": "Parquet with an encrypted footer",
    b"PK\x03\x04": "a zip archive (or a spreadsheet)",
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"ARROW1": "Arrow",
    b"\xff\xff\xff\xff": "an Arrow stream",
    b"\x89HDF": "HDF5",
    b"SQLite format 3": "an SQLite database",
    b"%PDF": "PDF",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"\0\0\xfe\xff": "UTF-32 text",
    b"version https://git-lfs": "a Git LFS pointer, not the data itself",
    b"<!doctype": "a web page",
    b"<html": "a web page",
}


def read_file(path: Path, name: str, notes: Counter[str]) -> Iterator[RawRow]:
    """Read a file row by row, in the format that its suffix names.

    Args:
        path: The file.
        name: Name of the file in errors.
        notes: Counter of harmless findings, such as blank lines.

    Raises:
        DataError: If the file as a whole can't be read: it is empty, in another format, too damaged to tell rows apart,
            or it changed while it was read.
    """
    try:
        before = path.stat()
        yield from check_values(_read(path, name, notes), filled=path.suffix.lower() == ".parquet")
        after = path.stat()
    except OSError as error:
        if isinstance(error, DataError):
            raise
        reason = error.strerror or str(error) or type(error).__name__
        raise DataError(
            f"{name}: the file can't be read: {reason}. Check that it exists and that you may read it."
        ) from error
    if _state(before) != _state(after):
        raise DataError(f"{name}: the file changed while it was read. Wait until it is complete, or pass a copy.")


def _state(file: stat_result) -> tuple[int, int, int]:
    return file.st_size, file.st_mtime_ns, file.st_ino


def _read(path: Path, name: str, notes: Counter[str]) -> Iterator[RawRow]:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{name}: {_unknown_suffix(path, suffix)}")
    with path.open("rb") as file:
        head = file.read(_HEAD)
        text = head.removeprefix(BOM).lstrip()
        while not text and (more := file.read(1 << 16)):  # a file may start with any number of blank lines
            text = more.lstrip()
    if not text:
        raise DataError(f"{name}: the file is empty.")
    other = next((format for magic, format in _OTHER_FORMATS.items() if head.lower().startswith(magic.lower())), None)
    if suffix == ".parquet":
        if other != "Parquet":
            fix = "Decrypt it." if head.startswith(b"PARE") else "Rename or convert it."
            raise DataError(f"{name}: the file is {other or 'not Parquet'}. {fix}")
        yield from read_parquet(path, name)
        return
    if other is None and head.count(0) > len(head) // 8:  # fewer NUL bytes make only their own rows bad
        other = "UTF-16 text" if 0 in (head[::2].count(0), head[1::2].count(0)) else "binary, or damaged"
    if other is not None:
        fix = "Save it as UTF-8." if other.startswith("UTF") else "Rename or convert it."
        raise DataError(f"{name}: the file is {other}, not {suffix[1:]}. {fix}")
    if suffix in (".jsonl", ".ndjson"):
        yield from read_jsonl(path, name, notes)
        return
    if head.startswith(BOM):
        notes["byte order mark removed"] += 1
    if suffix == ".json":
        yield from read_json(path, name)
    else:
        yield from read_csv(path, name, "\t" if suffix == ".tsv" else ",", notes)


def _unknown_suffix(path: Path, suffix: str) -> str:
    """Explain what a file with an unknown suffix is, and how to make it readable."""
    if suffix in COMPRESSED:
        return f"compressed files can't be read. Unpack it first: {COMPRESSED[suffix]} {path}"
    if suffix in (".arrow", ".feather"):
        load = f"datasets.Dataset.from_file({str(path)!r})"
        if suffix == ".feather":
            load = f"pandas.read_feather({str(path)!r})"
        return f"Arrow files can't be read. Pass {load}, or save it as Parquet with its to_parquet()."
    if suffix in (".xlsx", ".xls", ".ods"):
        return "spreadsheets can't be read. Save it as CSV, or pass pandas.read_excel(...)."
    return f"files with the suffix {suffix!r} can't be read; expected one of {', '.join(SUFFIXES)}."


__all__ = ["COMPRESSED", "SUFFIXES", "read_file"]
