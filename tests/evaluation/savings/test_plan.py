"""What a plan of a measurement says before anything is measured."""

import warnings
from dataclasses import replace

import pytest
from tiny import make_tokenizer

from lightning_ft.data.prompt_baseline import PromptBaseline
from lightning_ft.errors import SavingsError
from lightning_ft.evaluation.savings.measurement import SavingsMeasurement
from lightning_ft.evaluation.savings.plan import answer_plan
from lightning_ft.types import Message, Request

SHORT = [Request(str(n), (Message(role="user", content=f"where is {n}"),), "the lamp") for n in range(3)]
LONG = replace(SHORT[0], id="long", reference="the quick brown fox jumps over the lazy dog")


def warnings_of(requests, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        answer_plan(make_tokenizer(), requests, **options)
    return [str(warning.message) for warning in caught if "reference answers" in str(warning.message)]


def test_plan_refuses_references_that_the_json_scorer_cannot_read():
    with pytest.raises(SavingsError, match=r"references of 1 of 2 requests aren't JSON, such as 'the lamp' of '0', so"):
        answer_plan(make_tokenizer(), [SHORT[0], replace(SHORT[1], reference='{"lamp": 1}')], scorer="json")


@pytest.mark.parametrize("scorer", ["exact", "normalized", "json"])
def test_plan_warns_of_references_that_no_answer_can_reach(scorer):
    requests = [replace(request, reference=f'"{request.reference}"') for request in (*SHORT, LONG)]  # JSON too
    length = len(make_tokenizer()(requests[-1].reference, add_special_tokens=False)["input_ids"])
    (text,) = warnings_of(requests, scorer=scorer, max_new_tokens=length - 1)
    assert text.startswith(f"1 of 4 reference answers have more than max_new_tokens={length - 1} tokens")
    assert f"the scorer {scorer} grades them as wrong" in text
    assert text.endswith(f"the longest has {length} tokens.")
    assert warnings_of(requests, scorer=scorer, max_new_tokens=length) == []


def test_plan_leaves_the_length_to_scorers_that_may_accept_a_part():
    assert warnings_of([LONG], scorer=lambda output, reference: 1.0, max_new_tokens=1) == []
    assert warnings_of([LONG, *SHORT], scorer="label", max_new_tokens=1) == []


def test_measurement_refuses_rows_that_are_no_requests():
    request = Request("r0", [Message(role="user", content="where is it")], "here")
    with pytest.raises(SavingsError, match=r"requests\[1\] is a value of type dict, not a Request\. .*Request\(id="):
        SavingsMeasurement(make_tokenizer(), [request, {"input": "a", "output": "b"}], PromptBaseline("Be brief."))
