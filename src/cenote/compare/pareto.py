"""The Pareto set: what is not beaten in both metric and cost."""

from __future__ import annotations

from collections.abc import Sequence


def pareto(metric: Sequence[float], cost: Sequence[float]) -> list[int]:
    """Indices that no other entry beats in both: a higher metric at no more cost, or the same metric cheaper.

    >>> pareto([0.9, 0.8, 0.95], [1.0, 2.0, 3.0])
    [0, 2]
    """

    def beaten(i: int) -> bool:
        return any(
            metric[j] >= metric[i] and cost[j] <= cost[i] and (metric[j] > metric[i] or cost[j] < cost[i])
            for j in range(len(metric))
        )

    return [i for i in range(len(metric)) if not beaten(i)]
