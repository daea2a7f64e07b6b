"""Medical coding with ICD-10-CM of April 2026: a diagnosis in a clinician's words, its code as the answer.

Rows come from the tabular list of the classification, which is in the public domain. Each leaf code there has a title
and may have inclusion terms: other names of what it covers. A term is the input, the code the output. The codes used
are those with at least four terms. Where a code takes a seventh character, that one isn't asked for.

- `train`: the title and inclusion terms of the known codes, but for those below.
- `validation`, `test`: inclusion terms of known codes that aren't in `train`. A model has seen their code.
- `test_unseen_codes`: all terms of codes that no other split has. Only a prompt that lists them can help there.

The column `candidates` lists the twelve codes that a tf-idf search over all titles finds for the term: the prompt of
an application without fine-tuning. `structured_output` has them as the only answers that the server allows, which costs
no tokens and is open to a model without the prompt as well.
"""

from __future__ import annotations

import random
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from functools import cache

from candidates import Search
from packages import DATA, INSTALL, Domain, PackageFile, Row

TABULAR = PackageFile(
    package="simple_icd_10_cm",
    path="data/icd10c-tabular-April-1-2026.xml",
    sha256="f161f8182aff3ce3a2a78e202f8259c08eaee2c670a9e45b0072445c52302935",
    license="public domain (package: MIT)",
)
SOURCES = (TABULAR,)
MIN_TERMS = 4
"""Number of terms, the title included, that a code needs."""
CANDIDATES = 12
UNSEEN_CODES = 100
CATEGORY = 3
"""Number of characters of a code that name its category: K52.29 belongs to K52."""
CODES_FILE = DATA / "medical_coding" / "codes.txt"
CODE = re.compile(r"(?<![\w.])(?:[A-Z]\d|QA)[0-9A-Z](?:\.?[0-9A-Z]{1,4})?(?!\.?\w)")
"""A code in the format of ICD-10-CM, whether it exists or not; only QA0 has two letters in front."""


def read_terms(xml: bytes) -> dict[str, list[str]]:
    """Read the leaf codes of a tabular list.

    Args:
        xml: The tabular list.

    Returns:
        Each code's terms without repetitions: the title, then its inclusion terms.

    Example:
        >>> leaf = "<diag><name>A1.0</name><desc>X</desc><inclusionTerm><note>Y</note></inclusionTerm></diag>"
        >>> read_terms(f"<r><diag><name>A1</name><desc>Z</desc>{leaf}</diag></r>".encode())
        {'A1.0': ['X', 'Y']}
    """
    leaves = [code for code in ElementTree.fromstring(xml).iter("diag") if code.find("diag") is None]
    return {
        leaf.findtext("name", ""): list(
            dict.fromkeys(
                " ".join((term.text or "").split())
                for term in (*leaf.findall("desc"), *leaf.findall("inclusionTerm/note"))
            )
        )
        for leaf in leaves
    }


def load() -> Domain:
    """Make the domain's data.

    Raises:
        SystemExit: If the package isn't installed or has another file.
    """
    everything = read_terms(TABULAR.read())
    terms = {code: found for code, found in everything.items() if len(found) >= MIN_TERMS}
    titles = {code: found[0] for code, found in terms.items()}
    uses = Counter(term.lower() for found in terms.values() for term in {term.lower() for term in found})
    usable = {
        code: [term for term in found if _is_term(term) and uses[term.lower()] == 1] for code, found in terms.items()
    }
    chosen = _split(usable, titles)
    search = Search(titles)
    rows = {split: [_row(term, code, titles, search) for code, term in pairs] for split, pairs in chosen.items()}
    found = {split: sum(_is_candidate(row) for row in made) for split, made in rows.items()}
    unfinished = sum(not _is_term(term) for found in terms.values() for term in found)
    total = sum(map(len, terms.values()))
    return Domain(
        splits=rows,
        left_out={
            "terms that end with a colon, which a list continued": unfinished,
            "terms of several codes": total - unfinished - sum(map(len, usable.values())),
            "terms of codes with fewer than four terms": sum(map(len, everything.values())) - total,
        },
        facts={
            "codes": len(terms),
            "terms": total,
            "unseen_codes": len({code for code, _ in chosen["test_unseen_codes"]}),
            "candidates": CANDIDATES,
            "first_candidate_accuracy": {
                split: round(sum(_first(row) == row["output"] for row in made) / max(len(made), 1), 4)
                for split, made in rows.items()
            },
            "candidates_recall": {split: round(found[split] / max(len(made), 1), 4) for split, made in rows.items()},
        },
        files={CODES_FILE.name: "".join(f"{code}\n" for code in everything)},
    )


def _is_term(text: str) -> bool:
    return not text.endswith(":")


def _split(usable: dict[str, list[str]], titles: dict[str, str]) -> dict[str, list[tuple[str, str]]]:
    """Pairs of code and term for each split."""
    rng = random.Random(0)
    unseen = set(rng.sample(sorted(usable), min(UNSEEN_CODES, len(usable) // 4)))
    known = [code for code in usable if code not in unseen]
    validated = set(rng.sample(known, len(known) // 3))
    chosen: dict[str, list[tuple[str, str]]] = {"train": [], "validation": [], "test": []}
    for code in known:
        inclusions = [term for term in usable[code] if term != titles[code]]
        # One term at least stays in `train`, also for a code whose title was left out.
        held = rng.sample(inclusions, min(1 + (code in validated), len(usable[code]) - 1, len(inclusions)))
        chosen["train"] += [(code, term) for term in usable[code] if term not in held]
        chosen["test"] += [(code, term) for term in held[:1]]
        chosen["validation"] += [(code, term) for term in held[1:]]
    chosen["test_unseen_codes"] = [(code, term) for code in usable if code in unseen for term in usable[code]]
    rng.shuffle(chosen["train"])
    return chosen


def _row(term: str, code: str, titles: dict[str, str], search: Search) -> Row:
    candidates = search.find(term, CANDIDATES)
    lines = "\n".join(f"{candidate} {titles[candidate]}" for candidate in candidates)
    return {
        "input": term,
        "output": code,
        "cluster": code,
        "candidates": lines,
        "structured_output": {"choices": candidates},
    }


def _first(row: Row) -> str:
    return row["structured_output"]["choices"][0]


def _is_candidate(row: Row) -> bool:
    return row["output"] in row["structured_output"]["choices"]


def codes(text: str) -> frozenset[str]:
    """Find the codes in an answer, without dots.

    Example:
        >>> sorted(codes("K52.29 Other allergic and dietetic gastroenteritis and colitis; or K529. M1099999 is none"))
        ['K5229', 'K529']
    """
    return frozenset(code.replace(".", "") for code in CODE.findall(text))


def score(output: str, reference: str) -> float:
    """Grade an answer: 1 if the reference's code is the only code in it, otherwise 0.

    Args:
        output: Answer of a model; words next to the code don't count.
        reference: The code.

    Example:
        >>> score("K52.29", "K52.29"), score("K5229 Other gastroenteritis", "K52.29"), score("K52.29 or A09", "K52.29")
        (1.0, 1.0, 0.0)
    """
    return float(codes(output) == {reference.replace(".", "")})


def metrics(
    outputs: Sequence[str], references: Sequence[str], existing: frozenset[str] | None = None
) -> dict[str, float]:
    """Compute the metrics of all answers.

    Args:
        outputs: Answers, ``n``.
        references: The codes, ``n``.
        existing: All codes without dots; by default those that `data.py` wrote.

    Returns:
        ``code_accuracy``: mean of `score`. ``category_accuracy``: share of answers whose codes are all of the right
        category. ``existing_code_rate``: share of answers that have codes, all of which exist.

    Raises:
        ValueError: If there are no answers, or not as many as references.
        FileNotFoundError: If `existing` isn't passed and the data haven't been written.

    Example:
        >>> found = metrics(["K52.29", "K52.2", "none"], ["K52.29", "K52.29", "A09"], frozenset({"K5229", "A09"}))
        >>> {name: round(value, 2) for name, value in found.items()}
        {'code_accuracy': 0.33, 'category_accuracy': 0.67, 'existing_code_rate': 0.33}
    """
    if not references or len(outputs) != len(references):
        raise ValueError(
            f"metrics() got {len(outputs)} answers and {len(references)} references; pass one answer per reference."
        )
    existing = _existing_codes() if existing is None else existing
    answers = [codes(output) for output in outputs]
    categories = [{code[:CATEGORY] for code in answer} for answer in answers]
    pairs = zip(categories, references, strict=True)
    count = len(outputs)
    return {
        "code_accuracy": sum(map(score, outputs, references)) / count,
        "category_accuracy": sum(category == {reference[:CATEGORY]} for category, reference in pairs) / count,
        "existing_code_rate": sum(bool(answer) and answer <= existing for answer in answers) / count,
    }


@cache
def _existing_codes() -> frozenset[str]:
    if not CODES_FILE.is_file():
        raise FileNotFoundError(
            f"{CODES_FILE} doesn't exist. Write it: {INSTALL}; python examples/smollm2/data.py medical_coding"
        )
    return frozenset(CODES_FILE.read_text(encoding="utf-8").replace(".", "").split())
