"""Token means and checkpoints in loops without a Trainer: Fabric's and hand-written ones."""

import pytest
import torch
from lightning_fabric import Fabric
from peft import LoraConfig, get_peft_model
from tiny import make_model, make_rows, make_tokenizer
from torch.utils.data import DataLoader, DistributedSampler

from lightning_ft import PairDataModule
from lightning_ft.checkpoint_file import read_checkpoint
from lightning_ft.data.resumable_loader import ResumableLoader
from lightning_ft.errors import CheckpointError, ConfigError
from lightning_ft.modules.loop_checkpoint import load_loop, save_loop
from lightning_ft.modules.token_mean import TokenMean

LENGTHS = (5, 9, 3, 12, 7, 4, 10, 6)


def adapted(r=4, dropout=0.1):
    torch.manual_seed(3)
    config = LoraConfig(r=r, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(make_model(), config)


def rows(vocabulary):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocabulary, (length,), generator=generator) for length in LENGTHS]


def collate(examples):
    ids = torch.nn.utils.rnn.pad_sequence(examples, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(e) for e in examples], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


class Loop:
    """A loop as people write it, with a loader, an adapter and dropout."""

    def __init__(self, fabric=None):
        self.fabric = fabric or Fabric(accelerator="cpu", devices=1)
        self.model = adapted()
        optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-2)
        self.module, self.optimizer = self.fabric.setup(self.model, optimizer)
        examples = rows(self.model.config.vocab_size)
        self.loader = ResumableLoader(DataLoader(examples, batch_size=2, shuffle=True, collate_fn=collate))

    def steps(self, save_after=None, path=None):
        self.module.train()
        for number, batch in enumerate(self.loader):
            self.fabric.backward(self.module(**batch).loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if number + 1 == save_after:
                save_loop(path, self.module, self.optimizer, self.loader, {"step": number + 1})
                return

    def weights(self):
        return {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_gradient_with_fabric_does_not_depend_on_micro_batches(micro_batch):
    fabric = Fabric(accelerator="cpu", devices=1)
    model = adapted(dropout=0.0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    module, fabric_optimizer = fabric.setup(model, optimizer)
    examples, mean = rows(model.config.vocab_size), TokenMean()
    batches = [collate(examples[i : i + micro_batch]) for i in range(0, len(examples), micro_batch)]
    for _ in range(2):  # the second step starts from zero again
        fabric_optimizer.zero_grad()
        for batch in batches:
            fabric.backward(mean.weigh(module(**batch).loss, batch))
        mean.divide(fabric_optimizer)
    found = [p.grad.clone() for p in model.parameters() if p.requires_grad]

    fabric_optimizer.zero_grad()
    model(**collate(examples)).loss.backward()
    expected = [p.grad for p in model.parameters() if p.requires_grad]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_loop_resumes_bit_for_bit(tmp_path):
    torch.manual_seed(5)
    whole = Loop()
    whole.steps()

    torch.manual_seed(5)
    Loop().steps(save_after=2, path=tmp_path / "loop.ckpt")
    torch.manual_seed(99)  # of another process
    resumed = Loop()
    assert load_loop(tmp_path / "loop.ckpt", resumed.module, resumed.optimizer, resumed.loader) == {"step": 2}
    resumed.steps()
    for name, weight in resumed.weights().items():
        assert torch.equal(weight, whole.weights()[name]), name


def test_checkpoint_of_a_loop_has_trainable_weights_only(tmp_path):
    loop = Loop()
    loop.steps(save_after=1, path=tmp_path / "loop.ckpt")
    assert set(read_checkpoint(tmp_path / "loop.ckpt")["state_dict"]) == set(loop.weights())


def test_load_loop_refuses_what_does_not_fit(tmp_path):
    path = tmp_path / "loop.ckpt"
    loop = Loop()
    loop.steps(save_after=1, path=path)
    with pytest.raises(CheckpointError, match="doesn't fit PeftModelForCausalLM"):
        load_loop(path, adapted(r=8), loop.optimizer)
    torch.save({"state_dict": loop.weights()}, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="wasn't written by save_loop: it has no loaders"):
        load_loop(tmp_path / "other.ckpt", loop.module, loop.optimizer)
    save_loop(path, loop.module, loop.optimizer)
    with pytest.raises(CheckpointError, match="has no position of a loader"):
        load_loop(path, loop.module, loop.optimizer, loop.loader)


def test_load_loop_changes_nothing_where_the_optimizer_differs(tmp_path):
    loop = Loop()
    loop.steps(save_after=1, path=tmp_path / "loop.ckpt")
    other = Loop()
    before = other.weights()
    groups = [{"params": [p]} for p in other.model.parameters() if p.requires_grad]
    with pytest.raises(CheckpointError, match=r"loop\.ckpt' doesn't fit SGD: .* different number of parameter groups"):
        load_loop(tmp_path / "loop.ckpt", other.module, torch.optim.SGD(groups, lr=0.1))
    assert all(torch.equal(weight, before[name]) for name, weight in other.weights().items())


def test_load_loop_refuses_weights_that_are_not_finite(tmp_path):
    loop = Loop()
    name, weight = next((n, p) for n, p in loop.model.named_parameters() if p.requires_grad)
    weight.data[0] = torch.nan
    save_loop(tmp_path / "loop.ckpt", loop.module, loop.optimizer)
    with pytest.raises(CheckpointError, match=f"has 1 weights with values that aren't finite .first: {name}"):
        load_loop(tmp_path / "loop.ckpt", loop.module, loop.optimizer)


@pytest.mark.parametrize("stop", [3, 6, 8])
def test_hand_written_loop_over_epochs_resumes_bit_for_bit(tmp_path, stop):
    """Within an epoch of 6 batches, at its end, and in the next one."""
    path = tmp_path / "loop.ckpt"

    def train(save_at=None, resume=False):
        model = adapted(dropout=0.1).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        data = PairDataModule(make_rows(12), tokenizer=make_tokenizer(), batch_size=2, batch_format="hf")
        data.setup("fit")
        loader, step, seen = data.train_dataloader(), 0, []
        torch.manual_seed(4)
        if resume:
            step = load_loop(path, model, optimizer, loader)["step"]
        while step < 14:
            for batch in loader:
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                seen.append(batch["input_ids"].tolist())
                if step == save_at:
                    save_loop(path, model, optimizer, loader, {"step": step})
                    return seen, model
                if step == 14:
                    break
        return seen, model

    seen, whole = train()
    assert sorted(map(str, seen[:6])) != sorted(map(str, seen[6:12]))  # each epoch has an order of its own
    train(save_at=stop)
    rest, resumed = train(resume=True)
    assert rest == seen[stop:]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_loop_over_epochs_starts_at_the_epoch_of_its_loader(tmp_path):
    def train(save_at=None, resume=False):
        weight = torch.nn.Parameter(torch.ones(()))
        optimizer, loader = torch.optim.SGD([weight], lr=0.1), ResumableLoader(DataLoader([1.0, 2.0], batch_size=1))
        model, step = torch.nn.Module(), 0
        model.weight = weight
        if resume:
            step = load_loop(tmp_path / "loop.ckpt", model, optimizer, loader)["step"]
        for _ in range(loader.state_dict()["epoch"], 3):
            for batch in loader:
                (weight * batch).sum().backward()
                optimizer.step()
                step += 1
                if step == save_at:
                    save_loop(tmp_path / "loop.ckpt", model, optimizer, loader, {"step": step})
                    return step
        return step

    for save_at in (1, 2, 3, 6):  # 2 is the last batch of an epoch
        assert train(save_at) == save_at
        assert train(resume=True) == train() == 6


def test_buffers_of_a_loop_are_restored(tmp_path):
    def norm():
        model = torch.nn.Sequential(torch.nn.BatchNorm1d(4))
        model[0].register_buffer("cache", torch.zeros(1), persistent=False)
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    (trained, optimizer), (fresh, other) = norm(), norm()
    trained(torch.arange(8.0).reshape(2, 4))
    save_loop(tmp_path / "loop.ckpt", trained, optimizer)
    load_loop(tmp_path / "loop.ckpt", fresh, other)
    assert torch.equal(fresh[0].running_mean, trained[0].running_mean)
    assert int(fresh[0].num_batches_tracked) == 1
    assert "0.cache" not in read_checkpoint(tmp_path / "loop.ckpt")["buffers"]


def test_save_loop_refuses_what_it_could_not_restore(tmp_path):
    loop = Loop()
    with pytest.raises(ConfigError, match=r"a DataLoader can't tell its position\. Wrap the DataLoader in Res"):
        save_loop(tmp_path / "loop.ckpt", loop.module, loop.optimizer, loop.loader.loader)
    with pytest.raises(ConfigError, match=r"values\['folder'\] is a PosixPath"):
        save_loop(tmp_path / "loop.ckpt", loop.module, loop.optimizer, values={"step": 1, "folder": tmp_path})
    loop.model.requires_grad_(False)
    with pytest.raises(ConfigError, match="no weight of PeftModelForCausalLM is trainable"):
        save_loop(tmp_path / "loop.ckpt", loop.module, loop.optimizer)
    assert not (tmp_path / "loop.ckpt").exists()


def test_loader_of_a_data_module_is_passed_as_it_is(tmp_path):
    data = PairDataModule(make_rows(8), tokenizer=make_tokenizer(), batch_size=2, cache_dir=False)
    data.setup("fit")
    loop, loader = Loop(), data.train_dataloader()
    for wrapped in (loader, loop.fabric.setup_dataloaders(loader)):
        with pytest.raises(ConfigError, match="A TokenLoader keeps its position itself"):
            ResumableLoader(wrapped)
    with pytest.raises(ConfigError, match=r"Pass the TokenLoader that fabric\.setup_dataloaders was called with"):
        save_loop(tmp_path / "loop.ckpt", loop.module, loop.optimizer, wrapped)
    save_loop(tmp_path / "loop.ckpt", loop.module, loop.optimizer, loader)


def test_loader_that_fabric_set_up_is_refused_where_it_counts_epochs_itself(tmp_path):
    loop, examples = Loop(), rows(7)
    sampler = DistributedSampler(examples, num_replicas=1, rank=0)
    with pytest.raises(ConfigError, match=r"from 0 in each run.* sampler\.set_epoch\(epoch\)"):
        ResumableLoader(loop.fabric.setup_dataloaders(DataLoader(examples, sampler=sampler)))
    plain = loop.fabric.setup_dataloaders(DataLoader(examples))
    with pytest.raises(ConfigError, match=r"a _FabricDataLoader can't tell its position.*fabric\.to_device moves them"):
        save_loop(tmp_path / "loop.ckpt", loop.module, loop.optimizer, plain)
    save_loop(tmp_path / "loop.ckpt", loop.module, loop.optimizer, ResumableLoader(plain))


def test_divide_refuses_gradients_of_micro_batches_that_it_divided_already():
    first, second = (torch.nn.Parameter(torch.ones(())) for _ in range(2))
    optimizers = [torch.optim.SGD([p], lr=1.0) for p in (first, second)]
    mean = TokenMean(count=len)
    mean.weigh(first * second, [1.0] * 4).backward()
    mean.divide(optimizers[0])
    with pytest.raises(ConfigError, match="one TokenMean for each"):  # and not the sum of four tokens
        mean.divide(optimizers[1])
