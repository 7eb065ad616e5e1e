"""Pruning by a map's sensitivity, and by diversity alone, as reducers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.reduced import Reduced, selected
from cenote.core.requirements import require_one_of
from cenote.models.live.entering import Entering, features_entering
from cenote.reduce.base import BudgetReducer
from cenote.reduce.zeroth_order_pruning.sensitivity import RULES, Project, Rule, in_float32, select, sensitivity


class ZOOPrune(BudgetReducer):
    """Tokens that a map is sensitive to, and that it maps to different directions; all others are dropped.

    `S_i` by symmetric finite differences of the map, then greedily the largest `S_i (1 - max cos(M(x_i), M(x_j)))` over the
    chosen `j`. Costs `2 m n` rows of the map, no gradient and no attention.

    Args:
        project: the map `M`, from `[any, dim]` to `[any, width]`: a projector into a language model, a layer, any function.
        factor, tokens, fraction, rounding: how many are left, as `cenote.reduce.Budget`.
        directions: `m`, of the differences.
        step: `h`.
        relative: the step is of the root mean square of the set's features.
        rule: as in `select`: `"product"`, `"sum"`, `"sensitivity"` or `"diversity"` alone.
        group: so many tokens in turn are one row of the map's output; see `on`.
        seed: of the directions, which all sets share.

    Example:
        >>> project = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 6))
        >>> ZOOPrune(project, factor=2)(torch.randn(1, 8, 4)).tokens.shape
        torch.Size([1, 4, 4])

    Source:
        Kim et al. 2025, "Training-Free Token Pruning via Zeroth-Order Gradient Estimation in Vision-Language Models", arXiv
        2509.24837, CVPR 2026.

    Note:
        The paper's number of directions and step are not known; 64 and 0.01 are ours. What is left are rows of the input:
        mapping them gives the rows that were compared.
    """

    keeps = "members"

    def __init__(
        self,
        project: Project,
        *,
        factor: float | None = None,
        tokens: int | None = None,
        fraction: float | None = None,
        rounding: Literal["floor", "ceil"] = "floor",
        directions: int = 64,
        step: float = 0.01,
        relative: bool = False,
        rule: Rule = "product",
        group: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(factor=factor, tokens=tokens, fraction=fraction, rounding=rounding)
        if not callable(project):
            raise InputError(f"project: expected a function or module, got {type(project).__name__}")
        require_one_of(RULES, rule=rule)
        # a module of a model stays that model's: it is no submodule here
        self._project = (project,)
        self.directions, self.step, self.relative = directions, step, relative
        self.rule, self.group, self.seed = rule, group, seed

    @property
    def project(self) -> Project:
        return self._project[0]

    def reduce(
        self,
        x: Float[Tensor, "batch tokens dim"],
        sizes: Float[Tensor, "batch tokens"],
        mask: Bool[Tensor, "batch tokens"],
    ) -> Reduced:
        if self.group != 1:
            raise InputError("group: what is put together by the map has no rows of its own here; use on(model, image)")
        with torch.no_grad():
            z = in_float32(self.project)(x.reshape(-1, x.shape[2])).view(*x.shape[:2], -1)
        return selected(x, self.chosen(x, z, mask), sizes)

    @torch.no_grad()
    def chosen(
        self,
        x: Float[Tensor, "batch tokens dim"],
        z: Float[Tensor, "batch rows width"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Bool[Tensor, "batch rows"]:
        """Which of the rows that the map makes are left."""
        real = torch.ones(z.shape[:2], dtype=torch.bool, device=z.device)
        if mask is not None:
            real = mask.view(*z.shape[:2], -1).any(-1)
        if self.rule == "diversity":
            scores = torch.zeros(z.shape[:2], device=z.device)
        else:
            scores = sensitivity(
                self.project,
                x,
                self.directions,
                self.step,
                relative=self.relative,
                seed=self.seed,
                mask=mask,
                group=self.group,
            )
        found = select(scores, z, self.budget.of(real.sum(1)), real, self.rule)
        kept = torch.zeros(len(real), real.shape[1] + 1, dtype=torch.bool, device=z.device)
        return kept.scatter(1, found.remainder(real.shape[1] + 1), True)[:, :-1] & real

    @contextmanager
    def on(self, model: nn.Module, image: Bool[Tensor, "batch tokens"], stack: str | None = None) -> Iterator[Entering]:
        """A vision-language model of which the map is the projector: of each image only these tokens enter the language model.

        All other tokens enter; those that do stand where they stood, and the cache holds no others. On leaving the model is as
        it was, also after an exception.

        Args:
            model: whose projector, found by identity, is the map.
            image: the prompt's places of image tokens, in the order in which the projector makes them.
            stack: path of the language model's blocks; None for the last list of blocks.

        Returns:
            What entered.
        """
        if not isinstance(self.project, nn.Module):
            raise InputError("project: expected the model's own projector, a module, got a function")
        with features_entering(model, self.project, self.chosen, image, stack) as found:
            yield found


class DiverseTokens(BudgetReducer):
    """Tokens that differ most from each other: greedily always that whose nearest chosen one is least like it.

    From the token on that is least like its nearest neighbour; cosines of the tokens themselves.

    Args:
        factor, tokens, fraction, rounding: how many are left.

    Example:
        >>> x = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]]])
        >>> DiverseTokens(tokens=2)(x).sizes.tolist()
        [[1.0, 1.0]]

    Source:
        Alvar et al. 2025, "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", arXiv 2503.02175.
    """

    keeps = "members"

    def reduce(
        self,
        x: Float[Tensor, "batch tokens dim"],
        sizes: Float[Tensor, "batch tokens"],
        mask: Bool[Tensor, "batch tokens"],
    ) -> Reduced:
        found = select(torch.zeros_like(sizes), x, self.budget.of(mask.sum(1)), mask, "diversity")
        tokens = mask.shape[1]
        kept = torch.zeros(len(mask), tokens + 1, dtype=torch.bool, device=x.device)
        return selected(x, kept.scatter(1, found.remainder(tokens + 1), True)[:, :-1] & mask, sizes)
