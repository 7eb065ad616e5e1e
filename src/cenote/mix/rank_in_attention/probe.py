"""Whether the heads of a model are wide enough: the spectrum of their scores, and what cutting them costs.

Source: Amsel, Yehudai and Bruna, "On the Benefits of Rank in Attention Layers" (2024), arXiv 2407.16153; the probe is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.requirements import require_at_least, require_positive
from cenote.models.live import AttentionCall, AttentionEdit, Place, Where, edited, recorded
from cenote.models.live.calls import may_read, real_tokens


def weight_spectrum(
    query: Float[Tensor, "queries dim"], key: Float[Tensor, "keys dim"], heads: int
) -> Float[Tensor, "heads width"]:
    """Singular values of `W_Q^T W_K` of each head, from the projections' weights; keys of grouped heads may be fewer.

    The product of two `[width, dim]` maps has as many as the product of their triangular factors, which are small.
    """
    if query.shape[0] % heads or key.shape[0] % (query.shape[0] // heads):
        raise InputError(f"heads: {heads} of queries {list(query.shape)} and keys {list(key.shape)}")
    width = query.shape[0] // heads
    q, k = query.double().view(heads, width, -1), key.double().view(-1, width, key.shape[1])
    k = k.repeat_interleave(heads // len(k), 0)
    return torch.linalg.svdvals(torch.linalg.qr(q.mT)[1] @ torch.linalg.qr(k.mT)[1].mT)


def effective_rank(spectrum: Float[Tensor, "*heads width"]) -> Float[Tensor, "*heads"]:
    """`exp` of the entropy of the singular values' shares: as many as there are if all are alike (Roy and Vetterli, 2007).

    >>> effective_rank(torch.tensor([1.0, 1.0, 0.0])).item()
    2.0
    """
    share = spectrum / spectrum.sum(-1, keepdim=True).clamp(min=1e-300)
    return (-torch.special.xlogy(share, share).sum(-1)).exp()


class ScoreMaps(NamedTuple):
    """Of the heads of a block, from queries and keys that were seen.

    Attributes:
        spectrum: singular values of the scores' map, in units of the root mean square of scores.
        left, right: the map's factors: the best of rank r is `q left_r (k right_r)`.
    """

    spectrum: Float[Tensor, "heads width"]
    left: Float[Tensor, "heads width width"]
    right: Float[Tensor, "heads width width"]


class NeededRank(NamedTuple):
    """What cutting costs.

    Attributes:
        whole: the loss as the model is.
        losses: at each rank that was tried.
        needed: the smallest rank whose loss is within the tolerance; None where none is.
    """

    whole: float
    losses: dict[int, float]
    needed: int | None


class RankProbe:
    """Cuts the scores of heads to a lower rank in a running model.

    Scores are `q_i . k_j`, after whatever positions the model has. Of all maps `q B k` of rank r the one is taken that is
    nearest to them in the mean square over all pairs that were seen: with `C_q`, `C_k` the second moments, it is made of the
    singular vectors of `C_q^(1/2) C_k^(1/2)`. No weights are looked up, and the model's own attention function runs.

    Args:
        model: one that `cenote.models.live` reaches.
        inputs: what queries and keys are taken from; those of padding are not seen.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)).eval()
        >>> probe = RankProbe(model, {"input_ids": torch.arange(12)[None]})
        >>> {place: scores.spectrum.shape for place, scores in probe.heads.items()}
        {0: torch.Size([2, 8])}
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        self.model, self.inputs = model, inputs
        with recorded(model, "inputs", at=Where(kinds=["self"])) as found, torch.no_grad():
            model(**inputs)
        calls: Mapping[Place, Sequence[AttentionCall]] = found["inputs"]
        self.heads = {place.block: _of_heads(each) for place, each in calls.items()}

    def effective_ranks(self) -> dict[int, Float[Tensor, "heads"]]:
        """Of every block's heads."""
        return {block: effective_rank(scores.spectrum) for block, scores in self.heads.items()}

    def loss(self, inputs: Mapping[str, Any] | None = None) -> float:
        """Mean loss of the next token of a causal language model, in nats; padding on either side does not count.

        Raises:
            InputError: for a model that does not give the logits of the next tokens.
        """
        inputs = self.inputs if inputs is None else inputs
        tokens = inputs.get("input_ids")
        with torch.no_grad():
            logits = getattr(self.model(**inputs), "logits", None)
        if tokens is None or logits is None or logits.shape[:2] != tokens.shape or logits.dim() != 3:
            raise InputError(
                f"model: {type(self.model).__name__} gives no logits of the next of its input_ids; give needed() a loss of "
                f"your own"
            )
        each = nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none"
        )
        mask = inputs.get("attention_mask")
        if mask is None:
            return float(each.mean())
        counted = ((mask[:, 1:] != 0) & (mask[:, :-1] != 0)).flatten()
        return float(each[counted].mean())

    def needed(
        self,
        ranks: Sequence[int] | None = None,
        heads: Sequence[tuple[int, int]] | None = None,
        tolerance: float = 0.01,
        loss: Callable[[], float] | None = None,
    ) -> NeededRank:
        """The smallest rank to which heads can be cut.

        Args:
            ranks: that are tried; powers of two up to the width by default.
            heads: pairs of block and head that are cut, all by default; ask of one after the other for each head's own need.
            tolerance: share of the loss that it may cost.
            loss: of the model as it stands, smaller is better; `self.loss` by default.
        """
        require_positive(tolerance=tolerance)
        width = max(scores.spectrum.shape[1] for scores in self.heads.values())
        tried = [2**i for i in range(width.bit_length()) if 2**i < width] + [width] if ranks is None else list(ranks)
        measure = self.loss if loss is None else loss
        whole, losses = measure(), {}
        for rank in tried:
            with edited(self.model, CutRank(self.heads, rank, heads)):
                losses[rank] = measure()
        enough = [rank for rank, value in losses.items() if value <= whole * (1 + tolerance)]
        return NeededRank(whole, losses, min(enough, default=None))


class CutRank(AttentionEdit):
    """Scores of heads in the nearest form of rank r.

    Args:
        scores: of each block.
        rank: r.
        heads: pairs of block and head; all by default.
    """

    def __init__(
        self, scores: Mapping[int, ScoreMaps], rank: int, heads: Sequence[tuple[int, int]] | None = None
    ) -> None:
        require_at_least(1, rank=rank)
        self.rank, self.maps = rank, {}
        for block, of_block in scores.items():
            chosen = [h for b, h in heads if b == block] if heads is not None else list(range(len(of_block.spectrum)))
            if not chosen:
                continue
            width = of_block.left.shape[-1]
            maps = torch.eye(width, dtype=torch.float64).repeat(len(of_block.spectrum), 1, 1)
            cut = of_block.left[..., :rank] @ of_block.right[..., :rank].mT
            maps[chosen] = cut[chosen]
            self.maps[block] = maps
        if not self.maps:
            raise InputError(f"heads: none of {list(heads or [])} is in blocks {list(scores)}")
        self.at = Where(set(self.maps), ["self"])

    def inputs(self, call: AttentionCall) -> AttentionCall:
        return call.replace(q=call.q @ self.maps[call.place.block].to(call.q))


def _of_heads(calls: Sequence[AttentionCall]) -> ScoreMaps:
    real = [_real(c) for c in calls]
    q, k = (
        torch.cat([x.double().transpose(1, 2)[r] for x, r in zip(each, real, strict=True)]).transpose(0, 1)
        for each in ([c.q for c in calls], [c.k for c in calls])
    )
    k = k.repeat_interleave(len(q) // len(k), 0)
    of_queries, of_keys = (_roots(x) for x in (q, k))
    u, spectrum, v = torch.linalg.svd(of_queries[0] @ of_keys[0])
    # B = C_q^(-1/2) U S V^T C_k^(-1/2), split where the rank is cut
    return ScoreMaps(spectrum, of_queries[1] @ u * spectrum.unsqueeze(-2), of_keys[1] @ v.mT)


def _real(call: AttentionCall) -> Bool[Tensor, "batch tokens"]:
    """Tokens that may read themselves: padding may not."""
    found = torch.ones(call.batch, call.keys, dtype=torch.bool, device=call.q.device)
    for mask in (call.readable(), None if call.bias is None else may_read(call.bias)):
        if mask is not None:
            found = found & real_tokens(mask.expand(*mask.shape[:2], call.queries, call.keys), call.batch)
    return found


def _roots(x: Float[Tensor, "heads seen width"]) -> tuple[Tensor, Tensor]:
    """Square root of the second moments, and its pseudo-inverse."""
    values, vectors = torch.linalg.eigh(x.mT @ x / x.shape[1])
    values = values.clamp(min=0.0)
    small = values <= values.amax(-1, keepdim=True) * 1e-12
    inverse = values.masked_fill(small, 1.0).rsqrt().masked_fill(small, 0.0)
    root = values.masked_fill(small, 0.0).sqrt()
    return (vectors * root.unsqueeze(-2)) @ vectors.mT, (vectors * inverse.unsqueeze(-2)) @ vectors.mT
