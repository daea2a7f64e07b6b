"""Which prompts are read together, and how many of their completions are written at a time."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_ft.models.together import Together


def batches_of(
    prompts: Sequence[Sequence[int]], rows: int, group: int, together: Together | None = None
) -> tuple[list[list[int]], list[int]]:
    """Which prompts are read together, and in parts of which sizes the completions of each are written.

    Args:
        prompts: Token ids.
        rows: Completions at a time.
        group: Completions of each prompt.
        together: Which prompts may share a batch; None for all.

    Example:
        >>> batches_of([[1], [1, 2], [3]], rows=4, group=2), batches_of([[1]], rows=4, group=9)
        (([[1, 0], [2]], [2]), ([[0]], [4, 4, 1]))
        >>> batches_of([[1], [1, 2], [3]], rows=4, group=1, together=Together((1, 2, 1)))
        ([[1], [0, 2]], [1])
    """
    together = Together((0,) * len(prompts)) if together is None else together
    rows = 1 if together.alone else rows
    # Longest first: rows of a batch are about as long as each other, and what doesn't fit into memory shows at once.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    batches = together.batches(max(1, rows // group), order)
    return batches, [min(rows, group - start) for start in range(0, group, rows)]


def slower(name: str, why_not: str | None, shared: int, group: int, together: Together | None) -> str | None:
    """What to say of prompts that are run more often than they need be; None if there is nothing.

    Args:
        name: Name of the model.
        why_not: Why this project's own loop can't be used; None if it can.
        shared: Tokens that all prompts begin with.
        group: Completions of each prompt.
        together: Which prompts may share a batch.
    """
    often = ["the prompts' common prefix is run once for each prompt"] if why_not and shared else []
    often += ["each prompt is run once for each of its completions"] if why_not and group > 1 else []
    said = [f"{' and '.join(often)}, because {why_not}"] if often else []
    said += [together.why] if together is not None and together.why else []
    return f"{name}: {'; '.join(said)}. The answers are the same, it is only slower." if said else None
