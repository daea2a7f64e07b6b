"""The retention frontier: interpolated weights, the choice within a budget, exports, resumption and refusals."""

import copy
import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from plain_module import Plain, loader
from tiny import TEXT, make_model, make_rows
from transformers import AutoModelForCausalLM

from lightning_ft import ExportModel, FullFineTuning, LoRAFineTuning, PairDataModule, RetentionFrontier, TokenSavings
from lightning_ft._lightning import Callback, Trainer
from lightning_ft.data.prompt_baseline import PromptBaseline
from lightning_ft.errors import ModelError, RetentionError
from lightning_ft.evaluation.retention.choices import ChoiceQuestion
from lightning_ft.evaluation.retention.frontier import FrontierResult
from lightning_ft.models.update_scale import UpdateScale, copy_weights
from lightning_ft.types import Message, Request

TEXTS = [f"{line} {n}" for n, line in enumerate(TEXT)]
QUICK = {"scorer": "normalized", "max_new_tokens": 6, "resamples": 99, "progress": False}


def data():
    rows = [{**row, "output": "parcel"} for row in make_rows(40)]
    return PairDataModule(train=rows[:24], validation=rows[24:32], test=rows[32:], batch_size=8, cache_dir=False)


class SaveAt(Callback):
    """Saves a checkpoint after a number of steps."""

    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def module(model_folder, kind, **options):
    options = {"dtype": "float32", "learning_rate": 3e-2, **options}
    return LoRAFineTuning(model_folder, **options) if kind == "lora" else FullFineTuning(model_folder, **options)


def fit(trainer_options, tuned, *callbacks, **options):
    trainer = Trainer(callbacks=list(callbacks), **{"max_epochs": 3, **trainer_options, **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(tuned, data())
    return trainer


# ---------------------------------------------------------------- scaling


@pytest.mark.parametrize(
    "lora",
    [None, {}, {"modules_to_save": ["lm_head"]}, {"use_rslora": True}],
    ids=["full", "lora", "saved", "rslora"],
)
@pytest.mark.parametrize("frozen_later", [lambda name: False, lambda name: "layers.0." in name or "head" in name])
def test_scaled_update_interpolates_the_weights(lora, frozen_later):
    base, model = make_model(), make_model()
    if lora is not None:
        targets = ["q_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", **lora))
    original = copy_weights(model)
    assert (original == {}) == (lora is not None)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))

    def merged():
        copied = copy.deepcopy(model)
        copied = copied.merge_and_unload() if isinstance(copied, PeftModel) else copied
        return {name: p.detach() for name, p in copied.named_parameters()}

    trained, start = merged(), dict(base.named_parameters())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and not frozen_later(name))
    update = UpdateScale(model, original)
    for scale in (0.3, 0.0, 1.0):
        update.set(scale)
        for name, weight in merged().items():
            expected = start[name] + scale * (trained[name] - start[name])
            torch.testing.assert_close(weight, expected, rtol=0, atol=0 if scale == 1 else 2e-6)


@pytest.mark.parametrize("lora", [False, True])
def test_scaled_update_is_used_where_autocast_keeps_copies(lora):
    """As in Fabric, whose autocast keeps half-precision copies of the weights while all scales are measured."""
    model = make_model().eval()
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")) if lora else model
    original, ids = copy_weights(model), torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * parameter.requires_grad)
    update, scales = UpdateScale(model, original), (1.0, 0.5, 0.0)
    found = {}
    for keeps in (True, False):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=keeps):
            found[keeps] = [(update.set(scale), model(ids).logits)[1] for scale in scales]
    assert all(map(torch.equal, found[True], found[False]))
    assert not torch.equal(found[True][0], found[True][2])


def test_updates_that_cannot_be_scaled_are_refused():
    dora = get_peft_model(make_model(), LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]))
    with pytest.raises(ModelError, match=r"isn't linear, .*lora_magnitude_vector.*without use_dora"):
        UpdateScale(dora)
    with pytest.raises(ModelError, match=r"The original of .* trained weights isn't known"):
        UpdateScale(make_model())


# ---------------------------------------------------------------- the callback


def test_weights_unfrozen_during_training_are_scaled_from_their_original(tokenizer):
    requests = [Request("a", (Message(role="user", content="where is the lamp"),), "here")]
    options = {**QUICK, "scorer": lambda output, reference: 0.5, "tokenizer": tokenizer, "output_dir": False}
    frontier = RetentionFrontier(TEXTS[:1], scales=(0.5, 1.0), requests=requests, **options)
    model, original = make_model(), make_model()
    model.model.layers.requires_grad_(False)
    frontier.on_train_start(None, model)
    model.model.layers.requires_grad_(True)
    frontier.on_train_batch_start(None, model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    frontier.on_train_end(None, model)
    assert frontier.result.chosen == 0.5  # as good as 1, and less is forgotten
    for weight, start in zip(model.parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(weight, start + 0.05)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_chosen_scale_is_exported_and_measured(model_folder, trainer_options, tmp_path, kind):
    savings = TokenSavings(
        PromptBaseline("say what it is"), max_new_tokens=6, output_dir=False, resamples=99, timed_requests=0
    )
    frontier = RetentionFrontier(TEXTS, budget={"kl": 0.5}, scales=(1.0, 0.1, 0.3), **QUICK)
    export = ExportModel(str(tmp_path / "export"))
    tuned = module(model_folder, kind)
    trainer = fit(trainer_options, tuned, savings, export, frontier)

    result = frontier.result
    assert [point.scale for point in result.points] == [0.1, 0.3, 1.0]
    kl = [point.retention.kl_general.value for point in result.points]
    assert 0 < kl[0] < kl[1] < kl[2]
    assert kl[2] > 0.5  # otherwise the budget would not matter
    within = [point for point in result.points if point.retention.kl_general.value <= 0.5]
    best = max(within, key=lambda point: (point.quality.value, -point.retention.kl_general.value))
    assert result.chosen == best.scale < 1
    assert not frontier.gate_failed
    assert trainer.callback_metrics["retention_frontier/scale"] == pytest.approx(best.scale)
    assert savings.result is not None
    folder = tmp_path / "export" / "last"
    if kind == "lora":
        exported = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), folder)
    else:
        exported = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(10, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(exported.eval()(ids).logits, tuned.model.eval()(ids).logits, atol=1e-5, rtol=1e-5)
    written = json.loads((tmp_path / "retention_frontier" / "retention_frontier.json").read_text())
    assert FrontierResult.from_dict(written).to_dict() == written
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Quality against forgetting by scale" in page
    assert f"Scale {best.scale:g} of the update has the highest quality" in page


def test_without_a_scale_within_the_budget_the_trained_weights_stay(model_folder, trainer_options):
    frontier = RetentionFrontier(TEXTS, budget={"kl": 0.0}, scales=(0.5, 1.0), output_dir=False, **QUICK)
    tuned = module(model_folder, "lora")
    plain = module(model_folder, "lora")
    fit(trainer_options, plain)
    fit(trainer_options, tuned, frontier)
    assert frontier.result.chosen is None
    assert frontier.gate_failed
    assert "No scale from 0.5 to 1 is within the budget (kl at most 0)" in frontier.result.headline
    for ours, theirs in zip(tuned.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_budget_may_limit_questions_and_perplexity(model_folder, trainer_options):
    questions = [ChoiceQuestion(f"where is {n}? the", ("lamp", "kettle"), n % 2) for n in range(6)]
    budget = {"choices_lost": 0.4, "ppl_ratio": 1e6}
    frontier = RetentionFrontier(TEXTS, budget=budget, choices=questions, scales=(0.5, 1.0), output_dir=False, **QUICK)
    fit(trainer_options, module(model_folder, "lora"), frontier)
    for point in frontier.result.points:
        assert point.fits(budget) == (point.retention.choices["all"].lost.value <= 0.4)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_resumed_run_has_the_same_frontier(model_folder, trainer_options, tmp_path, kind):
    def run(steps, ckpt_path=None):
        frontier = RetentionFrontier(TEXTS, scales=(0.5, 1.0), output_dir=False, **QUICK)
        options = {"lr_schedule": "constant", "warmup_ratio": 0.0}
        trainer = Trainer(callbacks=[frontier], **{**trainer_options, "max_steps": steps})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(module(model_folder, kind, **options), data(), ckpt_path=ckpt_path)
        return trainer, frontier.result

    _, whole = run(5)
    path = tmp_path / "two.ckpt"
    fresh = RetentionFrontier(TEXTS, scales=(0.5, 1.0), output_dir=False, **QUICK)
    stopped = Trainer(callbacks=[fresh, SaveAt(path, 2)], **{**trainer_options, "max_steps": 5})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stopped.fit(module(model_folder, kind, lr_schedule="constant", warmup_ratio=0.0), data())
    _, resumed = run(5, path)
    assert [p.quality for p in resumed.points] == [p.quality for p in whole.points]
    for ours, theirs in zip(resumed.points, whole.points, strict=True):
        assert ours.retention.kl_general.value == pytest.approx(theirs.retention.kl_general.value, abs=1e-6)


def test_frontier_works_with_a_module_and_rows_of_ones_own(trainer_options, tokenizer):
    requests = [Request(str(n), (Message(role="user", content=f"where {n}"),), "here") for n in range(4)]
    model = get_peft_model(make_model(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    frontier = RetentionFrontier(TEXTS, requests=requests, scales=(0.5, 1.0), output_dir=False, **QUICK)
    trainer = Trainer(callbacks=[frontier], **{"max_epochs": 2, **trainer_options})
    trainer.fit(Plain(model, tokenizer), loader(tokenizer))
    assert frontier.result.requests == 4
    assert frontier.result.chosen in (0.5, 1.0)


def test_adapters_that_did_not_start_at_zero_are_refused(model_folder, trainer_options):
    pissa = LoRAFineTuning(model_folder, dtype="float32", lora={"r": 2, "init_lora_weights": "pissa"})
    with pytest.raises(RetentionError, match="The adapter didn't start at zero"):
        fit(trainer_options, pissa, RetentionFrontier(TEXTS, output_dir=False, **QUICK))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_second_fit_keeps_the_original_model(model_folder, trainer_options, kind):
    frontier = RetentionFrontier(TEXTS, budget={"kl": 1e6}, scales=(0.5, 1.0), output_dir=False, **QUICK)
    tuned = module(model_folder, kind)
    trainer = fit(trainer_options, tuned, frontier, max_epochs=1)
    first = frontier.result.points[-1].retention.kl_general.value
    trainer.fit_loop.max_epochs = 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(tuned, data())
    points = frontier.result.points
    assert points[-1].retention.kl_general.value > first
    assert points[0].retention.kl_general.value < points[1].retention.kl_general.value


def test_frontier_cannot_be_added_to_a_run_that_was_trained(model_folder, trainer_options, tmp_path):
    trainer = fit(trainer_options, module(model_folder, "lora"), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    late = Trainer(
        callbacks=[RetentionFrontier(TEXTS, output_dir=False, **QUICK)], **{"max_epochs": 3, **trainer_options}
    )
    with pytest.raises(RetentionError, match="put it among the callbacks from the start"):
        late.fit(module(model_folder, "lora"), data(), ckpt_path=tmp_path / "run.ckpt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.1}, "budget=0.1: expected a dict such as"),
        ({"budget": {"kl": -1}}, "budget: kl is -1, expected a number of at least 0"),
        ({"budget": {"nats": 1.0}}, "budget has no 'nats': expected kl, ppl_ratio, choices_lost"),
        ({"budget": {"kl": "much"}}, "budget: kl is 'much', expected a number"),
        ({"budget": {"choices_lost": 0.1}}, "needs multiple-choice questions"),
        ({"scales": (0.0, 1.0)}, "expected different numbers above 0, the largest of them 1"),
        ({"scales": (0.5,)}, "expected different numbers"),
        ({"scales": ()}, "expected different numbers"),
        ({"scales": 1.0}, "scales=1.0: expected different numbers above 0, the largest of them 1, as a list"),
        ({"scales": ["1"]}, r"scales=\['1'\]: expected different numbers"),
        ({"batch_size": 0}, "batch_size=0: expected at least 1"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(RetentionError, match=message):
        RetentionFrontier(TEXTS, **options)
