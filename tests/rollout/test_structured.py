"""Structured outputs: every completion is in the format, by either decoding loop, and is the likeliest of it."""

import json
import re

import pytest
import torch
from architectures import SIZES
from tiny import make_model
from transformers import MistralConfig, MistralForCausalLM

from lightning_ft.errors import ConfigError
from lightning_ft.rollout.local import LocalEngine
from lightning_ft.rollout.protocol import Sampling
from lightning_ft.rollout.structured import GrammarMasks, StructuredOutputs

END = 2
CHOICES = ["K52.29", "K52", 'a "quoted" \\ one', "two\nlines", "fünf €", "fox lamp", "fox"]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["sum", "mean"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["name", "count"],
    "additionalProperties": False,
}


def engines(tokenizer):
    """An engine with the decoding loop of this package, and one that needs transformers' own."""
    torch.manual_seed(0)
    sliding = MistralForCausalLM(MistralConfig(sliding_window=8, **SIZES | {"vocab_size": len(tokenizer)}))
    for model in (make_model(vocab_size=len(tokenizer)), sliding):
        yield LocalEngine(model.eval(), end_token_ids=[END], batch_size=4, tokenizer=tokenizer)


def generate(engine, tokenizer, formats, *, sampling=None, count=1):
    prompts = [tokenizer.encode(f"row {i} fox") + [5] * (i % 3) for i in range(len(formats))]
    masks = GrammarMasks([f.grammar() for f in formats], tokenizer, [END], len(tokenizer))
    completions = engine.generate(
        prompts, max_new_tokens=40, sampling=sampling, num_completions=count, grammars=masks
    ).completions
    assert not any(completion.truncated for completion in completions)
    return prompts, completions, tokenizer.batch_decode([c.tokens for c in completions], skip_special_tokens=True)


def test_completions_are_among_the_choices(tokenizer):
    for engine in engines(tokenizer):
        _, _, texts = generate(engine, tokenizer, [StructuredOutputs(choices=CHOICES)] * 9)
        assert set(texts) <= set(CHOICES)


def test_each_prompt_has_choices_of_its_own(tokenizer):
    formats = [StructuredOutputs(choices=[choice]) for choice in CHOICES]
    for engine in engines(tokenizer):
        assert generate(engine, tokenizer, formats)[2] == CHOICES


def test_every_choice_can_be_sampled(tokenizer):
    torch.manual_seed(0)
    for engine in engines(tokenizer):
        formats = [StructuredOutputs(choices=["fox", "fox lamp", "row"])] * 2
        _, completions, texts = generate(engine, tokenizer, formats, sampling=Sampling(temperature=2.0), count=100)
        assert set(texts) == {"fox", "fox lamp", "row"}
        assert all(len(c.logprobs) == len(c.tokens) for c in completions)


def test_completions_fit_the_schema_and_the_expression(tokenizer):
    for engine in engines(tokenizer):
        _, _, texts = generate(
            engine, tokenizer, [StructuredOutputs(json_schema=SCHEMA), StructuredOutputs(regex="[ab]{3}-[0-9]")]
        )
        answer = json.loads(texts[0])
        assert answer.keys() == {"name", "count"}
        assert answer["name"] in ("sum", "mean")
        assert 0 <= answer["count"] <= 9
        assert re.fullmatch("[ab]{3}-[0-9]", texts[1])


def test_tokens_are_the_likeliest_that_are_allowed(tokenizer):
    """Against the slow, obvious way: one pass per token, and the choices' own tokens compared."""
    model = make_model(vocab_size=len(tokenizer)).eval()
    engine = LocalEngine(model, end_token_ids=[END], tokenizer=tokenizer)
    choices = ["fox", "fox lamp", "row seven", "lamp"]
    prompts, completions, _ = generate(engine, tokenizer, [StructuredOutputs(choices=choices)] * 3)
    allowed = [[*tokenizer.encode(choice, add_special_tokens=False), END] for choice in choices]
    for prompt, completion in zip(prompts, completions, strict=True):
        tokens = []
        while tokens not in allowed:
            following = [ids[len(tokens)] for ids in allowed if ids[: len(tokens)] == tokens and len(ids) > len(tokens)]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0, -1]
            tokens.append(max(following, key=lambda token: float(logits[token])))
        assert list(completion.tokens) == tokens


def test_masks_leave_other_rows_and_ended_ones_alone(tokenizer):
    masks = GrammarMasks([StructuredOutputs(choices=["fox"]).grammar()] * 2, tokenizer, [END], len(tokenizer))
    mask = masks.start([0, 1])
    whole = [*tokenizer.encode("fox", add_special_tokens=False), END]
    logits = torch.zeros(2, len(tokenizer))
    mask.apply(logits, [1, 0], [[], whole])
    assert bool(logits[0].isfinite().all())  # it has ended
    assert logits[1].isfinite().nonzero().flatten().tolist() == whole[:1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "takes one of choices, json_schema and regex; got none of them"),
        ({"choices": ["a"], "regex": "a"}, "got choices and regex"),
        ({"choices": []}, "expected a list of strings that aren't empty"),
        ({"choices": "abc"}, "expected a list of strings that aren't empty"),
        ({"choices": ["a", ""]}, "expected a list of strings that aren't empty"),
        ({"choices": 3}, "choices=3: expected a list"),
        ({"choices": [True, False]}, "Quote words such as yes, no, on and off in YAML"),
        ({"json_schema": True}, "json_schema is a bool"),
        ({"json_schema": "{"}, "isn't JSON"),
        ({"regex": 5}, "regex=5: expected a string"),
    ],
)
def test_structured_outputs_refuse_invalid_options(options, message):
    with pytest.raises(ConfigError, match=message):
        StructuredOutputs(**options)


def test_structured_outputs_name_an_unknown_key():
    with pytest.raises(ConfigError, match="no 'choice': expected one of choices"):
        StructuredOutputs.from_dict({"choice": ["a"]})


def test_thousands_of_choices_can_be_matched(tokenizer):
    choices = [f"item number {i}" for i in range(3000)]
    engine = next(engines(tokenizer))
    assert set(generate(engine, tokenizer, [StructuredOutputs(choices=choices)] * 2)[2]) <= set(choices)


def test_choices_of_an_iterator_are_kept(tokenizer):
    format_ = StructuredOutputs(choices=(word for word in ("fox", "row")))
    assert format_.choices == ("fox", "row")
    assert format_.grammar() == StructuredOutputs(choices=["fox", "row"]).grammar()


def test_schema_may_be_text():
    assert StructuredOutputs(json_schema=json.dumps(SCHEMA)) == StructuredOutputs(json_schema=SCHEMA)


def test_invalid_schema_is_refused_before_generation(tokenizer):
    with pytest.raises(ConfigError, match="can't be matched"):
        GrammarMasks([StructuredOutputs(regex="(").grammar()], tokenizer, [END], len(tokenizer))
