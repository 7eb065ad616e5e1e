"""The causal follow-up: what becomes of a logit where the last token may not read some tokens.

Source: Chughtai, Cooney and Nanda (2024), arXiv 2402.07321.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.explain.queried import one_hot
from cenote.models.live import AttentionCall, RowEdit, Where, edited, one_stack

READER = "the last token"


class CutEdges(RowEdit):
    """Attention from one span to another masked; what is left is made to sum to what it did.

    Args:
        queries: name of the span that reads.
        keys: name of the span that is not read.
        at: the places.
    """

    def __init__(self, queries: str, keys: str, at: Where | None = None) -> None:
        self.at = at or Where()
        self.reading, self.hidden = queries, keys
        self.asks = (queries, keys)

    def queries(self, call: AttentionCall) -> Bool[Tensor, "batch queries"]:
        return call.queries_in(self.reading)

    def rows(
        self, call: AttentionCall, weights: Float[Tensor, "batch heads rows keys"]
    ) -> Float[Tensor, "batch heads rows keys"]:
        hidden = call.keys_in(self.hidden)[:, None, None]
        if not bool(hidden.any()):
            return weights
        left = weights.masked_fill(hidden, 0.0)
        # the softmax without these keys, sinks included
        share = 1 - (weights - left).sum(-1, keepdim=True)
        return torch.where(share > 0, left / share.clamp(min=torch.finfo(left.dtype).tiny), 0.0)


@torch.no_grad()
def edge_knockout(
    model: nn.Module,
    inputs: Mapping[str, Any],
    targets: Int[Tensor, "batch targets"],
    span: Bool[Tensor, "batch tokens"],
    *,
    blocks: Collection[int] | None = None,
    stack: str | None = None,
) -> Float[Tensor, "batch targets"]:
    """By how much the logits change where the last real token of each prompt does not read these tokens.

    Args:
        model: a causal language model, in eval mode; it is the same afterwards to the bit.
        inputs: `input_ids`, with an `attention_mask` where there is padding.
        targets: numbers of tokens whose logits are asked for.
        span: the tokens that are not read, True; not the last one itself.
        blocks: in which blocks; all by default.
        stack: path of the list of blocks, where a model has several.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=2, n_head=2)).eval()
        >>> ids, span = torch.tensor([[5, 6, 7]]), torch.tensor([[False, True, False]])
        >>> edge_knockout(model, {"input_ids": ids}, torch.tensor([[3, 4]]), span).shape
        torch.Size([1, 2])
    """
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    at = one_hot(mask, "last").bool()
    stack = one_stack(model, stack).stack
    edit = CutEdges(READER, "hidden", Where(blocks, kinds=["self"], stack=stack))
    before = model(**inputs).logits[at].gather(1, targets)
    with edited(model, edit, spans={READER: at, "hidden": span}):
        after = model(**inputs).logits[at].gather(1, targets)
    return after - before
