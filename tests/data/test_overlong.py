"""Rows over `max_length`."""

from dataclasses import replace

import pytest
from chat_templates import SCENARIOS, template_tokenizer

from lightning_ft import PairDataModule
from lightning_ft.data.content import QUESTION_CUT
from lightning_ft.data.encode import encode_conversation, encode_prompt
from lightning_ft.data.formats import Conversation
from lightning_ft.data.overlong import RowEncoder
from lightning_ft.data.raw_rows import Problem
from lightning_ft.data.row_types import Pairs


def row(*texts, system=None):
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return Conversation(tuple(messages), "a.jsonl", 7, "a.jsonl:7")


LONG = " ".join(f"parcel {n}" for n in range(60))


@pytest.mark.parametrize("on_overlong", ["error", "drop"])
def test_overlong_prompt_is_reported_with_a_remedy(tokenizer, on_overlong):
    problem = RowEncoder(tokenizer, 64, on_overlong)(row(LONG, "lamp"))
    assert isinstance(problem, Problem)
    assert (problem.source, problem.row, problem.reason) == ("a.jsonl", 7, "overlong prompt")
    assert problem.detail.endswith("tokens, max_length=64")
    assert problem.fix == "Raise max_length, or pass on_overlong='drop' or 'truncate_prompt'."


@pytest.mark.parametrize("on_overlong", ["error", "drop", "truncate_prompt"])
def test_overlong_answer_is_reported_whatever_the_option(tokenizer, on_overlong):
    problem = RowEncoder(tokenizer, 64, on_overlong)(row("lamp", LONG))
    assert problem.reason == "overlong answer"
    assert "of them supervised" in problem.detail
    assert problem.fix.startswith("Raise max_length: answers, tool turns, system turns")


def test_overlong_system_turn_is_reported(tokenizer):
    problem = RowEncoder(tokenizer, 64, "truncate_prompt")(row("lamp", "dog", system=LONG))
    assert problem.reason == "overlong system turn"


@pytest.mark.parametrize(("system", "result", "reason"), [("s", LONG, "tool"), (LONG, "r", "system")])
def test_overlong_tool_turn_is_reported(system, result, reason):
    tokenizer = template_tokenizer("qwen3")
    question, call, found, reply = SCENARIOS["tools"][0]
    turns = ({"role": "system", "content": system}, question, call, {**found, "content": result}, reply)
    problem = RowEncoder(tokenizer, 400, "truncate_prompt")(Conversation(turns, "a.jsonl", 7, "a.jsonl:7"))
    assert problem.reason == f"overlong {reason} turn"
    assert "tool turns, system turns and the template's own tokens are never cut" in problem.fix


def test_truncation_accepts_exactly_max_length(tokenizer):
    length = len(encode_conversation(tokenizer, row(LONG, "lamp").messages))
    assert not isinstance(RowEncoder(tokenizer, length, "error")(row(LONG, "lamp")), Problem)
    assert isinstance(RowEncoder(tokenizer, length - 1, "error")(row(LONG, "lamp")), Problem)


@pytest.mark.parametrize("max_length", [24, 33, 64, 100])
@pytest.mark.parametrize("template", ["chatml", "chatml_without_markers", "llama", "none"])
def test_truncated_prompt_keeps_the_end_of_the_question_and_the_answer(make_tokenizer, template, max_length):
    tokenizer = make_tokenizer(template)
    system = "be brief" if template != "llama" and max_length > 50 else None
    given = row(LONG + " 🙂日本", "lamp", system=system)
    encoded, cut = RowEncoder(tokenizer, max_length, "truncate_prompt")(given)
    length = len(encoded.example)
    assert max_length - 8 < length <= max_length  # a character may be several tokens
    user = cut.messages[-2]["content"]
    assert (LONG + " 🙂日本").endswith(user)
    assert user
    assert cut.messages[:-2] == given.messages[:-2]
    assert cut.messages[-1] == given.messages[-1]
    supervised = encoded.example.input_ids[encoded.example.supervised]
    assert tokenizer.decode(supervised).strip() == "lamp<|im_end|>"
    prompt = encode_prompt(tokenizer, cut.messages[:-1])
    assert encoded.example.input_ids[: len(prompt)].tolist() == prompt


def test_truncation_drops_the_earliest_turn_first(tokenizer):
    given = row(LONG, "dog", LONG, "fox")
    whole = len(encode_conversation(tokenizer, given.messages))
    _, cut = RowEncoder(tokenizer, whole - 40, "truncate_prompt")(given)
    assert cut.messages[0]["content"] != LONG
    assert LONG.endswith(cut.messages[0]["content"])
    assert cut.messages[2]["content"] == LONG
    _, cut = RowEncoder(tokenizer, 100, "truncate_prompt")(given)
    assert cut.messages[0]["content"] == ""
    assert 0 < len(cut.messages[2]["content"]) < len(LONG)


def supervised_text(tokenizer, example):
    return tokenizer.decode(example.input_ids[example.supervised])


def test_truncation_supervises_no_answer_whose_question_is_cut(tokenizer):
    given = row(LONG, "dog", LONG, "fox")
    encoded, cut = RowEncoder(tokenizer, 100, "truncate_prompt")(given)
    assert len(encoded.example) <= 100
    assert [message["content"] for message in cut.messages[::2]] == ["", cut.messages[2]["content"]]
    assert supervised_text(tokenizer, encoded.example) == "fox<|im_end|>"
    assert encoded.notes == (QUESTION_CUT,)
    whole = len(encode_conversation(tokenizer, given.messages))
    encoded, _ = RowEncoder(tokenizer, whole - 40, "truncate_prompt")(given)  # a part of the first question is left
    assert supervised_text(tokenizer, encoded.example) == "dog<|im_end|>fox<|im_end|>"
    assert encoded.notes == ()
    encoded, _ = RowEncoder(tokenizer, 100, "truncate_prompt", Pairs("last"))(given)
    assert encoded.notes == ()  # the first answer wasn't supervised


def test_truncation_supervises_answers_to_what_is_left_of_several_user_turns(tokenizer):
    messages = row(LONG, "dog", LONG, "fox").messages
    rest = ({"role": "user", "content": "lamp"}, messages[1], {"role": "user", "content": "parcel"}, messages[3])
    length = len(encode_conversation(tokenizer, ({"role": "user", "content": ""}, *rest)))
    given = replace(row(), messages=(messages[0], *rest))
    encoded, cut = RowEncoder(tokenizer, length, "truncate_prompt")(given)
    assert [message["content"] for message in cut.messages[:2]] == ["", "lamp"]
    assert supervised_text(tokenizer, encoded.example) == "dog<|im_end|>fox<|im_end|>"
    blank = replace(row(), messages=({"role": "user", "content": ""}, *messages[1:]))  # nothing was cut there
    encoded, _ = RowEncoder(tokenizer, 100, "truncate_prompt")(blank)
    assert supervised_text(tokenizer, encoded.example) == "dog<|im_end|>fox<|im_end|>"


def test_truncated_rows_without_a_question_are_counted(tokenizer):
    rows = [{"messages": list(row(*turns).messages)} for turns in ((LONG, "dog", LONG, "fox"), ("lamp", "dog"))]
    data = PairDataModule(
        rows, tokenizer=tokenizer, max_length=100, on_overlong="truncate_prompt", cache_dir=False, batch_size=2
    )
    with pytest.warns(UserWarning, match=r"1 x truncated row with an earlier answer .* Raise max_length to train on"):
        data.setup("fit")
    report = data.report["train"]
    assert (report.truncated, report.notes[QUESTION_CUT]) == (1, 1)


def test_truncation_keeps_part_of_the_question(tokenizer):
    empty = len(encode_conversation(tokenizer, row("", "lamp").messages))
    assert RowEncoder(tokenizer, empty, "truncate_prompt")(row(LONG, "lamp")).reason == "overlong answer"
    problem = RowEncoder(tokenizer, empty + 1, "truncate_prompt")(row(LONG + "🙂", "lamp"))  # that is four tokens
    assert problem.fix == "Raise max_length: not even the end of the last question fits."
    _, cut = RowEncoder(tokenizer, empty + 1, "truncate_prompt")(row(LONG, "lamp"))
    assert cut.messages[0]["content"] == "9"


@pytest.mark.parametrize("on_overlong", ["error", "drop", "truncate_prompt"])
def test_overlong_row_is_recognized_where_the_template_refuses_turns_without_text(tokenizer, on_overlong):
    refusal = "{%- for m in messages if not m.content -%}{{- raise_exception('no content') -}}{%- endfor -%}"
    tokenizer.chat_template = refusal + tokenizer.chat_template
    result = RowEncoder(tokenizer, 64, on_overlong)(row(LONG, "lamp"))
    if on_overlong == "truncate_prompt":
        assert len(result[0].example) <= 64
    else:
        assert result.reason == "overlong prompt"


def test_template_errors_are_reported_with_the_row(make_tokenizer):
    problem = RowEncoder(make_tokenizer("drops_answers"), 64, "error")(row("a", "lamp"))
    assert (problem.row, problem.reason) == (7, "answer lost in the chat template")
    problem = RowEncoder(make_tokenizer("llama"), 64, "error")(row("a", "lamp", system="s"))
    assert (problem.row, problem.reason) == (7, "refused by the chat template")
    assert "System role not supported" in problem.detail
