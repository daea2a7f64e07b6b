"""What `lightning-ft preview` prints."""

import io

import pytest
import torch
from rich.console import Console

from lightning_ft.data.content import remedy_for
from lightning_ft.data.layout import Example
from lightning_ft.data.pairs import PairDataModule
from lightning_ft.data.preferences import PreferenceDataModule
from lightning_ft.data.preview import length_histogram, preview, supervised_text
from lightning_ft.data.prompts import PromptDataModule
from lightning_ft.data.templates import chat_template
from lightning_ft.errors import ConfigError


def printed(data, tokenizer=None, *, encoding="utf-8", color=False, **options):
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    console = Console(file=file, width=100, force_terminal=color, color_system="truecolor" if color else None)
    report = preview(data, tokenizer, console=console, **options)
    file.flush()
    return raw.getvalue().decode(encoding), report


def test_preview_marks_supervised_text_without_color(tokenizer, pairs):
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


def test_preview_colors_supervised_text(tokenizer, pairs):
    text, _ = printed(PairDataModule(pairs), tokenizer, color=True)
    assert "\x1b[1;32m«parcel 0" in text


def test_preview_lists_bad_and_overlong_rows(tokenizer, pairs):
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


def test_preview_prints_markup_verbatim(tokenizer):
    text, _ = printed(PairDataModule([{"input": "[bold]x[/bold]", "output": "[/red] :smile:"}]), tokenizer)
    assert "[bold]x[/bold]" in text
    assert "«[/red] :smile:<|im_end|>»" in text


def test_preview_needs_a_tokenizer(pairs):
    with pytest.raises(ConfigError, match="no tokenizer"):
        preview(PairDataModule(pairs))


def test_preview_marks_every_supervised_span(tokenizer):
    ids = tokenizer("a b c d", add_special_tokens=False)["input_ids"]
    example = Example(torch.tensor(ids), torch.tensor([i % 2 == 1 for i in range(len(ids))]))
    assert supervised_text(tokenizer, example, fancy=False).plain == "a>> <<b>> <<c>> <<d"


def test_preview_histogram_counts_every_row():
    lengths = [1, 2, 3, 100, 1200, 1200]
    lines = length_histogram(lengths, 2048).splitlines()
    assert sum(int(line.rsplit(" ", 1)[1]) for line in lines[1:]) == len(lengths)
    assert lines[0] == "tokens per row (longest 1,200, max_length 2,048)"


def test_preview_shows_the_prompt_of_preferences_once(tokenizer):
    rows = [{"prompt": "where is it", "chosen": "on [the] lamp", "rejected": "no", "margin": 1.5}] * 2
    text, report = printed(PreferenceDataModule(rows), tokenizer, examples=1)
    flat = " ".join(text.replace("│", " ").split())
    assert "assistant chosen: «on [the] lamp<|im_end|>» rejected: «no<|im_end|>» margin: 1.5" in flat
    assert flat.count("where is it") == 1
    assert "tokens per completion with its prompt (longest" in text
    assert report["train"].kept == 2
    supervised = len(tokenizer("on [the] lamp<|im_end|>no<|im_end|>")["input_ids"])
    assert f"{supervised} supervised" in flat


def test_preview_shows_labeled_completions_and_problems(tokenizer):
    rows = [{"prompt": "q", "completion": "lamp", "label": label} for label in (True, False, "maybe")]
    text, _ = printed(PreferenceDataModule(rows), tokenizer)
    flat = " ".join(text.replace("│", " ").split())
    assert "good: «lamp<|im_end|>»" in flat
    assert "bad: «lamp<|im_end|>»" in flat
    assert "left out: train, row 3, 'label': label isn't a boolean ('maybe')" in flat
    assert "fit would stop at 1 of these rows" in flat
    assert "tokens per row" in text


def test_preview_shows_prompts_with_their_columns(tokenizer):
    rows = [{"prompt": "where is it", "answer": ["[on]", 4]}, {"prompt": "what is it"}]
    text, _ = printed(PromptDataModule(rows), tokenizer)
    flat = " ".join(text.replace("│", " ").split())
    assert "where is it<|im_end|> <|im_start|>assistant answer: ['[on]', 4]" in flat
    assert "answer: None" in flat
    assert "1 no 'answer' column, treated as None" in flat


# ---------------------------------------------------------------- what rows may say

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TEMPLATE = (
    "{%- if mode -%}{{- '(' + mode + ')' -}}{%- endif -%}{%- if tools -%}{{- tools | tojson -}}{%- endif -%}"
    "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\n' -}}"
    "{%- if m.reasoning_content -%}{{- '(' + m.reasoning_content + ') ' -}}{%- endif -%}{{- m.content -}}"
    "{%- for c in m.tool_calls or [] -%}{{- c.function | tojson -}}{%- endfor -%}{{- '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)


def flat(data, tokenizer, **options):
    text, report = printed(data, tokenizer, **options)
    return " ".join(text.replace("│", " ").split()), report


def test_preview_shows_tools_calls_reasoning_and_template_kwargs(make_tokenizer):
    messages = [
        {"role": "user", "content": "where is it"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "lamp", "reasoning_content": "the fox"},
    ]
    row = {"messages": messages, "tools": [{"name": "weather"}], "chat_template_kwargs": {"mode": "quick"}}
    text, _ = flat(PairDataModule([row]), make_tokenizer(TEMPLATE))
    assert "(quick)[{" in text
    assert "«{" in text
    assert "«(the fox) lamp<|im_end|>»" in text
    assert "mode: 'quick'" in text
    assert "tools: [{'type': 'function', 'function': {'name': 'weather'}}]" in text


def test_preview_shows_answers_that_are_not_trained_on(tokenizer):
    turns = [
        ("user", "where", {}),
        ("assistant", "wrong", {"weight": 0}),
        ("user", "what", {}),
        ("assistant", "fox", {}),
    ]
    row = {"messages": [{"role": role, "content": content, **more} for role, content, more in turns]}
    text, _ = flat(PairDataModule([row]), tokenizer)
    assert "wrong<|im_end|>" in text
    assert "«wrong" not in text
    assert "«fox<|im_end|>»" in text
    assert "answers not trained on: 1" in text


def test_preview_shows_plain_texts(tokenizer):
    text, report = flat(PairDataModule([{"text": "the quick fox"}]), tokenizer)
    assert "«" in text
    assert "fox<|im_end|>»" in text
    assert report["train"].formats == {"train": "text"}


def test_preview_shows_template_kwargs_of_preferences(make_tokenizer):
    row = {"prompt": "where", "chosen": "lamp", "rejected": "fox", "chat_template_kwargs": {"mode": "quick"}}
    text, _ = flat(PreferenceDataModule([row]), make_tokenizer(TEMPLATE))
    assert "chosen: «lamp<|im_end|>»" in text
    assert "mode: 'quick'" in text


def test_preview_lists_ignored_columns(tokenizer):
    text, report = flat(PairDataModule([{"input": "where", "output": "fox", "topic": "x", "n": 3}]), tokenizer)
    assert "ignored columns: n, topic" in text
    assert report["train"].ignored == ["n", "topic"]


def test_preview_shows_notes_with_their_remedies_and_warns_of_none(make_tokenizer, recwarn):
    tokenizer = make_tokenizer(TEMPLATE.replace("m.content", "m.content | trim"))
    text, report = flat(PairDataModule([{"input": "where", "output": "  fox"}]), tokenizer)
    (note,) = [note for note in report["train"].notes if "white space" in note]
    assert f"1 │ {note}".replace("│", "").replace("  ", " ") in text or note in text
    remedy = remedy_for(note, chat_template(tokenizer))
    assert remedy is not None
    assert " ".join(remedy.split()) in text
    assert not [w for w in recwarn if note in str(w.message)]


NASTY = "a\x1b[2J\x1b]0;title\x07\u202eb"


def test_preview_escapes_control_characters(tokenizer):
    data = [
        PairDataModule([{"input": NASTY, "output": NASTY, NASTY: 1}, {"input": NASTY, "output": ""}]),
        PairDataModule([{"text": NASTY}]),
        PreferenceDataModule([{"prompt": NASTY, "chosen": NASTY, "rejected": "fox"}]),
        PromptDataModule([{"prompt": NASTY, "answer": NASTY, NASTY: [NASTY]}]),
    ]
    for module in data:
        text, _ = printed(module, tokenizer)
        assert not {"\x1b", "\x07", "\u202e"} & set(text)
        assert "\\x1b[2J" in text
        assert "title" in text
