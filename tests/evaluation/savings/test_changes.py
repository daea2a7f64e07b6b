from dataclasses import replace

import pytest
from tiny import make_model

from lightning_ft.data.prompt_baseline import PromptBaseline
from lightning_ft.document.blocks import Answers
from lightning_ft.errors import SavingsError
from lightning_ft.evaluation.savings.arithmetic import ArmRecords, token_savings
from lightning_ft.evaluation.savings.changes import change_blocks, changed_answers, count_changed
from lightning_ft.evaluation.savings.measurement import SavingsMeasurement
from lightning_ft.evaluation.savings.result import SavingsResult
from lightning_ft.types import Message, Request


def result_of(prompted, tuned, outputs=True):
    n = len(prompted)
    ids = tuple(f"r{k}" for k in range(n))

    def arm(name, tokens, scores):
        answers = tuple(f"{name} {k}" for k in range(n)) if outputs else ()
        return ArmRecords(ids, (tokens,) * n, (2,) * n, tuple(scores), (False,) * n, outputs=answers)

    return token_savings(arm("prompted", 90, prompted), arm("tuned", 9, tuned), resamples=99)


def test_changed_answers_are_sorted_by_change_then_by_request():
    result = replace(
        result_of([1.0, 0.5, 1.0, 0.0, 1.0, 0.5], [0.5, 0.5, 0.0, 1.0, 0.0, 1.0]),
        requests=("a", "b", "c", "d", "e", "f"),
        references=("A", "B", "C", "D", "E", "F"),
    )
    worse, better = changed_answers(result, "worse"), changed_answers(result, "better")
    assert [answers.id for answers in worse] == ["r2", "r4", "r0"]
    assert [answers.id for answers in better] == ["r3", "r5"]
    assert worse[0] == Answers("r2", "c", "C", "prompted 2", "tuned 2", 1.0, 0.0)
    assert better[0] == Answers("r3", "d", "D", "prompted 3", "tuned 3", 0.0, 1.0)
    assert (count_changed(result, "worse"), count_changed(result, "better")) == (3, 2)
    assert [answers.id for answers in changed_answers(result, "worse", limit=1)] == ["r2"]


def test_changed_answers_are_at_most_ten_of_each_direction():
    result = result_of([1.0] * 30 + [0.0] * 12, [0.0] * 25 + [1.0] * 17)
    for direction, count in (("worse", 25), ("better", 12)):
        assert len(changed_answers(result, direction)) == 10
        assert count_changed(result, direction) == count


def test_changed_answers_without_answers_or_requests():
    unrecorded = result_of([1.0, 0.0], [0.0, 1.0], outputs=False)
    assert changed_answers(unrecorded, "worse") == changed_answers(unrecorded, "better") == ()
    found = changed_answers(result_of([1.0, 1.0], [0.0, 1.0]), "worse")
    assert (found[0].request, found[0].reference) == ("", None)


def test_change_blocks_count_both_directions():
    text, worse, better = change_blocks(result_of([1.0] * 30 + [0.0] * 2 + [1.0] * 8, [0.0] * 12 + [1.0] * 28))
    assert text == (
        "Of 40 answers, 12 (30.0%) scored lower tuned than prompted, 2 (5.0%) scored higher, and 26 the same."
    )
    assert worse.caption == "Worse: 10 of 12, the largest loss first."
    assert better.caption == "Better: all 2, the largest gain first."
    assert {answers.tuned_score for answers in worse.answers} == {0.0}
    assert {answers.tuned_score for answers in better.answers} == {1.0}


def test_change_blocks_without_changes_or_answers():
    assert change_blocks(result_of([1.0, 0.0], [1.0, 0.0])) == (
        "Of 2 answers, 0 (0.0%) scored lower tuned than prompted, 0 (0.0%) scored higher, and 2 the same.",
    )
    (text,) = change_blocks(result_of([1.0, 0.0], [0.0, 0.0], outputs=False))
    assert text.endswith("and 1 the same. The answers weren't recorded.")


def test_change_blocks_show_answers_where_none_was_right():
    counts, shown = change_blocks(result_of([0.0] * 12, [0.0] * 12))
    assert counts.endswith("and 12 the same.")
    assert shown.caption == "None was right: the first 10 of 12."
    assert (shown.answers[0].prompted, shown.answers[0].tuned) == ("prompted 0", "tuned 0")


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
