"""Tiny files in the formats of the packages that the examples on a real model read."""

import gzip
import json
from itertools import combinations


def medical_stand_in():
    """Forty codes with a title and four inclusion terms; two share a term, and one has too few."""
    words = ("fever", "cough", "rash", "pain", "ache", "burn", "cyst", "node", "clot", "gout")
    codes = [(f"A{i:02d}.1", words[i % 10], ("left", "right", "old", "new")[i // 10]) for i in range(40)]
    leaves = "".join(
        f"<diag><name>{code}</name><desc>{side} {word}</desc><inclusionTerm>"
        + "".join(f"<note>{word} of the {side} {part}</note>" for part in ("arm", "leg", "eye"))
        + ("<note>shared name</note>" if code in ("A01.1", "A02.1") else "")
        + "</inclusionTerm></diag>"
        for code, word, side in codes
    )
    rare = "<diag><name>B00.1</name><desc>rare</desc></diag>"
    return {"data/icd10c-tabular-April-1-2026.xml": f"<root><diag><name>A</name>{leaves}{rare}</diag></root>".encode()}


def legal_stand_in():
    """Eight federal editions and one of Ohio, each with four variations, and courts of either."""
    dates = {"start": "1950-01-01T00:00:00", "end": "1990-12-31T00:00:00"}

    def reporter(name, cite_type, jurisdictions):
        variations = {f"{name} {written}": name for written in ("Rep.", "R.", "Repr.", "Rp.")}
        return {
            "cite_type": cite_type,
            "mlz_jurisdiction": jurisdictions,
            "editions": {name: dates},
            "variations": variations | {"Any.": name},
        }

    reporters = {f"F{i}.": [reporter(f"F{i}.", "federal", [])] for i in range(8)}
    reporters["Ohio"] = [reporter("Ohio", "state", ["us:oh;supreme.court"])]
    reporters["WL"] = [reporter("WL", "specialty_west", [])]

    def court(name, citation, system, location, **others):
        base = {"name": name, "citation_string": citation, "system": system, "location": location, "examples": []}
        return base | {"type": "trial", "dates": [{"start": None, "end": None}]} | others

    late = [{"start": "1989-01-01", "end": None}]
    courts = [court(f"Federal Court {i}", f"Fed. Ct. {i}", "federal", "Ohio") for i in range(3)]
    courts += [
        court("Supreme Court of Ohio", "Ohio", "state", "Ohio", examples=["Ohio Supreme Court"], dates=late),
        court("Supreme Court of Utah", "Utah", "state", "Utah"),
        court("Court without a string", "", "federal", "Utah"),
        court("Same", "One", "federal", "Utah"),
        court("Same", "Other", "federal", "Utah"),
        court("Attorney General of Ohio", "Ohio Att'y Gen.", "state", "Ohio", type="ag"),
    ]
    return {"data/reporters.json": json.dumps(reporters), "data/courts.json": json.dumps(courts)}


def api_stand_in():
    """Sixteen functions with six questions each, and six questions that are left out."""

    def question(number, name, text, turns=1):
        properties = {key: {"type": "string"} for key in ("to", "class", "who")}
        function = {"name": name, "parameters": {"type": "dict", "required": ["to"], "properties": properties}}
        roles = ("system", "user")[-turns:]
        return {
            "id": number,
            "question": [[{"role": role, "content": f"{text} ({role})"} for role in roles]],
            "function": [function, {**function, "name": f"{name}.other"}],
        }

    questions, answers = [], []

    def add(name, text, allowed, turns=1):
        questions.append(question(len(questions), name, text, turns))
        answers.append({"id": len(answers), "ground_truth": [{name: allowed}]})

    for f in range(16):
        for q in range(6):
            allowed = {"to": [f"city {q}", f"City-{q}!"], "class": ["", "first"]}
            add(f"f{f}", f"Function {f}, please, to city {q}", allowed, turns=1 + q % 2)
    add("f0", "Function 0, please, to city 0", {"to": ["city 0"], "class": ["", "first"]})  # the same question
    add("f0", "Function 1, please, to city 0", {"to": ["city 0"]})  # the same question with another answer
    add("f1", "Another question", {"to": ["city 0"], "class": ["", "second"]})  # other alternatives
    add("f2", "An unknown argument", {"to": ["city 9"], "from": ["city 8"]})
    add("f3", "A required argument is missing", {"who": ["me"]})
    add("f4", "No value", {"to": []})
    lines = ["".join(json.dumps(entry) + "\n" for entry in part).encode() for part in (questions, answers)]
    path = "data/{}BFCL_v4_live_{}.json"
    return {
        path.format(folder, part): content if part == "simple" else b""
        for folder, content in (("", lines[0]), ("possible_answer/", lines[1]))
        for part in ("simple", "multiple")
    }


def support_stand_in():
    """Tasks with each subset of six faults; some tickets repeat, and two of them contradict each other."""
    faults = {
        "airplane_mode_on": (("turn_airplane_mode_on", {}), ("toggle_airplane_mode", {})),
        "unseat_sim_card": (("unseat_sim_card", {}), ("reseat_sim_card", {})),
        "data_mode_off": (("turn_data_off", {}), ("toggle_data", {})),
        "data_usage_exceeded": (("set_data_usage", {"data_used_gb": 15.1}), ("refuel_data", {"gb_amount": 2.0})),
        "break_vpn": (("break_vpn", {}), ("disconnect_vpn", {})),
    }
    for permission in ("sms", "storage"):
        arguments = {"app_name": "messaging", "permission": permission}
        faults[f"no_{permission}"] = (("remove_app_permission", arguments), ("grant_app_permission", arguments))

    def task(names, persona="None", actions=None):
        pairs = [faults[name] for name in names]
        return {
            "id": f"[mms_issue]{'|'.join(names)}[PERSONA:{persona}]",
            "ticket": "The user is unable to send messages.",
            "initial_state": {"initialization_actions": [{"func_name": n, "arguments": a} for (n, a), _ in pairs]},
            "evaluation_criteria": {
                "actions": actions or [{"name": name, "arguments": arguments} for _, (name, arguments) in pairs]
            },
        }

    subsets = [names for count in (1, 2, 3) for names in combinations(faults, count)]
    tasks = [task(names) for names in subsets]
    tasks.append(task(subsets[0], "Easy"))
    tasks.append(task(subsets[1], "Hard", [{"name": "transfer_to_human_agents", "arguments": {}}]))
    folder = "tau2/data/domains/telecom/"
    return {
        folder + "tasks.json.gz": gzip.compress(json.dumps(tasks).encode()),
        folder + "main_policy_solo.txt": b"# Policy\n",
        folder + "tech_support_workflow_solo.txt": b"# Workflow\n",
    }


STAND_INS = {
    "medical_coding": medical_stand_in,
    "legal_citation": legal_stand_in,
    "api_calls": api_stand_in,
    "support": support_stand_in,
}
