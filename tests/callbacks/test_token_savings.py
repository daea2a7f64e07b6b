"""TokenSavings with a Trainer, in a Fabric loop and in a manual loop."""

import copy
import json
import re
import warnings

import pytest
import torch
from plain_module import WORDS, Plain, batches, loader
from tiny import make_model, make_tokenizer

from lightning_ft import FullFineTuning, LoRAFineTuning, PairDataModule, Prices, PromptBaseline, TokenSavings
from lightning_ft._lightning import NAMESPACE, Trainer, _pl
from lightning_ft.data.encode import encode_prompt
from lightning_ft.errors import ConfigError, SavingsError
from lightning_ft.evaluation.savings.files import load_savings
from lightning_ft.evaluation.savings.measurement import SavingsMeasurement, measure_token_savings
from lightning_ft.models.generate import evaluating
from lightning_ft.types import Message, Request

BASELINE = PromptBaseline("Say where the thing is, in one word.", [{"input": "where is the moon", "output": "up"}] * 3)
QUICK = {"max_new_tokens": 6, "batch_size": 4, "resamples": 199, "timed_requests": 1, "margin": 0.05}


def overlap(output, reference):
    """Score the share of the reference's letters in the output, which is rarely 0 for a random model."""
    return len(set(output) & set(reference)) / len(set(reference))


def make_requests(words=WORDS):
    return [
        Request(f"r{i}", (Message(role="user", content=f"where is the {word}"),), "here")
        for i, word in enumerate(words)
    ]


def fit(trainer_options, tmp_path, tokenizer, callback, *, model=None, ckpt_path=None, callbacks=(), **options):
    torch.manual_seed(0)
    module = Plain(make_model() if model is None else model, tokenizer)
    options = {"max_epochs": 2, **trainer_options, **options}
    trainer = Trainer(callbacks=[callback, *callbacks], **options)
    trainer.fit(module, loader(tokenizer), ckpt_path=ckpt_path)
    return trainer, module


@pytest.fixture
def savings():
    return TokenSavings(BASELINE, scorer=overlap, requests=make_requests(), **QUICK)


def manual_loop(tokenizer):
    torch.manual_seed(0)
    model = make_model().train()
    measurement = SavingsMeasurement(tokenizer, make_requests(), BASELINE, scorer=overlap, progress=False, **QUICK)
    measurement.before(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        for ids in batches(tokenizer):
            optimizer.zero_grad()
            model(input_ids=ids[None], labels=ids[None]).loss.backward()
            optimizer.step()
    assert model.training
    return measurement.after(model)


def fabric_loop(tokenizer, callback):
    fabric_type = pytest.importorskip("lightning.fabric" if NAMESPACE == "lightning" else "lightning_fabric").Fabric
    torch.manual_seed(0)
    fabric = fabric_type(accelerator="cpu", devices=1, callbacks=[callback])
    model = make_model().train()
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    fabric.call("on_train_start", fabric, model)
    for _ in range(2):
        for ids in batches(tokenizer):
            optimizer.zero_grad()
            fabric.backward(model(input_ids=ids[None], labels=ids[None]).loss)
            optimizer.step()
    fabric.call("on_train_end", fabric, model)
    return callback.result


def test_savings_agree_between_trainer_fabric_and_manual_loop(trainer_options, tmp_path, tokenizer, savings):
    manual = manual_loop(tokenizer)
    fit(trainer_options, tmp_path, tokenizer, savings)
    with_fabric = TokenSavings(
        BASELINE, scorer=overlap, requests=make_requests(), tokenizer=tokenizer, progress=False, **QUICK
    )
    assert manual.arms["tuned"] != manual.arms["untuned"]  # training changed something
    assert savings.result == manual == fabric_loop(tokenizer, with_fabric)


def test_savings_counts_equal_brute_force(tokenizer):
    result = manual_loop(tokenizer)
    model, requests = make_model(), make_requests()
    for name, messages in (("prompted", BASELINE.messages), ("untuned", list)):
        arm = result.arms[name]
        for i, request in enumerate(requests):
            text = tokenizer.apply_chat_template(messages(request.messages), tokenize=False, add_generation_prompt=True)
            prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
            with evaluating(model):
                out = model.generate(
                    input_ids=torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=0
                )[0, len(prompt) :]
            assert arm.input_tokens[i] == len(prompt)
            assert arm.output_tokens[i] == len(out)
            assert arm.truncated[i] == (out[-1] != 2)
            assert arm.outputs[i] == tokenizer.decode(out, skip_special_tokens=True)
            assert arm.scores[i] == overlap(arm.outputs[i], "here")
        assert sum(arm.parts.values()) == sum(arm.input_tokens)
    start = tokenizer.apply_chat_template(BASELINE.messages([]), tokenize=False)
    assert result.arms["prompted"].cached_prefix_tokens[0] >= len(tokenizer(start)["input_ids"])


def test_savings_plan_counts_bos_token():
    bos = "{{- bos_token -}}" + make_tokenizer().chat_template
    plain, with_bos = make_tokenizer(), make_tokenizer(template=bos, bos="<|bos|>")
    prompts = [
        SavingsMeasurement(t, make_requests(), BASELINE, scorer=overlap).plan.bare.prompts[0] for t in (plain, with_bos)
    ]
    assert len(prompts[1]) == len(prompts[0]) + 1 == len(encode_prompt(with_bos, make_requests()[0].messages))


def test_savings_do_not_depend_on_share_prefix(tokenizer):
    results = []
    for share in (True, False):
        measurement = SavingsMeasurement(
            tokenizer, make_requests(), BASELINE, scorer=overlap, share_prefix=share, progress=False, **QUICK
        )
        measurement.before(make_model())
        results.append(measurement.after(make_model(seed=1)))
    assert results[0] == results[1]


def test_measure_token_savings_with_two_models_equals_disabled_adapter(tokenizer):
    from peft import LoraConfig, get_peft_model

    options = {"scorer": overlap, "progress": False, **QUICK}
    adapted = get_peft_model(make_model(), LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM"))
    off = measure_token_savings(adapted, tokenizer, make_requests(), BASELINE, **options)
    two = measure_token_savings(adapted, tokenizer, make_requests(), BASELINE, original=make_model(), **options)
    assert off.arms == two.arms
    assert off.arms["tuned"].outputs != off.arms["untuned"].outputs
    adapted.base_model.model.model.norm.requires_grad_(True)
    with pytest.raises(SavingsError, match=r"Pass original=: 1 weights? outside of the adapter are trained"):
        measure_token_savings(adapted, tokenizer, make_requests(), BASELINE, **options)
    with pytest.raises(SavingsError, match="Pass original="):
        measure_token_savings(make_model(), tokenizer, make_requests(), BASELINE, **options)


def test_savings_logs_and_writes_metrics(trainer_options, tmp_path, tokenizer, capsys):
    logged = []

    class Recorder(_pl.loggers.logger.DummyLogger):
        def log_metrics(self, metrics, step=None):
            logged.append((step, dict(metrics)))

    prices = Prices(0.15, 0.6, 0.015, training=5, currency="USD", date="2026-01-31")
    callback = TokenSavings(BASELINE, scorer=overlap, requests=make_requests(), prices=prices, **QUICK)
    trainer, _ = fit({**trainer_options, "logger": Recorder()}, tmp_path, tokenizer, callback)
    step, metrics = logged[-1]
    assert step == trainer.global_step == 16
    assert set(metrics) == {f"token_savings/{name}" for name in callback.result.metrics()}
    assert {"token_savings/total_lo", "token_savings/cost_cached", "token_savings/break_even_requests"} <= set(metrics)
    assert float(trainer.callback_metrics["token_savings/n"]) == 8
    folder = tmp_path / "token_savings"
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".md", ".png"]
    assert load_savings(folder / "token_savings.json") == callback.result
    assert "tokens per success" in capsys.readouterr().out


def test_savings_metrics_can_be_monitored_every_epoch(trainer_options, tmp_path, tokenizer):
    callback = TokenSavings(
        BASELINE, scorer=overlap, requests=make_requests(), every_n_epochs=1, output_dir=False, **QUICK
    )
    checkpoint = _pl.callbacks.ModelCheckpoint(tmp_path, monitor="token_savings/total", save_top_k=-1)
    options = {**trainer_options, "enable_checkpointing": True}
    fit(options, tmp_path, tokenizer, callback, callbacks=[checkpoint])
    assert len(checkpoint.best_k_models) == 2
    assert float(checkpoint.best_model_score) > 0.3
    assert not (tmp_path / "token_savings").exists()


def test_savings_of_resumed_run_keep_arms_of_original_weights(trainer_options, tmp_path, tokenizer, savings):
    options = {**trainer_options, "enable_checkpointing": True}
    checkpoint = _pl.callbacks.ModelCheckpoint(tmp_path / "ckpt", filename="{epoch}", save_top_k=-1)
    fit(options, tmp_path, tokenizer, savings, callbacks=[checkpoint])
    path = tmp_path / "ckpt" / "epoch=0.ckpt"
    state = torch.load(path, weights_only=True)["callbacks"]["TokenSavings('token_savings')"]
    assert json.loads(json.dumps(state)) == state

    resumed = TokenSavings(BASELINE, scorer=overlap, requests=make_requests(), **QUICK)
    fit(trainer_options, tmp_path, tokenizer, resumed, model=make_model(seed=5), ckpt_path=path)
    assert resumed.result == savings.result

    other = TokenSavings(PromptBaseline("Other."), scorer=overlap, requests=make_requests(), **QUICK)
    with pytest.raises(SavingsError, match="measured with other requests, another baseline"):
        fit(trainer_options, tmp_path, tokenizer, other, ckpt_path=path)


def test_savings_of_continued_fit_keep_arms_of_original_weights(trainer_options, tmp_path, tokenizer, savings):
    trainer, module = fit(trainer_options, tmp_path, tokenizer, savings, max_epochs=1)
    first = savings.result
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(tokenizer))
    assert trainer.global_step == 16
    assert savings.result is not first
    assert savings.result.arms["untuned"] == first.arms["untuned"] != first.arms["tuned"]


def test_savings_of_another_model_do_not_reuse_the_arms_of_a_resumed_run(trainer_options, tmp_path, tokenizer, savings):
    first, _ = fit(trainer_options, tmp_path, tokenizer, savings, max_epochs=1)
    first.save_checkpoint(tmp_path / "first.ckpt")
    fit(trainer_options, tmp_path, tokenizer, savings, ckpt_path=tmp_path / "first.ckpt")
    fit(trainer_options, tmp_path, tokenizer, savings, model=make_model(seed=7), max_epochs=1)
    fresh = TokenSavings(BASELINE, scorer=overlap, requests=make_requests(), **QUICK)
    fit(trainer_options, tmp_path, tokenizer, fresh, model=make_model(seed=7), max_epochs=1)
    assert savings.result.arms == fresh.result.arms


def test_savings_of_a_second_fabric_loop_do_not_reuse_the_arms_of_the_first(tokenizer):
    options = {"scorer": overlap, "requests": make_requests(), "tokenizer": tokenizer, "progress": False, **QUICK}
    callback, fresh = TokenSavings(BASELINE, **options), TokenSavings(BASELINE, **options)
    for used, seed in ((callback, 0), (callback, 7), (fresh, 7)):
        used.on_train_start(None, make_model(seed=seed))
        used.on_train_end(None, make_model(seed=seed))
    assert callback.result.arms == fresh.result.arms
    assert callback.result.arms["tuned"].outputs == callback.result.arms["untuned"].outputs  # nothing was trained


def test_savings_without_correct_answer_are_void(trainer_options, tmp_path, tokenizer):
    callback = TokenSavings(
        BASELINE, scorer="exact", requests=make_requests(), every_n_epochs=1, **{**QUICK, "max_new_tokens": 1}
    )
    trainer, _ = fit(trainer_options, tmp_path, tokenizer, callback)
    assert callback.undefined is None
    assert callback.result.gate.verdict == "VOID"
    assert "token_savings/input" in trainer.callback_metrics
    assert "token_savings/per_success" not in trainer.callback_metrics
    assert float(trainer.callback_metrics["token_savings/gate_passed"]) == 0
    page = next(tmp_path.rglob("report.md")).read_text(encoding="utf-8")
    assert "None was right: the first" in page


def test_savings_refuse_trained_weights_as_original(trainer_options, tmp_path, tokenizer, savings):
    without, _ = fit(trainer_options, tmp_path, tokenizer, _pl.Callback())
    without.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(SavingsError, match="resumes at step 16"):
        fit(trainer_options, tmp_path, tokenizer, savings, ckpt_path=tmp_path / "last.ckpt", max_epochs=3)


def test_savings_do_not_change_training(trainer_options, tmp_path, tokenizer, savings):
    with_dropout = make_model(dropout=0.3)
    _, plain = fit(trainer_options, tmp_path, tokenizer, _pl.Callback(), model=copy.deepcopy(with_dropout).train())
    _, measured = fit(trainer_options, tmp_path, tokenizer, savings, model=copy.deepcopy(with_dropout).train())
    for ours, theirs in zip(measured.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def data_module(**splits):
    rows = [{"input": f"where is the {word}", "output": "here"} for word in WORDS]
    rows_by_split = {name: [dict(row, id=f"{name}{i}") for i, row in enumerate(rows)] for name in splits}
    return PairDataModule(
        [{"input": "what is the dog", "output": "here"}], **{**splits, **rows_by_split}, cache_dir=False
    )


@pytest.mark.parametrize(
    ("splits", "expected"), [({"test": 1, "validation": 1}, "test"), ({"validation": 1}, "validation")]
)
def test_savings_use_rows_of_data_module(trainer_options, tokenizer, splits, expected):
    callback = TokenSavings(BASELINE, scorer=overlap, max_requests=5, **QUICK)
    trainer = Trainer(callbacks=[callback], max_epochs=1, **trainer_options)
    module = Plain(make_model(), tokenizer)
    module.training_step = lambda batch, batch_idx: module.model(input_ids=batch.input_ids, labels=batch.input_ids).loss
    trainer.fit(module, data_module(**splits))
    assert all(i.startswith(expected) for i in callback.result.arms["tuned"].ids)
    assert callback.result.provenance["split"] == expected
    assert (callback.result.n, callback.result.provenance["requests_available"]) == (5, 8)


@pytest.mark.parametrize("module_type", [FullFineTuning, LoRAFineTuning])
def test_savings_with_fine_tuning_modules(trainer_options, model_folder, module_type):
    callback = TokenSavings(BASELINE, scorer=overlap, **QUICK)
    module = module_type(model_folder, learning_rate=1e-2, lr_schedule="constant")
    trainer = Trainer(callbacks=[callback], max_epochs=3, **trainer_options)
    trainer.fit(module, data_module(test=1))
    fresh = SavingsMeasurement(
        module.tokenizer, trainer.datamodule.requests("test"), BASELINE, scorer=overlap, progress=False, **QUICK
    )
    fresh.before(module_type(model_folder)._load_base())
    again = fresh.after(module.model)
    assert dict(again.arms) == dict(callback.result.arms)
    assert again.arms["tuned"] != again.arms["untuned"]


def test_savings_refuse_training_rows(trainer_options, tokenizer):
    trainer = Trainer(callbacks=[TokenSavings(BASELINE)], max_epochs=1, **trainer_options)
    with pytest.raises(SavingsError, match="training rows would measure memorization"):
        trainer.fit(Plain(make_model(), tokenizer), data_module())
    with pytest.raises(SavingsError, match="training rows would measure memorization"):
        TokenSavings(BASELINE, split="train")


def fit_rows(trainer_options, tokenizer, callback, data, **options):
    module = Plain(make_model(), tokenizer)
    module.training_step = lambda batch, batch_idx: module.model(input_ids=batch.input_ids, labels=batch.input_ids).loss
    trainer = Trainer(callbacks=[callback], max_epochs=1, **{**trainer_options, **options})
    trainer.fit(module, data)
    return callback.result


@pytest.mark.filterwarnings("ignore:test has")
def test_savings_count_requests_in_training_rows(trainer_options, tmp_path, tokenizer, capsys):
    rows = [{"input": f"where is the {word}", "output": "here"} for word in WORDS]
    data = PairDataModule([{**rows[0], "output": "there"}, *rows[1:4]], test=rows, cache_dir=False)
    callback = TokenSavings(BASELINE, scorer=overlap, **QUICK)
    counted = r"4 of 8 requests \(50%\) also appear in the training rows"
    with warnings.catch_warnings(record=True) as caught:
        result = fit_rows(trainer_options, tokenizer, callback, data)
    assert re.search(f"Note: {counted}", " ".join(capsys.readouterr().out.split()))
    assert not [warning for warning in caught if "Token savings:" in str(warning.message)]  # not told twice
    assert result.in_training == tuple(request.id for request in data.requests("test")[:4])
    folder = tmp_path / "token_savings"
    assert len(re.findall(counted, (folder / "token_savings.md").read_text())) == 2
    written = json.loads((folder / "token_savings.json").read_text())
    assert written["requests_in_training"] == 4
    assert re.search(counted, written["headline"])
    assert any(re.match(counted, text) for text in written["warnings"])


def test_savings_compare_own_requests_with_rows_of_data_module(trainer_options, tokenizer):
    data = PairDataModule([{"input": f"where is the {WORDS[0]}", "output": "here"}], cache_dir=False)
    options = {"scorer": overlap, "requests": make_requests(), "output_dir": False, **QUICK}
    assert fit_rows(trainer_options, tokenizer, TokenSavings(BASELINE, **options), data).in_training == ("r0",)
    callback = TokenSavings(BASELINE, train_rows=make_requests()[2:4], **options)
    assert fit_rows(trainer_options, tokenizer, callback, data).in_training == ("r2", "r3")


def test_savings_of_held_out_share_have_no_request_in_training(trainer_options, tokenizer):
    rows = [{"input": f"where is the {word}", "output": f"here {n}"} for word in WORDS for n in range(3)]
    data = PairDataModule(rows, validation=0.25, cache_dir=False)
    callback = TokenSavings(BASELINE, scorer=overlap, output_dir=False, **QUICK)
    result = fit_rows(trainer_options, tokenizer, callback, data)
    assert (result.n, result.in_training, result.provenance["requests_in_training"]) == (6, (), 0)


def test_savings_with_plain_loader_report_missing_overlap_check(trainer_options, tmp_path, tokenizer, savings):
    fit(trainer_options, tmp_path, tokenizer, savings, max_epochs=1)
    assert savings.result.in_training is None
    assert savings.result.provenance["requests_in_training"] == "not checked: pass train_rows="


LONG = Request("long", (Message(role="user", content="fox " * 500),), "here")


@pytest.mark.parametrize(
    ("requests", "baseline", "message"),
    [
        ([], BASELINE, "No requests"),
        ([*make_requests(), make_requests()[3]], BASELINE, "more than once: r3"),
        ([Request("", make_requests()[0].messages, "here")], BASELINE, r"requests\[0\] has no id"),
        ([*make_requests(), LONG], BASELINE, "Request 'long': its prompt in the prompted arm has .* context of 512"),
        (make_requests(), PromptBaseline("", [{"input": "Where is the LAMP", "output": "up"}]), "few-shot .*r1"),
    ],
)
def test_savings_refuse_invalid_requests_before_first_step(
    trainer_options, tmp_path, tokenizer, requests, baseline, message
):
    model = make_model()
    weights = copy.deepcopy(model.state_dict())
    model.generate = None
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    callback = TokenSavings(baseline, scorer=overlap, requests=requests, **QUICK)
    with pytest.raises(SavingsError, match=message):
        fit(trainer_options, tmp_path, tokenizer, callback, model=model)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_savings_refuse_identical_prompts():
    chatml = make_tokenizer().chat_template
    without_system = make_tokenizer(chatml.replace("in messages", "in messages if message.role != 'system'"))
    with pytest.raises(SavingsError, match="'r0': its prompt is the same in both arms"):
        SavingsMeasurement(without_system, make_requests(), PromptBaseline("Be brief."))


def test_requests_that_have_the_prompt_already_are_refused():
    """Both arms would read it, the prompted one twice, and a saving would be claimed that no one has."""
    system = Message(role="system", content="Answer in  one line. Be kind.")
    requests = [Request("a", (system, Message(role="user", content="where")), "here")]
    with pytest.raises(SavingsError, match=r"system turn of 1 requests has the prompt of the baseline already \(a\)"):
        SavingsMeasurement(make_tokenizer(), requests, PromptBaseline("answer in one line."))
    assert SavingsMeasurement(make_tokenizer(), requests, PromptBaseline("Answer in French.")).plan.prompted is not None


def test_savings_refuse_missing_baseline_tokenizer_model_or_start(trainer_options, tokenizer, savings):
    with pytest.raises(SavingsError, match="needs the prompt that you would use"):
        TokenSavings()
    with pytest.raises(SavingsError, match="need a baseline"):
        SavingsMeasurement(tokenizer, make_requests(), None)
    with pytest.raises(SavingsError, match="no tokenizer"):
        savings.on_train_start(None, make_model())
    savings.tokenizer = tokenizer
    with pytest.raises(SavingsError, match=r"fabric\.call"):
        savings.on_train_start()
    not_started = TokenSavings(BASELINE)
    not_started.on_train_end(None, make_model())
    assert "Call on_train_start before the first step" in not_started.undefined
    with pytest.raises(SavingsError, match=r"call before\(model\)"):
        SavingsMeasurement(tokenizer, make_requests(), BASELINE).after(make_model())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_requests": "3"}, "TokenSavings: max_requests='3': expected an integer"),
        ({"max_requests": 0}, "max_requests=0: expected at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: expected at least 1"),
        ({"batch_size": 0}, "batch_size=0: expected at least 1"),
        ({"batch_size": 8.0}, r"batch_size=8\.0: expected an integer"),
        ({"resamples": 0}, "resamples=0: expected at least 1"),
        ({"timed_requests": -1}, "timed_requests=-1: expected at least 0"),
        ({"seed": "a"}, "seed='a': expected an integer"),
        ({"every_n_epochs": 0}, "every_n_epochs=0: expected at least 1"),
        ({"margin": "0.02"}, r"margin='0\.02': expected a number"),
        ({"margin": True}, "margin=True: expected a number"),
        ({"min_quality": "0.5"}, r"min_quality='0\.5': expected a number"),
        ({"scorer": "exactt"}, "scorer='exactt': expected .*Did you mean 'exact'"),
        ({"scorer": None}, "scorer=None: expected 'exact'"),
        ({"scorer": "no_such_package_of_mine.f"}, r"No module named 'no_such_package_of_mine'\. .*file\.py:function"),
        ({"scorer": "no/such/file.py:f"}, "there is no file 'no/such/file.py'"),
        ({"requests": "x.jsonl"}, r"requests='x.jsonl': expected a list of Request .*PairDataModule\.requests"),
        ({"requests": [{"id": "a"}]}, r"requests\[0\] is a value of type dict, not a Request"),
        ({"prices": {"input": 1.0}}, r"prices is a value of type dict: expected Prices\("),
        ({"structured_outputs": {"choices": ["a"]}}, r"of type dict: expected StructuredOutputs\("),
        ({"tokenizer": "gpt2"}, r"tokenizer='gpt2': expected a loaded tokenizer"),
    ],
)
def test_savings_refuse_invalid_arguments_at_construction(options, message):
    with pytest.raises((ConfigError, SavingsError), match=message):
        TokenSavings(BASELINE, **options)


def test_savings_refuse_a_dict_as_baseline():
    with pytest.raises(SavingsError, match=r"baseline is a value of type dict: expected PromptBaseline\("):
        TokenSavings({"system": "Be brief."})


def test_savings_read_the_baseline_of_a_path(tmp_path):
    (tmp_path / "baseline.json").write_text('{"system": "Be brief."}')
    for path in (tmp_path / "baseline.json", str(tmp_path / "baseline.json")):
        assert TokenSavings(path).baseline == PromptBaseline("Be brief.")


def test_savings_check_a_scorer_without_running_its_code(tmp_path):
    (tmp_path / "scorers.py").write_text("raise SystemExit('imported')")
    TokenSavings(BASELINE, scorer=f"{tmp_path}/scorers.py:grade")
    TokenSavings(BASELINE, scorer="__main__.grade")  # which has no import spec in a script


def test_savings_name_failing_scorer(trainer_options, tmp_path, tokenizer):
    callback = TokenSavings(BASELINE, scorer="operator:truediv", requests=make_requests(), **QUICK)
    with pytest.raises(SavingsError, match=r"Scorer 'operator:truediv' failed on request 'r0': TypeError"):
        fit(trainer_options, tmp_path, tokenizer, callback)


def test_savings_are_configured_from_yaml():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_argument("--callbacks", type=list[_pl.Callback])
    config = """
- class_path: lightning_ft.TokenSavings
  init_args:
    baseline:
      system: Be brief.
      few_shot:
        - {input: a, output: b}
    scorer: label
    prices: {input: 0.15, output: 0.6, currency: USD, date: 2026-01-31}
    train_rows: train.jsonl
- class_path: lightning_ft.TokenSavings
  init_args:
    name: other
    baseline: {class_path: lightning_ft.PromptBaseline, init_args: {system: Be brief.}}
"""
    first, second = parser.instantiate(parser.parse_args([f"--callbacks={config}"])).callbacks
    assert first.baseline == PromptBaseline("Be brief.", [{"input": "a", "output": "b"}])
    assert first.options["prices"].date == "2026-01-31"
    assert (first.train_rows, second.train_rows) == ("train.jsonl", None)
    assert (second.baseline, second.state_key) == (PromptBaseline("Be brief."), "TokenSavings('other')")


def test_savings_measure_time_to_first_token(monkeypatch, tokenizer):
    clock = iter(range(1000))
    monkeypatch.setattr("lightning_ft.evaluation.savings.serving.time.perf_counter", lambda: next(clock))
    result = manual_loop(tokenizer)
    assert dict(result.arms["prompted"].first_token_seconds) == {"cold": (1,), "warm": (1,)}
