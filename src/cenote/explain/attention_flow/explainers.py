"""Attention rollout and flow of a running model.

Source: Abnar and Zuidema, "Quantifying Attention Flow in Transformers" (2020), arXiv 2005.00928.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.chain import BLOCK, Rows, chained
from cenote.core.requirements import require_one_of
from cenote.explain.attention_flow.matrices import augmented, max_flow
from cenote.explain.base import Attribution, Explainer
from cenote.explain.queried import Query, one_hot, real_tokens
from cenote.models.live import AttentionCall, few_logits, one_stack, recorded


class AttentionRollout(Explainer):
    """What one token of the top layer holds of each input token: `e_q A_L ... A_1`, `A_l = (1 - r) mean_h W_lh + r I`.

    The row is chained from the top down, and each layer's matrix is made of its queries and keys a block of rows at a time:
    memory grows with the tokens, never with their square, and the attention function that was loaded stays.

    Args:
        query: the token that is explained: `"first"` ([CLS]) or `"last"` (the one that predicts the next), of the real ones.
        residual: share of the residual connection.
        stack: path of the list of blocks, where a model has several, see `cenote.models.live.stacks`.
        block: rows at a time.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
        >>> model = BertModel(BertConfig(vocab_size=20, **sizes)).eval()
        >>> found = AttentionRollout().explain(model, {"input_ids": torch.tensor([[5, 6, 7, 8]])})
        >>> round(float(found.scores.sum()), 4)
        1.0

    Source: Abnar and Zuidema (2020), arXiv 2005.00928.
    """

    class_agnostic = True
    family = "attention"

    def __init__(
        self, query: Query = "first", residual: float = 0.5, stack: str | None = None, block: int = BLOCK
    ) -> None:
        require_one_of(get_args(Query), query=query)
        if not 0 <= residual < 1:
            raise InputError(f"residual: expected a share from 0, below 1, got {residual}")
        if block < 1:
            raise InputError(f"block: expected at least 1, got {block}")
        self.query, self.residual, self.stack, self.block = query, residual, stack, block

    @torch.no_grad()
    def explain(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        target: Int[Tensor, "batch"] | None = None,  # noqa: ARG002
    ) -> Attribution:
        """Explain; it speaks of no target, see `Explainer.explain`."""
        calls = self._calls(model, inputs)
        mask = real_tokens(inputs, calls[0])
        return Attribution(self._scores(calls, mask), mask)

    def _calls(self, model: nn.Module, inputs: Mapping[str, Any]) -> list[AttentionCall]:
        """Attention of every block, from the lowest, without values: nobody asks for them again."""
        with recorded(model, "inputs", at=one_stack(model, self.stack)) as found:
            model(**few_logits(model, inputs))
        return [call.replace(v=call.v.new_empty((*call.v.shape[:3], 0))) for (call, *_) in found["inputs"].values()]

    def _scores(self, calls: list[AttentionCall], mask: Bool[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens"]:
        """From the attention of every block, and which tokens are real."""
        row = one_hot(mask, self.query).to(torch.promote_types(calls[0].q.dtype, torch.float32))
        return chained(row, [self._rows_of(call) for call in calls], self.block) * mask

    def _rows_of(self, call: AttentionCall) -> Rows:
        def rows(start: int, stop: int) -> Float[Tensor, "batch rows tokens"]:
            chosen = torch.zeros(call.batch, call.queries, dtype=torch.bool, device=call.q.device)
            chosen[:, start:stop] = True
            a = (1 - self.residual) * call.only(chosen).weights().mean(1)
            at = torch.arange(stop - start, device=a.device)
            a[:, at, start + at] += self.residual
            total = a.sum(-1, keepdim=True)
            return a / total.masked_fill(total == 0, 1.0)

        return rows


class AttentionFlow(AttentionRollout):
    """The largest flow from one token of the top layer to each input token, see `max_flow`; for short inputs.

    Args:
        query, residual, stack, block: as of `AttentionRollout`.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
        >>> model = BertModel(BertConfig(vocab_size=20, **sizes)).eval()
        >>> found = AttentionFlow().explain(model, {"input_ids": torch.tensor([[5, 6, 7, 8]])})
        >>> round(float(found.scores.sum()), 4)
        1.0

    Source: Abnar and Zuidema (2020), arXiv 2005.00928.
    """

    def _scores(self, calls: list[AttentionCall], mask: Bool[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens"]:
        stack = torch.stack([call.weights().mean(1) for call in calls], 1)
        scores = torch.zeros(mask.shape, dtype=stack.dtype, device=stack.device)
        for item, real in enumerate(mask):
            at = real.nonzero()[:, 0]
            own = augmented(stack[item][:, at][:, :, at], self.residual)
            query = 0 if self.query == "first" else len(at) - 1
            scores[item, at] = max_flow(own, 0.0, queries=[query], layers=[len(own) - 1])[0, 0]
        return scores
