"""Chooses the prompt that fine-tuning has to beat: `python examples/smollm2/choose_prompt.py DOMAIN`.

At least eight prompts are tried on validation rows: each system prompt without examples, and then the best one with
several numbers and draws of examples from the training rows. Answers are generated and graded as in the prompted arm of
the domain's configuration. The test rows are never read.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_ft import PairDataModule, PromptBaseline
from lightning_ft.evaluation.savings.arms import run_arm
from lightning_ft.evaluation.savings.plan import measurement_plan

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from choosing import search  # noqa: E402
from packages import DATA  # noqa: E402
from support import fill  # noqa: E402

SYSTEMS = {
    "legal_citation": (
        "Rewrite the citation of a court decision in Bluebook form: volume, abbreviation of the reporter, page, and in "
        "parentheses the abbreviation of the court and the year. Reply with the citation only.",
        "You correct legal citations. Keep volume, page and year. Abbreviate the reporter and the court as the "
        "Bluebook does, and write the court and the year in parentheses. Answer with the corrected citation alone.",
        "Citation as written -> citation in Bluebook form.",
    ),
    "medical_coding": (
        "Give the ICD-10-CM code of the medical term. Choose one of the candidates below. Reply with the code only.",
        "You are a medical coder. Which of these ICD-10-CM codes describes the user's term? Answer with the code.",
        "Medical term -> ICD-10-CM code, one of these candidates:",
    ),
    "api_calls": (
        "Call one of the functions below to answer the user. Reply with JSON only: "
        '{"name": ..., "arguments": {...}}. Leave out optional arguments that the user doesn\'t mention.',
        "You translate questions to function calls. Choose the function and its arguments from the list. Answer with "
        'one line of JSON, {"name": <function>, "arguments": {<argument>: <value>}}, and nothing else.',
        'Question -> {"name": ..., "arguments": {...}}, with one of these functions:',
    ),
    "support": (
        "{policy}\n\nRead the ticket and the readings of the device, and reply with the actions that solve the "
        "problem, in alphabetical order and separated by commas. The actions are: {actions}.",
        "You are a technician. Reply to each ticket with the actions that solve it, in alphabetical order, separated "
        "by commas, out of: {actions}.\n\n{policy}",
        "Ticket and readings of the device -> actions, separated by commas, out of: {actions}.",
    ),
}
"""System prompts to try, the same task in several wordings."""

EXAMPLES = {"legal_citation": (4, 8, 16), "medical_coding": (2, 4, 8), "api_calls": (1, 2, 3), "support": (1, 2, 4)}
"""Numbers of examples to try."""

DRAWS = 2


def filled(domain: str, prompt: str) -> str:
    """A system prompt with the policy and the actions of its domain, where it names them."""
    if domain != "support":
        return prompt
    folder = DATA / domain
    source = json.loads((folder / "source.json").read_text(encoding="utf-8"))
    policy = (folder / "policy.txt").read_text(encoding="utf-8")
    return fill(prompt, {"policy": policy, "actions": ", ".join(source["actions"])})


def main() -> None:
    """Try the prompts of a domain and write the best one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("domain", choices=sorted(SYSTEMS))
    parser.add_argument("--requests", type=int, default=100, help="Number of validation rows to answer.")
    parser.add_argument("--threads", type=int, default=2, help="Number of threads.")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = yaml.safe_load((HERE / f"{options.domain}.yaml").read_text(encoding="utf-8"))
    savings: dict[str, Any] = config["trainer"]["callbacks"][0]["init_args"]
    base = config["model"]["init_args"]["model"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    data = PairDataModule(**config["data"]["init_args"], tokenizer=tokenizer)
    data.setup("validate")
    requests = data.requests("validation")
    lines = Path(config["data"]["init_args"]["train"]).read_text(encoding="utf-8").splitlines()
    train = [json.loads(line) for line in lines]

    def quality(baseline: PromptBaseline) -> float:
        plan = measurement_plan(
            tokenizer,
            requests,
            PromptBaseline(filled(options.domain, baseline.system), baseline.few_shot),
            scorer=savings["scorer"],
            max_new_tokens=savings["max_new_tokens"],
            max_requests=options.requests,
            structured_outputs=savings.get("structured_outputs", False),
        )
        plan.check_context(model.config.max_position_embeddings)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            batch_size = savings.get("batch_size", 64)
            arm = run_arm("prompted", model, tokenizer, plan, timed_requests=0, batch_size=batch_size, progress=False)
        return arm.quality

    output = HERE / "baselines" / f"{options.domain}.json"
    search(SYSTEMS[options.domain], EXAMPLES[options.domain], train, quality, output, draws=DRAWS)
    if options.domain == "support":
        print("python examples/smollm2/data.py support  # puts the policy into data/support/baseline.json")


if __name__ == "__main__":
    main()
