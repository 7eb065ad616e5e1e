"""What values over draws of the test items, with replacement, say of how sure a number is."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from numpy import ndarray


def two_sided_p(differences: Float[ndarray, "resamples"]) -> float:
    """How often a difference falls on the other side of zero, doubled; never below `2 / (resamples + 1)`.

    >>> two_sided_p(np.array([0.1, 0.2, 0.3]))
    0.5
    """
    d = differences[~np.isnan(differences)]
    tail = min(int((d <= 0).sum()), int((d >= 0).sum()))
    return min(1.0, 2 * (tail + 1) / (len(d) + 1))
