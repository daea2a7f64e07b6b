"""Rows, modules and expected metrics shared by the tests of DPO and KTO."""

import torch
from preference_runs import Records, make_labeled, make_pairs
from tiny import make_tokenizer

from lightning_ft import DPO, KTO, PreferenceDataModule
from lightning_ft.data.batches import PreferenceBatch

LORA = {"r": 4, "lora_dropout": 0.3}
PAIRS = make_pairs(20)  # with eight rows per step the last step is shorter: 8, 8, 4
LABELED = make_labeled(20)


class RecordingDPO(Records, DPO):
    pass


class RecordingKTO(Records, KTO):
    pass


def shake(module, std=0.05):
    """Add noise to the trainable parameters."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.model.parameters():
            if parameter.requires_grad:
                parameter += std * torch.randn(parameter.shape, generator=generator)


def batches(rows, batch_size=8):
    data = PreferenceDataModule(rows, tokenizer=make_tokenizer(), batch_size=batch_size, shuffle=False, cache_dir=False)
    data.setup("fit")
    return list(data.train_dataloader())


def plain_logprobs(model, batch):
    """Summed log-probability, entropy of each token and length of each completion, one by one with transformers."""
    sums, entropies, lengths = [], [], []
    for prompt, completions in zip(batch.prompts, batch.completions, strict=True):
        for completion in completions:
            ids = torch.cat([prompt, completion.input_ids])
            logprobs = model(ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)[len(prompt) - 1 :]
            logprobs = logprobs[completion.supervised]  # [tokens, v]
            sums.append(logprobs.gather(-1, completion.input_ids[completion.supervised][:, None]).sum())
            entropies += (-(logprobs.exp() * logprobs).sum(-1)).tolist()
            lengths.append(len(logprobs))
    return torch.stack(sums), torch.tensor(entropies), torch.tensor(lengths)


def mismatched(batch):
    """Each prompt with the completions of the previous prompt."""
    completions = [batch.completions[i - 1] for i in range(len(batch))]
    return PreferenceBatch(batch.prompts, completions, batch.labels, None, batch.rows)


def assert_metrics(result, expected):
    assert result.metrics.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(result.metrics[name], value, rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
