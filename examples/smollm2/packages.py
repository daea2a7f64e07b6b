"""Data files of installed packages, and what is made of them.

The packages' code is never imported: a file is found next to the package and read only if its SHA-256 is the expected
one, so that the same rows come out wherever `data.py` runs.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

INSTALL = "pip install --no-deps -r examples/smollm2/requirements.txt"
DATA = Path(__file__).parent / "data"
"""Folder that `data.py` writes: one folder per domain."""

Row = dict[str, Any]


@dataclass(frozen=True)
class PackageFile:
    """A data file in an installed package.

    Example:
        >>> PackageFile("no_such_package", "data.json", "0" * 64, "MIT").read()
        Traceback (most recent call last):
        SystemExit: The package no_such_package isn't installed. Install it with pip install ...
    """

    package: str
    """Name under which Python would import the package."""
    path: str
    """Path of the file inside the package's folder, with `/`."""
    sha256: str
    """Expected SHA-256 of the file, in hexadecimal."""
    license: str
    """License of the data."""

    def read(self) -> bytes:
        """Read the file.

        Raises:
            SystemExit: If the package isn't installed, or its file is missing or another one than expected.
        """
        file = self.folder() / self.path
        if not file.is_file():
            raise SystemExit(f"{file} doesn't exist: is another version of {self.package} installed? Use {INSTALL}")
        content = file.read_bytes()
        found = hashlib.sha256(content).hexdigest()
        if found != self.sha256:
            raise SystemExit(
                f"{file} has SHA-256 {found} instead of {self.sha256}. Install the right version with {INSTALL}"
            )
        return content

    def folder(self) -> Path:
        """The package's folder; its code doesn't run.

        Raises:
            SystemExit: If the package isn't installed.
        """
        spec = importlib.util.find_spec(self.package)
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit(f"The package {self.package} isn't installed. Install it with {INSTALL}")
        return Path(next(iter(spec.submodule_search_locations)))

    def source(self) -> dict[str, str]:
        """Where the data come from: package, version, file, SHA-256 and license."""
        return {
            "package": self.package,
            "version": version(self.package),
            "file": self.path,
            "sha256": self.sha256,
            "license": self.license,
        }


@dataclass(frozen=True)
class Domain:
    """The data of a domain, before they are written."""

    splits: Mapping[str, Sequence[Row]]
    """Rows of each split, in the order of the file."""
    left_out: Mapping[str, int]
    """Number of rows, or what would have become rows, that were left out, by reason."""
    facts: Mapping[str, object] = field(default_factory=dict)
    """Further numbers for `source.json`."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Text of further files, by name."""

    @cached_property
    def numbered(self) -> dict[str, list[Row]]:
        """The splits with an `id` as each row's first column.

        Example:
            >>> Domain({"test": [{"input": "a"}]}, {}).numbered
            {'test': [{'id': 'test-0000', 'input': 'a'}]}
        """
        return {
            split: [{"id": f"{split}-{number:04d}", **row} for number, row in enumerate(rows)]
            for split, rows in self.splits.items()
        }
