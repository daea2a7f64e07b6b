"""Rows of preferences: helpers that read and build them, and a row of each format with its meaning."""

from lightning_ft.data.preference_rows import PREFERENCES
from lightning_ft.data.rows import load_source

U, A, S = "user", "assistant", "system"


def load(rows, **options):
    return load_source(rows, "train", "train", row_type=PREFERENCES, **options)


def read(row, **options):
    (preference,), problems = load([row], **options)
    assert not problems
    return preference


def talk(*texts, system=None):
    turns = [{"role": (U, A)[i % 2], "content": text} for i, text in enumerate(texts)]
    return [*([{"role": S, "content": system}] if system else []), *turns]


def answer(text):
    return [{"role": A, "content": text}]


QUESTION = [(U, "q")]
PAIRS = {
    "strings": ({"prompt": "q", "chosen": "a", "rejected": "b"}, QUESTION, [[(A, "a")], [(A, "b")]]),
    "messages": (
        {"prompt": talk("q"), "chosen": answer("a"), "rejected": answer("b")}, QUESTION, [[(A, "a")], [(A, "b")]],
    ),
    "messages and strings": (
        {"prompt": talk("q"), "chosen": answer("a"), "rejected": "b"}, QUESTION, [[(A, "a")], [(A, "b")]],
    ),
    "system": (
        {"system": "s", "prompt": "q", "chosen": "a", "rejected": "b"}, [(S, "s"), (U, "q")], [[(A, "a")], [(A, "b")]],
    ),
    "sharegpt": (
        {"prompt": [{"from": "human", "value": "q"}], "chosen": [{"from": "gpt", "value": "a"}], "rejected": "b"},
        QUESTION, [[(A, "a")], [(A, "b")]],
    ),
    "several turns": (
        {"prompt": talk("q", "r", "s"), "chosen": "a", "rejected": "b"},
        [(U, "q"), (A, "r"), (U, "s")], [[(A, "a")], [(A, "b")]],
    ),
    "turns of their own": (
        {"prompt": "q", "chosen": talk("", "a", "x", "b")[1:], "rejected": answer("c")},
        QUESTION, [[(A, "a"), (U, "x"), (A, "b")], [(A, "c")]],
    ),
    "implicit turns": (
        {"chosen": talk("q", "a"), "rejected": talk("q", "b")}, QUESTION, [[(A, "a")], [(A, "b")]],
    ),
    "implicit turns, several": (
        {"chosen": talk("q", "r", "s", "a", system="y"), "rejected": talk("q", "r", "s", "b", system="y")},
        [(S, "y"), (U, "q"), (A, "r"), (U, "s")], [[(A, "a")], [(A, "b")]],
    ),
    "implicit turns that part early": (
        {"chosen": talk("q", "a", "s", "x"), "rejected": talk("q", "b", "t", "y")},
        QUESTION, [[(A, "a"), (U, "s"), (A, "x")], [(A, "b"), (U, "t"), (A, "y")]],
    ),
    "implicit text": (
        {"chosen": "\n\nHuman: q\n\nAssistant: yes it is", "rejected": "\n\nHuman: q\n\nAssistant: no"},
        [(U, "\n\nHuman: q\n\nAssistant:")], [[(A, " yes it is")], [(A, " no")]],
    ),
    "the prompt again in both": (
        {"prompt": "q", "chosen": talk("q", "a"), "rejected": talk("q", "b")}, QUESTION, [[(A, "a")], [(A, "b")]],
    ),
    "the prompt again, with white space": (
        {"prompt": "q\n", "chosen": talk(" q", "a"), "rejected": talk("q", "b")},
        [(U, "q\n")], [[(A, "a")], [(A, "b")]],
    ),
    "the prompt again in both, with a system turn": (
        {"prompt": "q", "chosen": talk("q", "a", system="s"), "rejected": talk("q", "b", system="s")},
        [(S, "s"), (U, "q")], [[(A, "a")], [(A, "b")]],
    ),
}  # fmt: skip


def pair(**changed):
    row = {"prompt": "q", "chosen": "a", "rejected": "b", **changed}
    return {name: value for name, value in row.items() if value != "absent"}


def implicit(chosen, rejected):
    return {"chosen": chosen, "rejected": rejected}


def labeled(**changed):
    return {"prompt": "q", "completion": "a", "label": True, **changed}


def texts(tokenizer, batch):
    """Prompt, completions, labels, margin and row of each prompt of a batch."""
    labels = iter(batch.labels.tolist())
    margins = [None] * len(batch) if batch.margins is None else batch.margins.tolist()
    return [
        (
            tokenizer.decode(prompt),
            [(tokenizer.decode(completion.input_ids[completion.supervised]), next(labels)) for completion in side],
            margin,
            row,
        )
        for prompt, side, margin, row in zip(
            batch.prompts, batch.completions, margins, batch.rows.tolist(), strict=True
        )
    ]


def expected(rows):
    """What `texts` returns for a batch of these rows."""
    head, tail, end = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"
    result = []
    for n, row in enumerate(rows):
        if "chosen" in row:
            sides = [(row["chosen"] + end, True), (row["rejected"] + end, False)]
        else:
            sides = [(row["completion"] + end, row["label"])]
        result.append((head + row["prompt"] + tail, sides, row.get("margin"), n))
    return result
