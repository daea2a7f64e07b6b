"""Splits: holding out, counting and encoding rows, without Lightning."""

import pytest

from lightning_ft.data.splits import RowRules, Splits
from lightning_ft.errors import ConfigError, DataError


def splits(sources, **rules):
    defaults = {
        "columns": None,
        "on_bad_row": "error",
        "max_length": 64,
        "on_overlong": "error",
        "seed": 0,
        "cache": None,
    }
    return Splits(sources, RowRules(**{**defaults, **rules}))


IN_TRAIN = "rows that also appear in train"


def keys(made, name):
    return [row.key for part in made.rows[name] for row in part]


def test_held_out_rows_depend_on_the_seed_and_are_in_one_split(pairs):
    def held(seed):
        made = splits({"train": pairs, "validation": 0.25}, seed=seed)
        made.load(["train", "validation"])
        return made

    one = held(0)
    assert keys(one, "validation") == keys(held(0), "validation") != keys(held(1), "validation")
    assert (len(keys(one, "train")), len(keys(one, "validation"))) == (18, 6)
    assert not set(keys(one, "train")) & set(keys(one, "validation"))
    assert (one.report["train"].read, one.report["validation"].read) == (18, 6)


def test_copies_of_a_row_are_held_out_together(pairs):
    rows = pairs * 3
    made = splits({"train": rows, "validation": 0.3})
    made.load(["train"])
    assert not set(keys(made, "train")) & set(keys(made, "validation"))
    assert len(keys(made, "train")) + len(keys(made, "validation")) == 72
    assert made.report["train"].duplicates == 2 * len(set(keys(made, "train")))
    assert made.report["validation"].also_in_train == 0


def test_hold_out_needs_two_different_rows():
    with pytest.raises(DataError, match="fewer than two different rows"):
        splits({"train": [{"input": "a", "output": "b"}] * 3, "validation": 0.5}).load(["train"])


def test_rows_that_also_appear_in_train_are_counted(pairs):
    other = {"input": "a", "output": "b"}
    made = splits({"train": pairs, "validation": [*pairs[:3], other], "test": [other]})
    with pytest.warns(
        UserWarning, match="validation has 3 rows that also appear in train, of 4 in all, so its metrics"
    ):
        made.load(["train", "validation", "test"])
    report = made.report["validation"]
    assert (report.also_in_train, report.question_in_train, report.overlap) == (3, 3, [(3, IN_TRAIN)])
    assert "; 3 rows that also appear in train" in report.summary("validation")
    assert made.report["test"].overlap == []


def test_duplicates_are_counted(pairs):
    made = splits({"train": [*pairs, pairs[0], pairs[0]]})
    made.load(["train"])
    assert made.report["train"].duplicates == 2
    assert made.report["train"].kept == 26


def test_bad_rows_of_all_sources_and_splits_are_reported_together(write, pairs):
    a, b = write("a.jsonl", [*pairs, {"input": "a"}]), write("b.jsonl", [{"input": "", "output": "b"}, *pairs])
    made = splits({"train": [a, b], "test": [{"input": "c", "output": None}]})
    with pytest.raises(DataError) as error:
        made.load(["train", "test"])
    message = str(error.value)
    assert message.startswith("3 bad rows (")
    assert f"{a}, row 25, 'output': missing field" in message
    assert f"{b}, row 1, 'input': empty input" in message
    assert "test, row 1, 'output': None" in message
    assert made.rows == {}


def test_sources_may_have_different_formats(write, pairs):
    made = splits({"train": [write("a.csv", "question,output\nx,y\n"), pairs[:2]]}, columns=None)
    with pytest.raises(DataError, match=r"a.csv: no row format has these columns .*\{'input': 'question'\}"):
        made.load(["train"])
    made = splits({"train": [write("b.csv", "prompt,completion\nx,y\n"), pairs[:2]]})
    made.load(["train"])
    assert [len(part) for part in made.rows["train"]] == [1, 2]
    assert list(made.report["train"].formats.values()) == ["prompt_completion", "input_output"]


LONG = {"input": "parcel " * 100, "output": "lamp"}
ANSWER = {"input": "lamp", "output": "parcel " * 100}


def test_overlong_rows_are_listed(tokenizer, pairs):
    made = splits({"train": [*pairs, LONG, ANSWER]}, on_bad_row="skip")  # which concerns other rows
    made.load(["train"])
    with pytest.raises(DataError) as error:
        made.encode("train", tokenizer)
    assert "2 bad rows (1 x overlong prompt, 1 x overlong answer)" in str(error.value)
    assert "train, row 25: overlong prompt (" in str(error.value)


def test_overlong_rows_of_all_splits_are_listed_with_the_argument_that_leaves_them_out(make_tokenizer, pairs):
    made = splits({"train": [*pairs, LONG], "test": [LONG]}, on_bad_row="skip")
    made.load(["train", "test"])
    with pytest.raises(DataError, match=r"2 bad rows[^$]*train, row 25[^$]*test, row 1") as error:
        made.encode(["train", "test"], make_tokenizer("chatml"))
    assert str(error.value).endswith("\nFix them, or pass on_overlong='drop' to leave them out and count them.")
    system = {"input": "lamp", "output": "dog", "system": "be brief"}  # which the template refuses
    made = splits({"train": [*pairs, LONG, system]})
    made.load(["train"])
    with pytest.raises(DataError, match="or pass on_bad_row='skip' and on_overlong='drop' to leave them out"):
        made.encode("train", make_tokenizer("llama"))


def test_overlong_rows_are_dropped_and_counted(tokenizer, pairs):
    made = splits({"train": [LONG, *pairs, ANSWER]}, on_overlong="drop")
    made.load(["train"])
    made.encode("train", tokenizer)
    report = made.report["train"]
    assert dict(report.skipped) == {"overlong prompt": 1, "overlong answer": 1}
    assert (report.read, report.kept, len(report.lengths)) == (26, 24, 24)
    assert [request.id for request in made.requests("train")] == [f"train:{n}" for n in range(2, 26)]


def test_overlong_prompts_are_truncated_and_answers_are_not(tokenizer, pairs):
    made = splits({"train": [*pairs, LONG]}, on_overlong="truncate_prompt")
    made.load(["train"])
    made.encode("train", tokenizer)
    assert made.report["train"].truncated == 1
    assert max(made.report["train"].lengths) == 64
    made = splits({"train": [*pairs, LONG, ANSWER]}, on_overlong="truncate_prompt")
    made.load(["train"])
    with pytest.raises(DataError, match=r"1 bad row \(1 x overlong answer"):
        made.encode("train", tokenizer)
    made = splits({"train": [*pairs, LONG, ANSWER]}, on_overlong="truncate_prompt", on_bad_row="skip")
    made.load(["train"])
    made.encode("train", tokenizer)
    assert dict(made.report["train"].skipped) == {"overlong answer": 1}


def test_encode_fails_if_all_rows_are_overlong(tokenizer):
    made = splits({"train": [LONG, ANSWER]}, on_overlong="drop")
    made.load(["train"])
    with pytest.raises(
        DataError, match=r"no row is left within max_length=64; 2 were dropped. The first: train, row 1: over"
    ):
        made.encode("train", tokenizer)


def test_template_that_drops_answers_is_reported_with_its_rows(make_tokenizer, pairs):
    made = splits({"train": pairs})
    made.load(["train"])
    with pytest.raises(DataError, match=r"24 bad rows \(24 x answer lost in the chat template\)"):
        made.encode("train", make_tokenizer("drops_answers"))


def test_encode_warns_of_a_prompt_mismatch(make_tokenizer, pairs):
    made = splits({"train": pairs})
    made.load(["train"])
    with pytest.warns(
        UserWarning, match="in 24 of 24 rows the tokens before the last answer aren't those that generation"
    ):
        made.encode("train", make_tokenizer("other_prompt"))
    assert made.report["train"].other_prompt == 24


def test_encode_warns_of_rows_over_the_tokenizer_limit(tokenizer, pairs):
    tokenizer.model_max_length = 8
    made = splits({"train": pairs})
    made.load(["train"])
    with pytest.warns(UserWarning, match="the tokenizer's model_max_length is 8"):
        made.encode("train", tokenizer)


def test_report_has_lengths_of_rows(tokenizer, pairs):
    made = splits({"train": pairs})
    made.load(["train"])
    made.encode("train", tokenizer)
    report = made.report["train"]
    (rows,) = made.encoded["train"]
    assert list(report.lengths) == [len(rows[i]) for i in range(24)]
    assert list(report.supervised) == [int(rows[i].supervised.sum()) for i in range(24)]


def test_requests_have_references_and_clusters():
    def talk(*texts):
        return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]

    rows = [
        {"messages": talk("a", "b", "c", "d"), "id": "x", "cluster": 3},
        {"messages": talk("e", "f"), "id": "x"},
        {"messages": talk("g", "h")},
    ]  # fmt: skip
    made = splits({"test": rows})
    with pytest.raises(ConfigError, match=r"no test rows: setup\(\) hasn't run for it"):
        made.requests("test")
    with pytest.raises(ConfigError, match="no train rows: pass train="):
        made.requests("train")
    made.load(["test"])
    requests = made.requests("test")
    assert [(r.id, r.reference, r.cluster) for r in requests] == [
        ("x", "d", "3"),
        ("x#2", "f", None),
        ("test:3", "h", None),
    ]
    assert [m["content"] for m in requests[0].messages] == ["a", "b", "c"]


def test_requests_have_unique_ids():
    names = ["x", "x", "x#2", " ", None, "x", "y"]
    made = splits({"test": [{"input": str(n), "output": "a", "id": name} for n, name in enumerate(names)]})
    made.load(["test"])
    assert [request.id for request in made.requests("test")] == ["x", "x#3", "x#2", "test:4", "test:5", "x#4", "y"]


def test_requests_rejects_rows_without_question_or_answer(pairs):
    made = splits({"predict": [{"input": "a"}], "test": [{"text": "a text"}]})
    made.load(["predict", "test"])
    with pytest.raises(ConfigError, match="predict rows can't be requests: predict, row 1, has no answer to compare"):
        made.requests("predict")
    with pytest.raises(ConfigError, match="test rows can't be requests: test, row 1, has no question"):
        made.requests("test")


def test_requests_pass_template_kwargs():
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
    made = splits({"test": [{"input": "a", "output": "b", "tools": tools}]})
    made.load(["test"])
    assert made.requests("test")[0].template_kwargs["tools"] == tools
