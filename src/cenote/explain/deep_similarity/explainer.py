"""Maps of pairs from a running model that embeds images or sentences.

Source: Stylianou, Souvenir and Pless, "Visualizing Deep Similarity Networks" (2019), arXiv 1901.00536.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.requirements import require_at_least, require_one_of
from cenote.explain.deep_similarity.maps import Normalising, Pooling, Terms, pair_map, region_search, terms
from cenote.explain.images import require_eval
from cenote.explain.pairs import Grid, PairMap
from cenote.models.live.passing import passing

Inputs = Mapping[str, Any]


class DeepSimilarity:
    """Which places of two items make their embeddings similar; exact, without gradients, one forward pass per item.

    Args:
        model: in eval mode.
        layer: path of the module whose output is pooled, `[batch, channels, height, width]` or
            `[batch, tokens, width]`; what the model gives by default.
        pooling: see `terms`.
        head: path of a linear layer behind the pooling.
        prefix: leading tokens that are not pooled, as [CLS].
        grid: rows and columns of tokens that are patches; of feature maps they are known.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
        >>> explainer = DeepSimilarity(model, "1")
        >>> found = explainer.explain({"input": torch.rand(1, 3, 6, 8)}, {"input": torch.rand(1, 3, 6, 6)})
        >>> found.on_grids()[0].shape, bool(found.completeness_error < 1e-6)
        (torch.Size([1, 4, 6]), True)

    Source: Stylianou, Souvenir and Pless (2019), arXiv 1901.00536.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: str | None = None,
        pooling: Pooling = "average",
        head: str | None = None,
        prefix: int = 0,
        grid: Grid | None = None,
    ) -> None:
        require_eval(model)
        require_one_of(get_args(Pooling), pooling=pooling)
        require_at_least(0, prefix=prefix)
        self.model, self.layer, self.pooling, self.prefix, self.grid = model, layer, pooling, prefix, grid
        modules = dict(model.named_modules())
        if head is not None and head not in modules:
            raise InputError(f"head: the model has no module {head!r}")
        self.head = None if head is None else modules[head]

    @torch.no_grad()
    def terms(self, inputs: Inputs) -> Terms:
        """What each place adds to its item's embedding; may be kept and used for many pairs.

        Args:
            inputs: of the model's forward; `attention_mask` says which tokens are padding.
        """
        if self.layer is None:
            given = self.model(**inputs)
            found = given if isinstance(given, Tensor) else given[0]
        else:
            with passing(self.model, {self.layer: None}) as seen:
                self.model(**inputs)
            found = seen[self.layer].gave
        if found.dim() == 4:
            grid = (int(found.shape[2]), int(found.shape[3]))
            return terms(found.flatten(2).mT, None, self.pooling, self.head, grid, "places")
        if found.dim() != 3:
            raise InputError(f"layer: gives {list(found.shape)}, expected places [batch, tokens, width] or maps")
        mask = inputs.get("attention_mask")
        real = torch.ones(found.shape[:2], dtype=torch.bool, device=found.device) if mask is None else mask != 0
        if real.shape != found.shape[:2]:
            raise InputError(
                f"attention_mask: expected {list(found.shape[:2])} as the layer gives, got {list(real.shape)}"
            )
        units = "tokens" if self.grid is None else "patches"
        return terms(found[:, self.prefix :], real[:, self.prefix :], self.pooling, self.head, self.grid, units)

    def explain(self, a: Inputs | Terms, b: Inputs | Terms) -> PairMap:
        """The map of each pair: items of the same number, or one item with all.

        Args:
            a, b: inputs of the model, or what `terms` gave of them.
        """
        first, second = (x if isinstance(x, Terms) else self.terms(x) for x in (a, b))
        if len(first.values) != len(second.values) and 1 not in (len(first.values), len(second.values)):
            raise InputError(f"b: expected {len(first.values)} items as in a, or one, got {len(second.values)}")
        return pair_map(first, second)

    def search(
        self,
        query: Inputs | Terms,
        region: Bool[Tensor, "places"],
        gallery: Float[Tensor, "items dim"],
        k: int = 5,
        normalise: Normalising = "whole",
    ) -> Int[Tensor, "k"]:
        """The items of a gallery of embeddings that are most similar to a part of the query; see `region_search`."""
        return region_search(query if isinstance(query, Terms) else self.terms(query), region, gallery, k, normalise)
