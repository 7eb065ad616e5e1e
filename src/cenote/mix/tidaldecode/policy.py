"""TidalDecode as a policy.

Source: Yang, Zhang, Chen, Li and Jia, "TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention"
(2025), arXiv 2410.05076.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.core import grouped, routing
from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least, require_one_of
from cenote.mix.policies import KVPolicy, Share
from cenote.models.live.reading import Held, Layout, Reads


class TidalState:
    """What the layers of one generation tell each other within a token.

    Attributes:
        reads: what the last selection layer chose for one query.
        mask: and for several, `[batch, heads, queries, keys]`.
    """

    def __init__(self) -> None:
        self.reads: Reads | None = None
        self.mask: Tensor | None = None


class TidalDecode(KVPolicy):
    """Two layers choose, the others read what was chosen: `top_k(q K' / sqrt(d))` of layer s, and again of layer c.

    Layers before s, and those that choose, read everything; their cost is what bounds the gain, see `speed_up`. The query's own
    key takes part like any other. All keys are kept.

    Args:
        budget: positions that are chosen, the top k.
        start: layer s, from 0.
        correction: layer c, or several that choose anew; those up to s change nothing. `choose_layers` measures which.
        share: "query_head" chooses for each query head; "kv_head" by the sum of scores of those that share a key head, which
            reads as many keys as were chosen, and not up to a group's number of times more.
        refresh_every: after so many tokens their keys and values are computed once more, reading everything; None for never.
        layers: of the model that `start` and `correction` were measured on; another one is refused. None for any.

    Raises:
        InputError: for numbers below 0, a share of another name; in use, for a model of fewer layers than it names.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 8}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)).eval()
        >>> words = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
        >>> with TidalDecode(budget=4, start=1, correction=3).on(model) as run:
        ...     _ = model.generate(words, max_new_tokens=2, do_sample=False, eos_token_id=None)
        >>> [run.read[layer] for layer in range(6)]
        [18, 18, 8, 18, 8, 8]

    Source: Yang et al. (2025), arXiv 2410.05076.

    Note:
        The authors' code has neither the shared choice nor refreshing; the latter follows the paper's words alone.
    """

    def __init__(
        self,
        budget: int,
        start: int = 2,
        correction: int | Collection[int] = 9,
        share: Share = "query_head",
        refresh_every: int | None = None,
        layers: int | None = None,
    ) -> None:
        super().__init__(budget)
        again = (correction,) if isinstance(correction, int) else tuple(sorted(set(correction)))
        require_at_least(0, start=start, correction=min(again, default=0))
        require_one_of(get_args(Share), share=share)
        if refresh_every is not None:
            require_at_least(1, refresh_every=refresh_every)
        self.start, self.correction, self.share = start, again, share
        self.refresh_every, self.layers = refresh_every, layers

    def begin(self, layout: Layout) -> TidalState:
        if self.layers is not None and self.layers != layout.layers:
            raise InputError(
                f"layers: the choice of layers was measured on a model of {self.layers}, and this one has {layout.layers}; "
                f"measure it on this one (choose_layers)"
            )
        beyond = [layer for layer in self.correction if layer >= layout.layers]
        if beyond and self.start < layout.layers:
            raise InputError(
                f"correction: layer {beyond[0]} of a model of {layout.layers} layers, which count from 0; measure which it "
                f"should be (choose_layers)"
            )
        return TidalState()

    def selects(self, layer: int) -> bool:
        """Whether this layer chooses for those behind it."""
        return layer == self.start or (layer > self.start and layer in self.correction)

    def reads_all(self, layer: int) -> bool:
        """Whether it reads everything, whatever the budget."""
        return layer < self.start or self.selects(layer)

    def read(self, layer: int, q: Float[Tensor, "batch heads 1 width"], held: Held, state: TidalState) -> Reads | None:
        if layer < self.start or held.count <= self.budget:
            return None
        if self.selects(layer):
            scores = self.scores(layer, q, held)[:, :, 0]
            real = None if held.whole else held.real.repeat_interleave(scores.shape[1] // held.keys.shape[1], 1)
            state.reads = Reads(*routing.best_numbers(scores, self.budget, real))
            return None
        return state.reads

    def choose(
        self, layer: int, q: Float[Tensor, "batch heads queries width"], held: Held, state: TidalState
    ) -> Bool[Tensor, "batch _heads queries keys"] | None:
        """Of several queries each has its own choice."""
        if layer < self.start or held.count <= self.budget:
            return None
        if self.selects(layer):
            state.mask = self.chosen(layer, q, held)
            return None
        return state.mask

    def scores(
        self,
        layer: int,  # noqa: ARG002
        q: Float[Tensor, "batch heads queries width"],
        held: Held,
    ) -> Float[Tensor, "batch _heads queries keys"]:
        """By what a layer chooses, of key heads or of heads."""
        return select_scores(q, held.keys, held.scale, self.share)

    def chosen(
        self, layer: int, q: Float[Tensor, "batch heads queries width"], held: Held
    ) -> Bool[Tensor, "batch _heads queries keys"]:
        """The positions with the highest scores, among those that a query may read; of key heads, or of heads."""
        scores = self.scores(layer, q, held)
        own = held.last + torch.arange(1 - q.shape[2], 1, device=q.device)
        may = held.real[:, :, None] & (held.positions[:, :, None] <= own.unsqueeze(-1))
        return routing.best(scores, self.budget, may.repeat_interleave(scores.shape[1] // may.shape[1], 1))


def select_scores(
    q: Float[Tensor, "batch heads queries width"],
    k: Float[Tensor, "batch kv_heads keys width"],
    scale: float,
    share: Share = "query_head",
) -> Float[Tensor, "batch _heads queries keys"]:
    """`scale q K'`, at least float32; of a key head the sum over its query heads."""
    scores = grouped.products(q, k)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale
    return routing.over_group(scores, k.shape[1], "sum") if share == "kv_head" else scores


def attend_selected(
    q: Float[Tensor, "batch heads queries width"],
    k: Float[Tensor, "batch kv_heads keys width"],
    v: Float[Tensor, "batch kv_heads keys value_width"],
    selected: Bool[Tensor, "batch heads queries keys"],
    mask: Float[Tensor, "#batch 1 queries keys"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "batch heads queries value_width"]:
    """A sparse layer with its mask written out: scores of what was not selected are the lowest number, softmax in float32.

    What `TidalDecode` does by gathering; reads all keys.

    Args:
        q, k, v: queries, and keys and values of the key heads.
        selected: what was chosen, of each query head.
        mask: added to the scores.
        scale: of the products, `1 / sqrt(width)` by default.
    """
    scores = grouped.products(q, k) * (q.shape[3] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores + mask
    scores = scores.masked_fill(~selected, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return grouped.mixed(weights.to(q.dtype), v)


def rows_read(layers: int, tokens: int, budget: int, start: int = 2, correction: int | Collection[int] = 9) -> int:
    """Keys that one token reads in all layers, of each head: `(s + n) T + (L - s - n) k` with n layers that choose.

    Args:
        layers: L, of the model.
        tokens: T, in the cache.
        budget, start, correction: as of `TidalDecode`; k is no more than T.

    Example:
        >>> rows_read(layers=32, tokens=10_000, budget=256)
        47168
    """
    again = {correction} if isinstance(correction, int) else set(correction)
    whole = min(start, layers) + (start < layers) + sum(start < layer < layers for layer in again)
    return whole * tokens + (layers - whole) * min(budget, tokens)


def speed_up(layers: int, tokens: int, budget: int, start: int = 2, correction: int | Collection[int] = 9) -> float:
    """`L T / ((s + n) T + (L - s - n) k)`: how many times fewer keys are read, which bounds what attention can gain.

    Args:
        layers, tokens, budget, start, correction: as of `rows_read`.

    Example:
        >>> round(speed_up(layers=32, tokens=10_000, budget=256), 2)
        6.78
    """
    return layers * tokens / rows_read(layers, tokens, budget, start, correction)
