from dataclasses import replace

import pytest
from tiny import make_model

from lightning_ft.data.prompt_baseline import PromptBaseline
from lightning_ft.errors import SavingsError
from lightning_ft.evaluation.savings.arithmetic import ArmRecords, token_savings
from lightning_ft.evaluation.savings.measurement import SavingsMeasurement
from lightning_ft.evaluation.savings.regressions import count_regressions, worst_regressions
from lightning_ft.evaluation.savings.result import SavingsResult
from lightning_ft.types import Message, Request


def result_of(prompted, tuned, outputs=True):
    n = len(prompted)
    ids = tuple(f"r{k}" for k in range(n))

    def arm(name, tokens, scores):
        answers = tuple(f"{name} {k}" for k in range(n)) if outputs else ()
        return ArmRecords(ids, (tokens,) * n, (2,) * n, tuple(scores), (False,) * n, outputs=answers)

    return token_savings(arm("prompted", 90, prompted), arm("tuned", 9, tuned), resamples=99)


def test_worst_regressions_are_sorted_by_loss():
    result = replace(
        result_of([1.0, 0.5, 1.0, 0.0, 1.0], [0.5, 0.5, 0.0, 1.0, 0.0]),
        requests=("a", "b", "c", "d", "e"),
        references=("A", "B", "C", "D", "E"),
    )
    found = worst_regressions(result)
    assert [answers.id for answers in found] == ["r2", "r4", "r0"]
    assert (found[0].request, found[0].reference) == ("c", "C")
    assert (found[0].prompted, found[0].tuned, found[0].prompted_score, found[0].tuned_score) == (
        "prompted 2",
        "tuned 2",
        1.0,
        0.0,
    )
    assert count_regressions(result) == 3
    assert [answers.id for answers in worst_regressions(result, limit=1)] == ["r2"]


def test_worst_regressions_are_at_most_ten():
    result = result_of([1.0] * 30, [0.0] * 25 + [1.0] * 5)
    assert len(worst_regressions(result)) == 10
    assert count_regressions(result) == 25


def test_worst_regressions_without_answers_or_requests():
    assert worst_regressions(result_of([1.0, 1.0], [0.0, 1.0], outputs=False)) == ()
    found = worst_regressions(result_of([1.0, 1.0], [0.0, 1.0]))
    assert (found[0].request, found[0].reference) == ("", None)


def test_result_keeps_requests_and_references(make):
    result = make.savings()
    assert SavingsResult.from_dict(result.to_dict()) == result
    assert result.requests[7].startswith("Where do I turn with case 7?")
    older = {name: value for name, value in result.to_dict().items() if name not in ("requests", "references")}
    assert SavingsResult.from_dict(older).requests == ()
    with pytest.raises(SavingsError, match="references has 1 texts for 300 request ids"):
        replace(result, references=("one",))


def test_measurement_records_last_user_turns(tokenizer):
    """Records the last user turn of each conversation, in the order of the arms' ids."""
    turns = (
        Message(role="user", content="hello"),
        Message(role="assistant", content="yes?"),
        Message(role="user", content="where is the dog"),
    )
    requests = [Request("b", turns, "here"), Request("a", (Message(role="user", content="where is the fox"),), "there")]
    measurement = SavingsMeasurement(
        tokenizer,
        requests,
        PromptBaseline("Say where it is."),
        scorer=lambda output, reference: 0.5,
        max_new_tokens=2,
        resamples=19,
        timed_requests=0,
        progress=False,
    )
    model = make_model()
    measurement.before(model)
    result = measurement.after(model)
    assert result.arms["tuned"].ids == ("b", "a")
    assert result.requests == ("where is the dog", "where is the fox")
    assert result.references == ("here", "there")
    assert SavingsResult.from_dict(result.to_dict()) == result
