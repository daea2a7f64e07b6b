"""Rollouts, rewards and precision: non-finite values, lost steps and metrics."""

import math
import re

import pytest
import torch
from policies import LORA, Policy, by_tokens, make
from predrawn_rollouts import draw_prompts, run
from tiny import make_model, make_rows, make_tokenizer
from tiny_scorer import make_scorer
from transformers import GenerationConfig

from lightning_ft import (
    DPO,
    GRPO,
    PPO,
    FullFineTuning,
    LoRAFineTuning,
    PairDataModule,
    PreferenceDataModule,
    PromptDataModule,
)
from lightning_ft._lightning import Callback, Trainer, _pl
from lightning_ft.errors import ConfigError, NonFiniteError, RewardError
from lightning_ft.modules.trainer_checks import lost_steps
from lightning_ft.rewards.functions import RewardFunctions
from lightning_ft.rewards.model import RewardModel, check_context_length
from lightning_ft.rollout.local import LocalEngine
from lightning_ft.rollout.protocol import Sampling

ROWS = [{"prompt": row["input"], "answer": row["output"]} for row in make_rows(6)]


def prompts(rows=ROWS, **options):
    return PromptDataModule(rows, **{"batch_size": 2, "shuffle": False, "cache_dir": False, **options})


def policy(kind=GRPO, **options):
    settings = {"rewards": by_tokens, "num_completions": 4, "max_new_tokens": 4, "learning_rate": 1e-3}
    return kind(make_model(), tokenizer=make_tokenizer(), **{**settings, **options})


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------- rewards


@pytest.mark.parametrize(
    ("options", "train", "missing"),
    [
        ({"rewards": lambda completions, solution: [0.0]}, ROWS, "training rows .columns: 'answer'"),
        ({"rewards": lambda completions, answer: [0.0]}, ROWS, "validation rows .columns: none"),
        ({"validation_rewards": lambda completions, answer: [0.0]}, ROWS, "validation rows .columns: none"),
    ],
)
def test_missing_column_of_a_reward_is_refused_before_weights_are_loaded(options, train, missing, trainer_options):
    module = policy(**options)
    with pytest.raises(RewardError, match=f"needs '(answer|solution)'.* of the {missing}"):
        Trainer(**trainer_options, max_steps=1).fit(module, prompts(train, validation=[{"prompt": "new"}]))
    assert module.model is None


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *((GRPO, name) for name in ("reward", "loss", "entropy", "no_signal_fraction", "learning_rate")),
        *((PPO, name) for name in ("value_loss", "explained_variance", "kl_coef")),
    ],
)
def test_reward_may_not_log_under_the_name_of_a_metric_of_the_step(kind, name, trainer_options):
    def logs(completions, log_metric):
        log_metric(name, 9.0)
        return [float(len(text)) for text in completions]

    pattern = rf"log_metric\('{name}', ...\) of a reward would replace the metric '{name}'"
    with pytest.raises(RewardError, match=pattern):
        Trainer(**trainer_options, max_steps=1).fit(policy(kind, rewards=logs), prompts())


def test_checkpoints_within_an_epoch_bring_no_advice_for_another_kind_of_module(trainer_options, tmp_path, recwarn):
    saving = _pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    options = {**trainer_options, "enable_checkpointing": True, "callbacks": [saving]}
    Trainer(**options, max_steps=2).fit(policy(num_completions=2), prompts())
    assert len(list(tmp_path.glob("*.ckpt"))) == 2
    assert not [warning for warning in recwarn if "manual optimization" in str(warning.message)]


def test_reward_logs_in_validation_and_may_not_replace_its_metrics(trainer_options):
    def longer(completions, log_metric):
        for text in completions:
            log_metric("letters", len(text))
        return [1.0] * len(completions)

    module = policy(validation_rewards=longer)
    data = prompts(validation=ROWS)
    (metrics,) = Trainer(**trainer_options).validate(module, data, verbose=False)
    assert metrics["val/letters"] > 0

    def taken(completions, log_metric):
        log_metric("completion_length", 1)
        return [1.0] * len(completions)

    with pytest.raises(RewardError, match="would replace the metric 'completion_length'"):
        Trainer(**trainer_options).validate(policy(validation_rewards=taken), data, verbose=False)


def test_column_of_validation_rows_is_not_needed_without_validation(trainer_options):
    module = policy(rewards=lambda completions, answer: [0.0] * len(completions))
    trainer = Trainer(**{**trainer_options, "limit_val_batches": 0}, max_steps=1)
    trainer.fit(module, prompts(validation=[{"prompt": "new"}]))
    assert trainer.global_step == 1


@pytest.mark.parametrize(("kind", "wrong"), [(GRPO, math.nan), (GRPO, 1e300), (PPO, torch.tensor(-math.inf))])
def test_nonfinite_reward_stops_or_skips_the_step(kind, wrong, trainer_options):
    def sometimes(completion_ids, trainer_state):
        first = trainer_state.global_step == 0
        return [wrong if first and n == 1 else float(len(ids)) for n, ids in enumerate(completion_ids)]

    settings = {"rewards": sometimes, "epochs_per_rollout": 1, "weight_decay": 0.5}
    module = policy(kind, **settings)
    before = weights(module.configure_model() or module)
    with pytest.raises(RewardError, match=r"'sometimes' returned .* for completion 1 .*finite"):
        run(module, [draw_prompts(2)], trainer_options)
    assert same(before, weights(module))

    module = policy(kind, on_nonfinite="skip", **settings)
    with pytest.warns(UserWarning, match="step 1 is not finite .* 1 rewards are not finite"):
        trainer = run(module, [draw_prompts(2)], trainer_options)
    assert same({n: p for n, p in before.items() if n in weights(module)}, weights(module))
    assert (trainer.global_step, module.skipped_steps) == (1, 1)
    trainer = run(module, [draw_prompts(2)], trainer_options, max_epochs=1)
    assert trainer.callback_metrics["train/skipped_steps"] == 2


def test_equal_rewards_change_no_weight(trainer_options):
    module = policy(rewards=lambda completions: [0.7] * len(completions), num_completions=8, weight_decay=0.0)
    before = weights(module.configure_model() or module)
    trainer = run(module, [draw_prompts(3, seed=n) for n in range(2)], trainer_options)
    assert same(before, weights(module))
    assert trainer.callback_metrics["train/no_signal_fraction"] == 1.0


def test_share_of_groups_without_signal_is_logged(trainer_options):
    def first_of_two(prompts, completion_ids):
        return [float(sum(ids)) * (prompt == prompts[0]) for prompt, ids in zip(prompts, completion_ids, strict=True)]

    trainer = run(policy(rewards=first_of_two), [draw_prompts(4)], trainer_options)
    assert trainer.callback_metrics["train/no_signal_fraction"] == 0.75


def test_reward_functions_get_copies_of_their_arguments():
    seen = []

    def changes(prompts, completions, completion_ids, tags):
        for prompt, completion, ids, tag in zip(prompts, completions, completion_ids, tags, strict=True):
            prompt += completion
            prompt[0]["content"] = completion[0]["content"] = "changed"
            ids.clear()
            tag["of"].append(1)
        return [0.0] * len(prompts)

    def reads(prompts, completions, completion_ids, tags):
        seen.append([prompts, completions, completion_ids, tags])
        return [0.0] * len(prompts)

    class Scores:
        def score_conversations(self, conversations):
            for turns in conversations:
                turns[0]["content"] = "changed"
                turns.clear()
            return torch.zeros(2)

    prompt, tag = [{"role": "user", "content": "hi"}], {"of": []}
    RewardFunctions([changes, Scores(), reads]).compute([prompt] * 2, ["a", "b"], [[1], [2]], {"tags": [tag] * 2})
    ((prompts, completions, ids, tags),) = seen
    assert prompts == [[{"role": "user", "content": "hi"}]] * 2
    assert [turns[0]["content"] for turns in completions] == ["a", "b"]
    assert (ids, tags) == ([[1], [2]], [{"of": []}] * 2)
    assert (prompt, tag) == ([{"role": "user", "content": "hi"}], {"of": []})
    assert prompts[0] is not prompts[1]


def test_validation_rewards_are_logged_under_distinct_names(trainer_options):
    ones, sevens = (lambda completions, value=value: [value] * len(completions) for value in (1.0, -7.0))
    module = policy(rewards=ones, validation_rewards=[sevens, ones])
    trainer = run(module, [draw_prompts(2)], trainer_options, validation=[draw_prompts(2, seed=3)])
    names = ("rewards/reward", "rewards/reward_2", "rewards/reward_3")
    assert [float(trainer.callback_metrics[f"val/{name}"]) for name in names] == [1.0, -7.0, 1.0]
    assert trainer.callback_metrics["train/rewards/reward"] == 1.0
    named = {"function": ones, "name": "truth"}
    with pytest.raises(ConfigError, match="Two rewards are named 'truth'"):
        policy(rewards=named, validation_rewards=[named])


@pytest.mark.parametrize("where", ["train", "validation"])
def test_reward_model_with_short_context_is_refused_before_training(where, trainer_options):
    scorer = RewardModel(make_scorer(), make_tokenizer())
    scorer.model.config.max_position_embeddings = 60
    long = [{"prompt": "please " * 50}]
    splits = {"train": ROWS + long} if where == "train" else {"train": ROWS, "validation": long}
    module = policy(rewards=scorer)
    before = weights(module.configure_model() or module)
    row = 7 if where == "train" else 1
    with pytest.raises(
        ConfigError,
        match=rf"{where} \({where}, row {row}\): .* exceeds the context of the reward model 'RewardModel', 60",
    ):
        Trainer(**trainer_options, max_epochs=1).fit(module, prompts(splits.pop("train"), **splits))
    assert same(before, weights(module))
    data = prompts(tokenizer=make_tokenizer())
    data.setup("fit")
    check_context_length([("fits", scorer)], data.splits, 4)
    with pytest.raises(ConfigError, match="max_new_tokens=50"):
        check_context_length([("doesn't", scorer)], data.splits, 50)


# ---------------------------------------------------------------- rollouts


class Overflows(Callback):
    """Make the model's logits non-finite during generation."""

    def setup(self, trainer, module, stage):
        module.configure_model()
        head = module.model.get_output_embeddings()
        head.register_forward_hook(lambda head, given, out: out if head.training else out * math.nan)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_nonfinite_logits_in_sampling_stop_or_skip_the_step(temperature, trainer_options):
    given = {**trainer_options, "callbacks": [Overflows()]}
    with pytest.raises(NonFiniteError, match="At optimizer step 1 8 completions were sampled from logits"):
        run(policy(temperature=temperature), [draw_prompts(2)], given)
    module = policy(temperature=temperature, on_nonfinite="skip")
    before = weights(module.configure_model() or module)
    with pytest.warns(UserWarning, match="step 1 is not finite .*8 completions were sampled from logits"):
        trainer = run(module, [draw_prompts(2), draw_prompts(2)], given)
    assert same(before, weights(module))
    assert (trainer.global_step, module.skipped_steps) == (2, 2)


@pytest.mark.parametrize("layers_fail", [False, True])
def test_engine_reports_nonfinite_logits(layers_fail, monkeypatch):
    model = make_model().eval()
    if layers_fail:  # then transformers' loop generates
        monkeypatch.setattr("lightning_ft.rollout.local.cache_support", lambda *_: (0, "has no cache"))
    engine = LocalEngine(model, end_token_ids=[2])
    assert all(
        map(math.isfinite, engine.generate([[5, 6]], max_new_tokens=3, sampling=Sampling()).completions[0].logprobs)
    )
    model.lm_head.weight.data[7, 0] = math.nan
    sampled = engine.generate([[5, 6], [5, 7, 8]], max_new_tokens=3, sampling=Sampling(top_p=0.9), num_completions=2)
    assert not any(math.isfinite(logprob) for c in sampled.completions for logprob in c.logprobs)
    with pytest.raises(NonFiniteError, match="logits weren't finite"):
        engine.generate([[5, 6]], max_new_tokens=3)


def test_nonfinite_logits_are_distinguished_from_an_inexact_cache():
    model = make_model().eval()
    model.lm_head.weight.data[7, 0] = math.nan
    engine = LocalEngine(model, end_token_ids=[2])
    with pytest.warns(UserWarning, match="its logits are not finite, so cached and uncached passes can't be compared"):
        engine.generate([[5, 6], [5, 7]], max_new_tokens=2, sampling=Sampling(), num_completions=2)


@pytest.mark.parametrize(("batch_size", "steps"), [(1, 4), (2, 3), (2, 8)])
def test_more_steps_than_prompts_distribute_completions(batch_size, steps, trainer_options):
    module = make(Policy, num_completions=4, max_new_tokens=4, steps_per_rollout=steps)
    trainer = Trainer(**trainer_options, max_epochs=1)
    trainer.fit(module, prompts(ROWS[:batch_size], batch_size=batch_size))
    assert trainer.global_step == steps == len(module.results)
    sizes = [len(batch.weights) for batch, _ in module.results]
    assert sum(sizes) == 4 * batch_size
    assert min(sizes) == 4 * batch_size // steps


def test_short_last_batch_takes_fewer_steps(trainer_options):
    module = make(Policy, num_completions=4, max_new_tokens=4, steps_per_rollout=8)
    trainer = Trainer(**trainer_options, max_epochs=1)
    trainer.fit(module, prompts(ROWS[:3], batch_size=2))
    assert trainer.global_step == 8 + 4
    assert all(len(batch.weights) == 1 for batch, _ in module.results)


def test_more_steps_per_rollout_than_completions_are_refused(trainer_options):
    with pytest.raises(ConfigError, match="steps_per_rollout=9 exceeds the 8 completions"):
        Trainer(**trainer_options, max_epochs=1).fit(policy(steps_per_rollout=9), prompts())


@pytest.mark.parametrize("generation", [None, {"repetition_penalty": 1.0}])
def test_predict_warns_of_differing_generation_settings(generation, recwarn):
    module = policy(generation=generation)
    module.configure_model()
    module.model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0, repetition_penalty=1.5)
    answers = module.generate(["hello"], max_new_tokens=3)
    caught = [str(w.message) for w in recwarn if "repetition_penalty=1.5" in str(w.message)]
    assert len(caught) == (generation is None)
    assert not caught or "generation={'repetition_penalty': 1.0}" in caught[0]
    ids = module._encode_prompt("hello")
    greedy = module.engine.generate([ids], max_new_tokens=3).completions[0].tokens
    assert generation is None or answers == [make_tokenizer().decode(greedy, skip_special_tokens=True)]


def test_predict_samples_with_rollout_settings(monkeypatch):
    module, given = policy(temperature=0.7, top_k=5), {}
    monkeypatch.setattr("lightning_ft.modules.base.generate_text", lambda *_, **options: given.update(options) or [""])
    module.generate(["hello"], do_sample=True, top_p=0.5)
    assert {name: given[name] for name in ("temperature", "top_k", "top_p", "min_p")} == {
        "temperature": 0.7,
        "top_k": 5,
        "top_p": 0.5,
        "min_p": 0.0,
    }


@pytest.mark.parametrize("generation", [None, {"max_new_tokens": 3}])
def test_predict_answers_end_where_completions_do(generation):
    module = policy(max_new_tokens=70, generation=generation)
    ids = module._encode_prompt("hello")
    module.configure_model()
    whole = module.engine.generate([ids], max_new_tokens=70).completions[0].tokens
    assert len(whole) == 70
    text = module.tokenizer.decode(whole if generation is None else whole[:3], skip_special_tokens=True)
    assert module.generate(["hello"]) == [text]
    stopping = policy(max_new_tokens=70, stop=text[4:7], generation=generation)
    assert stopping.generate(["hello"]) == [text[: text.index(text[4:7]) + 3]]


# ---------------------------------------------------------------- precision


def test_lost_steps_is_the_share_of_lost_updates():
    numbers = torch.tensor([0.0, 1e-4, 1.0, 2.0]).bfloat16()
    assert lost_steps([numbers], 1e-3) == 0.5
    assert lost_steps([numbers.float()], 1e-3) == 0.0


@pytest.mark.parametrize(
    ("kind", "options", "precision", "said"),
    [
        (LoRAFineTuning, {}, "bf16-true", "precision='bf16-true' has turned the adapter .* precision='bf16-mixed'"),
        (LoRAFineTuning, {"dtype": "bfloat16"}, "bf16-mixed", None),
        (  # copies in the base's dtype, not cast by the Trainer
            LoRAFineTuning,
            {"dtype": "bfloat16", "learning_rate": 1e-6, "lora": {"r": 2, "modules_to_save": ["lm_head"]}},
            "32-true",
            r"learning_rate=1e-06 is below the resolution of bfloat16.*Train with dtype='float32'",
        ),
        (
            FullFineTuning,
            {"learning_rate": 1e-6, "dtype": "bfloat16"},
            "32-true",
            "learning_rate=1e-06 is below the resolution",
        ),
        (FullFineTuning, {"learning_rate": 1e-6}, "bf16-true", "learning_rate=1e-06 is below the resolution"),
        (FullFineTuning, {"learning_rate": 1e-2, "dtype": "bfloat16"}, "32-true", None),
        (FullFineTuning, {"learning_rate": 1e-6}, "bf16-mixed", None),
    ],
)
def test_lost_updates_of_16_bit_weights_are_reported(
    kind, options, precision, said, model_folder, trainer_options, recwarn
):
    module, data = kind(model_folder, **options), PairDataModule(make_rows(4), batch_size=2, cache_dir=False)
    Trainer(**trainer_options, max_steps=1, precision=precision).fit(module, data)
    caught = [str(w.message) for w in recwarn if "float16" in str(w.message) and "rank_zero" not in str(w.message)]
    if said is None:
        assert not caught
    else:
        assert len(caught) == 1
        assert re.search(said, caught[0])


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_precomputed_reference_uses_the_precision_of_the_run(precision, trainer_options, tmp_path):
    pairs = [{"prompt": r["input"], "chosen": r["output"], "rejected": r["output"] + " no"} for r in make_rows(8)]

    class Watched(DPO):
        def compute_loss(self, batch):
            result = super().compute_loss(batch)
            rewards.append(float(result.metrics["rewards/chosen"].abs().max()))
            return result

    for given in ("32-true", precision):
        rewards = []
        module = Watched(
            make_model(),
            tokenizer=make_tokenizer(),
            lora=LORA,
            learning_rate=1e-12,
            precompute_reference=True,
            cache_dir=str(tmp_path),
        )
        data = PreferenceDataModule(pairs, batch_size=8, cache_dir=False)
        Trainer(**trainer_options, max_steps=1, precision=given).fit(module, data)
        assert rewards[0] < 1e-6
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
