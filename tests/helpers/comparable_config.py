"""A configuration of a small model that methods can be compared on, and a forecast be made of."""

import json

import yaml
from tiny import make_rows


def write_config(tmp_path, model_folder):
    """Write a configuration with its rows, texts and scorer; returns its path."""
    rows = [{**row, "output": "parcel"} for row in make_rows(40)]
    splits = {"train": rows[:24], "validation": rows[24:32], "test": rows[32:]}
    for name, part in splits.items():
        lines = "".join(json.dumps({**row, "id": f"{name}-{n}"}) + "\n" for n, row in enumerate(part))
        (tmp_path / f"{name}.jsonl").write_text(lines)
    (tmp_path / "general.jsonl").write_text(
        "".join(json.dumps({"text": f"the quick fox {n}"}) + "\n" for n in range(4))
    )
    (tmp_path / "shares_letters.py").write_text(
        "def score(output, reference):\n    return len(set(output) & set(reference)) / len(set(reference))\n\n\n"
        "def metrics(outputs, references):\n    return {'longest': float(max(map(len, outputs)))}\n"
    )
    savings = {
        "baseline": {"system": "Answer in one word.", "few_shot": []},
        "scorer": f"{tmp_path / 'shares_letters.py'}:score",
        "margin": 0.05,
        "max_new_tokens": 4,
        "timed_requests": 0,
        "prices": {"input": 1.0, "output": 2.0, "currency": "EUR", "date": "2026-01-31"},
    }
    content = {
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 2,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "callbacks": [
                {"class_path": "lightning_ft.TokenSavings", "init_args": savings},
                {"class_path": "lightning_ft.Retention", "init_args": {"texts": str(tmp_path / "general.jsonl")}},
            ],
        },
        "model": {
            "class_path": "lightning_ft.LoRAFineTuning",
            "init_args": {"model": model_folder, "dtype": "float32", "learning_rate": 5e-3, "lora": {"r": 2}},
        },
        "data": {
            "class_path": "lightning_ft.PairDataModule",
            "init_args": {**{name: str(tmp_path / f"{name}.jsonl") for name in splits}, "batch_size": 8},
        },
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(content))
    return str(file)
