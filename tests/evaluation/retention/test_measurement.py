"""Retention in a training loop: against full logits, for each base and head, and errors."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import TEXT, make_model
from torch.nn.functional import kl_div

from lightning_ft.data.texts import encode_task, encode_texts, load_texts
from lightning_ft.errors import RetentionError
from lightning_ft.evaluation.retention import base_logprobs as module
from lightning_ft.evaluation.retention.measurement import RetentionMeasurement, measure_retention
from lightning_ft.types import Message, Request

TEXTS = [f"{line} {n}" for n, line in enumerate(TEXT * 2)]
TASK = [
    Request(f"r{n}", (Message(role="user", content=f"where is the {word}"),), f"here {n}")
    for n, word in enumerate(("lamp", "kettle", "fox"))
]
QUICK = {"progress": False, "resamples": 99, "batch_size": 3}


def adapted(model=None, *, trained=False, **options):
    settings = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": not trained}
    torch.manual_seed(3)
    return get_peft_model(make_model() if model is None else model, LoraConfig(**{**settings, **options}))


def perturbed(model, scale=0.05):
    """Add noise to each trainable weight."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


@torch.no_grad()
def compare_full_logits(base, tuned, examples):
    """Divergence, perplexity ratio and agreement over all supervised positions, from the logits of each text."""
    kl, nlls, agreed, count = 0.0, [0.0, 0.0], 0, 0
    for example in examples:
        keep = example.supervised[1:]
        ids = example.input_ids[None]
        both = [m.eval()(input_ids=ids).logits[0, :-1][keep].float().log_softmax(-1) for m in (base, tuned)]
        targets = ids[0, 1:][keep, None]
        kl += float(kl_div(both[1], both[0], log_target=True, reduction="sum"))
        nlls = [n - float(m.gather(-1, targets).sum()) for n, m in zip(nlls, both, strict=True)]
        agreed += int((both[0].argmax(-1) == both[1].argmax(-1)).sum())
        count += len(targets)
    return kl / count, float(torch.tensor((nlls[1] - nlls[0]) / count).exp()), agreed / count, count


def check_against_full_logits(result, base, tuned, tokenizer):
    general = encode_texts(tokenizer, TEXTS, max_tokens=256)[0]
    kl, ratio, agreement, count = compare_full_logits(base, tuned, general)
    assert result.kl_general.value == pytest.approx(kl, rel=1e-4)
    assert result.ppl_ratio.value == pytest.approx(ratio, rel=1e-4)
    assert result.top1_agreement.value == pytest.approx(agreement)
    assert result.tokens == count
    task_kl, _, _, task_count = compare_full_logits(base, tuned, encode_task(tokenizer, TASK))
    assert result.kl_task.value == pytest.approx(task_kl, rel=1e-4)
    assert (result.task_rows, result.task_tokens) == (3, task_count)


@pytest.mark.parametrize("chunk", [1024, 7])
@pytest.mark.parametrize("options", [{}, {"tie": True}, {"layers": 1}], ids=str)
def test_measure_retention_matches_full_logits(monkeypatch, tokenizer, options, chunk):
    monkeypatch.setattr(module, "CHUNK", chunk)
    base, tuned = make_model(**options), perturbed(make_model(**options))
    result = measure_retention(tuned, tokenizer, original=base, texts=TEXTS, task=TASK, **QUICK)
    check_against_full_logits(result, base, tuned, tokenizer)
    assert (result.base, result.top_k, result.lower_bound) == ("model", None, False)
    assert result.kl_general.value > 0.01


def test_measure_retention_supports_logit_softcapping(tokenizer):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=2.0,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    base = Gemma2ForCausalLM(config)
    tuned = perturbed(copy.deepcopy(base), 0.3)
    result = measure_retention(tuned, tokenizer, original=base, texts=TEXTS, task=TASK, **QUICK)
    check_against_full_logits(result, base, tuned, tokenizer)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"use_dora": True},
    ],
    ids=["linear", "head", "copied head", "dora"],
)
def test_adapter_off_matches_full_logits(tokenizer, options):
    model = adapted(**options)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    measurement = RetentionMeasurement(tokenizer, TEXTS, TASK, **QUICK)
    measurement.before(model)
    at_start = measurement.after(model)
    assert (at_start.base, at_start.kl_general.value, at_start.top1_agreement.value) == ("adapter_off", 0.0, 1.0)
    perturbed(model)
    result = measurement.after(model)
    check_against_full_logits(result, make_model(), model, tokenizer)
    assert trainable == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert measure_retention(model, tokenizer, texts=TEXTS, task=TASK, **QUICK).kl_general == result.kl_general


def beyond_the_adapter(trained):
    """An adapted model that trains biases or norms of the base too."""
    options = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = get_peft_model(make_model(attention_bias=True), LoraConfig(bias=trained, **options))
    if trained == "none":
        model.base_model.model.model.norm.requires_grad_(True)
    return model


@pytest.mark.parametrize("trained", ["all", "lora_only", "none"])
def test_adapter_off_is_no_base_where_weights_outside_of_the_adapter_are_trained(tokenizer, trained):
    model, original = beyond_the_adapter(trained), make_model(attention_bias=True)
    with pytest.raises(RetentionError, match=r"weights outside of the adapter are trained .*Pass base='step_0'"):
        RetentionMeasurement(tokenizer, TEXTS, base="adapter_off", **QUICK).before(model)
    measurement = RetentionMeasurement(tokenizer, TEXTS, **QUICK)
    measurement.before(model)
    exact = measure_retention(perturbed(model), tokenizer, original=original, texts=TEXTS, **QUICK)
    result = measurement.after(model)
    assert result.base == "step_0"
    assert result.ppl_ratio.value == pytest.approx(exact.ppl_ratio.value, rel=1e-5)
    with pytest.raises(RetentionError, match=r"isn't the original one\. Pass original="):
        measure_retention(model, tokenizer, texts=TEXTS, **QUICK)


def test_weights_unfrozen_next_to_an_adapter_after_the_start_are_refused(tokenizer):
    model = adapted()
    measurement = RetentionMeasurement(tokenizer, TEXTS, **QUICK)
    measurement.before(model)
    model.base_model.model.model.norm.requires_grad_(True)
    with pytest.raises(RetentionError, match=r"They were frozen when the base was determined: pass base='step_0'"):
        measurement.after(model)


def test_step_0_is_a_lower_bound_that_becomes_exact(tokenizer):
    base, tuned = make_model(), perturbed(make_model())
    exact = measure_retention(tuned, tokenizer, original=base, texts=TEXTS, task=TASK, **QUICK)
    divergences = []
    for k in (1, 8, 64, 400):
        measurement = RetentionMeasurement(tokenizer, TEXTS, TASK, top_k=k, **QUICK)
        measurement.before(base)
        result = measurement.after(tuned)
        assert (result.base, result.top_k, result.lower_bound) == ("step_0", k, True)
        # these don't depend on what is kept
        assert (result.ppl_ratio, result.top1_agreement) == (exact.ppl_ratio, exact.top1_agreement)
        divergences.append(result.kl_general.value)
        assert result.kl_task.value <= exact.kl_task.value + 1e-6
    assert divergences == sorted(divergences)
    assert divergences[0] < 0.9 * exact.kl_general.value
    assert divergences[-1] == pytest.approx(exact.kl_general.value, rel=1e-5)


def test_before_compares_trained_adapters_with_step_0(tokenizer):
    for model in (adapted(trained=True), adapted(init_lora_weights="pissa")):
        explicit = RetentionMeasurement(tokenizer, TEXTS, base="adapter_off", **QUICK)
        with pytest.raises(RetentionError, match=r"the adapter was trained before.*Pass base='step_0'"):
            explicit.before(model)
        assert not explicit.has_before
        measurement = RetentionMeasurement(tokenizer, TEXTS, **QUICK)
        measurement.before(model)
        result = measurement.after(model)
        assert (result.base, result.kl_general.value) == ("step_0", 0.0)


def test_before_refuses_a_model_that_changes_between_evaluations(tokenizer):
    model = make_model()
    calls = []

    def drift(*_):
        calls.append(1)
        if len(calls) == 9:  # 5 passes check head and lengths, 3 store the texts, and the next one evaluates them again
            perturbed(model)

    model.model.register_forward_hook(drift)
    with pytest.raises(RetentionError, match="two evaluations of the model"):
        RetentionMeasurement(tokenizer, TEXTS, base="step_0", **QUICK).before(model)
    assert len(calls) == 11


def test_measurement_leaves_modes_gradients_and_rng_unchanged(tokenizer):
    model = adapted(make_model(dropout=0.5)).train()
    model.base_model.model.model.layers[0].eval()
    modes = [part.training for part in model.modules()]
    state = torch.get_rng_state()
    measurement = RetentionMeasurement(tokenizer, TEXTS, TASK, **QUICK)
    measurement.before(model)
    measurement.after(model)
    assert modes == [part.training for part in model.modules()]
    assert torch.equal(state, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("method", ["full", "lora"])
def test_measurement_survives_a_checkpoint(tokenizer, tmp_path, method):
    make = make_model if method == "full" else adapted
    first = RetentionMeasurement(tokenizer, TEXTS, TASK, **QUICK)
    first.before(make())
    torch.save(first.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    second = RetentionMeasurement(tokenizer, TEXTS, TASK, **{**QUICK, "batch_size": 8})
    second.load_state_dict(state)
    tuned = perturbed(make())
    expected, found = first.after(tuned), second.after(tuned)
    assert found.kl_general.value == pytest.approx(expected.kl_general.value, rel=1e-5)  # another batch size
    third = RetentionMeasurement(tokenizer, TEXTS, TASK, **QUICK)
    third.load_state_dict(state)
    assert third.after(tuned) == expected

    with pytest.raises(RetentionError, match="on other texts or task rows"):
        RetentionMeasurement(tokenizer, TEXTS[1:], TASK, **QUICK).load_state_dict(state)
    other = "adapter_off" if method == "full" else "step_0"
    with pytest.raises(RetentionError, match=f"compares with base='{state['base']}'"):
        RetentionMeasurement(tokenizer, TEXTS, TASK, base=other, **QUICK).load_state_dict(state)


def test_measurement_works_in_half_precision_and_autocast(tokenizer):
    model = adapted(make_model().bfloat16())
    measurement = RetentionMeasurement(tokenizer, TEXTS, base="adapter_off", **QUICK)
    measurement.before(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        measurement.before(model)
    perturbed(model)  # outside: autocast caches cast weights until the context ends
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert measurement.after(model).kl_general.value > 0.01
    assert measurement.after(model).provenance["dtype"] == "bfloat16"


def test_measurement_never_takes_trained_weights_for_the_base(tokenizer):
    with pytest.raises(RetentionError, match="nothing was kept of the weights before"):
        RetentionMeasurement(tokenizer, TEXTS, **QUICK).before(adapted(trained=True), trained=True)
    confirmed = RetentionMeasurement(tokenizer, TEXTS, base="adapter_off", **QUICK)
    confirmed.before(adapted(trained=True), trained=True)
    assert confirmed.after(adapted(trained=True)).kl_general.value > 0.01
    with pytest.raises(RetentionError, match="nothing to compare with"):
        RetentionMeasurement(tokenizer, TEXTS, **QUICK).after(make_model())
    with pytest.raises(RetentionError, match="Pass original="):
        measure_retention(make_model(), tokenizer, texts=TEXTS)
    with pytest.raises(RetentionError, match="no longer has an adapter"):
        confirmed.after(make_model())


def test_before_refuses_unsupported_models(tokenizer):
    from peft import PromptTuningConfig
    from transformers import LlamaForSequenceClassification

    def before(model, **options):
        RetentionMeasurement(tokenizer, TEXTS, **QUICK, **options).before(model)

    with pytest.raises(RetentionError, match="needs a causal language model"):
        before(LlamaForSequenceClassification(make_model().config))
    with pytest.raises(RetentionError, match="tokens of their own"):
        before(get_peft_model(make_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)))
    with pytest.raises(RetentionError, match="needs an adapter"):
        before(make_model(), base="adapter_off")
    broken = make_model()
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(RetentionError, match="isn't a number"):
        before(broken)
    with pytest.raises(RetentionError, match="400 tokens and that of the tuned model 500"):
        measure_retention(make_model(500), tokenizer, original=make_model(400), texts=TEXTS, **QUICK)
    odd = make_model()
    odd.register_forward_hook(lambda _, __, out: setattr(out, "logits", out.logits * 2))
    with pytest.raises(RetentionError, match="LlamaForCausalLM does something to its logits"):
        before(odd)
    with pytest.raises(RetentionError, match=r"General text 0 has 600 tokens, the model's context is 512"):
        RetentionMeasurement(tokenizer, ["fox " * 900], max_tokens=600, **QUICK).before(make_model())


def test_load_texts_reads_jsonl_and_txt(tmp_path):
    rows = tmp_path / "texts.jsonl"
    rows.write_text("\n".join(json.dumps({"text": text, "author": "A"}) for text in ("one\u2028two", "three")) + "\n\n")
    assert load_texts(str(rows)) == ["one\u2028two", "three"]
    prose = tmp_path / "texts.txt"
    prose.write_text("One line\nand another.\n \n\nTwo.\n")
    assert load_texts(prose) == ["One line\nand another.", "Two."]
    assert load_texts(prose, max_texts=1) == ["One line\nand another."]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            '{"text": "x"}\n{"txt": "y"}',
            r'a.jsonl, line 2: no "text" .*\(fields: txt\).* rows of {"text": ...}',
        ),
        ("a.jsonl", '{"text": 3}', "line 1: no"),
        ("a.jsonl", "not json", "line 1: not JSON"),
        ("a.txt", " \n\n", "There are no texts"),
        ("a.csv", "text", r"expected a .jsonl file, a .txt file, or a list"),
        ("a.txt", b"\xff\xfe", "can't be read as UTF-8"),
        ("missing.txt", None, r"can't be read: there is no such file\.$"),
    ],
)
def test_load_texts_refuses_bad_files(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RetentionError, match=message):
        load_texts(path)


def test_load_texts_names_the_nearest_file(tmp_path, monkeypatch):
    (tmp_path / "general.jsonl").write_text('{"text": "Rain fell."}')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RetentionError, match=r"no such file\. Did you mean 'general\.jsonl'\?"):
        load_texts("generral.jsonl")


def test_measurement_refuses_bad_texts_rows_and_options(tokenizer):
    for texts, message in ((None, "no general texts to read"), ([], "no texts"), ([b"x"], r"texts\[0\] is of type")):
        with pytest.raises(RetentionError, match=message):
            load_texts(texts)
    with pytest.raises(RetentionError, match="max_texts=0"):
        load_texts(TEXTS, max_texts=0)
    with pytest.raises(RetentionError, match=r"2 general texts have fewer than 2 tokens.*text 1, ''"):
        RetentionMeasurement(tokenizer, ["the lamp", "", "a"])
    with pytest.raises(RetentionError, match="max_tokens=1"):
        RetentionMeasurement(tokenizer, TEXTS, max_tokens=1)
    for row, message in ((([], [1]), "Task row 0 has no prompt"), (([1], []), "Task row 0 has no answer")):
        with pytest.raises(RetentionError, match=message):
            RetentionMeasurement(tokenizer, TEXTS, [row])
    for option, value in (("base", "off"), ("top_k", 0), ("batch_size", 0)):
        with pytest.raises(RetentionError, match=f"{option}="):
            RetentionMeasurement(tokenizer, TEXTS, **{option: value})


def test_measurement_cuts_and_counts_long_texts(tokenizer):
    measurement = RetentionMeasurement(tokenizer, [TEXT[0] * 9, "the fox"], max_tokens=8, **QUICK)
    assert [len(example) for example in measurement.general] == [8, len(tokenizer("the fox")["input_ids"])]
    measurement.before(make_model())
    result = measurement.after(make_model())
    assert result.provenance["texts_cut"] == 1
    assert result.tokens == 7 + len(measurement.general[1]) - 1


def test_task_requests_equal_their_token_pairs(tokenizer):
    examples = encode_task(tokenizer, TASK)
    pairs = []
    for example in examples:
        start = int(example.supervised.nonzero()[0])
        end = int(example.supervised.nonzero()[-1]) + 1  # the template writes a line break after the answer
        pairs.append((example.input_ids[:start].tolist(), example.input_ids[start:end].tolist()))
    base, tuned = make_model(), perturbed(make_model())
    results = [
        measure_retention(tuned, tokenizer, original=base, texts=TEXTS, task=rows, **QUICK) for rows in (TASK, pairs)
    ]
    assert results[0].kl_task.value == pytest.approx(results[1].kl_task.value, rel=1e-5)
    assert results[0].task_tokens == results[1].task_tokens
