"""How much of many vectors can be rebuilt of a few directions that they share.

Source: Basile et al., "Head Pursuit: Probing Attention Specialization in Multimodal Transformers" (2025), arXiv 2510.21518.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.requirements import require_one_of

Criterion = Literal["l1", "l2", "linf"]
RIDGE = 1e-8
CHUNK = 4096
"""Atoms that are tried at a time: no `[samples, atoms]` of a whole vocabulary."""


class Pursuit(NamedTuple):
    """Atoms in the order in which they were taken, and what part of the variance so many explain.

    Attributes:
        atoms: numbers of the dictionary's rows.
        explained: behind each, from 0 to 1; never falls.
        exhausted: whether there were fewer atoms, or less to explain, than asked for.
    """

    atoms: Int[Tensor, "taken"]
    explained: Float[Tensor, "taken"]
    exhausted: bool

    @property
    def score(self) -> float:
        """Explained by all; 0 where there was nothing to explain."""
        return float(self.explained[-1]) if len(self.explained) else 0.0


@torch.no_grad()
def pursue(
    h: Float[Tensor, "samples dim"],
    dictionary: Float[Tensor, "atoms dim"],
    atoms: int = 10,
    *,
    centre: bool = True,
    unit: bool = True,
    criterion: Criterion = "l1",
) -> Pursuit:
    """Simultaneous orthogonal matching pursuit: `h = W D` with few columns of `W` that are not zero, the same for all samples.

    In each step the atom is taken that the residual lies along most, summed over samples, and all coefficients are fitted anew.

    Args:
        h: samples; of one with `centre` nothing is left.
        dictionary: `D`, a direction in each row.
        atoms: how many are taken at most.
        centre: take the mean over samples away first.
        unit: rows of the dictionary are made to length one first.
        criterion: what is made of a sample's products with an atom: sum of magnitudes, of squares, or the largest.

    Raises:
        InputError: for other shapes, and where a row of the dictionary is zero.

    Example:
        >>> h = torch.tensor([[3.0, 0.0, 0.0], [-3.0, 1.0, 0.0]])
        >>> found = pursue(h, torch.eye(3), 2, centre=False)
        >>> found.atoms.tolist(), [round(x, 3) for x in found.explained.tolist()]
        ([0, 1], [0.947, 1.0])

    Source: Basile et al. (2025), arXiv 2510.21518; criterion and centring follow a public report (inferred).
    """
    require_one_of(get_args(Criterion), criterion=criterion)
    if h.dim() != 2 or dictionary.dim() != 2 or h.shape[1] != dictionary.shape[1] or 0 in h.shape:
        raise InputError(
            f"h, dictionary: expected [samples, dim] and [atoms, dim], got {list(h.shape)} and {list(dictionary.shape)}"
        )
    if atoms < 1:
        raise InputError(f"atoms: expected at least 1, got {atoms}")
    rows = dictionary.float()
    if unit:
        if not bool(rows.norm(dim=1).all()):
            raise InputError("dictionary: a row is zero and has no direction")
        rows = nn.functional.normalize(rows, dim=1)
    h = h.float()
    h = h - h.mean(0) if centre else h
    whole = h.double().square().sum()
    residual, taken, explained = h, list[int](), list[Tensor]()
    # what rounding leaves of equal samples is no variance
    enough = whole > 1e-10 * max(1.0, float(h.abs().max())) ** 2 * h.numel() if centre else whole > 0
    while bool(enough) and len(taken) < min(atoms, len(rows)):
        gains = torch.cat([_gain(part @ residual.T, criterion) for part in rows.split(CHUNK)])
        gains[taken] = -torch.inf
        taken.append(int(gains.argmax()))
        chosen = rows[taken].double()
        gram = chosen @ chosen.T
        gram.diagonal().add_(RIDGE * gram.diagonal().mean())
        weights = torch.linalg.solve(gram, chosen @ h.double().T).T
        left = h.double() - weights @ chosen
        share = (1 - left.square().sum() / whole).clamp(0, 1)
        explained.append(torch.maximum(share, explained[-1]) if explained else share)
        residual = left.float()
    return Pursuit(
        torch.tensor(taken, dtype=torch.long),
        torch.stack(explained).float().cpu() if explained else torch.zeros(0),
        len(taken) < atoms,
    )


def lens(h: Float[Tensor, "samples dim"], dictionary: Float[Tensor, "atoms dim"]) -> Float[Tensor, "atoms"]:
    """The logit lens averaged over samples (a rival): coefficients of both signs cancel."""
    return dictionary.to(h.dtype) @ h.mean(0)


def _gain(products: Float[Tensor, "atoms samples"], criterion: Criterion) -> Float[Tensor, "atoms"]:
    magnitudes = products.abs()
    if criterion == "l1":
        return magnitudes.sum(1)
    return magnitudes.square().sum(1) if criterion == "l2" else magnitudes.amax(1)
