"""A plain tf-idf search: the candidates that a careful engineer would put into each request's prompt."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping

import numpy as np


def features(text: str) -> Counter[str]:
    """Count the words of a text and the character trigrams inside them.

    Example:
        >>> sorted(features("Lupus, NOS").items())
        [(' lu', 1), (' no', 1), ('lup', 1), ('lupus', 1), ('nos', 2), ('os ', 1), ('pus', 1), ('upu', 1), ('us ', 1)]
    """
    words = re.findall(r"\w+", text.lower())
    return Counter(words) + Counter(f" {word} "[i : i + 3] for word in words for i in range(len(word)))


class Search:
    """Finds the titles with the highest cosine similarity to a query, each feature weighted by tf-idf.

    Args:
        titles: Title of each key.

    Example:
        >>> Search({"a": "Fever of a dog", "b": "Fever of a cat", "c": "Broken leg"}).find("cats with fever", 2)
        ['b', 'a']
    """

    def __init__(self, titles: Mapping[str, str]) -> None:
        self._keys = sorted(titles)
        counts = [features(titles[key]) for key in self._keys]
        documents = Counter(feature for found in counts for feature in found)
        self._idf = {feature: math.log((1 + len(titles)) / (1 + n)) + 1 for feature, n in documents.items()}
        postings: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for number, found in enumerate(counts):
            weights = {feature: count * self._idf[feature] for feature, count in found.items()}
            norm = math.sqrt(sum(weight**2 for weight in weights.values()))
            for feature, weight in weights.items():
                postings[feature].append((number, weight / norm))
        # For each feature the numbers of the titles that have it, and its weights there: most titles have few features.
        self._postings = {
            feature: (np.array([number for number, _ in found]), np.array([weight for _, weight in found]))
            for feature, found in postings.items()
        }

    def find(self, query: str, count: int) -> list[str]:
        """The `count` most similar keys, best first; equal ones (also unlike the query) in the order of their names."""
        scores = np.zeros(len(self._keys))
        for feature, occurrences in features(query).items():
            if feature in self._postings:
                numbers, weights = self._postings[feature]
                scores[numbers] += occurrences * self._idf[feature] * weights
        # Sums of floats are rounded, so that the last bits of a platform's logarithm don't change the order.
        best = np.argsort(-scores.round(9), kind="stable")[:count]
        return [self._keys[number] for number in best]
