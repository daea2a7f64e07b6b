"""The common prompt of two whole texts."""

import pytest
from trl import extract_prompt

from lightning_ft.data.shared_prompts import shared_text, shared_turns


@pytest.mark.parametrize(
    ("left", "right", "prompt"),
    [
        ("Human: a\n\nAssistant: yes sir", "Human: a\n\nAssistant: no sir", "Human: a\n\nAssistant:"),
        ("A: I like cats", "A: I like cars", "A: I like"),  # words aren't split
        ("A: yes", "A: yesterday", "A:"),
        ("A: yes sir", "A: yes.", "A: yes"),
        ("A: yes", "A: yes sir", "A: yes"),  # an empty rest, which the caller rejects
        ("A:\nyes", "A:\nno", "A:\n"),  # only a space belongs to the answer, as in tokens
        ("A:  yes", "A:  no", "A: "),
        ("x 12", "x 13", "x"),
        ("über", "übel", ""),
        ("yes", "no", ""),
        ("", "no", ""),
        ("same", "same", "same"),
    ],
)
def test_shared_text_is_the_common_prefix(left, right, prompt):
    for one, other in ((left, right), (right, left)):
        shared, *rests = shared_text(one, other)
        assert shared == prompt
        assert [shared + rest for rest in rests] == [one, other]


def turns(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("left", "right", "shared"),
    [
        (turns("a", "b"), turns("a", "c"), 1),
        (turns("a", "b", "c", "d"), turns("a", "b", "c", "e"), 3),
        (
            turns("a", "b", "c", "d"),
            turns("a", "e", "c", "d"),
            1,
        ),  # equal turns after a difference aren't part of the prompt
        (turns("a", "b"), turns("a", "b", "c", "d"), 2),
        (turns("a", "b"), turns("c", "b"), 0),
    ],
)
def test_shared_turns_are_the_common_prefix(left, right, shared):
    prompt, *rests = shared_turns(left, right)
    assert prompt == left[:shared]
    assert rests == [left[shared:], right[shared:]]


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (turns("a", "b", "c", "d"), turns("a", "b", "c", "e")),
        (turns("a", "b", "x", "d"), turns("a", "c", "x", "d")),
        ("\n\nHuman: q\n\nAssistant: yes", "\n\nHuman: q\n\nAssistant: no"),
        ("A: It is blue.", "A: It is green."),
    ],
)
def test_shared_text_and_turns_match_trl(left, right):
    """TRL would split words that start with the same letters, so these cases have none."""
    theirs = extract_prompt({"chosen": left, "rejected": right})
    ours = shared_text(left, right) if isinstance(left, str) else shared_turns(left, right)
    assert ours == (theirs["prompt"], theirs["chosen"], theirs["rejected"])
