"""Prompts and answer formats that differ by request."""

from dataclasses import replace

import pytest
from tiny import make_model, make_tokenizer

from lightning_ft import TokenSavings
from lightning_ft.compare.worker import measurement_plans
from lightning_ft.data.encode import encode_prompt
from lightning_ft.data.pairs import PairDataModule
from lightning_ft.data.prompt_baseline import PromptBaseline
from lightning_ft.errors import SavingsError
from lightning_ft.evaluation.savings.measurement import SavingsMeasurement
from lightning_ft.evaluation.savings.plan import measurement_plan
from lightning_ft.rollout.structured import StructuredOutputs
from lightning_ft.types import Message, Request

BASELINE = PromptBaseline("Pick a word.", [{"input": "a", "output": "lamp"}])
QUICK = {"max_new_tokens": 12, "timed_requests": 0, "resamples": 99, "progress": False}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def requests(**changes):
    words = ("fox", "row", "lamp", "seven")
    return [
        replace(Request(str(i), (Message(role="user", content=f"{word} {i}"),), word), **changes)
        for i, word in enumerate(words * 2)
    ]


def _any_word(output, reference):
    return 1.0


def test_prompted_arm_reads_the_context_of_each_request(tokenizer):
    asked = [replace(request, prompt_context=f"Candidates: fox {i}") for i, request in enumerate(requests())]
    plan, plain = (measurement_plan(tokenizer, rows, BASELINE) for rows in (asked, requests()))
    assert plan.bare == plain.bare
    for i, (request, prompt) in enumerate(zip(asked, plan.prompted.prompts, strict=True)):
        turns = [
            Message(role="system", content=f"Pick a word.\n\nCandidates: fox {i}"),
            *BASELINE.examples(),
            *request.messages,
        ]
        assert list(prompt) == encode_prompt(tokenizer, turns)
    contexts = [request.prompt_context for request in asked]
    added = sum(len(ids) for ids in tokenizer(contexts, add_special_tokens=False)["input_ids"])
    assert plan.prompted.parts["system"] - plain.prompted.parts["system"] == added
    assert sum(plan.prompted.parts.values()) == sum(map(len, plan.prompted.prompts))
    assert plan.prompted.prefix_length < plain.prompted.prefix_length
    assert plan.fingerprint != plain.fingerprint


def test_every_arm_answers_in_the_format(tokenizer):
    words = ["fox", "row", "lamp", "seven"]
    measurement = SavingsMeasurement(
        tokenizer, requests(), BASELINE, structured_outputs=StructuredOutputs(choices=words), scorer=_any_word, **QUICK
    )
    model = make_model()
    measurement.before(model)
    result = measurement.after(model)
    for arm in result.arms.values():
        assert set(arm.outputs) <= set(words)
    assert result.provenance["decoding"] == "greedy, structured outputs"


def test_answers_have_the_format_of_their_request(tokenizer):
    rows = [replace(r, structured_output={"choices": [r.reference]}) for r in requests()]
    measurement = SavingsMeasurement(tokenizer, rows, BASELINE, structured_outputs=True, **QUICK)
    measurement.before(make_model())
    assert measurement.after(make_model()).quality["tuned"].value == 1.0
    free = SavingsMeasurement(tokenizer, rows, BASELINE, **QUICK)
    assert free.plan.grammars is None
    assert free.plan.fingerprint != measurement.plan.fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "Request '0' has no structured_output"),
        ({"structured_output": {"choices": []}}, "Request '0': choices="),
        ({"structured_output": {"schema": {}}}, "Request '0': Structured outputs have no 'schema'"),
    ],
)
def test_missing_or_invalid_format_is_refused_before_training(tokenizer, changes, message):
    with pytest.raises(SavingsError, match=message):
        measurement_plan(tokenizer, requests(**changes), BASELINE, structured_outputs=True)


@pytest.mark.parametrize("value", [{"choices": ["fox", "row"]}, True, None])
def test_comparison_reads_the_format_from_a_configuration(tokenizer, value):
    rows = [{"input": "a", "output": "fox", "structured_output": {"choices": ["fox"]}}]
    data = PairDataModule(rows, validation=rows, test=rows, tokenizer=tokenizer, cache_dir=False)
    for stage in ("fit", "test"):
        data.setup(stage)
    savings = {"baseline": {"system": "Pick."}, "structured_outputs": value}
    plans = measurement_plans(tokenizer, data, {"savings": savings, "validation_requests": None})
    choices = ["fox"] if value is True else (value or {}).get("choices")
    expected = None if choices is None else (StructuredOutputs(choices=choices).grammar(),)
    assert plans["test"].grammars == plans["validation"].grammars == expected


def test_callback_takes_the_format(tokenizer, trainer_options, tmp_path):
    callback = TokenSavings(
        BASELINE, requests=requests(), structured_outputs=StructuredOutputs(regex="fox|row"), tokenizer=tokenizer
    )
    measurement = callback._new_measurement(None, None)
    assert len(set(measurement.plan.grammars)) == 1


@pytest.mark.parametrize("structured_outputs", [{"choices": ["fox", "row"]}, StructuredOutputs(choices=["fox", "row"])])
def test_one_format_for_all_may_be_a_dict(tokenizer, structured_outputs):
    rows = requests(structured_output={"choices": ["lamp"]})
    plan = measurement_plan(tokenizer, rows, BASELINE, structured_outputs=structured_outputs)
    assert set(plan.grammars) == {StructuredOutputs(choices=["fox", "row"]).grammar()}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("yes", r"structured_outputs='yes': expected StructuredOutputs\(choices"),
        (["fox"], r"structured_outputs=\['fox'\]: expected"),
        ({"choice": ["fox"]}, "structured_outputs: Structured outputs have no 'choice'"),
        ({"choices": ["up", "down"]}, "none of the 2 choices is the reference of any request, such as 'fox' of '0'"),
        ({"regex": "("}, "structured_outputs: Structured outputs can't be matched"),
    ],
)
def test_format_that_cannot_work_is_refused_before_training(tokenizer, value, message):
    with pytest.raises(SavingsError, match=message):
        measurement_plan(tokenizer, requests(), BASELINE, structured_outputs=value)


def test_request_whose_format_cannot_be_matched_is_named(tokenizer):
    rows = requests(structured_output={"choices": ["fox"]})
    rows[2] = replace(rows[2], structured_output={"regex": "("})
    with pytest.raises(SavingsError, match="Request '2': Structured outputs can't be matched"):
        measurement_plan(tokenizer, rows, BASELINE, structured_outputs=True)
