"""Rows in the formats of other trainers and APIs keep their meaning, or are refused with a remedy that works."""

import ast
import re

import pytest

from lightning_ft.data.preference_rows import PREFERENCES
from lightning_ft.data.prompts import PROMPTS
from lightning_ft.data.row_types import Pairs
from lightning_ft.data.rows import load_source
from lightning_ft.data.split_report import SplitReport
from lightning_ft.errors import DataError

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
CALL_TEXT = '{"name": "weather", "arguments": {"city": "Oslo"}}'
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}
U, A, S, T = "user", "assistant", "system", "tool"
ROW_TYPES = {"pairs": Pairs(), "preferences": PREFERENCES, "prompts": PROMPTS}


def user(content="q", **more):
    return {"role": "user", "content": content, **more}


def answer(content="a", **more):
    return {"role": "assistant", "content": content, **more}


def load(row, row_type="pairs", **options):
    report = SplitReport()
    try:
        rows, problems = load_source([row], "train", "train", row_type=ROW_TYPES[row_type], report=report, **options)
    except DataError as error:  # for the columns of all rows
        return None, str(error), report
    return (rows[0] if rows else None), (str(problems[0]) if problems else None), report


def short(messages):
    return [(m["role"], m["content"] or m.get("tool_calls")) for m in messages]


# ---------------------------------------------------------------- pairs that are read

ACCEPTED = {
    "TRL, tools": (
        {
            "messages": [
                user(),
                answer("", tool_calls=[CALL]),
                {"role": T, "name": "weather", "content": "3"},
                answer(),
            ],
            "tools": [TOOL],
        },
        [(U, "q"), (A, [CALL]), (T, "3"), (A, "a")],
        {"tools": [TOOL]},
    ),
    "TRL, tools as text": (
        {"messages": [user(), answer()], "tools": '[{"name": "weather", "parameters": {}}]'},
        [(U, "q"), (A, "a")],
        {"tools": [TOOL]},
    ),
    "TRL, prompt and completion": ({"prompt": [user()], "completion": [answer()]}, [(U, "q"), (A, "a")], {}),
    "TRL, template kwargs": (
        {"messages": [user(), answer()], "chat_template_kwargs": {"enable_thinking": False, "xml_tools": None}},
        [(U, "q"), (A, "a")],
        {"enable_thinking": False},
    ),
    "template kwargs as text": (
        {"input": "q", "output": "a", "chat_template_kwargs": '{"enable_thinking": true}'},
        [(U, "q"), (A, "a")],
        {"enable_thinking": True},
    ),
    "LLaMA-Factory, Alpaca": (
        {"instruction": "i", "input": "x", "output": "a", "system": "s", "history": [["q1", "a1"], ["q2", "a2"]]},
        [(S, "s"), (U, "q1"), (A, "a1"), (U, "q2"), (A, "a2"), (U, "i\n\nx"), (A, "a")],
        {},
    ),
    "history as text": (
        {"prompt": "q", "completion": "a", "history": '[["q1", "a1"]]'},
        [(U, "q1"), (A, "a1"), (U, "q"), (A, "a")],
        {},
    ),
    "LLaMA-Factory, ShareGPT": (
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": CALL_TEXT},
                {"from": "observation", "value": "3"},
                {"from": "gpt", "value": "a"},
            ],
            "system": "s",
            "tools": '[{"name": "weather", "parameters": {}}]',
        },
        [(S, "s"), (U, "q"), (A, [CALL]), (T, "3"), (A, "a")],
        {"tools": [TOOL]},
    ),
    "Hermes, calls as text": (
        {"conversations": [{"from": f, "value": f} for f in ("system", "human", "gpt", "tool", "gpt")], "tools": "[]"},
        [(S, "system"), (U, "human"), (A, "gpt"), (T, "tool"), (A, "gpt")],
        {},
    ),
    "ms-swift": (
        {
            "messages": [
                user(),
                {"role": "tool_call", "content": CALL_TEXT},
                {"role": "tool_response", "content": "3"},
                answer(),
            ]
        },
        [(U, "q"), (A, [CALL]), (T, "3"), (A, "a")],
        {},
    ),
    "OpenAI": (
        {
            "messages": [{"role": "developer", "content": "s"}, user(name="Bob"), answer(weight=1, refusal=None)],
            "parallel_tool_calls": False,
        },
        [(S, "s"), (U, "q"), (A, "a")],
        {},
    ),
    "Bedrock": (
        {
            "system": [{"text": "s"}],
            "messages": [{"role": U, "content": [{"text": "q"}]}, {"role": A, "content": [{"text": "a"}]}],
        },
        [(S, "s"), (U, "q"), (A, "a")],
        {},
    ),
    "UltraChat": ({"prompt": "q", "prompt_id": "7", "messages": [user(), answer()]}, [(U, "q"), (A, "a")], {}),
    "Alpaca with its filled template": (
        {"instruction": "i", "input": "", "output": "a", "prompt": "Below is: i"},
        [(U, "i"), (A, "a")],
        {},
    ),
    "one message instead of a list": ({"prompt": user(), "completion": answer()}, [(U, "q"), (A, "a")], {}),
    "the same system turn twice": (
        {"system": "s", "messages": [{"role": S, "content": "s"}, user(), answer()]},
        [(S, "s"), (U, "q"), (A, "a")],
        {},
    ),
    "a topic called label": (
        {"input": "q", "output": "a", "label": "billing", "images": [], "weight": None, "reasoning": "on"},
        [(U, "q"), (A, "a")],
        {},
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_pairs_of_other_formats_are_read(name):
    source_row, messages, kwargs = ACCEPTED[name]
    row, problem, _ = load(source_row)
    assert problem is None
    assert short(row.messages) == messages
    assert row.template_kwargs == kwargs


def test_ignored_columns_are_logged_once_and_reported(caplog):
    rows = [{"messages": [user(name="Bob", ts=3), answer()], "score": 0.5, "tags": None}] * 3
    report = SplitReport()
    with caplog.at_level("INFO"):
        load_source(rows, "a.jsonl", "train", report=report)
    assert report.ignored == ["messages.name", "messages.ts", "score", "tags"]
    assert caplog.text.count("a.jsonl: ignored columns: messages.name, messages.ts, score, tags") == 1


def test_template_kwargs_are_defaults_of_rows():
    rows, _ = load_source(
        [
            {"input": "q", "output": "a"},
            {"input": "q", "output": "a", "chat_template_kwargs": {"enable_thinking": True}},
        ],
        "train",
        "train",
        template_kwargs={"enable_thinking": False, "x": 1},
    )
    assert [row.template_kwargs for row in rows] == [
        {"enable_thinking": False, "x": 1},
        {"enable_thinking": True, "x": 1},
    ]


# ---------------------------------------------------------------- pairs that are refused

PAIR = {"input": "q", "output": "a"}
TALK = {"messages": [user(), answer()]}
REFUSED = {
    "images": ({**TALK, "images": ["x.png"]}, "column 'images' isn't supported", "Only text"),
    "video": ({**TALK, "video": {"path": "x"}}, "column 'video' isn't supported", "Only text"),
    "functions": ({**TALK, "functions": [TOOL["function"]]}, "column 'functions'", "columns={'tools': 'functions'}"),
    "label": ({**PAIR, "label": True}, "column 'label'", "PreferenceDataModule"),
    "label in a CSV file": ({**PAIR, "label": "0"}, "column 'label'", "PreferenceDataModule"),
    "KTO tag": ({"instruction": "q", "output": "a", "kto_tag": False}, "column 'kto_tag'", "PreferenceDataModule"),
    "rejected": ({**TALK, "rejected": answer("b")}, "column 'rejected'", "PreferenceDataModule"),
    "ms-swift's rejected": ({**TALK, "rejected_response": "b"}, "column 'rejected_response'", "PreferenceDataModule"),
    "weight": ({**PAIR, "weight": 0.5}, "column 'weight'", "repeat or remove rows"),
    "weight 0": ({**PAIR, "weight": 0}, "column 'weight'", "repeat or remove rows"),
    "history": ({**TALK, "history": [["q", "a"]]}, "column 'history'", "Write the earlier turns into the messages"),
    "system_prompt": ({**PAIR, "system_prompt": "s"}, "column 'system_prompt'", "{'system': 'system_prompt'}"),
    "documents": ({**TALK, "documents": [{"title": "t"}]}, "column 'documents'", "chat_template_kwargs"),
    "enable_thinking": ({**TALK, "enable_thinking": True}, "column 'enable_thinking'", "chat_template_kwargs"),
    "reasoning": ({**PAIR, "reasoning": "two and two"}, "column 'reasoning'", "'reasoning_content': ..."),
    "tokens": ({**TALK, "input_ids": [1, 2], "labels": [-100, 2]}, "column 'input_ids'", "tokenized from their text"),
    "labels": ({**TALK, "labels": [-100, 2]}, "column 'labels'", "tokenized from their text"),
    "suffix": ({"prompt": "q", "completion": "a", "suffix": "b"}, "column 'suffix'", "into the question"),
    "two systems": (
        {"system": "x", "messages": [{"role": S, "content": "y"}, user(), answer()]},
        "a second system turn",
        "Keep one",
    ),
    "own variables": (
        {**TALK, "chat_template_kwargs": {"add_generation_prompt": True}},
        "'add_generation_prompt'",
        "Remove it",
    ),
    "kwargs as a list": ({**TALK, "chat_template_kwargs": [1]}, "wrong type", "Expected an object"),
    "tools as a word": ({**TALK, "tools": "weather"}, "not a tool", "JSON schemas"),
    "two lists of tools": (
        {**TALK, "tools": [TOOL], "chat_template_kwargs": {"tools": [CALL]}},
        "other tools",
        "Keep one",
    ),
    "history of one": ({**PAIR, "history": [["q"]]}, "not a pair of texts", "pairs of question and answer"),
    "nothing trained": ({"messages": [user(), answer(weight=0)]}, "no answer is trained on", "Leave the row out"),
    "context": (
        {**PAIR, "context": "c"},
        "column 'context' may be part of the prompt",
        "columns={'instruction': 'input', 'input': 'context'",
    ),
    "text with system": ({"text": "t", "system": "s"}, "'system' of a text", "into the text"),
    "text with tools": ({"text": "t", "tools": [TOOL]}, "'tools' of a text", "into the text"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_columns_of_pairs_are_rejected_by_name(name):
    source_row, reason, fix = REFUSED[name]
    row, problem, _ = load(source_row)
    assert row is None
    assert problem.startswith("train, row 1")
    assert reason in problem
    assert fix in problem


def proposed(problem):
    return ast.literal_eval(re.search(r"columns=(\{[^}]*\})", problem).group(1))


@pytest.mark.parametrize(
    ("source_row", "messages"),
    [
        ({**PAIR, "context": "c"}, [(U, "q\n\nc"), (A, "a")]),
        ({**PAIR, "prompt": "do it"}, [(U, "do it\n\nq"), (A, "a")]),
        ({"prompt": "q", "completion": "a", "context": "c"}, [(U, "q\n\nc"), (A, "a")]),
        ({"instruction": "q", "output": "a", "context": "c"}, [(U, "q\n\nc"), (A, "a")]),
        ({**PAIR, "system_prompt": "s"}, [(S, "s"), (U, "q"), (A, "a")]),
    ],
)
def test_proposed_columns_of_a_refusal_work(source_row, messages):
    _, problem, _ = load(source_row)
    row, remaining, _ = load(source_row, columns=proposed(problem))
    assert remaining is None
    assert short(row.messages) == messages


def test_functions_renamed_to_tools_are_read():
    source_row = {**TALK, "functions": [TOOL["function"]]}
    row, problem, _ = load(source_row, columns=proposed(load(source_row)[1]))
    assert problem is None
    assert row.template_kwargs == {"tools": [TOOL]}


def test_columns_that_name_the_prompt_ignore_others():
    row, problem, report = load({**PAIR, "context": "c"}, columns={"input": "input"})
    assert problem is None
    assert short(row.messages) == [(U, "q"), (A, "a")]
    assert report.ignored == ["context"]


# ---------------------------------------------------------------- preferences

CHOSEN = {
    "TRL": {"prompt": [user()], "chosen": [answer("good")], "rejected": [answer("bad")]},
    "TRL, implicit": {"chosen": [user(), answer("good")], "rejected": [user(), answer("bad")]},
    "UltraFeedback": {
        "prompt": "q",
        "chosen": [user(), answer("good")],
        "rejected": [user(), answer("bad")],
        "messages": [user(), answer("good")],
    },
    "the chosen conversation again": {
        "messages": [user(), answer("good")],
        "chosen": [user(), answer("good")],
        "rejected": [user(), answer("bad")],
    },
    "LLaMA-Factory, ShareGPT": {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    },
    "LLaMA-Factory, Alpaca": {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"},
    "axolotl, chat_template": {"messages": [user()], "chosen": answer("good"), "rejected": answer("bad")},
    "axolotl, input": {"input": "q", "chosen": "good", "rejected": "bad"},
    "OpenAI": {
        "input": {"messages": [user()], "parallel_tool_calls": True},
        "preferred_output": [answer("good")],
        "non_preferred_output": [answer("bad")],
    },
}


@pytest.mark.parametrize("name", CHOSEN)
def test_preferences_of_other_formats_are_read(name):
    row, problem, _ = load(CHOSEN[name], "preferences")
    assert problem is None
    assert short(row.prompt) == [(U, "q")]
    assert [short(completion) for completion in row.completions] == [[(A, "good")], [(A, "bad")]]
    assert row.labels == (True, False)


@pytest.mark.parametrize(
    "source_row",
    [
        {"prompt": [user()], "completion": [answer()], "label": False},
        {"messages": [user(), answer()], "label": False},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "label": False},
        {"instruction": "q", "input": "", "output": "a", "label": False},
    ],
)
def test_labeled_completions_of_other_formats_are_read(source_row):
    row, problem, _ = load(source_row, "preferences")
    assert problem is None
    assert short(row.prompt) == [(U, "q")]
    assert short(row.completions[0]) == [(A, "a")]
    assert row.labels == (False,)


def test_preferences_may_have_tools_reasoning_and_calls():
    tools = {"tools": '[{"name": "weather", "parameters": {}}]', "chat_template_kwargs": {"enable_thinking": True}}
    sides = {"chosen": [answer("", tool_calls=[CALL])], "rejected": [answer("no", thinking="hm")]}
    row, problem, _ = load({"prompt": "q", "system": "s", **sides, **tools}, "preferences")
    assert problem is None
    assert row.template_kwargs == {"enable_thinking": True, "tools": [TOOL]}
    assert short(row.prompt) == [(S, "s"), (U, "q")]
    assert row.completions[0][0]["tool_calls"] == [CALL]
    assert row.completions[1][0]["reasoning_content"] == "hm"
    nested = {"input": {"messages": [user()], "tools": [TOOL], "x": 1}}
    nested |= {"preferred_output": [answer()], "non_preferred_output": [answer("b")]}
    row, problem, report = load(nested, "preferences")
    assert problem is None
    assert row.template_kwargs == {"tools": [TOOL]}
    assert report.ignored == ["input.x"]


PREFERENCE = {"prompt": "q", "chosen": "good", "rejected": "bad"}


@pytest.mark.parametrize(
    ("source_row", "reason", "fix"),
    [
        ({**PREFERENCE, "images": ["x"]}, "column 'images'", "Only text"),
        ({**PREFERENCE, "weight": 2}, "column 'weight'", "repeat or remove"),
        ({**PREFERENCE, "system_prompt": "s"}, "column 'system_prompt'", "{'system': 'system_prompt'}"),
        (
            {**PREFERENCE, "context": "c"},
            "column 'context' may be part of the prompt",
            "{'instruction': 'prompt', 'input': 'context'}",
        ),
        ({"prompt": [user()], "chosen": [answer(weight=0)], "rejected": "b"}, "isn't to be trained on", "the mark"),
        ({"messages": [user(), answer()], "chosen": "b", "rejected": "c"}, "prompt ends with an answer", "remove the"),
        ({"messages": [user()], "label": True}, "no answer to the last turn", "add the answer"),
        ({"prompt": [user([{"type": "image"}])], "chosen": "a", "rejected": "b"}, "part of type 'image'", "Only text"),
    ],
)
def test_unsupported_preferences_are_rejected_by_name(source_row, reason, fix):
    row, problem, _ = load(source_row, "preferences")
    assert row is None
    assert reason in problem
    assert fix in problem


def test_proposed_columns_of_a_refused_preference_work():
    source_row = {**PREFERENCE, "context": "c"}
    row, problem, _ = load(source_row, "preferences", columns=proposed(load(source_row, "preferences")[1]))
    assert problem is None
    assert short(row.prompt) == [(U, "q\n\nc")]


# ---------------------------------------------------------------- prompts


def test_prompts_pass_tools_to_the_template_and_the_rewards():
    source_row = {
        "prompt": [user()],
        "tools": [TOOL["function"]],
        "chat_template_kwargs": {"x": 1},
        "label": 1,
        "weight": 2,
    }
    row, problem, report = load(source_row, "prompts")
    assert problem is None
    assert row.template_kwargs == {"tools": [TOOL], "x": 1}
    assert row.columns == {name: value for name, value in source_row.items() if name != "prompt"}
    assert report.ignored == []


def test_prompts_may_end_with_a_tool_turn():
    source_row = {"messages": [user(), answer("", tool_calls=[CALL]), {"role": T, "content": "3"}]}
    row, problem, _ = load(source_row, "prompts")
    assert problem is None
    assert short(row.messages) == [(U, "q"), (A, [CALL]), (T, "3")]


@pytest.mark.parametrize("column", ["image", "images", "audio", "videos"])
def test_prompts_with_media_are_rejected(column):
    row, problem, _ = load({"prompt": "q", column: ["x"]}, "prompts")
    assert row is None
    assert f"column {column!r} isn't supported" in problem


# ---------------------------------------------------------------- formats that aren't read


@pytest.mark.parametrize(
    ("source_row", "row_type", "fix"),
    [
        ({"segments": [{"label": True, "text": "a"}]}, "pairs", "write each row as messages"),
        ({"contents": [{"role": "user", "parts": [{"text": "q"}]}]}, "pairs", "Write them as messages"),
        ({"prompt": "q", "completions": ["a"], "labels": [True]}, "preferences", "a row of its own"),
        ({"messages": [user(), answer()], "rejected_response": "b"}, "preferences", "that answer as 'chosen'"),
        ({"query": "q", "response": "a", "rejected_response": "b"}, "preferences", "that answer as 'chosen'"),
        (CHOSEN["OpenAI"], "pairs", "PreferenceDataModule"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "pairs", "PreferenceDataModule"),
    ],
)
def test_unsupported_formats_are_named(source_row, row_type, fix):
    row, problem, _ = load(source_row, row_type)
    assert row is None
    assert "no row format has these columns" in problem
    assert fix in problem


@pytest.mark.parametrize(
    "source_row",
    [
        {"instruction": "q", "input": "", "output": "a", "kto_tag": False},
        {"system": "s", "instruction": "q", "chosen_response": "good", "rejected_response": "bad"},
        {"query": "q", "chosen": "good", "rejected": "bad"},
    ],
)
def test_proposed_columns_of_foreign_preferences_work(source_row):
    row, problem, _ = load(source_row, "preferences")
    assert row is None
    assert "leaves out" not in problem
    row, problem, _ = load(source_row, "preferences", columns=proposed(problem))
    assert problem is None
    assert row.prompt[-1] == user()
    assert row.completions[0][0]["content"] in ("a", "good")


def test_rewritten_ms_swift_rows_are_read():
    source_row = {"prompt": [user()], "chosen": [answer("good")], "rejected_response": "bad"}
    row, problem, _ = load(source_row, "preferences", columns={"rejected": "rejected_response"})
    assert problem is None
    assert [short(completion) for completion in row.completions] == [[(A, "good")], [(A, "bad")]]
