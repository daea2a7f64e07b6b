"""Writes what the model shouldn't forget: `python examples/smollm2/general.py bigbench-1.0.0.tar.gz`.

- `data/general/texts.jsonl`: real texts of several kinds: encyclopedia, news, fiction and science.
- `data/general/anchor.jsonl`: other texts of these kinds, to train with (`anchor.yaml`).
- `data/general/questions.jsonl`: multiple-choice questions of sets on which the base model is clearly above chance.

Both come from the source archive of BIG-bench, which is read but never unpacked or run, and of which nothing is part of
this repository: `pip download --no-deps --no-binary :all: bigbench==1.0.0` (350 MB).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packages import DATA

SHA256 = "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2"
TASKS = "bigbench-1.0.0/bigbench/benchmark_tasks"
TEXTS = "coqa_conversational_question_answering/coqa.test.json"
KINDS = {"wikipedia": "encyclopedia", "cnn": "news", "gutenberg": "fiction", "science": "science"}
"""Kinds of texts by what the passages of CoQA were taken from."""
TEXTS_PER_KIND = 36
"""Largest number of texts of each kind to measure on, and of others to train with."""
MIN_CHARACTERS = 1000
QUESTIONS = {
    "general_knowledge": 70,
    "intent_recognition": 70,
    "phrase_relatedness": 100,
    "similarities_abstraction": 76,
    "social_iqa": 150,
}
"""Largest number of questions of each set."""
SOURCE = {
    "package": "bigbench",
    "version": "1.0.0",
    "sha256": SHA256,
    "license": "questions Apache-2.0; passages: Wikipedia CC BY-SA 4.0, CNN Apache-2.0, Gutenberg public domain, SciQ "
    "CC BY-NC 3.0",
}


def texts(coqa: dict[str, Any]) -> Iterator[tuple[str, dict[str, str]]]:
    """The passages of each kind, in a random order.

    Args:
        coqa: The file of passages with `source` and `story`.

    Yields:
        Name of the file that a passage belongs to, and its row with `text` and `kind`.
    """
    for source, kind in KINDS.items():
        stories = [" ".join(d["story"].split()) for d in coqa["data"] if d["source"] == source]
        long = [story for story in dict.fromkeys(stories) if len(story) >= MIN_CHARACTERS]
        for name in ("texts", "anchor"):
            chosen = random.Random(0).sample(long, min(TEXTS_PER_KIND, len(long)))
            yield from ((name, {"text": story, "kind": kind}) for story in chosen)
            long = [story for story in long if story not in chosen]


def questions(name: str, task: dict[str, Any], count: int) -> list[dict[str, Any]]:
    r"""Questions of a set with exactly one correct choice, in a random order.

    Args:
        name: Name of the set.
        task: The set, with `examples` of an `input` and `target_scores`.
        count: Largest number of questions.

    Example:
        >>> questions("sums", {"examples": [{"input": "1 + 1?", "target_scores": {"3": 0, "2": 1}}]}, 5)
        [{'set': 'sums', 'input': 'Q: 1 + 1?\nA:', 'choices': ['3', '2'], 'answer': 1}]
    """
    before, after = task.get("example_input_prefix", "\nQ: "), task.get("example_output_prefix", "\nA: ")
    found = []
    for example in task["examples"]:
        scores = {choice.strip(): score for choice, score in example["target_scores"].items()}
        right = [index for index, score in enumerate(scores.values()) if score > 0]
        if len(right) == 1 and len(scores) > 1 and len(scores) == len(example["target_scores"]):
            text = f"{before}{example['input']}{after}".strip()
            found.append({"set": name, "input": text, "choices": list(scores), "answer": right[0]})
    return random.Random(0).sample(found, min(count, len(found)))


def read(archive: Path) -> dict[str, Any]:
    """Read the files of the archive that are used, by their path.

    Raises:
        SystemExit: If it isn't the expected archive.
    """
    digest = hashlib.sha256()
    with archive.open("rb") as content:
        while part := content.read(2**24):
            digest.update(part)
    if (found := digest.hexdigest()) != SHA256:
        raise SystemExit(f"{archive} has SHA-256 {found} instead of {SHA256}. Is it bigbench 1.0.0?")
    wanted = {TEXTS, *(f"{name}/task.json" for name in QUESTIONS)}
    files: dict[str, Any] = {}
    with tarfile.open(archive) as members:
        for member in members:
            path = member.name.removeprefix(f"{TASKS}/")
            if path in wanted and (file := members.extractfile(member)) is not None:
                files[path] = json.load(file)
    return files


def main(arguments: list[str] | None = None) -> None:
    """Write texts, questions and `source.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archive", type=Path, help="Path of bigbench-1.0.0.tar.gz.")
    parser.add_argument("--output", type=Path, default=DATA / "general", help="Folder to write to.")
    options = parser.parse_args(arguments)
    files = read(options.archive)
    rows: dict[str, list[dict[str, Any]]] = {"texts": [], "anchor": []}
    for name, row in texts(files[TEXTS]):
        rows[name].append(row)
    rows["questions"] = [
        row for name, count in QUESTIONS.items() for row in questions(name, files[f"{name}/task.json"], count)
    ]
    options.output.mkdir(parents=True, exist_ok=True)
    for name, found in rows.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
        (options.output / f"{name}.jsonl").write_text(lines, encoding="utf-8", newline="\n")
    about = {"source": SOURCE, "rows": {name: len(found) for name, found in rows.items()}}
    (options.output / "source.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    print("general", about["rows"])


if __name__ == "__main__":
    main()
