"""A tiny decoder with grouped queries, and texts of two lengths, for what acts in running models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.models.live import zoo

TOKENS, PADS = 18, 5


def decoder(**settings: Any) -> nn.Module:
    return zoo.built("LlamaForCausalLM", {**zoo.GROUPED, "initializer_range": 0.3, **settings}, "sdpa")


def texts(tokens: int = TOKENS, pads: int = PADS) -> tuple[Tensor, Tensor]:
    """Two, the first padded on the left."""
    mask = torch.ones(2, tokens, dtype=torch.bool)
    mask[0, :pads] = False
    return zoo.ids(2, tokens), mask


def logits(model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=None if mask is None else mask.long()).logits
    return found if mask is None else found.masked_fill(~mask[..., None], 0.0)


def generated(model: nn.Module, ids: Tensor, mask: Tensor, tokens: int = 6, **options: Any) -> tuple[Tensor, Tensor]:
    """What a decoder goes on with, and the logits of each step."""
    found = model.generate(  # type: ignore[operator]
        ids, attention_mask=mask.long(), max_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=None,
        output_logits=True, return_dict_in_generate=True, **options,
    )  # fmt: skip
    return found.sequences, torch.stack(found.logits, 1)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
