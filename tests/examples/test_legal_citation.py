"""The legal citation example: data, splits, separation from pretraining, and metrics."""

import json
import random
import re
import runpy
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
import yaml

LEGAL = Path(__file__).parents[2] / "examples" / "legal_citation"

SPLITS = ("train", "validation", "test")
NAME, NUMBER = r"[A-Z][a-z]+(?: [A-Z][a-z]+)?", r"(?<!\d)\d{3}(?!\d)"
ANSWER = re.compile(rf"([a-z]+) (.+) {NUMBER} : ({NAME}) v\. ({NAME}), ({NUMBER}) (.+) ({NUMBER}) \((\d{{4}})\)")


@pytest.fixture(scope="module")
def rows():
    return {
        split: [json.loads(line) for line in (LEGAL / "data" / f"{split}.jsonl").read_text("utf-8").splitlines()]
        for split in SPLITS
    }


@pytest.fixture(scope="module")
def baseline():
    return json.loads((LEGAL / "baseline.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def pretraining():
    """Draw 300 documents of each level."""
    from legal_pretraining import document

    return {level: [document(random.Random(f"{level} {seed}"), level) for seed in range(300)] for level in range(3)}


@pytest.fixture(scope="module")
def wordings():
    """Wordings of each part by split; the test split includes the unseen ones."""
    from legal_language import SEEN, UNSEEN

    return {
        part: {s: getattr(SEEN[s], part) + (getattr(UNSEEN, part) if s == "test" else ()) for s in SPLITS}
        for part in ("parties", "locations", "years")
    }


def list_in(system):
    """Parse the reporter of each word from the lines of a prompt."""
    return dict(re.fullmatch(r"- (\w+) (.+)", line).groups() for line in system.splitlines()[1:])


def pattern(wording, words):
    """Compile a wording to a pattern with its values as groups."""
    groups = {"p": NAME, "d": NAME, "v": NUMBER, "n": NUMBER, "r": "|".join(words), "y": r"(?<!\d)\d{4}(?!\d)"}
    text = re.sub(r"\\{(\w)\\}", lambda found: f"(?P<{found[1]}>{groups[found[1]]})", re.escape(wording))
    return re.compile(rf"(?<!\w){text}(?!\w)")


def oracle(mention, table, frames, parties, locations):
    """Cite a mention from its wordings and the list; there must be exactly one way to parse it.

    Asides with another year can be distinguished from the mention and are removed first. A short wording may appear
    inside a longer one (`347 owl` in `483 in 347 owl`), so the longest location is the intended one.
    """
    if mention in table:
        return f"{mention} {table[mention]}"
    for aside in frames.asides:
        if "{o}" in aside:
            mention = re.sub(re.escape(aside).replace(r"\{o\}", r"\d{4}").replace(r"\{who\}", r"\w+"), "", mention)
    sides = {(m["p"], m["d"]) for wording in parties for m in pattern(wording, table).finditer(mention)}
    found = [m for wording in locations for m in pattern(wording, table).finditer(mention)]
    longest = max(m.end() - m.start() for m in found)
    citations = {(m["v"], m["r"], m["n"]) for m in found if m.end() - m.start() == longest}
    years = set(re.findall(r"(?<!\d)\d{4}(?!\d)", mention))
    assert len(sides) == len(citations) == len(years) == 1, (mention, sides, citations, years)
    (plaintiff, defendant), (volume, word, page), (year,) = sides.pop(), citations.pop(), years
    return f"{word} {table[word]} {page} : {plaintiff} v. {defendant}, {volume} {table[word]} {page} ({year})"


# ------------------------------------------------------------------------------------------------------- data


def test_generate_reproduces_the_committed_files(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["legal_generate.py", "--folder", str(tmp_path)])
    runpy.run_path(str(LEGAL / "legal_generate.py"), run_name="__main__")
    made = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert made == {file.name: file.read_bytes() for file in (LEGAL / "data").iterdir()}
    assert sum(map(len, made.values())) < 1_350_000


def test_generate_depends_on_the_seed(rows):
    from legal_generate import generate

    made = generate(seed=1)
    assert {row["output"] for row in made["test"]}.isdisjoint(row["output"] for row in rows["test"])


def test_splits_have_documented_sizes(rows):
    assert {split: len(found) for split, found in rows.items()} == {"train": 5000, "validation": 400, "test": 600}
    everything = [row for split in SPLITS for row in rows[split]]
    assert len({row["id"] for row in everything}) == len({row["output"] for row in everything}) == 6000
    assert all(set(row) == {"id", "input", "output", "cluster"} for row in everything)


def test_words_are_balanced_in_every_split(rows):
    from legal_language import TABLE

    for split, found in rows.items():
        counts = Counter(row["output"].split()[0] for row in found)
        assert set(counts) == set(TABLE)
        assert max(counts.values()) - min(counts.values()) <= (2 if split == "test" else 1)


def test_answers_follow_from_note_and_baseline(rows, baseline, wordings):
    from legal_language import FRAMES

    table = list_in(baseline["system"])
    for split, found in rows.items():
        parties, locations = wordings["parties"][split], wordings["locations"][split]
        for row in found:
            assert oracle(row["input"], table, FRAMES[split], parties, locations) == row["output"]


def test_wordings_are_disjoint_between_splits(rows, wordings):
    from legal_language import FRAMES, SEEN

    for part in wordings.values():
        assert all(set(part[a]).isdisjoint(part[b]) for a, b in combinations(SPLITS, 2))
        assert sum(map(len, part.values())) == len(set().union(*part.values()))
    for part in ("openings", "asides", "closings"):
        texts = {name: set(getattr(frames, part)) - {""} for name, frames in FRAMES.items()}
        assert set(texts) == {*SPLITS, "pretraining"}
        assert all(texts[a].isdisjoint(texts[b]) for a, b in combinations(texts, 2))
    clusters = {split: {row["cluster"] for row in rows[split]} for split in SPLITS}
    assert all(clusters[a].isdisjoint(clusters[b]) for a, b in combinations(SPLITS, 2))
    assert len(clusters["train"]) == len(SEEN["train"].parties) * len(SEEN["train"].locations)
    assert len(clusters["test"]) > 200


def test_clusters_name_the_wordings_of_their_rows(rows, wordings):
    from legal_generate import cluster
    from legal_language import TABLE

    for split in SPLITS:
        names = {cluster(p, q): (p, q) for p in wordings["parties"][split] for q in wordings["locations"][split]
                 if (p in wordings["parties"]["test"][12:]) == (q in wordings["locations"]["test"][12:])}  # fmt: skip
        for row in rows[split]:
            assert all(pattern(wording, TABLE).search(row["input"]) for wording in names[row["cluster"]])


def test_parties_volumes_and_pages_are_disjoint_between_splits(rows):
    stems, numbers = {}, {}
    for split, found in rows.items():
        parts = [ANSWER.fullmatch(row["output"]) for row in found]
        stems[split] = {m[side].split()[0] for m in parts for side in (3, 4)}
        numbers[split] = {m[group] for m in parts for group in (5, 7)}
    for a, b in combinations(SPLITS, 2):
        assert stems[a].isdisjoint(stems[b])
        assert numbers[a].isdisjoint(numbers[b])
    assert len(stems["test"]) > 400
    assert len(numbers["test"]) > 170


def test_half_of_test_rows_have_unseen_wordings(rows):
    assert sum(row["cluster"].startswith("unseen-") for row in rows["test"]) == 300
    assert not any(row["cluster"].startswith("unseen-") for split in SPLITS[:2] for row in rows[split])


# ------------------------------------------------------------------------------------------------- pretraining


def test_documents_are_deterministic(pretraining):
    from legal_pretraining import document

    for level, documents in pretraining.items():
        assert document(random.Random(f"{level} 7"), level) == documents[7]
    assert len({json.dumps(d) for documents in pretraining.values() for d in documents}) == 900


def test_document_answers_follow_from_the_prompt(pretraining):
    from legal_language import FRAMES
    from legal_pretraining import PRETRAINING, SIMPLE

    parties, locations = (SIMPLE.parties + PRETRAINING.parties, SIMPLE.locations + PRETRAINING.locations)
    for documents in pretraining.values():
        for system, *turns in documents:
            assert system["role"] == "system"
            assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
            assert 3 <= len(turns) // 2 <= 8
            table = list_in(system["content"])
            for mention_turn, citation_turn in zip(turns[::2], turns[1::2], strict=True):
                assert (
                    oracle(mention_turn["content"], table, FRAMES["pretraining"], parties, locations)
                    == citation_turn["content"]
                )


def test_levels_increase_in_difficulty(pretraining):
    lines = {level: [len(d[0]["content"].splitlines()) - 1 for d in found] for level, found in pretraining.items()}
    assert [(min(found), max(found)) for found in lines.values()] == [(4, 6), (8, 16), (24, 30)]
    short = {level: sum(" : " not in d[2]["content"] for d in found) for level, found in pretraining.items()}
    assert short[0] > 80 > 30 > short[1] > short[2] == 0


def test_lists_and_instructions_differ_between_documents(pretraining):
    from legal_language import FIRMS

    documents = pretraining[2]
    assert len({d[0]["content"] for d in documents}) == len(documents)
    firms = re.compile("|".join(FIRMS))
    assert len({firms.sub("", d[0]["content"].splitlines()[0]) for d in documents}) >= 6
    meanings = {}
    for document in documents:
        for word, reporter in list_in(document[0]["content"]).items():
            meanings.setdefault(word, set()).add(reporter)
    assert min(map(len, meanings.values())) > 15  # a word is no hint to its reporter


def test_documents_exclude_the_firms_pairs_unseen_wordings_and_names(pretraining, rows):
    from legal_language import FIRM, TABLE, UNSEEN

    words = set(TABLE)
    unseen = [pattern(w, words | {"[a-z]+"}) for w in UNSEEN.parties + UNSEEN.locations + UNSEEN.years]
    taken = {m[side].split()[0] for found in rows.values() for row in found
             for m in [ANSWER.fullmatch(row["output"])] for side in (3, 4)}  # fmt: skip
    for documents in pretraining.values():
        for document in documents:
            assert not list_in(document[0]["content"]).items() & TABLE.items()
            text = "\n".join(turn["content"] for turn in document)
            assert FIRM not in text
            assert taken.isdisjoint(re.findall(r"[A-Z][a-z]+", text))
            mention_turn = "\n".join(turn["content"] for turn in document[1::2])
            assert not [p.pattern for p in unseen if p.search(mention_turn)]
    assert all(
        any(p.search(row["input"]) for row in rows["test"]) for p in unseen
    )  # the patterns match them where they appear


def test_reporters_are_known_to_eyecite():
    from legal_language import REPORTERS, TABLE
    from legal_metrics import FIELDS, fields

    assert set(TABLE.values()) <= set(REPORTERS)
    for reporter in REPORTERS:
        found = fields(f"Bako v. Tiremo Steel, 347 {reporter} 483 (1954)")
        assert tuple(found.values()) == ("Bako", "Tiremo Steel", "347", reporter, "483", "1954")
        assert tuple(found) == FIELDS


# ---------------------------------------------------------------------------------------------------- baseline


def test_baseline_contains_the_list_with_examples_from_train(rows, baseline):
    from legal_language import TABLE

    assert list_in(baseline["system"]) == TABLE
    pairs = {split: {(row["input"], row["output"]) for row in rows[split]} for split in SPLITS}
    shown = {(example["input"], example["output"]) for example in baseline["few_shot"]}
    assert shown <= pairs["train"]
    assert shown.isdisjoint(pairs["validation"] | pairs["test"])


def test_candidate_prompts_contain_the_list_and_differ(rows, baseline):
    from choosing import DRAWS, with_examples
    from legal_choose_baseline import EXAMPLES, system_prompts
    from legal_language import TABLE

    systems = system_prompts()
    assert len(set(systems)) == 9
    assert all(list_in(system) == TABLE for system in systems)
    assert baseline["system"] in systems
    drawn = [with_examples(systems[0], rows["train"], n, draw).few_shot for n in EXAMPLES for draw in range(DRAWS)]
    assert [len(few_shot) for few_shot in drawn] == [n for n in EXAMPLES for _ in range(DRAWS)]
    assert len({json.dumps(few_shot) for few_shot in drawn}) == len(drawn)


# ----------------------------------------------------------------------------------------------------- metrics

RIGHT = "owl F.2d 483 : Bako v. Tiremo Steel, 347 F.2d 483 (1954)"


@pytest.mark.parametrize(
    ("output", "worth", "parsed", "right"),
    [
        (RIGHT, 1, 6, 6),
        ("Bako v. Tiremo Steel, 347 F.2d 483 (1954)", 1, 6, 6),
        (
            "fox F.3d 483 : Bako v. Tiremo Steel, 347 F.2d 483 (1954)",
            1,
            6,
            6,
        ),  # the text before ` : ` isn't part of the citation
        ("owl F.2d 483 : Bako v. Tiremo Steel, 347 F.3d 483 (1954)", 0, 6, 5),
        ("owl F.2d 483 : Tiremo Steel v. Bako, 347 F.2d 483 (1954)", 0, 6, 4),
        ("owl F.2d 483 : Bako v. Tiremo, 483 F.2d 347 (1955)", 0, 6, 2),
        ("owl F.2d 483 : Bako v. Tiremo Steel, 347 F.2d 483", 0, 5, 5),
        ("owl F.2d 483 : 347 F.2d 483 (1954)", 0, 4, 4),
        ("owl F.2d 483 : Bako v. Tiremo Steel, 347 owl 483 (1954)", 0, 0, 0),
        (
            "owl F.2d 483 : Bako v. Tiremo Steel 347 F.2d 483 (1954)",
            0,
            6,
            6,
        ),  # without the comma it is parsed, but not exact
        ("owl F.2d 483 : Bako v. Tiremo Steel, 347 F.2d 483 (1954), 12 U.S. 34 (1960)", 0, 0, 0),  # two citations
        ("owl F.2d", 0, 0, 0),
        ("owl F.2d : ", 0, 0, 0),
        ("F.2d F.2d v. v. ( : (", 0, 0, 0),
        ("", 0, 0, 0),
        (" \n", 0, 0, 0),
    ],
)
def test_fields_of_one_answer(output, worth, parsed, right):
    from legal_metrics import fields, metrics, score

    assert score(output, RIGHT) == worth
    target = fields(RIGHT)
    found = fields(output)
    assert (len(found), sum(found.get(field) == target[field] for field in target)) == (parsed, right)
    assert metrics([output], [RIGHT]) == {
        "parsed_rate": float(parsed > 0),
        "field_f1": pytest.approx(2 * right / (parsed + 6)),
        "reporter_accuracy": float(found.get("reporter") == "F.2d"),
        "exact_match": worth,
    }


def test_metrics_pool_fields_of_all_answers():
    from legal_metrics import metrics

    found = metrics([RIGHT, "owl F.2d 483 : Bako v. Tiremo Steel, 347 F.3d 483", "none", RIGHT], [RIGHT] * 4)
    assert found["parsed_rate"] == 0.75
    assert found["field_f1"] == pytest.approx(2 * (6 + 4 + 0 + 6) / ((6 + 5 + 0 + 6) + 24))
    assert (found["reporter_accuracy"], found["exact_match"]) == (0.5, 0.5)


def test_metrics_reject_invalid_inputs():
    from legal_metrics import metrics

    with pytest.raises(ValueError, match="no answers"):
        metrics([], [])
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        metrics([RIGHT, RIGHT], [RIGHT])


def test_references_get_perfect_metrics(rows):
    from legal_metrics import FIELDS, fields, metrics, score

    for split in SPLITS:
        assert all(score(row["output"], row["output"]) == 1.0 for row in rows[split])
    for row in rows["train"][::10]:  # a sample, since eyecite takes milliseconds per row
        assert set(fields(row["output"])) == set(FIELDS)
    references = [row["output"] for row in rows["test"]]
    assert metrics(references, references) == {
        "parsed_rate": 1.0,
        "field_f1": 1.0,
        "reporter_accuracy": 1.0,
        "exact_match": 1.0,
    }


# ------------------------------------------------------------------------------------------------ config


def test_config_runs(run_config):
    weights = run_config("legal_citation")
    assert any("lora_" in name for name in weights)
    changed = [name for name, weight in weights.items() if "lora_B" in name and weight.any()]
    assert changed  # untrained ones are all zero


def test_config_is_read_with_its_callbacks(monkeypatch, capsys):
    from lightning_ft.__main__ import main

    monkeypatch.chdir(LEGAL.parents[1])
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", "examples/legal_citation/lora.yaml", "--print_config"])
    assert stopped.value.code in (None, 0)
    read = yaml.safe_load(capsys.readouterr().out)
    names = [callback["class_path"].rpartition(".")[2] for callback in read["trainer"]["callbacks"]]
    assert names == ["ComputeMeter", "TokenSavings", "Retention", "ExportModel"]
    assert read["data"]["init_args"]["packing"] is False


def test_config_uses_the_examples_baseline_and_scorer(rows):
    from lightning_ft.data.prompt_baseline import PromptBaseline
    from lightning_ft.evaluation.scorers import resolve_scorer

    root = LEGAL.parents[1]
    configuration = yaml.safe_load((LEGAL / "lora.yaml").read_text("utf-8"))
    callbacks = {c["class_path"]: c.get("init_args", {}) for c in configuration["trainer"]["callbacks"]}
    savings = callbacks["lightning_ft.TokenSavings"]
    path, _, name = savings["scorer"].partition(":")
    _, score = resolve_scorer(f"{root / path}:{name}", [])
    assert score("Bako v. Tiremo Steel, 347 F.2d 483 (1954)", RIGHT) == 1.0
    assert PromptBaseline.from_file(root / savings["baseline"]).system
    for split in SPLITS:
        assert root / configuration["data"]["init_args"][split] == LEGAL / "data" / f"{split}.jsonl"
    # letters, digits and punctuation are separate tokens; a made-up name may take four tokens instead of one
    longest = max(len(re.findall(r"[A-Za-z]+|\d+|[^\w\s]+", row["output"])) for row in rows["test"])
    assert longest + 2 * 3 + 1 <= savings["max_new_tokens"]
