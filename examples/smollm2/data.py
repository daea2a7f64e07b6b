"""Writes the data of the examples on a real model: `python examples/smollm2/data.py [domain ...]`.

The rows come from public data that pip packages contain (`requirements.txt`). Nothing of them is part of this
repository: they are written to `examples/smollm2/data/<domain>/`, the same byte for byte each time, with a
`source.json` that names the files, their licenses, and how many rows were kept and left out.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

from packages import DATA, Domain, PackageFile

DOMAINS = ("medical_coding", "legal_citation", "api_calls", "support")


def write(domain: Domain, sources: tuple[PackageFile, ...], folder: Path) -> dict[str, object]:
    """Write the splits of a domain, its further files and `source.json`.

    Args:
        domain: Data to write.
        sources: Files that the data were made of.
        folder: Folder to write to; files of the same names are replaced.

    Returns:
        What `source.json` says.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in domain.numbered.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        _write(folder / f"{split}.jsonl", lines)
    for name, text in domain.files.items():
        _write(folder / name, text)
    about = {
        "sources": [source.source() for source in sources],
        "rows": {split: len(rows) for split, rows in domain.splits.items()},
        "left_out": dict(domain.left_out),
        **domain.facts,
    }
    _write(folder / "source.json", json.dumps(about, indent=1, ensure_ascii=False) + "\n")
    return about


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8", newline="\n")


def main(arguments: list[str] | None = None) -> None:
    """Write the domains named on the command line, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("domains", nargs="*", metavar="domain", help=f"Domains to write: {', '.join(DOMAINS)}.")
    parser.add_argument("--output", type=Path, default=DATA, help="Folder with one folder per domain.")
    options = parser.parse_args(arguments)
    if unknown := set(options.domains) - set(DOMAINS):
        parser.error(f"unknown domain {', '.join(sorted(unknown))}; choose from {', '.join(DOMAINS)}")
    sys.path.insert(0, str(Path(__file__).parent))
    for name in options.domains or DOMAINS:
        module = importlib.import_module(name)
        about = write(module.load(), module.SOURCES, options.output / name)
        print(name, about["rows"], "left out:", about["left_out"])


if __name__ == "__main__":
    main()
