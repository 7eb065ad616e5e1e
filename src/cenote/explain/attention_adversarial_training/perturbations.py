"""The small change of scores before the softmax that hurts the loss most.

Source: Kitada and Iyatomi, "Attention Meets Perturbations" (2021), arXiv 2009.12064.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.core import InputError
from cenote.core.requirements import require_at_least, require_one_of

Norm = Literal["matrix", "token"]
LEAST = 1e-12
"""Of a norm that is divided by."""


def at_perturbation(
    gradient: Float[Tensor, "batch tokens"], eps: float = 1.0, mask: Bool[Tensor, "batch tokens"] | None = None
) -> Float[Tensor, "batch tokens"]:
    """`r = eps g / ||g||_2` of each item, over its real tokens; zero in padding and where the gradient is zero.

    Args:
        gradient: of the loss at the scores before the softmax.
        eps: norm of `r`.
        mask: True on real tokens.

    >>> at_perturbation(torch.tensor([[3.0, 4.0]]), eps=10.0).tolist()
    [[6.0, 8.0]]
    """
    require_at_least(0, eps=eps)
    g = _real(gradient.detach(), mask)
    return eps * _unit(g)


def iat_perturbation(
    scores: Float[Tensor, "batch tokens"],
    gradient: Float[Tensor, "batch tokens"],
    eps: float = 1.0,
    mask: Bool[Tensor, "batch tokens"] | None = None,
    norm: Norm = "matrix",
) -> Float[Tensor, "batch tokens"]:
    """`r_t = alpha_t . d_t`: `d_t` the unit vector of `s_t` minus the scores of all tokens, `alpha = eps g / ||g||`,
    `g_tk = (dL / ds_t) d_tk`.

    As `d_t` is a unit vector, `norm="matrix"`, which is how the paper has it, **is** `at_perturbation` but for tokens of
    which all
    scores are equal. With `norm="token"`, `alpha` is made a unit vector for each token, and `r_t = eps sign(dL / ds_t)`.

    Args:
        scores: before the softmax.
        gradient: of the loss at them.
        eps: norm of `alpha`.
        mask: True on real tokens; differences to padding do not count.
        norm: over the whole matrix of an item, or for each token.

    >>> s, g = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[3.0, -4.0, 0.0]])
    >>> [round(r, 4) for r in iat_perturbation(s, g, 5.0)[0].tolist()]
    [3.0, -4.0, 0.0]
    """
    require_at_least(0, eps=eps)
    require_one_of(get_args(Norm), norm=norm)
    if scores.shape != gradient.shape:
        raise InputError(f"gradient: expected {list(scores.shape)} as the scores, got {list(gradient.shape)}")
    real = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    s = _real(scores.detach(), real)
    d = _unit((s[:, :, None] - s[:, None]) * (real[:, :, None] & real[:, None]))
    g = _real(gradient.detach(), real)[..., None] * d
    alpha = eps * (_unit(g.flatten(1)).view_as(g) if norm == "matrix" else _unit(g))
    return (alpha * d).sum(-1)


def iat_code_perturbation(
    gradient: Float[Tensor, "batch tokens"], eps: float = 1.0, mask: Bool[Tensor, "batch tokens"] | None = None
) -> Float[Tensor, "batch tokens"]:
    """What the authors' published class for iAT computes in the end, for reproduction only: `-eps g / ||g||_2`.

    Its differences are taken across the items of a batch and cancel, and its last step has the other sign: it **lowers** the
    loss.
    """
    return -at_perturbation(gradient, eps, mask)


def random_perturbation(
    gradient: Float[Tensor, "batch tokens"],
    eps: float = 1.0,
    mask: Bool[Tensor, "batch tokens"] | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch tokens"]:
    """A direction drawn at random, of norm `eps` over the real tokens of each item: what is no adversary."""
    require_at_least(0, eps=eps)
    drawn = torch.randn(gradient.shape, generator=generator, dtype=torch.float32).to(gradient)
    return eps * _unit(_real(drawn, mask))


def word_perturbation(
    gradient: Float[Tensor, "batch tokens dim"],
    eps: float = 1.0,
    mask: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch tokens dim"]:
    """Of embeddings: `r = eps g / ||g||_2` over all of an item (Miyato et al. 2017)."""
    require_at_least(0, eps=eps)
    g = gradient.detach()
    g = g if mask is None else g.masked_fill(~mask[..., None], 0.0)
    return eps * _unit(g.flatten(1)).view_as(g)


def word_iat_perturbation(
    x: Float[Tensor, "batch tokens dim"],
    gradient: Float[Tensor, "batch tokens dim"],
    vocabulary: Float[Tensor, "words dim"],
    eps: float = 1.0,
    mask: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch tokens dim"]:
    """Of embeddings, towards other words: `r_t = sum_k alpha_tk d_tk`, `d_tk` the unit vector from word t to word k (Sato et
    al. 2018).

    `alpha = eps g / ||g||` over all of an item, `g_tk = (dL / dx_t) . d_tk`.
    """
    require_at_least(0, eps=eps)
    d = _unit(vocabulary.detach() - x.detach()[:, :, None])
    g = (d @ gradient.detach()[..., None]).squeeze(-1)
    g = g if mask is None else g.masked_fill(~mask[..., None], 0.0)
    alpha = eps * _unit(g.flatten(1)).view_as(g)
    return (alpha[..., None] * d).sum(2)


def _real(x: Float[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"] | None) -> Float[Tensor, "batch tokens"]:
    return x if mask is None else x.masked_fill(~mask, 0.0)


def _unit(x: Float[Tensor, "*where width"]) -> Float[Tensor, "*where width"]:
    return x / x.norm(dim=-1, keepdim=True).clamp(min=LEAST)
