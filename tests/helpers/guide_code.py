"""Code blocks of the README and of docs/, with stand-ins for the reader's own files and models that they name."""

import itertools
import json
import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_COMMANDS = [*PAGES, ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("examples/*/README.md"))]
SUPPORT = ROOT / "examples" / "support" / "data"

# What a page writes for a reader, and what the tests run: a model that is here, and fewer steps.
SUBSTITUTES = {
    "Qwen/Qwen3-0.6B": "examples/tiny_base",
    "max_steps=500": "max_steps=1",
    "max_epochs=3": "max_epochs=1",
    "reward_model/": "my_package.rewards.format",
    "user/alpaca_data": "support.jsonl",
}

LANGUAGES = ("python", "yaml", "json", "csv", "")
_BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n\n?)?"
    r"```(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    code: str
    title: str | None
    """Name of the file that it is."""
    reason: str | None
    """Why it isn't run, from a comment above it; None if it is."""

    @property
    def name(self):
        return f"{self.page}:{self.line}"


def blocks(path, *languages):
    """The blocks of a page in these languages, "" for those without one."""
    text = path.read_text(encoding="utf-8")
    for match in _BLOCK.finditer(text):
        if match["language"] in languages:
            line = text.count("\n", 0, match.start("code")) + 1
            page = path.relative_to(ROOT).as_posix()
            yield Block(page, line, match["language"], match["code"], match["title"], match["reason"])


def all_blocks(*languages, pages=PAGES):
    return [block for path in pages for block in blocks(path, *languages)]


def runnable(code):
    for written, run in SUBSTITUTES.items():
        code = code.replace(written, run)
    return code


def commands(block):
    """The command lines of a block as lists of arguments; output and comments are not commands."""
    lines = re.sub(r"\\\n\s*", " ", block.code).splitlines()
    for line in lines:
        line = re.sub(r"^\s*(?:\$ |[A-Z_]+=\S+ )*", "", line)
        if re.match(r"(?:lightning-ft|make|python|pip|torchrun|vllm|transformers|ollama|llama-server) ", line):
            yield shlex.split(line, comments=True)


def rows(name, count):
    with open(SUPPORT / f"{name}.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in itertools.islice(file, count)]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_files(folder):
    """The files that pages name, with a few rows each."""
    (folder / "examples").symlink_to(ROOT / "examples")
    for name in ("support", "train"):
        write_rows(folder / f"{name}.jsonl", rows("train", 32))
    for name in ("test", "requests"):
        write_rows(folder / f"{name}.jsonl", rows("test", 24))
    write_rows(folder / "preferences.jsonl", rows("preferences_train", 16))
    write_rows(folder / "prompts.jsonl", [{"prompt": row["input"]} for row in rows("train", 20)])
    write_rows(folder / "general.jsonl", [json.loads(line) for line in _lines("tiny_base/general.jsonl", 8)])
    (folder / "prompt.json").write_text((ROOT / "examples/support/baseline.json").read_text(encoding="utf-8"))
    (folder / "run.yaml").write_text((ROOT / "examples/support/lora.yaml").read_text(encoding="utf-8"))
    (folder / "my_package").mkdir()
    (folder / "my_package" / "__init__.py").touch()
    (folder / "my_package" / "rewards.py").write_text(
        "def format(completions, **columns):\n    return [-float(len(text)) for text in completions]\n"
    )


def _lines(path, count):
    with open(ROOT / "examples" / path, encoding="utf-8") as file:
        return list(itertools.islice(file, count))
