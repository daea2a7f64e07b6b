"""A plain tf-idf search: the candidates that a careful engineer would put into each request's prompt."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping


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
        counts = {key: features(title) for key, title in titles.items()}
        documents = Counter(feature for found in counts.values() for feature in found)
        self._idf = {feature: math.log((1 + len(titles)) / (1 + n)) + 1 for feature, n in documents.items()}
        self._postings: dict[str, list[tuple[str, float]]] = defaultdict(list)
        for key, found in counts.items():
            weights = {feature: count * self._idf[feature] for feature, count in found.items()}
            norm = math.sqrt(sum(weight**2 for weight in weights.values()))
            for feature, weight in weights.items():
                self._postings[feature].append((key, weight / norm))

    def find(self, query: str, count: int) -> list[str]:
        """The `count` most similar keys, best first; equal ones in the order of their names."""
        scores: dict[str, float] = defaultdict(float)
        for feature, occurrences in features(query).items():
            for key, weight in self._postings.get(feature, ()):
                scores[key] += occurrences * self._idf[feature] * weight
        # Sums of floats are rounded, so that the last bits of a platform's logarithm don't change the order.
        return sorted(scores, key=lambda key: (-round(scores[key], 9), key))[:count]
