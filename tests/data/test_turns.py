"""Reading messages: what each key means, and which are refused by name."""

import json

import pytest

from lightning_ft import PairDataModule, PreferenceDataModule, PromptDataModule
from lightning_ft.data.keys import is_nonempty
from lightning_ft.data.tool_calls import ToolCallError, read_calls, read_tools
from lightning_ft.data.turns import RowError, check_order, read_turns
from lightning_ft.errors import ConfigError, DataError

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def user(content="q", **more):
    return {"role": "user", "content": content, **more}


def answer(content="a", **more):
    return {"role": "assistant", "content": content, **more}


def one(turn):
    (message,) = read_turns([turn], "messages")
    return message


def error_of(*turns):
    with pytest.raises(RowError) as error:
        read_turns(list(turns), "messages")
    assert error.value.fix
    return error.value


# ---------------------------------------------------------------- tools


@pytest.mark.parametrize(
    "value",
    [
        [CALL],
        CALL,
        '[{"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}]',
        [{"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}],
        [{"name": "weather", "parameters": {"city": "Oslo"}}],
        ['{"name": "weather", "arguments": {"city": "Oslo"}}'],
    ],
)
def test_read_calls_accepts_every_form(value):
    assert read_calls(value) == [CALL]


def test_read_calls_keeps_ids_and_empty_arguments():
    calls = [{"id": "7", "type": "function", "function": {"name": "now", "arguments": ""}}]
    assert read_calls(calls) == [{"id": "7", "type": "function", "function": {"name": "now", "arguments": {}}}]
    assert read_calls(None) == read_calls("") == read_calls([]) == read_calls("[]") == []


@pytest.mark.parametrize(
    "value",
    ["weather(Oslo)", [CALL, {"name": ""}], [CALL, {"function": {"name": "f", "arguments": "{"}}], [CALL, 3]],
)
def test_read_calls_rejects_other_values(value):
    with pytest.raises(ToolCallError) as error:
        read_calls(value)
    assert error.value.index == (1 if isinstance(value, list) else 0)


@pytest.mark.parametrize(
    "value",
    [
        [TOOL],
        TOOL,
        [TOOL["function"]],
        '[{"name": "weather", "parameters": {"type": "object"}}]',
        ['{"name": "weather", "parameters": {"type": "object"}}'],
        [{"type": "function", "name": "weather", "parameters": {"type": "object"}}],
    ],
)
def test_read_tools_accepts_every_form(value):
    assert read_tools(value) == [TOOL]


def test_read_tools_rejects_other_values():
    assert read_tools(None) == read_tools("") == read_tools([]) == []
    for value in ("weather", [TOOL, "weather"], [TOOL, {}], [len]):
        with pytest.raises(ToolCallError):
            read_tools(value)


def test_properties_that_are_none_are_no_schema():
    schema = {"city": {"type": "string"}, "amount": None, "any": True}
    tool = {"name": "weather", "strict": None, "parameters": {"type": "object", "properties": schema}}
    (read,) = read_tools([tool])
    assert read["function"] == {
        **tool, "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "any": True}}
    }  # fmt: skip
    assert tool["parameters"]["properties"]["amount"] is None


@pytest.mark.parametrize("tools", ["row", "all rows"])
@pytest.mark.parametrize("data_module", [PairDataModule, PromptDataModule, PreferenceDataModule])
def test_arguments_that_arrow_adds_to_calls_are_left_out_and_named(data_module, tools):
    weather = {"name": "weather", "parameters": {"properties": {"city": {}, "unit": {}, "amount": None}}}
    pay = {"name": "pay", "parameters": {"properties": {"city": None, "unit": None, "amount": {}}}}
    arguments = {"city": "Oslo", "unit": None, "amount": None}
    turns = [
        user("so?"),
        answer("", tool_calls=[{"name": "weather", "arguments": arguments}, {"name": "other", "arguments": arguments}]),
        {"role": "tool", "content": "rain"},
        {"role": "tool", "content": "sun"},
    ]
    row = {
        PairDataModule: {"messages": [*turns, answer("a")]},
        PromptDataModule: {"messages": [*turns]},
        PreferenceDataModule: {"prompt": turns, "chosen": [answer("a")], "rejected": [answer("b")]},
    }[data_module]
    functions = [{"type": "function", "function": weather}, pay]
    if tools == "row":
        data = data_module([{**row, "tools": functions}])
    else:
        data = data_module([row], chat_template_kwargs={"tools": json.dumps(functions)})
    data.load_rows()
    read = data.splits.rows["train"][0][0]
    first, second = (read.prompt if data_module is PreferenceDataModule else read.messages)[1]["tool_calls"]
    assert first["function"]["arguments"] == {"city": "Oslo", "unit": None}
    assert second["function"]["arguments"] == arguments  # of a function that isn't among the tools
    assert data.report["train"].ignored == ["tool_calls.arguments.amount (None, and not in the tool)"]
    assert [list(tool["function"]["parameters"]["properties"]) for tool in read.template_kwargs["tools"]] == [
        ["city", "unit"],
        ["amount"],
    ]


def test_tools_for_all_rows_may_be_functions_and_a_tuple():
    def weather(city: str) -> str:
        """Tell the weather.

        Args:
            city: The city.
        """

    data = PairDataModule([{"input": "q", "output": "a"}], chat_template_kwargs={"tools": (weather, TOOL)})
    first, second = data.rules.template_kwargs["tools"]
    assert first["function"]["parameters"]["properties"] == {"city": {"type": "string", "description": "The city."}}
    assert second == TOOL


def test_tools_for_all_rows_that_are_none_are_refused():
    with pytest.raises(ConfigError, match=r"chat_template_kwargs: tools\[1\] isn't a tool: 'weather'"):
        PairDataModule([{"input": "q", "output": "a"}], chat_template_kwargs={"tools": [TOOL, "weather"]})


def test_read_turns_tool_calls_need_no_content():
    for content in ({}, {"content": None}, {"content": ""}):
        message = one({"role": "assistant", "tool_calls": [CALL], **content})
        assert message == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert one(answer("I look.", tool_calls=[CALL]))["content"] == "I look."


def test_read_turns_reads_tool_turns():
    assert one({"role": "tool", "name": "weather", "tool_call_id": "7", "content": "3"}) == {
        "role": "tool",
        "content": "3",
        "name": "weather",
        "tool_call_id": "7",
    }
    for role in ("tool", "observation", "function", "ipython", "tool_response"):
        assert one({"from": role, "value": "3"}) == {"role": "tool", "content": "3"}


@pytest.mark.parametrize("role", ["function_call", "tool_call"])
def test_read_turns_joins_call_turns(role):
    text = '{"name": "weather", "arguments": {"city": "Oslo"}}'
    assert one({"from": role, "value": text}) == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    turns = read_turns([user(), answer("I look."), *[{"role": role, "content": text}] * 2], "messages")
    assert turns[1:] == [{"role": "assistant", "content": "I look.", "tool_calls": [CALL, CALL]}]
    assert error_of({"from": role, "value": "weather(Oslo)"}).reason == "not a tool call"
    error = error_of(answer("I look.", weight=0), {"role": role, "content": text})
    assert error.reason == "contradicting marks"


def test_read_turns_rejects_misplaced_and_legacy_tool_calls():
    assert error_of(user(tool_calls=[CALL])).reason == "tool calls of a turn that isn't the assistant's"
    assert error_of(answer(tool_calls=["weather"])).field == "messages[0].tool_calls[0]"
    error = error_of(answer(None, function_call={"name": "weather", "arguments": "{}"}))
    assert (error.field, error.reason) == ("messages[0].function_call", "'function_call' isn't supported")
    assert "tool_calls" in error.fix


# ---------------------------------------------------------------- reasoning


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_read_turns_reads_reasoning(key):
    assert one(answer(**{key: "hm\n"})) == {"role": "assistant", "content": "a", "reasoning_content": "hm\n"}
    assert one(answer(**{key: " "})) == {"role": "assistant", "content": "a"}
    assert "isn't the assistant's" in error_of(user(**{key: "hm"})).reason
    assert error_of(answer(**{key: ["hm"]})).reason == "wrong type"


def test_read_turns_rejects_two_reasonings():
    assert one(answer(reasoning="hm", reasoning_content="hm"))["reasoning_content"] == "hm"
    assert error_of(answer(reasoning="hm", reasoning_content="ah")).reason == "two reasonings"


# ---------------------------------------------------------------- what is trained on


@pytest.mark.parametrize("key", ["weight", "train", "training", "loss"])
def test_read_turns_reads_training_marks(key):
    assert [one(answer(**{key: mark})).get("train", True) for mark in (0, 1, False, True, 0.0, 1.0, None)] == [
        False,
        True,
        False,
        True,
        False,
        True,
        True,
    ]
    for mark in (0.5, 2, -1, "0", "1", [1], float("nan")):
        error = error_of(answer(**{key: mark}))
        assert (error.field, error.reason) == (f"messages[0].{key}", "weight that is neither 0 nor 1")
    assert one(user(**{key: 0})) == user()
    assert error_of(user(**{key: 1})).reason == "a turn marked as trained that isn't the assistant's"


def test_read_turns_rejects_contradicting_marks():
    assert one(answer(weight=0, train=False))["train"] is False
    assert error_of(answer(weight=0, train=True)).reason == "contradicting marks"


# ---------------------------------------------------------------- contents


def test_read_turns_joins_text_parts():
    parts = [{"type": "text", "text": "a"}, {"type": "output_text", "text": "b"}, {"text": "c"}, "d"]
    assert one(answer(parts))["content"] == "abcd"
    ignored = set()
    read_turns([user([{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}])], "messages", ignored)
    assert ignored == {"content.cache_control"}


@pytest.mark.parametrize(
    ("part", "reason", "remedy"),
    [
        ({"type": "image_url", "image_url": "x"}, "content part of type 'image_url'", "remove the part"),
        ({"image": "x"}, "content part of type 'image'", "remove the part"),
        ({"type": "input_audio", "input_audio": {}}, "content part of type 'input_audio'", "remove the part"),
        ({"type": "thinking", "thinking": "hm"}, "content part of type 'thinking'", "'reasoning_content'"),
        ({"type": "tool_use", "name": "f", "input": {}}, "content part of type 'tool_use'", "tool_calls"),
        ({"type": "tool_result", "content": "3"}, "content part of type 'tool_result'", "role 'tool'"),
        ({"type": "text"}, "content part without a text", "JSON text"),
        ({"name": "f", "result": 3}, "content part without a text", "JSON text"),
        ({"type": "text", "text": "a", "train": False}, "'train' of a part isn't supported", "whole turns"),
        ({"type": "text", "text": "a", "weight": 0}, "'weight' of a part isn't supported", "whole turns"),
    ],
)
def test_read_turns_rejects_other_content_parts(part, reason, remedy):
    error = error_of(answer([{"type": "text", "text": "a"}, part]))
    assert error.field.startswith("messages[0].content[1]")
    assert error.reason == reason
    assert remedy in error.fix


def test_read_turns_rejects_object_content():
    error = error_of({"role": "tool", "content": {"degrees": 3}})
    assert (error.reason, error.fix) == ("wrong type", "Expected a string; write an object as JSON text.")


# ---------------------------------------------------------------- roles and other keys


@pytest.mark.parametrize(
    ("role", "meaning"),
    [("developer", "system"), ("human", "user"), ("prompter", "user"), ("gpt", "assistant"), ("model", "assistant")],
)
def test_read_turns_maps_foreign_roles(role, meaning):
    assert one({"role": role, "content": "x"}) == {"role": meaning, "content": "x"}


@pytest.mark.parametrize(
    ("role", "fix"),
    [("User", "'user'"), ("Chatbot", "'bot'"), ("narrator", "Expected"), (3, "Expected"), (["user"], "Did you mean")],
)
def test_read_turns_rejects_unknown_roles(role, fix):
    error = error_of({"role": role, "content": "x"})
    assert error.reason == "unknown role"
    assert fix in error.fix


REFUSED = (
    "image images audio video attachments input_audio function_call function_calls recipient tools functions prefix "
    "partial prefill thought thoughts think thinking_blocks reasoning_details reasoning_text train_detail refusal "
    "channel tool_plan"
)


@pytest.mark.parametrize("key", REFUSED.split())
def test_read_turns_rejects_keys_that_would_change_training(key):
    error = error_of(answer(**{key: "x"}))
    assert (error.field, error.reason) == (f"messages[0].{key}", f"{key!r} isn't supported")
    assert one(answer(**{key: None})) == answer()
    assert one(answer(**{key: []})) == answer()
    assert one(answer(**{key: False})) == answer()


@pytest.mark.parametrize("key", ["loss_mask", "mask", "masked", "loss_scale"])
def test_read_turns_rejects_masks_of_any_value(key):
    for value in (0, 1, False, True):
        assert error_of(answer(**{key: value})).reason == f"{key!r} isn't supported"
    assert one(answer(**{key: None})) == answer()


def test_read_turns_lists_ignored_keys():
    ignored = set()
    turns = read_turns([user(id=7, name="Bob", note=None, tags=[]), answer(model="m", name="Eve")], "messages", ignored)
    assert turns == [user(), answer()]
    assert ignored == {"id", "name", "model"}


def test_read_turns_rejects_differing_names():
    assert one({"role": "user", "from": "human", "content": "a", "value": "a"}) == user("a")
    assert error_of({"role": "user", "from": "gpt", "content": "a"}).reason == "'role' and 'from' differ"
    assert error_of({"role": "user", "content": "a", "value": "b"}).reason == "'content' and 'value' differ"


@pytest.mark.parametrize("value", [1, "a", [0], {"a": [0]}, True])
def test_is_nonempty_is_true_for_values(value):
    assert is_nonempty(value)


# ---------------------------------------------------------------- order

U, A, S, T = "user", "assistant", "system", "tool"


def order(*roles, answered=True):
    check_order([{"role": role, "content": "x"} for role in roles], answered=answered)


@pytest.mark.parametrize(
    "roles", [(U, A), (S, U, A), (U, A, U, A), (U, A, T, A), (U, A, T, T, A, U, A), (S, U, A, T, A, T, A)]
)
def test_check_order_accepts(roles):
    order(*roles)


def test_check_order_accepts_prompts_that_end_with_a_tool():
    order(U, A, T, answered=False)
    order(S, U, answered=False)


@pytest.mark.parametrize(
    ("roles", "fix"),
    [
        ((A, U, A), "Remove the turns before the user's first"),
        ((U, U, A), "Join the turns of the user"),
        ((U, A, A), "Join the turns of the assistant"),
        ((U, A, S, U, A), "Move the system turn to the start"),
        ((S, S, U, A), "a system turn at most at the start"),
        ((U, T, A), "tools between an assistant's turn and its next one"),
        ((U, A, T, U, A), "tools between an assistant's turn and its next one"),
        ((T, A), "then a turn of the user"),
    ],
)
def test_check_order_errors_name_the_remedy(roles, fix):
    with pytest.raises(RowError) as error:
        order(*roles)
    assert error.value.reason == "wrong role order"
    assert error.value.detail == f"roles: {', '.join(roles)}"
    assert fix in error.value.fix


def test_check_order_requires_the_answer_last():
    for roles, reason in (((U,), "no assistant turn"), ((U, A, U), "no answer to the last turn"), ((U, A, T), None)):
        with pytest.raises(RowError) as error:
            order(*roles)
        assert error.value.reason == (reason or "no answer to the last turn")


PRINTED = str([user("is [{this}] it?"), answer()])
WRITTEN = json.dumps([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}])


@pytest.mark.parametrize(
    ("data_module", "row", "field"),
    [
        (PairDataModule, {"messages": WRITTEN}, "messages"),
        (PairDataModule, {"prompt": PRINTED, "completion": "a"}, "prompt"),
        (PairDataModule, {"input": "q", "output": json.dumps([answer()])}, "output"),
        (PromptDataModule, {"prompt": PRINTED}, "prompt"),
        (PreferenceDataModule, {"prompt": "q", "chosen": json.dumps([answer()]), "rejected": "b"}, "chosen"),
        (PreferenceDataModule, {"chosen": PRINTED, "rejected": PRINTED.replace("'a'", "'b'")}, "chosen"),
        (PreferenceDataModule, {"prompt": "q", "completion": f" {WRITTEN}\n", "label": True}, "completion"),
    ],
)
def test_messages_written_as_text_are_refused(data_module, row, field):
    with pytest.raises(DataError, match=f"train, row 1, '{field}': messages written as text .*json.loads"):
        data_module([row], cache_dir=False).load_rows()


@pytest.mark.parametrize("prompt", ["[{'role': 'user'}] is a message", '[{"role": "manager", "content": "x"}]', "[1]"])
def test_other_text_in_brackets_is_read(prompt):
    data = PromptDataModule([{"prompt": prompt}, {"prompt": [user(PRINTED)]}], cache_dir=False)
    data.load_rows()
    assert [row.messages[-1]["content"] for row in data.splits.rows["train"][0]] == [prompt, PRINTED]
