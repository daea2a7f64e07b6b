"""Holding out a share of the training rows: none of its questions is trained on, in any row format."""

import warnings

import pytest

from lightning_ft import PairDataModule, PreferenceDataModule, PromptDataModule
from lightning_ft.data.groups import hold_out
from lightning_ft.data.overlap import row_questions
from lightning_ft.data.splits import RowRules, Splits
from lightning_ft.errors import DataError


def user(text):
    return {"role": "user", "content": text}


def answer(text):
    return {"role": "assistant", "content": text}


TALK = [message for n in range(4) for message in (user(f"turn {n}?"), answer(f"reply {n}"))]


def about(talk, n):
    """The same conversation about another subject."""
    return [{**message, "content": f"{message['content']} {n}"} for message in talk]


def turn_by_turn(n):
    return [{"messages": about(TALK, n)[:end]} for end in (2, 4, 6, 8)]


def with_system(n):
    return [{"system": f"You are {who}.", "input": f"question {n}", "output": "a"} for who in ("a", "b", "c", "d")]


def preference(n, k):
    prompt = f"question {n}" if k % 2 else [user(f"question {n} ")]
    return {"prompt": prompt, "chosen": f"good {k}", "rejected": f"bad {k}"}


def whole_preference(n, k):
    talk = [*about(TALK, n)[:2], user(f"and? {n}")]
    return {"chosen": [*talk, answer(f"good {k}")], "rejected": [*talk, answer(f"bad {k}")]}


PAIRS = {
    "answers": lambda n: [{"input": f"question {n}", "output": f"answer {k}"} for k in range(4)],
    "spaces": lambda n: [{"input": f"question{' ' * (k + 1)}{n}\n", "output": "a"} for k in range(4)],
    "turn by turn": turn_by_turn,
    "turn by turn with other systems": lambda n: [
        {"messages": [{"role": "system", "content": str(k)}, *row["messages"]]} for k, row in enumerate(turn_by_turn(n))
    ],
    "systems": with_system,
    "clusters": lambda n: [{"input": f"{n} {k}", "output": "a", "cluster": f"customer {n}"} for k in range(4)],
    "chain": lambda n: [
        {"input": f"{n} {k // 2}", "output": f"{k}", "cluster": f"{n} {(k + 1) // 2}"} for k in range(4)
    ],
    "sharegpt": lambda n: [
        {"conversations": [{"from": "human", "value": f"question {n}"}, {"from": "gpt", "value": f"answer {k}"}]}
        for k in range(4)
    ],
    "alpaca": lambda n: [{"instruction": "Translate.", "input": f"word {n}", "output": f"{k}"} for k in range(4)],
    "plain texts": lambda n: [{"text": f"a text {n}"}] * 4,
}
PREFERENCES = {
    "text and messages": lambda n: [preference(n, k) for k in range(4)],
    "labels": lambda n: [{"prompt": f"question {n}", "completion": f"{k}", "label": k % 2 == 0} for k in range(4)],
    "implicit prompts": lambda n: [whole_preference(n, k) for k in range(4)],
}
PROMPTS = {
    "columns": lambda n: [{"prompt": f"question {n}", "difficulty": k} for k in range(4)],
    "text and messages": lambda n: [
        {"prompt": f"question {n}" if k % 2 else [user(f"question {n}")]} for k in range(4)
    ],
}
CASES = [
    *((PairDataModule, name, make) for name, make in PAIRS.items()),
    *((PreferenceDataModule, name, make) for name, make in PREFERENCES.items()),
    *((PromptDataModule, name, make) for name, make in PROMPTS.items()),
]


@pytest.mark.parametrize(("module", "name", "make"), CASES, ids=[f"{m.__name__} {name}" for m, name, _ in CASES])
def test_hold_out_keeps_rows_that_belong_together(module, name, make):
    source = [row for k in range(4) for n in range(30) for row in make(n)[k : k + 1]]  # those of one n far apart
    data = module(source, validation=0.1, seed=1)
    data.load_rows()
    names = ("train", "validation")
    held = {split: [row for part in data.splits.rows[split] for row in part] for split in names}
    assert (len(held["train"]), len(held["validation"])) == (108, 12)
    questions = {split: {key for row in rows for key in row_questions(row)} for split, rows in held.items()}
    clusters = {split: {row.cluster for row in rows} - {None} for split, rows in held.items()}
    assert not questions["train"] & questions["validation"]
    assert not clusters["train"] & clusters["validation"]
    assert data.report["validation"].overlap == []


def loaded(train, validation, seed=0, **splits):
    made = Splits(
        {"train": train, "validation": validation, **splits}, RowRules(None, "error", 64, "error", seed, None)
    )
    made.load(["train", "validation", *splits])
    return made


def pairs(*questions, **more):
    return [{"input": question, "output": f"answer {n}", **more} for n, question in enumerate(questions)]


def test_hold_out_takes_rows_from_several_sources():
    sources = [pairs("a", "b", "c"), pairs("c", "d"), pairs("a", "e", "f", "g")]
    made = loaded(sources, 0.5)
    assert [len(part) for part in made.rows["validation"]] == [4]
    assert sum(map(len, made.rows["train"])) == 5
    kept = [[row.prompt_messages[0]["content"] for row in part] for part in made.rows["train"]]
    held = {row.prompt_messages[0]["content"] for row in made.rows["validation"][0]}
    assert [[q for q in part if q not in held] for part in ("abc", "cd", "aefg")] == kept


def test_hold_out_may_take_a_whole_source(tokenizer):
    sources = [pairs("a", "b", "c", cluster="one"), pairs("d", "e", cluster="two")]
    data = PairDataModule(sources, validation=0.4, tokenizer=tokenizer, cache_dir=False, batch_size=1)
    data.setup("fit")
    assert [len(part) for part in data.splits.rows["train"]] == [3, 0]
    assert len(list(data.train_dataloader())) == 3
    assert len(list(data.val_dataloader())) == 2


def test_hold_out_depends_on_the_seed_and_keeps_the_order_of_rows():
    rows = pairs(*(f"question {n // 2}" for n in range(60)))
    one, again, other = (loaded(rows, 0.2, seed) for seed in (0, 0, 1))
    first, second, third = ({name: list(part) for name, (part,) in made.rows.items()} for made in (one, again, other))
    assert first == second != third
    for made in (one, other):
        for split, count in (("train", 48), ("validation", 12)):
            (part,) = made.rows[split]
            assert len(part) == count == made.report[split].kept == made.report[split].read
            assert [row.row for row in part] == sorted(row.row for row in part)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            pairs("a", "b", "c", cluster="x"),
            "all 3 rows belong to the cluster 'x'.*or name another cluster in columns=",
        ),
        (
            pairs("a", " a", "a "),
            r"all 3 rows belong to the question 'a', so every .* Pass separate rows as validation=\.",
        ),
        (
            [{"messages": TALK[:end]} for end in (2, 4)],
            r"all 2 rows belong to the conversation that begins with 'turn 0\?'",
        ),
        (pairs("a") * 3, "there are fewer than two different rows"),
        (pairs("a"), "there are fewer than two different rows"),
    ],
)
def test_hold_out_rejects_rows_that_form_one_group(rows, message):
    with pytest.raises(DataError, match=r"validation=0\.5 of train: " + message):
        loaded(rows, 0.5)


def test_hold_out_warns_of_a_large_group():
    rows = [*pairs(*(f"big {n}" for n in range(30)), cluster="big"), *pairs(*(f"small {n}" for n in range(30)))]
    message = (
        r"^validation=0\.2 of train: 12 of 60 rows are held out\. Rows of one question, conversation or cluster are "
        r"kept together, and 30 belong to the cluster 'big'\. To hold out others, change the share, or pass"
    )
    with pytest.warns(UserWarning, match=message):
        made = loaded(rows, 0.2)
    assert len(made.rows["validation"][0]) == 12


def test_hold_out_warns_of_a_share_that_cannot_be_met():
    rows = [row for n in range(4) for row in pairs(*[f"question {n}"] * 10)]
    with pytest.warns(UserWarning, match=r"10 of 40 rows are held out instead of 4\. .* 10 belong to the question"):
        loaded(rows, 0.1)


def test_hold_out_is_silent_if_the_share_is_met(recwarn):
    loaded(pairs(*(f"question {n // 2}" for n in range(40))), 0.25)
    loaded(pairs(*(f"question {n}" for n in range(10)), "question 0"), 0.1)  # the target is one row
    assert not recwarn.list


def test_hold_out_blank_clusters_are_none():
    for blank in ("", "  ", None, float("nan")):
        made = loaded([{**row, "cluster": blank} for row in pairs(*"abcdefghij")], 0.3)
        assert len(made.rows["validation"][0]) == 3


def test_hold_out_leaves_its_input_unchanged():
    made = loaded(pairs(*"abcdefgh"), 0.25)
    parts = [list(part) for part in made.rows["train"]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        left, held = hold_out(made.rows["train"], 0.5, 0)
    assert [list(part) for part in made.rows["train"]] == parts
    assert sorted(row.row for row in [*left[0], *held]) == sorted(row.row for row in parts[0])


def test_clusters_that_a_frame_reads_as_floats_are_those_of_integers():
    pd = pytest.importorskip("pandas")
    rows = [{"input": f"q{n}", "output": "a", "cluster": n // 2, "id": n} for n in range(6)]
    missing = [*rows, {"input": "other", "output": "a"}]  # makes floats of all clusters and ids
    data = PairDataModule(pd.DataFrame(missing), validation=pd.DataFrame(rows[:2]))
    data.load_rows()
    assert [row.cluster for part in data.splits.rows["train"] for row in part] == ["0", "0", "1", "1", "2", "2", None]
    assert [row.id for row in data.splits.rows["train"][0]][:2] == ["0", "1"]
    assert data.report["validation"].cluster_in_train == 2
