"""Layers whose attention is a posterior: a Transformer's, a graph's, slots'.

Source: Singh, Buckley and Sussex (2023), arXiv 2304.04556; every form is inferred.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.requirements import require_at_least, require_one_of, require_positive
from cenote.mix.base import Mixer
from cenote.mix.marginal_attention.families import OneParentPerQuery, OneQueryPerInput, Posterior, Structure

Prior = Literal["uniform", "distances"]
Potential = Literal["dot", "additive"]


class PosteriorAttention(Mixer):
    """Attention whose weights are marginals of edges: `y_i = W_o sum_j P(phi_ij = 1 | x) W_v x_j`.

    Potentials are `q . k / sqrt(d)`, or `w . tanh(q + k)`; the prior is uniform, or learned of distances, and what is given in
    use (an adjacency's 0 and -inf, say) is added.

    Args:
        dim: of the tokens.
        family: the structures.
        heads: divides `dim`.
        prior: `"uniform"` or `"distances"`, learned.
        most: distances that the prior knows in either direction; further ones share the last.
        potential: `"dot"` or `"additive"`.

    Example:
        >>> from cenote.mix.marginal_attention.families import SubsetOfParents
        >>> PosteriorAttention(8, SubsetOfParents(2), heads=2)(torch.randn(1, 5, 8)).shape
        torch.Size([1, 5, 8])

    Source: Singh et al. (2023), arXiv 2304.04556.
    """

    def __init__(
        self,
        dim: int,
        family: Structure | None = None,
        heads: int = 1,
        prior: Prior = "uniform",
        most: int = 32,
        potential: Potential = "dot",
    ) -> None:
        super().__init__()
        require_at_least(1, dim=dim, heads=heads, most=most)
        require_one_of(get_args(Prior), prior=prior)
        require_one_of(get_args(Potential), potential=potential)
        if dim % heads:
            raise InputError(f"heads: {heads} does not divide dim={dim}")
        self.dim, self.heads, self.most = dim, heads, most
        self.family = OneParentPerQuery() if family is None else family
        self.order_matters = prior == "distances" or self.family.order_matters
        # what a bias adds to all scores of a query, or of an input, most families do not see
        self.query, self.key = nn.Linear(dim, dim, bias=potential == "additive"), nn.Linear(dim, dim, bias=False)
        self.value, self.output = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.distances = nn.Parameter(torch.zeros(heads, 2 * most + 1)) if prior == "distances" else None
        self.score = (
            nn.Parameter(torch.randn(heads, dim // heads) / math.sqrt(dim)) if potential == "additive" else None
        )

    def mix(self, x: Tensor, mask: Tensor, positions: Tensor) -> Float[Tensor, "batch tokens dim"]:
        return self.attend(x, mask, positions)[0]

    def weights_of(
        self,
        x: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
        positions: Int[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch heads tokens tokens"] | None:
        """Marginals; None where their rows do not sum to 1."""
        if not isinstance(self.family, OneParentPerQuery):
            return None
        mask, positions = self._checked(x, mask, positions)
        return self.attend(x.masked_fill(~mask.unsqueeze(-1), 0.0), mask, positions)[1].marginals

    def attend(
        self,
        x: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"],
        positions: Int[Tensor, "batch tokens"],
        log_prior: Float[Tensor, "#batch #heads tokens tokens"] | None = None,
    ) -> tuple[Float[Tensor, "batch tokens dim"], Posterior]:
        """The tokens, and the posterior that they were mixed by.

        Args:
            log_prior: of edges, added to the layer's own; -inf where there is none.
        """
        q, k, v = (m(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.query, self.key, self.value))
        if self.score is None:
            f = q @ k.mT / math.sqrt(q.shape[-1])
        else:
            f = torch.einsum("bhqkd,hd->bhqk", torch.tanh(q.unsqueeze(-2) + k.unsqueeze(-3)), self.score)
        if self.distances is not None:
            away = (positions[:, :, None] - positions[:, None]).clamp(-self.most, self.most) + self.most
            own = self.distances[:, away].transpose(0, 1)
            log_prior = own if log_prior is None else own + log_prior
        posterior = self.family(f, log_prior, (mask[:, None] & mask[:, :, None]).unsqueeze(1))
        y = self.family.attended(posterior.marginals, v)
        return self.output(y.transpose(1, 2).flatten(2)), posterior


class PosteriorEncoder(nn.Module):
    """A Transformer encoder whose family of structures is chosen for each layer; norms stand before.

    Args:
        dim, heads: as usual.
        families: one for each layer.
        prior: of all layers, see `PosteriorAttention`.
        inner: width of the feed-forward layers; `4 dim` by default.
        potential: see `PosteriorAttention`.
    """

    def __init__(
        self,
        dim: int,
        families: Sequence[Structure],
        heads: int = 1,
        prior: Prior = "uniform",
        inner: int | None = None,
        potential: Potential = "dot",
    ) -> None:
        super().__init__()
        require_at_least(1, families=len(families))
        inner = 4 * dim if inner is None else inner
        self.attention = nn.ModuleList(PosteriorAttention(dim, f, heads, prior, potential=potential) for f in families)
        self.feed_forward = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, inner), nn.GELU(), nn.Linear(inner, dim)) for _ in families
        )
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in families)

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
        log_prior: Float[Tensor, "#batch #heads tokens tokens"] | None = None,
    ) -> tuple[Float[Tensor, "batch tokens dim"], Float[Tensor, "batch"]]:
        """The tokens, and the log-evidence of all layers and heads, which may be maximised beside the loss."""
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        positions = (real.long().cumsum(1) - 1).clamp(min=0)
        evidence = x.new_zeros(len(x))
        x = x.masked_fill(~real.unsqueeze(-1), 0.0)
        for norm, attention, feed_forward in zip(self.norms, self.attention, self.feed_forward, strict=True):
            assert isinstance(attention, PosteriorAttention)
            y, posterior = attention.attend(norm(x), real, positions, log_prior)
            x = x + y
            x = (x + feed_forward(x)).masked_fill(~real.unsqueeze(-1), 0.0)
            evidence = evidence + posterior.log_evidence.sum(-1)
        return x, evidence


class GraphPosterior(PosteriorAttention):
    """Graph attention: additive potentials, and a prior that is -inf where there is no edge.

    Args:
        dim, family, heads: as `PosteriorAttention`.
        loops: whether every node reads itself too.
    """

    def __init__(self, dim: int, family: Structure | None = None, heads: int = 1, loops: bool = True) -> None:
        super().__init__(dim, family, heads, potential="additive")
        self.loops = loops

    def over(
        self,
        x: Float[Tensor, "batch nodes dim"],
        edges: Bool[Tensor, "batch nodes nodes"],
        mask: Bool[Tensor, "batch nodes"] | None = None,
    ) -> Float[Tensor, "batch nodes dim"]:
        """Nodes read those that their row of `edges` says; a node without any gives the output map's bias."""
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        if self.loops:
            edges = edges | torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        prior = torch.zeros(edges.shape, dtype=x.dtype, device=x.device).masked_fill(~edges, -math.inf).unsqueeze(1)
        positions = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
        clean = x.masked_fill(~real.unsqueeze(-1), 0.0)
        return self.attend(clean, real, positions, prior)[0].masked_fill(~real.unsqueeze(-1), 0.0)


class Slots(NamedTuple):
    """What `SlotPosterior` finds: the slots, and how probably each input belongs to each."""

    slots: Float[Tensor, "batch slots dim"]
    belongs: Float[Tensor, "batch slots tokens"]


class SlotPosterior(nn.Module):
    """Slots that compete for inputs: the means of a mixture of Gaussians, by steps of EM (soft k-means).

        P = softmax_i(-|x_j - s_i|^2 / (2 sigma^2) + log prior_i),   s_i <- sum_j P_ij x_j / sum_j P_ij

    Args:
        slots: how many.
        dim: of the inputs.
        sigma: deviation of the components.
        steps: of EM.
        learned: inputs are mapped to keys and values, and a gated unit updates the slots, as in slot attention; otherwise
            nothing is learned but where slots start.

    Source: Locatello et al. (2020), arXiv 2006.15055, as the same family of structures.
    """

    def __init__(self, slots: int, dim: int, sigma: float = 1.0, steps: int = 3, learned: bool = False) -> None:
        super().__init__()
        require_at_least(1, slots=slots, dim=dim, steps=steps)
        require_positive(sigma=sigma)
        self.sigma, self.steps = sigma, steps
        self.family = OneQueryPerInput()
        self.start = nn.Parameter(torch.randn(slots, dim))
        self.key = nn.Linear(dim, dim) if learned else nn.Identity()
        self.value = nn.Linear(dim, dim) if learned else nn.Identity()
        self.update = nn.GRUCell(dim, dim) if learned else None

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
        start: Float[Tensor, "batch slots dim"] | None = None,
    ) -> Slots:
        """Slots of each set.

        Args:
            mask: True = a real token.
            start: of the slots, instead of the learned one.
        """
        slots = self.start.expand(len(x), -1, -1) if start is None else start
        seen = None if mask is None else mask.unsqueeze(1)
        x = x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0.0)
        keys, values = self.key(x), self.value(x)
        belongs = self._belongs(slots, keys, seen)
        for _ in range(self.steps):
            means = self.family.attended(belongs, values)
            if self.update is None:
                # a slot to which nothing belongs stays
                slots = torch.where(belongs.sum(-1, keepdim=True) > 0, means, slots)
            else:
                slots = self.update(means.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
            belongs = self._belongs(slots, keys, seen)
        return Slots(slots, belongs)

    def _belongs(self, slots: Tensor, keys: Tensor, seen: Tensor | None) -> Float[Tensor, "batch slots tokens"]:
        potentials = -torch.cdist(slots, keys).square() / (2 * self.sigma**2)
        return self.family(potentials, mask=seen).marginals
