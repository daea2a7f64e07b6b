"""`generate` of a sharded module: ranks with different prompts, in number and length, answer as one process does."""

import json

import pytest
from ranks import as_rank, free_port, run_ranks, trainer_options

from lightning_ft import FullFineTuning
from lightning_ft._lightning import Trainer
from lightning_ft.errors import ConfigError

PROMPTS = ["Hi", "A rather longer question than the others, of many words", "What?", "Where is it, and why?", "No."]
SHARES = [(PROMPTS, PROMPTS[:1]), ([], PROMPTS[1:3]), (PROMPTS[3:4], PROMPTS[:4])]
OPTIONS = {"max_new_tokens": 6, "batch_size": 2}


def one_rank(rank, model, folder, port):
    as_rank(rank, port)
    options = trainer_options("fsdp", folder)
    module = FullFineTuning(model, dtype="float32")
    trainer = Trainer(**options)
    answers = []

    def answer(*_):
        answers.extend(module.generate(share[rank], **OPTIONS) for share in SHARES)
        with pytest.raises(ConfigError, match=r"A prompt of \d" if rank else "A prompt of another rank"):
            module.generate(["word " * 4000] if rank else PROMPTS, **OPTIONS)
        return []

    module.predict_step = answer
    trainer.predict(module, [[0]])
    (folder / f"{rank}.json").write_text(json.dumps(answers), "utf-8")


def test_sharded_ranks_answer_different_prompts(model_folder, tmp_path):
    run_ranks(one_rank, (model_folder, tmp_path, free_port()))
    module = FullFineTuning(model_folder, dtype="float32")
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text("utf-8"))
        assert found == [module.generate(share[rank], **OPTIONS) for share in SHARES]
        assert len({answer for answers in found for answer in answers}) > 1
