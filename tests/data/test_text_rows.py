"""Plain texts, supervised answers of conversations, and what requests take from rows."""

import pytest
import pytorch_lightning as L
import torch
from tiny import make_model

from lightning_ft import FullFineTuning, PromptBaseline, TokenSavings
from lightning_ft.data.pairs import PairDataModule
from lightning_ft.data.texts import encode_task
from lightning_ft.errors import ConfigError, RetentionError, SavingsError
from lightning_ft.evaluation.savings.plan import measurement_plan
from lightning_ft.types import Message, Request

TEXTS = [{"text": "the quick brown fox jumps over the lazy dog"}, {"text": "where is my parcel with the lamp"}]
TALK = [
    {"role": "user", "content": "where is the lamp"},
    {"role": "assistant", "content": "wrong", "weight": 0},
    {"role": "user", "content": "where is the dog"},
    {"role": "assistant", "content": "parcel"},
    {"role": "user", "content": "where is the fox"},
    {"role": "assistant", "content": "kettle"},
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


def supervised(data, split="train"):
    data.setup("fit")
    part = data.splits.encoded[split][0]
    return [data.tokenizer.decode(part[i].input_ids[part[i].supervised]) for i in range(len(part))]


def test_text_is_supervised_except_for_its_first_token(tokenizer):
    data = PairDataModule(TEXTS, tokenizer=tokenizer, cache_dir=False)
    data.setup("fit")
    for row, example in zip(TEXTS, data.splits.encoded["train"][0], strict=False):
        assert tokenizer.decode(example.input_ids) == f"{row['text']}<|im_end|>"
        assert example.supervised.tolist() == [False] + [True] * (len(example) - 1)
    assert data.report["train"].formats == {"train": "text"}


def test_fit_logs_perplexity_of_texts(tokenizer, tmp_path):
    torch.manual_seed(0)
    data = PairDataModule(TEXTS * 4, TEXTS, tokenizer=tokenizer, cache_dir=False, batch_size=2)
    module = FullFineTuning(make_model(len(tokenizer)), tokenizer=tokenizer)
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=str(tmp_path),
    )  # fmt: skip
    trainer.fit(module, data)
    assert trainer.callback_metrics["val/perplexity"] > 1


def test_requests_rejects_texts(tokenizer):
    data = PairDataModule(TEXTS, TEXTS, tokenizer=tokenizer, cache_dir=False)
    data.load_rows()
    with pytest.raises(ConfigError, match=r"validation rows can't be requests: validation, row 1, has no question"):
        data.requests("validation")


def test_token_savings_rejects_texts(tokenizer, tmp_path):
    data = PairDataModule(TEXTS, TEXTS, tokenizer=tokenizer, cache_dir=False)
    module = FullFineTuning(make_model(len(tokenizer)), tokenizer=tokenizer)
    savings = TokenSavings(PromptBaseline("Be brief."))
    trainer = L.Trainer(
        max_steps=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, default_root_dir=str(tmp_path), callbacks=[savings],
    )  # fmt: skip
    with pytest.raises((ConfigError, SavingsError), match=r"has no question.* as requests="):
        trainer.fit(module, data)


def test_overlong_text_error_names_the_remedy(tokenizer):
    data = PairDataModule(TEXTS, tokenizer=tokenizer, cache_dir=False, max_length=4, on_overlong="drop")
    with pytest.raises(ValueError, match=r"overlong text .* Split it into shorter texts"):
        data.setup("fit")


@pytest.mark.parametrize(
    ("supervise", "expected"),
    [("all", "parcel<|im_end|>kettle<|im_end|>"), ("last", "kettle<|im_end|>")],
)
def test_supervise_and_weight_select_answers(tokenizer, supervise, expected):
    data = PairDataModule([{"messages": TALK}], tokenizer=tokenizer, cache_dir=False, supervise=supervise)
    assert supervised(data) == [expected]


def test_supervise_last_rejects_a_last_answer_of_weight_0(tokenizer):
    turns = [*TALK[2:4], TALK[0], TALK[1]]
    options = {"tokenizer": tokenizer, "cache_dir": False}
    assert supervised(PairDataModule([{"messages": turns}], **options)) == ["parcel<|im_end|>"]
    with pytest.raises(ValueError, match="no supervised token"):
        PairDataModule([{"messages": turns}], supervise="last", **options).setup("fit")
    with pytest.raises(ConfigError, match="expected 'all' or 'last'"):
        PairDataModule([{"messages": turns}], supervise="first")


# ---------------------------------------------------------------- requests


def test_requests_have_template_kwargs_and_the_whole_answer(tokenizer):
    plain = {"messages": [TALK[0], TALK[3]], "chat_template_kwargs": {"enable_thinking": False}}
    thought = {"messages": [TALK[0], {**TALK[3], "reasoning_content": "hm"}]}
    called = {"messages": [TALK[0], {"role": "assistant", "content": None, "tool_calls": [CALL]}]}
    data = PairDataModule([plain, thought, called], tokenizer=tokenizer)
    data.load_rows()
    first, second, third = data.requests("train")
    assert (first.template_kwargs, first.answer) == ({"enable_thinking": False}, None)
    assert (second.reference, second.answer["reasoning_content"]) == ("parcel", "hm")
    assert (third.reference, third.answer["tool_calls"]) == ("", [CALL])
    with pytest.raises(SavingsError, match=r"Request 'train:3': its reference answer calls tools.* pass requests="):
        measurement_plan(tokenizer, [third], PromptBaseline("Be brief."))


def test_encode_task_reads_the_whole_answer(make_tokenizer):
    template = (
        "{%- if mode -%}{{- '<|im_start|>' + mode -}}{%- endif -%}"
        "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\n' -}}"
        "{%- if m.reasoning_content -%}{{- '(' + m.reasoning_content + ') ' -}}{%- endif -%}"
        "{{- m.content + '<|im_end|>\n' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
    )
    tokenizer = make_tokenizer(template)
    turns = (Message(role="user", content="where is it"),)
    answer = Message(role="assistant", content="parcel", reasoning_content="the lamp")
    (example,) = encode_task(
        tokenizer, [Request("1", turns, "parcel", template_kwargs={"mode": "quick"}, answer=answer)]
    )
    assert tokenizer.decode(example.input_ids).startswith("<|im_start|>quick<|im_start|>user")
    assert tokenizer.decode(example.input_ids[example.supervised]) == "(the lamp) parcel<|im_end|>"
    with pytest.raises(RetentionError, match="Task row '1'"):
        encode_task(make_tokenizer("drops_answers"), [Request("1", turns, "parcel")])


def test_prompt_baseline_precedes_turns_with_tools():
    messages = [
        Message(role="system", content=""),
        Message(role="user", content="where is it"),
        Message(role="assistant", content="", tool_calls=[CALL]),
        Message(role="tool", content="3"),
    ]
    baseline = PromptBaseline("Be brief.", [{"input": "a", "output": "b"}])
    roles = [message["role"] for message in baseline.messages(messages)]
    assert roles == ["system", "user", "assistant", "user", "assistant", "tool"]
    assert baseline.messages(messages)[0]["content"] == "Be brief."
