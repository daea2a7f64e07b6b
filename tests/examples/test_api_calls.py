"""The API example: reproducible data, disjoint splits, and metrics."""

import json
import random
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

API_CALLS = Path(__file__).parents[2] / "examples" / "api_calls"
SPLITS = ("train", "validation", "test")
LEVELS = (0, 1, 2)


@pytest.fixture(scope="module")
def rows():
    return {
        split: [json.loads(line) for line in (API_CALLS / "data" / f"{split}.jsonl").read_text("utf-8").splitlines()]
        for split in SPLITS
    }


@pytest.fixture(scope="module")
def baseline():
    return json.loads((API_CALLS / "baseline.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def documents():
    from api_pretraining import document

    rng = random.Random(5)
    return {level: [document(rng, level) for _ in range(300)] for level in LEVELS}


@pytest.fixture(scope="module")
def pretraining(documents):
    return "\n".join(turn["content"] for level in LEVELS for messages in documents[level] for turn in messages)


def pattern(text):
    """Compile a wording to a pattern that matches any values in its slots."""
    slots = {"hour": r"\d+", "count": r"\d+", "ref": r"\d{3}", "day": "[a-z]+day"}
    parts = re.split(r"\{(\w+)\}", text)
    return re.compile(
        "".join(f"(?P<{p}>{slots.get(p, '[a-z]+')})" if n % 2 else re.escape(p) for n, p in enumerate(parts))
    )


class Oracle:
    """Rule-based solver: parses the functions in a system turn and answers requests with them."""

    def __init__(self, system):
        from api_language import INTENTS, VALUE_TYPES

        self.value_types = VALUE_TYPES
        self.patterns = {
            key: [pattern(text) for text in (*intent.seen, *intent.unseen)] for key, intent in INTENTS.items()
        }
        type_of = {name: value_type for value_type, described in VALUE_TYPES.items() for name in described.parameters}
        self.functions = {}
        for line in system.splitlines()[1:]:
            call, *parameters = json.loads(f"[{line.removeprefix('- ')}]")
            assert call.split()[0] not in self.functions
            self.functions[call.split()[0]] = call, [(name, type_of[name]) for name in parameters]

    def read(self, request):
        """Parse the key and the values of a request."""
        for clause in request.removesuffix(" .").split(" . "):
            for key, patterns in self.patterns.items():
                for wording in patterns:
                    if found := wording.fullmatch(clause):
                        return key, found.groupdict()
        key, *_ = request.split()
        values = {}
        for value_type, described in self.value_types.items():
            others = r"(?<! from )(?<! to )" if value_type == "place" else ""
            if found := re.search(rf"{others}{pattern(described.phrase).pattern}", request):
                values |= found.groupdict()
        return key, values

    def answer(self, request):
        key, values = self.read(request)
        call, parameters = self.functions[key]
        arguments = {
            name: [int(values[value_type])] if value_type in ("count", "hour") else values[value_type]
            for name, value_type in parameters
        }
        return json.dumps({"call": call} | arguments)


def test_generate_reproduces_the_committed_files(tmp_path, monkeypatch):
    from api_generate import generate
    from generate import write

    monkeypatch.setattr("sys.argv", ["api_generate.py"])
    write(generate, None, tmp_path)
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(SPLITS)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (API_CALLS / "data" / path.name).read_bytes()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 1_250_000


def test_generate_depends_on_the_seed(rows):
    from api_generate import generate

    other = generate(seed=1)
    assert all(other[split] != rows[split] for split in SPLITS)


def test_splits_have_documented_sizes(rows):
    assert {split: len(found) for split, found in rows.items()} == {"train": 5000, "validation": 400, "test": 600}
    everything = [row for split in SPLITS for row in rows[split]]
    assert len({row["id"] for row in everything}) == len({row["input"] for row in everything}) == 6000


def test_functions_are_balanced_in_every_split(rows):
    from api_company import functions

    calls = {f"{function.key} {function.name}" for function in functions().values()}
    assert len(calls) == 18
    for split in SPLITS:
        counts = Counter(json.loads(row["output"])["call"] for row in rows[split])
        assert set(counts) == calls
        assert max(counts.values()) - min(counts.values()) <= 1


def test_wordings_are_disjoint_between_splits(rows):
    from api_company import functions
    from api_generate import wordings

    own = {split: {n: t for key in functions() for n, t in wordings(key, split).items()} for split in SPLITS}
    for split in SPLITS:
        assert {row["cluster"] for row in rows[split]} == set(own[split])
        for row in rows[split]:
            clauses = row["input"].removesuffix(" .").split(" . ")
            assert sum(bool(pattern(own[split][row["cluster"]]).fullmatch(clause)) for clause in clauses) == 1
    for one, other in combinations(SPLITS, 2):
        assert not set(own[one]) & set(own[other])
        assert not set(own[one].values()) & set(own[other].values())


def test_frames_are_disjoint_between_splits_and_pretraining():
    from api_frames import ASIDES, CLOSINGS, OPENINGS, PRETRAINING_ASIDES, PRETRAINING_CLOSINGS, PRETRAINING_OPENINGS

    frames = {split: [*OPENINGS[split], *ASIDES[split], *CLOSINGS[split]] for split in SPLITS}
    frames["pretraining"] = [*PRETRAINING_OPENINGS, *PRETRAINING_ASIDES, *PRETRAINING_CLOSINGS]
    sets = {name: {text.lower() for text in texts} - {""} for name, texts in frames.items()}
    for one, other in combinations(sets, 2):
        assert not sets[one] & sets[other]


def test_names_and_numbers_are_disjoint_between_splits(rows, pretraining):
    texts = {split: "\n".join(row["input"] for row in rows[split]) for split in SPLITS}
    names = {split: set(re.findall(r"[#@]([a-z]+)", text)) for split, text in texts.items()}
    refs = {split: set(re.findall(r"no\.(\d+)", text)) for split, text in texts.items()}
    assert all(len(names[split]) > 40 and len(refs[split]) > 50 for split in SPLITS)
    for one, other in combinations(SPLITS, 2):
        assert not names[one] & names[other]
        assert not refs[one] & refs[other]
    words = set(re.findall("[a-z]+", pretraining))
    assert not words & set().union(*names.values())


def test_half_of_test_wordings_are_unseen(rows):
    assert 270 <= sum("unseen" in row["cluster"] for row in rows["test"]) <= 330
    assert not any("unseen" in row["cluster"] for split in ("train", "validation") for row in rows[split])


def test_pretraining_excludes_the_company_and_unseen_wordings(pretraining):
    from api_company import COMPANY, functions
    from api_language import INTENTS

    words = set(re.findall(r"\w+", pretraining))
    assert COMPANY not in words
    assert not {function.name for function in functions().values()} & words
    clauses = {clause for line in pretraining.splitlines() for clause in line.removesuffix(" .").split(" . ")}
    for intent in INTENTS.values():
        assert any(pattern(text).fullmatch(clause) for text in intent.seen for clause in clauses)
        for text in intent.unseen:
            assert not any(pattern(text).search(clause) for clause in clauses), text


def test_wordings_belong_to_one_intent_and_contain_its_values():
    from api_language import INTENTS

    wordings = [(key, text) for key, intent in INTENTS.items() for text in (*intent.seen, *intent.unseen)]
    assert len({text for _, text in wordings}) == len(wordings) == 8 * len(INTENTS)
    for key, text in wordings:
        assert sorted(re.findall(r"\{(\w+)\}", text)) == sorted(INTENTS[key].value_types), text
        assert " . " not in text


def test_parameter_names_belong_to_one_value_type():
    from api_language import VALUE_TYPES

    names = [name for value_type in VALUE_TYPES.values() for name in value_type.parameters]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("level", LEVELS)
def test_pretraining_answers_follow_from_the_prompt(level, documents):
    for system, *turns in documents[level]:
        assert system["role"] == "system"
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
        assert 3 <= len(turns) / 2 <= 8
        oracle = Oracle(system["content"])
        for requested, reply in zip(turns[::2], turns[1::2], strict=True):
            assert oracle.answer(requested["content"]) == reply["content"], requested["content"]


def test_levels_increase_in_difficulty(documents):
    from api_language import INTENTS

    functions = [[messages[0]["content"].count("\n") for messages in documents[level]] for level in LEVELS]
    assert [(min(counts), max(counts)) for counts in functions] == [(4, 6), (8, 16), (16, 18)]
    literal = []
    for level in LEVELS:
        requested = [turn["content"].split()[0] for messages in documents[level] for turn in messages[1::2]]
        literal.append(sum(word in INTENTS for word in requested) / len(requested))
    assert literal[0] > literal[1] > literal[2]


def test_documents_are_deterministic_with_different_apis():
    from api_pretraining import document

    for level in LEVELS:
        assert document(random.Random(3), level) == document(random.Random(3), level)
    rng = random.Random(0)
    lines = [line for _ in range(50) for line in document(rng, 2)[0]["content"].splitlines()[1:]]
    assert len(set(lines)) > 0.99 * len(lines)
    rng = random.Random(0)
    assert len({document(rng, 2)[0]["content"].splitlines()[0] for _ in range(200)}) > 6


def test_answers_follow_from_the_baseline(rows, baseline):
    oracle = Oracle(baseline["system"])
    for split in SPLITS:
        for row in rows[split]:
            assert oracle.answer(row["input"]) == row["output"], row


def test_baseline_lists_every_function_with_examples_from_train(rows, baseline):
    from api_company import functions

    stated = baseline["system"].splitlines()[1:]
    assert sorted(stated) == sorted(function.line() for function in functions().values())
    training = {(row["input"], row["output"]) for row in rows["train"]}
    others = {row["input"] for split in ("validation", "test") for row in rows[split]}
    assert all((example["input"], example["output"]) in training for example in baseline["few_shot"])
    assert not {example["input"] for example in baseline["few_shot"]} & others


def test_candidate_prompts_list_every_function_once(rows):
    from api_choose_baseline import INSTRUCTIONS, system_prompts, with_examples
    from api_company import functions

    prompts = system_prompts()
    assert len(set(prompts)) == 3 * len(INSTRUCTIONS)
    lines = sorted(function.line() for function in functions().values())
    assert all(sorted(prompt.splitlines()[1:]) == lines for prompt in prompts)
    shown = [json.loads(row["output"])["call"] for row in with_examples("", rows["train"], 8, 0).few_shot]
    assert len(set(shown)) == len(shown) == 8


RIGHT = '{"call": "ship tolefi", "site": "sape", "count": [12], "weekday": "monday"}'


def test_references_score_one_and_are_valid(rows):
    from api_metrics import metrics, score

    for split in SPLITS:
        outputs = [row["output"] for row in rows[split]]
        assert all(score(output, output) == 1.0 for output in outputs)
        assert set(metrics(outputs, outputs).values()) == {1.0}


@pytest.mark.parametrize(
    ("output", "parsed", "valid", "function", "same"),
    [
        (
            '{"weekday":"monday","count":[12],"site":"sape","call":"ship tolefi"}',
            1,
            1,
            1,
            3,
        ),  # order and whitespace don't matter
        (RIGHT.replace("sape", "oslo"), 1, 1, 1, 2),
        (RIGHT.replace("[12]", '["12"]'), 1, 0, 1, 2),
        (RIGHT.replace("[12]", "12"), 1, 0, 1, 2),
        (RIGHT.replace("[12]", "[12.0]"), 1, 1, 1, 2),
        (RIGHT.replace("[12]", "[true]"), 1, 0, 1, 2),
        (RIGHT.replace("monday", "someday"), 1, 0, 1, 2),
        (RIGHT.replace('"weekday"', '"day"'), 1, 0, 1, 2),
        (RIGHT.replace(', "weekday": "monday"', ""), 1, 0, 1, 2),
        (RIGHT.replace("}", ', "hour": [7]}'), 1, 0, 1, 3),
        (RIGHT.replace("ship tolefi", "lunch pazeru"), 1, 1, 0, 0),  # another function with the same parameters
        (RIGHT.replace("ship tolefi", "ship fetola"), 1, 0, 0, 0),
        (RIGHT.replace('"ship tolefi"', '["ship tolefi"]'), 1, 0, 0, 0),
        (RIGHT + " Done.", 0, 0, 0, 0),
        (f"```json\n{RIGHT}\n```", 0, 0, 0, 0),
        (RIGHT[:-1], 0, 0, 0, 0),
        (RIGHT.replace("}", ', "count": [12]}'), 0, 0, 0, 0),
        (RIGHT.replace("[12]", "[NaN]"), 0, 0, 0, 0),
        (f"[{RIGHT}]", 1, 0, 0, 0),
        ("null", 0, 0, 0, 0),
        ("12", 1, 0, 0, 0),
        ("[" * 100_000, 0, 0, 0, 0),
        ("", 0, 0, 0, 0),
    ],
)
def test_metrics_of_one_answer(output, parsed, valid, function, same):
    from api_metrics import metrics, score

    found = metrics([output], [RIGHT])
    exact = float(function == 1 and same == 3 and "hour" not in output)
    assert score(output, RIGHT) == found["exact"] == found["arguments_exact"] == exact
    assert (found["parsed"], found["schema_valid"], found["function"]) == (parsed, valid, function)
    assert found["arguments_recall"] == pytest.approx(same / 3)


def test_metrics_of_several_answers_count_arguments_together():
    from api_metrics import metrics

    short = '{"call": "audit dufaso", "site": "sape", "weekday": "monday"}'
    outputs = [RIGHT.replace("sape", "oslo"), short.replace(', "weekday": "monday"', ""), "?", short]
    found = metrics(outputs, [RIGHT, short, short, short])
    assert found == {
        "exact": 0.25,
        "parsed": 0.75,
        "schema_valid": 0.5,
        "function": 0.75,
        "arguments_exact": 0.25,
        "arguments_precision": pytest.approx(5 / 6),  # 2 of 3, 1 of 1, none of none, 2 of 2
        "arguments_recall": pytest.approx(5 / 9),
        "arguments_f1": pytest.approx(2 * 5 / (6 + 9)),
    }
    assert set(metrics(["?"], [short]).values()) == {0.0}


def test_metrics_reject_invalid_references():
    from api_metrics import metrics, score

    with pytest.raises(ValueError, match="not valid JSON"):
        score(RIGHT, "ship 12")
    with pytest.raises(ValueError, match="not a call that the API accepts"):
        metrics([RIGHT], ['{"call": "ship fetola"}'])
    with pytest.raises(ValueError, match="2 answers and 1 references"):
        metrics([RIGHT, RIGHT], [RIGHT])
    with pytest.raises(ValueError, match="0 answers and 0 references"):
        metrics([], [])


def test_lora_config_runs(run_config):
    weights = run_config("api_calls")
    assert any("lora_" in name for name in weights)
    changed = [name for name, weight in weights.items() if "lora_B" in name and weight.any()]
    assert changed  # untrained ones are all zero


def test_lora_config_names_existing_files():
    import yaml

    from lightning_ft.evaluation.scorers import resolve_scorer

    config = yaml.safe_load((API_CALLS / "lora.yaml").read_text("utf-8"))
    callbacks = {entry["class_path"]: entry.get("init_args", {}) for entry in config["trainer"]["callbacks"]}
    assert list(callbacks) == [
        f"lightning_ft.{n}" for n in ("TokenSavings", "Retention", "ComputeMeter", "ExportModel")
    ]
    root = API_CALLS.parents[1]
    assert all((root / config["data"]["init_args"][split]).is_file() for split in SPLITS)
    savings = callbacks["lightning_ft.TokenSavings"]
    assert (root / savings["baseline"]).is_file()
    _, scorer = resolve_scorer(str(root / savings["scorer"]), [RIGHT])
    assert (scorer(RIGHT, RIGHT), scorer("?", RIGHT)) == (1.0, 0.0)
