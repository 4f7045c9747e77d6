"""The tasks in an order that puts similar ones side by side, for tables and pictures."""

from __future__ import annotations

from torch import Tensor


def by_similarity(cosine: Tensor) -> list[int]:
    """The T tasks of a similarity matrix [T, T] in the order of the leaves of their tree (average linkage).

    The two groups with the highest mean similarity are joined, again and again, so that each is one run; their ends
    that are most alike meet. The first task is never behind the last one.
    """
    alike = cosine.clone().fill_diagonal_(-float("inf"))
    groups = {task: [task] for task in range(len(cosine))}
    while len(groups) > 1:
        i, j = sorted(divmod(int(alike.argmax()), len(cosine)))
        first, second = groups[i], groups.pop(j)
        mean = (len(first) * alike[i] + len(second) * alike[j]) / (len(first) + len(second))
        alike[i], alike[:, i], alike[j], alike[:, j] = mean, mean, -float("inf"), -float("inf")
        alike[i, i] = -float("inf")
        ways = [(a, b) for a in (first, first[::-1]) for b in (second, second[::-1])]
        a, b = max(ways, key=lambda way: float(cosine[way[0][-1], way[1][0]]))
        groups[i] = a + b
    order = next(iter(groups.values()), [])
    return order[::-1] if order and order[0] > order[-1] else order
