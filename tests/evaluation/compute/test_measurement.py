"""Counted operations against formulas by hand, and what the measurement makes of them."""

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import make_model
from torch.utils._python_dispatch import _get_current_dispatch_mode

from lightning_ft.data.batches import PreferenceBatch, PromptBatch
from lightning_ft.data.layout import Example, collate_examples
from lightning_ft.errors import ConfigError
from lightning_ft.evaluation.compute import measurement as compute
from lightning_ft.evaluation.compute.arithmetic import ComputeResult
from lightning_ft.evaluation.compute.batch_size import tokens_of
from lightning_ft.evaluation.compute.measurement import ComputeMeasurement
from lightning_ft.evaluation.compute.memory import PeakMemory
from lightning_ft.models.flops import OperationCounter, formula_flops_per_token, is_compiled
from lightning_ft.models.head import completion_logprobs

ROWS, LENGTH, HEADS, HEAD_DIM, LAYERS, VOCABULARY = 3, 24, 4, 8, 2, 400
PLACES = ROWS * LENGTH
ONE_PRODUCT = 2 * ROWS * HEADS * LENGTH**2 * HEAD_DIM  # scores of one layer, or what they are multiplied with


def ids(seed=0, length=LENGTH):
    return torch.randint(0, VOCABULARY, (ROWS, length), generator=torch.Generator().manual_seed(seed))


def step(model, batch):
    model(input_ids=batch, labels=batch, use_cache=False).loss.backward()


def counted(model, batch=None):
    with OperationCounter() as counter:
        step(model, ids() if batch is None else batch)
    return counter


def linears(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


def weights(model):
    return sum(module.weight.numel() for module in linears(model).values())


def loop(model, batches, measurement=None, rate=0.1):
    """A training loop of one step a batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for batch in batches:
        with measurement.step(batch) if measurement is not None else torch.enable_grad():
            step(model, batch)
            optimizer.step()
            optimizer.zero_grad()


# -------------------------------------------------------------------- operators


def test_full_training_is_six_a_weight_and_token_and_seven_products_of_attention():
    counter = counted(make_model())
    assert counter.flops == 6 * weights(make_model()) * PLACES + 7 * LAYERS * ONE_PRODUCT
    assert counter.uncounted == ()
    assert counter.saw_attention


def test_frozen_weights_are_four_and_adapters_six():
    model = get_peft_model(make_model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    expected = 7 * LAYERS * ONE_PRODUCT
    for name, module in linears(model).items():
        first = ".layers.0.self_attn." in name and ".o_proj" not in name  # nothing before it is trained
        a_weight = 2 + 2 * ("lora_" in name) + 2 * ("lora_B" in name or not first)
        expected += a_weight * module.weight.numel() * PLACES
    assert counted(model).flops == expected


def test_eager_attention_agrees_but_for_the_scores_that_the_fused_kernel_computes_again():
    eager = make_model()
    eager.set_attn_implementation("eager")
    fused, plain = counted(make_model()), counted(eager)
    assert plain.flops == 6 * weights(eager) * PLACES + 6 * LAYERS * ONE_PRODUCT
    assert fused.flops - plain.flops == LAYERS * ONE_PRODUCT
    with torch.no_grad(), OperationCounter() as of_fused:
        make_model()(ids())
    with torch.no_grad(), OperationCounter() as of_eager:
        eager(ids())
    assert of_fused.flops == of_eager.flops


def test_recomputation_is_counted():
    model = make_model().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    forward = 2 * sum(m.weight.numel() for n, m in linears(model).items() if n != "lm_head") * PLACES
    forward += 2 * LAYERS * ONE_PRODUCT
    once = counted(make_model()).flops
    # each layer once more, except its last product, which nothing after it needs
    last = 2 * LAYERS * model.model.layers[0].mlp.down_proj.weight.numel() * PLACES
    assert once + forward - last <= counted(model).flops <= once + forward


def test_the_head_at_supervised_places_only():
    example = Example(torch.arange(20), torch.arange(20) >= 15)
    batch = collate_examples([example, example])
    model = make_model()
    head = model.lm_head.weight.numel()
    completion_logprobs(model, batch, reduction="sum")  # the first call asks the model where its hidden states are
    with OperationCounter() as counter:
        (-completion_logprobs(model, batch, reduction="sum").logprobs).backward()
    places = 40  # in two rows: side by side they would have no padding less, and more attention
    attention = 7 * LAYERS * 2 * HEADS * 2 * 20**2 * HEAD_DIM
    trunk = 6 * (weights(model) - head) * places
    assert counter.flops == trunk + 6 * head * 10 + attention


@torch.library.custom_op("lightning_ft_tests::flash_attn_varlen", mutates_args=())
def unknown_attention(q: torch.Tensor) -> torch.Tensor:
    return q * 2


def test_attention_without_a_formula_is_named():
    with OperationCounter() as counter:
        unknown_attention(torch.ones(3))
        torch.ones(3, 2) @ torch.ones(2, 5)
    assert counter.uncounted == ("lightning_ft_tests::flash_attn_varlen",)
    assert counter.flops == 60


def test_a_library_that_pytorch_does_not_see_is_named(monkeypatch):
    model = make_model()
    model.set_attn_implementation("eager")
    measurement = ComputeMeasurement()
    measurement.start(model)
    loop(model, [ids()], measurement)
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.warns(UserWarning, match="flash_attention_2, whose operations no formula counts"):
        assert measurement.stop().uncounted == ("flash_attention_2",)


def test_grouped_products():
    from lightning_ft.models.flops import _grouped

    assert _grouped((10, 4), (3, 4, 5)) == 2 * 10 * 4 * 5  # tokens shared out over three experts
    assert _grouped((5, 10), (10, 4)) == 2 * 5 * 10 * 4
    assert _grouped((3, 10, 4), (3, 4, 5)) == 3 * 2 * 10 * 4 * 5


def test_training_is_the_same_to_the_bit():
    ends = []
    for measured in (False, True):
        torch.manual_seed(1)
        model = make_model(dropout=0.1).train()
        measurement = ComputeMeasurement(every_n_steps=1) if measured else None
        if measurement is not None:
            measurement.start(model)
        loop(model, [ids(seed) for seed in range(4)], measurement)
        ends.append((model.state_dict(), torch.rand(3)))
    assert all(torch.equal(ends[0][0][name], value) for name, value in ends[1][0].items())
    assert torch.equal(ends[0][1], ends[1][1])


def test_inference_mode_is_counted_too():
    model = make_model().eval()
    with torch.no_grad():
        expected = model(ids()).logits
    flops = []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), OperationCounter() as counter:
            assert torch.equal(model(ids()).logits, expected)
        flops.append(counter.flops)
    assert flops == [2 * weights(model) * PLACES + 2 * LAYERS * ONE_PRODUCT] * 2


# -------------------------------------------------------------------- the measurement


def measured(batches, **options):
    model = make_model()
    measurement = ComputeMeasurement(**options)
    measurement.start(model)
    loop(model, batches, measurement)
    return measurement


def test_on_constant_shapes_the_estimate_is_the_exact_count():
    result = measured([ids(seed) for seed in range(6)]).stop()
    assert result.flops == pytest.approx(6 * counted(make_model()).flops, rel=1e-12)
    assert (result.sampled_steps, result.steps, result.tokens) == (1, 6, 6 * PLACES)
    assert (result.flops_source, result.dtype, result.device) == ("counted", "float32", "cpu")
    assert result.parameters == result.trainable_parameters == sum(p.numel() for p in make_model().parameters())
    assert result.mfu is None


def test_mixed_lengths_are_estimated_closely():
    lengths = [20, 28, 22, 26, 24, 18, 30, 24]
    result = measured([ids(length=length) for length in lengths], every_n_steps=3).stop()
    exact = sum(counted(make_model(), ids(length=length)).flops for length in lengths)
    assert result.flops == pytest.approx(exact, rel=0.02)


def test_what_a_module_does_once_does_not_count_for_all():
    model = make_model()
    measurement = ComputeMeasurement()
    measurement.start(model)
    for n in range(8):
        with measurement.step(ids()):
            step(model, ids())
            if n == 0:
                step(model, ids())
    assert measurement.stop().flops == pytest.approx(8 * counted(make_model()).flops)


def test_steps_are_those_of_the_optimizer():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    measurement = ComputeMeasurement()
    measurement.start(model)
    for n in range(6):
        with measurement.step(batch_tokens=PLACES, supervised_tokens=7):
            step(model, ids())
            if n % 3 == 2:
                optimizer.step()
    optimizer.step()  # not in training
    result = measurement.stop()
    assert (result.steps, result.tokens, result.supervised_tokens) == (2, 6 * PLACES, 42)


def test_time_is_that_inside_steps_that_were_not_slowed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(compute, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    model = make_model()
    measurement = ComputeMeasurement(peak_flops=1e6)
    measurement.start(model)
    for n in range(1, 7):
        now[0] += 1000.0  # validation, loading
        with measurement.step(ids()):
            step(model, ids())
            now[0] += 50.0 if n == 1 else 2.0
        if n == 3:
            assert measurement.recent_tokens_per_second() == PLACES / 2.0
    result = measurement.stop()
    assert result.train_seconds == pytest.approx(12.0)
    assert result.tokens_per_second == pytest.approx(PLACES / 2.0)
    assert result.mfu == pytest.approx(result.flops / 12.0 / 1e6)


def test_resumed_runs_add_up():
    whole = measured([ids(seed) for seed in range(6)]).stop()
    first = measured([ids(seed) for seed in range(3)])
    state = copy.deepcopy(first.state_dict())
    model = make_model()
    second = ComputeMeasurement()
    second.load_state_dict(state)
    second.start(model)
    loop(model, [ids(seed) for seed in range(3)], second)
    result = second.stop()
    same = ("flops", "tokens", "steps", "sampled_steps", "parameters")
    assert {name: getattr(result, name) for name in same} == {name: getattr(whole, name) for name in same}
    assert result.train_seconds > first.result().train_seconds
    assert result.peak_memory_bytes >= first.result().peak_memory_bytes


def test_a_step_that_fails_leaves_nothing_behind():
    measurement = ComputeMeasurement()
    measurement.start(make_model())
    with pytest.raises(RuntimeError, match="out of memory"), measurement.step(ids()):
        raise RuntimeError("out of memory")
    assert _get_current_dispatch_mode() is None
    with pytest.raises(ConfigError, match="no training step"):
        measurement.stop()


def test_batches_of_other_kinds_are_scaled_by_number():
    model = torch.nn.Linear(8, 4)
    measurement = ComputeMeasurement()
    measurement.start(model)
    measurement.begin_step()
    model(torch.ones(2, 8)).sum().backward()
    with pytest.warns(UserWarning, match="token places of a Tensor aren't known"):
        measurement.end_step(torch.ones(2, 8))
    for _ in range(2):
        with measurement.step(torch.ones(2, 8)):
            model(torch.ones(2, 8)).sum().backward()
    result = measurement.stop()
    assert result.flops == 3 * (2 * 2 * 8 * 4) * 2  # forward and the weight's gradient
    assert (result.tokens, result.flops_per_token, result.tokens_per_second) == (0, None, None)


def test_compiled_models_take_the_formula():
    model = make_model()
    compiled = torch.compile(model, backend="eager")
    assert (is_compiled(model), is_compiled(compiled)) == (False, True)
    measurement = ComputeMeasurement()
    measurement.start(compiled)
    for _ in range(2):
        with measurement.step(ids()):
            assert _get_current_dispatch_mode() is None
    result = measurement.stop()
    assert (result.flops_source, result.sampled_steps) == ("formula", 0)
    assert result.flops == pytest.approx(2 * PLACES * formula_flops_per_token(model, LENGTH))
    # what is counted has the fused kernel's seventh product on top
    assert result.flops == pytest.approx(2 * (counted(model).flops - LAYERS * ONE_PRODUCT))
    with measurement.step(batch_tokens=PLACES, rows=ROWS):
        pass
    with pytest.raises(ConfigError, match="formula by token place"), measurement.step(torch.ones(2)):
        pass


def test_formula_of_an_adapter_is_near_the_count():
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(make_model(), config)
    assert formula_flops_per_token(model, LENGTH) * PLACES == pytest.approx(counted(model).flops, rel=0.1)
    with pytest.raises(ConfigError, match="the formula needs a transformers model"):
        ComputeMeasurement().start(torch.compile(torch.nn.Linear(2, 2)))


def test_tokens_of_batches():
    example = Example(torch.arange(5), torch.arange(5) >= 3)
    answer = Example(torch.tensor([7, 8]), torch.tensor([True, True]))
    preferences = PreferenceBatch(
        [torch.arange(3)], [(answer, answer)], torch.tensor([True, False]), None, torch.tensor([0])
    )
    prompts = PromptBatch(["a", "b"], [torch.arange(3), torch.arange(4)], {})
    assert tokens_of(collate_examples([example, answer], packing=False)) == (10, 3)
    assert tokens_of(preferences) == (7, 4)
    assert tokens_of(prompts, SimpleNamespace(lengths=[2, 5])) == (14, 7)
    assert tokens_of([ids(), None]) == (PLACES, 0)
    assert [tokens_of(other) for other in ("text", None, [], {"x": ids()}, torch.ones(2, 2))] == [None] * 5


def test_peak_memory_sees_what_was_freed():
    memory = PeakMemory(torch.device("cpu"))
    before = memory.peak()
    size = 256 * 2**20
    block = torch.ones(size // 4)
    del block
    peak = memory.peak()
    assert peak - before >= 0.9 * size
    assert memory.kind in ("resident", "process")
    if memory.kind == "resident":  # the peak is started anew
        assert PeakMemory(torch.device("cpu")).peak() < peak - size // 2


def test_without_proc_it_is_the_whole_process(monkeypatch, tmp_path):
    monkeypatch.setattr("lightning_ft.evaluation.compute.memory._STATUS", tmp_path / "none")
    memory = PeakMemory(torch.device("cpu"))
    assert memory.kind == "process"
    assert memory.peak() >= memory.at_start > 0


def test_all_ranks_are_asked(monkeypatch):
    measurement = measured([ids()])
    own = measurement.result()

    def gather(every, result):
        every[:] = [result, result]

    for name, value in {"is_initialized": True, "get_rank": 0, "get_world_size": 2}.items():
        monkeypatch.setattr(compute.dist, name, lambda value=value: value)
    monkeypatch.setattr(compute.dist, "all_gather_object", gather)
    both = measurement.stop()
    assert isinstance(both, ComputeResult)
    assert (both.ranks, both.tokens, both.flops, both.steps) == (2, 2 * own.tokens, 2 * own.flops, own.steps)


def test_wrong_use_is_refused():
    for options in ({"every_n_steps": 0}, {"peak_flops": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            ComputeMeasurement(**options)
    with pytest.raises(ConfigError, match="start"), ComputeMeasurement().step(ids()):
        pass
    measurement = ComputeMeasurement()
    measurement.start(make_model())
    with pytest.raises(ConfigError, match="without begin_step"):
        measurement.end_step(ids())
