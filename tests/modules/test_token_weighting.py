"""The loss of an optimizer step is the mean over its supervised tokens, however they are batched."""

import pytest
import torch
from recording import RecordsGradients
from tiny import make_model, make_rows, make_tokenizer

from lightning_ft import FullFineTuning, LoRAFineTuning

ROWS = make_rows(20)  # with eight rows per step, the last accumulation window is short: 8, 8, 4


class RecordingFull(RecordsGradients, FullFineTuning):
    pass


class RecordingLoRA(RecordsGradients, LoRAFineTuning):
    pass


def gradients(fit, kind, folder, **options):
    data = {name: options.pop(name) for name in ("batch_size", "packing") if name in options}
    module = kind(folder, dtype="float32", learning_rate=1e-3, lr_schedule="constant", warmup_ratio=0.0)
    fit(module, ROWS, data=data, **options)
    return module.steps


@pytest.mark.parametrize("kind", [RecordingFull, RecordingLoRA])
def test_sft_gradients_do_not_depend_on_micro_batches(fit, model_folder, kind):
    expected = gradients(fit, kind, model_folder, batch_size=8, packing=False)
    assert len(expected) == 3
    ways = {
        "packed": {"batch_size": 8},
        "8x1": {"batch_size": 1, "accumulate_grad_batches": 8},
        "2x4": {"batch_size": 2, "accumulate_grad_batches": 4},
        "8x1 unpacked": {"batch_size": 1, "accumulate_grad_batches": 8, "packing": False},
        "4x2 unpacked": {"batch_size": 4, "accumulate_grad_batches": 2, "packing": False},
    }
    for name, way in ways.items():
        got = gradients(fit, kind, model_folder, **way)
        assert len(got) == 3, name
        for step, (want, have) in enumerate(zip(expected, got, strict=True)):
            assert want.keys() == have.keys()
            # Relative to the largest entry if that is above 1: the last bit depends on the machine's matrix-product
            # kernels, and AdamW carries it from step to step.
            worst = max(float((want[key] - have[key]).abs().max() / want[key].abs().max().clamp(min=1)) for key in want)
            assert worst <= 1e-6, f"{name}, step {step}: {worst}"


def test_first_step_matches_the_gradient_of_the_mean_loss(fit, model_folder):
    """Against transformers' own loss over the eight rows, one row at a time."""
    got = gradients(fit, RecordingFull, model_folder, batch_size=8)[0]
    model, tokenizer = make_model(), make_tokenizer()
    total, count = torch.zeros(()), 0
    for row in ROWS[:8]:
        messages = [{"role": "user", "content": row["input"]}, {"role": "assistant", "content": row["output"]}]
        ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=False)
        prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
        end = ids[0].tolist().index(tokenizer.eos_token_id, len(prompt)) + 1  # the template's newline isn't supervised
        logprobs = model(ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        picked = logprobs.gather(-1, ids[0, 1:, None])[len(prompt) - 1 : end - 1]
        total, count = total - picked.sum(), count + len(picked)
    (total / count).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[f"model.{name}"], parameter.grad, rtol=0, atol=1e-6)


def test_gradients_are_clipped_after_token_weighting(fit, model_folder):
    module = RecordingFull(model_folder, learning_rate=1e-3)
    fit(module, ROWS, data={"batch_size": 4}, gradient_clip_val=1e-3, max_steps=1)
    norm = torch.nn.utils.get_total_norm(list(module.clipped[0].values()))
    torch.testing.assert_close(norm, torch.tensor(1e-3), rtol=1e-3, atol=0)
    assert torch.nn.utils.get_total_norm(list(module.steps[0].values())) > 1e-2


def test_token_weighting_follows_an_accumulation_scheduler(fit, model_folder):
    from lightning_ft import _lightning

    scheduler = _lightning._pl.callbacks.GradientAccumulationScheduler({0: 4, 1: 2})
    module = RecordingFull(model_folder, learning_rate=1e-3, lr_schedule="linear")
    fit(module, ROWS, data={"batch_size": 2}, callbacks=[scheduler], max_epochs=2)
    assert len(module.steps) == 3 + 5
    assert module._total_steps() == 8
    assert module.lr_schedulers().get_last_lr() == [0.0, 0.0]
