"""MoBA in running decoders, as a mixer of its own, and in training beside full attention.

Source: Lu et al., "MoBA: Mixture of Block Attention for Long-Context LLMs" (2025), arXiv 2502.13189, NeurIPS.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core.answers import UNASKED, answer_loss
from cenote.core.errors import InputError
from cenote.core.language import accepted
from cenote.core.requirements import require_at_least, require_one_of, require_positive
from cenote.core.rotary import angles, rotated
from cenote.mix.base import Mixer
from cenote.mix.blocks import Leftward, block_attention, leftward, masked_attention, masked_weights, own_block, readable
from cenote.mix.layer_gates import Texts, real_keys, require_plain, told, whole_prompt
from cenote.mix.moba.attention import Routed, route
from cenote.models.live import AttentionCall, AttentionEdit, Where, attentions, edited, one_stack
from cenote.models.live.edits import Trace, require_where

Rule = Literal["mean", "random", "window", "blind"]


class MoBA(AttentionEdit):
    """Blocks of keys are chosen by their mean keys wherever all tokens are read at once; decoding behind that reads everything.

    Gradients pass, so that a decoder can be trained with it. For `cenote.models.live.edited`.

    Args:
        block: tokens of a block.
        top: blocks that a query reads, its own among them.
        first, last: blocks that are always among them, see `route`.
        at: the places; see `all_but_last` for a hybrid of layers.
        rule: `"mean"` as in the paper; rivals and controls: `"random"`: past blocks by lot, the own kept; `"window"`: the last
            ones; `"blind"`: the router is given the mean of the queries so far, and does not see the query.
        seed: of `"random"`.

    Attributes:
        chosen: of each place which blocks each query read, `[batch, heads, tokens, blocks]`, tokens counted without padding.

    Raises:
        InputError: where more blocks are always taken than `top`; in use, for attention with soft caps, sinks or biases.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from cenote.models.live import edited
        >>> sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)).eval()
        >>> with edited(model, MoBA(block=4, top=2, at=all_but_last(model, 1))):
        ...     model(torch.arange(16)[None]).logits.shape
        torch.Size([1, 16, 20])

    Source: Lu et al. (2025), arXiv 2502.13189.
    """

    def __init__(
        self,
        block: int = 512,
        top: int = 3,
        *,
        first: int = 0,
        last: int = 0,
        at: Where | None = None,
        rule: Rule = "mean",
        seed: int = 0,
    ) -> None:
        require_at_least(1, block=block, top=top)
        require_one_of(get_args(Rule), rule=rule)
        self.at = require_where(at) if at is not None else Where(kinds=["self"])
        self.block, self.top, self.first, self.last, self.rule, self.seed = block, top, first, last, rule, seed
        self.chosen = Trace()
        self._drawn = torch.Generator().manual_seed(seed)

    def begins(self) -> None:
        self.chosen.clear()
        self._drawn.manual_seed(self.seed)

    def attends(
        self, call: AttentionCall, fused: Callable[[AttentionCall], Tensor]
    ) -> Float[Tensor, "batch heads queries width"]:
        if not whole_prompt(call):
            return fused(call)
        require_plain(call)
        laid = leftward(real_keys(call))
        q, k, v = (laid.laid(x) for x in (call.q, call.k, call.v))
        chosen = self._routed(q, k, laid).chosen
        self.chosen.keep(call.place, chosen, detach=True)
        return laid.back(block_attention(q, k, v, chosen, self.block, laid.real, call.scale))

    def _routed(self, q: Tensor, k: Tensor, laid: Leftward) -> Routed:
        always = {"first": self.first, "last": self.last}
        if self.rule == "window":
            always["last"] = self.top - 1 - self.first
        if self.rule == "random":
            # products with keys that are drawn are as good as any lot
            q = torch.randn(q.shape, generator=self._drawn).to(q.device)
            k = torch.randn(k.shape, generator=self._drawn).to(q)
        if self.rule == "blind":
            q = q.cumsum(2) / torch.arange(1, q.shape[2] + 1, device=q.device)[:, None]
        return route(q, k, self.block, self.top, laid.real, **always)


def all_but_last(model: nn.Module, last: int) -> Where:
    """The attention of all blocks of a decoder but the last ones, which read everything.

    Raises:
        InputError: where none would be left.
    """
    where = one_stack(model)
    blocks = sorted(place.block for place in attentions(model) if place in where)
    if not 0 <= last < len(blocks):
        raise InputError(f"last: expected from 0 to below {len(blocks)}, got {last}")
    return Where(blocks[: len(blocks) - last], where.kinds, where.stack)


class MoBAMixer(Mixer):
    """Multi-head attention to chosen blocks, with projections of its own; causal.

    Args:
        dim: of tokens.
        heads: of queries.
        block, top, first, last: see `route`.
        kv_heads: of keys and values; None for as many.
        rope: base of rotary positions; None for no positions.
        bias: of the projections.

    Raises:
        InputError: where heads do not come apart.

    Example:
        >>> MoBAMixer(16, heads=2, block=4, top=2)(torch.randn(1, 10, 16)).shape
        torch.Size([1, 10, 16])

    Source: Lu et al. (2025), arXiv 2502.13189.
    """

    causal = True

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        block: int = 64,
        top: int = 3,
        *,
        kv_heads: int | None = None,
        first: int = 0,
        last: int = 0,
        rope: float | None = 10_000.0,
        bias: bool = False,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        require_at_least(1, dim=dim, heads=heads, kv_heads=kv_heads, block=block, top=top)
        if dim % heads or heads % kv_heads:
            raise InputError(f"heads: {dim} channels, {heads} heads and {kv_heads} heads of keys do not come apart")
        width = dim // heads
        if rope is not None and width % 2:
            raise InputError(
                f"heads: rotary positions need heads of an even width, got {width}; give other heads or rope=None"
            )
        self.dim, self.heads, self.kv_heads, self.block, self.top = dim, heads, kv_heads, block, top
        self.first, self.last, self.rope = first, last, rope
        self.queries = nn.Linear(dim, dim, bias=bias)
        self.keys = nn.Linear(dim, kv_heads * width, bias=bias)
        self.values = nn.Linear(dim, kv_heads * width, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)

    def mix(
        self,
        x: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"],
        positions: Int[Tensor, "batch tokens"],
    ) -> Float[Tensor, "batch tokens dim"]:
        laid = leftward(mask)
        q, k, v = self._projected(x, positions, laid)
        chosen = route(q, k, self.block, self.top, laid.real, first=self.first, last=self.last).chosen
        if torch.compiler.is_compiling():
            # how many queries choose a block is known only when it runs
            y = masked_attention(q, k, v, readable(chosen, self.block, k.shape[2], laid.real))
        else:
            y = block_attention(q, k, v, chosen, self.block, laid.real)
        return self.out(laid.back(y).transpose(1, 2).flatten(2))

    def weights_of(
        self,
        x: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
        positions: Int[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch heads tokens tokens"]:
        """What each token takes of each."""
        mask, positions = self._checked(x, mask, positions)
        laid = leftward(mask)
        q, k, _ = self._projected(x.masked_fill(~mask[..., None], 0.0), positions, laid)
        chosen = route(q, k, self.block, self.top, laid.real, first=self.first, last=self.last).chosen
        weights = laid.back(masked_weights(q, k, readable(chosen, self.block, k.shape[2], laid.real)))
        return laid.back(weights.mT).mT.to(x.dtype)

    def _projected(self, x: Tensor, positions: Tensor, laid: Leftward) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            made(x).unflatten(-1, (heads, -1)).transpose(1, 2)
            for made, heads in ((self.queries, self.heads), (self.keys, self.kv_heads), (self.values, self.kv_heads))
        )
        if self.rope is not None:
            by = angles(positions, q.shape[-1], self.rope)
            q, k = rotated(q, by), rotated(k, by)
        return laid.laid(q), laid.laid(k), laid.laid(v)


def train_hybrid(
    model: nn.Module,
    draw: Callable[[], Texts],
    *,
    steps: int,
    edit: MoBA | None,
    share: float = 0.9,
    blocks: Callable[[int], Collection[int]] | None = None,
    lr: float = 1e-3,
) -> list[float]:
    """Train a decoder with MoBA first, and with full attention at the end; or continue one that was trained without it.

    Args:
        model: a causal decoder, which is changed.
        draw: gives the texts of a step.
        steps: how many.
        edit: MoBA; None for full attention throughout.
        share: of the steps that have MoBA.
        blocks: of a step, numbers of the blocks that have it; where the edit acts by default.
        lr: largest rate; it falls to zero along a cosine.

    Returns:
        The loss of the next token, step by step.

    Raises:
        InputError: for a share that is none.
    """
    require_at_least(1, steps=steps)
    require_positive(lr=lr)
    if not 0 <= share <= 1:
        raise InputError(f"share: expected from 0 to 1, got {share}")
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    everywhere = edit.at if edit is not None else Where()
    losses = []
    try:
        for step in range(steps):
            ids, mask = draw()
            given = {"input_ids": ids, **told(mask), **accepted(model, use_cache=False)}
            sparse = edit is not None and step < round(share * steps)
            if sparse and edit is not None and blocks is not None:
                edit.at = Where(blocks(step), everywhere.kinds, everywhere.stack)
            if sparse and edit is not None and (edit.at.blocks is None or len(edit.at.blocks)):
                with edited(model, edit):
                    logits = model(**given).logits
            else:
                logits = model(**given).logits
            loss = answer_loss(logits, ids if mask is None else ids.masked_fill(~mask, UNASKED))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            losses.append(float(loss.detach()))
    finally:
        if edit is not None:
            edit.at = everywhere
    return losses


def keys_read(
    chosen: Bool[Tensor, "batch heads tokens blocks"], block: int, real: Bool[Tensor, "batch tokens"] | None = None
) -> Float[Tensor, ""]:
    """Of the keys that a causal map would read, the share that these choices read.

    Args:
        chosen: blocks of each query, none of a later one.
        block: tokens of a block.
        real: False on padding.
    """
    batch, heads, tokens, _ = chosen.shape
    at = torch.arange(tokens, device=chosen.device)
    own = own_block(tokens, block, chosen.device)
    whole = torch.nn.functional.one_hot(own, chosen.shape[-1]).bool()
    # of past blocks all tokens, of the own one those up to the query
    read = (chosen & ~whole).sum(-1) * block + (chosen & whole).any(-1) * (at - own * block + 1)
    there = torch.ones(batch, tokens, dtype=torch.bool, device=chosen.device) if real is None else real
    return (read * there[:, None]).sum() / (((at + 1) * there).sum() * heads)
