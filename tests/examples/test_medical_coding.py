"""The medical coding example: data, splits, separation from pretraining, and metrics."""

import json
import random
import re
import runpy
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
import yaml

MEDICAL = Path(__file__).parents[2] / "examples" / "medical_coding"

SPLITS = ("train", "validation", "test")
SIZES = {"train": 5000, "validation": 400, "test": 600}


@pytest.fixture(scope="module")
def rows():
    return {
        split: [json.loads(line) for line in (MEDICAL / "data" / f"{split}.jsonl").read_text("utf-8").splitlines()]
        for split in SPLITS
    }


@pytest.fixture(scope="module")
def baseline():
    return json.loads((MEDICAL / "baseline.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def pretraining():
    """Draw 300 documents of each level."""
    from medical_pretraining import document

    return {level: [document(random.Random(f"{level} {seed}"), level) for seed in range(300)] for level in range(3)}


def list_in(system):
    """Parse the code of each condition from the lines of a prompt."""
    return dict(re.fullmatch(r"- (\w+) (\S+)", line).groups() for line in system.splitlines()[1:])


def oracle(note, table):
    """Rule-based solver: finds the conditions of each sentence, and words by which they aren't coded.

    It knows which words mean which condition, and the two lists of words that negate a statement.
    """
    from medical_language import CONDITIONS, DENIAL_WORDS, RELATIVES

    meaning = {wording: key for key, wordings in CONDITIONS.items() for wording in (*wordings, key)}
    meaning |= {key: key for key in table}
    longest_first = "|".join(map(re.escape, sorted(meaning, key=len, reverse=True)))
    mentions = re.compile(rf"(?<!\w)(?:{longest_first})(?!\w)")
    coded = []
    for sentence in note.rstrip(".").split(". "):
        words = set(re.findall(r"\w+", sentence))
        if not words & (DENIAL_WORDS | set(RELATIVES)):
            coded += [meaning[found] for found in mentions.findall(sentence)]
    return ", ".join(f"{key} {table[key]}" for key in coded) or "none"


# ------------------------------------------------------------------------------------------------------- data


def test_generate_reproduces_the_committed_files(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["medical_generate.py", "--folder", str(tmp_path)])
    runpy.run_path(str(MEDICAL / "medical_generate.py"), run_name="__main__")
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(SPLITS)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (MEDICAL / "data" / path.name).read_bytes()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 1_250_000


def test_generate_depends_on_the_seed(rows):
    from medical_generate import generate

    assert generate(seed=1)["test"] != rows["test"]


def test_splits_have_documented_sizes(rows):
    assert {split: len(found) for split, found in rows.items()} == SIZES
    everything = [row for split in SPLITS for row in rows[split]]
    assert len({row["id"] for row in everything}) == len({row["input"] for row in everything}) == 6000
    assert all(set(row) == {"id", "input", "output", "cluster"} for row in everything)


def test_conditions_and_code_counts_are_balanced_in_every_split(rows):
    from medical_generate import CODED
    from medical_language import RESERVED_CODES

    assert len(RESERVED_CODES) == 28
    for split in SPLITS:
        named = {pair.split()[0] for row in rows[split] for pair in row["output"].split(", ")}
        assert named == {*RESERVED_CODES, "none"}
        counts = Counter(0 if row["output"] == "none" else row["output"].count(",") + 1 for row in rows[split])
        for number, share in enumerate(CODED):
            assert counts[number] / len(rows[split]) == pytest.approx(share, abs=0.05)


def test_answers_follow_from_note_and_list(rows):
    from medical_language import RESERVED_CODES

    for split in SPLITS:
        for row in rows[split]:
            assert oracle(row["input"], RESERVED_CODES) == row["output"], row


# ------------------------------------------------------------------------------------------------------ splits


def test_wordings_are_disjoint_between_splits(rows):
    from medical_language import CONDITIONS

    every = [wording for wordings in CONDITIONS.values() for wording in wordings]

    def without(wording, text):
        """Remove the longer wordings that contain this one from a text."""
        for longer in every:
            if wording in longer and wording != longer:
                text = text.replace(longer, "")
        return text

    found = {}
    for split in SPLITS:
        text = " | ".join(row["input"] for row in rows[split])
        found[split] = {wording for wording in every if re.search(rf"(?<!\w){wording}(?!\w)", without(wording, text))}
        assert len(found[split]) == {"train": 84, "validation": 28, "test": 112}[split]
    for one, other in combinations(SPLITS, 2):
        assert not found[one] & found[other]
        assert not {row["cluster"] for row in rows[one]} & {row["cluster"] for row in rows[other]}


def test_frames_are_disjoint_between_splits_and_pretraining(pretraining):
    from medical_frames import FRAMES, PRETRAINING

    parts = ("present", "denied", "family", "openings", "asides", "closings")
    frames = {name: {t for part in parts for t in getattr(of, part)} - {""} for name, of in FRAMES.items()}
    frames["pretraining"] = {text for part in parts for text in getattr(PRETRAINING, part)} - {""}
    for one, other in combinations(frames, 2):
        assert not frames[one] & frames[other]
    notes = [turn["content"] for documents in pretraining.values() for d in documents for turn in d[1::2]]
    sentences = {sentence for note in notes for sentence in note.rstrip(".").split(". ")}
    assert len(sentences) > 5000
    fills = {"x": ".+", "name": r"\w+", "day": r"\w+", "relative": r"\w+", "age": r"\d+", "count": r"\d+"}
    for split in SPLITS:
        for frame in frames[split]:
            pattern = re.compile(re.sub(r"\{(\w+)\}", lambda slot: fills[slot[1]], frame))
            assert not [sentence for sentence in sentences if pattern.fullmatch(sentence)], frame


def test_statements_are_negated_by_known_words_only():
    from medical_frames import FRAMES, PRETRAINING
    from medical_language import CONDITIONS, DENIAL_WORDS, OTHER_CONDITIONS, RELATIVES

    turning = DENIAL_WORDS | set(RELATIVES)
    names = {*CONDITIONS, *OTHER_CONDITIONS}
    for frames in (PRETRAINING, *FRAMES.values()):
        for text in (*frames.present, *frames.openings, *frames.asides, *frames.closings):
            assert not set(re.findall(r"\w+", text)) & (turning | names), text
        for text in frames.denied:
            assert set(text.split()) & DENIAL_WORDS, text
        assert all("{relative}" in text and "{x}" in text for text in frames.family)
        assert all("{x}" in text for text in (*frames.present, *frames.denied))
    for wordings in CONDITIONS.values():
        for wording in wordings:
            assert not set(wording.split()) & (turning | names | {"and", "or"}), wording


def test_names_ages_and_code_sets_are_disjoint_between_splits(rows):
    from medical_frames import AGES, NAMES

    words = {split: {w for row in rows[split] for w in re.findall(r"\w+", row["input"])} for split in SPLITS}
    sets = {
        split: {frozenset(row["output"].split(", ")) for row in rows[split] if "," in row["output"]} for split in SPLITS
    }
    for one, other in combinations(SPLITS, 2):
        assert set(NAMES[one]) <= words[one]
        assert not set(NAMES[one]) & words[other]
        assert not set(NAMES[other]) & words[one]
        assert not set(AGES[one]) & set(AGES[other])
        assert {str(age) for age in AGES[one]} & words[one]
        assert not {str(age) for age in AGES[one]} & words[other]
        assert len(sets[one]) > 10
        assert not sets[one] & sets[other]


def test_half_of_test_rows_have_unseen_wordings(rows):
    from medical_language import CONDITIONS, SEEN

    unseen = sum("unseen" in row["cluster"] for row in rows["test"])
    assert 250 <= unseen <= 350
    assert not any("unseen" in row["cluster"] for split in ("train", "validation") for row in rows[split])
    new = {wording for wordings in CONDITIONS.values() for wording in wordings[SEEN:]}
    for row in rows["test"]:
        assert any(wording in row["input"] for wording in new) == ("unseen" in row["cluster"])


# -------------------------------------------------------------------------------------------------- pretraining


def test_documents_are_deterministic():
    from medical_pretraining import document

    for level in range(3):
        assert document(random.Random(3), level) == document(random.Random(3), level)
        assert document(random.Random(3), level) != document(random.Random(4), level)


def test_document_answers_follow_from_the_prompt(pretraining):
    for level, (fewest, most) in {0: (4, 6), 1: (8, 16), 2: (24, 30)}.items():
        for messages in pretraining[level]:
            roles = [turn["role"] for turn in messages]
            assert roles == ["system", *["user", "assistant"] * (len(roles) // 2)]
            assert 3 <= len(roles) // 2 <= 8
            table = list_in(messages[0]["content"])
            assert fewest <= len(table) <= most
            assert len(set(table.values())) == len(table)
            for question, answer in zip(messages[1::2], messages[2::2], strict=True):
                assert oracle(question["content"], table) == answer["content"], question


def test_levels_increase_in_difficulty(pretraining):
    def notes(level):
        return [turn["content"] for messages in pretraining[level] for turn in messages if turn["role"] == "user"]

    lengths = [sum(len(note.split()) for note in notes(level)) / len(notes(level)) for level in range(3)]
    assert lengths == sorted(lengths)
    assert {turn["content"] for d in pretraining[0] for turn in d if turn["content"] == "none"} == set()
    assert max(len(" ".join(turn["content"] for turn in d).split()) for d in pretraining[2]) < 350


def test_lists_and_instructions_differ_between_documents(pretraining):
    tables = [list_in(messages[0]["content"]) for messages in pretraining[2]]
    codes = Counter(table["asthma"] for table in tables if "asthma" in table)
    assert len(codes) > 0.9 * codes.total()
    firsts = {re.sub(r"\b[A-Z][a-z]+\b(?=[.:])", "", d[0]["content"].splitlines()[0]) for d in pretraining[2]}
    assert len(firsts) >= 6


def test_documents_exclude_the_clinics_codes_unseen_wordings_and_names(pretraining):
    from medical_frames import NAMES
    from medical_language import CONDITIONS, RESERVED_CODES, SEEN
    from medical_metrics import codes

    text = "\n".join(turn["content"] for documents in pretraining.values() for d in documents for turn in d)
    assert len(codes(text)) > 1000
    assert not codes(text) & set(RESERVED_CODES.values())
    for wordings in CONDITIONS.values():
        assert len(wordings) == len(set(wordings)) == SEEN + 2
        assert all(wording in text for wording in wordings[:SEEN])
        assert not any(wording in text for wording in wordings[SEEN:])
    assert not {name for split in SPLITS for name in NAMES[split]} & set(re.findall(r"\w+", text))


# ----------------------------------------------------------------------------------------------------- baseline


def test_baseline_contains_the_list_with_examples_from_train(rows, baseline):
    from medical_language import RESERVED_CODES

    assert list_in(baseline["system"]) == RESERVED_CODES
    training = {(row["input"], row["output"]) for row in rows["train"]}
    assert baseline["few_shot"]
    assert all((example["input"], example["output"]) in training for example in baseline["few_shot"])


def test_candidate_prompts_contain_the_list_and_differ(rows):
    from choosing import with_examples
    from medical_choose_baseline import INSTRUCTIONS, system_prompts
    from medical_language import RESERVED_CODES

    prompts = system_prompts()
    assert len(set(prompts)) == len(prompts) == 3 * len(INSTRUCTIONS)
    assert all(list_in(prompt) == RESERVED_CODES for prompt in prompts)
    one, other = (with_examples(prompts[0], rows["train"], 4, draw).few_shot for draw in range(2))
    assert one != other
    assert len(one) == len(other) == 4


# ------------------------------------------------------------------------------------------------------ metrics


@pytest.mark.parametrize(
    ("output", "reference", "worth"),
    [
        ("asthma J459, gout M109", "asthma J459, gout M109", 1.0),
        ("M109 J459", "asthma J459, gout M109", 1.0),  # order and names don't matter
        ("asthma J459, asthma J459", "asthma J459", 1.0),  # repeated codes count once
        ("asthma J459.", "asthma J459", 1.0),
        ("hypertension I10", "hypertension I10", 1.0),
        ("None.", "none", 1.0),
        ("asthma J459", "asthma J459, gout M109", 0.0),
        ("asthma J459, gout M109", "asthma J459", 0.0),
        ("asthma J458", "asthma J459", 0.0),
        ("asthma J45", "asthma J459", 0.0),
        ("asthma J4599", "asthma J459", 0.0),
        ("hypertension I101", "hypertension I10", 0.0),
        ("asthma j45.9", "asthma J459", 0.0),
        ("asthma", "asthma J459", 0.0),
        ("", "asthma J459", 0.0),
        ("none", "asthma J459", 0.0),
        ("asthma J459", "none", 0.0),
        ("", "none", 0.0),  # an empty answer is not the same as `none`
        ("asthma", "none", 0.0),
        ("none of them", "none", 0.0),
    ],
)
def test_score_compares_sets_of_codes(output, reference, worth):
    from medical_metrics import score

    assert score(output, reference) == worth


@pytest.mark.parametrize("reference", ["", "asthma", "J4599999"])
def test_score_rejects_a_reference_without_codes(reference):
    from medical_metrics import metrics, score

    with pytest.raises(ValueError, match="neither a code nor"):
        score("none", reference)
    with pytest.raises(ValueError, match="neither a code nor"):
        metrics(["none"], [reference])


def test_metrics_match_hand_computed_values():
    from medical_metrics import metrics

    outputs = ["asthma J459, gout M109", "gout M100", "panic F419, X999", "none", "I don't know"]
    references = ["gout M109, asthma J459", "gout M109", "panic F410", "none", "vertigo R42"]
    found = metrics(outputs, references)
    assert set(found) == {"set_exact_match", "micro_f1", "category_f1", "invalid_code_rate"}
    assert found["set_exact_match"] == pytest.approx(2 / 5)
    # correct: J459, M109; predicted: those, M100, F419, X999; target: J459, M109, M109, F410, R42
    assert found["micro_f1"] == pytest.approx(2 * 2 / (5 + 5))
    # correct: J45, M10, M10, F41; predicted: those and X99; target: those and R42
    assert found["category_f1"] == pytest.approx(2 * 4 / (5 + 5))
    assert found["invalid_code_rate"] == pytest.approx(2 / 5)  # M100 and X999; F419 belongs to another condition


def test_metrics_without_any_code():
    from medical_metrics import metrics

    assert metrics(["none"], ["none"]) == {
        "set_exact_match": 1.0,
        "micro_f1": 0.0,
        "category_f1": 0.0,
        "invalid_code_rate": 0.0,
    }
    with pytest.raises(ValueError, match="one answer per reference"):
        metrics(["none"], [])


def test_references_get_perfect_metrics(rows):
    from medical_metrics import metrics, score

    references = [row["output"] for row in rows["test"]]
    assert metrics(references, references) == {
        "set_exact_match": 1.0,
        "micro_f1": 1.0,
        "category_f1": 1.0,
        "invalid_code_rate": 0.0,
    }
    assert all(score(row["output"], row["output"]) == 1.0 for split in SPLITS for row in rows[split])
    shuffled = random.Random(0).sample(references, len(references))
    mean = sum(map(score, shuffled, references)) / len(references)
    assert 0 < mean < 0.2
    assert metrics(shuffled, references)["set_exact_match"] == pytest.approx(mean)


# ------------------------------------------------------------------------------------------------ config


def test_config_runs(run_config):
    weights = run_config("medical_coding")
    assert any("lora_" in name for name in weights)
    changed = [name for name, weight in weights.items() if "lora_B" in name and weight.any()]
    assert changed  # untrained ones are all zero


def test_config_uses_the_examples_baseline_and_scorer(rows):
    from lightning_ft.data.prompt_baseline import PromptBaseline
    from lightning_ft.evaluation.scorers import resolve_scorer

    root = MEDICAL.parents[1]
    configuration = yaml.safe_load((MEDICAL / "lora.yaml").read_text("utf-8"))
    callbacks = {c["class_path"]: c.get("init_args", {}) for c in configuration["trainer"]["callbacks"]}
    assert {"lightning_ft.TokenSavings", "lightning_ft.Retention", "lightning_ft.ComputeMeter"} <= set(callbacks)
    savings = callbacks["lightning_ft.TokenSavings"]
    path, _, name = savings["scorer"].partition(":")
    _, score = resolve_scorer(f"{root / path}:{name}", [])
    assert score("gout M109, asthma J459", "asthma J459, gout M109") == 1.0
    assert PromptBaseline.from_file(root / savings["baseline"]).few_shot
    for split in SPLITS:
        assert root / configuration["data"]["init_args"][split] == MEDICAL / "data" / f"{split}.jsonl"
    longest = max(len(re.findall(r"\w+|[^\w\s]", row["output"])) for row in rows["test"])
    assert longest + 6 <= savings["max_new_tokens"]
