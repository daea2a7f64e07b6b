"""Prompt distillation: states and gradients against plain loops, answers, training, checkpoints and refusals."""

import copy
import json
import warnings
from contextlib import contextmanager

import pytest
import torch
from architectures import NOT_SHARING, SHARING
from dpo_cases import LORA, shake
from tiny import make_model, make_tokenizer

from lightning_ft import PairDataModule, PromptBaseline, PromptDataModule, PromptDistillation
from lightning_ft._lightning import Trainer
from lightning_ft.data.encode import encode_prompt
from lightning_ft.errors import ConfigError, SavingsError
from lightning_ft.losses.distillation import token_divergence
from lightning_ft.models.generate import evaluating
from lightning_ft.modules.teacher import PromptedTeacher
from lightning_ft.rollout.protocol import Sampling

PROMPT = PromptBaseline("answer in one line please", [{"input": "where is the fox", "output": "the lazy dog"}])
REQUESTS = ["where is my parcel", "refund the lamp", "the kettle is equal to 7", "please", "is the invoice plus 3 8"]
QUICK = {"max_new_tokens": 6, "learning_rate": 1e-2, "dtype": "float32"}


def module_and_batch(model_folder, split="train", **options):
    module = PromptDistillation(model_folder, prompt=PROMPT, **{**QUICK, **options})
    data = PromptDataModule([{"prompt": text} for text in REQUESTS], batch_size=5, shuffle=False)
    data.share_tokenizer(module)
    data.setup("fit")
    return module, next(iter(data.train_dataloader()))


def greedy(model, ids, count):
    """Most probable tokens, one full pass per token."""
    answer = []
    for _ in range(count):
        answer.append(int(model(torch.tensor([[*ids, *answer]])).logits[0, -1].argmax()))
        if answer[-1] == 2:
            break
    return answer


def literal_loss(student, teacher, tokenizer, answers, divergence, beta, ce_coef):
    """Sum over the answers' tokens, one request at a time and from full logits."""
    total = torch.zeros(())
    for request, answer in zip(REQUESTS, answers, strict=True):
        turns = [{"role": "user", "content": request}]
        bare, prompted = encode_prompt(tokenizer, turns), encode_prompt(tokenizer, PROMPT.messages(turns))
        logits = student(torch.tensor([[*bare, *answer]])).logits[0, len(bare) - 1 : -1]
        with torch.no_grad():
            expected = teacher(torch.tensor([[*prompted, *answer]])).logits[0, len(prompted) - 1 : -1]
        total = total + token_divergence(logits, expected, divergence, beta=beta).sum()
        nll = -logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None]).sum()
        total = total + ce_coef * nll
    return total


@pytest.mark.parametrize("lora", [None, LORA, {**LORA, "target_modules": "all-linear", "modules_to_save": ["lm_head"]}])
@pytest.mark.parametrize(
    ("divergence", "ce_coef"),
    [("forward_kl", 0.0), ("reverse_kl", 0.0), ("jsd", 0.3)],
    ids=["forward", "reverse", "jsd"],
)
def test_gradients_are_those_of_a_literal_implementation(model_folder, tokenizer, lora, divergence, ce_coef):
    options = {"divergence": divergence, "beta": 0.3, "ce_coef": ce_coef}
    module, batch = module_and_batch(model_folder, lora=lora, **options)
    module.configure_model()
    shake(module)
    tokens, result = module.compare(batch)
    (result.loss / tokens.num_targets).backward()
    teacher = make_model().eval()
    answers = [
        greedy(teacher, encode_prompt(tokenizer, PROMPT.messages([{"role": "user", "content": text}])), 6)
        for text in REQUESTS
    ]
    got = {name: p.grad.clone() for name, p in module.model.named_parameters() if p.requires_grad}
    module.zero_grad()
    expected = literal_loss(module.model, teacher, tokenizer, answers, **options)
    (expected / tokens.num_targets).backward()
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in module.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [*SHARING, *NOT_SHARING])
def test_teacher_states_are_those_of_whole_prompts(name, tokenizer):
    torch.manual_seed(0)
    model = (SHARING.get(name) or NOT_SHARING[name][0])()
    model.resize_token_embeddings(400, mean_resizing=False)
    model.eval()
    teacher = PromptedTeacher(PROMPT, tokenizer, lambda: evaluating_model(model), batch_size=4)
    texts = [*REQUESTS, "fox " * 30]
    prompts = [encode_prompt(tokenizer, PROMPT.messages([{"role": "user", "content": text}])) for text in texts]
    answers = [tuple(range(20 + n, 24 + 2 * n)) for n in range(len(texts))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logits = teacher.logits()(teacher.states(prompts, answers))
    with torch.no_grad():
        expected = [
            model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
    torch.testing.assert_close(logits, torch.cat(expected), rtol=1e-4, atol=1e-4)
    assert (teacher._cache is not None) == (name in SHARING)


@contextmanager
def evaluating_model(model):
    with evaluating(model):
        yield model


def test_teacher_reads_the_shared_part_of_the_prompt_once(model_folder):
    module, batch = module_and_batch(model_folder, lora=LORA)
    module.compare(batch)
    shapes = []
    module.model.get_base_model().model.register_forward_pre_hook(
        lambda m, a, k: shapes.append(tuple(k["input_ids"].shape)), with_kwargs=True
    )
    module.compare(batch)
    prefix = len(module.teacher._prefix)
    assert prefix > 20
    teacher, student = shapes  # answers are not generated again
    assert teacher[0] == len(REQUESTS)
    assert teacher[1] < prefix
    assert student[0] * student[1] < sum(len(ids) + 6 for ids in batch.input_ids) + 64  # no prompt, hardly any padding


def test_answers_are_the_students_own_where_that_is_wanted(model_folder, tokenizer):
    module, batch = module_and_batch(model_folder, lora=LORA)
    module.configure_model()
    shake(module)
    module.model.eval()
    tokens, _ = module.compare(batch, own=True)
    expected = [
        greedy(module.model, encode_prompt(tokenizer, [{"role": "user", "content": text}]), 6) for text in REQUESTS
    ]
    found = [tokens.targets[tokens.groups == n].tolist() for n in range(len(REQUESTS))]
    assert found == expected
    other, _ = module.compare(batch)
    assert other.targets.tolist() != tokens.targets.tolist()


def test_sampled_answers_differ_from_step_to_step_and_repeat_with_the_seed(model_folder):
    def targets(seed):
        module, batch = module_and_batch(model_folder, lora=LORA)
        torch.manual_seed(seed)
        return [module.compare(batch, Sampling(1.0))[0].targets.tolist() for _ in range(2)]

    first = targets(0)
    assert first[0] != first[1]
    assert first == targets(0)


def test_a_row_may_end_the_system_prompt(model_folder, tokenizer):
    rows = [{"prompt": text, "prompt_context": f"the lamp {n}"} for n, text in enumerate(REQUESTS)]
    module = PromptDistillation(model_folder, prompt=PROMPT, lora=LORA, **QUICK)
    data = PromptDataModule(rows, batch_size=5, shuffle=False)
    data.share_tokenizer(module)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    prompts = module.teacher.prompts(batch)
    expected = [
        encode_prompt(tokenizer, PROMPT.messages([{"role": "user", "content": row["prompt"]}], row["prompt_context"]))
        for row in rows
    ]
    assert prompts == expected
    module.compare(batch)
    assert len(module.teacher._prefix) < 20  # the contexts come before the example


def test_training_makes_the_student_agree_with_the_prompt(model_folder, trainer_options):
    rows = [{"prompt": f"{text} {n}"} for n in range(4) for text in REQUESTS]
    module = PromptDistillation(model_folder, prompt=PROMPT, lora=True, temperature=0, **QUICK)
    data = PromptDataModule(rows, validation=rows[:5], batch_size=5)
    trainer = Trainer(max_epochs=30, **trainer_options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = trainer.validate(module, data, verbose=False)[0]
        trainer.fit(module, data)
        logged = set(trainer.callback_metrics)
        after = trainer.validate(module, data, verbose=False)[0]
    assert after["val/loss"] < 0.2 * before["val/loss"]
    assert after["val/token_agreement"] > 0.8 > before["val/token_agreement"]
    assert 0 <= before["val/answer_agreement"] <= after["val/answer_agreement"]
    assert {"train/loss", "train/token_agreement"} <= logged
    assert "val/perplexity" not in after


def test_accumulated_micro_batches_give_the_same_step_as_one_batch(model_folder, trainer_options):
    def weights(batch_size, accumulate):
        module = PromptDistillation(model_folder, prompt=PROMPT, lora=LORA, temperature=0, **QUICK)
        data = PromptDataModule([{"prompt": text} for text in REQUESTS[:4]], batch_size=batch_size, shuffle=False)
        trainer = Trainer(max_steps=2, accumulate_grad_batches=accumulate, **trainer_options)
        trainer.fit(module, data)
        return {name: p.detach().clone() for name, p in module.model.named_parameters() if p.requires_grad}

    whole, parts = weights(4, 1), weights(1, 4)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=0, atol=2e-6)


def test_another_model_can_be_the_teacher(model_folder, tokenizer, tmp_path, trainer_options):
    larger = make_model(layers=3, hidden=48, seed=5, vocab_size=408)  # rows beyond the vocabulary, as padding
    larger.save_pretrained(tmp_path / "larger")
    tokenizer.save_pretrained(tmp_path / "larger")
    module, batch = module_and_batch(model_folder, teacher=str(tmp_path / "larger"))
    tokens, result = module.compare(batch)
    assert not any(p.requires_grad for p in module._teacher_model[0].parameters())
    assert all("teacher" not in name for name in module.state_dict())
    larger.eval()
    answers = [tokens.targets[tokens.groups == n].tolist() for n in range(len(REQUESTS))]

    class First:
        def __call__(self, ids):
            out = larger(ids)
            out.logits = out.logits[..., :400]
            return out

    options = {"divergence": "forward_kl", "beta": 0.5, "ce_coef": 0.0}
    expected = literal_loss(make_model(), First(), tokenizer, answers, **options)
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_teacher_with_another_vocabulary_is_refused(model_folder, tmp_path):
    other = make_tokenizer()
    other.add_tokens(["<new>"])
    make_model(vocab_size=401).save_pretrained(tmp_path)
    other.save_pretrained(tmp_path)
    module = PromptDistillation(model_folder, prompt=PROMPT, teacher=str(tmp_path))
    with pytest.raises(ConfigError, match=r"has another vocabulary \(1 tokens differ, such as '<new>'\)"):
        module.configure_model()


def test_checkpoint_restores_module_and_run(model_folder, trainer_options, tmp_path):
    rows = [{"prompt": f"{text} {n}"} for n in range(2) for text in REQUESTS]

    def fit(steps, ckpt_path=None):
        options = {**QUICK, "lr_schedule": "constant", "warmup_ratio": 0.0}
        module = PromptDistillation(model_folder, prompt=PROMPT, lora=LORA, **options)
        trainer = Trainer(max_steps=steps, **trainer_options)
        torch.manual_seed(1)
        trainer.fit(module, PromptDataModule(rows, batch_size=2), ckpt_path=ckpt_path)
        return trainer, {n: p.detach().clone() for n, p in module.model.named_parameters() if p.requires_grad}

    _, whole = fit(8)
    trainer, _ = fit(3)
    trainer.save_checkpoint(tmp_path / "three.ckpt")
    loaded = PromptDistillation.load_from_checkpoint(tmp_path / "three.ckpt")
    assert loaded.prompt == PROMPT
    assert loaded.hparams["max_new_tokens"] == 6
    _, resumed = fit(8, tmp_path / "three.ckpt")
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())  # the same samples, too


def test_loaded_teachers_are_checked(model_folder, trainer_options):
    small = PromptDistillation(model_folder, prompt=PROMPT, teacher=make_model(vocab_size=300))
    with pytest.raises(ConfigError, match="embeddings for 300 tokens"):
        small.configure_model()
    model = make_model()
    same = PromptDistillation(model, tokenizer=make_tokenizer(), prompt=PROMPT, teacher=model)
    with pytest.raises(ConfigError, match="teacher= is the model that is trained"):
        same.configure_model()


def test_requests_that_do_not_fit_with_the_prompt_are_refused_before_training(model_folder, trainer_options):
    rows = [{"prompt": text} for text in REQUESTS * 4]
    template = f"{{{{ note }}}}{make_tokenizer().chat_template}"
    for long in (
        {"prompt": "fox " * 480},
        {"prompt": "fox", "prompt_context": "lamp " * 500},
        {"prompt": "fox", "chat_template_kwargs": {"note": "lamp " * 480}},
    ):
        module = PromptDistillation(model_folder, prompt=PROMPT, lora=LORA, **QUICK)
        trainer = Trainer(max_steps=9, **trainer_options)
        data = PromptDataModule([*rows, long], batch_size=1, shuffle=False, chat_template=template)
        with pytest.raises(ConfigError, match=r"With the prompt train, row 21, .* exceeds the context of 512 tokens"):
            trainer.fit(module, data)
        assert trainer.global_step == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5: expected an integer"),
        ({"answers": "both"}, "answers='both': expected 'teacher' or 'student'"),
        ({"divergence": "kl"}, "divergence='kl': expected one of"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: expected a whole number of at least 1"),
        ({"temperature": -1.0}, "temperature"),
        ({"prompt": {"system_prompt": "x"}}, "prompt= has no 'system_prompt': expected the keys system and few_shot"),
        ({"prompt": 3}, "prompt= is a int: expected PromptBaseline"),
        ({"maxnewtokens": 3}, "Did you mean 'max_new_tokens'"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        PromptDistillation("model", **{"prompt": PROMPT, **options})


def test_bad_prompts_and_batches_are_refused(model_folder, trainer_options, tmp_path):
    with pytest.raises(SavingsError, match="is empty"):
        PromptDistillation(model_folder, prompt={})
    (tmp_path / "prompt.json").write_text(json.dumps({"system": "be brief"}))
    assert PromptDistillation(model_folder, prompt=str(tmp_path / "prompt.json")).prompt.system == "be brief"
    module = PromptDistillation(model_folder, prompt=PROMPT)
    pairs = PairDataModule([{"input": "a", "output": "b"}] * 4, batch_size=2)
    with pytest.raises(ConfigError, match="answers requests and got a PairDataModule: pass a PromptDataModule"):
        Trainer(max_steps=1, **trainer_options).fit(module, pairs)
    long, batch = module_and_batch(model_folder, max_new_tokens=500)
    with pytest.raises(ConfigError, match="exceeds the context of 512 tokens"):
        long.compare(batch)


def test_a_prompt_that_makes_no_difference_is_refused_before_training(model_folder, tokenizer, trainer_options):
    without = copy.deepcopy(tokenizer)
    without.chat_template = (
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% for m in messages if m.role == 'assistant' %}{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    requests = PromptDataModule([{"prompt": text} for text in REQUESTS], batch_size=5)
    ignored = PromptDistillation(model_folder, tokenizer=without, prompt={"system": "be brief"}, **QUICK)
    with pytest.raises(ConfigError, match="whether it ignores the system prompt"):
        Trainer(max_steps=1, **trainer_options).fit(ignored, requests)
    turns = [{"role": "system", "content": "Be  brief. Be kind."}, {"role": "user", "content": REQUESTS[0]}]
    rows = PromptDataModule([{"prompt": turns}, {"prompt": turns[1:]}], batch_size=2)
    with pytest.raises(ConfigError, match="system turn of 1 requests has the prompt already"):
        Trainer(max_steps=1, **trainer_options).fit(
            PromptDistillation(model_folder, prompt={"system": "be brief"}, **QUICK), rows
        )


def test_prompt_rows_with_answers_are_requests_for_token_savings(model_folder):
    rows = [{"prompt": "a", "output": "b", "cluster": 3, "id": "x"}, {"prompt": "c", "output": "d", "id": "x"}]
    data = PromptDataModule(rows, test=rows)
    data.load_rows()
    requests = data.requests("test")
    assert [(r.id, r.reference, r.cluster) for r in requests] == [("x", "b", "3"), ("x#2", "d", None)]
    bare = PromptDataModule([{"prompt": "a"}])
    bare.load_rows()
    with pytest.raises(ConfigError, match="has no 'output' to compare answers with"):
        bare.requests("train")


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_agreement_is_measured_in_any_precision(model_folder, trainer_options, precision):
    module = PromptDistillation(model_folder, prompt=PROMPT, max_new_tokens=4)
    requests = [{"prompt": text} for text in REQUESTS]
    data = PromptDataModule(requests, validation=requests, batch_size=3, cache_dir=False)
    (metrics,) = Trainer(precision=precision, **trainer_options).validate(module, data, verbose=False)
    assert 0 <= metrics["val/answer_agreement"] <= 1
