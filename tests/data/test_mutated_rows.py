"""Randomly mutated rows and files: each is read, or rejected by an error that names it, and none is lost.

`make test` tries the same 10,000 every time. To try more, random ones: ``MUTATIONS=100000 pytest <this file>``.
"""

import datetime
import decimal
import json
import logging
import math
import os
from copy import deepcopy

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tiny import make_tokenizer
from transformers import AutoTokenizer

from lightning_ft import PairDataModule, PreferenceDataModule, PromptDataModule
from lightning_ft.errors import LightningFTError

MUTATIONS = int(os.environ.get("MUTATIONS", "10000"))
ROWS_TOGETHER, FILES_TOGETHER = 60, 50

pytestmark = pytest.mark.skipif("LIGHTNING_FT_NAMESPACE" in os.environ, reason="rows don't depend on Lightning")


def trials(count):
    """The same trials every time; random ones if more are requested than in `make test`."""
    return settings(
        max_examples=math.ceil(count),
        derandomize=MUTATIONS == 10_000,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],  # shrinking a failing trial takes minutes, and the test shows the row itself
    )


TALKATIVE = (
    "{%- if tools %}{{ tools | tojson }}{% endif -%}{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\n' -}}"
    "{%- if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif -%}{{- m.content -}}"
    "{%- if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif -%}{{- '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
U, A = {"role": "user", "content": "where is the lamp"}, {"role": "assistant", "content": "here"}
CALL = {"type": "function", "function": {"name": "find", "arguments": {"what": "lamp", "n": 1}}}
TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}
PAIRS = [
    {"input": "where is the lamp", "output": "here"},
    {"prompt": "2 plus 2", "completion": "4", "id": 7, "cluster": "sums"},
    {"instruction": "add", "input": "2 2", "output": "4", "history": [["1 1", "2"]], "system": "be brief"},
    {"messages": [{"role": "system", "content": "be brief"}, U, A, U, A]},
    {"messages": [U, {**A, "weight": 0}, U, {**A, "reasoning_content": "look"}]},
    {
        "messages": [U, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "1"}, A],
        "tools": [TOOL],
    },
    {"conversations": [{"from": "human", "value": "where"}, {"from": "gpt", "value": "here"}]},
    {"text": "the quick brown fox"},
]
PREFERENCES = [
    {"prompt": "where is the lamp", "chosen": "here", "rejected": "there", "margin": 0.5},
    {"prompt": [U], "chosen": [A], "rejected": [{**A, "content": "no"}]},
    {"chosen": [U, A], "rejected": [U, {**A, "content": "no"}]},
    {"chosen": "2 plus 2 is 4", "rejected": "2 plus 2 is 5"},
    {"prompt": "where", "completion": "here", "label": True},
]
PROMPTS = [
    {"prompt": "where is the lamp", "answer": "here", "level": 3},
    {"messages": [U, A, U], "answer": {"value": [1, 2]}},
    {"instruction": "add", "input": "2 2", "tools": [TOOL]},
    {"conversations": [{"from": "human", "value": "where"}]},
]
ROWS = {PairDataModule: PAIRS, PreferenceDataModule: PREFERENCES, PromptDataModule: PROMPTS}

TEXTS = [
    "",
    " ",
    "\n",
    "x",
    "0",
    "true",
    "half \ud83d",
    "\udc00",
    "\0",
    "\x85",
    "\u200b",
    "\ufeff",
    "\U0001f600",
    "a\u0301",
]
TEXTS += ["<|end|>", "<|assistant|>", "<|im_start|>", "<|im_end|>", "<s>", "[", "{}", "null", "{{ x }}", "word " * 300]
VALUES = [None, True, False, 0, 1, -1, 3, 0.5, 10**30, 10**5000, math.nan, math.inf, -0.0, [], {}, [None], [[]], [{}]]
VALUES += [*TEXTS, U, A, [U], [U, A], [A, U], CALL, [TOOL], {"type": "text", "text": "x"}, {"": ""}, {"a": {"b": [1]}}]
VALUES += [b"x", (1, 2), {1, 2}, datetime.date(2020, 1, 1), decimal.Decimal("NaN"), object, range(3), {1: 2}]
VALUES += [
    np.float32(1),
    np.array([1]),
    np.array([U], dtype=object),
    np.str_("x"),
    {None: None},
    {(1, 2): 1},
    [math.nan],
]
NAMES = ["id", "cluster", "system", "tools", "images", "weight", "train", "role", "from", "content", "value", "name"]
NAMES += ["input", "output", "prompt", "completion", "label", "margin", "chosen", "rejected", "instruction", "text"]
NAMES += ["messages", "conversations", "history", "tool_calls", "tool_call_id", "thinking", "chat_template_kwargs"]
NAMES += ["question", "", " ", "\ud83d"]
ROLES = [
    "system",
    "user",
    "assistant",
    "tool",
    "function",
    "human",
    "gpt",
    "observation",
    "developer",
    "User",
    "asistant",
]


def places(value, path=()):
    """Paths to all values in a row."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def mutate(row, draw):
    """Change one thing in a row, or all of it."""
    path = draw(st.sampled_from(list(places(row))))
    value = deepcopy(draw(st.sampled_from(VALUES)))
    if not path:
        return value if draw(st.integers(0, 9)) == 0 else {**row, draw(st.sampled_from(NAMES)): value}
    *parents, last = path
    inside = row
    for key in parents:
        inside = inside[key]
    how = draw(st.sampled_from(["set", "set", "remove", "rename", "text", "role", "add", "again", "deep"]))
    if how == "set":
        inside[last] = value
    elif how == "remove":
        del inside[last]
    elif how == "rename" and isinstance(inside, dict):
        inside[draw(st.sampled_from([*NAMES, str(last).upper(), f"{last}s", 3]))] = inside.pop(last)
    elif how == "text":
        inside[last] = (inside[last] if isinstance(inside[last], str) else "") + draw(st.sampled_from(TEXTS))
    elif how == "role":
        inside[last] = draw(st.sampled_from(ROLES))
    elif how == "add" and isinstance(inside, dict):
        inside[draw(st.sampled_from(NAMES))] = value
    elif how == "again" and isinstance(inside, list):
        inside.insert(0, deepcopy(inside[last]))
    else:
        for _ in range(draw(st.sampled_from([1, 1, 30, 200]))):
            inside[last] = [inside[last]]
    return row


@st.composite
def mutated_rows(draw):
    """Rows for one DataModule, mostly of one format, nearly all of them changed."""
    datamodule = draw(st.sampled_from(list(ROWS)))
    main = draw(st.sampled_from(ROWS[datamodule]))
    rows = []
    for _ in range(ROWS_TOGETHER):
        row = deepcopy(draw(st.sampled_from([main] * 25 + ROWS[datamodule])))
        for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2, 3]))):
            if isinstance(row, dict) and row:
                row = mutate(row, draw)
        rows.append(row)
    return datamodule, rows


@pytest.fixture(scope="module")
def tokenizers():
    """One whose template refuses unknown input, and one whose template writes everything."""
    return [AutoTokenizer.from_pretrained("examples/tiny_base"), make_tokenizer(TALKATIVE)]


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def refusal(do):
    """Message of the package's error, None without one; any other exception is a bug."""
    try:
        do()
    except LightningFTError as error:
        str(error).encode()  # can be printed
        return str(error)
    return None


def use(datamodule, source, name, tokenizer, **options):
    """Read and encode a source; returns the error message if it can't be used."""
    data = datamodule(source, tokenizer=tokenizer, cache_dir=False, max_length=256, **options)
    message = refusal(data.load_rows)
    if message is None:
        counted(data)
        message = refusal(lambda: data.setup("fit"))
    if message is None:
        counted(data)
    assert message is None or name in message
    return message


def counted(data):
    report = data.report["train"]
    assert report.read == report.kept + sum(report.skipped.values())
    assert report.kept == sum(len(part) for part in data.splits.rows["train"])


@trials(MUTATIONS * 0.6 / ROWS_TOGETHER)
@given(mutated_rows(), st.integers(0, 1), st.sampled_from(["drop", "truncate_prompt", "error"]))
def test_mutated_rows_are_read_or_rejected(tokenizers, datamodule_and_rows, which, overlong):
    (datamodule, rows), tokenizer = datamodule_and_rows, tokenizers[which]
    try:
        use(datamodule, rows, "train", tokenizer, on_bad_row="skip", on_overlong=overlong)
    except Exception:
        for row in rows:  # to show the row that fails alone
            use(datamodule, [rows[0], row], "train", tokenizer, on_bad_row="skip", on_overlong=overlong)
        raise


LINES = [json.dumps(row) for row in PAIRS[3:6] * 2]
SINK = pa.BufferOutputStream()
pq.write_table(pa.Table.from_pylist([{**PAIRS[0], "n": n} for n in range(30)]), SINK)
FILES = {
    "a.jsonl": "\n".join([*LINES, ""]).encode(),
    "a.json": f"[{', '.join(LINES)}]".encode(),
    "a.csv": b'input,output\nwhere,here\n"two\nlines","a ""quote"""\n' * 3,
    "a.parquet": SINK.getvalue().to_pybytes(),
}
BYTES = [b"", b"\0", b"\xff", b"\xef\xbb\xbf", b"\n", b"\r", b'"', b",", b"[", b"{", b"}", b"\\", b"\\ud83d", b"NaN"]
BYTES += [
    b"9" * 5000,
    b"[" * 100_000,
    b'"id": 1, "id": 2, ',
    b"\xc3",
    b"\xed\xa0\xbd",
    b"\n" * 200,
    b"\xfe\xff",
    b"PAR1",
]
BYTES += [b"null", b"1e999", b"\r\n", b" ", b"\t"]


def mutated_bytes(content, draw):
    """Change some bytes of a file."""
    for _ in range(draw(st.sampled_from([1, 1, 2, 5]))):
        at = draw(st.integers(0, len(content)))
        until = min(len(content), at + draw(st.sampled_from([0, 0, 1, 1, 4, 50, 100_000])))
        how = draw(st.sampled_from(["put", "put", "flip", "copy"]))
        if how == "put":
            new = draw(st.sampled_from(BYTES))
        elif how == "flip":
            mask = draw(st.integers(1, 255))
            new = bytes(byte ^ mask for byte in content[at:until])
        else:
            start = draw(st.integers(0, len(content)))
            new = content[start : start + 30]
        content = content[:at] + new + content[until:]
    return content


@st.composite
def mutated_files(draw):
    names = [draw(st.sampled_from(list(FILES))) for _ in range(FILES_TOGETHER)]
    return [(name, mutated_bytes(FILES[name], draw)) for name in names]


ENCODED = set()


@trials(MUTATIONS * 0.4 / FILES_TOGETHER)
@given(mutated_files())
def test_mutated_files_are_read_or_rejected(tokenizers, tmp_path_factory, files):
    folder = tmp_path_factory.mktemp("files")
    kept = {}
    for number, (name, content) in enumerate(files):
        path = folder / f"{number}-{name}"
        path.write_bytes(content)
        source = PairDataModule(str(path), on_bad_row="skip")
        message = refusal(source.load_rows)
        assert message is None or path.name in message
        if message is None:
            counted(source)
            kept |= {repr(row.messages): {"messages": list(row.messages)} for row in source.splits.rows["train"][0]}
    new = [kept[messages] for messages in kept.keys() - ENCODED]  # most rows of a file are unchanged
    if new:
        use(PairDataModule, new, "train", tokenizers[0], on_bad_row="skip", on_overlong="drop")
    ENCODED.update(kept)


def test_rows_and_files_are_valid_before_mutation(tokenizers, tmp_path):
    for datamodule, examples in ROWS.items():
        for row in examples:
            assert [use(datamodule, [row] * 3, "train", tokenizer) for tokenizer in tokenizers].count(None) > 0
    for name, content in FILES.items():
        path = tmp_path / name
        path.write_bytes(content)
        assert use(PairDataModule, str(path), name, tokenizers[1], on_bad_row="skip") is None
