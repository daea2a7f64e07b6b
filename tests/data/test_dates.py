"""Chat templates that write the current date."""

import datetime

import pytest
import transformers.utils.chat_template_utils as clock

from lightning_ft.data.dates import DATED, renders_today, today_remedy
from lightning_ft.data.pairs import PairDataModule
from lightning_ft.data.preferences import PreferenceDataModule
from lightning_ft.data.templates import chat_template

CHATML = (
    "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
DATED_TEMPLATE = "{%- if not date_string is defined -%}{%- set date_string = strftime_now('%d %b %Y') -%}{%- endif -%}"
DATED_TEMPLATE += "{{- 'Today: ' + date_string + '\n' -}}" + CHATML
ALWAYS = "{{- 'Today: ' + strftime_now('%d %b %Y') + '\n' -}}" + CHATML
WITHOUT_SYSTEM = "{%- if messages[0].role != 'system' -%}{{- 'Today: ' + strftime_now('%Y') -}}{%- endif -%}" + CHATML
ROWS = [{"input": "where is the lamp", "output": "parcel"}, {"input": "where is the dog", "output": "fox"}]
Q, S = [{"role": "user", "content": "q"}], [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]


def data(tokenizer, kind=PairDataModule, rows=ROWS, **options):
    found = kind(rows, tokenizer=tokenizer, **{"cache_dir": False, **options})
    found.setup("fit")
    return found


def test_renders_today_depends_on_the_template(make_tokenizer):
    template = chat_template(make_tokenizer(DATED_TEMPLATE))
    assert renders_today(template, Q, {})
    assert not renders_today(template, Q, {"date_string": "1 May 2026"})
    template = chat_template(make_tokenizer(WITHOUT_SYSTEM))
    assert renders_today(template, Q, {})
    assert not renders_today(template, S, {})
    template = chat_template(make_tokenizer(CHATML))
    assert not renders_today(template, Q, {})


def test_dated_template_is_reported_once(make_tokenizer, recwarn):
    found = data(make_tokenizer(DATED_TEMPLATE), validation=[{"input": "q", "output": "a"}])
    (message,) = [str(w.message) for w in recwarn if DATED in str(w.message)]
    assert message.startswith(f"train: 2 x {DATED}. The chat template writes today's date")
    assert "chat_template_kwargs={'date_string': '" in message
    assert found.report["validation"].notes[DATED] == 1


def test_dated_template_remedy_silences_the_warning(make_tokenizer, recwarn):
    tokenizer = make_tokenizer(DATED_TEMPLATE)
    assert "{'date_string': '" in today_remedy(chat_template(tokenizer))
    found = data(tokenizer, chat_template_kwargs={"date_string": "1 May 2026"})
    assert DATED not in found.report["train"].notes
    rows = [{**row, "chat_template_kwargs": {"date_string": "1 May 2026"}} for row in ROWS]
    found = data(tokenizer, rows=rows)
    assert DATED not in found.report["train"].notes
    assert not [w for w in recwarn if DATED in str(w.message)]
    assert "Today: 1 May 2026" in tokenizer.decode(found.splits.encoded["train"][0][0].input_ids)


def test_dated_template_without_a_date_variable_needs_another_template(make_tokenizer):
    tokenizer = make_tokenizer(ALWAYS)
    with pytest.warns(UserWarning, match="Pass a chat_template= that writes a fixed date"):
        data(tokenizer)
    found = data(tokenizer, chat_template=ALWAYS.replace("strftime_now('%d %b %Y')", "'1 May 2026'"))
    assert DATED not in found.report["train"].notes


def test_dated_template_is_reported_for_preferences(make_tokenizer):
    rows = [{"prompt": "where is the lamp", "chosen": "parcel", "rejected": "fox"}]
    with pytest.warns(UserWarning, match=DATED):
        data(make_tokenizer(DATED_TEMPLATE), PreferenceDataModule, rows)


def test_cache_ignores_tokens_of_another_day(make_tokenizer, monkeypatch, tmp_path):
    tools = [{"name": "f"}]
    only_with_tools = "{%- if tools -%}{{- 'Today: ' + strftime_now('%d %b %Y') + '\n' -}}{%- endif -%}" + CHATML
    for template, rows in ((DATED_TEMPLATE, ROWS), (only_with_tools, [{**row, "tools": tools} for row in ROWS])):
        tokenizer = make_tokenizer(template)
        for day in (5, 9):
            now = datetime.datetime(2026, 1, day)
            fixed = type("Clock", (datetime.datetime,), {"now": classmethod(lambda cls, tz=None, now=now: now)})
            monkeypatch.setattr(clock, "datetime", fixed)
            found = data(tokenizer, rows=rows, cache_dir=str(tmp_path))
            text = tokenizer.decode(found.splits.encoded["train"][0][0].input_ids)
            assert text.startswith(f"Today: 0{day} Jan 2026")
