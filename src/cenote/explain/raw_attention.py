"""Attention as it is, read off a running model: what most pictures of attention show."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.explain.attention_flow.explainers import AttentionRollout
from cenote.explain.queried import Query, one_hot
from cenote.models.live import AttentionCall


class LastLayerAttention(AttentionRollout):
    """What one token takes from each token in the last block, mean over the heads.

    Args:
        query: the token that looks: `"first"` ([CLS]) or `"last"` (the one that predicts the next), of the real ones.
        stack: path of the list of blocks, where a model has several.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
        >>> model = BertModel(BertConfig(vocab_size=20, **sizes)).eval()
        >>> found = LastLayerAttention().explain(model, {"input_ids": torch.tensor([[5, 6, 7, 8]])})
        >>> round(float(found.scores.sum()), 4)
        1.0
    """

    def __init__(self, query: Query = "first", stack: str | None = None) -> None:
        super().__init__(query, residual=0.0, stack=stack)

    def _scores(self, calls: list[AttentionCall], mask: Bool[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens"]:
        chosen = one_hot(mask, self.query).bool()
        found = [call.only(chosen).weights()[:, :, 0].mean(1) for call in self._read(calls)]
        return torch.stack(found).mean(0) * mask

    def _read(self, calls: list[AttentionCall]) -> list[AttentionCall]:
        return calls[-1:]


class MeanAttention(LastLayerAttention):
    """What one token takes from each token, mean over all blocks and heads.

    Args:
        query, stack: as of `LastLayerAttention`.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
        >>> model = BertModel(BertConfig(vocab_size=20, **sizes)).eval()
        >>> found = MeanAttention().explain(model, {"input_ids": torch.tensor([[5, 6, 7, 8]])})
        >>> round(float(found.scores.sum()), 4)
        1.0
    """

    def _read(self, calls: list[AttentionCall]) -> list[AttentionCall]:
        return calls
