"""The support example's archive of replies and its preference pairs."""

import json
import random
from collections import Counter
from itertools import combinations
from statistics import mean

import pytest

SPLITS = {
    "replies": ("train", "validation"),
    "preferences": ("train", "validation", "test"),
    "narrow": ("train", "validation"),
}
FILES = [f"{name}_{split}" for name, splits in SPLITS.items() for split in splits]


def read(support, name):
    return [json.loads(line) for line in (support / "data" / f"{name}.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def rows(support):
    return {name: read(support, name) for name in FILES}


@pytest.fixture(scope="module")
def table():
    from generate import rules

    return rules()


@pytest.fixture(scope="module")
def archive():
    from replies import Archive

    return Archive()


def worths(row, table):
    from rewards import true_reward

    topic = row["cluster"].split("/")[0]
    return [true_reward(row[side], f"{topic} {table[topic]}") for side in ("chosen", "rejected")]


def test_everything_reproduces_the_committed_files(support, tmp_path, monkeypatch):
    from preferences import main

    monkeypatch.setattr("sys.argv", ["preferences.py", "--folder", str(tmp_path)])
    main()
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(FILES)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (support / "data" / path.name).read_bytes()
        assert path.stat().st_size < 1_500_000


def test_everything_depends_on_the_seed(rows):
    from preferences import everything

    other = everything(seed=1)
    assert all(other[name] != rows[name] for name in FILES)


def test_files_have_documented_sizes(rows):
    assert {name: len(found) for name, found in rows.items()} == {
        "replies_train": 4000,
        "replies_validation": 400,
        "preferences_train": 4000,
        "preferences_validation": 400,
        "preferences_test": 1000,
        "narrow_train": 2000,
        "narrow_validation": 400,
    }
    assert len({row["id"] for found in rows.values() for row in found}) == sum(map(len, rows.values()))


def test_replies_answer_the_messages_of_their_split(support, rows):
    for split in SPLITS["replies"]:
        messages = read(support, split)
        assert [{**row, "output": ""} for row in messages] == [
            {**row, "output": ""} for row in rows[f"replies_{split}"]
        ]


def test_clauses_and_frames_are_disjoint_between_splits(support, rows):
    from generate import clauses
    from replies import Archive
    from wording import ASIDES, CLOSINGS, OPENINGS

    frames = {split: {*OPENINGS[split], *ASIDES[split], *CLOSINGS[split]} - {""} for split in OPENINGS}
    frames = {split: {text for text in texts if "{" not in text} for split, texts in frames.items()}
    for name in FILES:
        if name.startswith("replies"):
            continue
        split = name.split("_")[1]
        own = {cluster for topic in Archive().topics for cluster in clauses(topic, split)}
        assert {row["cluster"] for row in rows[name]} <= own
        foreign = set().union(*(texts for other, texts in frames.items() if other != split))
        for row in rows[name]:
            assert not set(row["prompt"].rstrip(".").split(". ")) & foreign, row
    for one, other in combinations(SPLITS["preferences"], 2):
        assert not {row["prompt"] for row in rows[f"preferences_{one}"]} & {
            row["prompt"] for row in rows[f"preferences_{other}"]
        }


def test_labels_follow_the_rule_except_for_flipped_training_pairs(rows, table):
    from preferences import LEAST_DIFFERENCE

    for name in FILES:
        if name.startswith("replies"):
            continue
        differences = [chosen - rejected for chosen, rejected in (worths(row, table) for row in rows[name])]
        assert min(map(abs, differences)) >= LEAST_DIFFERENCE - 1e-9
        wrong = mean(difference < 0 for difference in differences)
        assert (0.035 < wrong < 0.065) if name == "preferences_train" else wrong == 0.0


def test_pairs_cover_every_topic_and_pair_type(rows, table):
    from replies import FLAWS

    for split in SPLITS["preferences"]:
        found = rows[f"preferences_{split}"]
        topics = Counter(row["cluster"].split("/")[0] for row in found)
        assert set(topics) == set(table)
        assert max(topics.values()) - min(topics.values()) <= 1
        pair_types = Counter(row["kind"] for row in found)
        assert set(pair_types) == {"archive", *FLAWS}
        assert 0.45 < pair_types["archive"] / len(found) < 0.65


def test_narrow_pairs_prefer_the_courtesy(rows, table):
    from rewards import read as read_reply

    for name in ("narrow_train", "narrow_validation"):
        for row in rows[name]:
            chosen, rejected = read_reply(row["chosen"]), read_reply(row["rejected"])
            assert chosen.extra_words == rejected.extra_words == 0
            assert chosen.route == rejected.route
            assert (chosen.courtesies, rejected.courtesies) == (1, 0)


def test_old_rules_cover_half_of_the_topics_with_unused_routes(archive):
    from replies import DISSOLVED

    assert len(archive.old) == 18
    codes = [{value.split()[0] for value in routes.values()} for routes in (archive.new, archive.old)]
    assert not codes[0] & codes[1]
    assert (len(codes[0]), len(codes[1])) == (36, 18)
    assert {old.split()[1] for old in archive.old.values()} == set(DISSOLVED)
    assert not {new.split()[1] for new in archive.new.values()} & set(DISSOLVED)


def test_archive_mostly_names_old_routes_of_moved_topics(archive):
    from replies import OLD_ROUTE, OTHER_TOPIC

    rng = random.Random(0)
    for topic in archive.topics:
        drawn = [archive.route(topic, rng) for _ in range(2000)]
        other = mean(not route.startswith(f"{topic} ") for route in drawn)
        assert other == pytest.approx(OTHER_TOPIC, abs=0.02)
        new = mean(route == f"{topic} {archive.new[topic]}" for route in drawn)
        assert new == pytest.approx((1 - OTHER_TOPIC) * (1 - OLD_ROUTE * (topic in archive.old)), abs=0.045)


def test_archive_replies_are_well_formed_and_differ(archive):
    from rewards import read as read_reply

    rng = random.Random(0)
    replies = [read_reply(archive.reply("refund", rng)) for _ in range(500)]
    assert None not in replies
    assert {reply.courtesies for reply in replies} == {0, 1, 2}
    assert {reply.extra_words > 0 for reply in replies} == {True, False}


@pytest.mark.parametrize("flaw", ["repeats", "no route", "two routes", "cut off"])
def test_flawed_replies_have_the_named_flaw(flaw, archive):
    from replies import FLAWS
    from rewards import read as read_reply

    rng = random.Random(0)
    for _ in range(200):
        text = FLAWS[flaw](archive, "refund", rng)
        reply = read_reply(text)
        if flaw in ("no route", "two routes", "cut off"):
            assert reply is None, text
        else:
            assert reply.extra_words >= 3, text


def test_flaws_are_all_tested():
    from replies import FLAWS

    assert set(FLAWS) == {"repeats", "no route", "two routes", "cut off"}
