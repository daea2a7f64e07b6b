"""Log-probabilities of the supervised tokens, forward and backward: ours, TRL's kernel, and plain logits.

    python benchmarks/head.py
    python benchmarks/head.py --only "frozen, vocabulary 152,000" --pairs 9 --json head.json

A quarter of 2,048 positions are supervised. With a frozen head (LoRA) only the hidden states get a gradient, with a
trained one (full fine-tuning) the head too. The peers:

- ``TRL``: what SFTTrainer does on a CPU: its kernel at every position, with entropy and accuracy.
- ``TRL's kernel (supervised)``: the same kernel at supervised positions only, without entropy and accuracy, as
  TRL could do.
- ``logits``: logits at every position and cross-entropy with ``ignore_index``, as transformers does.
- ``logits (supervised)``: logits at supervised positions only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from harness import Repeat, arguments, compare_each
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from lightning_ft.losses.logprobs import linear_logprob_sum, linear_logprobs

AGREE = {"loss": 1e-5, "gradient": 1e-5, "elsewhere": 0.0, "head_gradient": 1e-5}
STD = 0.02  # standard deviation of the head's weights, as transformers initializes them
TRL_CHUNK = 32_768  # vocabulary tokens per chunk: trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE


@dataclass(frozen=True)
class Case:
    """A head and its inputs.

    Args:
        vocabulary: Number of tokens in the vocabulary.
        hidden: Width of the hidden states.
        trained: Whether the head needs a gradient.
        function: Our function: ``sum`` (`linear_logprob_sum`, for SFT) or ``each`` (`linear_logprobs`, for RLHF).
        tokens: Number of positions.
        supervised: Share of positions that are supervised.
    """

    vocabulary: int
    hidden: int
    trained: bool
    function: str = "sum"
    tokens: int = 2048
    supervised: float = 0.25

    def __str__(self) -> str:
        return (
            f"{'trained' if self.trained else 'frozen'}, vocabulary {self.vocabulary:,}, hidden {self.hidden}, "
            f"{int(self.tokens * self.supervised)} of {self.tokens} positions, {self.function}"
        )

    def inputs(self) -> Inputs:
        """Draw the inputs, the same for equal cases."""
        generator = torch.Generator().manual_seed(0)
        count = int(self.tokens * self.supervised)
        positions = torch.randperm(self.tokens, generator=generator)[:count].sort().values
        labels = torch.full((self.tokens,), -100)
        labels[positions] = torch.randint(self.vocabulary, (count,), generator=generator)
        hidden = torch.randn(self.tokens, self.hidden, generator=generator).requires_grad_()
        weight = torch.randn(self.vocabulary, self.hidden, generator=generator).mul_(STD).requires_grad_(self.trained)
        return Inputs(hidden, weight, labels, positions)


@dataclass(frozen=True)
class Inputs:
    """Inputs of all contenders.

    Args:
        hidden: Hidden states, ``[t, d]``.
        weight: Weight of the head, ``[v, d]``.
        labels: Target at each position, -100 where there is none, ``[t]``.
        positions: Supervised positions, ``[n]``.
    """

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    positions: Tensor


Loss = Callable[[Inputs], Tensor]


def _summed(inputs: Inputs) -> Tensor:
    states, targets = inputs.hidden.index_select(0, inputs.positions), inputs.labels[inputs.positions]
    return -linear_logprob_sum(states, inputs.weight, targets).logprobs / len(targets)


def _each(inputs: Inputs) -> Tensor:
    states, targets = inputs.hidden.index_select(0, inputs.positions), inputs.labels[inputs.positions]
    return -linear_logprobs(states, inputs.weight, targets).logprobs.mean()


def _trl(inputs: Inputs) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction  # imported here, so that our process doesn't load TRL

    outputs = ("log_probs", "entropy", "is_top1")
    logprobs, *_ = ChunkedLogProbFunction.apply(
        inputs.hidden, inputs.weight, None, inputs.labels.clamp(min=0), 1.0, TRL_CHUNK, None, 1.0, outputs
    )
    return -logprobs.masked_fill(inputs.labels == -100, 0).sum() / len(inputs.positions)


def _trl_supervised(inputs: Inputs) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    supervised = inputs.labels != -100
    logprobs, *_ = ChunkedLogProbFunction.apply(
        inputs.hidden[supervised],
        inputs.weight,
        None,
        inputs.labels[supervised],
        1.0,
        TRL_CHUNK,
        None,
        1.0,
        ("log_probs",),
    )
    return -logprobs.mean()


def _logits(inputs: Inputs) -> Tensor:
    return cross_entropy(linear(inputs.hidden, inputs.weight), inputs.labels, ignore_index=-100)


def _logits_supervised(inputs: Inputs) -> Tensor:
    return cross_entropy(linear(inputs.hidden[inputs.positions], inputs.weight), inputs.labels[inputs.positions])


PEERS: dict[str, Loss] = {
    "TRL": _trl,
    "TRL's kernel (supervised)": _trl_supervised,
    "logits": _logits,
    "logits (supervised)": _logits_supervised,
}


def ours(case: Case) -> Repeat:
    """Build this project's contender."""
    return _build({"sum": _summed, "each": _each}[case.function], case)


def peer(name: str, case: Case) -> Repeat:
    """Build a peer, see :data:`PEERS`."""
    import trl.trainer.utils  # noqa: F401  (the kernel's backward pass would import it, and count its memory)

    return _build(PEERS[name], case)


def _build(loss: Loss, case: Case) -> Repeat:
    inputs = case.inputs()
    # gradients are about STD / n in size; scaled to about 1, so that one tolerance fits all sizes
    scale = len(inputs.positions) / STD
    elsewhere = inputs.labels == -100
    rows = torch.cat(
        [inputs.labels[inputs.positions[:8]], torch.arange(0, case.vocabulary, 997)]
    )  # a sample of rows is enough to compare

    def repeat() -> dict[str, Tensor]:
        inputs.hidden.grad = inputs.weight.grad = None
        value = loss(inputs)
        value.backward()
        gradient = inputs.hidden.grad
        head = inputs.weight.grad[rows] * len(inputs.positions) if case.trained else torch.zeros(0)
        return {
            "loss": value.detach(),
            "gradient": gradient[inputs.positions] * scale,
            "elsewhere": gradient[elsewhere].abs().max(),
            "head_gradient": head,
        }

    return repeat


def cases() -> list[Case]:
    """List all cases."""
    return [
        Case(vocabulary, hidden, trained, function)
        for vocabulary in (32_000, 152_000)
        for hidden in (256, 576)
        for trained in (False, True)
        for function in ("sum", "each")
    ]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--peers", default=",".join(PEERS), help="contenders to compare with, separated by commas")
    parser.add_argument("--tiny", action="store_true", help="a small size, as a quick check that everything runs")
    args = parser.parse_args()
    tiny = [Case(4000, 64, trained, function, 256) for trained in (False, True) for function in ("sum", "each")]
    peers = {name: partial(peer, name) for name in args.peers.split(",")}
    compare_each("head", tiny if args.tiny else cases(), ours, peers, args, agree=lambda case: AGREE)


if __name__ == "__main__":
    main()
