"""Reward modeling: losses and metrics against plain Python, the head, and exports that load in plain transformers."""

import re
import runpy
import shutil

import pytest
import torch
from peft import PeftModel
from preference_runs import Records, make_labeled, make_pairs, train, trainable
from safetensors.torch import load_file
from tiny import CHATML, make_model, make_rows, make_tokenizer
from torch.nn.functional import logsigmoid
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from lightning_ft import DPO, GRPO, PairDataModule, PreferenceDataModule, RewardModeling
from lightning_ft._lightning import Trainer, _pl
from lightning_ft.data.batches import PreferenceBatch
from lightning_ft.errors import ConfigError, ModelError, RewardError
from lightning_ft.models.load import adapter_base
from lightning_ft.models.reward_head import reward_head
from lightning_ft.rewards.model import RewardModel

LORA = {"r": 4, "lora_dropout": 0.3}
PAIRS = make_pairs(20)
ENDING = CHATML.replace("{{- '\n' -}}{%- endfor -%}", "{%- endfor -%}")  # the end token is the last one
KINDS = [None, LORA]
IDS = ["full", "lora"]


class RecordingReward(Records, RewardModeling):
    pass


def batches(rows, batch_size=8, tokenizer=None):
    data = PreferenceDataModule(
        rows, tokenizer=tokenizer or make_tokenizer(), batch_size=batch_size, shuffle=False, cache_dir=False
    )
    data.setup("fit")
    return list(data.train_dataloader())


def conversations(rows):
    return [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]
        for row in rows
        for side in ("chosen", "rejected")
    ]


def plain_scores(model, tokenizer, rows):
    """Padded batches of the chat template's ids by the model's own forward pass, as in serving."""
    found = []
    turns = conversations(rows)
    for start in range(0, len(turns), 5):
        inputs = tokenizer.apply_chat_template(
            turns[start : start + 5], padding=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            found.append(model.eval()(**inputs).logits[:, 0])
    return torch.cat(found)


def shake(module, std=0.05):
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.model.parameters():
            if parameter.requires_grad:
                parameter += std * torch.randn(parameter.shape, generator=draw)


# ---------------------------------------------------------------- losses and metrics


@pytest.mark.parametrize("margin", [False, True])
@pytest.mark.parametrize("lora", KINDS, ids=IDS)
def test_reward_loss_and_metrics_match_plain_python(model_folder, lora, margin):
    rows = [{**row, "margin": n % 4 / 2} for n, row in enumerate(PAIRS)] if margin else PAIRS
    module = RewardModeling(model_folder, lora=lora, centering=0.1)
    module.configure_model()
    shake(module)
    batch = batches(rows)[0]
    result = module.compute_loss(batch)
    scores = []
    for turns in conversations(PAIRS[:8]):  # one by one, by transformers
        ids = make_tokenizer().apply_chat_template(turns, return_tensors="pt", return_dict=False)
        scores.append(module.model(ids).logits[0, 0])
    chosen, rejected = torch.stack(scores).view(-1, 2).unbind(1)
    asked = torch.tensor([n % 4 / 2 for n in range(8)]) if margin else 0.0
    losses = -logsigmoid(chosen - rejected - asked) + 0.1 * (chosen + rejected) ** 2
    torch.testing.assert_close(result.losses, losses, rtol=0, atol=1e-5)
    want = {
        "accuracy": (chosen > rejected).float(),
        "margin": chosen - rejected,
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
    }
    assert result.metrics.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(result.metrics[name], value.detach(), rtol=0, atol=1e-5)
    assert 0 < want["accuracy"].mean() < 1
    result.losses.mean().backward()
    got = {name: p.grad.clone() for name, p in module.model.named_parameters() if p.grad is not None}
    module.zero_grad()
    losses.mean().backward()
    assert got.keys() == {name for name, p in module.model.named_parameters() if p.grad is not None}
    for name, parameter in module.model.named_parameters():
        if name in got:
            torch.testing.assert_close(got[name], parameter.grad, rtol=0, atol=1e-5)


def test_score_conversations_matches_training_rewards(model_folder):
    module = RewardModeling(model_folder, lora=LORA)
    module.configure_model()
    shake(module)
    with torch.no_grad():
        metrics = module.compute_loss(batches(PAIRS)[0]).metrics
    scores = module.score_conversations(conversations(PAIRS[:8]), batch_size=3)
    torch.testing.assert_close(scores[0::2], metrics["rewards/chosen"], rtol=0, atol=1e-5)
    torch.testing.assert_close(scores[1::2], metrics["rewards/rejected"], rtol=0, atol=1e-5)
    assert module.predict_step(conversations(PAIRS[:2]), 0) == pytest.approx(scores[:4].tolist(), abs=1e-5)
    assert all(part.training for part in module.model.modules())


def test_reward_model_predicts_conversations_of_a_loader(model_folder, trainer_options):
    module = RewardModeling(model_folder)
    loader = DataLoader(conversations(PAIRS[:2]), batch_size=3, collate_fn=list)
    predicted = Trainer(**trainer_options).predict(module, loader)
    scores = module.score_conversations(conversations(PAIRS[:2]))
    assert [reward for batch in predicted for reward in batch] == pytest.approx(scores.tolist(), abs=1e-5)


def test_reward_metrics_are_means_over_steps_and_splits(model_folder, trainer_options):
    module = RecordingReward(model_folder, learning_rate=1e-3)
    data = {"batch_size": 2, "validation": make_pairs(25)[20:]}
    trainer = train(module, PAIRS, trainer_options, data=data, accumulate_grad_batches=4)
    assert len(module.step_losses) == 3
    fresh = RewardModeling(model_folder)
    fresh.configure_model()
    first = fresh.compute_loss(batches(PAIRS)[0])
    assert module.step_losses[0] == pytest.approx(float(first.losses.mean()), abs=1e-6)
    for name, values in first.metrics.items():
        assert module.step_metrics[0][f"train/{name}"] == pytest.approx(float(values.mean()), abs=1e-5)
    logged = trainer.callback_metrics
    with torch.no_grad():
        result = module.compute_loss(batches(make_pairs(25)[20:])[0])
    assert {name for name in logged if name.startswith("val/")} == {f"val/{n}" for n in [*result.metrics, "loss"]}
    assert logged["val/loss"] == pytest.approx(float(result.losses.mean()), abs=1e-5)
    for name, values in result.metrics.items():
        assert logged[f"val/{name}"] == pytest.approx(float(values.mean()), abs=1e-5)


@pytest.mark.parametrize("lora", [None, {"r": 4, "lora_alpha": 4}], ids=IDS)
def test_reward_gradients_do_not_depend_on_micro_batches(model_folder, trainer_options, lora):
    def gradients(batch_size, accumulate=1, **options):
        module = RecordingReward(model_folder, lora=lora, learning_rate=1e-9, centering=0.01, **options)
        module.configure_model()
        shake(module, 0.02)
        train(module, PAIRS, trainer_options, data={"batch_size": batch_size}, accumulate_grad_batches=accumulate)
        return module.steps

    plain = RewardModeling(model_folder, lora=lora, centering=0.01)
    plain.configure_model()
    shake(plain, 0.02)
    expected = []
    for batch in batches(PAIRS):
        plain.zero_grad()
        plain.compute_loss(batch).losses.mean().backward()
        expected.append({name: p.grad.clone() for name, p in plain.named_parameters() if p.grad is not None})
    for got in (gradients(8), gradients(1, 8), gradients(2, 4), gradients(4, 2, share_prompts=False)):
        assert len(got) == len(expected) == 3
        for want, have in zip(expected, got, strict=True):
            assert want.keys() == have.keys()
            assert max(float((want[key] - have[key]).abs().max()) for key in want) <= 2e-6


def test_reward_loss_of_empty_batch_is_zero(model_folder):
    module = RewardModeling(model_folder)
    module.configure_model()
    none = PreferenceBatch([], [], torch.zeros(0, dtype=torch.bool), None, torch.zeros(0, dtype=torch.int64))
    result = module.compute_loss(none)
    assert result.losses.shape == (0,)
    result.losses.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in module.model.parameters())


# ---------------------------------------------------------------- the head


@pytest.mark.parametrize("lora", KINDS, ids=IDS)
def test_reward_modeling_learns_preferences_and_trains_the_head(model_folder, trainer_options, lora):
    module = RewardModeling(model_folder, lora=lora, learning_rate=1e-3 if lora is None else 1e-2)
    module.configure_model()
    before = trainable(module)
    heads = [name for name in before if "score" in name]
    assert len(heads) == 1
    frozen = {name: p.detach().clone() for name, p in module.named_parameters() if not p.requires_grad}
    trainer = train(module, PAIRS, trainer_options, max_epochs=8, data={"validation": PAIRS})
    assert trainer.callback_metrics["val/accuracy"] == 1.0
    assert trainer.callback_metrics["val/margin"] > 1.0
    after = trainable(module)
    assert not torch.equal(after[heads[0]], before[heads[0]])
    assert bool(frozen) == (lora is not None)
    for name, value in module.named_parameters():
        if name in frozen:
            assert torch.equal(value, frozen[name])
    used = module.model.base_model.model.score if lora else module.model.score
    assert reward_head(module.model) is used
    assert not any("score" in name and "lora" in name for name in after)  # trained in full, not by an adapter
    scores = module.score_conversations(conversations(PAIRS))
    assert (scores[0::2] > scores[1::2]).all()


def test_reward_head_is_initialized_from_the_seed(model_folder):
    def head(**options):
        module = RewardModeling(model_folder, **options)
        module.configure_model()
        return reward_head(module.model).weight.detach()

    torch.manual_seed(11)
    first = head()
    before = torch.rand(1)
    torch.manual_seed(12)
    assert torch.equal(head(), first)
    torch.manual_seed(11)
    head(seed=5)
    assert torch.equal(torch.rand(1), before)  # the global random state is unchanged
    assert not torch.equal(head(seed=5), first)


def test_reward_modeling_continues_a_reward_model(tmp_path, trainer_options):
    config = make_model().config
    config.num_labels = 1
    torch.manual_seed(2)
    given = LlamaForSequenceClassification(config)
    head = given.score.weight.detach().clone()
    module = RewardModeling(given, tokenizer=make_tokenizer())
    module.configure_model()
    assert module.model is given
    assert torch.equal(reward_head(module.model).weight, head)
    with pytest.raises(ModelError, match="no head named"):
        RewardModeling(make_model(), tokenizer=make_tokenizer()).configure_model()


# ---------------------------------------------------------------- the pad token


def make_folder(folder, tokenizer):
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("template", [CHATML, ENDING], ids=["newline last", "end token last"])
@pytest.mark.parametrize("pad", ["<|im_end|>", None], ids=["eos", "none"])
@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=IDS)
def test_reward_model_accepts_eos_as_pad_token(tmp_path, trainer_options, lora, pad, template):
    folder = make_folder(tmp_path / "base", make_tokenizer(template, pad=pad))
    module = RewardModeling(folder, lora=lora, learning_rate=1e-2)
    with pytest.warns(UserWarning, match="padded with its EOS token"):
        module.configure_model()
    train(module, PAIRS, trainer_options)
    own = module.score_conversations(conversations(PAIRS[:6]))
    module.export(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    model = runpy.run_path(str(card_code(tmp_path / "out")))["model"]
    torch.testing.assert_close(plain_scores(model, tokenizer, PAIRS[:6]), own, rtol=0, atol=1e-5)


def test_reward_modeling_requires_a_pad_token(tmp_path):
    tokenizer = make_tokenizer(pad="<|im_end|>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    folder = make_folder(tmp_path, tokenizer)
    with pytest.raises(ModelError, match="no other special token to pad with"):
        RewardModeling(folder).configure_model()


# ---------------------------------------------------------------- exports


def card_code(folder):
    """The code of a model card, as a file; run in the folder that holds the export."""
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace(f'"{folder.name}"', repr(str(folder)))
    if (folder / "adapter_config.json").is_file():  # the card leaves the path of a local base to the reader
        base = adapter_base(str(folder))
        code = re.sub(r'base = "[^"]*"', f"base = {base!r}", code, count=1)
    path = folder.parent / f"{folder.name}_card.py"
    path.write_text(code)
    return path


@pytest.mark.parametrize("kind", ["full", "adapter", "merged"])
def test_reward_export_scores_equally_in_transformers(model_folder, trainer_options, tmp_path, kind):
    module = RewardModeling(model_folder, lora=None if kind == "full" else LORA, learning_rate=1e-2)
    train(module, PAIRS, trainer_options)
    own = module.score_conversations(conversations(PAIRS))
    folder = module.export(tmp_path / "out", merge=kind == "merged")
    if kind == "adapter":
        assert (folder / "adapter_model.safetensors").is_file()
        assert any("score" in name for name in load_file(folder / "adapter_model.safetensors"))
        base = AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=1)
        model = PeftModel.from_pretrained(base, str(folder))
    else:
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        assert model.config.num_labels == 1
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.testing.assert_close(plain_scores(model, tokenizer, PAIRS), own, rtol=0, atol=1e-5)
    reward_model = RewardModel.from_pretrained(folder)
    torch.testing.assert_close(reward_model.score_conversations(conversations(PAIRS)), own, rtol=0, atol=1e-5)
    assert own.std() > 0.1
    shown = runpy.run_path(str(card_code(folder)))["model"]
    torch.testing.assert_close(plain_scores(shown, tokenizer, PAIRS), own, rtol=0, atol=1e-5)


def test_exported_adapter_rewards_a_policy_of_the_same_folder(model_folder, tmp_path, monkeypatch):
    (tmp_path / "work" / "project").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work" / "project")
    shutil.copytree(model_folder, "models/base")
    reward = RewardModeling("models/base", lora=LORA)
    reward.export("reward/")
    ((_, scorer),) = GRPO("models/base", rewards=["reward/"]).rewards.models()
    rows = conversations(PAIRS[:2])
    torch.testing.assert_close(scorer.score_conversations(rows), reward.score_conversations(rows), rtol=0, atol=1e-5)
    shutil.rmtree("models")
    with pytest.raises(RewardError, match=r"'reward' can't be loaded: .*folder called 'base'.*adapter_config\.json"):
        GRPO("models/base", rewards=["reward/"])


def test_reward_adapter_continues_with_its_head(model_folder, trainer_options, tmp_path):
    first = RewardModeling(model_folder, lora={"r": 4}, learning_rate=1e-2)
    train(first, PAIRS, trainer_options)
    folder = first.export(tmp_path / "out")
    second = RewardModeling(str(folder), learning_rate=1e-2)
    second.configure_model()
    own = first.score_conversations(conversations(PAIRS))
    torch.testing.assert_close(second.score_conversations(conversations(PAIRS)), own, rtol=0, atol=1e-5)
    assert any("score" in name for name in trainable(second))
    train(second, PAIRS, trainer_options)
    again = second.score_conversations(conversations(PAIRS))
    assert (again[0::2] - again[1::2]).mean() > (own[0::2] - own[1::2]).mean()


def test_reward_modeling_refuses_an_adapter_without_head(model_folder, trainer_options, tmp_path):
    policy = DPO(model_folder, lora={"r": 4})
    train(policy, PAIRS, trainer_options, max_steps=1)
    folder = policy.export(tmp_path / "out")
    with pytest.raises(ConfigError, match="has no reward head: export it with merge=True"):
        RewardModeling(str(folder))
    merged = policy.export(tmp_path / "merged", merge=True)
    RewardModeling(str(merged)).configure_model()


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("options", [{}, {"lora": LORA, "disable_dropout": False}], ids=IDS)
@pytest.mark.parametrize("stop_at", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_reward_run_resumes_exactly(model_folder, trainer_options, tmp_path, options, stop_at):
    common = {"max_epochs": 2, "accumulate_grad_batches": 2, "data": {"shuffle": True}}
    torch.manual_seed(1)
    whole = RecordingReward(model_folder, learning_rate=1e-2, **options)
    saver = _pl.callbacks.ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    train(whole, PAIRS, trainer_options, callbacks=[saver], enable_checkpointing=True, **common)
    torch.manual_seed(2)
    resumed = RecordingReward(model_folder, learning_rate=1e-2, **options)
    trainer = train(resumed, PAIRS, trainer_options, ckpt_path=tmp_path / f"step={stop_at}.ckpt", **common)
    assert trainer.global_step == 6
    assert resumed.step_losses == whole.step_losses[stop_at:]
    for name, value in trainable(whole).items():
        assert torch.equal(trainable(resumed)[name], value), name


@pytest.mark.parametrize("lora", KINDS, ids=IDS)
def test_reward_checkpoint_contains_trainable_weights_and_head(model_folder, trainer_options, tmp_path, lora):
    module = RewardModeling(model_folder, lora=lora, learning_rate=1e-2)
    trainer = train(module, PAIRS, trainer_options, max_steps=2)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert checkpoint["state_dict"].keys() == trainable(module).keys()
    assert any("score" in name for name in checkpoint["state_dict"])
    if lora:
        assert all("lora_" in name or "score" in name for name in checkpoint["state_dict"])
    again = RewardModeling.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    want = module.score_conversations(conversations(PAIRS[:3]))
    torch.testing.assert_close(again.score_conversations(conversations(PAIRS[:3])), want, rtol=0, atol=1e-6)


# ---------------------------------------------------------------- precision and refusals


@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=IDS)
@pytest.mark.parametrize("precision", ["bf16-mixed", pytest.param("bf16-true", marks=pytest.mark.slow)])
def test_reward_in_lower_precision_reaches_similar_loss(model_folder, trainer_options, lora, precision):
    losses = []
    for chosen in ("32-true", precision):
        module = RewardModeling(model_folder, lora=lora, learning_rate=1e-3 if lora is None else 1e-2)
        trainer = train(module, PAIRS, trainer_options, max_epochs=4, precision=chosen, data={"validation": PAIRS})
        losses.append(float(trainer.callback_metrics["val/loss"]))
    assert losses[0] < 0.4
    assert losses[1] == pytest.approx(losses[0], abs=0.1)


def test_reward_model_trains_adapter_over_bfloat16_base(model_folder, trainer_options, tmp_path):
    module = RecordingReward(model_folder, lora={"r": 4}, learning_rate=1e-2, dtype="bfloat16")
    train(module, PAIRS, trainer_options, max_epochs=6)
    # the head too, since bf16 can't represent steps of 1e-4
    assert {p.dtype for p in module.model.parameters() if p.requires_grad} == {torch.float32}
    assert module.model.get_base_model().dtype == torch.bfloat16
    assert module.step_losses[-1] < module.step_losses[0] - 0.2
    own = module.score_conversations(conversations(PAIRS[:5]))
    assert own.dtype == torch.float32
    folder = module.export(tmp_path / "out")
    base = AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=1, dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(base, str(folder))
    scores = plain_scores(model, AutoTokenizer.from_pretrained(folder), PAIRS[:5])
    torch.testing.assert_close(scores.float(), own, rtol=0.05, atol=0.05)


def test_reward_gradient_checkpointing_gives_same_weights(model_folder, trainer_options):
    trained = {}
    for on in (False, True):
        module = RewardModeling(model_folder, lora={"r": 4}, gradient_checkpointing=on, learning_rate=1e-2)
        train(module, PAIRS, trainer_options, max_steps=3)
        trained[on] = trainable(module)
    for name, value in trained[False].items():
        torch.testing.assert_close(trained[True][name], value, rtol=0, atol=1e-6)


def test_reward_modeling_rejects_invalid_settings(model_folder, trainer_options):
    for centering in (-1.0, float("nan")):
        with pytest.raises(ConfigError, match=f"centering={centering}: expected a finite number of at least 0"):
            RewardModeling("some/model", centering=centering)
    module = RewardModeling(model_folder)
    with pytest.raises(ConfigError, match="learns from pairs"):
        train(module, make_labeled(8), trainer_options, max_steps=1)
    with pytest.raises(ConfigError, match="RewardModeling trains on preferences and got a PairDataModule"):
        Trainer(**trainer_options, max_steps=1).fit(module, PairDataModule(make_rows(8), cache_dir=False))
    with pytest.raises(ConfigError, match="doesn't generate"):
        module.generate(["where is my parcel"])
