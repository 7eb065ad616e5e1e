"""Attention as inference in a mixture of Gaussians.

Source: Gabbur, Bilkhu and Movellan, "Probabilistic Attention for Interactive Segmentation" (2021), arXiv 2106.15338.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.requirements import require_at_least
from cenote.mix.normalisers import softmax

Precision = Float[Tensor, ""] | Float[Tensor, "1"] | Float[Tensor, "items groups components"] | float


class Inferred(NamedTuple):
    """What `ProbabilisticAttention.infer` returns.

    Attributes:
        output: `[items, groups, value_width, queries]`; twice as wide with positions of values.
        weights: what each query takes of each component.
        keys, values: of the components, as they stand behind the last update.
    """

    output: Float[Tensor, "items groups out_width queries"]
    weights: Float[Tensor, "items groups queries components"]
    keys: Float[Tensor, "items groups width components"]
    values: Float[Tensor, "items groups value_width components"]


class ProbabilisticAttention(nn.Module):
    """Queries are observations of a mixture whose components have keys and values as means; the output is what is expected.

        log w_ij = -alpha_j/2 |q_i - k_j|^2 - beta_j/2 |v_i - m_j|^2 + log pi_ij,   y_i = sum_j w_ij m_j

    Two updates may come before the output, each followed by new weights. Keys adapt to the queries that are there, and values
    to those that somebody told (a click):

        k_j <- (lam k_j + alpha_j sum_i w_ij q_i) / (lam + alpha_j sum_i w_ij)
        m_j <- (kap m_j + beta_j sum_i w_ij F_i) / (kap + beta_j sum_i w_ij o_i)

    Nothing is learned here; layouts have channels before tokens, as in the authors' code. With `alpha = 1 / sqrt(width)`,
    magnitude priors and nothing else it is softmax attention.

    Args:
        magnitude_priors: where no priors are given, take those that cancel the norms of keys and values.
        key_steps: how often keys adapt.
        value_steps: how often values do; they do where something is known.
        anchored: adapted keys are drawn to the keys that were given; otherwise, as in the authors' code, to those of the step
            before.
        clamp_known: the output is what was told, where something was told.

    Example:
        >>> q, k, v = torch.randn(3, 1, 1, 4, 6)
        >>> y = ProbabilisticAttention()(q, k, v, alpha=0.5)
        >>> plain = torch.nn.functional.scaled_dot_product_attention(q.mT, k.mT, v.mT).mT
        >>> bool(torch.allclose(y, plain, atol=1e-6))
        True

    Source: Gabbur et al. (2021), arXiv 2106.15338.
    """

    def __init__(
        self,
        magnitude_priors: bool = True,
        key_steps: int = 0,
        value_steps: int = 0,
        anchored: bool = False,
        clamp_known: bool = False,
    ) -> None:
        super().__init__()
        require_at_least(0, key_steps=key_steps, value_steps=value_steps)
        self.magnitude_priors, self.key_steps, self.value_steps = magnitude_priors, key_steps, value_steps
        self.anchored, self.clamp_known = anchored, clamp_known

    def forward(
        self,
        q: Float[Tensor, "items groups width queries"],
        keys: Float[Tensor, "items groups width components"],
        values: Float[Tensor, "items groups value_width components"],
        alpha: Precision = 1.0,
        beta: Precision = 0.0,
        **settings: Any,
    ) -> Float[Tensor, "items groups out_width queries"]:
        """The output alone, see `infer`."""
        return self.infer(q, keys, values, alpha, beta, **settings).output

    def infer(
        self,
        q: Float[Tensor, "items groups width queries"],
        keys: Float[Tensor, "items groups width components"],
        values: Float[Tensor, "items groups value_width components"],
        alpha: Precision = 1.0,
        beta: Precision = 0.0,
        priors: Float[Tensor, "items groups queries components"] | None = None,
        v_init: Float[Tensor, "items groups value_width queries"] | None = None,
        v_fixed: Float[Tensor, "items groups told queries"] | None = None,
        key_precision: Tensor | float | None = None,
        value_precision: Tensor | float | None = None,
        q_pos: Float[Tensor, "width queries components"] | None = None,
        key_pos: Float[Tensor, "width components queries"] | None = None,
        v_pos: Float[Tensor, "value_width queries components"] | None = None,
        mask: Bool[Tensor, "queries components"] | None = None,
    ) -> Inferred:
        """Weights, updates, output.

        Args:
            q: observations.
            keys, values: means of the components.
            alpha, beta: precisions of keys and of values: a number, or one per component.
            priors: `pi`, of each component for each query.
            v_init: a first guess of each query's value, which takes part in the weights.
            v_fixed: values that are known, 0 where none is; the last channel is 1 where one is. With `v_pos` there may be as
                many channels again before the last, of their positions.
            key_precision, value_precision: `lam` and `kap`, of the priors of keys and values; None: the weighted mean of what
                was seen or told.
            q_pos, key_pos, v_pos: embeddings of relative positions; those of keys are stored `[width, component, query]`.
            mask: True where a query may read a component. What it leaves out, NaN included, decides nothing; a component that
                no query may read comes out as it went in.

        Raises:
            InputError: where `v_fixed` has other channels.
        """
        unread = torch.zeros(keys.shape[-1], dtype=torch.bool, device=keys.device) if mask is None else ~mask.any(0)
        silent = torch.zeros(q.shape[-1], dtype=torch.bool, device=q.device) if mask is None else ~mask.any(1)
        given_keys, given_values = keys, values
        # no weight is laid on them, but 0 times NaN is NaN
        q, keys, values = q.masked_fill(silent, 0.0), keys.masked_fill(unread, 0.0), values.masked_fill(unread, 0.0)
        v_init = None if v_init is None else v_init.masked_fill(silent, 0.0)
        given = _Given(_per_component(alpha), _per_component(beta), priors, v_init, q_pos, key_pos, v_pos, mask)
        first = keys
        weights = self._weights(q, keys, values, given)
        for _ in range(self.key_steps):
            keys = _adapted(q, first if self.anchored else keys, weights, given.alpha, key_precision)
            weights = self._weights(q, keys, values, given)
        width = values.shape[-2]
        offsets = torch.zeros_like(values[..., :1]).expand(*values.shape[:-1], q.shape[-1])
        if v_fixed is not None:
            if v_fixed.shape[-2] not in (width + 1, 2 * width + 1 if v_pos is not None else width + 1):
                raise InputError(
                    f"v_fixed: expected {width} channels of values and one of indicators, got {v_fixed.shape[-2]}"
                )
            told = v_fixed.masked_fill(silent, 0.0)
            for _ in range(self.value_steps):
                values = _told(told[..., :width, :], told[..., -1:, :], values, weights, given.beta, value_precision)
                if v_fixed.shape[-2] > width + 1:
                    offsets = offsets + v_fixed[..., width:-1, :].masked_fill(unread, 0.0) @ weights.mT
                weights = self._weights(q, keys, values, given)
        output = values @ weights.mT
        if self.clamp_known and v_fixed is not None:
            output = torch.where(v_fixed[..., -1:, :] > 0, v_fixed[..., :width, :], output)
        if v_pos is not None:
            offsets = offsets + torch.einsum("bgij,cij->bgci", weights, v_pos)
            # channel by channel: value, position
            output = torch.stack([output, offsets], -2).flatten(-3, -2)
        return Inferred(
            output, weights, torch.where(unread, given_keys, keys), torch.where(unread, given_values, values)
        )

    def _weights(self, q: Tensor, keys: Tensor, values: Tensor, given: _Given) -> Tensor:
        log = -0.5 * given.alpha * _squared_distances(q, keys)
        key_norms = keys.square().sum(-2).unsqueeze(-2)
        if given.q_pos is not None:
            q_norms, pos_norms = q.square().sum(-2).unsqueeze(-1), given.q_pos.square().sum(0)
            at_pos = torch.einsum("bgci,cij->bgij", q, given.q_pos)
            log = log - 0.5 * given.alpha * (q_norms + pos_norms - 2 * at_pos)
        if given.key_pos is not None:
            pos_norms = given.key_pos.square().sum(0).mT
            at_pos = torch.einsum("bgcj,cji->bgij", keys, given.key_pos)
            log = log - 0.5 * given.alpha * (key_norms + pos_norms - 2 * at_pos)
        if given.v_init is not None:
            log = log - 0.5 * given.beta * _squared_distances(given.v_init, values)
        if given.priors is not None:
            log = log + given.priors.log()
        elif self.magnitude_priors:
            log = log + self._magnitudes(key_norms, values, given)
        return softmax(log, given.mask)

    def _magnitudes(self, key_norms: Tensor, values: Tensor, given: _Given) -> Tensor:
        norms = key_norms
        if given.q_pos is not None:
            norms = norms + given.q_pos.square().sum(0)
        if given.key_pos is not None:
            norms = norms + key_norms + given.key_pos.square().sum(0).mT
        if given.v_pos is None:
            of_values = values.square().sum(-2).unsqueeze(-2)
        else:
            of_values = (values.unsqueeze(-2) + given.v_pos).square().sum(-3)
        return 0.5 * given.alpha * norms + 0.5 * given.beta * of_values


class _Given(NamedTuple):
    alpha: Tensor | float
    beta: Tensor | float
    priors: Tensor | None
    v_init: Tensor | None
    q_pos: Tensor | None
    key_pos: Tensor | None
    v_pos: Tensor | None
    mask: Tensor | None


def _per_component(precision: Precision) -> Tensor | float:
    """For `[items, groups, *, components]`."""
    return precision.unsqueeze(-2) if isinstance(precision, Tensor) and precision.dim() > 1 else precision


def _squared_distances(a: Tensor, b: Tensor) -> Float[Tensor, "items groups queries components"]:
    return a.square().sum(-2).unsqueeze(-1) + b.square().sum(-2).unsqueeze(-2) - 2 * a.mT @ b


def _adapted(
    q: Tensor, keys: Tensor, weights: Tensor, alpha: Tensor | float, precision: Tensor | float | None
) -> Float[Tensor, "items groups width components"]:
    seen, mass = q @ weights, weights.sum(-2, keepdim=True)
    if precision is None:
        return seen / mass.masked_fill(mass == 0, 1.0)
    return (precision * keys + alpha * seen) / (precision + alpha * mass)


def _told(
    known: Tensor,
    is_known: Tensor,
    values: Tensor,
    weights: Tensor,
    beta: Tensor | float,
    precision: Tensor | float | None,
) -> Float[Tensor, "items groups value_width components"]:
    told, mass = known @ weights, is_known @ weights
    mass = mass.masked_fill(mass == 0, 1.0) if precision is None else mass
    updated = told / mass if precision is None else (precision * values + beta * told) / (precision + beta * mass)
    # where nothing is known nothing changes
    return torch.where(is_known.sum(-1, keepdim=True) > 0, updated, values)
