"""Templates that fail or never end raise an error of this package within seconds."""

import time

import pytest
from chat_templates import answer, template_tokenizer, user

from lightning_ft.data import templates
from lightning_ft.data.encode import encode
from lightning_ft.data.templates import ChatTemplate
from lightning_ft.errors import TokenizerError

ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}BODY{% endfor %}{% endfor %}"


def with_source(source):
    tokenizer = template_tokenizer("phi4")
    tokenizer.chat_template = source
    return tokenizer, ChatTemplate(tokenizer)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ 1 / 0 }}", "fails on a conversation of user, assistant, with ZeroDivisionError"),
        ("{{ {}['a'].b }}", "refuses a conversation of user, assistant: 'dict object' has no attribute 'a'"),
        ("{{ messages[9].content.x }}", "refuses a conversation"),
        ("{{ 'a' + 1 }}", "with TypeError"),
        ("{{ nothing | tojson }}", "with TypeError"),
        ("{{ 'x' * 10**15 }}", "with MemoryError"),
        ("{{ range(10**9) | list }}", "with OverflowError"),
        ("{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(1) }}", "with RecursionError"),
        (
            "{% macro a(x) %}{{ b(x) }}{% endmacro %}{% macro b(x) %}{{ a(x) }}{% endmacro %}{{ a(1) }}",
            "with RecursionError",
        ),
        ("{% for i in range(9) recursive %}{{ loop(range(9)) }}{% endfor %}", "with RecursionError"),
        ("{% if 1 %}" * 3000 + "{% endif %}" * 3000, "with RecursionError"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "with RecursionError"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
        ("{{ messages.append(1) }}", "access to attribute 'append' of 'list' object is unsafe"),
        ("{{ raise_exception('not so') }}", "refuses a conversation of user, assistant: not so"),
        ("{% include 'other' %}", "fails on a conversation"),
        ("{% for %}", "refuses a conversation of user, assistant: Expected an expression"),
        ("{{ messages | nofilter }}", "No filter named 'nofilter'"),
        ("{{ strftime_now(1) }}", "with TypeError"),
    ],
)
def test_chat_template_error_names_the_failure(source, said):
    tokenizer, template = with_source(source)
    with pytest.raises(TokenizerError, match=said):
        encode(tokenizer, [user("hello"), answer("four")], template)


@pytest.mark.parametrize("body", ["", "{{ i }}", "{% set x = [i, j] %}"])
def test_chat_template_time_is_limited(body, monkeypatch):
    monkeypatch.setattr(templates, "MAX_SECONDS", 0.2)
    tokenizer, template = with_source(ENDLESS.replace("BODY", body))
    start = time.monotonic()
    with pytest.raises(TokenizerError, match=r"took over 0\.2 s for a conversation of user"):
        encode(tokenizer, [user("hello"), answer("four")], template)
    with pytest.raises(TokenizerError, match=r"took over 0\.2 s"):  # remembered, so it takes no time
        encode(tokenizer, [user("hello"), answer("five")], template)
    assert time.monotonic() - start < 10


def test_chat_template_memory_is_limited(monkeypatch):
    monkeypatch.setattr(templates, "MAX_MEMORY", 100_000_000)
    tokenizer, template = with_source(ENDLESS.replace("BODY", "{{ messages[0].content * 200 ~ j }}"))
    with pytest.raises(TokenizerError, match=r"took over 0\.1 GB of memory for a conversation of user"):
        encode(tokenizer, [user("hello"), answer("four")], template)


def test_chat_template_output_length_is_limited(monkeypatch):
    monkeypatch.setattr(templates, "MAX_CHARACTERS", 1000)
    _, template = with_source("{{ messages[0].content * 200 }}")
    with pytest.raises(TokenizerError, match=r"makes 2,200 characters of a conversation of user, more than 1,000"):
        template.render([user("eleven char")])
    assert template.render([user("four")]) == "four" * 200


def test_chat_template_reads_rejects_deep_nesting():
    _, template = with_source("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}")
    with pytest.raises(TokenizerError, match="not valid Jinja"):
        assert template.reads
