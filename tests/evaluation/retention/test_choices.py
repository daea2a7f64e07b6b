"""Multiple-choice questions as a measure of forgetting: against a plain loop, in all measurements, and errors."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import TEXT, make_model
from tokenizers.processors import TemplateProcessing

from lightning_ft.errors import RetentionError
from lightning_ft.evaluation.retention.arithmetic import RetentionResult
from lightning_ft.evaluation.retention.choices import ChoiceQuestion, compare_choices, encode_choices, load_choices
from lightning_ft.evaluation.retention.measurement import RetentionMeasurement, measure_retention
from lightning_ft.evaluation.retention.sections import retention_table

TEXTS = [f"{line} {n}" for n, line in enumerate(TEXT)]
WORDS = ("lamp", "kettle", "fox", "lazy dog", "parcel with the invoice", "refund")
QUESTIONS = [
    ChoiceQuestion(f"where is {n}? the", WORDS[n % 3 :][: 2 + n % 3], n % 2, f"set {n % 2}") for n in range(24)
]
QUICK = {"progress": False, "resamples": 99, "batch_size": 5}


@torch.no_grad()
def answers(model, tokenizer):
    """Whether each question is answered correctly, a choice at a time and without batches."""
    correct = []
    for question in QUESTIONS:
        scores = []
        for choice in question.choices:
            start = len(tokenizer(question.input)["input_ids"])
            ids = torch.tensor([tokenizer(f"{question.input} {choice}")["input_ids"]])
            logprobs = model.eval()(ids).logits[0, :-1].log_softmax(-1)
            score = logprobs.gather(-1, ids[0, 1:, None])[start - 1 :].sum()
            scores.append(float(score) / len(choice.encode()))
        correct.append(scores.index(max(scores)) == question.answer)
    return correct


def tuned(adapter):
    """A model whose answers differ from those of `make_model()`."""
    model = make_model()
    if adapter:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(5)
    return model


def change(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))


@pytest.mark.parametrize("adapter", [True, False])
def test_choices_are_those_of_a_plain_loop(tokenizer, adapter):
    model, measurement = tuned(adapter), RetentionMeasurement(tokenizer, TEXTS, choices=QUESTIONS, **QUICK)
    measurement.before(model)
    change(model)
    restored = RetentionMeasurement(tokenizer, TEXTS, choices=QUESTIONS, **QUICK)
    restored.load_state_dict(measurement.state_dict())
    result = restored.after(model)

    base, after = answers(make_model(), tokenizer), answers(model, tokenizer)
    assert 0 < sum(base) < len(base)
    assert base != after  # otherwise mistakes would not show
    assert result.choices["all"].base.value == sum(base) / 24
    assert result.choices["all"].tuned.value == sum(after) / 24
    assert result.choices["all"].lost.value == pytest.approx((sum(base) - sum(after)) / 24)
    assert result.choices["set 1"].tuned.value == sum(after[1::2]) / 12
    assert result.choices["set 0"].questions == 12
    assert result.metrics()["choices_lost"] == result.choices["all"].lost.value
    assert RetentionResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result
    assert f"of 24 multiple-choice questions {sum(after) / 24:.1%} correct" in result.headline


def test_measure_retention_compares_choices_with_a_second_model_and_with_the_adapter_off(tokenizer):
    model = tuned(adapter=True)
    change(model)
    options = {"texts": TEXTS, "choices": QUESTIONS, **QUICK}
    with_original = measure_retention(model, tokenizer, original=make_model(), **options)
    assert measure_retention(model, tokenizer, **options).choices == with_original.choices
    assert with_original.choices["all"].base.value == sum(answers(make_model(), tokenizer)) / 24


def test_choices_are_in_the_table_of_runs(tokenizer):
    model = tuned(adapter=True)
    result = measure_retention(model, tokenizer, texts=TEXTS, choices=QUESTIONS, **QUICK)
    without = measure_retention(model, tokenizer, texts=TEXTS, **QUICK)
    text = str(retention_table({"first": result, "second": without}))
    assert "set 1 questions correct (12; chance " in text
    assert "not measured" in text
    assert "choices" not in {name.split("_")[0] for name in without.metrics()}


def test_intervals_of_lost_points_are_paired():
    questions = [ChoiceQuestion("Q", ("a", "b"), 0)] * 100
    base = [n < 60 for n in range(100)]
    result = compare_choices(questions, base, base)["all"]
    assert result.lost.lo == result.lost.hi == 0
    assert result.base.lo < 0.55 < 0.65 < result.base.hi


def test_state_of_other_questions_is_refused(tokenizer):
    measurement = RetentionMeasurement(tokenizer, TEXTS, choices=QUESTIONS, **QUICK)
    measurement.before(tuned(adapter=True))
    other = RetentionMeasurement(tokenizer, TEXTS, choices=QUESTIONS[:-1], **QUICK)
    with pytest.raises(RetentionError, match="other texts or task rows"):
        other.load_state_dict(measurement.state_dict())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2: not a question \(.*\). Expected"),
        ("[]", "line 2: not a question"),
        ('{"input": "Q"}', "line 2: not a question .*choices"),
        ('{"input": " ", "choices": ["a", "b"], "answer": 0}', "line 2: \"input\" is ' '"),
        ('{"input": "Q", "choices": "ab", "answer": 0}', "\"choices\" is 'ab': expected a list of texts"),
        ('{"input": "Q", "choices": ["a"], "answer": 0}', "at least two"),
        ('{"input": "Q", "choices": ["a", "a"], "answer": 0}', "none of them twice"),
        ('{"input": "Q", "choices": ["a", "b"], "answer": 2}', '"answer" is 2: expected an index from 0 to 1'),
        ('{"input": "Q", "choices": ["a", "b"], "answer": "a"}', "\"answer\" is 'a'"),
        ('{"input": "Q", "choices": ["a", "b"], "answer": 0, "set": "all"}', "a name other than 'all'"),
    ],
)
def test_load_choices_names_file_and_line(tmp_path, line, message):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"input": "Q", "choices": ["a", "b"], "answer": 0}\n' + line + "\n")
    with pytest.raises(RetentionError, match=message):
        load_choices(path)


def test_load_choices_refuses_missing_and_empty_files(tmp_path):
    with pytest.raises(RetentionError, match="can't be read"):
        load_choices(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(RetentionError, match="contains no questions"):
        load_choices(tmp_path / "empty.jsonl")
    with pytest.raises(RetentionError, match="expected ChoiceQuestion"):
        load_choices([{"input": "Q"}])


def test_questions_beyond_the_context_are_refused(tokenizer):
    questions = [ChoiceQuestion("fox " * 600, ("a", "b"), 0)]
    measurement = RetentionMeasurement(tokenizer, TEXTS, choices=questions, **QUICK)
    with pytest.raises(RetentionError, match=r"Choice 0 has .* tokens, the model's context is 512"):
        measurement.before(make_model())


def test_tokenizers_that_append_an_end_token_score_the_choice(tokenizer):
    ended = copy.deepcopy(tokenizer)
    ended.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", ended.convert_tokens_to_ids("<|im_end|>"))]
    )
    assert ended("fox")["input_ids"][-1] == ended.eos_token_id
    expected, found = encode_choices(tokenizer, QUESTIONS), encode_choices(ended, QUESTIONS)
    for plain, example in zip(expected, found, strict=True):
        assert example.input_ids.tolist() == plain.input_ids.tolist()
        assert example.supervised.tolist() == plain.supervised.tolist()
