"""The anchor: its gradient against a literal implementation, its weight, texts, checkpoints and refusals."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from dpo_cases import shake
from tiny import TEXT, make_model, make_rows
from torch.nn.functional import kl_div
from transformers import AutoTokenizer

from lightning_ft import ComputeMeter, FullFineTuning, LoRAFineTuning, PairDataModule, Retention
from lightning_ft._lightning import Callback, Trainer
from lightning_ft.errors import ConfigError
from lightning_ft.models.head import base_of
from lightning_ft.modules.anchor import AnchorOptions

TEXTS = [f"{line} {n}" for n, line in enumerate(TEXT * 2)]
ANCHOR = {"texts": TEXTS, "coef": 0.7, "texts_per_batch": len(TEXTS)}


def make(model_folder, kind, **options):
    options = {"dtype": "float32", "learning_rate": 1e-2, **options}
    return (
        LoRAFineTuning(model_folder, lora={"r": 4}, **options)
        if kind == "lora"
        else FullFineTuning(model_folder, **options)
    )


def data(batch_size=4):
    return PairDataModule(make_rows(16), batch_size=batch_size, packing=False, shuffle=False, cache_dir=False)


class Gradients(Callback):
    """Keeps the gradients of the first backward pass."""

    def on_after_backward(self, trainer, module):
        if not hasattr(self, "gradients"):
            self.gradients = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def fit(trainer_options, module, *callbacks, batch_size=4, **options):
    trainer = Trainer(callbacks=list(callbacks), **{"max_steps": 3, **trainer_options, **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, data(batch_size))
    return trainer


class Shake(Callback):
    """Moves the weights away from the original ones before the first step, so that the penalty isn't zero."""

    def on_train_start(self, trainer, module):
        torch.manual_seed(7)
        shake(module)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_gradient_is_that_of_a_literal_implementation(model_folder, trainer_options, tokenizer, kind):
    plain, anchored = Gradients(), Gradients()
    fit(trainer_options, make(model_folder, kind), Shake(), plain, max_steps=1)
    module = make(model_folder, kind, anchor=ANCHOR)
    trainer = fit(trainer_options, module, Shake(), anchored, max_steps=1)

    fresh = make(model_folder, kind)
    fresh.configure_model()
    torch.manual_seed(7)
    shake(fresh)
    original, total, count = make_model().eval(), 0.0, 0
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            expected = original(ids).logits[0, :-1].log_softmax(-1)
        found = fresh.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        total = total + kl_div(found, expected, log_target=True, reduction="sum")
        count += len(expected)
    kl = total / count
    loader = data()
    loader.share_tokenizer(fresh)
    loader.setup("fit")
    targets = next(iter(loader.train_dataloader())).num_targets
    (0.7 * targets * kl).backward()
    for name, parameter in fresh.named_parameters():
        if parameter.requires_grad:
            added = anchored.gradients[name] - plain.gradients[name]
            torch.testing.assert_close(added / targets, parameter.grad / targets, rtol=1e-4, atol=1e-6)
    assert float(trainer.callback_metrics["train/anchor_kl"]) == pytest.approx(kl.item(), rel=1e-4)
    assert float(trainer.callback_metrics["train/anchor_coef"]) == pytest.approx(0.7)


def test_anchor_keeps_the_model_closer_to_the_original(model_folder, trainer_options):
    def kl(**options):
        retention = Retention(TEXTS, output_dir=False, resamples=9)
        fit(trainer_options, make(model_folder, "lora", **options), retention, max_steps=12)
        return retention.result.kl_general.value

    free, held = kl(), kl(anchor={**ANCHOR, "coef": 20.0})
    assert held < 0.5 * free


def test_loss_is_logged_without_the_penalty(model_folder, trainer_options):
    first = fit(trainer_options, make(model_folder, "lora"), max_steps=1).callback_metrics["train/loss"]
    second = fit(trainer_options, make(model_folder, "lora", anchor=ANCHOR), max_steps=1).callback_metrics["train/loss"]
    assert float(first) == float(second)


@pytest.mark.parametrize("target", [1e-6, 1e3])
def test_weight_follows_the_target_and_survives_a_checkpoint(model_folder, trainer_options, tmp_path, target):
    anchor = {**ANCHOR, "coef": 1.0, "target": target, "horizon": 4}
    module = make(model_folder, "lora", anchor=anchor)
    trainer = fit(trainer_options, module, Shake(), max_steps=3)
    coef = module.anchor.coef
    assert coef == pytest.approx(1.05**3 if target < 1 else 0.95**3)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    loaded = LoRAFineTuning.load_from_checkpoint(tmp_path / "run.ckpt")
    assert loaded.anchor.coef == coef
    assert loaded.anchor.options == AnchorOptions(**anchor)
    resumed = Trainer(**trainer_options, max_steps=4)
    resumed.fit(loaded, data(), ckpt_path=tmp_path / "run.ckpt")
    assert float(resumed.callback_metrics["train/anchor_coef"]) == pytest.approx(coef)
    again = fit(trainer_options, module, max_steps=1)
    assert float(again.callback_metrics["train/anchor_coef"]) == 1.0, "a new fit starts at coef"


def test_weight_stays_within_a_hundredth_and_a_hundred_times_its_start(model_folder, trainer_options):
    module = make(model_folder, "lora", anchor={**ANCHOR, "coef": 0.5, "target": 1e3, "horizon": 1})
    trainer = fit(trainer_options, module, max_steps=24)
    assert 0.5 * 0.8**24 < 0.005 == module.anchor.coef
    assert float(trainer.callback_metrics["train/anchor_coef"]) == pytest.approx(0.005)


def test_texts_are_drawn_by_step_and_repeat_in_another_run(model_folder, trainer_options):
    def drawn():
        kls = []

        class Keep(Callback):
            def on_train_batch_end(self, trainer, *_):
                kls.append(float(trainer.callback_metrics["train/anchor_kl"]))

        fit(trainer_options, make(model_folder, "lora", anchor={**ANCHOR, "texts_per_batch": 2}), Shake(), Keep())
        return kls

    first = drawn()
    assert len(set(first)) == len(first) == 3
    assert first == drawn()


def test_original_model_can_write_the_texts(model_folder, trainer_options):
    def samples():
        module = make(model_folder, "lora", anchor={"texts": "samples", "max_texts": 6, "max_tokens": 9})
        state = torch.random.get_rng_state()
        fit(trainer_options, module, max_steps=1)
        return [example.input_ids.tolist() for example in module.anchor._examples], state

    first, _ = samples()
    assert [len(ids) for ids in first] == [9] * 6
    assert {ids[0] for ids in first} == {2}  # the end-of-text token, since there is no BOS
    assert len({tuple(ids) for ids in first}) == 6
    assert first == samples()[0]


@pytest.mark.parametrize(
    ("anchor", "message"),
    [
        ({"texts": TEXTS, "coef": 0}, "anchor: coef=0, expected a number above 0"),
        ({"texts": TEXTS, "target": -1.0}, r"anchor: target=-1.0"),
        ({"texts": TEXTS, "texts_per_batch": 2.5}, "texts_per_batch=2.5, expected a whole number"),
        ({"texts": TEXTS, "coef": "1"}, "coef='1', expected a number above 0"),
        ({"texts": TEXTS, "max_tokens": 1}, "anchor: max_tokens=1, expected at least 2"),
        ({"text": TEXTS}, "anchor has no 'text': expected texts, coef"),
        ({"coef": 1.0}, "anchor has no texts"),
        ("general.jsonl", "anchor is a str: expected a dict"),
    ],
)
def test_bad_options_are_refused(anchor, message):
    with pytest.raises(ConfigError, match=message):
        LoRAFineTuning("model", anchor=anchor)


def test_anchor_is_refused_with_an_activation_cache():
    with pytest.raises(ConfigError, match="activation_cache keeps activations of training rows"):
        LoRAFineTuning("model", anchor=ANCHOR, activation_cache=True, top_layers=1)


@pytest.mark.parametrize("texts", [TEXTS, "samples"])
def test_texts_beyond_the_context_are_refused(model_folder, trainer_options, texts):
    with pytest.raises(ConfigError, match="anchor: max_tokens=900 exceeds the model's context of 512"):
        fit(trainer_options, make(model_folder, "lora", anchor={"texts": texts, "max_tokens": 900}))


class Passes(Callback):
    """Counts the passes through the layers after the first step, in which the model is probed, too."""

    def on_train_start(self, trainer, module):
        self.passes, self.kls = 0, []
        for model in {module.model, *module.anchor._reference._copy}:
            base_of(model).model.layers[0].register_forward_hook(lambda *_: self.count(trainer))

    def count(self, trainer):
        self.passes += trainer.global_step > 0

    def on_train_batch_end(self, trainer, module, *_):
        self.kept = dict(module.anchor._states)
        self.kls.append(float(trainer.callback_metrics["train/anchor_kl"]))


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("kept", [len(TEXTS), 3, 0])
def test_original_model_reads_each_text_once(model_folder, trainer_options, monkeypatch, kind, kept):
    def fitted(count):
        found, module = Passes(), make(model_folder, kind, anchor={**ANCHOR, "texts_per_batch": 3})
        sizes = [4 * 32 * len(tokenizer(text)["input_ids"]) for text in TEXTS]
        monkeypatch.setattr("lightning_ft.modules.anchor.KEPT_BYTES", sum(sizes[:count]))
        fit(trainer_options, module, Shake(), found, max_epochs=3, max_steps=12)
        return found, module

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    each_time, module = fitted(0)
    assert each_time.kept == {}
    assert each_time.passes == (2 + 3) * 11
    if kept:
        found, module = fitted(kept)
        assert sorted(found.kept) == list(range(kept))
        beyond = sum(n >= kept for n in drawn(module, steps=range(1, 12)))
        assert found.passes == 2 * 11 + kept + beyond
        assert found.kls == pytest.approx(each_time.kls, rel=1e-6)
    assert module.frozen_flops > 0
    assert module.anchor._states == {}, "they are freed after the fit"


def drawn(module, steps):
    """Numbers of the texts of the first micro-batch of each step."""
    anchor = module.anchor
    module._trainer = SimpleNamespace(global_step=0)
    found = []
    for step in steps:
        module._trainer.global_step = step
        found += anchor.draw(module, step % 4)
    return found


def test_unmoved_model_has_no_divergence_to_amplify(model_folder, trainer_options):
    """Texts of other lengths are padded; the original model reads them as the trained one does."""
    found = Gradients()
    trainer = fit(trainer_options, make(model_folder, "full", anchor=ANCHOR), found, max_steps=1)
    assert float(trainer.callback_metrics["train/anchor_kl"]) == 0.0
    plain = Gradients()
    fit(trainer_options, make(model_folder, "full"), plain, max_steps=1)
    assert all(torch.equal(found.gradients[name], plain.gradients[name]) for name in plain.gradients)


def test_operations_of_the_original_model_are_added_once(model_folder, trainer_options):
    def flops(epochs):
        meter = ComputeMeter(output_dir=False, every_n_steps=1)
        texts = [f"{TEXT[0]} {n}" for n in range(8)]  # of one length, so that all steps cost the same
        module = make(model_folder, "lora", anchor={"texts": texts, "texts_per_batch": 1})
        rows = PairDataModule(make_rows(1), batch_size=1, packing=False, cache_dir=False)
        Trainer(callbacks=[meter], **{**trainer_options, "max_steps": -1, "max_epochs": epochs}).fit(module, rows)
        assert module.anchor._read > 1
        return meter.result.flops, module.frozen_flops

    (few, early), (many, late) = flops(20), flops(60)
    assert 0 < early < late
    assert (many - late) / 60 == (few - early) / 20


def test_growth_is_the_expected_number_of_texts(model_folder, trainer_options, monkeypatch):
    module = make(model_folder, "lora", anchor={**ANCHOR, "texts_per_batch": 2})
    assert module.anchor.growth(9) == 1.0  # nothing was read yet
    fit(trainer_options, module, max_steps=3)
    read = module.anchor._read
    assert [module.anchor.growth(n) * read for n in (1, 2, 10**6)] == pytest.approx([2, 2 + 2 * 6 / 8, len(TEXTS)])

    monkeypatch.setattr("lightning_ft.modules.anchor.KEPT_BYTES", 0)
    module = make(model_folder, "lora", anchor={**ANCHOR, "texts_per_batch": 2})
    fit(trainer_options, module, max_steps=3)
    assert module.anchor._read == 2 * 2  # in each step after the first
    assert module.anchor.growth(10) * 4 == pytest.approx(2 * 10)
