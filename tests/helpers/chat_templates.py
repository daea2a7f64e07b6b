"""Chat templates for tests: those that TRL ships, and those in `templates/`, written for the tests.

Each of the latter does one thing that templates of well-known models do; its first line says which.
"""

import re
from pathlib import Path

import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SHIPPED = {
    path.stem: path.read_text(encoding="utf-8")
    for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
}
WRITTEN = {
    path.stem: path.read_text(encoding="utf-8")
    for path in sorted((Path(__file__).parent / "templates").glob("*.jinja"))
}
ALL = [*SHIPPED, *WRITTEN]

_TOKENS = re.compile(
    r"<\|[^|>'\" ]{1,40}\|>|<\uff5c[^\uff5c]{1,40}\uff5c>|<(?:start|end)_of_turn>|<end_of_utterance>|</?s>"
    r"|<turn\|>|<\|turn>"
    r'|<\|?channel\|?>|<\|tool(?:_call|_response)?>|<tool(?:_call|_response)?\|>|<\|"\|>'
    r"|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_RESULTS|TOOL_CALLS"
    r"|ARGS|gMASK)\]|<sop>|<(?:bos|eos)>"
)
_ROLES = ["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
_MORE = {  # tokens whose names a template puts together
    "phi4_mini": _ROLES,
    "glm4": _ROLES,
    "olmo": _ROLES,
    "command_a": ["<|USER_TOKEN|>", "<|SYSTEM_TOKEN|>"],
}
_NONE = {"chatml_of_text", "llama2", "vicuna", "mistral_v1", "role_words", "single_turn"}  # headers are plain text

_EOS = {  # by how names begin
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "command_": "<|END_OF_TURN_TOKEN|>",
    "dated": "<|eot_id|>",
    "deepseek": "<\uff5cend▁of▁sentence\uff5c>",
    "diffusion_": "<turn|>",
    "doubled_": "<|endoftext|>",
    "gemma": "<end_of_turn>",
    "gemma4": "<turn|>",
    "gemma_": "<eos>",
    "glm": "<|endoftext|>",
    "gptoss": "<|return|>",
    "granite": "<|end_of_text|>",
    "idefics": "<end_of_utterance>",
    "internlm": "<|im_end|>",
    "last_window": "<|im_end|>",
    "lfm": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "marker_": "<|im_end|>",
    "muse": "<|eot|>",
    "nemotron": "<|im_end|>",
    "olmo": "<|endoftext|>",
    "parts": "<|im_end|>",
    "phi": "<|endoftext|>",
    "phi4": "<|im_end|>",
    "phi4_mini": "<|endoftext|>",
    "qwen": "<|im_end|>",
    "smollm": "<|im_end|>",
    "smolvlm": "<end_of_utterance>",
    "think_last": "<|im_end|>",
    "tool_in": "<|im_end|>",
    "two_": "<|im_end|>",
    "wants_": "<|im_end|>",
    "zephyr_gemma": "<eos>",
}


def eos_of(name):
    known = [start for start in _EOS if name.startswith(start)]
    return _EOS[max(known, key=len)] if known else "</s>"


def template_tokenizer(name):
    """A tokenizer with one token per byte, and the special tokens that the template writes."""
    source = SHIPPED.get(name) or WRITTEN[name]
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False)
    named = [] if name in _NONE else [*_TOKENS.findall(source), *_MORE.get(name, [])]
    tokenizer.add_special_tokens({"additional_special_tokens": list(dict.fromkeys(["<s>", *named, eos_of(name)]))})
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    tokenizer.bos_token, tokenizer.eos_token = "<s>", eos_of(name)
    tokenizer.chat_template = source
    return tokenizer


def user(content):
    return {"role": "user", "content": content}


def answer(content, **more):
    return {"role": "assistant", "content": content, **more}


_CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Rome", "days": 2}}}
_SYSTEM = {"role": "system", "content": "Be brief."}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "w",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
_RESULT = {"role": "tool", "content": "clear sky", "name": "get_weather", "tool_call_id": "a"}
LONG = "a long answer, " * 100

SCENARIOS = {
    "single": ([user("2+2?"), answer("four")], {}),
    "system": ([_SYSTEM, user("2+2?"), answer("four")], {}),
    "multi": ([user("2+2?"), answer("four"), user("3+3?"), answer("six"), user("1+1?"), answer("two")], {}),
    "system, multi": ([_SYSTEM, user("2+2?"), answer("four"), user("3+3?"), answer("six")], {}),
    "reasoning": (
        [
            user("2+2?"),
            answer("four", reasoning_content="two and two"),
            user("3+3?"),
            answer("six", reasoning_content="three twice"),
        ],
        {},
    ),
    "inline": ([user("2+2?"), answer("<think>\ntwo and two\n</think>\n\nfour")], {}),
    "blank": ([user("def f():"), answer("    return 1\n")], {}),
    "tools": ([user("Rome?"), answer("", tool_calls=[_CALL]), _RESULT, answer("It is sunny.")], {"tools": TOOLS}),
    "last call": ([user("Rome?"), answer("", tool_calls=[_CALL])], {"tools": TOOLS}),
    "echo": (
        [
            user("assistant"),
            answer("assistant"),
            user("user"),
            answer("user"),
            user("Assistant:"),
            answer("Assistant:"),
        ],
        {},
    ),
    "zero": ([user("1-1?"), answer("0"), user("0+0?"), answer("0")], {}),
    "unicode": ([user("déjà vu 🙂?"), answer("日本語 🙂é"), user("¿"), answer("👩‍👩‍👧 ñ")], {}),
    "long": ([user("q" * 1000), answer(LONG + "end.")], {}),
}


def runs(tokenizer, example):
    """The text of each run of supervised tokens."""
    found, last = [], False
    for token, supervised in zip(example.input_ids.tolist(), example.supervised.tolist(), strict=True):
        if supervised:
            found = [*found[:-1], [*found[-1], token]] if last else [*found, [token]]
        last = supervised
    return [tokenizer.decode(run) for run in found]
