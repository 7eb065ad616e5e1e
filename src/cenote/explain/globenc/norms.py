"""Norms of the vectors that each token contributes to each, in one layer; products of layers.

With the statistics of the norms held fixed, what token j contributes to token i is linear in its head vectors, so that

    ||e_ij||^2 = (a_ij . G_j a_ij + [i=j] (2 a_ij . c_j + q_j)) / (s1_i s2_i)^2

with `a_ij` the attention of the heads, `G_j` one heads x heads Gram matrix per token: no `[tokens, tokens, dim]` is ever there.

Source: Modarressi et al., "GlobEnc: Quantifying Global Token Attribution by Incorporating the Whole Encoder Layer in
Transformers" (2022), arXiv 2205.03286.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from cenote.core import InputError
from cenote.core.requirements import require_one_of
from cenote.explain.attention_flow.matrices import augmented
from cenote.models.live import Frozen

Variant = Literal["n", "n_res", "n_resln", "n_enc"]
BLOCK = 24
"""Tokens whose head vectors are there at a time."""
ROWS = 32
"""Rows that are there at a time."""


class EncoderLayer(NamedTuple):
    """What a layer's norms are made of.

    Attributes:
        x: what the layer read, `[batch, tokens, dim]`.
        values: of the heads, not yet projected, their bias inside, `[batch, heads, tokens, width]`.
        maps: the output projection of each head, `[heads, width, dim]`.
        first, second: the two norms at the statistics that they met; None where there is none behind the sum.
    """

    x: Float[Tensor, "batch tokens dim"]
    values: Float[Tensor, "batch heads tokens width"]
    maps: Float[Tensor, "heads width dim"]
    first: Frozen | None = None
    second: Frozen | None = None

    def taken(self, variant: Variant) -> list[Frozen]:
        """Those that the variant takes in.

        Raises:
            InputError: where the layer has them not.
        """
        require_one_of(get_args(Variant), variant=variant)
        wanted = {"n": [], "n_res": [], "n_resln": [self.first], "n_enc": [self.first, self.second]}[variant]
        found = [norm for norm in wanted if norm is not None]
        if len(found) < len(wanted):
            raise InputError(f"variant: {variant!r} takes in norms behind the sums, and this layer has none")
        return found


class Quadratic(NamedTuple):
    """What gives the norms of any rows: `gram [batch, tokens, heads, heads]`, `cross [batch, tokens, heads]`, `own` and `scale`
    `[batch, tokens]`; `cross` and `own` are zero without the residual."""

    gram: Float[Tensor, "batch tokens heads heads"]
    cross: Float[Tensor, "batch tokens heads"]
    own: Float[Tensor, "batch tokens"]
    scale: Float[Tensor, "batch tokens"]

    def rows(
        self, weights: Float[Tensor, "batch heads rows tokens"], start: int = 0
    ) -> Float[Tensor, "batch rows tokens"]:
        """Norms of the rows that begin at `start`, of their attention; in float64, for sums cancel."""
        a = weights.double().permute(0, 3, 2, 1)
        squared = ((a @ self.gram) * a).sum(-1)
        number = torch.arange(a.shape[2], device=a.device)
        at = start + number
        own = 2 * (a[:, at, number] * self.cross[:, at]).sum(-1) + self.own[:, at]
        squared[:, at, number] += own
        return squared.clamp(min=0).sqrt().mT / self.scale[:, at, None]


def quadratic(layer: EncoderLayer, variant: Variant = "n_enc", block: int = BLOCK) -> Quadratic:
    """The Gram form of one layer.

    Args:
        layer: as it ran.
        variant: `"n"` attention alone, `"n_res"` with the residual, `"n_resln"` and the first norm, `"n_enc"` and the second
            residual and norm: the whole layer but for the feed-forward part.
        block: tokens at a time.

    Example:
        >>> layer = EncoderLayer(torch.randn(1, 3, 8), torch.randn(1, 2, 3, 4), torch.randn(2, 4, 8))
        >>> attention = torch.rand(1, 2, 3, 3)
        >>> found = quadratic(layer, "n_res").rows(attention)
        >>> torch.allclose(found.float(), contributions(layer, attention, "n_res").norm(dim=-1), atol=1e-5)
        True
    """
    taken = layer.taken(variant)
    residual = variant != "n"
    # the norms' linear maps are taken into the projection once, head by head
    maps = torch.stack([_mapped(head.double(), taken).to(layer.values.dtype) for head in layer.maps])
    grams, crosses, owns = [], [], []
    for start in range(0, layer.x.shape[1], block):
        # [batch, tokens, heads, dim]
        heads = _projected(layer.values[:, :, start : start + block], maps).transpose(1, 2).double()
        x = _mapped(layer.x[:, start : start + block].double(), taken)
        grams.append(heads @ heads.mT)
        crosses.append((heads @ x[..., None])[..., 0] * residual)
        owns.append(x.square().sum(-1) * residual)
    scale = torch.ones(layer.x.shape[:2], dtype=torch.float64, device=layer.x.device)
    for norm in taken:
        scale = scale * norm.deviation
    return Quadratic(torch.cat(grams, 1), torch.cat(crosses, 1), torch.cat(owns, 1), scale)


def norms(
    layer: EncoderLayer,
    weights: Float[Tensor, "batch heads rows tokens"],
    variant: Variant = "n_enc",
    start: int = 0,
    block: int = ROWS,
) -> Float[Tensor, "batch rows tokens"]:
    """`||e_ij||` of the rows that begin at `start`, a block of rows at a time.

    Args:
        layer: as it ran.
        weights: attention of these rows.
        variant: see `quadratic`.
        start: number of the first row.
        block: rows at a time.
    """
    form = quadratic(layer, variant)
    found = [
        form.rows(weights[:, :, i : i + block], start + i).to(weights.dtype) for i in range(0, weights.shape[2], block)
    ]
    return torch.cat(found, 1)


def contributions(
    layer: EncoderLayer, weights: Float[Tensor, "batch heads tokens tokens"], variant: Variant = "n_enc"
) -> Float[Tensor, "batch tokens tokens dim"]:
    """The vectors themselves, `[batch, output, source, dim]`; for short inputs. Biases behind the values are left out."""
    taken = layer.taken(variant)
    found = torch.einsum("bhij,bhjd->bijd", weights, _projected(layer.values, layer.maps))
    if variant != "n":
        found.diagonal(dim1=1, dim2=2).add_(layer.x.mT)
    for norm in taken:
        found = norm.mapped(found) / norm.deviation[:, :, None, None].to(found.dtype)
    return found


def head_norms(
    layer: EncoderLayer, weights: Float[Tensor, "batch heads rows tokens"]
) -> Float[Tensor, "batch heads rows tokens"]:
    """`||a_hij f_h(x_j)||`: of each head by itself, before they are summed."""
    return weights * _projected(layer.values, layer.maps).norm(dim=-1)[:, :, None]


def mixing_ratio(
    layer: EncoderLayer, weights: Float[Tensor, "batch heads tokens tokens"], variant: Variant = "n_enc"
) -> Float[Tensor, "batch tokens"]:
    """`||mixing|| / (||mixing|| + ||preserving||)`: of what a token is made, the share that other tokens gave."""
    taken = layer.taken(variant)
    own = torch.einsum(
        "bhn,bhnd->bnd", weights.diagonal(dim1=2, dim2=3), (projected := _projected(layer.values, layer.maps))
    )
    others = torch.einsum("bhij,bhjd->bid", weights, projected) - own
    if variant != "n":
        own = own + layer.x
    mixing, preserving = (_mapped(part.double(), taken).norm(dim=-1) for part in (others, own))
    total = mixing + preserving
    return (mixing / total.masked_fill(total == 0, 1.0)).to(weights.dtype)


def product(
    matrices: Float[Tensor, "*batch layers tokens tokens"], rescale: bool = False
) -> Float[Tensor, "*batch tokens tokens"]:
    """`E_L ... E_1`: no identity is added, for residuals are inside, and no row normalised.

    Args:
        matrices: from the lowest layer up.
        rescale: divide by the largest entry behind each layer, against overflow; ranks stay.
    """
    found = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    for layer in range(matrices.shape[-3]):
        found = matrices[..., layer, :, :] @ found
        if rescale:
            found = found / found.amax((-2, -1), keepdim=True).clamp(min=torch.finfo(found.dtype).tiny)
    return found


def fixed_residual(matrix: Float[Tensor, "*batch tokens tokens"]) -> Float[Tensor, "*batch tokens tokens"]:
    """W-FixedRes of attention, N-FixedRes of norms: half the rows, made to sum to one, and half the identity."""
    total = matrix.sum(-1, keepdim=True)
    return augmented(matrix / total.masked_fill(total == 0, 1.0))


def measured_residual(
    attention: Float[Tensor, "*batch tokens tokens"], ratio: Float[Tensor, "*batch tokens"]
) -> Float[Tensor, "*batch tokens tokens"]:
    """W-Res: attention to others, made to sum to the mixing ratio; the rest stands on the diagonal.

    >>> measured_residual(torch.tensor([[0.5, 0.5], [0.2, 0.8]]), torch.tensor([0.25, 0.5])).tolist()
    [[0.75, 0.25], [0.5, 0.5]]
    """
    identity = torch.eye(attention.shape[-1], dtype=attention.dtype, device=attention.device)
    others = attention * (1 - identity)
    total = others.sum(-1, keepdim=True)
    return ratio[..., None] * others / total.masked_fill(total == 0, 1.0) + (1 - ratio)[..., None] * identity


def _projected(values: Tensor, maps: Tensor) -> Float[Tensor, "batch heads tokens dim"]:
    return values @ maps.to(values.dtype)


def _mapped(x: Tensor, norms: list[Frozen]) -> Tensor:
    for norm in norms:
        x = norm.mapped(x)
    return x
