"""The data of the examples on a real model: what loaders make of tiny stand-ins, and of the packages if installed."""

import doctest
import hashlib
import importlib
import importlib.util
import io
import json
import sys
import tarfile
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
from smollm2_stand_ins import STAND_INS, api_stand_in, legal_stand_in, medical_stand_in, support_stand_in

from lightning_ft.evaluation.retention.choices import load_choices

SMOLLM2 = Path(__file__).parents[2] / "examples" / "smollm2"
MODULES = (
    *(
        "packages",
        "data",
        "candidates",
        "courts",
        "reporters",
        "calls",
        "schemas",
        "phone",
        "general",
        "distill",
        "support_rules",
    ),
    *("medical_coding", "legal_citation", "api_calls", "support"),
)
DOMAINS = ("medical_coding", "legal_citation", "api_calls", "support")
ROWS = {
    "medical_coding": {"train": 3952, "validation": 335, "test": 1007, "test_unseen_codes": 532},
    "legal_citation": {"train": 5000, "validation": 400, "test": 600, "test_unseen_editions": 200},
    "api_calls": {"train": 693, "validation": 120, "test": 250, "test_unseen_functions": 200},
    "support": {"train": 1602, "validation": 226, "test": 457},
}
WRONG = {
    "medical_coding": "A00.0",
    "legal_citation": "0 F.2d 88 (9th Cir. 1978)",
    "api_calls": '{"name": "none", "arguments": {}}',
    "support": "reseat_sim_card, dance",
}
"""An answer that is wrong for each row."""


@pytest.fixture(scope="module", autouse=True)
def modules():
    """The loaders by name. They are unloaded afterward, since their names are ordinary words."""
    path, before = list(sys.path), {name: sys.modules.pop(name, None) for name in MODULES}
    sys.path.insert(0, str(SMOLLM2))
    yield {name: importlib.import_module(name) for name in MODULES}
    sys.path[:] = path
    for name, module in before.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


@pytest.fixture(autouse=True)
def written_folder(modules, monkeypatch, tmp_path):
    """Scorers read their lists from where these tests write them."""
    monkeypatch.setattr(modules["api_calls"], "ALTERNATIVES", tmp_path / "first" / "alternatives.json")


@pytest.fixture(params=DOMAINS)
def stand_in(request, modules, monkeypatch):
    """A domain's name and its loader, which reads stand-ins of the packages' files."""
    files = STAND_INS[request.param]()
    monkeypatch.setattr(modules["packages"].PackageFile, "read", lambda self: files[self.path])
    monkeypatch.setattr(modules["packages"].PackageFile, "source", lambda self: {"package": self.package})
    return request.param, modules[request.param]


@pytest.fixture(params=DOMAINS)
def real(request, modules):
    """A domain's name and its loader, if the packages that it reads are installed."""
    for source in modules[request.param].SOURCES:
        if importlib.util.find_spec(source.package) is None:
            pytest.skip(f"{source.package} isn't installed")
    return request.param, modules[request.param]


def check(name, module, modules, folder):
    """Write a domain twice; check files, splits and scores. The domain and what `source.json` says are returned."""
    domain = module.load()
    about = modules["data"].write(domain, module.SOURCES, folder / "first")
    modules["data"].write(module.load(), module.SOURCES, folder / "second")
    written = sorted(file.name for file in (folder / "first").iterdir())
    assert {"train.jsonl", "validation.jsonl", "test.jsonl", "source.json", *domain.files} <= {*written}
    for file in written:
        assert (folder / "first" / file).read_bytes() == (folder / "second" / file).read_bytes()
    inputs = {split: {row["input"] for row in rows} for split, rows in domain.splits.items()}
    assert all(inputs.values())
    assert not [pair for pair in combinations(inputs, 2) if inputs[pair[0]] & inputs[pair[1]]]
    assert json.loads((folder / "first" / "source.json").read_text("utf-8")) == about
    for split, rows in domain.numbered.items():
        assert [*rows[0]][:4] == ["id", "input", "output", "cluster"]
        lines = (folder / "first" / f"{split}.jsonl").read_text("utf-8").splitlines()
        assert [json.loads(line) for line in lines] == rows
        assert about["rows"][split] == len(rows) == len({row["id"] for row in rows})
        assert {module.score(row["output"], row["output"]) for row in rows} == {1.0}
        assert {module.score(text, row["output"]) for row in rows for text in (WRONG[name], "", "?")} == {0.0}
    return domain, about


def test_splits_of_stand_ins_are_disjoint_and_deterministic(stand_in, modules, tmp_path):
    check(*stand_in, modules, tmp_path)


def test_splits_of_real_packages_are_disjoint_and_deterministic(real, modules, tmp_path):
    _, about = check(*real, modules, tmp_path)
    assert about["rows"] == ROWS[real[0]]
    assert {"package", "version", "file", "sha256", "license"} == {*about["sources"][0]}


@pytest.mark.parametrize("name", MODULES)
def test_doctests_pass(name, modules):
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.testmod(modules[name], optionflags=flags).failed == 0


class TestPackageFile:
    @pytest.fixture
    def package(self, tmp_path, monkeypatch):
        """The folder of a package whose code can't run."""
        folder = tmp_path / "package_of_data"
        folder.mkdir()
        (folder / "__init__.py").write_text("raise RuntimeError('imported')", "utf-8")
        (folder / "rows.json").write_text("[]", "utf-8")
        monkeypatch.syspath_prepend(str(tmp_path))
        return folder.name

    def test_read_returns_the_file_without_importing_the_package(self, package, modules):
        sha256 = "4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945"
        assert modules["packages"].PackageFile(package, "rows.json", sha256, "MIT").read() == b"[]"
        assert package not in sys.modules

    def test_read_refuses_another_file_and_says_what_to_install(self, package, modules):
        with pytest.raises(SystemExit, match=r"SHA-256 4f53.* instead of 0000.*pip install .*requirements.txt"):
            modules["packages"].PackageFile(package, "rows.json", "0" * 64, "MIT").read()

    def test_read_names_a_missing_file(self, package, modules):
        with pytest.raises(SystemExit, match=r"none.json doesn't exist: .*pip install"):
            modules["packages"].PackageFile(package, "none.json", "0" * 64, "MIT").read()


def test_data_refuses_an_unknown_domain(modules, capsys):
    with pytest.raises(SystemExit):
        modules["data"].main(["astrology"])
    assert "unknown domain astrology; choose from medical_coding" in capsys.readouterr().err


class TestMedicalCoding:
    @pytest.fixture
    def domain(self, modules, monkeypatch):
        monkeypatch.setattr(modules["packages"].PackageFile, "read", lambda self: medical_stand_in()[self.path])
        return modules["medical_coding"].load()

    def test_codes_are_known_or_unseen(self, domain):
        known = {row["output"] for split in ("validation", "test") for row in domain.splits[split]}
        train = {row["output"] for row in domain.splits["train"]}
        unseen = {row["output"] for row in domain.splits["test_unseen_codes"]}
        assert known <= train
        assert not train & unseen
        assert len(train | unseen) == 40

    def test_held_out_terms_are_never_titles(self, domain):
        for split in ("validation", "test"):
            assert all(" of the " in row["input"] for row in domain.splits[split])

    def test_left_out_terms_are_counted(self, domain):
        assert domain.left_out["terms of several codes"] == 2
        assert domain.left_out["terms of codes with fewer than four terms"] == 1

    def test_candidates_are_codes_with_titles(self, domain):
        for row in domain.splits["test"]:
            lines = row["candidates"].splitlines()
            assert len(lines) == len(set(lines)) <= 12
            assert sum(line.startswith(row["output"] + " ") for line in lines) == 1
            assert row["structured_output"] == {"choices": [line.split(" ")[0] for line in lines]}
        assert domain.facts["candidates_recall"]["test"] == 1.0

    def test_metrics_need_the_list_of_codes(self, modules, monkeypatch, tmp_path):
        monkeypatch.setattr(modules["medical_coding"], "CODES_FILE", tmp_path / "codes.txt")
        with pytest.raises(FileNotFoundError, match=r"codes.txt doesn't exist. Write it: .*data.py medical_coding"):
            modules["medical_coding"].metrics(["A01.1"], ["A01.1"])
        with pytest.raises(ValueError, match="0 answers and 1 references"):
            modules["medical_coding"].metrics([], ["A01.1"])


class TestLegalCitation:
    @pytest.fixture
    def domain(self, modules, monkeypatch):
        monkeypatch.setattr(modules["packages"].PackageFile, "read", lambda self: legal_stand_in()[self.path])
        return modules["legal_citation"].load()

    def test_each_variation_is_in_one_split(self, domain, modules):
        written = {
            split: {row["input"].split(",")[0].strip("0123456789") for row in rows}
            for split, rows in domain.splits.items()
        }
        assert not [pair for pair in combinations(written, 2) if written[pair[0]] & written[pair[1]]]
        editions = {split: {row["cluster"] for row in rows} for split, rows in domain.splits.items()}
        assert editions["test"] <= editions["train"]
        assert not editions["train"] & editions["test_unseen_editions"]

    def test_ambiguous_names_are_left_out_and_counted(self, domain):
        assert domain.left_out["variations of several editions"] == 9
        assert domain.left_out["variations in other publications than case reporters"] == 5
        assert domain.left_out["courts without a citation string"] == 1
        assert domain.left_out["names of several courts"] == 2
        assert domain.left_out["attorneys general"] == 1
        assert not [row for rows in domain.splits.values() for row in rows if "Any." in row["input"]]

    def test_courts_and_years_go_with_the_edition(self, domain, modules):
        for rows in domain.splits.values():
            for row in rows:
                found = modules["legal_citation"].fields(row["output"])
                assert (found["reporter"] == "Ohio") == (found["court"] == "Ohio")
                assert (1989 if found["court"] == "Ohio" else 1950) <= int(found["year"]) <= 1990
                assert found["court"] not in ("Utah", "One", "Other")

    def test_metrics_refuse_fewer_answers_than_references(self, modules):
        with pytest.raises(ValueError, match="0 answers and 1 references"):
            modules["legal_citation"].metrics([], ["1 U.S. 2 (U.S. 1801)"])


class TestApiCalls:
    @pytest.fixture
    def domain(self, modules, monkeypatch, tmp_path):
        monkeypatch.setattr(modules["packages"].PackageFile, "read", lambda self: api_stand_in()[self.path])
        monkeypatch.setattr(modules["packages"].PackageFile, "source", lambda self: {"package": self.package})
        domain = modules["api_calls"].load()
        modules["data"].write(domain, modules["api_calls"].SOURCES, tmp_path / "first")
        return domain

    def test_known_functions_are_in_train_and_unseen_ones_are_not(self, domain):
        called = {split: {json.loads(row["output"])["name"] for row in rows} for split, rows in domain.splits.items()}
        clusters = {split: {row["cluster"] for row in rows} for split, rows in domain.splits.items()}
        for split in ("validation", "test"):
            assert called[split] <= called["train"]
            assert clusters[split] <= clusters["train"]
            assert not called[split] & called["test_unseen_functions"]
        assert not called["train"] & called["test_unseen_functions"]
        assert not clusters["train"] & clusters["test_unseen_functions"]

    def test_left_out_questions_are_counted(self, domain):
        assert [*domain.left_out.values()] == [3, 1, 1, 1]
        assert sum(map(len, domain.splits.values())) == 96

    def test_rows_have_the_first_values_and_the_system_turn(self, domain):
        rows = [row for rows in domain.splits.values() for row in rows]
        right = next(row for row in rows if row["input"].startswith("Function 7, please, to city 1"))
        assert right["output"] == '{"name":"f7","arguments":{"to":"city 1"}}'
        assert right["input"] == "Function 7, please, to city 1 (system)\n\nFunction 7, please, to city 1 (user)"
        assert [function["name"] for function in json.loads(right["functions"])] == ["f7", "f7.other"]
        assert right["cluster"] == "f7, f7.other"
        calls = right["structured_output"]["json_schema"]["anyOf"]
        assert [call["properties"]["name"] for call in calls] == [{"const": "f7"}, {"const": "f7.other"}]
        assert all(call["required"] == ["name", "arguments"] for call in calls)

    @pytest.mark.parametrize(
        ("described", "schema"),
        [
            ({"type": "any", "description": "Anything."}, {}),
            ({"type": "tuple", "items": {"type": "float"}}, {"type": "array", "items": {"type": "number"}}),
            ({"type": "array", "enum": ["a", "b"]}, {"type": "array", "items": {"enum": ["a", "b"]}}),
            ({"type": "array", "enum": [["a"], ["b"]]}, {"enum": [["a"], ["b"]]}),
            ({"type": "dict"}, {"type": "object"}),
            (
                {"type": "dict", "properties": {"x": {"type": "integer"}}, "required": ["x", "gone"]},
                {
                    "type": "object",
                    "properties": {"x": {"type": "integer"}},
                    "required": ["x"],
                    "additionalProperties": False,
                },
            ),
        ],
    )
    def test_schemas_have_the_types_of_the_data(self, described, schema, modules):
        assert modules["schemas"].value_schema(described) == schema

    @pytest.mark.parametrize(
        ("output", "right"),
        [
            ('{"name": "f7", "arguments": {"to": "CITY 1"}}', 1.0),
            ('```json\n{"name": "f7", "arguments": {"class": "First", "to": "city-1!"}}\n```', 1.0),
            ('{"name": "f7", "arguments": {"class": "", "to": "city 1"}}', 1.0),
            ('{"name": "f8", "arguments": {"to": "city 1"}}', 0.0),
            ('{"name": "f7", "arguments": {"class": "first"}}', 0.0),
            ('{"name": "f7", "arguments": {"to": "city 1", "who": "me"}}', 0.0),
            ('{"name": "f7", "arguments": {"to": ["city 1"]}}', 0.0),
            ('{"name": "f7", "arguments": {"to": "city 1"}, "more": 1}', 0.0),
            ('[{"name": "f7", "arguments": {"to": "city 1"}}, {"name": "f7", "arguments": {}}]', 0.0),
            ('{"name": "f7", "arguments": ', 0.0),
            ('{"name": "f7", "arguments": {"to": ' + "1" * 5000 + "}}", 0.0),
            ("{" * 100_000, 0.0),
            ('{"a":' * 100_000, 0.0),
        ],
    )
    def test_score_accepts_the_alternatives_only(self, domain, modules, output, right):
        assert modules["api_calls"].score(output, '{"name":"f7","arguments":{"to":"city 1"}}') == right

    def test_score_needs_the_alternatives(self, domain, modules, monkeypatch, tmp_path):
        with pytest.raises(ValueError, match="has no alternatives of 'f7'"):
            modules["api_calls"].score("f7", "f7")
        monkeypatch.setattr(modules["api_calls"], "ALTERNATIVES", tmp_path / "none.json")
        with pytest.raises(FileNotFoundError, match=r"none.json doesn't exist. Write it: .*data.py api_calls"):
            modules["api_calls"].score("f7", "f7")

    def test_metrics_count_functions_and_arguments(self, domain, modules):
        reference = '{"name":"f7","arguments":{"to":"city 1"}}'
        outputs = [reference, '{"name": "f7", "arguments": {}}', '{"name": "f8", "arguments": {"to": "city 1"}}', "?"]
        assert modules["api_calls"].metrics(outputs, [reference] * 4) == {
            "accuracy": 0.25,
            "parsed": 0.75,
            "function": 0.5,
            "arguments_recall": 0.25,
        }
        with pytest.raises(ValueError, match="0 answers and 1 references"):
            modules["api_calls"].metrics([], [reference])

    @pytest.mark.parametrize(
        ("value", "allowed", "right"),
        [
            ({"x": 1}, [{"x": [1], "y": ["", 2]}], True),
            ({"x": 1, "z": 2}, [{"x": [1]}], False),
            ({"position": {"x": 1.5}}, [{"position": [{"x": 1.5}]}], True),
            ([{"a": "B"}], [[{"a": ["b"]}]], True),
            ([1, 2], [[1], [1, 2]], True),
            ([2, 1], [[1, 2]], False),
            (None, ["", None], True),
            (True, [1, 1.0], False),
            (1, [True], False),
            ("5", [5], False),
            ("it's", ['it"s'], True),
        ],
    )
    def test_is_allowed_compares_nested_values_and_types(self, modules, value, allowed, right):
        assert modules["calls"].is_allowed(value, allowed) is right

    def test_first_values_prefers_a_value_for_required_arguments(self, modules):
        assert modules["calls"].first_values({"port": ["", 80], "host": [""]}, ["port", "host"]) == {
            "port": 80,
            "host": "",
        }


class TestSupport:
    @pytest.fixture
    def domain(self, modules, monkeypatch):
        monkeypatch.setattr(modules["packages"].PackageFile, "read", lambda self: support_stand_in()[self.path])
        return modules["support"].load()

    def test_splits_share_no_set_of_faults(self, domain):
        clusters = {split: {row["cluster"] for row in rows} for split, rows in domain.splits.items()}
        assert not [pair for pair in combinations(clusters, 2) if clusters[pair[0]] & clusters[pair[1]]]
        assert {split: len(found) for split, found in clusters.items()} == {"train": 44, "validation": 6, "test": 12}

    def test_repeated_and_contradictory_tasks_are_counted(self, domain):
        assert domain.facts["tasks"] == 65
        assert sum(map(len, domain.splits.values())) == 62
        assert [*domain.left_out.values()] == [1, 2]

    def test_rows_render_the_faults_and_the_actions_with_varying_arguments(self, domain):
        rows = {row["cluster"]: row for rows in domain.splits.values() for row in rows}
        row = rows["data_usage_exceeded|no_sms|no_storage"]
        assert row["input"].startswith("The user is unable to send messages.\n\nAirplane mode: OFF\n")
        assert "\nPermissions of the messaging app: phone\n" in row["input"]
        assert row["input"].endswith("\nData used: 15.1 of 15 GB")
        assert row["output"] == "grant_app_permission sms, grant_app_permission storage, refuel_data"

    def test_policy_has_both_texts(self, domain):
        assert domain.files["policy.txt"] == "# Policy\n\n# Workflow\n"

    def test_prompt_has_the_policy_and_the_actions(self, domain):
        prompt = json.loads(domain.files["baseline.json"])
        assert prompt["system"].startswith("# Policy\n\n# Workflow\n")
        assert prompt["system"].endswith(f"The actions are: {', '.join(domain.facts['actions'])}.")
        chosen = json.loads((SMOLLM2 / "baselines" / "support.json").read_text())
        assert prompt["few_shot"] == chosen["few_shot"] != []

    def test_readings_refuse_an_unknown_action(self, modules):
        with pytest.raises(ValueError, match="'explode', whose effect isn't known"):
            modules["phone"].readings([{"func_name": "explode", "arguments": {}}])

    def test_readings_of_a_suspended_line(self, modules):
        arguments = {"new_bill_id": "B1", "contract_ended": True}
        found = modules["phone"].readings([{"func_name": "suspend_line_for_overdue_bill", "arguments": arguments}])
        assert "Line status: Suspended\nContract end date: 2025-01-31\nOverdue bill: B1\n" in found

    def test_metrics_refuse_fewer_answers_than_references(self, modules):
        with pytest.raises(ValueError, match="0 answers and 1 references"):
            modules["support"].metrics([], ["toggle_data"])


class TestGeneral:
    @pytest.fixture
    def archive(self, modules, monkeypatch, tmp_path):
        """A small archive with the files that are read, and others that aren't."""
        general = modules["general"]
        stories = [
            {"source": source, "story": f"{source} {n}  told\nagain " + "word " * (300 if n else 1)}
            for source in (*general.KINDS, "race")
            for n in range(4)
        ]
        examples = [{"input": f"{n}?", "target_scores": {" yes": n % 2, "no ": 1 - n % 2}} for n in range(120)]
        odd = [{"input": "both?", "target_scores": {"yes": 1, "no": 1}}, {"input": "one?", "target_scores": {"a": 1}}]
        files = {general.TEXTS: {"data": stories}, "other/task.json": {}}
        files |= {f"{name}/task.json": {"examples": [*odd, *examples]} for name in general.QUESTIONS}
        path = tmp_path / "archive.tar.gz"
        with tarfile.open(path, "w:gz") as tar:
            for name, content in files.items():
                data = json.dumps(content).encode()
                member = tarfile.TarInfo(f"{general.TASKS}/{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        monkeypatch.setattr(general, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
        return path

    def test_texts_of_each_kind_and_questions_of_each_set_are_written(self, modules, archive, monkeypatch, tmp_path):
        monkeypatch.setattr(modules["general"], "TEXTS_PER_KIND", 2)
        modules["general"].main([str(archive), "--output", str(tmp_path / "general")])
        texts, anchored, questions = (
            [json.loads(line) for line in (tmp_path / "general" / f"{name}.jsonl").read_text("utf-8").splitlines()]
            for name in ("texts", "anchor", "questions")
        )
        assert Counter(row["kind"] for row in texts) == dict.fromkeys(modules["general"].KINDS.values(), 2)
        assert Counter(row["kind"] for row in anchored) == dict.fromkeys(modules["general"].KINDS.values(), 1)
        assert not {row["text"] for row in texts} & {row["text"] for row in anchored}
        assert all("told again word" in row["text"] for row in texts)
        counts = {name: min(count, 120) for name, count in modules["general"].QUESTIONS.items()}
        assert Counter(row["set"] for row in questions) == counts
        assert load_choices(tmp_path / "general" / "questions.jsonl")[0].choices == ("yes", "no")
        assert all(int(row["input"][3:-4]) % 2 == 1 - row["answer"] for row in questions)

    def test_another_archive_is_refused(self, modules, tmp_path):
        (tmp_path / "archive.tar.gz").write_bytes(b"other")
        with pytest.raises(SystemExit, match=r"SHA-256 d9298a10.* instead of 1bb398a5.*Is it bigbench 1.0.0"):
            modules["general"].main([str(tmp_path / "archive.tar.gz")])
