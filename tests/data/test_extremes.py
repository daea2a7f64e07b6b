"""The rows with the largest token id and with the most tokens."""

import torch
from tiny import make_rows, make_tokenizer

from lightning_ft import PairDataModule, PreferenceDataModule
from lightning_ft.data.extremes import Extreme, largest_token, longest_row, rows_with

tokenizer = make_tokenizer()


def encoded(data):
    data.setup("fit")
    return data.splits


def pairs(rows, **options):
    return encoded(PairDataModule(rows, tokenizer=tokenizer, cache_dir=False, **options))


def every_row(splits):
    """The slow reference: split, source, row and ids of each row."""
    for name, parts in splits.encoded.items():
        for rows, part in zip(splits.rows[name], parts, strict=True):
            for i, row in enumerate(rows):
                ids = torch.cat([part[i * part.per_row + k].input_ids for k in range(part.per_row)])
                yield name, row.source, row.row, ids


def test_largest_token_and_longest_row_agree_with_the_slow_reference():
    rows = make_rows(30)
    test = [{"input": "where is the lamp " * 9, "output": "fox"}, {"input": "zzz", "output": "ÿ"}]
    splits = pairs([rows[:20], rows[20:]], validation=0.2, test=test)
    slow = list(every_row(splits))
    most, longest = max(int(ids.max()) for *_, ids in slow), max(len(ids) for *_, ids in slow)
    largest, longest_found = largest_token(splits), longest_row(splits)
    assert (largest.value, longest_found.value) == (most, longest)
    assert (largest.split, largest.source, largest.row) in [tuple(r) for *r, ids in slow if int(ids.max()) == most]
    assert longest_found == Extreme(longest, "test", "test", 1)


def test_largest_token_finds_rows_of_later_record_batches():
    new = make_tokenizer()
    new.add_tokens(["<call>"])
    rows = [{"input": f"where {n}", "output": "fox"} for n in range(2100)]
    rows[2005]["output"] = "<call>"
    data = PairDataModule(rows, tokenizer=new, cache_dir=False)
    data.setup("fit")
    assert largest_token(data.splits) == Extreme(len(new) - 1, "train", "train", 2006)


def test_longest_row_skips_dropped_rows():
    rows = [{"input": "where", "output": "fox"}, {"input": "where " * 200, "output": "lamp"}]
    splits = pairs([*rows, {"input": "the lazy dog is where", "output": "lamp"}], max_length=64, on_overlong="drop")
    longest = longest_row(splits)
    assert (longest.row, longest.value) == (3, max(len(ids) for *_, ids in every_row(splits)))


def test_longest_row_of_a_preference_is_its_longer_side():
    rows = [{"prompt": "where", "chosen": "fox", "rejected": "fox and the lazy dog"}]
    rows.append({"prompt": "where", "chosen": "the quick brown fox jumps over the dog", "rejected": "fox"})
    data = PreferenceDataModule(rows, tokenizer=tokenizer, cache_dir=False)
    splits = encoded(data)
    part = splits.encoded["train"][0]
    assert longest_row(splits) == Extreme(len(part[2]), "train", "train", 2)


def test_extremes_without_encoded_rows_are_none():
    splits = PairDataModule(make_rows(2)).splits
    assert largest_token(splits) is None
    assert longest_row(splits) is None


def test_rows_with_counts_rows_not_occurrences():
    splits = pairs([make_rows(12), make_rows(5)])
    tokens = [2, 5, 300, 399, 10**6]
    slow = [set(ids.tolist()) for *_, ids in every_row(splits)]
    counts = {token: sum(token in ids for ids in slow) for token in tokens}
    assert rows_with(splits.encoded["train"], tokens) == {token: n for token, n in counts.items() if n}
    assert counts[2] == 17
    examples = [part[i] for part in splits.encoded["train"] for i in range(len(part))]
    answers = [set(each.input_ids[each.supervised].tolist()) for each in examples]
    counts = {token: sum(token in ids for ids in answers) for token in tokens}
    found = rows_with(splits.encoded["train"], tokens, supervised=True)
    assert found == {token: n for token, n in counts.items() if n}


def test_rows_with_counts_a_pair_once():
    rows = [{"prompt": "where", "chosen": "fox", "rejected": "dog"}] * 3
    splits = encoded(PreferenceDataModule(rows, tokenizer=tokenizer, cache_dir=False))
    assert rows_with(splits.encoded["train"], [2]) == {2: 3}
