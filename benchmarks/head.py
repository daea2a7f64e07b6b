"""The supervised head alone, forward and backward: ours against TRL's kernel and against plain logits.

    python benchmarks/head.py
    python benchmarks/head.py --only "frozen, vocabulary 152,000" --pairs 9 --json head.json

A quarter of 2,048 places is supervised. With a frozen head (LoRA) the gradient goes to the hidden states alone, with a
trained one (all weights) to the head too. The peers:

- ``TRL``: what SFTTrainer does on a CPU, its kernel at every place, with entropy and accuracy.
- ``TRL's kernel there``: the same kernel at supervised places only, and for the log-probabilities alone, as TRL could.
- ``logits``: logits of every place and cross-entropy with ``ignore_index``, as transformers does.
- ``logits there``: logits of supervised places only.
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
STD = 0.02  # of the head's weights, as transformers initializes them
TRL_CHUNK = 32_768  # tokens of the vocabulary at a time: trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE


@dataclass(frozen=True)
class Case:
    """A head and its inputs.

    Args:
        vocabulary: Rows of the head.
        hidden: Its columns.
        trained: Whether the head needs a gradient.
        function: Ours: ``sum`` (`linear_logprob_sum`, what SFT runs) or ``each`` (`linear_logprobs`, for RLHF).
        tokens: Places.
        supervised: Share of them that are.
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
            f"{int(self.tokens * self.supervised)} of {self.tokens} places, {self.function}"
        )

    def inputs(self) -> Inputs:
        """The same for the same case."""
        generator = torch.Generator().manual_seed(0)
        count = int(self.tokens * self.supervised)
        places = torch.randperm(self.tokens, generator=generator)[:count].sort().values
        labels = torch.full((self.tokens,), -100)
        labels[places] = torch.randint(self.vocabulary, (count,), generator=generator)
        hidden = torch.randn(self.tokens, self.hidden, generator=generator).requires_grad_()
        weight = torch.randn(self.vocabulary, self.hidden, generator=generator).mul_(STD).requires_grad_(self.trained)
        return Inputs(hidden, weight, labels, places)


@dataclass(frozen=True)
class Inputs:
    """What every contender gets.

    Args:
        hidden: ``[t, d]``.
        weight: ``[v, d]``.
        labels: Target of each place, -100 where there is none, ``[t]``.
        places: Supervised places, ``[n]``.
    """

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    places: Tensor


Loss = Callable[[Inputs], Tensor]


def _summed(given: Inputs) -> Tensor:
    states, targets = given.hidden.index_select(0, given.places), given.labels[given.places]
    return -linear_logprob_sum(states, given.weight, targets).logprobs / len(targets)


def _each(given: Inputs) -> Tensor:
    states, targets = given.hidden.index_select(0, given.places), given.labels[given.places]
    return -linear_logprobs(states, given.weight, targets).logprobs.mean()


def _trl(given: Inputs) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction  # here, so that our side's process doesn't hold TRL

    outputs = ("log_probs", "entropy", "is_top1")
    logprobs, *_ = ChunkedLogProbFunction.apply(
        given.hidden, given.weight, None, given.labels.clamp(min=0), 1.0, TRL_CHUNK, None, 1.0, outputs
    )
    return -logprobs.masked_fill(given.labels == -100, 0).sum() / len(given.places)


def _trl_there(given: Inputs) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    there = given.labels != -100
    logprobs, *_ = ChunkedLogProbFunction.apply(
        given.hidden[there], given.weight, None, given.labels[there], 1.0, TRL_CHUNK, None, 1.0, ("log_probs",)
    )
    return -logprobs.mean()


def _logits(given: Inputs) -> Tensor:
    return cross_entropy(linear(given.hidden, given.weight), given.labels, ignore_index=-100)


def _logits_there(given: Inputs) -> Tensor:
    return cross_entropy(linear(given.hidden[given.places], given.weight), given.labels[given.places])


PEERS: dict[str, Loss] = {
    "TRL": _trl,
    "TRL's kernel there": _trl_there,
    "logits": _logits,
    "logits there": _logits_there,
}


def ours(case: Case) -> Repeat:
    """This project's head."""
    return _build({"sum": _summed, "each": _each}[case.function], case)


def peer(name: str, case: Case) -> Repeat:
    """Another head, see :data:`PEERS`."""
    import trl.trainer.utils  # noqa: F401  (now: its backward pass imports it, and an import is no memory of a head's)

    return _build(PEERS[name], case)


def _build(loss: Loss, case: Case) -> Repeat:
    given = case.inputs()
    # a gradient's own size is about STD / n: scaled to about 1, so that one limit fits all sizes
    scale = len(given.places) / STD
    elsewhere = given.labels == -100
    rows = torch.cat([given.labels[given.places[:8]], torch.arange(0, case.vocabulary, 997)])  # enough to compare

    def repeat() -> dict[str, Tensor]:
        given.hidden.grad = given.weight.grad = None
        value = loss(given)
        value.backward()
        gradient = given.hidden.grad
        head = given.weight.grad[rows] * len(given.places) if case.trained else torch.zeros(0)
        return {
            "loss": value.detach(),
            "gradient": gradient[given.places] * scale,
            "elsewhere": gradient[elsewhere].abs().max(),
            "head_gradient": head,
        }

    return repeat


def cases() -> list[Case]:
    """All cases."""
    return [
        Case(vocabulary, hidden, trained, function)
        for vocabulary in (32_000, 152_000)
        for hidden in (256, 576)
        for trained in (False, True)
        for function in ("sum", "each")
    ]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--peers", default=",".join(PEERS), help="whom to compare with")
    parser.add_argument("--tiny", action="store_true", help="two small sizes, to see that all of it runs")
    args = parser.parse_args()
    tiny = [Case(4000, 64, trained, function, 256) for trained in (False, True) for function in ("sum", "each")]
    peers = {name: partial(peer, name) for name in args.peers.split(",")}
    compare_each("head", tiny if args.tiny else cases(), ours, peers, args, agree=lambda case: AGREE)


if __name__ == "__main__":
    main()
