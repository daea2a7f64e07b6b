"""All callbacks that a loop can use, together in one loop with Fabric, on one process and on two."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from ranks import as_rank, free_port, run_ranks
from tiny import make_model, make_rows, make_tokenizer

from lightning_ft import (
    AnswerQuality,
    ComputeMeter,
    ExportModel,
    PairDataModule,
    PromptBaseline,
    Retention,
    RetentionFrontier,
    SampleCompletions,
    TokenMeanAccumulation,
    TokenSavings,
    TrainableCheckpoint,
)
from lightning_ft._lightning import NAMESPACE
from lightning_ft.errors import ConfigError, RetentionError
from lightning_ft.evaluation.savings.files import load_savings
from lightning_ft.types import Message, Request

STEPS = 4
FILES = ["compute/compute.json", "frontier/retention_frontier.json", "retention/retention.json"]


def graded(output, reference):
    """A score that depends on the answer, and is rarely the same for two of them."""
    return (len(output) * 7 % 11) / 10


def make_fabric(callbacks=(), ranks=1):
    fabric_type = pytest.importorskip("lightning.fabric" if NAMESPACE == "lightning" else "lightning_fabric").Fabric
    return fabric_type(accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto", callbacks=callbacks)


def every_callback(folder):
    """Callbacks in the order that the guide gives: the one that chooses the weights first, the export last."""
    tokenizer, rows = make_tokenizer(), make_rows(8)
    texts = [row["input"] for row in rows]
    requests = [
        Request(f"r{k}", (Message(role="user", content=row["input"]),), row["output"]) for k, row in enumerate(rows[:5])
    ]
    common = {"tokenizer": tokenizer, "progress": False}
    answers = {"requests": requests, "scorer": graded, "max_new_tokens": 4, **common}
    return [
        RetentionFrontier(texts, scales=(0.5, 1.0), resamples=99, output_dir=folder / "frontier", **answers),
        ComputeMeter(every_n_steps=2, output_dir=folder / "compute"),
        TokenSavings(
            PromptBaseline("Answer."), timed_requests=1, resamples=99, output_dir=folder / "token_savings", **answers
        ),
        Retention(texts, output_dir=folder / "retention", **common),
        AnswerQuality(**answers),
        ExportModel(str(folder / "export"), tokenizer=tokenizer),
    ]


def run_loop(folder, ranks):
    """Train an adapter with all callbacks; returns them with the model."""
    torch.manual_seed(0)
    callbacks = every_callback(folder)
    fabric = make_fabric(callbacks, ranks)
    fabric.launch()
    data = PairDataModule(
        make_rows(2 * STEPS * ranks), tokenizer=make_tokenizer(), batch_size=2, cache_dir=False, batch_format="hf"
    )
    data.setup("fit")
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    trained = get_peft_model(make_model(), config)
    parameters = [p for p in trained.parameters() if p.requires_grad]
    model, optimizer = fabric.setup(trained, torch.optim.AdamW(parameters, lr=1e-2))
    fabric.call("on_train_start", fabric, model)
    batches = list(data.train_dataloader())[fabric.global_rank :: fabric.world_size]
    for index, batch in enumerate(batches):
        fabric.call("on_train_batch_start", fabric, model, batch, index)
        fabric.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
        fabric.call("on_train_batch_end", fabric, model, None, batch, index)
    fabric.call("on_validation_epoch_end", fabric, model)
    fabric.call("on_train_end", fabric, model)
    return callbacks, trained


def summary(callbacks, model):
    """What the ranks must agree on."""
    frontier, meter, savings, retention, quality, export = callbacks
    assert all(callback.failures == () for callback in (frontier, meter, savings, retention, export))
    assert export.error is None
    return {
        "scale": frontier.result.chosen,
        "steps": meter.result.steps,
        "savings": savings.result.metrics(),
        "kl": retention.result.kl_general.value,
        "quality": quality.result.quality,
        "outputs": savings.result.arms["tuned"].outputs,
        "weights": {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad},
    }


def assert_results(found, folder):
    """Every callback has a result that is about the trained weights, and its files."""
    assert found["steps"] == STEPS
    assert found["kl"] > 0
    assert found["savings"]["n"] == 5
    assert 0 < found["savings"]["total"] < 1
    assert 0 < found["quality"] < 1
    for name in FILES:
        assert json.loads((folder / name).read_text())
    assert load_savings(folder / "token_savings/token_savings.json").arms["tuned"].outputs == found["outputs"]
    exported = PeftModel.from_pretrained(make_model(), folder / "export/last")
    ids = torch.tensor([[3, 5, 8, 13]])
    trained = get_peft_model(make_model(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained.load_state_dict(found["weights"], strict=False)
    with torch.no_grad():
        assert torch.allclose(exported.eval()(ids).logits, trained.eval()(ids).logits, atol=1e-5)
    assert "Token savings" in (folder / "export/last/README.md").read_text()


def test_fabric_loop_runs_all_callbacks_together(tmp_path):
    assert_results(summary(*run_loop(tmp_path, 1)), tmp_path)


def one_rank(rank, folder, port):
    as_rank(rank, port)
    torch.save(summary(*run_loop(folder, 2)), folder / f"rank{rank}.pt")


def test_fabric_loop_runs_all_callbacks_together_on_two_ranks(tmp_path):
    run_ranks(one_rank, (tmp_path, free_port()))
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in (0, 1))
    for name, value in first.pop("weights").items():
        assert torch.equal(value, second["weights"][name])
    weights = second.pop("weights")
    assert first == second
    assert_results({**first, "weights": weights}, tmp_path)


def test_callbacks_that_a_loop_cannot_use_name_the_way_out(tmp_path):
    fabric, model = make_fabric(), make_model()
    with pytest.raises(ConfigError, match="write_samples"):
        SampleCompletions().on_train_start(fabric, model)
    for options in ({}, {"output": str(tmp_path), "push_to_hub": "organization/name"}):
        with pytest.raises(ConfigError, match="upload_export uploads the folder"):
            ExportModel(tokenizer=make_tokenizer(), **options).on_train_start(fabric, model)
    with pytest.raises(ConfigError, match="pass tokenizer="):
        ExportModel(str(tmp_path)).on_train_start(fabric, model)
    with pytest.raises(ConfigError, match=r"losses would not be weighted.*token_mean\.TokenMean"):
        TokenMeanAccumulation().on_train_start(fabric, model)
    with pytest.raises(ConfigError, match="use save_loop and load_loop"):
        TrainableCheckpoint().on_train_start(fabric, model)
    with pytest.raises(RetentionError, match=r"every_n_steps=2 needs a Trainer.* call measure\(fabric, model\)"):
        Retention(["where is my parcel"], tokenizer=make_tokenizer(), every_n_steps=2).on_train_start(fabric, model)


def test_fabric_loop_measures_every_second_of_its_epochs(tmp_path):
    _, _, savings, retention, quality, _ = callbacks = every_callback(tmp_path)
    savings.every_n_epochs = retention.every_n_epochs = 2
    fabric, model = make_fabric(callbacks[1:5]), make_model()
    fabric.call("on_train_start", fabric, model)
    measured = []
    for _ in range(4):
        savings.result = retention.result = None
        fabric.call("on_train_epoch_end", fabric, model)
        measured.append((savings.result is not None, retention.result is not None))
    assert measured == [(False, False), (True, True), (False, False), (True, True)]
    assert quality.result is None  # that is measured after a validation
