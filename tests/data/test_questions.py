"""Keys of questions: which conversations have the same question."""

import pytest

from lightning_ft.data.formats import Conversation
from lightning_ft.data.overlap import question_keys, row_questions


def system(text):
    return {"role": "system", "content": text}


def user(text, **more):
    return {"role": "user", "content": text, **more}


def answer(text, **more):
    return {"role": "assistant", "content": text, **more}


def call(city, name="weather", number="call_1"):
    return {"id": number, "type": "function", "function": {"name": name, "arguments": {"city": city}}}


def key(*messages):
    return question_keys(messages)[-1]


QUESTION = key(user("Where is it?"))


@pytest.mark.parametrize(
    "messages",
    [
        [system("Be brief."), user("Where is it?")],
        [{"role": "developer", "content": "Be brief."}, user("Where is it?")],
        [user("  Where\tis\n\nit? ")],
        [user("Where is\u00a0it?", name="Ann")],
        [user("Where is it?"), answer("Here.")],
        [user("Where is it?"), answer("", tool_calls=[call("Rome")]), {"role": "tool", "content": "12 degrees"}],
    ],
)
def test_question_keys_are_equal_for_the_same_question(messages):
    assert key(*messages) == QUESTION


@pytest.mark.parametrize(
    "messages",
    [
        [user("where is it?")],
        [user("Where is it")],
        [user("Whereis it?")],
        [user("Hello"), answer("Hello"), user("Where is it?")],
        [user("Where is"), user("it?")],
    ],
)
def test_question_keys_differ_for_another_question(messages):
    assert key(*messages) != QUESTION


def test_question_keys_of_earlier_turns_are_those_of_prefixes():
    talk = [user("a"), answer("b"), user("c"), answer("d"), user("e")]
    keys = question_keys(talk)
    assert keys == [key(*talk[:1]), key(*talk[:3]), key(*talk)]
    assert len(set(keys)) == 3
    assert question_keys([*talk, answer("f")]) == keys
    assert question_keys([answer("a plain text")]) == question_keys([]) == []


def test_question_keys_depend_on_earlier_answers_but_not_on_reasoning():
    def key_with(reply):
        return key(user("a"), reply, user("c"))

    assert key_with(answer("b", reasoning_content="hm", train=False)) == key_with(answer(" b "))
    assert key_with(answer("b")) != key_with(answer("z"))
    assert key_with(answer("", tool_calls=[call("Rome", number="x")])) == key_with(
        answer("", tool_calls=[call("Rome")])
    )
    assert key_with(answer("", tool_calls=[call("Rome")])) != key_with(answer("", tool_calls=[call("Oslo")]))
    assert key_with(answer("", tool_calls=[call("Rome")])) != key_with(answer(""))


def test_question_keys_separate_turns():
    assert key(user("a\nassistant\nb")) != key(user("a"), answer("b"), user(""))
    assert question_keys([user("a lone \ud800 surrogate")])


def test_row_questions_of_a_plain_text_is_its_own_key():
    texts = [Conversation((answer(text),), "train", n, str(n)) for n, text in enumerate("aab")]
    keys = [row_questions(row) for row in texts]
    assert keys[0] == keys[1] != keys[2]
