"""Domain metrics of answers to support messages.

    lightning-ft compare --config examples/support/lora.yaml --methods prompted,full,lora \
        --metrics examples/support/support_metrics.py:metrics --output runs/compare/support

An answer names a topic, the company's code for it and a team: `refund 417 Harbor`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score


def metrics(outputs: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Compute the metrics of all answers.

    Args:
        outputs: Answers, ``n``.
        references: Correct answers, ``n``.

    Returns:
        ``topic_accuracy`` and ``topic_macro_f1`` of the intent, ``code_accuracy`` and ``team_accuracy``, and
        ``unknown_topic_rate``, the share of answers whose first word is not a topic.

    Example:
        >>> found = metrics(["refund 417 Harbor", "login 417 Harbor"], ["refund 417 Harbor", "login 902 Korima"])
        >>> found["topic_accuracy"], found["code_accuracy"], found["team_accuracy"]
        (1.0, 0.5, 0.5)
    """
    targets = [reference.split() for reference in references]
    predictions = [[*output.split(), "", "", ""][:3] for output in outputs]
    topics = {topic: index for index, topic in enumerate(sorted({parts[0] for parts in targets}))}
    unknown = len(topics)  # a class of its own, which is never correct
    predicted = torch.tensor([topics.get(parts[0], unknown) for parts in predictions])
    target = torch.tensor([topics[parts[0]] for parts in targets])
    # The class of unknown topics has no references, so it must not enter the mean over classes.
    f1 = multiclass_f1_score(predicted, target, num_classes=unknown + 1, average="none")[:unknown]
    count = len(targets)
    return {
        "topic_accuracy": float(multiclass_accuracy(predicted, target, num_classes=unknown + 1, average="micro")),
        "topic_macro_f1": float(f1.mean()),
        "code_accuracy": sum(p[1] == t[1] for p, t in zip(predictions, targets, strict=True)) / count,
        "team_accuracy": sum(p[2] == t[2] for p, t in zip(predictions, targets, strict=True)) / count,
        "unknown_topic_rate": float((predicted == unknown).float().mean()),
    }
