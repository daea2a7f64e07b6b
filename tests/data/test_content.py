"""Checks of a row's texts: control tokens, and characters that tokenizers of each type change."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lightning_ft.data.content import (
    BOS_TWICE,
    CHANGED_PROMPT,
    EOS_TWICE,
    OWN_MARKUP,
    ContentCheck,
    keeps_every_text,
    remedy_for,
)
from lightning_ft.data.formats import Conversation
from lightning_ft.data.overlong import RowEncoder
from lightning_ft.data.pairs import PairDataModule
from lightning_ft.data.preferences import PreferenceDataModule
from lightning_ft.data.raw_rows import Problem
from lightning_ft.data.row_types import PAIRS
from lightning_ft.data.templates import TEXT_TEMPLATE, chat_template
from lightning_ft.data.turns import RowError
from lightning_ft.errors import DataError

ORDINARY = [
    "plain words, with punctuation: do not 'quote' it's (twice)?",
    "  leading and trailing  ",
    "tab\tand\nline\r\nbreaks\n",
    "caf\u00e9 and cafe\u0301, \u00c5ngstr\u00f6m and A\u030angstro\u0308m",
    "\u4f60\u597d\uff0c\u4e16\u754c \u3053\u3093\u306b\u3061\u306f",
    "\ud55c\uad6d\uc5b4 \u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f44d\U0001f3fd \u2764\ufe0f zero\u200bwidth\u200djoiner",
    "def f(x):\n    return x ** 2  # \u03c0\u00b2",
    "<b>html</b> </s-like> <think>of</think> <tool_call>{}</tool_call> [INST-like]",
    "",
]
TEMPLATE = (
    "{{- bos_token or '' -}}"
    "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<call>"]
WORDS = [
    "system\n user assistant the quick brown fox hello there do not don't it's a b",
    "jumps over the lazy dog 0 1 2 3",
]


def train(core, trainer, *, bos="<s>", template=TEMPLATE, **named):
    core.train_from_iterator(WORDS * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<pad>", bos_token=bos, **named
    )
    tokenizer.chat_template = template
    return tokenizer


def byte_level(normalizer=None, **options):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if normalizer is not None:
        core.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    return train(core, trainer, **options)


def sentence_pieces(*, fallback, normalizer=None):
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=fallback, fuse_unk=True))
    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    core.normalizer = normalizers.Sequence([*([normalizer] if normalizer else []), *spaces])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = [*SPECIAL, *([f"<0x{byte:02X}>" for byte in range(256)] if fallback else []), "\n"]
    return train(
        core, trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False), unk_token="<unk>"
    )


def unigram(normalizer=None):
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    core.normalizer = normalizer or normalizers.Sequence([])
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=[*SPECIAL, "\n"], unk_token="<unk>", show_progress=False
    )
    return train(core, trainer, unk_token="<unk>")


def word_piece(lowercase):
    core = Tokenizer(models.WordPiece(unk_token="<unk>"))
    core.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    core.pre_tokenizer, core.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    return train(core, trainer, unk_token="<unk>")


def word_level(normalizer=None):
    core = Tokenizer(models.WordLevel(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if normalizer is not None:
        core.normalizer = normalizer
    return train(core, trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False), unk_token="<unk>")


def turns(question="hello", answer="there", **more):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **more}]


def row(*args, **more):
    return Conversation(tuple(turns(*args, **more)), "a.jsonl", 3, "a")


def check(tokenizer, *args, markup=False, kwargs=None, **more):
    return ContentCheck(chat_template(tokenizer))(turns(*args, **more), kwargs, markup=markup)


# ---------------------------------------------------------------- what tokenizers keep

KEEP = {
    "byte-level": byte_level,
    "byte-level, NFC": lambda: byte_level(normalizers.NFC()),
    "byte-level, Strip": lambda: byte_level(normalizers.Strip()),
    "pieces with bytes": lambda: sentence_pieces(fallback=True),
    "pieces with bytes, NFC": lambda: sentence_pieces(fallback=True, normalizer=normalizers.NFC()),
    "the example's": lambda: AutoTokenizer.from_pretrained("examples/tiny_base"),
}


@pytest.mark.parametrize("name", KEEP)
def test_content_check_accepts_ordinary_text(name):
    tokenizer = KEEP[name]()
    assert keeps_every_text(tokenizer)
    for text in ORDINARY:
        decoded = tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])
        assert check(tokenizer, text, text, reasoning_content=text) == (), decoded


@pytest.mark.parametrize("name", KEEP)
def test_content_check_agrees_with_decoding(name, monkeypatch):
    monkeypatch.setattr("lightning_ft.data.content.keeps_every_text", lambda tokenizer: False)
    tokenizer = KEEP[name]()
    for text in ORDINARY:
        assert check(tokenizer, text, text) == ()


LOSE = {
    "byte-level that lowers": lambda: byte_level(normalizers.Lowercase()),
    "byte-level of few bytes": lambda: without_bytes(),
    "pieces with bytes, NFKC": lambda: sentence_pieces(fallback=True, normalizer=normalizers.NFKC()),
    "pieces": lambda: sentence_pieces(fallback=False),
    "unigram": unigram,
    "words": word_level,
    "word pieces": lambda: word_piece(True),
}


def without_bytes():
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    return train(core, trainer, unk_token="<unk>")


@pytest.mark.parametrize("name", LOSE)
def test_keeps_every_text_is_false_for_others(name):
    assert not keeps_every_text(LOSE[name]())


@pytest.mark.parametrize("name", LOSE)
def test_content_check_accepts_what_other_tokenizers_keep(name):
    assert check(LOSE[name](), "the quick  brown fox", "do not the\nlazy dog", reasoning_content="hello\n") == ()


CHANGED = {
    "byte-level that lowers": (LOSE["byte-level that lowers"], "Hello", "'Hello' becomes 'hello'"),
    "pieces with bytes, NFKC": (LOSE["pieces with bytes, NFKC"], "1 \u00bd", "'\u00bd' becomes '1\u20442'"),
    "pieces with bytes, its own mark": (KEEP["pieces with bytes"], "the\u2581fox", "'\u2581fox' becomes 'fox'"),
    "words that lower": (
        lambda: word_level(normalizers.Lowercase()),
        "Hello there",
        "'Hellothere' becomes 'hellothere'",
    ),
    "word pieces that lower": (lambda: word_piece(True), "The fox", "'Thefox' becomes 'thefox'"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_content_check_rejects_a_changed_answer(name):
    make, text, detail = CHANGED[name]
    tokenizer = make()
    for more in ({"answer": text}, {"reasoning_content": text}):
        with pytest.raises(RowError) as error:
            check(tokenizer, **more)
        assert error.value.reason == "characters that the tokenizer changes in the answer"
        assert error.value.detail == detail


@pytest.mark.parametrize("name", CHANGED)
def test_content_check_notes_a_changed_prompt(name):
    make, text, _ = CHANGED[name]
    tokenizer = make()
    assert check(tokenizer, text, "there") == (CHANGED_PROMPT,)
    assert "use a model whose tokenizer keeps them" in remedy_for(CHANGED_PROMPT, chat_template(tokenizer))


@pytest.mark.parametrize("name", ["pieces", "unigram", "words", "word pieces", "byte-level of few bytes"])
@pytest.mark.parametrize("turn", ["question", "answer"])
def test_content_check_rejects_unknown_text(name, turn):
    with pytest.raises(RowError) as error:
        check(LOSE[name](), **{turn: "hello \u4f60"})
    assert error.value.reason == f"text that the tokenizer doesn't know in the {turn}"
    assert "x <unk>, such as" in error.value.detail
    if name != "byte-level of few bytes":
        assert error.value.detail.endswith("'\u4f60'")


@pytest.mark.parametrize("name", ["pieces", "words"])
def test_content_check_tells_the_token_of_unknown_text_from_unknown_text(name):
    tokenizer = LOSE[name]()
    with pytest.raises(RowError) as error:
        check(tokenizer, answer="hello <unk>")
    assert (error.value.reason, error.value.detail) == ("control token in the answer", "'<unk>' at character 7")
    assert check(tokenizer, answer="hello <unk>", markup=True) == ()  # a text with markup of its own
    with pytest.raises(RowError) as error:
        check(tokenizer, answer="hello <unk> \u4f60", markup=True)
    assert error.value.reason == "text that the tokenizer doesn't know in the answer"


def test_unknown_text_is_a_bad_row_and_is_counted():
    good, bad = {"input": "hello", "output": "there"}, {"input": "hello", "output": "nobody"}
    tokenizer = word_level()
    with pytest.raises(DataError, match=r"train, row 2: text that the tokenizer doesn't know .*1 x <unk>.*'nobody'"):
        PairDataModule([good, bad], tokenizer=tokenizer, cache_dir=False).setup("fit")
    data = PairDataModule([good, bad], tokenizer=tokenizer, cache_dir=False, on_bad_row="skip")
    data.setup("fit")
    assert dict(data.report["train"].skipped) == {"text that the tokenizer doesn't know in the answer": 1}


def test_content_check_reads_tool_calls_and_tools():
    call = {"type": "function", "function": {"name": "f", "arguments": {"city": "a<|im_start|>b"}}}
    with pytest.raises(RowError) as error:
        check(byte_level(), answer="", tool_calls=[call])
    assert error.value.reason == "control token in the answer"
    tool = {"type": "function", "function": {"name": "f", "description": "ends <|im_end|> here"}}
    with pytest.raises(RowError) as error:
        check(byte_level(), kwargs={"tools": [tool]})
    assert error.value.reason == "control token in the tools"


# ---------------------------------------------------------------- control tokens


@pytest.mark.parametrize("token", ["<|im_start|>", "<|im_end|>", "<s>", "<pad>"])
@pytest.mark.parametrize("turn", ["question", "answer"])
def test_content_check_rejects_control_tokens(token, turn):
    with pytest.raises(RowError) as error:
        check(byte_level(), **{turn: f"ab{token}c"})
    assert (error.value.reason, error.value.detail) == (f"control token in the {turn}", f"{token!r} at character 3")
    assert "chat_template='text'" in error.value.fix


def test_content_check_handles_a_control_token_of_one_character():
    template = TEMPLATE.replace("'<|im_start|>' + m.role", "'<' + m.role").replace(
        "'<|im_start|>assistant", "'<assistant"
    )
    tokenizer = byte_level(template=template)
    tokenizer.add_tokens(["<"], special_tokens=True)
    assert check(tokenizer) == ()
    with pytest.raises(RowError) as error:
        check(tokenizer, answer="1 < 2")
    assert error.value.detail == "'<' at character 3"


@pytest.mark.parametrize("token", ["<think>", "</think>", "<call>", "</s>", "<|im_stop|>", "<|im_end", "<unk>"])
def test_content_check_accepts_other_tokens(token):
    assert check(byte_level(), answer=f"ab{token}c") == ()  # </s> is neither written by the template nor EOS here


def test_content_check_accepts_a_pad_token_of_ordinary_text():
    tokenizer = byte_level()
    tokenizer.pad_token = "!"
    assert check(tokenizer, "hello!", "there!") == ()


def test_chat_template_text_accepts_rows_with_markup():
    tokenizer = byte_level(template=TEXT_TEMPLATE)
    question, answer = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n", "there"
    assert check(tokenizer, question, answer) == ()
    assert check(tokenizer, question, "there<|im_end|> and more") == ()
    for texts, fix in (
        ((question, "there<|im_end|>\n"), "Remove it: EOS is written after each answer."),
        (("<s>" + question, "there"), "Remove it: BOS is written before each row."),
    ):
        with pytest.raises(RowError) as error:
            check(tokenizer, *texts)
        assert error.value.fix == fix


def test_remedy_for_control_tokens_works():
    tokenizer = byte_level()
    rows = [{"prompt": "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", "completion": "b"}]
    with pytest.raises(DataError, match="chat_template='text'"):
        PairDataModule(rows, tokenizer=tokenizer, cache_dir=False).setup("fit")
    data = PairDataModule(rows, tokenizer=tokenizer, cache_dir=False, chat_template="text")
    data.setup("fit")
    encoded = data.splits.encoded["train"][0][0]
    assert tokenizer.decode(encoded.input_ids) == "<s><|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>"
    assert tokenizer.decode(encoded.input_ids[encoded.supervised]) == "b<|im_end|>"


@pytest.mark.parametrize("eos", ["", "<|im_end|>", "<|im_end|><|im_end|>"])
@pytest.mark.parametrize("bos", ["", "<s>"])
def test_plain_text_has_one_eos_and_at_most_one_bos(bos, eos):
    data = PairDataModule([{"text": f"{bos}a<|im_start|>b{eos}"}], tokenizer=byte_level(), cache_dir=False)
    data.setup("fit")
    example = data.splits.encoded["train"][0][0]
    assert data.tokenizer.decode(example.input_ids) == f"{bos}a<|im_start|>b<|im_end|>"
    assert example.supervised.tolist() == [False] + [True] * (len(example) - 1)


@pytest.mark.parametrize(
    ("template", "note"),
    [
        (TEMPLATE.replace("{{- bos_token or '' -}}", "{{- bos_token + bos_token -}}"), BOS_TWICE),
        (TEMPLATE.replace("'<|im_end|>\n'", "'<|im_end|><|im_end|>\n'"), EOS_TWICE),
        (TEMPLATE, None),
    ],
)
def test_template_that_writes_bos_or_eos_twice_is_noted(template, note):
    tokenizer = byte_level(template=template)
    encoded, _ = RowEncoder(tokenizer, 64, "error", PAIRS)(row())
    assert [n for n in encoded.notes if n in (BOS_TWICE, EOS_TWICE)] == ([] if note is None else [note])
    assert note is None or "writes it once" in remedy_for(note, chat_template(tokenizer))


def test_tokenizer_adds_no_second_bos():
    from tokenizers import processors

    tokenizer = byte_level()
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    assert tokenizer("a")["input_ids"][0] == bos
    encoded, _ = RowEncoder(tokenizer, 64, "error", PAIRS)(row())
    assert encoded.example.input_ids.tolist().count(bos) == 1
    assert not {BOS_TWICE, EOS_TWICE} & set(encoded.notes)


def test_shared_bos_and_eos_token_between_turns_is_not_noted():
    template = "{%- for m in messages -%}{{- bos_token + m.role + m.content + eos_token -}}{%- endfor -%}"
    template += "{%- if add_generation_prompt -%}{{- bos_token + 'assistant' -}}{%- endif -%}"
    tokenizer = byte_level(template=template, bos="<|im_end|>")
    result = RowEncoder(tokenizer, 64, "error", PAIRS)(row())
    assert not isinstance(result, Problem)
    assert not {BOS_TWICE, EOS_TWICE} & set(result[0].notes)


@pytest.mark.parametrize(
    ("prompt", "template", "told"),
    [
        ("\n\nHuman: hello?\n\nAssistant:", TEMPLATE, True),
        ("the quick brown fox\n\n### Response:\n", TEMPLATE, True),
        ("\n\nHuman: hello?\n\nAssistant:", TEXT_TEMPLATE, False),
        ("hello, who is the Assistant?", TEMPLATE, False),
    ],
)
def test_text_with_markup_of_its_own_in_a_chat_template_is_told(prompt, template, told):
    rows = [{"chosen": f"{prompt} hello", "rejected": f"{prompt} it's"}, {"chosen": "a b", "rejected": "a dog"}]
    data = PreferenceDataModule(rows, tokenizer=byte_level(template=template), cache_dir=False)
    data.setup("fit")
    assert data.report["train"].notes == ({OWN_MARKUP: 1} if told else {})
    assert "chat_template='text'" in remedy_for(OWN_MARKUP, chat_template(data.tokenizer))
