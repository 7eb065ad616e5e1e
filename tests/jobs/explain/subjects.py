"""Small models whose true explanation is known, and explainers that are known to be good for nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cenote.explain.base import Attribution, Explainer
from cenote.explain.deceptive_attention.bench import Bench
from cenote.explain.embedded import output_of
from cenote.jobs.explain import Subject, Vectors
from cenote.jobs.explain.subject import from_the_first

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


class Hidden(Subject):
    """Texts of which one word decides: what is taken away is hidden by the mask, or another word stands there.

    The control of embedding norms is left out: where the hidden word's vector is large it finds the word, as it should.
    """

    fills = ("hidden", "another word")
    kind = "texts"

    def __init__(self, bench: Bench, items: int) -> None:
        self.model, self.labels = bench.model, ("he", "she", "none")
        self.ids = bench.inputs["input_ids"][:items]
        self.vocabulary, self.names = bench.vocabulary, tuple(f"text {i}" for i in range(items))
        number = torch.arange(self.ids.shape[1]).expand_as(self.ids)
        self.sizes = {"words": number, "pairs": number // 2}
        self.inside = bench.truth[:items].float()

    def inputs(self, item: int) -> dict[str, Any]:
        ids = self.ids[item : item + 1]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def outputs(self, items: Tensor, keep: Tensor, fill: str) -> Tensor:
        ids = self.ids[items]
        if fill == "another word":
            return output_of(self.model(input_ids=torch.where(keep, ids, 1), attention_mask=torch.ones_like(ids)))
        # nothing at all is none that it reads: then another word is all that stays
        empty = ~keep.any(1, keepdim=True)
        return output_of(self.model(input_ids=torch.where(empty, 1, ids), attention_mask=(keep | empty).long()))

    def hints(self) -> dict[str, Tensor]:
        return {"position": from_the_first(torch.ones_like(self.ids, dtype=torch.bool)), "number": self.ids % 7 + 0.0}

    def words(self, item: int) -> list[str]:
        return [self.vocabulary[i] for i in self.ids[item].tolist()]

    def content(self) -> list[Tensor]:
        return [self.ids]
