"""Predrawn completions, engines that return them, and modules that record what they compute from them."""

import torch

from lightning_ft._lightning import Trainer
from lightning_ft.data.batches import PromptBatch
from lightning_ft.rollout.protocol import Completion, Rollouts

END = 2  # the tiny tokenizer's end token


class ReplayEngine:
    """Engine that returns predrawn rollouts in a cycle."""

    def __init__(self, rollouts):
        self.rollouts, self.calls = rollouts, 0

    def generate(self, prompts, *, max_new_tokens, sampling=None, num_completions=1, on_answered=None):
        rollout = self.rollouts[self.calls % len(self.rollouts)]
        self.calls += 1
        assert len(rollout.completions) == len(prompts) * num_completions
        return rollout


class EngineOfPrompts:
    """Engine whose completions depend on the prompt only, whatever its rank and batch."""

    def __init__(self, longest):
        self.longest = longest

    def generate(self, prompts, *, max_new_tokens, sampling=None, num_completions=1, on_answered=None):
        answers = [draw_rollout(num_completions, seed=sum(ids) % 1009, longest=self.longest) for ids in prompts]
        return Rollouts(tuple(completion for answer in answers for completion in answer.completions), 0, 0)


def draw_prompts(count, *, seed=0, columns=None):
    """A batch of prompts of 2 to 8 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 9, (count,), generator=generator).tolist()
    ids = [torch.randint(4, 300, (length,), generator=generator) for length in lengths]
    return PromptBatch([f"prompt {seed} {i}" for i in range(count)], ids, columns or {})


def draw_rollout(count, *, seed=0, longest=9):
    """Completions of 1 to `longest` tokens; those of the full length are truncated."""
    generator = torch.Generator().manual_seed(100 + seed)
    completions = []
    for number in range(count):
        length = 1 + int(torch.randint(longest, (), generator=generator))
        length = longest if number % 4 == 1 else length  # so that each type occurs
        tokens = torch.randint(4, 300, (length,), generator=generator).tolist()
        cut = length == longest
        completions.append(Completion(tuple(tokens if cut else [*tokens[:-1], END]), truncated=cut))
    return Rollouts(tuple(completions), 0, 0)


def run(module, batches, options, *, rollouts=None, validation=None, **more):
    """Fit a module on prompt batches, with sampled or predrawn completions."""
    if rollouts is not None:
        module._engine = ReplayEngine(rollouts)
    trainer = Trainer(**{**options, "max_epochs": 1, **more})
    own = torch.Generator()  # a plain loader draws from the global stream
    loaders = [
        torch.utils.data.DataLoader(part, batch_size=None, generator=own) for part in (batches, validation) if part
    ]
    trainer.fit(module, *loaders)
    return trainer


def gradients(module):
    """Full tensors, also of a sharded model."""
    return {name: _whole(p.grad).clone() for name, p in module.named_parameters() if p.grad is not None}


def weights(module):
    """Copies of the trainable weights, also of a sharded model."""
    return {name: _whole(p.detach()).clone() for name, p in module.named_parameters() if p.requires_grad}


def _whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def largest_difference(ours, theirs):
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)


class Records:
    """Mixin for a policy module: records inputs, unrounded metrics and final gradients of each step."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.advantages, self.results, self.gradients, self.samples = [], [], [], []

    def roll_out(self, batch):
        rollout_batch = super().roll_out(batch)
        self.samples.append([tuple(c.input_ids.tolist()) for c in rollout_batch.completions])
        return rollout_batch

    def estimate_advantages(self, rollout_batch):
        super().estimate_advantages(rollout_batch)
        self.advantages.append(torch.tensor([float(a.mean()) for a in rollout_batch.advantages]))
        self.rollout_batch = rollout_batch

    def compute_loss(self, batch):
        result = super().compute_loss(batch)
        self.results.append((batch, result))
        return result

    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)
        self.gradients.append(gradients(self))


class WithSGD:
    """Mixin for a module: plain SGD, whose steps show the size of gradients."""

    def _optimizer(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(trained, lr=self.hparams["learning_rate"])
