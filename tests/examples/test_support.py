"""The support example's data: reproducible from `generate.py`, with disjoint splits."""

import json
from collections import Counter
from itertools import combinations

import pytest

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def rows(support):
    return {
        split: [json.loads(line) for line in (support / "data" / f"{split}.jsonl").read_text("utf-8").splitlines()]
        for split in SPLITS
    }


@pytest.fixture(scope="module")
def baseline(support):
    return json.loads((support / "baseline.json").read_text("utf-8"))


def test_generate_reproduces_the_committed_files(rows):
    from generate import generate

    assert generate() == rows
    assert generate(seed=1) != rows


def test_splits_have_documented_sizes(rows):
    assert {split: len(found) for split, found in rows.items()} == {"train": 4000, "validation": 400, "test": 600}
    everything = [row for split in SPLITS for row in rows[split]]
    assert len({row["id"] for row in everything}) == len({row["input"] for row in everything}) == 5000


def test_topics_are_in_every_split_with_one_answer(rows):
    from generate import rules

    table = rules()
    assert len(table) == 36
    for split in SPLITS:
        counts = Counter(row["output"] for row in rows[split])
        assert set(counts) == {f"{topic} {value}" for topic, value in table.items()}
        assert max(counts.values()) - min(counts.values()) <= 1


def test_clauses_are_disjoint_between_splits(rows):
    from generate import clauses, rules

    for one, other in combinations(SPLITS, 2):
        assert not {row["cluster"] for row in rows[one]} & {row["cluster"] for row in rows[other]}
        wordings = [{text for topic in rules() for text in clauses(topic, split).values()} for split in (one, other)]
        assert not wordings[0] & wordings[1]


def test_frames_are_disjoint_between_splits_and_pretraining():
    from english import PRETRAINING_ASIDES, PRETRAINING_CLOSINGS, PRETRAINING_OPENINGS
    from wording import ASIDES, CLOSINGS, OPENINGS

    frames = {split: [*OPENINGS[split], *ASIDES[split], *CLOSINGS[split]] for split in SPLITS}
    frames["pretraining"] = [*PRETRAINING_OPENINGS, *PRETRAINING_ASIDES, *PRETRAINING_CLOSINGS]
    sets = {name: {text.lower() for text in texts} - {""} for name, texts in frames.items()}
    for one, other in combinations(sets, 2):
        assert not sets[one] & sets[other]


def test_half_of_test_clauses_are_unseen(rows):
    unseen = sum("unseen" in row["cluster"] for row in rows["test"])
    assert 250 <= unseen <= 350
    assert not any("unseen" in row["cluster"] for split in ("train", "validation") for row in rows[split])


def test_pretraining_excludes_the_company(rows):
    from corpus import RESERVED_TEAMS, TEAM_WORDS

    teams = {row["output"].split()[2] for split in SPLITS for row in rows[split]}
    assert teams == RESERVED_TEAMS
    assert not teams & set(TEAM_WORDS)


def test_baseline_contains_every_rule_with_examples_from_train(rows, baseline):
    from generate import rules

    stated = set(baseline["system"].splitlines()[1:])
    assert stated == {f"- {topic} {value}" for topic, value in rules().items()}
    training = {(row["input"], row["output"]) for row in rows["train"]}
    assert baseline["few_shot"]
    assert all((example["input"], example["output"]) in training for example in baseline["few_shot"])
