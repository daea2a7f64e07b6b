"""A prompt that is of no use gives no saving to claim, however well the tuned model keeps its quality."""

from dataclasses import replace

import pytest
from tiny import make_model, make_tokenizer

from lightning_ft.data.prompt_baseline import PromptBaseline
from lightning_ft.document.html import html_page
from lightning_ft.document.markdown import markdown_document
from lightning_ft.errors import SavingsError
from lightning_ft.evaluation.bootstrap import Interval
from lightning_ft.evaluation.savings.advice import advice
from lightning_ft.evaluation.savings.arithmetic import ArmRecords, token_savings
from lightning_ft.evaluation.savings.files import load_savings
from lightning_ft.evaluation.savings.gate import Lead, why_void
from lightning_ft.evaluation.savings.measurement import SavingsMeasurement
from lightning_ft.evaluation.savings.result import SavingsResult
from lightning_ft.evaluation.savings.sections import savings_document, savings_facts
from lightning_ft.types import Message, Request

N = 400


def arm(right, tokens=50):
    """Records of an arm whose first `right` answers are correct."""
    scores = tuple(float(i < right) for i in range(N))
    return ArmRecords(tuple(map(str, range(N))), (tokens,) * N, (5,) * N, scores, (False,) * N)


def measured(prompted, tuned, untuned=0, **options):
    return token_savings(arm(prompted, 1000), arm(tuned), arm(untuned), resamples=999, **options)


def test_gate_is_void_when_prompt_does_not_work():
    result = measured(0, 45)
    assert (result.gate.verdict, result.gate.passed, result.saves_half) == ("VOID", False, False)
    assert result.headline.startswith(
        "VOID: the prompt isn't shown to work on this model: quality 0.000 with it, 0.000 without it, so there is no "
        "saving to claim; the tuned model's quality is 0.113"
    )
    assert (result.metrics()["gate_passed"], result.metrics()["gate_void"]) == (0.0, 1.0)


def test_gate_is_void_and_tokens_are_counted_when_no_answer_was_right(tmp_path):
    result = measured(0, 0, min_quality=0.0)
    assert result.headline.startswith("VOID: no answer was right, prompted or tuned, so there is no saving to claim")
    assert result.savings["input"].value == 0.95
    assert "per_success" not in result.savings
    assert "Read a few of them" in result.warnings[0]
    assert advice(result).startswith("Find out first why no answer was right")
    result.save(tmp_path, png=True)
    assert load_savings(tmp_path / "token_savings.json") == result
    assert "none right" in markdown_document(savings_document(result), "", [])
    assert [fact.label for fact in savings_facts(result)] == [
        "fewer tokens, but no saving, per request",
        "quality, tuned",
    ]


def test_void_result_does_not_say_that_the_gate_fails_for_want_of_requests():
    few = [ArmRecords(("a", "b"), (tokens, tokens), (5, 5), (1.0, 1.0), (False, False)) for tokens in (90, 9, 9)]
    result = token_savings(*few, resamples=99)
    assert result.gate.verdict == "VOID"
    assert not any("Underpowered" in warning for warning in result.warnings)


def test_gate_is_void_when_prompt_is_not_needed():
    assert measured(360, 360, untuned=360).gate.verdict == "VOID"


def test_gate_passes_when_prompt_beats_untuned_model():
    result = measured(300, 320, untuned=100)
    assert result.gate.verdict == "PASS"
    assert result.metrics()["gate_void"] == 0.0


def test_gate_without_untuned_arm_does_not_compare_with_it():
    assert token_savings(arm(300, 1000), arm(320), resamples=999).gate.verdict == "PASS"


def test_gate_is_void_when_fixed_answer_is_as_good():
    result = measured(200, 300, constant=[float(i % 2) for i in range(N)])
    assert result.gate.verdict == "VOID"
    assert "against 0.500 for always giving the most frequent answer" in result.headline
    assert measured(300, 310, constant=[float(i % 4 == 0) for i in range(N)]).gate.verdict == "PASS"


def test_min_quality_replaces_the_comparisons():
    assert measured(360, 360, untuned=360, min_quality=0.8).gate.verdict == "PASS"
    result = measured(300, 380, min_quality=0.8)
    assert result.headline.startswith("VOID: the prompt's quality, 0.750, is below min_quality=0.8")


def test_gate_fails_when_tuned_quality_is_below_min_quality():
    result = measured(330, 316, margin=0.1, min_quality=0.8)
    assert result.gate.verdict == "FAIL"
    assert "quality below min_quality" in result.headline
    assert measured(330, 316, margin=0.1, min_quality=0.7).gate.verdict == "PASS"


def test_bounds_are_those_of_the_gate_at_every_confidence():
    at = [measured(200, 300, untuned=180, confidence=confidence).gate for confidence in (0.5, 0.95, 0.999)]
    assert at[0] == at[1] == at[2]


def test_options_are_checked():
    with pytest.raises(SavingsError, match=r"min_quality=1\.5: expected a share from 0 to 1"):
        measured(1, 1, min_quality=1.5)
    with pytest.raises(SavingsError, match="constant has 3 scores for 400 requests"):
        measured(1, 1, constant=[0.0] * 3)


def test_lead_that_is_undefined_is_no_lead():
    nothing = Lead(0.5, Interval(0.0, float("nan"), float("nan")), wins=9)
    assert why_void(0.5, successes=9, untuned=nothing)


@pytest.mark.parametrize(("right", "verdict"), [(0, "VOID"), (3, "VOID"), (5, "VOID"), (6, "PASS")])
def test_few_lucky_answers_do_not_make_a_prompt_work(right, verdict):
    """Five wins against none have a p-value of 1/32 in an exact sign test, six of 1/64."""
    for untuned in (arm(0), None):
        result = token_savings(arm(right, 1000), arm(max(right, 1)), untuned, margin=0.05, resamples=999)
        assert result.gate.verdict == verdict


def test_answers_of_one_cluster_are_one_success():
    clusters = tuple(str(i // 100) for i in range(N))
    arms = [replace(a, clusters=clusters) for a in (arm(300, 1000), arm(300), arm(0))]
    assert token_savings(*arms, resamples=999).gate.void


def test_clusters_that_differ_between_arms_are_refused():
    clusters = tuple(str(i // 2) for i in range(N))
    with pytest.raises(SavingsError, match="The tuned arm has other clusters than the prompted one"):
        token_savings(arm(300), replace(arm(300), clusters=clusters), resamples=99)


def test_min_quality_is_not_missed_by_rounding():
    tenth = replace(arm(0, 1000), scores=(0.1,) * N)
    assert token_savings(tenth, tenth, min_quality=0.1, resamples=99).gate.verdict == "PASS"


def test_resumed_measurement_grades_its_answers_with_the_present_scorer():
    requests = [Request(str(i), (Message(role="user", content=f"fox {i}"),), "red") for i in range(8)]
    options = {"max_new_tokens": 2, "timed_requests": 0, "resamples": 99, "progress": False}
    tokenizer, model = make_tokenizer(), make_model()

    def measurement(score):
        return SavingsMeasurement(tokenizer, requests, PromptBaseline("Say a color."), scorer=score, **options)

    earlier, resumed = measurement(lambda output, reference: 0.0), measurement(lambda output, reference: 1.0)
    earlier.before(model)
    resumed.load_state_dict(earlier.state_dict())
    result = resumed.after(model)
    assert [result.quality[arm].value for arm in ("prompted", "untuned", "tuned")] == [1.0, 1.0, 1.0]
    assert resumed._constant == (1.0,) * 8


def test_void_result_survives_json_and_every_format_shows_it():
    result = measured(0, 45)
    assert SavingsResult.from_dict(result.to_dict()) == result
    assert result.to_dict()["verdict"] == "VOID"
    document = savings_document(result)
    for text in (markdown_document(document, "Savings", ()), html_page(document, {})):
        assert "VOID" in text
        assert "PASS" not in text


def test_files_written_before_the_verdict_existed_can_be_read():
    values = measured(300, 320).to_dict()
    for name in ("void", "shortfall"):
        del values["gate"][name]
    assert SavingsResult.from_dict(values).gate.verdict == "PASS"


def test_measurement_grades_the_most_frequent_reference():
    requests = [
        Request(str(i), (Message(role="user", content=f"fox {i}"),), "red" if i < 5 else f"blue {i}") for i in range(8)
    ]
    measurement = SavingsMeasurement(
        make_tokenizer(), requests, PromptBaseline("Say a color."), max_new_tokens=2, timed_requests=0, resamples=99
    )
    measurement.before(make_model())
    assert measurement._constant == (1.0,) * 5 + (0.0,) * 3
    restored = SavingsMeasurement(measurement.tokenizer, requests, PromptBaseline("Say a color."), max_new_tokens=2)
    restored.load_state_dict(measurement.state_dict())
    assert restored._constant == measurement._constant


def test_weak_prompt_is_the_first_warning():
    assert measured(120, 200).warnings[0].startswith("The prompted arm's quality is only 0.300")
    for result in (measured(220, 300), measured(120, 200, min_quality=0.2), measured(0, 45)):
        assert not any("prompted arm's quality" in warning for warning in result.warnings)
