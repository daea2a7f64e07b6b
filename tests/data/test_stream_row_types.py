"""Preferences and prompts that are read while training: each row has to be as the first ones are."""

import pytest
from recorder import BatchRecorder

from lightning_ft._lightning import Trainer
from lightning_ft.data import module
from lightning_ft.data.preferences import PreferenceDataModule
from lightning_ft.data.prompts import PromptDataModule
from lightning_ft.data.stream_plan import StreamPlan
from lightning_ft.errors import DataError


def test_preferences_are_streamed(stream, preferences, tokenizer, trainer_options):
    for rows in (preferences, [{**row, "margin": None} for row in preferences]):
        recorded = {}
        for streaming in (True, False):
            recorder = BatchRecorder(tokenizer)
            data = stream(rows, PreferenceDataModule, shuffle=False, streaming=streaming)
            Trainer(**trainer_options, max_epochs=1).fit(recorder, data)
            recorded[streaming] = [batch for _, batch in recorder.seen]
        assert len(recorded[True]) == len(recorded[False]) == 5
        for one, other in zip(recorded[True], recorded[False], strict=True):
            assert one.labels.tolist() == other.labels.tolist()
            assert (one.margins is None) == (other.margins is None)
            assert one.margins is None or one.margins.tolist() == other.margins.tolist()
            assert [ids.tolist() for ids in one.prompts] == [ids.tolist() for ids in other.prompts]


def test_preference_that_differs_from_the_first_is_a_bad_row(stream, preferences, labeled_completions):
    for rows, message in (
        ([{**row, "margin": None} for row in preferences] * 5 + preferences, "'margin': a margin in a stream whose"),
        (
            [{**row, "margin": None} for row in preferences[:12]] * 9 + preferences,
            "'margin': a margin in a stream whose",
        ),
    ):
        data = stream(lambda rows=rows: iter(rows), PreferenceDataModule)
        data.setup("fit")
        with pytest.raises(DataError, match=message):
            list(data.train_dataloader())
    data = stream(lambda: iter(preferences * 5 + labeled_completions), PreferenceDataModule)
    data.setup("fit")
    with pytest.raises(DataError, match="row 126: not a pair"):  # rows of another format
        list(data.train_dataloader())


def test_prompts_are_streamed_with_the_columns_of_the_first_rows(stream, pairs):
    rows = [dict(row) for row in pairs]
    del rows[20]["output"]
    data = stream(lambda: iter(rows), PromptDataModule, shuffle=False, batch_size=23)
    data.setup("fit")
    first, last = data.train_dataloader()
    assert first.columns == {"output": [row.get("output") for row in rows[:23]]}
    assert last.prompts == [rows[23]["input"]]


BAD_PROMPTS = {
    "column": ({"input": "a", "tests": "b"}, "row 121, 'tests': column 'tests' isn't in the first rows"),
    "type": ({"input": [{"role": "user", "content": "a"}]}, "row 121, 'prompt': messages in a stream whose first"),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_prompt_that_differs_from_the_first_is_a_bad_row(stream, pairs, name):
    bad, message = BAD_PROMPTS[name]
    data = stream(lambda: iter([*pairs * 5, bad]), PromptDataModule)
    data.setup("fit")
    with pytest.raises(DataError, match=message):
        list(data.train_dataloader())


def test_last_batch_of_prompts_without_rows_has_the_columns(stream, pairs, monkeypatch):
    def plan(*args, **options):
        return StreamPlan(*args, **{**options, "rank": 1, "world_size": 2})

    monkeypatch.setattr(module, "StreamPlan", plan)
    data = stream(lambda: iter(pairs[:11]), PromptDataModule)
    data.setup("fit")
    *_, last = data.train_dataloader()
    assert (last.prompts, last.columns) == ([], {"output": []})
