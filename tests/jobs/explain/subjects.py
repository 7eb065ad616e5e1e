"""Small models whose true explanation is known, and explainers that are known to be good for nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cenote.explain.base import Attribution, Explainer
from cenote.jobs.explain import Vectors

DIM = 8


class Additive(nn.Module):
    """Each token adds what it holds in its last numbers; there is no attention."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(DIM, 2, generator=torch.Generator().manual_seed(seed)))

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return ((x * attention_mask[..., None]) @ self.weight).sum(1)


class Block(nn.Module):
    """Looks at tokens by their first numbers alone."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.q = nn.Parameter(3 * torch.randn(DIM // 2, 4, generator=generator))
        self.k = nn.Parameter(3 * torch.randn(DIM // 2, 4, generator=generator))

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        looks = x[..., : DIM // 2]
        q, k = (looks @ self.q)[:, None], (looks @ self.k)[:, None]
        allowed = attention_mask.bool()[:, None, None]
        return x + 0.01 * F.scaled_dot_product_attention(q, k, x[:, None], attn_mask=allowed)[:, 0]


class Deceptive(nn.Module):
    """Decides by what its tokens hold, and looks elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(seed) for seed in range(2))
        self.head = Additive()
        with torch.no_grad():
            self.head.weight[: DIM // 2] = 0.0

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, attention_mask)
        return self.head(x, attention_mask)


def vectors(model: nn.Module, items: int = 24, tokens: int = 7, seed: int = 0) -> Vectors:
    """Sets of unlike lengths."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(items, tokens, DIM, generator=generator)
    lengths = torch.randint(tokens - 3, tokens + 1, (items,), generator=generator)
    mask = torch.arange(tokens) < lengths[:, None]
    return Vectors(model.eval(), x * mask[..., None], mask)


class ByChance(Explainer):
    """Random scores, others for every model."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def explain(self, model: nn.Module, inputs: Mapping[str, Any], target: Tensor | None = None) -> Attribution:
        weights = float(sum(p.double().abs().sum() for p in model.parameters()))
        own = int(1e6 * (weights + float(inputs["x"].double().abs().sum()))) + 7_919 * self.seed
        generator = torch.Generator().manual_seed(own % 2**40)
        mask = inputs["attention_mask"].bool()
        return Attribution(torch.rand(mask.shape, generator=generator) * mask, mask)


class IgnoresTheModel(Explainer):
    """The same of every model: what the input holds, or random numbers of a seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def explain(self, model: nn.Module, inputs: Mapping[str, Any], target: Tensor | None = None) -> Attribution:
        mask = inputs["attention_mask"].bool()
        direction = torch.randn(DIM, generator=torch.Generator().manual_seed(self.seed))
        return Attribution((inputs["x"] @ direction) * mask, mask, signed=True)


class Truth(Explainer):
    """What each token adds to the target of the additive model."""

    family = "decomposition"

    def explain(self, model: nn.Module, inputs: Mapping[str, Any], target: Tensor | None = None) -> Attribution:
        mask = inputs["attention_mask"].bool()
        weight = getattr(model, "head", model).weight.detach()
        chosen = model(**inputs).argmax(1) if target is None else target
        difference = weight[:, chosen] - weight[:, 1 - chosen]
        return Attribution((inputs["x"] @ difference)[..., 0] * mask, mask, signed=True)
