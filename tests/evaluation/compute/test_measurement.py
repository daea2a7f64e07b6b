"""Counted operations against formulas by hand, and the measurement of training loops."""

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
from lightning_ft.evaluation.compute.batch_size import count_tokens
from lightning_ft.evaluation.compute.measurement import ComputeMeasurement
from lightning_ft.evaluation.compute.memory import PeakMemory
from lightning_ft.models.flops import OperationCounter, formula_flops_per_token, is_compiled
from lightning_ft.models.head import completion_logprobs

ROWS, LENGTH, HEADS, HEAD_DIM, LAYERS, VOCABULARY = 3, 24, 4, 8, 2, 400
POSITIONS = ROWS * LENGTH
ONE_PRODUCT = 2 * ROWS * HEADS * LENGTH**2 * HEAD_DIM  # attention scores of one layer, or their product with the values


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
    """A training loop of one step per batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for batch in batches:
        with measurement.step(batch) if measurement is not None else torch.enable_grad():
            step(model, batch)
            optimizer.step()
            optimizer.zero_grad()


# -------------------------------------------------------------------- operators


def test_counter_counts_six_per_weight_and_token_and_seven_attention_products():
    counter = counted(make_model())
    assert counter.flops == 6 * weights(make_model()) * POSITIONS + 7 * LAYERS * ONE_PRODUCT
    assert counter.uncounted == ()
    assert counter.saw_attention


def test_counter_counts_four_per_frozen_weight_and_six_per_adapter_weight():
    model = get_peft_model(make_model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    expected = 7 * LAYERS * ONE_PRODUCT
    for name, module in linears(model).items():
        first = ".layers.0.self_attn." in name and ".o_proj" not in name  # nothing before it is trained
        per_weight = 2 + 2 * ("lora_" in name) + 2 * ("lora_B" in name or not first)
        expected += per_weight * module.weight.numel() * POSITIONS
    assert counted(model).flops == expected


def test_counter_agrees_on_eager_attention_except_for_recomputed_scores():
    eager = make_model()
    eager.set_attn_implementation("eager")
    fused, plain = counted(make_model()), counted(eager)
    assert plain.flops == 6 * weights(eager) * POSITIONS + 6 * LAYERS * ONE_PRODUCT
    assert fused.flops - plain.flops == LAYERS * ONE_PRODUCT
    with torch.no_grad(), OperationCounter() as fused_forward:
        make_model()(ids())
    with torch.no_grad(), OperationCounter() as eager_forward:
        eager(ids())
    assert fused_forward.flops == eager_forward.flops


def test_counter_includes_gradient_checkpointing():
    model = make_model().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    forward = 2 * sum(m.weight.numel() for n, m in linears(model).items() if n != "lm_head") * POSITIONS
    forward += 2 * LAYERS * ONE_PRODUCT
    once = counted(make_model()).flops
    # each layer once more, except its last product, which nothing later needs
    last = 2 * LAYERS * model.model.layers[0].mlp.down_proj.weight.numel() * POSITIONS
    assert once + forward - last <= counted(model).flops <= once + forward


def test_counter_includes_the_head_at_supervised_positions_only():
    example = Example(torch.arange(20), torch.arange(20) >= 15)
    batch = collate_examples([example, example])
    model = make_model()
    head = model.lm_head.weight.numel()
    completion_logprobs(model, batch, reduction="sum")  # the first call asks the model where its hidden states are
    with OperationCounter() as counter:
        (-completion_logprobs(model, batch, reduction="sum").logprobs).backward()
    positions = 40  # in two rows: in a single row there would be as much padding, and more attention
    attention = 7 * LAYERS * 2 * HEADS * 2 * 20**2 * HEAD_DIM
    layers = 6 * (weights(model) - head) * positions
    assert counter.flops == layers + 6 * head * 10 + attention


@torch.library.custom_op("lightning_ft_tests::flash_attn_varlen", mutates_args=())
def unknown_attention(q: torch.Tensor) -> torch.Tensor:
    return q * 2


def test_counter_names_attention_without_a_formula():
    with OperationCounter() as counter:
        unknown_attention(torch.ones(3))
        torch.ones(3, 2) @ torch.ones(2, 5)
    assert counter.uncounted == ("lightning_ft_tests::flash_attn_varlen",)
    assert counter.flops == 60


def test_measurement_names_a_kernel_that_bypasses_the_dispatcher(monkeypatch):
    model = make_model()
    model.set_attn_implementation("eager")
    measurement = ComputeMeasurement()
    measurement.start(model)
    loop(model, [ids()], measurement)
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.warns(UserWarning, match="flash_attention_2, whose operations no formula counts"):
        assert measurement.stop().uncounted == ("flash_attention_2",)


def test_grouped_counts_products_of_experts():
    from lightning_ft.models.flops import _grouped

    assert _grouped((10, 4), (3, 4, 5)) == 2 * 10 * 4 * 5  # tokens shared out over three experts
    assert _grouped((5, 10), (10, 4)) == 2 * 5 * 10 * 4
    assert _grouped((3, 10, 4), (3, 4, 5)) == 3 * 2 * 10 * 4 * 5


def test_measurement_leaves_training_bitwise_equal():
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


def test_counter_works_in_inference_mode():
    model = make_model().eval()
    with torch.no_grad():
        expected = model(ids()).logits
    flops = []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), OperationCounter() as counter:
            assert torch.equal(model(ids()).logits, expected)
        flops.append(counter.flops)
    assert flops == [2 * weights(model) * POSITIONS + 2 * LAYERS * ONE_PRODUCT] * 2


# -------------------------------------------------------------------- the measurement


def measured(batches, **options):
    model = make_model()
    measurement = ComputeMeasurement(**options)
    measurement.start(model)
    loop(model, batches, measurement)
    return measurement


def test_measurement_is_exact_for_constant_shapes():
    result = measured([ids(seed) for seed in range(6)]).stop()
    assert result.flops == pytest.approx(6 * counted(make_model()).flops, rel=1e-12)
    assert (result.sampled_steps, result.steps, result.tokens) == (1, 6, 6 * POSITIONS)
    assert (result.flops_source, result.dtype, result.device) == ("counted", "float32", "cpu")
    assert result.parameters == result.trainable_parameters == sum(p.numel() for p in make_model().parameters())
    assert result.mfu is None


def test_measurement_estimates_mixed_lengths_closely():
    lengths = [20, 28, 22, 26, 24, 18, 30, 24]
    result = measured([ids(length=length) for length in lengths], every_n_steps=3).stop()
    exact = sum(counted(make_model(), ids(length=length)).flops for length in lengths)
    assert result.flops == pytest.approx(exact, rel=0.02)


def test_measurement_ignores_one_time_work_of_the_first_step():
    model = make_model()
    measurement = ComputeMeasurement()
    measurement.start(model)
    for n in range(8):
        with measurement.step(ids()):
            step(model, ids())
            if n == 0:
                step(model, ids())
    assert measurement.stop().flops == pytest.approx(8 * counted(make_model()).flops)


def test_measurement_counts_optimizer_steps():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    measurement = ComputeMeasurement()
    measurement.start(model)
    for n in range(6):
        with measurement.step(batch_tokens=POSITIONS, supervised_tokens=7):
            step(model, ids())
            if n % 3 == 2:
                optimizer.step()
    optimizer.step()  # not in training
    result = measurement.stop()
    assert (result.steps, result.tokens, result.supervised_tokens) == (2, 6 * POSITIONS, 42)


def test_measurement_takes_time_of_uncounted_steps(monkeypatch):
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
            assert measurement.recent_tokens_per_second() == POSITIONS / 2.0
    result = measurement.stop()
    assert result.train_seconds == pytest.approx(12.0)
    assert result.tokens_per_second == pytest.approx(POSITIONS / 2.0)
    assert result.mfu == pytest.approx(result.flops / 12.0 / 1e6)


def test_measurement_adds_up_over_resumed_runs():
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


def test_measurement_discards_a_failed_step():
    measurement = ComputeMeasurement()
    measurement.start(make_model())
    with pytest.raises(RuntimeError, match="out of memory"), measurement.step(ids()):
        raise RuntimeError("out of memory")
    assert _get_current_dispatch_mode() is None
    with pytest.raises(ConfigError, match="no training step"):
        measurement.stop()


def test_measurement_scales_unknown_batches_by_number():
    model = torch.nn.Linear(8, 4)
    measurement = ComputeMeasurement()
    measurement.start(model)
    measurement.begin_step()
    model(torch.ones(2, 8)).sum().backward()
    with pytest.warns(UserWarning, match="token positions of a Tensor aren't known"):
        measurement.end_step(torch.ones(2, 8))
    for _ in range(2):
        with measurement.step(torch.ones(2, 8)):
            model(torch.ones(2, 8)).sum().backward()
    result = measurement.stop()
    assert result.flops == 3 * (2 * 2 * 8 * 4) * 2  # forward and the weight's gradient
    assert (result.tokens, result.flops_per_token, result.tokens_per_second) == (0, None, None)


def test_measurement_uses_the_formula_for_compiled_models():
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
    assert result.flops == pytest.approx(2 * POSITIONS * formula_flops_per_token(model, LENGTH))
    # the count also includes the seventh product of the fused kernel
    assert result.flops == pytest.approx(2 * (counted(model).flops - LAYERS * ONE_PRODUCT))
    with measurement.step(batch_tokens=POSITIONS, rows=ROWS):
        pass
    with pytest.raises(ConfigError, match="formula per token position"), measurement.step(torch.ones(2)):
        pass


def test_formula_flops_of_an_adapter_are_near_the_count():
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(make_model(), config)
    assert formula_flops_per_token(model, LENGTH) * POSITIONS == pytest.approx(counted(model).flops, rel=0.1)
    with pytest.raises(ConfigError, match="the formula needs a transformers model"):
        ComputeMeasurement().start(torch.compile(torch.nn.Linear(2, 2)))


def test_count_tokens_of_each_batch_type():
    example = Example(torch.arange(5), torch.arange(5) >= 3)
    answer = Example(torch.tensor([7, 8]), torch.tensor([True, True]))
    preferences = PreferenceBatch(
        [torch.arange(3)], [(answer, answer)], torch.tensor([True, False]), None, torch.tensor([0])
    )
    prompts = PromptBatch(["a", "b"], [torch.arange(3), torch.arange(4)], {})
    assert count_tokens(collate_examples([example, answer], packing=False)) == (10, 3)
    assert count_tokens(preferences) == (7, 4)
    assert count_tokens(prompts, SimpleNamespace(lengths=[2, 5])) == (14, 7)
    assert count_tokens([ids(), None]) == (POSITIONS, 0)
    assert [count_tokens(other) for other in ("text", None, [], {"x": ids()}, torch.ones(2, 2))] == [None] * 5


def test_peak_memory_includes_freed_memory():
    memory = PeakMemory(torch.device("cpu"))
    before = memory.peak()
    size = 256 * 2**20
    block = torch.ones(size // 4)
    del block
    peak = memory.peak()
    assert peak - before >= 0.9 * size
    assert memory.source in ("resident", "process")
    if memory.source == "resident":  # the peak is reset
        assert PeakMemory(torch.device("cpu")).peak() < peak - size // 2


def test_peak_memory_falls_back_to_the_whole_process(monkeypatch, tmp_path):
    monkeypatch.setattr("lightning_ft.evaluation.compute.memory._STATUS", tmp_path / "none")
    memory = PeakMemory(torch.device("cpu"))
    assert memory.source == "process"
    assert memory.peak() >= memory.at_start > 0


def test_stop_combines_all_ranks(monkeypatch):
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


def test_measurement_refuses_wrong_use():
    for options in ({"every_n_steps": 0}, {"peak_flops": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            ComputeMeasurement(**options)
    with pytest.raises(ConfigError, match="start"), ComputeMeasurement().step(ids()):
        pass
    measurement = ComputeMeasurement()
    measurement.start(make_model())
    with pytest.raises(ConfigError, match="without begin_step"):
        measurement.end_step(ids())
