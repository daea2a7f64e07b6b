"""What `lightning-ft preview` prints."""

import io

import pytest
import torch
from rich.console import Console

from lightning_ft.data.layout import Example
from lightning_ft.data.pairs import PairDataModule
from lightning_ft.data.preferences import PreferenceDataModule
from lightning_ft.data.preview import length_histogram, preview, supervised_text
from lightning_ft.data.prompts import PromptDataModule
from lightning_ft.errors import ConfigError


def printed(data, tokenizer=None, *, encoding="utf-8", colour=False, **options):
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    console = Console(file=file, width=100, force_terminal=colour, color_system="truecolor" if colour else None)
    report = preview(data, tokenizer, console=console, **options)
    file.flush()
    return raw.getvalue().decode(encoding), report


def test_supervised_text_is_marked_without_colour(tokenizer, pairs):
    text, report = printed(PairDataModule(pairs, 0.25), tokenizer)
    assert "«parcel 0<|im_end|>»" in text
    assert "train, row 1: " in text
    assert "rows read" in text
    assert "tokens per row (longest" in text
    assert "validation" in text
    assert "\x1b" not in text
    assert "max_length 2,048" in text
    assert report["train"].kept == 18
    ascii_only, _ = printed(PairDataModule(pairs), tokenizer, encoding="ascii")
    assert ">>parcel 0<|im_end|><<" in ascii_only


def test_supervised_text_is_coloured(tokenizer, pairs):
    text, _ = printed(PairDataModule(pairs), tokenizer, colour=True)
    assert "\x1b[1;32m«parcel 0" in text


def test_bad_and_overlong_rows_are_listed_not_raised(tokenizer, pairs):
    rows = [*pairs, {"input": "[a]", "output": ""}, {"input": "x " * 300, "output": "y"}]
    text, report = printed(PairDataModule(rows, max_length=64), tokenizer)
    flat = " ".join(text.split())
    assert "left out: train, row 25, 'output': empty output. Fill it in or remove the row." in flat
    assert "left out: train, row 26: overlong prompt (" in flat
    assert "fit would stop at 2 of these rows" in flat
    assert report["train"].kept == 24
    text, report = printed(
        PairDataModule(rows, max_length=64, on_overlong="truncate_prompt", on_bad_row="skip"), tokenizer, examples=99
    )
    assert "fit would stop" not in text
    assert "prompts cut to max_length" in text
    assert "prompt cut" in text
    assert report["train"].truncated == 1


def test_text_with_markup_is_printed_as_it_is(tokenizer):
    text, _ = printed(PairDataModule([{"input": "[bold]x[/bold]", "output": "[/red] :smile:"}]), tokenizer)
    assert "[bold]x[/bold]" in text
    assert "«[/red] :smile:<|im_end|>»" in text


def test_it_needs_a_tokenizer(pairs):
    with pytest.raises(ConfigError, match="no tokenizer"):
        preview(PairDataModule(pairs))


def test_every_run_is_marked(tokenizer):
    ids = tokenizer("a b c d", add_special_tokens=False)["input_ids"]
    example = Example(torch.tensor(ids), torch.tensor([i % 2 == 1 for i in range(len(ids))]))
    assert supervised_text(tokenizer, example, fancy=False).plain == "a>> <<b>> <<c>> <<d"


def test_histogram_counts_every_row():
    lengths = [1, 2, 3, 100, 1200, 1200]
    lines = length_histogram(lengths, 2048).splitlines()
    assert sum(int(line.rsplit(" ", 1)[1]) for line in lines[1:]) == len(lengths)
    assert lines[0] == "tokens per row (longest 1,200, max_length 2,048)"


def test_preferences_are_shown_with_their_prompt_once(tokenizer):
    rows = [{"prompt": "where is it", "chosen": "on [the] lamp", "rejected": "no", "margin": 1.5}] * 2
    text, report = printed(PreferenceDataModule(rows), tokenizer, examples=1)
    flat = " ".join(text.replace("│", " ").split())
    assert "assistant chosen: «on [the] lamp<|im_end|>» rejected: «no<|im_end|>» margin: 1.5" in flat
    assert flat.count("where is it") == 1
    assert "tokens per completion with its prompt (longest" in text
    assert report["train"].kept == 2
    supervised = len(tokenizer("on [the] lamp<|im_end|>no<|im_end|>")["input_ids"])
    assert f"{supervised} supervised" in flat


def test_labelled_completions_and_problems_are_shown(tokenizer):
    rows = [{"prompt": "q", "completion": "lamp", "label": label} for label in (True, False, "maybe")]
    text, _ = printed(PreferenceDataModule(rows), tokenizer)
    flat = " ".join(text.replace("│", " ").split())
    assert "good: «lamp<|im_end|>»" in flat
    assert "bad: «lamp<|im_end|>»" in flat
    assert "left out: train, row 3, 'label': label is no bool ('maybe')" in flat
    assert "fit would stop at 1 of these rows" in flat
    assert "tokens per row" in text


def test_prompts_are_shown_with_their_columns(tokenizer):
    rows = [{"prompt": "where is it", "answer": ["[on]", 4]}, {"prompt": "what is it"}]
    text, _ = printed(PromptDataModule(rows), tokenizer)
    flat = " ".join(text.replace("│", " ").split())
    assert "where is it<|im_end|> <|im_start|>assistant answer: ['[on]', 4]" in flat
    assert "answer: None" in flat
    assert "1 no 'answer' column, taken for None" in flat
