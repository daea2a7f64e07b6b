"""Cache of encoded rows: keyed by content, written atomically, and checked on reading."""

import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from full_disk import full_disk

from lightning_ft.data import cache
from lightning_ft.data import tokenize as tokenize_module
from lightning_ft.data.encode import encode
from lightning_ft.data.formats import Conversation
from lightning_ft.data.layout import Example
from lightning_ft.data.row_types import Pairs
from lightning_ft.data.tokenize import tokenize


def conversations(pairs, source="a.jsonl"):
    return [
        Conversation(
            ({"role": "user", "content": p["input"]}, {"role": "assistant", "content": p["output"]}), source, n, f"{n}"
        )
        for n, p in enumerate(pairs, 1)
    ]


@pytest.fixture
def encoded_times(monkeypatch):
    """Calls of the encoder, one entry per call."""
    times = []
    original = tokenize_module._encode_all
    monkeypatch.setattr(tokenize_module, "_encode_all", lambda *a: times.append(1) or original(*a))
    return times


OPTIONS = {"max_length": 64, "on_overlong": "error", "label": "train"}


def contents(rows):
    return [(rows[i].input_ids.tolist(), rows[i].supervised.tolist()) for i in range(len(rows))]


def test_cache_encodes_once_and_reads_equal_rows(tmp_path, tokenizer, pairs, encoded_times):
    rows = conversations(pairs)
    first, _ = tokenize(rows, tokenizer, folder=tmp_path, **OPTIONS)
    second, _ = tokenize(rows, tokenizer, folder=tmp_path, **OPTIONS)
    assert len(encoded_times) == 1
    memory, _ = tokenize(rows, tokenizer, folder=None, **OPTIONS)
    assert len(encoded_times) == 2
    assert contents(first) == contents(second) == contents(memory)
    assert [p for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    assert Path(first._table.cache_files[0]["filename"]).parent.parent == tmp_path  # memory-mapped


def test_cache_reads_entries_of_many_record_batches(tmp_path, tokenizer, pairs, monkeypatch):
    monkeypatch.setattr(cache, "_EXAMPLES_PER_WRITE", 5)
    rows = conversations(pairs)
    many, _ = tokenize(rows, tokenizer, folder=tmp_path, **OPTIONS)
    monkeypatch.undo()
    one, _ = tokenize(rows, tokenizer, folder=None, **OPTIONS)
    assert contents(many) == contents(one)
    assert many.lengths == [len(one[i]) for i in range(len(one))]
    assert many.supervised == [int(one[i].supervised.sum()) for i in range(len(one))]
    assert many.rows == list(range(24))


def test_cache_key_depends_on_everything_that_changes_tokens(tmp_path, make_tokenizer, pairs, encoded_times):
    rows = conversations(pairs)
    tokenizer = make_tokenizer()
    tokenize(rows, tokenizer, folder=tmp_path, **OPTIONS)
    other = {"role": "user", "content": "another"}
    splitting = make_tokenizer()
    splitting.split_special_tokens = True
    upper = make_tokenizer()
    upper.__class__ = type("Upper", (type(upper),), {})
    changed = [
        (rows, splitting, OPTIONS),
        (rows, upper, OPTIONS),
        ([*rows[:-1], Conversation((other, rows[-1].messages[1]), "a.jsonl", 24, "24")], tokenizer, OPTIONS),
        (rows[::-1], tokenizer, OPTIONS),
        (rows, make_tokenizer("llama"), OPTIONS),
        (rows, make_tokenizer(eos="<|pad|>"), OPTIONS),
        (rows, tokenizer, {**OPTIONS, "max_length": 65}),
        (rows, tokenizer, {**OPTIONS, "on_overlong": "drop"}),
    ]
    for count, (some, with_tokenizer, options) in enumerate(changed, 2):
        tokenize(some, with_tokenizer, folder=tmp_path, **options)
        assert len(encoded_times) == count
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=3)  # changes the state of a fast tokenizer
    tokenize(rows, tokenizer, folder=tmp_path, **{**OPTIONS, "label": "other"})
    assert len(encoded_times) == len(changed) + 1


def test_cached_problems_report_current_origins(tmp_path, tokenizer, pairs, encoded_times):
    long = {"input": "parcel " * 100, "output": "x"}
    options = {**OPTIONS, "on_overlong": "drop"}
    _, (first,) = tokenize(conversations([*pairs, long]), tokenizer, folder=tmp_path, **options)
    rows, (second,) = tokenize(conversations([*pairs, long], source="b.jsonl"), tokenizer, folder=tmp_path, **options)
    assert len(encoded_times) == 1
    assert (first.source, second.source) == ("a.jsonl", "b.jsonl")
    assert (first.row, second.row, second.reason) == (25, 25, "overlong prompt")
    assert len(rows) == 24


@pytest.mark.parametrize(
    "harm", ["cut", "no about", "about is no JSON", "about of others", "rows of others", "no rows"]
)
def test_cache_rewrites_a_broken_entry(tmp_path, tokenizer, pairs, encoded_times, harm):
    rows = conversations(pairs)
    good, _ = tokenize(rows, tokenizer, folder=tmp_path, **OPTIONS)
    expected = contents(good)
    del good
    (entry,) = tmp_path.iterdir()
    if harm == "cut":
        data = (entry / "rows.arrow").read_bytes()
        (entry / "rows.arrow").unlink()  # not overwritten, since it may be memory-mapped
        (entry / "rows.arrow").write_bytes(data[: len(data) // 2])
    elif harm == "no about":
        (entry / "about.json").unlink()
    elif harm == "about is no JSON":
        (entry / "about.json").write_text("{")
    elif harm.endswith("of others"):  # a copy of another entry, or of one of its files
        tokenize(rows[::-1], tokenizer, folder=tmp_path / "others", **OPTIONS)
        (other,) = (tmp_path / "others").iterdir()
        for name in ("rows.arrow", "about.json") if harm.startswith("about") else ("rows.arrow",):
            (entry / name).unlink()
            os.replace(other / name, entry / name)
        shutil.rmtree(tmp_path / "others")
        encoded_times.pop()
    else:
        (entry / "rows.arrow").unlink()
    again, _ = tokenize(rows, tokenizer, folder=tmp_path, **OPTIONS)
    assert len(encoded_times) == 2
    assert contents(again) == expected
    assert [p.name for p in tmp_path.iterdir()] == [entry.name]


def test_cache_keeps_rows_in_memory_when_the_disk_is_full(tmp_path, tokenizer, pairs, encoded_times):
    rows = conversations(pairs)
    expected = contents(tokenize(rows, tokenizer, folder=None, **OPTIONS)[0])
    with full_disk(100), pytest.warns(UserWarning, match=r"can't be written to .*\(File too large\)"):
        found, _ = tokenize(rows, tokenizer, folder=tmp_path, **OPTIONS)
    assert contents(found) == expected
    assert list(tmp_path.iterdir()) == []
    tokenize(rows, tokenizer, folder=tmp_path, **OPTIONS)
    assert len(encoded_times) == 4  # in memory, to the full disk, in memory, to the disk


def test_cache_writer_leaves_nothing_when_interrupted(tmp_path):
    example = Example(torch.arange(3), torch.ones(3, dtype=torch.bool))
    with pytest.raises(KeyboardInterrupt), cache.new_entry(tmp_path, "key") as entry:  # noqa: PT012
        entry.writer.write(example, row=0, truncated=False)
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    assert cache.load(tmp_path, "key") is None


def test_cache_accepts_two_writers_of_one_entry(tmp_path):
    example = Example(torch.arange(3), torch.ones(3, dtype=torch.bool))
    with cache.new_entry(tmp_path, "key") as one:
        one.writer.write(example, row=0, truncated=False)
        with cache.new_entry(tmp_path, "key") as two:
            two.writer.write(example, row=0, truncated=False)
    assert contents(one.result) == contents(two.result)
    assert [p.name for p in tmp_path.iterdir()] == ["key"]


@pytest.mark.parametrize("folder", [True, False], ids=["disk", "memory"])
def test_encoded_rows_can_be_pickled_for_workers(tmp_path, tokenizer, pairs, folder):
    rows, _ = tokenize(conversations(pairs), tokenizer, folder=tmp_path if folder else None, **OPTIONS)
    assert contents(pickle.loads(pickle.dumps(rows))) == contents(rows)
    if folder:  # by name, not by content
        assert len(pickle.dumps(rows)) < 20_000


def test_cache_separates_row_types(tmp_path, tokenizer, pairs, encoded_times):
    class Lasts(Pairs):
        name = "lasts"

        def encode(self, tokenizer, row, template):
            return encode(tokenizer, row.messages, template, last_only=True)

    user, assistant = conversations(pairs[:1])[0].messages
    rows = [Conversation((user, assistant, user, assistant), "a.jsonl", 1, "1")]
    every, _ = tokenize(rows, tokenizer, folder=tmp_path, **OPTIONS)
    last, _ = tokenize(rows, tokenizer, folder=tmp_path, row_type=Lasts(), **OPTIONS)
    assert len(encoded_times) == 2
    assert every.supervised == [2 * n for n in last.supervised]


def test_cache_stores_rows_of_several_examples(tmp_path):
    examples = [Example(torch.arange(n), torch.ones(n, dtype=torch.bool)) for n in (3, 4, 5, 6)]
    for folder in (tmp_path, None):
        with cache.new_entry(folder, "key") as entry:
            for index, example in enumerate(examples):
                entry.writer.write(example, row=5 * (index // 2), truncated=index > 1)
        rows = entry.result
        assert (len(rows), rows.num_rows, rows.per_row) == (4, 2, 2)
        assert rows.rows[:: rows.per_row] == [0, 5]
        assert rows.truncated[:: rows.per_row] == [False, True]
    with cache.new_entry(None, "key") as entry:
        pass
    assert (len(entry.result), entry.result.num_rows, entry.result.per_row) == (0, 0, 1)


def test_content_hash_depends_on_tokens_only(tmp_path, monkeypatch):
    def written(*rows, folder=None):
        with cache.new_entry(folder, "key") as entry:
            for index, (ids, supervised, row) in enumerate(rows):
                example = Example(torch.tensor(ids), torch.tensor(supervised))
                entry.writer.write(example, row=index if row is None else row, truncated=False)
        return entry.result

    one, other = ([1, 2], [False, True], None), ([3, 4], [True, True], None)
    key = cache.content_hash([written(one, other)])
    assert cache.content_hash([written(one, other, folder=tmp_path)]) == key
    monkeypatch.setattr(cache, "_EXAMPLES_PER_WRITE", 1)  # other chunks
    assert cache.content_hash([written(one, other)]) == key
    changed = [
        [written(other, one)],
        [written(one, ([3, 5], [True, True], None))],
        [written(one, ([3, 4], [False, True], None))],
        [written(one, ([3], [True], None))],
        [written(([1, 2, 3], [False, True, True], None), ([4], [True], None))],  # the same in a row
        [written((*one[:2], 0), (*other[:2], 0))],  # one row of two examples
        [written(one), written(other)],
    ]
    assert len({key, *map(cache.content_hash, changed)}) == 8


def test_cache_reads_every_row_of_a_large_entry(tmp_path):
    """Rows are written in groups of a thousand, so these are in several record batches."""
    written = [Example(torch.arange(n % 7 + 1) + n, torch.arange(n % 7 + 1) % 2 == 1) for n in range(2500)]
    with cache.new_entry(tmp_path, "many") as entry:
        for number, example in enumerate(written):
            entry.writer.write(example, row=number, truncated=False)
    for rows in (entry.result, pickle.loads(pickle.dumps(entry.result))):
        assert len(rows) == 2500
        for number in (0, 999, 1000, 1001, 1999, 2000, 2499):
            example = rows[number]
            assert torch.equal(example.input_ids, written[number].input_ids)
            assert torch.equal(example.supervised, written[number].supervised)
            assert (example.input_ids.dtype, example.supervised.dtype) == (torch.int64, torch.bool)
        with pytest.raises(IndexError, match="Example 2500 is out of range"):
            rows[2500]


def test_the_order_of_arguments_and_of_a_schema_is_part_of_the_key(tmp_path, make_tokenizer, encoded_times):
    template = (
        "{{- tools | tojson if tools -}}{%- for m in messages -%}{{- m.role -}}{{- m.content or '' -}}"
        "{%- for call in m.tool_calls or [] -%}{{- call.function.name -}}{{- call.function.arguments | tojson -}}"
        "{%- endfor -%}{{- '<|im_end|>' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- 'assistant' -}}{%- endif -%}"
    )
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template

    def targets(arguments, properties):
        call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
        tool = {"type": "function", "function": {"name": "weather", "parameters": properties}}
        turns = ({"role": "user", "content": "so?"}, {"role": "assistant", "content": "", "tool_calls": [call]})
        rows = [Conversation(turns, "a", 1, "1", template_kwargs={"tools": [tool]})]
        encoded, problems = tokenize(rows, tokenizer, folder=tmp_path, **{**OPTIONS, "max_length": 256})
        assert not problems
        return tokenizer.decode(encoded[0].input_ids), rows[0].key

    first = targets({"city": "Oslo", "unit": "C"}, {"a": 1, "b": 2})
    assert first == targets({"city": "Oslo", "unit": "C"}, {"a": 1, "b": 2})
    assert len(encoded_times) == 1
    other, third = (
        targets({"unit": "C", "city": "Oslo"}, {"a": 1, "b": 2}),
        targets({"city": "Oslo", "unit": "C"}, {"b": 2, "a": 1}),
    )
    assert '{"unit": "C", "city": "Oslo"}' in other[0]
    assert '{"b": 2, "a": 1}' in third[0]
    assert len({first[1], other[1], third[1]}) == 3
