"""Which structures there may be, and what each edge's probability is once the potentials are known.

Every form of the interface is inferred, the paper being conceptual; that the marginals are the gradient of the evidence is a
theorem, and tested of each.

Source: Singh, Buckley and Sussex, "Attention: Marginal Probability is All You Need?" (2023), arXiv 2304.04556.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.requirements import require_at_least, require_positive
from cenote.mix.marginal_attention import trees
from cenote.mix.marginal_attention.subsets import (
    best_subset,
    log_elementary,
    sampled_subsets,
    subset_marginals,
)
from cenote.mix.normalisers import one_hot, softmax


class Posterior(NamedTuple):
    """What is known of the structure once potentials are given.

    Attributes:
        marginals: `P(phi_ij = 1 | x)`.
        log_evidence: `F = log sum_phi p(phi) exp(sum_ij phi_ij f_ij)` of each set, rows that may read nothing left out; its
            gradient in f is the marginals.
    """

    marginals: Float[Tensor, "*sets queries keys"]
    log_evidence: Float[Tensor, "*sets"]


class Structure(nn.Module, ABC):
    """Base of the families of structures: `phi_ij` = 1 where query i is joined to input j.

    Potentials and prior are summed to `theta = (f + log prior) / T`, -inf where there is no edge; sums over structures run in
    float64.

    Args:
        temperature: T; towards 0 the mode alone is left.
    """

    divides: ClassVar[bool] = False
    """Whether what is attended is divided by each query's mass."""
    order_matters: bool = False
    """Whether inputs in another order, with their potentials, have other marginals than in that order."""

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        require_positive(temperature=temperature)
        self.temperature = temperature

    def forward(
        self,
        f: Float[Tensor, "*sets queries keys"],
        log_prior: Float[Tensor, "*#sets #queries #keys"] | None = None,
        mask: Bool[Tensor, "*#sets #queries #keys"] | None = None,
    ) -> Posterior:
        """The posterior.

        Args:
            f: potentials of the edges.
            log_prior: added; -inf where an edge is impossible. Of independent edges it is the prior's logit.
            mask: True where a query may be joined to an input.
        """
        theta, prior = self._theta(f, log_prior, mask)
        return Posterior(self.marginals(theta).to(f.dtype), (self.log_sum(theta) - self.log_sum(prior)).to(f.dtype))

    def mode(
        self, f: Tensor, log_prior: Tensor | None = None, mask: Tensor | None = None
    ) -> Bool[Tensor, "*sets queries keys"]:
        """The most probable structure."""
        return self.best(self._theta(f, log_prior, mask)[0])

    def sample(
        self,
        f: Tensor,
        log_prior: Tensor | None = None,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Bool[Tensor, "*sets queries keys"]:
        """One structure, drawn from the posterior."""
        with torch.no_grad():
            return self.drawn(self._theta(f, log_prior, mask)[0], generator)

    def attended(
        self,
        weights: Float[Tensor, "*sets queries keys"],
        values: Float[Tensor, "*sets keys width"] | Float[Tensor, "*sets queries keys width"],
    ) -> Float[Tensor, "*sets queries width"]:
        """`sum_j P_ij v_j`, or of values of edges `v_ij`; divided by `sum_j P_ij` where the family `divides`."""
        found = weights @ values if values.dim() == weights.dim() else (weights.unsqueeze(-1) * values).sum(-2)
        if not self.divides:
            return found
        mass = weights.sum(-1, keepdim=True)
        return found / mass.masked_fill(mass == 0, 1.0)

    @abstractmethod
    def log_sum(self, theta: Float[Tensor, "*sets queries keys"]) -> Float[Tensor, "*sets"]:
        """`log sum_phi exp(sum_ij phi_ij theta_ij)`."""

    @abstractmethod
    def marginals(self, theta: Float[Tensor, "*sets queries keys"]) -> Float[Tensor, "*sets queries keys"]:
        """Its gradient."""

    @abstractmethod
    def best(self, theta: Float[Tensor, "*sets queries keys"]) -> Bool[Tensor, "*sets queries keys"]:
        """The structure of the largest sum."""

    @abstractmethod
    def drawn(
        self, theta: Float[Tensor, "*sets queries keys"], generator: torch.Generator | None
    ) -> Bool[Tensor, "*sets queries keys"]:
        """One structure, as probable as `exp` of its sum."""

    def _theta(
        self, f: Tensor, log_prior: Tensor | None, mask: Tensor | None
    ) -> tuple[Float[Tensor, "*sets queries keys"], Float[Tensor, "*sets queries keys"]]:
        prior = torch.zeros_like(f, dtype=torch.float64)
        if log_prior is not None:
            prior = prior + log_prior.double()
        if mask is not None:
            prior = prior.masked_fill(~mask, -math.inf)
        return (f.double() + prior) / self.temperature, prior / self.temperature


def _something(theta: Tensor, axis: int = -1) -> Bool[Tensor, "*rows"]:
    return (theta > -math.inf).any(axis)


def _log_sum_rows(theta: Tensor, axis: int = -1) -> Tensor:
    """Of rows that have nothing 0."""
    nothing = ~_something(theta, axis).unsqueeze(axis)
    return theta.masked_fill(nothing, 0.0).logsumexp(axis).masked_fill(nothing.squeeze(axis), 0.0)


def _alike(theta: Tensor) -> Tensor:
    """0 where there is an edge."""
    return torch.zeros_like(theta).masked_fill(theta == -math.inf, -math.inf)


def _categorical(theta: Tensor, generator: torch.Generator | None) -> Tensor:
    noise = torch.empty_like(theta).exponential_(generator=generator).log()
    return one_hot(theta - noise).bool() & _something(theta).unsqueeze(-1)


class OneParentPerQuery(Structure):
    """Every query has one parent: `P = softmax_j(f + log prior)`.

    With `f = q . k / sqrt(d)` and a uniform prior it is the Transformer's attention; with -inf where there is no edge that of
    a graph; with the logarithm of a prior of distances a relative position.

    Args:
        temperature: see `Structure`.
    """

    def log_sum(self, theta: Tensor) -> Float[Tensor, "*sets"]:
        return _log_sum_rows(theta).sum(-1)

    def marginals(self, theta: Tensor) -> Float[Tensor, "*sets queries keys"]:
        return softmax(theta)

    def best(self, theta: Tensor) -> Bool[Tensor, "*sets queries keys"]:
        return one_hot(theta).bool() & _something(theta).unsqueeze(-1)

    def drawn(self, theta: Tensor, generator: torch.Generator | None) -> Bool[Tensor, "*sets queries keys"]:
        return _categorical(theta, generator)


class OneQueryPerInput(Structure):
    """Every input belongs to one query, for which queries compete: `P = softmax_i(f + log prior)`; each query is then given the
    mean of its inputs.

    Args:
        temperature: see `Structure`.
    """

    divides = True

    def log_sum(self, theta: Tensor) -> Float[Tensor, "*sets"]:
        return _log_sum_rows(theta, -2).sum(-1)

    def marginals(self, theta: Tensor) -> Float[Tensor, "*sets queries keys"]:
        return softmax(theta.mT).mT

    def best(self, theta: Tensor) -> Bool[Tensor, "*sets queries keys"]:
        return (one_hot(theta.mT).bool() & _something(theta.mT).unsqueeze(-1)).mT

    def drawn(self, theta: Tensor, generator: torch.Generator | None) -> Bool[Tensor, "*sets queries keys"]:
        return _categorical(theta.mT, generator).mT


class IndependentEdges(Structure):
    """Every edge for itself: `P = sigmoid(f + logit prior)`.

    Args:
        temperature: see `Structure`.
    """

    def log_sum(self, theta: Tensor) -> Float[Tensor, "*sets"]:
        return nn.functional.softplus(theta).sum((-2, -1))

    def marginals(self, theta: Tensor) -> Float[Tensor, "*sets queries keys"]:
        return theta.sigmoid()

    def best(self, theta: Tensor) -> Bool[Tensor, "*sets queries keys"]:
        return theta > 0

    def drawn(self, theta: Tensor, generator: torch.Generator | None) -> Bool[Tensor, "*sets queries keys"]:
        return torch.rand(theta.shape, generator=generator, dtype=theta.dtype, device=theta.device) < theta.sigmoid()


class SubsetOfParents(Structure):
    """Every query has exactly k parents: `P_j = w_j e_(k-1)(w without j) / e_k(w)`, w = exp(f + log prior).

    Args:
        k: how many; a query that may read fewer, but some, is refused.
        temperature: see `Structure`.
    """

    def __init__(self, k: int, temperature: float = 1.0) -> None:
        super().__init__(temperature)
        require_at_least(1, k=k)
        self.k = k

    def log_sum(self, theta: Tensor) -> Float[Tensor, "*sets"]:
        held = self._held(theta)
        return log_elementary(held, self.k)[..., self.k].masked_fill(~_something(theta), 0.0).sum(-1)

    def marginals(self, theta: Tensor) -> Float[Tensor, "*sets queries keys"]:
        return subset_marginals(self._held(theta), self._sizes(theta)).masked_fill(theta == -math.inf, 0.0)

    def best(self, theta: Tensor) -> Bool[Tensor, "*sets queries keys"]:
        self._held(theta)
        return best_subset(theta, self._sizes(theta))

    def drawn(self, theta: Tensor, generator: torch.Generator | None) -> Bool[Tensor, "*sets queries keys"]:
        return sampled_subsets(self._held(theta), self.k * _something(theta).long(), generator)

    def _held(self, theta: Tensor) -> Tensor:
        """The same, of rows that may read nothing zeros."""
        count = (theta > -math.inf).sum(-1)
        if not torch.compiler.is_compiling() and bool(((count > 0) & (count < self.k)).any()):
            few = int(count[count > 0].min())
            raise InputError(
                f"k: {self.k} parents, and a query may read {few} inputs; choose a smaller k, or UncertainCount"
            )
        return theta.masked_fill((count == 0).unsqueeze(-1), 0.0)

    def _sizes(self, theta: Tensor) -> Float[Tensor, "sizes"]:
        sizes = theta.new_full((self.k + 1,), -math.inf)
        sizes[-1] = 0.0
        return sizes


class UncertainCount(Structure):
    """A mixture of `SubsetOfParents` over how many parents a query has; counts that it cannot have are left out, and a query
    that can have none of them is refused (inferred).

    Args:
        log_counts: logarithms of the prior of 0, 1, ... parents; they need not sum to 1. Learned where asked for.
        learned: whether they are parameters.
        temperature: see `Structure`.

    Example:
        >>> at_most_two = UncertainCount([0.0, 0.0, 0.0])
        >>> at_most_two(torch.zeros(1, 4)).marginals
        tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """

    def __init__(
        self, log_counts: list[float] | Float[Tensor, "counts"], learned: bool = False, temperature: float = 1.0
    ) -> None:
        super().__init__(temperature)
        given = torch.as_tensor(log_counts, dtype=torch.float64)
        require_at_least(1, counts=len(given) - 1)
        self.log_counts = nn.Parameter(given, requires_grad=learned)

    @classmethod
    def at_most(cls, most: int, temperature: float = 1.0) -> UncertainCount:
        """0 to `most` parents, each count as probable."""
        return cls([0.0] * (most + 1), temperature=temperature)

    def forward(
        self,
        f: Float[Tensor, "*sets queries keys"],
        log_prior: Float[Tensor, "*#sets #queries #keys"] | None = None,
        mask: Bool[Tensor, "*#sets #queries #keys"] | None = None,
    ) -> Posterior:
        theta, prior = self._theta(f, log_prior, mask)
        sizes = self._sizes(prior)
        most = sizes.shape[-1] - 1
        found = self._something_of(subset_marginals(theta, sizes), theta)
        log_evidence, of_prior = ((log_elementary(t, most) + sizes).logsumexp(-1) for t in (theta, prior))
        total = (log_evidence - of_prior).masked_fill(~_something(theta), 0.0).sum(-1)
        return Posterior(found.to(f.dtype), total.to(f.dtype))

    def mode(
        self, f: Tensor, log_prior: Tensor | None = None, mask: Tensor | None = None
    ) -> Bool[Tensor, "*sets queries keys"]:
        theta, prior = self._theta(f, log_prior, mask)
        return best_subset(theta, self._sizes(prior))

    def sample(
        self,
        f: Tensor,
        log_prior: Tensor | None = None,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Bool[Tensor, "*sets queries keys"]:
        with torch.no_grad():
            theta, prior = self._theta(f, log_prior, mask)
            return self._sampled(theta, self._sizes(prior), generator)

    def log_counts_of(self, prior: Float[Tensor, "*rows keys"]) -> Float[Tensor, "*rows counts"]:
        """The prior of the counts, -inf where a query cannot have so many parents; one that may read nothing has none.

        Raises:
            InputError: where a query can have none of the counts.
        """
        count = (prior > -math.inf).sum(-1, keepdim=True)
        number = torch.arange(len(self.log_counts), device=prior.device)
        found = self.log_counts.to(prior).expand(*prior.shape[:-1], -1).masked_fill(number > count, -math.inf)
        found = found.masked_fill((number == 0) & (count == 0), 0.0)
        if not torch.compiler.is_compiling() and not bool(_something(found).all()):
            few = int(count[~_something(found).unsqueeze(-1)].min())
            raise InputError(
                f"log_counts: a query may read {few} inputs, and so few parents have no probability; give them some"
            )
        return found

    def _sizes(self, prior: Tensor) -> Float[Tensor, "*rows counts"]:
        """Of each count its prior, less the weight of all sets of that size, so that it is as probable as it says; over T."""
        size = len(self.log_counts) - 1
        # the prior as it was given: what is divided is the logarithm of each set's whole probability
        sets = log_elementary(prior * self.temperature, size)
        counts = self.log_counts_of(prior)
        possible = counts > -math.inf
        return ((counts - sets.masked_fill(~possible, 0.0)) / self.temperature).masked_fill(~possible, -math.inf)

    def _sampled(self, theta: Tensor, sizes: Tensor, generator: torch.Generator | None) -> Bool[Tensor, "*rows keys"]:
        of_counts = log_elementary(theta, sizes.shape[-1] - 1) + sizes
        return sampled_subsets(theta, _categorical(of_counts, generator).long().argmax(-1), generator)

    def log_sum(self, theta: Tensor) -> Float[Tensor, "*sets"]:
        """With sets of each size as probable as their number."""
        return (log_elementary(theta, len(self.log_counts) - 1) + self._sizes(_alike(theta))).logsumexp(-1).sum(-1)

    def marginals(self, theta: Tensor) -> Float[Tensor, "*sets queries keys"]:
        return self._something_of(subset_marginals(theta, self._sizes(_alike(theta))), theta)

    def best(self, theta: Tensor) -> Bool[Tensor, "*sets queries keys"]:
        return best_subset(theta, self._sizes(_alike(theta)))

    def drawn(self, theta: Tensor, generator: torch.Generator | None) -> Bool[Tensor, "*sets queries keys"]:
        return self._sampled(theta, self._sizes(_alike(theta)), generator)

    def _something_of(self, found: Tensor, theta: Tensor) -> Tensor:
        return found.masked_fill(theta == -math.inf, 0.0)


class ContiguousWindow(Structure):
    """Every query has one window, of parents in a row: sums over all starts and lengths, `n^2` of them for n inputs.

    Args:
        log_lengths: prior of lengths 1, 2, ...; longer ones are impossible. None for all lengths alike.
        log_starts: prior of the first input, of the built length at most; None for all alike.
        temperature: see `Structure`.
    """

    order_matters = True

    def __init__(
        self,
        log_lengths: list[float] | Float[Tensor, "lengths"] | None = None,
        log_starts: list[float] | Float[Tensor, "starts"] | None = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(temperature)
        for name, given in (("log_lengths", log_lengths), ("log_starts", log_starts)):
            held = None if given is None else torch.as_tensor(given, dtype=torch.float64)
            self.register_buffer(name, held)
        self.log_lengths: Tensor | None
        self.log_starts: Tensor | None

    def log_sum(self, theta: Tensor) -> Float[Tensor, "*sets"]:
        return _log_sum_rows(self._windows(theta).flatten(-2)).sum(-1)

    def marginals(self, theta: Tensor) -> Float[Tensor, "*sets queries keys"]:
        windows = self._windows(theta)
        found = softmax(windows.flatten(-2)).view_as(windows)
        return self._covered(found)

    def best(self, theta: Tensor) -> Bool[Tensor, "*sets queries keys"]:
        windows = self._windows(theta)
        flat = windows.flatten(-2)
        found = one_hot(flat) * _something(flat).unsqueeze(-1)
        return self._covered(found.view_as(windows)) > 0.5

    def drawn(self, theta: Tensor, generator: torch.Generator | None) -> Bool[Tensor, "*sets queries keys"]:
        windows = self._windows(theta)
        found = _categorical(windows.flatten(-2), generator).to(theta.dtype)
        return self._covered(found.view_as(windows)) > 0.5

    def _windows(self, theta: Tensor) -> Float[Tensor, "*rows starts ends"]:
        """Of the window from the first to the last input its sum, -inf where there is none."""
        count = theta.shape[-1]
        there = theta > -math.inf
        summed, gaps = (
            torch.nn.functional.pad(t.cumsum(-1), (1, 0))
            for t in (theta.masked_fill(~there, 0.0), (~there).to(theta.dtype))
        )
        at = torch.arange(count, device=theta.device)
        length = at - at[:, None]
        possible = (length >= 0) & (gaps[..., None, 1:] - gaps[..., :-1, None] == 0)
        found = summed[..., None, 1:] - summed[..., :-1, None]
        if self.log_lengths is not None:
            known = len(self.log_lengths)
            possible = possible & (length < known)
            found = found + self.log_lengths.to(theta)[length.clamp(0, known - 1)] / self.temperature
        if self.log_starts is not None:
            if count > len(self.log_starts):
                raise InputError(f"log_starts: of {len(self.log_starts)} inputs, and there are {count}")
            found = found + self.log_starts.to(theta)[:count, None] / self.temperature
        return found.masked_fill(~possible, -math.inf)

    def _covered(self, windows: Float[Tensor, "*rows starts ends"]) -> Float[Tensor, "*rows keys"]:
        """How much of the windows lies over each input: what has begun, less what is over."""
        begun, over = windows.sum(-1).cumsum(-1), windows.sum(-2).cumsum(-1)
        return begun - torch.nn.functional.pad(over[..., :-1], (1, 0))


class SpanningTrees(Structure):
    """All nodes are joined by one tree, by the matrix-tree theorem; queries and inputs are the same nodes.

    A node without any possible edge is no node.

    Args:
        rooted: every node but one has a parent, `phi_ij` = 1 where j is that of i, every root as probable; otherwise edges
            have no direction, and `phi_ij = phi_ji`.
        temperature: see `Structure`.
    """

    def __init__(self, rooted: bool = False, temperature: float = 1.0) -> None:
        super().__init__(temperature)
        self.rooted = rooted

    def log_sum(self, theta: Tensor) -> Float[Tensor, "*sets"]:
        theta, real = self._nodes(theta)
        return trees.log_rooted(theta, real) if self.rooted else trees.log_trees(theta, real)

    def marginals(self, theta: Tensor) -> Float[Tensor, "*sets queries keys"]:
        theta, real = self._nodes(theta)
        return trees.edge_marginals(theta, real, self.rooted)

    def best(self, theta: Tensor) -> Bool[Tensor, "*sets queries keys"]:
        theta, real = self._nodes(theta)
        find = trees.best_rooted if self.rooted else trees.best_tree
        return self._each(theta, real, find)

    def drawn(self, theta: Tensor, generator: torch.Generator | None) -> Bool[Tensor, "*sets queries keys"]:
        theta, real = self._nodes(theta)
        return self._each(theta, real, lambda t, r: trees.sampled_tree(t, r, self.rooted, generator))

    def _each(self, theta: Tensor, real: Tensor, find: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        flat = zip(theta.reshape(-1, *theta.shape[-2:]), real.reshape(-1, theta.shape[-1]), strict=True)
        return torch.stack([find(t, r) for t, r in flat]).view(theta.shape)

    def _nodes(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        if theta.shape[-1] != theta.shape[-2]:
            raise InputError(
                f"f: trees join the same nodes, got {theta.shape[-2]} queries and {theta.shape[-1]} inputs"
            )
        loops = torch.eye(theta.shape[-1], dtype=torch.bool, device=theta.device)
        apart = theta.masked_fill(loops, -math.inf)
        between = apart + apart.mT if not self.rooted else torch.maximum(apart, apart.mT)
        real = (between > -math.inf).any(-1)
        # a single node is a tree
        alone = ~real.any(-1, keepdim=True)
        return apart, real | (alone & (theta.diagonal(dim1=-2, dim2=-1) > -math.inf))


class MultiHop(Structure):
    """A walk of T steps, each by the posterior of another family: `P = A A ... A` (the follow-up's).

    Its marginals are those of the walk's end; the evidence is that of T independent steps, so that here, and here alone, it is
    a potential read at the end whose gradient the marginals are.

    Args:
        step: a family whose rows are distributions.
        hops: T.
    """

    def __init__(self, step: Structure, hops: int) -> None:
        super().__init__(1.0)
        require_at_least(1, hops=hops)
        self.step, self.hops, self.order_matters = step, hops, step.order_matters

    def log_sum(self, theta: Tensor) -> Float[Tensor, "*sets"]:
        return self.hops * self.step.log_sum(theta / self.step.temperature)

    def log_end(
        self, theta: Float[Tensor, "*sets nodes nodes"], read: Float[Tensor, "*sets nodes"]
    ) -> Float[Tensor, "*sets nodes"]:
        """`log sum_j P_ij exp(read_j)`; its gradient in `read` at 0 is the marginals."""
        return (self.marginals(theta) @ read.exp().unsqueeze(-1)).squeeze(-1).log()

    def marginals(self, theta: Tensor) -> Float[Tensor, "*sets queries keys"]:
        one = self.step.marginals(theta / self.step.temperature)
        found = one
        for _ in range(self.hops - 1):
            found = found @ one
        return found

    def best(self, theta: Tensor) -> Bool[Tensor, "*sets queries keys"]:
        return self._walked([self.step.best(theta / self.step.temperature)] * self.hops)

    def drawn(self, theta: Tensor, generator: torch.Generator | None) -> Bool[Tensor, "*sets queries keys"]:
        return self._walked([self.step.drawn(theta / self.step.temperature, generator) for _ in range(self.hops)])

    def _walked(self, steps: list[Tensor]) -> Tensor:
        found = steps[0].double()
        for step in steps[1:]:
            found = found @ step.double()
        return found > 0
