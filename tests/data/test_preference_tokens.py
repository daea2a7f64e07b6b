"""Tokens of preferences: the shared prompt, the supervised tokens, and truncation."""

import pytest
import torch
from preference_cases import PAIRS, S, answer, labeled, pair, read, talk

from lightning_ft.data.encode import Encoded, encode_conversation, encode_prompt
from lightning_ft.data.layout import Example
from lightning_ft.data.overlong import RowEncoder
from lightning_ft.data.preference_rows import PREFERENCES, split_shared
from lightning_ft.data.raw_rows import Problem
from lightning_ft.data.templates import set_chat_template
from lightning_ft.data.turns import RowError


def encoded(tokenizer, row, max_length=512, on_overlong="error"):
    result = RowEncoder(tokenizer, max_length, on_overlong, PREFERENCES)(read(row))
    assert not isinstance(result, Problem), result
    return result


TEMPLATES = ["chatml", "chatml_without_markers", "llama", "headers_only", "none", "text"]


@pytest.mark.parametrize(
    ("template", "name"),
    [(t, n) for t in TEMPLATES for n in PAIRS if t != "llama" or PAIRS[n][1][0][0] != S],  # llama refuses system turns
)
def test_last_turn_is_supervised_and_prompt_is_shared(make_tokenizer, template, name):
    """Compared with the two conversations encoded separately."""
    tokenizer = make_tokenizer(template)
    if template == "text":
        set_chat_template(tokenizer, "text")
    row = PAIRS[name][0]
    preference = read(row)
    result, _ = encoded(tokenizer, row)
    prompt, completions = split_shared(result.examples)
    assert len(prompt)
    assert completions[0].input_ids[0] != completions[1].input_ids[0] or any(c.supervised[0] for c in completions)
    for completion, side in zip(completions, preference.completions, strict=True):
        whole = encode_conversation(tokenizer, [*preference.prompt, *side])
        assert [*prompt.tolist(), *completion.input_ids.tolist()] == whole.input_ids.tolist()
        start = len(encode_prompt(tokenizer, [*preference.prompt, *side[:-1]])) - len(prompt)
        assert start >= 0
        expected = whole.supervised[len(prompt) :].clone()  # supervised in the last turn only
        expected[:start] = False
        assert completion.supervised.tolist() == expected.tolist()
        text = tokenizer.decode(completion.input_ids[completion.supervised])
        assert text.strip() == side[-1]["content"].strip() + "<|im_end|>"
    if all(len(side) == 1 for side in preference.completions):
        assert prompt.tolist() == encode_prompt(tokenizer, preference.prompt)


def test_shared_first_words_stay_in_the_completions(tokenizer):
    """`parcel` starts both answers: it isn't part of the prompt, but supervised in both."""
    result, _ = encoded(tokenizer, pair(chosen="parcel lamp", rejected="parcel kettle"))
    prompt, (chosen, rejected) = split_shared(result.examples)
    assert tokenizer.decode(prompt).endswith("assistant\n")
    assert tokenizer.decode(chosen.input_ids) == "parcel lamp<|im_end|>\n"
    assert tokenizer.decode(rejected.input_ids) == "parcel kettle<|im_end|>\n"
    assert chosen.supervised.tolist() == [True] * (len(chosen) - 1) + [False]  # the line break is the template's


def test_answer_that_is_a_prefix_of_the_other_is_encoded(tokenizer):
    result, _ = encoded(tokenizer, pair(chosen="lamp", rejected="lamp lamp"))
    _, (chosen, rejected) = split_shared(result.examples)
    assert [int(c.supervised.sum()) for c in (chosen, rejected)] == [len(chosen) - 1, len(rejected) - 1]


def test_labeled_completion_is_split_after_its_prompt(tokenizer):
    result, _ = encoded(tokenizer, labeled(prompt=talk("q", "r", "s")))
    prompt, (completion,) = split_shared(result.examples)
    assert prompt.tolist() == encode_prompt(tokenizer, talk("q", "r", "s"))
    assert tokenizer.decode(completion.input_ids) == "a<|im_end|>\n"


def test_completions_with_the_same_tokens_are_rejected(make_tokenizer):
    row = pair(chosen="lamp", rejected=" lamp ")
    encoded(make_tokenizer("chatml"), row)
    problem = RowEncoder(make_tokenizer("llama"), 64, "error", PREFERENCES)(read(row))
    assert problem.reason == "chosen and rejected become the same tokens"  # this template strips whitespace
    assert problem.row == 1


def test_check_encoded_requires_a_shared_token():
    sides = [Example(torch.tensor([first, 8]), torch.tensor([False, True])) for first in (5, 6)]
    with pytest.raises(RowError) as error:
        PREFERENCES.check_encoded(Encoded(tuple(sides), prompt_matches=True))
    assert error.value.reason == "no token is shared before the answers"


LONG = " ".join(f"parcel {n}" for n in range(60))


@pytest.mark.parametrize("longer", ["chosen", "rejected"])
@pytest.mark.parametrize("max_length", [48, 64, 100])
def test_prompt_is_truncated_for_the_longer_answer(tokenizer, longer, max_length):
    row = pair(prompt=LONG, **{longer: "lamp kettle invoice refund dog"})
    result, cut = encoded(tokenizer, row, max_length, "truncate_prompt")
    lengths = dict(zip(("chosen", "rejected"), map(len, result.examples), strict=True))
    assert max(lengths, key=lengths.get) == longer
    assert max_length - 8 < lengths[longer] <= max_length  # a character may be several tokens
    assert LONG.endswith(cut.prompt[0]["content"])
    assert cut.completions == read(row).completions
    prompt, completions = split_shared(result.examples)
    assert prompt.tolist() == encode_prompt(tokenizer, cut.prompt)
    for completion, side in zip(completions, cut.completions, strict=True):
        assert tokenizer.decode(completion.input_ids) == side[0]["content"] + "<|im_end|>\n"


def test_longer_completion_decides_whether_a_row_is_overlong(tokenizer):
    row = pair(prompt=LONG, rejected="lamp kettle invoice")
    shorter, longer = sorted(len(e) for e in encoded(tokenizer, row, 999)[0].examples)
    assert shorter < longer
    encoded(tokenizer, row, longer)
    problem = RowEncoder(tokenizer, longer - 1, "error", PREFERENCES)(read(row))
    assert problem.reason == "overlong prompt"
    assert problem.detail == f"{longer} tokens, max_length={longer - 1}"


@pytest.mark.parametrize("on_overlong", ["error", "drop", "truncate_prompt"])
def test_answers_are_never_truncated(tokenizer, on_overlong):
    for side in ("chosen", "rejected"):
        problem = RowEncoder(tokenizer, 64, on_overlong, PREFERENCES)(read(pair(**{side: LONG})))
        assert problem.reason == "overlong answer"


def test_completion_turns_are_never_truncated(tokenizer):
    row = pair(prompt="q " * 40, chosen=[*answer("a"), *talk("parcel " * 20, "b")])
    result, cut = encoded(tokenizer, row, 64, "truncate_prompt")
    assert len(cut.prompt[0]["content"]) < 80
    assert cut.completions == read(row).completions
    assert max(map(len, result.examples)) <= 64
