"""Tokens of a conversation, and which of them are supervised."""

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl.chat_template_utils import qwen3_chat_template

from lightning_ft.data.encode import AnswerLostError, answer_end_token, encode, encode_conversation, encode_prompt
from lightning_ft.data.templates import PLAIN_TEMPLATE, chat_template, set_chat_template
from lightning_ft.errors import ConfigError, TokenizerError

U, A, S = "user", "assistant", "system"


def talk(*texts, system=None):
    messages = [{"role": (U, A)[i % 2], "content": text} for i, text in enumerate(texts)]
    return [*([{"role": S, "content": system}] if system else []), *messages]


def answers(tokenizer, example):
    """The text of each run of supervised tokens."""
    runs, last = [], False
    for token, supervised in zip(example.input_ids.tolist(), example.supervised.tolist(), strict=True):
        if supervised:
            runs = [*runs[:-1], [*runs[-1], token]] if last else [*runs, [token]]
        last = supervised
    return [tokenizer.decode(run) for run in runs]


END = {"chatml": "<|im_end|>", "chatml_without_markers": "<|im_end|>", "llama": "<|im_end|>", "none": "<|im_end|>",
       "text": "<|im_end|>"}  # fmt: skip


@pytest.mark.parametrize("template", [*END, "plain"])
@pytest.mark.parametrize("pad", ["<|pad|>", None])
def test_encode_supervises_the_answer_and_its_end_token(make_tokenizer, template, pad):
    tokenizer = make_tokenizer(template, pad=pad)
    if template in ("plain", "text"):
        set_chat_template(tokenizer, template)
    messages = talk("where is my parcel", "refund it, please")
    example = encode_conversation(tokenizer, messages)
    assert [a.strip() for a in answers(tokenizer, example)] == ["refund it, please<|im_end|>"]
    assert not example.supervised[0]
    prompt = encode_prompt(tokenizer, messages[:-1])
    assert example.input_ids[: len(prompt)].tolist() == prompt
    assert int(example.supervised.nonzero()[0]) == len(prompt)  # only the generation prompt precedes the answer
    assert prompt == tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]


@pytest.mark.parametrize("template", ["chatml", "chatml_without_markers", "llama", "none"])
def test_encode_supervises_every_assistant_turn(make_tokenizer, template):
    tokenizer = make_tokenizer(template)
    example = encode_conversation(tokenizer, talk("one", "two", "two", "two two", "five", "six"))
    assert [a.strip() for a in answers(tokenizer, example)] == ["two<|im_end|>", "two two<|im_end|>", "six<|im_end|>"]


def test_encode_matches_the_assistant_mask_of_transformers(tokenizer):
    messages = talk("one", "two", "three", "four", system="be brief")
    example = encode_conversation(tokenizer, messages)
    theirs = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert example.input_ids.tolist() == theirs["input_ids"]
    assert example.supervised.int().tolist() == theirs["assistant_masks"]


def test_encode_is_the_same_with_and_without_generation_markers(make_tokenizer):
    messages = talk(
        "user", "assistant", "assistant", "user", system="assistant"
    )  # searching for the answer's text would find the wrong turn
    marked = encode_conversation(make_tokenizer("chatml"), messages)
    bare = encode_conversation(make_tokenizer("chatml_without_markers"), messages)
    assert marked.input_ids.tolist() == bare.input_ids.tolist()
    assert marked.supervised.tolist() == bare.supervised.tolist()


def test_encode_supervises_the_answer_after_the_generation_prompt(make_tokenizer):
    tokenizer = make_tokenizer(qwen3_chat_template)
    encoded = encode(tokenizer, talk("2+2?", "4"), chat_template(tokenizer))
    assert answers(tokenizer, encoded.example) == ["<think>\n\n</think>\n\n4<|im_end|>"]
    assert encoded.prompt_matches


@pytest.mark.parametrize("template", ["chatml", "chatml_without_markers", "llama", "none", "text"])
@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("where is my parcel", " refund"),  # a leading space
        ("a", "\nb"),
        ("a\n", "\n\n b \n"),
        ("a ", "  b"),
        ("déjà vu 🙂", "日本語 🙂"),
        ("User:", "Assistant: User:"),
        ("<|im_start|>", "<think>"),
        ("x", "9" * 50),
    ],
)
def test_encode_uses_the_prompt_of_generation(make_tokenizer, template, question, answer):
    tokenizer = make_tokenizer(template)
    if template == "text":
        set_chat_template(tokenizer, "text")
    for messages in (talk(question, answer), talk(question, answer, answer, question.replace("<|im_start|>", "z"))):
        encoded = encode(tokenizer, messages, chat_template(tokenizer))
        prompt = encode_prompt(tokenizer, messages[:-1])
        if template == "llama" and messages[-1]["content"] != messages[-1]["content"].strip():
            continue  # this template strips whitespace
        assert encoded.example.input_ids[: len(prompt)].tolist() == prompt
        assert encoded.prompt_matches
        text = tokenizer.decode(encoded.example.input_ids[len(prompt) :][encoded.example.supervised[len(prompt) :]])
        assert text.removesuffix("<|im_end|>").strip() == messages[-1]["content"].strip()
        assert text.endswith("<|im_end|>")


def test_encode_splits_tokens_that_merge_prompt_and_answer(make_tokenizer):
    """`the qu` + `ick` is one token in the whole text, but generation starts from `qu`."""
    tokenizer = make_tokenizer()
    set_chat_template(tokenizer, "text")
    messages = talk("the qu", "ick brown fox")
    whole = tokenizer("<|bos|>the quick brown fox<|im_end|>", add_special_tokens=False)["input_ids"]
    example = encode_conversation(tokenizer, messages)
    assert example.input_ids.tolist() != whole
    assert tokenizer.decode(example.input_ids) == tokenizer.decode(whole)
    assert answers(tokenizer, example) == ["ick brown fox<|im_end|>"]


def test_encode_appends_eos_if_the_template_has_no_end_token(make_tokenizer):
    tokenizer = make_tokenizer("headers_only")
    example = encode_conversation(tokenizer, talk("one", "two", "three", "four"))
    assert answers(tokenizer, example) == ["two", "four<|im_end|>"]  # the next turn's header doesn't end an answer
    assert int(example.input_ids[-1]) == tokenizer.eos_token_id
    assert bool(example.supervised[-1])


def test_encode_writes_bos_once_and_unsupervised(make_tokenizer):
    for template in ("llama", "none"):
        tokenizer = make_tokenizer(template)
        ids = encode_conversation(tokenizer, talk("a", "b")).input_ids.tolist()
        assert ids.count(tokenizer.bos_token_id) == 1
    assert (
        make_tokenizer("none", bos=None).decode(
            encode_conversation(make_tokenizer("none", bos=None), talk("a", "b")).input_ids
        )
        == "User:\na\nAssistant:\nb<|im_end|>\n"
    )


def test_answer_end_token_is_that_of_the_template(make_tokenizer):
    assert answer_end_token(make_tokenizer("chatml")) == make_tokenizer().convert_tokens_to_ids("<|im_end|>")
    other_eos = make_tokenizer("chatml", eos="<|pad|>")  # as in base models, EOS is not the template's end token
    assert answer_end_token(other_eos) == other_eos.convert_tokens_to_ids("<|im_end|>")


def test_tokenizer_without_template_gets_the_plain_template(make_tokenizer):
    tokenizer = make_tokenizer("none")
    encode_prompt(tokenizer, talk("a"))
    assert tokenizer.chat_template == PLAIN_TEMPLATE


def test_set_chat_template_accepts_names_files_and_templates(make_tokenizer, tmp_path):
    tokenizer = make_tokenizer()
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }}")
    set_chat_template(tokenizer, str(tmp_path / "mine.jinja"))
    assert tokenizer.chat_template == "{{ messages[0].content }}"
    set_chat_template(tokenizer, "{{ 'x' }}")
    assert tokenizer.chat_template == "{{ 'x' }}"
    with pytest.raises(ConfigError, match="chat_template='plian': expected 'plain', 'text', a file"):
        set_chat_template(tokenizer, "plian")


def test_encode_requires_an_eos_token(make_tokenizer):
    with pytest.raises(TokenizerError, match=r"has no EOS token, so no answer could ever end. Set tokenizer.eos_token"):
        encode_conversation(make_tokenizer(eos=None), talk("a", "b"))
    with pytest.raises(TokenizerError, match="no EOS"):
        encode_prompt(make_tokenizer(eos=None), talk("a"))


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("drops_answers", r"drops or changes an answer: 'refund' became ''"),
        ("changes_answers", "drops or changes an answer: 'refund' became 'REFUND"),
    ],
)
def test_encode_rejects_templates_that_lose_answers(make_tokenizer, template, said):
    with pytest.raises(AnswerLostError, match=said):
        encode_conversation(make_tokenizer(template), talk("where is my parcel", "refund"))


def test_encode_names_turns_that_the_template_refuses(make_tokenizer):
    with pytest.raises(
        TokenizerError, match="refuses a conversation of system, user, assistant: System role not supported"
    ):
        encode_conversation(make_tokenizer("llama"), talk("a", "b", system="s"))


def test_encode_rejects_several_templates_without_default(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"tool_use": "x"}
    with pytest.raises(TokenizerError, match=r"multiple chat templates with no default.*Pass chat_template="):
        chat_template(tokenizer)


def test_encode_notes_a_prompt_that_differs_from_generation(make_tokenizer):
    tokenizer = make_tokenizer("other_prompt")
    assert not encode(tokenizer, talk("a", "b"), chat_template(tokenizer)).prompt_matches


PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"
)


class WithoutOffsets(PreTrainedTokenizerFast):
    """A tokenizer without offsets."""

    is_fast = False


def stripping_tokenizer(spaces="bytes"):
    """A tokenizer whose header and end tokens strip the white space after them, as Phi-3's do."""
    if spaces == "bytes":
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        core = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
        core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    else:
        core = Tokenizer(models.BPE({c: i for i, c in enumerate(["▁", *map(chr, range(32, 127)), "\n"])}, []))
        if spaces == "legacy":
            core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=spaces, split=False)
        core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>")
    headers = [f"<|{name}|>" for name in ("user", "assistant", "system", "end")]
    tokenizer.add_tokens([AddedToken(h, rstrip=True, normalized=False, special=True) for h in headers])
    tokenizer.chat_template = PHI3
    return tokenizer


@pytest.mark.parametrize("answer", ["    return 1", " Paris.", "\n\n  b", "four"])
@pytest.mark.parametrize("fast", [True, False])
def test_encode_keeps_white_space_that_header_tokens_strip(answer, fast):
    tokenizer = stripping_tokenizer()
    if not fast:
        tokenizer.__class__ = WithoutOffsets
    encoded = encode(tokenizer, talk("    def f():", answer), chat_template(tokenizer))
    assert answers(tokenizer, encoded.example) == [f"{answer}<|end|>"]
    prompt = encode_prompt(tokenizer, talk("    def f():"))
    assert encoded.example.input_ids[: len(prompt)].tolist() == prompt
    assert int(encoded.example.supervised.nonzero()[0]) == len(prompt)
    assert encoded.prompt_matches


def test_encode_keeps_stripped_white_space_of_every_supervised_answer():
    tokenizer = stripping_tokenizer()
    messages = talk("a", "  b", "c", " d", "e", "f")
    encoded = encode(tokenizer, messages, chat_template(tokenizer))
    assert answers(tokenizer, encoded.example) == ["  b<|end|>", " d<|end|>", "f<|end|>"]
    assert not encoded.prompt_matches  # the prompt of "f" lacks the white space of the earlier answers
    row, prompt = encoded.mismatch
    assert ("|>  b<|" in row, "|>b<|" in prompt) == (True, True)


def test_encode_strips_answers_that_are_context_as_generation_does():
    tokenizer = stripping_tokenizer()
    messages = talk("a", "  b", "c", " d")
    prompt = encode_prompt(tokenizer, messages[:-1])
    for turns, last_only in ((messages, True), ([messages[0], {**messages[1], "train": False}, *messages[2:]], False)):
        encoded = encode(tokenizer, turns, chat_template(tokenizer), last_only=last_only)
        assert answers(tokenizer, encoded.example) == [" d<|end|>"]
        assert encoded.example.input_ids[: len(prompt)].tolist() == prompt
        assert encoded.prompt_matches


@pytest.mark.parametrize("spaces", ["first", "never", "legacy"])
def test_encode_adds_no_space_to_white_space_that_is_kept(spaces):
    """A space is added at the start of the text (``first``) or after every special token (``legacy``), as elsewhere."""
    tokenizer = stripping_tokenizer(spaces)
    plain, spaced = (encode_conversation(tokenizer, talk("a", content)) for content in ("b", "  b"))
    plain_tokens, spaced_tokens = (
        tokenizer.convert_ids_to_tokens(example.input_ids[example.supervised].tolist()) for example in (plain, spaced)
    )
    assert spaced_tokens == ["▁", "▁", *plain_tokens]
