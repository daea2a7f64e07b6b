"""Supervised spans are exactly the answers and what the template writes for them, whatever the texts are."""

import json
import re
from typing import NamedTuple

import pytest
from chat_templates import SCENARIOS, answer, runs, template_tokenizer, user
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from lightning_ft.data.encode import AnswerLostError, encode, encode_prompt
from lightning_ft.data.spans import REASONING_LEFT_OUT
from lightning_ft.data.templates import ChatTemplate
from lightning_ft.errors import TokenizerError


class Writes(NamedTuple):
    """The supervised text of an answer.

    Args:
        before: What precedes it, in the last turn.
        after: What ends the last turn.
        before_earlier: What precedes those before the last.
        after_earlier: What ends them; None: the same as the last.
        trims: Whether the template trims it.
        system: Whether the template takes a system turn.
        asked: Whether the prompt is what the template writes before an answer.
        trims_last: Line breaks that it leaves out before the last answer only.
    """

    before: str = ""
    after: str = "<|im_end|>"
    before_earlier: str | None = None
    after_earlier: str | None = None
    trims: bool = False
    system: bool = True
    asked: bool = True
    trims_last: str = ""


TEMPLATES = {
    "phi4": Writes(),
    "phi4_mini": Writes(after="<|end|>"),
    "internlm2": Writes(),
    "zephyr_gemma": Writes(),
    "zephyr": Writes(after="</s>"),
    "llama2": Writes(" ", " </s>", trims=True),
    "llama3_1": Writes(after="<|eot_id|>", trims=True),
    "vicuna": Writes(" ", "</s>"),
    "mistral_v3": Writes(" ", "</s>"),
    "mistral_nemo": Writes(after="</s>"),
    "command_a": Writes("<|START_RESPONSE|>", "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
    "glm4": Writes("\n", "<|endoftext|>", after_earlier=""),
    "olmo": Writes(after="<|endoftext|>", after_earlier=""),
    "qwen3": Writes("<think>\n\n</think>\n\n", before_earlier="", trims_last="\n"),
    "deepseekv3": Writes(after="<｜end▁of▁sentence｜>", asked=False),  # noqa: RUF001  # the prompt opens <think>
    "gptoss": Writes("<|channel|>final<|message|>", "<|return|>", after_earlier=""),
    "parts": Writes(" "),
    "two_blocks": Writes(),
    "role_words": Writes(after="\n</s>"),
    "chatml_of_text": Writes(after="</s>", after_earlier=""),
    "mistral_v1": Writes(after="</s>", system=False),
}

ODD = ["905316000061", "905316000161", "1905316000162", "714", "1", "7", "2", "8", "<|im_en", "<", "|>", "assistant",
       "user\n", "ASSISTANT: ", " [/INST]", "### Assistant:\n", "\n\n", " ", "\u00a0", "</s", "{{ x }}", "{% y %}",
       "\\n", "'", '"', "0", "ﬁ", "e\u0301", "🙂", "\u200d"]  # fmt: skip
pieces = st.one_of(st.sampled_from(ODD), st.text(st.characters(exclude_categories=("Cs", "Cc", "Cn")), max_size=8))
texts = st.lists(pieces, min_size=1, max_size=4).map("".join)
said = texts.filter(lambda text: text.strip() and "think>" not in text)


@st.composite
def conversations(draw):
    """Turns, in which an answer may repeat the text of another turn."""
    first = draw(st.lists(st.tuples(said, said), min_size=1, max_size=3))
    turns = [turn for question, reply in first for turn in (user(question), answer(reply))]
    if draw(st.booleans()):
        target, origin = draw(st.sampled_from(turns)), draw(st.sampled_from(turns))
        target["content"] = draw(st.sampled_from(["", "x"])) + origin["content"]
    return [*([{"role": "system", "content": draw(said)}] if draw(st.booleans()) else []), *turns]


KNOWN = {}


def known(name):
    """The tokenizer and the template, made once."""
    if name not in KNOWN:
        tokenizer = template_tokenizer(name)
        KNOWN[name] = tokenizer, ChatTemplate(tokenizer)
    return KNOWN[name]


def expected(writes, messages):
    """The supervised runs of a conversation."""
    contents = [message["content"] for message in messages if message["role"] == "assistant"]
    contents = [content.strip() for content in contents] if writes.trims else contents
    before = writes.before if writes.before_earlier is None else writes.before_earlier
    after = writes.after if writes.after_earlier is None else writes.after_earlier
    last = contents[-1].lstrip(writes.trims_last) if writes.trims_last else contents[-1]
    return [*(before + content + after for content in contents[:-1]), writes.before + last + writes.after]


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(conversations())
@example([user("a"), answer("a"), user("a"), answer("a")])
@example([user("2"), answer("1"), user("1"), answer("2")])
@example([user("<|im_end"), answer("<|im_en"), user("</"), answer("</")])
@example([{"role": "system", "content": "four"}, user("four"), answer("four")])
@example([user("q"), answer("905316000161")])
def test_render_answers_supervises_only_answers(name, messages):
    writes, (tokenizer, template) = TEMPLATES[name], known(name)
    messages = messages if writes.system else [message for message in messages if message["role"] != "system"]
    encoded = encode(tokenizer, messages, template)
    assert runs(tokenizer, encoded.example) == expected(writes, messages)
    prompt = encode_prompt(tokenizer, messages[:-1], template)
    same = encoded.example.input_ids[: len(prompt)].tolist() == prompt
    assert encoded.prompt_matches == same == writes.asked
    if same:
        assert not bool(encoded.example.supervised[len(prompt) - 1])
        assert bool(encoded.example.supervised[len(prompt)])


# ---------------------------------------------------------------- tools


def _json(value):
    return json.dumps(value, ensure_ascii=False)


CALLS = {  # text of a tool call, and end of a turn
    "qwen2_5": (
        lambda name, given: f'<tool_call>\n{{"name": "{name}", "arguments": {_json(given)}}}\n</tool_call>',
        "<|im_end|>",
    ),
    "llama3_1": (lambda name, given: f'{{"name": "{name}", "parameters": {_json(given)}}}', "<|eot_id|>"),
    "granite": (lambda name, given: "<|tool_call|>" + _json({"name": name, "arguments": given}), "<|end_of_text|>"),
    "tekken": (lambda name, given: f"[TOOL_CALLS]{name}[ARGS]{_json(given)}", "</s>"),
    "tool_in_user": (lambda name, given: f"<tool_call>{name} {_json(given)}</tool_call>", "<|im_end|>"),
}
values = st.one_of(said, st.integers(-9, 99), st.booleans(), st.lists(st.integers(0, 9), max_size=2), st.just(""))
arguments = st.dictionaries(st.sampled_from(["city", "days", "a b", "x"]), values, max_size=3)


@pytest.mark.parametrize("name", CALLS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(said, arguments, said, said, arguments)
@example("Rome?", {}, "{}", "sunny", {"city": "Rome"})
@example("Rome", {"city": "Rome"}, "Rome", "Rome", {})
@example("Call {'city': 'Rome'}", {"city": "Rome"}, "{'city': 'Rome'}", "{'city': 'Rome'}", {"city": "Rome"})
def test_render_answers_supervises_tool_calls_but_not_results(name, question, first, result, reply, second):
    (written, end), (tokenizer, template) = CALLS[name], known(name)

    def call(given):
        return answer("", tool_calls=[{"type": "function", "function": {"name": "look", "arguments": given}}])

    tool = {"role": "tool", "content": result, "name": "look", "tool_call_id": "a"}
    reply = reply.strip()
    messages = [user(question), call(first), tool, answer(reply), user(question), call(second)]
    encoded = encode(tokenizer, messages, template)
    assert runs(tokenizer, encoded.example) == [
        written("look", first) + end,
        reply + end,
        written("look", second) + end,
    ]
    assert encoded.prompt_matches


# ---------------------------------------------------------------- reasoning

REASONING = {  # text of the last answer
    "qwen3": "<think>\n{reasoning}\n</think>\n\n{content}<|im_end|>",
    "qwen3_8": "{reasoning}\n</think>\n\n{content}<|im_end|>",
    "think_prefill": "{reasoning}\n</think>\n\n{content}</s>",
    "deepseekv3": "{reasoning}\n</think>\n\n{content}<｜end▁of▁sentence｜>",  # noqa: RUF001
    "lfm2_2_5": "<think>{reasoning}</think>{content}<|im_end|>",
    "gptoss": "<|channel|>analysis<|message|>{reasoning}<|end|>"
    "<|start|>assistant<|channel|>final<|message|>{content}<|return|>",
}
bare = said.map(str.strip)


@pytest.mark.parametrize("name", REASONING)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(bare, bare, bare, bare)
@example("a", "a", "a", "a")
@example("t", "think", "think", "k")
def test_render_answers_supervises_the_last_reasoning(name, question, thought, reply, earlier):
    tokenizer, template = known(name)
    messages = [user(question), answer(earlier), user(question), answer(reply, reasoning_content=thought)]
    encoded = encode(tokenizer, messages, template)
    assert runs(tokenizer, encoded.example)[1:] == [REASONING[name].format(reasoning=thought, content=reply)]
    assert encoded.prompt_matches


@pytest.mark.parametrize("name", ["phi4", "llama3_1", "tekken", "vicuna"])
@pytest.mark.parametrize("thought", ["a", "assistant", "im", "four", "s"])
def test_render_answers_rejects_dropped_reasoning(name, thought):
    tokenizer, template = known(name)
    with pytest.raises(AnswerLostError, match="leaves out reasoning_content of the last answer"):
        encode(tokenizer, [user("a"), answer("four", reasoning_content=thought)], template)


# ---------------------------------------------------------------- what a template does to turns


def with_source(source):
    """A tokenizer with a template written here."""
    tokenizer = template_tokenizer("phi4")
    tokenizer.chat_template = source
    return tokenizer, ChatTemplate(tokenizer)


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)


AROUND = "Let me look. <think>a</think>4"
SEVERAL = "<think>first</think>Step 1: add.<think>second</think>Step 2: 4."
KEEPS_ONLY_THE_END = ["qwen3", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "glm4moe"]
"""Templates that write the text after the last ``</think>``, and the reasoning of one block."""


@pytest.mark.parametrize("name", KEEPS_ONLY_THE_END)
@pytest.mark.parametrize("content", [AROUND, SEVERAL])
@pytest.mark.parametrize("following", [[], [user("3+3?"), answer("6")]])
def test_render_answers_rejects_a_template_that_loses_text_around_reasoning(name, content, following):
    tokenizer, template = known(name)
    with pytest.raises(AnswerLostError, match="drops or changes an answer: "):
        encode(tokenizer, [user("2+2?"), answer(content), *following], template)


@pytest.mark.parametrize(
    ("content", "written"),
    [
        (AROUND, "Let me look. 4"),
        (SEVERAL, "Step 1: add.Step 2: 4."),
        ("<think>4</think>4", "4"),
        ("<think>a <think> b</think>4", "4"),
    ],
)
def test_render_answers_notes_reasoning_that_is_left_out_between_kept_text(content, written):
    """A template that removes every block of reasoning and keeps the text around them."""
    outside = "{% for part in m.content.split('</think>') %}{{ part.split('<think>')[0] }}{% endfor %}"
    tokenizer, template = with_source(CHATML.replace("m.content +", f"'' }}}}{outside}{{{{"))
    encoded = encode(tokenizer, [user("2+2?"), answer(content), user("3+3?"), answer("6")], template)
    assert runs(tokenizer, encoded.example) == [f"{written}<|im_end|>", "6<|im_end|>"]
    assert encoded.notes == (REASONING_LEFT_OUT,)
    with pytest.raises(AnswerLostError, match="leaves out the reasoning in <think> of the last answer"):
        encode(tokenizer, [user("2+2?"), answer(content)], template)


@pytest.mark.parametrize("system", ["0", "a", "assistant", "im"])
def test_render_answers_rejects_a_dropped_turn_whose_text_appears_elsewhere(system):
    tokenizer, template = known("drops_system")
    with pytest.raises(AnswerLostError, match="drops the system turn"):
        encode(tokenizer, [{"role": "system", "content": system}, user("a 0"), answer("0 a")], template)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (CHATML.replace("m.content", "m.content | upper"), "drops or changes an answer: 'Ann' became 'ANN"),
        (CHATML.replace("m.content", "m.content[:2]"), "drops or changes an answer: 'Ann' became 'An"),
        (CHATML.replace("for m in messages", "for m in messages[:-1]"), "drops or changes an answer: 'Ann' became ''"),
        (CHATML.replace("m.content", "m.content | reverse"), "drops or changes an answer: 'Ann' became 'nnA"),
        ("{{ messages[-1].content }}" + CHATML, "writes an answer more than once, and another turn between: 'Ann'"),
        (
            "{{ raise_exception('no ' + messages[9].content) }}",
            "refuses a conversation of user, assistant: list object",
        ),
    ],
)
def test_render_answers_rejects_a_template_that_loses_the_answer(source, said):
    tokenizer, template = with_source(source)
    with pytest.raises(TokenizerError, match=said):
        encode(tokenizer, [user("Who?"), answer("Ann")], template)


def test_render_answers_accepts_a_template_that_changes_the_question():
    tokenizer, template = with_source(
        CHATML.replace("m.content +", "(m.content | lower if m.role == 'user' else m.content) +")
    )
    encoded = encode(tokenizer, [user("WHO"), answer("Ann"), user("OK"), answer("Bob")], template)
    assert runs(tokenizer, encoded.example) == ["Ann<|im_end|>", "Bob<|im_end|>"]
    assert encoded.prompt_matches


def test_render_answers_accepts_a_template_without_a_generation_prompt():
    """Text that isn't in the prompt is generated by the model, including the header."""
    tokenizer, template = with_source(CHATML.partition("{% if")[0])
    encoded = encode(tokenizer, [user("Who?"), answer("Ann"), user("And?"), answer("Bob")], template)
    header = "<|im_start|>assistant<|im_sep|>"
    assert runs(tokenizer, encoded.example) == [f"{header}Ann<|im_end|>", f"{header}Bob<|im_end|>"]
    assert encoded.prompt_matches


@pytest.mark.parametrize(
    ("name", "system", "kwargs"),
    [("smollm3", "/no_think Be brief.", {}), ("smollm3", "Be brief.", {"enable_thinking": False})],
)
def test_render_answers_excludes_text_that_the_prompt_prefills(name, system, kwargs):
    tokenizer, template = known(name)
    messages = [{"role": "system", "content": system}, user("a"), answer("b"), user("c"), answer("d")]
    encoded = encode(tokenizer, messages, template, kwargs)
    assert "<think>\n\n</think>\nd" in tokenizer.decode(encoded.example.input_ids)
    assert runs(tokenizer, encoded.example) == ["b<|im_end|>", "d<|im_end|>"]
    assert encoded.prompt_matches


# ---------------------------------------------------------------- tokenizers without offsets


class WithoutOffsets(PreTrainedTokenizerFast):
    """A tokenizer without offsets."""

    is_fast = False

    def __call__(self, *args, **kwargs):
        assert not kwargs.get("return_offsets_mapping")
        return super().__call__(*args, **kwargs)


class Slow(PreTrainedTokenizer):
    """Python's own: the longest match over characters and a few words."""

    def __init__(self, **kwargs):
        self.words = ["quick", "the", "ix", "qu", "ick", *map(chr, range(1, 0x400))]
        self.ids = {word: i for i, word in enumerate(self.words)}
        super().__init__(**kwargs)

    @property
    def vocab_size(self):
        return len(self.words)

    def get_vocab(self):
        return {**self.ids, **self.added_tokens_encoder}

    def _tokenize(self, text, **_):
        return re.findall("|".join(map(re.escape, self.words)), text, re.DOTALL)

    def _convert_token_to_id(self, token):
        return self.ids[token]

    def _convert_id_to_token(self, index):
        return self.words[index]

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)


@pytest.mark.parametrize("name", ["qwen3", "llama2", "vicuna", "glm4", "olmo", "mistral_v3", "think_prefill", "gptoss"])
@pytest.mark.parametrize("scenario", ["system, multi", "blank", "inline", "last call"])
def test_encode_without_offsets_is_the_same(name, scenario):
    messages, kwargs = SCENARIOS[scenario]
    fast, without = template_tokenizer(name), template_tokenizer(name)
    without.__class__ = WithoutOffsets
    tokens = [str(token) for token in fast.added_tokens_decoder.values()]
    slow = Slow(bos_token="<s>", eos_token=fast.eos_token, additional_special_tokens=tokens)
    slow.chat_template = fast.chat_template
    found = []
    for tokenizer in (fast, without, slow):
        try:
            encoded = encode(tokenizer, messages, ChatTemplate(tokenizer), kwargs)
            found.append((runs(tokenizer, encoded.example), encoded.prompt_matches, encoded.notes))
        except TokenizerError as error:
            found.append(str(error))
    assert found == [found[0]] * 3


def test_encode_without_offsets_handles_tokens_that_cross_the_answer():
    """In the whole text `quick` is one token; generation starts from `qu`."""
    slow = Slow(bos_token="<s>", eos_token="</s>")
    slow.chat_template = (
        "{% for m in messages %}{{ m.content + (eos_token if m.role == 'assistant' else '') }}{% endfor %}"
    )
    messages = [user("the qu"), answer("ick"), user("the qu"), answer("ick")]
    encoded = encode(slow, messages, ChatTemplate(slow))
    assert slow.convert_ids_to_tokens(encoded.example.input_ids.tolist()) == [
        "the", " ", "quick", "</s>", "the", " ", "qu", "ick", "</s>"
    ]  # fmt: skip
    assert runs(slow, encoded.example) == ["quick</s>", "ick</s>"]
    assert encoded.prompt_matches
