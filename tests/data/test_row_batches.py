"""`row_batches`: all rows of a split in order, the key of their tokens, and the number of encodings."""

import pytest
from preference_cases import expected, texts

from lightning_ft.data.preferences import PreferenceDataModule
from lightning_ft.errors import ConfigError


def test_row_batches_cover_all_rows_and_have_a_key(tokenizer, make_tokenizer, preferences, tmp_path):
    def made(given=preferences, **options):
        return PreferenceDataModule(given, **{"tokenizer": tokenizer, "cache_dir": False, "seed": 7, **options})

    data = made(validation=preferences[:5])
    batches = list(data.row_batches("train", 7))  # no setup() is needed
    assert [len(batch) for batch in batches] == [7, 7, 7, 3]
    assert [row for batch in batches for row in texts(tokenizer, batch)] == expected(preferences)
    assert [len(batch) for batch in data.row_batches("validation", 99)] == [5]
    with pytest.raises(ConfigError, match="PreferenceDataModule has no test rows: pass test="):
        list(data.row_batches("test", 2))

    key = data.encoded_key("train")
    assert data.encoded_key("validation") != key
    same = made(batch_size=3, shuffle=False, cache_dir=str(tmp_path), max_length=999)
    assert same.encoded_key("train") == made(cache_dir=str(tmp_path), max_length=999).encoded_key("train") == key
    assert made([{**row, "margin": 0} for row in preferences]).encoded_key("train") == key  # the margin has no tokens
    others = [
        made(preferences[::-1]),
        made(preferences[:-1]),
        made([{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in preferences]),
        made(tokenizer=make_tokenizer("llama")),
        made([*preferences[:-1], {**preferences[-1], "prompt": "where is it"}]),
    ]
    keys = [other.encoded_key("train") for other in others]
    assert len({key, *keys}) == 6


def test_precomputed_rows_are_encoded_once(tokenizer, preferences, tmp_path, monkeypatch):
    from lightning_ft.data import tokenize

    times = []
    original = tokenize._encode_all
    monkeypatch.setattr(tokenize, "_encode_all", lambda *a: times.append(1) or original(*a))

    def batches(given):
        data = PreferenceDataModule(given, tokenizer=tokenizer, cache_dir=str(tmp_path), batch_size=7)
        data.setup("fit")
        return [texts(tokenizer, batch) for batch in data.train_dataloader()]

    first = batches(preferences)
    assert batches(preferences) == first
    assert len(times) == 1
    changed = batches([{**row, "margin": 5.0} for row in preferences])  # margins aren't in the cache
    assert len(times) == 1
    assert {row[2] for batch in changed for row in batch} == {5.0}
    batches([{**row, "rejected": "lamp"} for row in preferences])
    assert len(times) == 2
