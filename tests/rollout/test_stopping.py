"""Completions end with the token that completes a stop string."""

import pytest
import torch
from architectures import SIZES
from tiny import make_model
from transformers import MistralConfig, MistralForCausalLM

from lightning_ft.errors import ConfigError
from lightning_ft.rollout.decode import StopChecker
from lightning_ft.rollout.local import LocalEngine
from lightning_ft.rollout.protocol import Sampling

END = 2


def stop_length(tokenizer, tokens, stop):
    """The slow, obvious way: number of tokens after which the whole text first contains a stop string."""
    for length in range(1, len(tokens) + 1):
        if any(s in tokenizer.decode(tokens[:length]) for s in stop):
            return length
    return None


@pytest.mark.parametrize("stop", [("zo",), ("ef", "7é"), ("lamp q",), ("<|im_start|>a",), ("€",), ("\n\n",)], ids=str)
def test_stop_checker_agrees_with_the_whole_text(tokenizer, stop):
    """Random tokens with stop strings inserted, one token per byte and as the tokenizer encodes them."""
    draw = torch.Generator().manual_seed(0)
    checker, found, spans = StopChecker([END], stop, tokenizer), 0, 0
    for number in range(120):
        tokens = torch.randint(3, len(tokenizer), (60,), generator=draw).tolist()
        inserted = stop[number % len(stop)]
        if number % 3 == 0:
            tokens[30:30] = tokenizer.encode(inserted, add_special_tokens=False)
        elif number % 3 == 1:
            tokens[30:30] = [i for b in inserted.encode() for i in [tokenizer.convert_tokens_to_ids(byte_token(b))]]
        expected = stop_length(tokenizer, tokens, stop)
        last = len(tokens) if expected is None else expected
        flags = [checker.contains_stop_string([tokens[:length]])[0] for length in range(1, last + 1)]
        assert flags == [False] * (last - 1) + [expected is not None]
        found += expected is not None
        spans += expected is not None and not any(s in tokenizer.decode(tokens[expected - 1]) for s in stop)
    assert found > 60
    assert spans > 20  # strings that no single token contains


def byte_token(value):
    """Token of a byte in byte-level BPE."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(value) if value in kept else chr(256 + [b for b in range(256) if b not in kept].index(value))


def engines(tokenizer):
    local = make_model(vocab_size=len(tokenizer)).eval()
    torch.manual_seed(0)
    plain = MistralForCausalLM(MistralConfig(sliding_window=8, **SIZES | {"vocab_size": len(tokenizer)}))
    for model in (local, plain.eval()):
        yield model, LocalEngine(model, end_token_ids=[END], batch_size=16, tokenizer=tokenizer)


@pytest.mark.filterwarnings("ignore:.*only slower")
def test_both_loops_stop_exactly_at_stop_strings(tokenizer):
    draw = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, len(tokenizer), (4, 9), generator=draw).tolist()
    never_stop = ("this string is never written",)
    for _, engine in engines(tokenizer):
        options = {"max_new_tokens": 40, "num_completions": 4}
        torch.manual_seed(2)
        full = engine.generate(prompts, sampling=Sampling(temperature=2.0, stop=never_stop), **options).completions
        assert all(c.truncated == (c.tokens[-1] != END) for c in full)
        text = tokenizer.decode(full[0].tokens[:12])
        stop = (text[5:8], tokenizer.decode(full[5].tokens[20:22]))
        torch.manual_seed(2)
        cut = engine.generate(prompts, sampling=Sampling(temperature=2.0, stop=stop), **options).completions
        lengths = [stop_length(tokenizer, c.tokens, stop) for c in cut]
        assert all(length in (None, len(c.tokens)) for length, c in zip(lengths, cut, strict=True))
        assert [c.truncated for c in cut] == [
            length is None and c.tokens[-1] != END for length, c in zip(lengths, cut, strict=True)
        ]
        assert (
            cut[0].tokens == full[0].tokens[: len(cut[0].tokens)]
        )  # the draws are the same until sequences leave the batch
        assert cut[0].tokens != full[0].tokens
        assert not cut[0].truncated
        assert any(c.truncated for c in cut)
        assert all(len(c.logprobs) == len(c.tokens) for c in cut)


@pytest.mark.filterwarnings("ignore:.*only slower")
def test_greedy_completions_stop_at_stop_strings(tokenizer):
    for _, engine in engines(tokenizer):
        (full,) = engine.generate([[5, 6, 7]], max_new_tokens=20).completions
        text = tokenizer.decode(full.tokens[:8])
        assert len(text) > 4
        stop = (text[2:5],)
        sampling = Sampling(temperature=0.0, stop=stop)
        cut = engine.generate([[5, 6, 7]], max_new_tokens=20, sampling=sampling, num_completions=2).completions
        length = stop_length(tokenizer, full.tokens, stop)
        assert [c.tokens for c in cut] == [full.tokens[:length]] * 2
        assert not cut[0].truncated
        assert cut[0].logprobs == ()


def test_stop_string_in_the_prompt_is_ignored(tokenizer):
    _, engine = next(engines(tokenizer))
    prompt = tokenizer.encode("lamp lamp lamp")
    (free,) = engine.generate([prompt], max_new_tokens=5).completions
    sampling = Sampling(temperature=0.0, stop=("lamp",))
    (stopping,) = engine.generate([prompt], max_new_tokens=5, sampling=sampling).completions
    assert "lamp" not in tokenizer.decode(free.tokens)
    assert stopping == free


def test_stop_strings_without_a_tokenizer_are_refused():
    engine = LocalEngine(make_model(), end_token_ids=[END])
    with pytest.raises(ConfigError, match="pass the engine a tokenizer="):
        engine.generate([[5]], max_new_tokens=2, sampling=Sampling(stop=("x",)))
