"""SeerAttention-R's gates beside the attention of a real decoder: what decoding reads, and what the gates learn.

Source: Gao et al., "SeerAttention-R: Sparse Attention Adaptation for Long Reasoning" (2025), arXiv 2506.08889.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core import grouped, routing
from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least
from cenote.core.rotary import Angles, angles
from cenote.mix.block_rivals import BlockScorer
from cenote.mix.blocks import Pooling
from cenote.mix.layer_gates import BeforePositions, GateLoss, Heads, LayerGates, divergence, real_keys, require_plain
from cenote.mix.seerattention_r.gate import (
    MASKED,
    BlockRope,
    CompressedKeys,
    GroupGate,
    Query,
    block_starts,
    row_target,
    select,
    valid_blocks,
)
from cenote.models.live import AttentionCall, Place, Run, Where
from cenote.models.live.edits import Trace


class SeerAttentionR(LayerGates):
    """Gates for the decoding of a frozen decoder, one in each block.

    Train them with `distil_gates(SeerRowLoss(gates), model, draw, steps=..., last_lr=1e-5)`; decode with them by
    `edited(model, SparseDecoding(gates, budget=512))`.

    Args:
        model: a causal decoder with rotary positions; it is not changed, nor held.
        block: tokens of a block.
        gate_width: `None` for the width of a head, whose positions are then those of the model.
        query, k_pools, norm, blind: of each gate, see `GroupGate`.
        blocks: numbers of the decoder's blocks that have a gate; None for all.

    Raises:
        InputError: where the model is no such decoder.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)).eval()
        >>> from cenote.models.live import edited
        >>> gates = SeerAttentionR(model, block=4)
        >>> with edited(model, SparseDecoding(gates, budget=4)):
        ...     model.generate(torch.arange(1, 13)[None], max_new_tokens=3, do_sample=False, eos_token_id=None).shape
        torch.Size([1, 15])

    Source: Gao et al. (2025), arXiv 2506.08889.
    """

    def __init__(
        self,
        model: nn.Module,
        block: int = 64,
        gate_width: int | None = None,
        query: Query = "proj",
        k_pools: Sequence[Pooling] = ("max", "min", "avg"),
        *,
        norm: bool = True,
        blind: bool = False,
        blocks: Collection[int] | None = None,
    ) -> None:
        super().__init__(
            model,
            blocks,
            block=block,
            gate_width=gate_width,
            query=query,
            k_pools=list(k_pools),
            norm=norm,
            blind=blind,
        )

    @staticmethod
    def gate(heads: Heads, **settings: Any) -> GroupGate:
        return GroupGate(heads.width, heads.queries, heads.keys, **settings)


class SparseDecoding(BeforePositions):
    """Each decoded token reads the blocks of the cache alone that its gates choose, one choice per head of keys.

    The prompt is read whole, and the cache kept whole. Blocks are cut by slots of the cache, padding among them, as in the
    authors' code, so that those of a padded item lie otherwise than those of the item alone. For
    `cenote.models.live.edited`; several prompts may follow one another.

    Args:
        gates: of the model.
        budget: tokens that are read, beside the last block; `budget // block` blocks.
        threshold: in place of a budget, blocks whose softmax is above it.
        start: blocks of the decoder before this one read everything.
        rope: position of a block that decoding filled, see `CompressedKeys`.
        choose: in place of the gates, what scores blocks, see `cenote.mix.block_rivals`; query heads of a group share the
            highest of their scores.

    Attributes:
        kept: of each place the blocks that each token read, `[batch, kv_heads, 1, blocks]`, step by step.
        read: of each computation, how many keys its heads of keys read, all items together, and how many there were.

    Raises:
        InputError: unless either a budget or a threshold is given; on leaving, where nothing was decoded; in use, for beams,
            for caches that were cropped or not kept, and for attention with soft caps, sinks or biases.
    """

    counts_itself = True

    def __init__(
        self,
        gates: SeerAttentionR,
        *,
        budget: int | None = None,
        threshold: float | None = None,
        start: int = 0,
        rope: BlockRope = "start",
        choose: BlockScorer | None = None,
    ) -> None:
        require_at_least(0, start=start)
        if (budget is None) == (threshold is None):
            raise InputError("budget: give either a budget of tokens or a threshold")
        where = gates.where
        super().__init__(gates, Where([n for n in where.blocks or () if n >= start], where.kinds, where.stack))
        self.budget, self.threshold, self.rope, self.choose = budget, threshold, rope, choose
        self.kept = Trace()
        self.read: list[tuple[int, int]] = []
        self._caches: dict[Place, CompressedKeys] = {}
        self._last: dict[Place, Tensor] = {}

    def joins(self, run: Run) -> None:
        self._run = run

    def begins(self) -> None:
        self.kept.clear()
        self.read.clear()
        self._caches.clear()
        self._last.clear()

    def attends(
        self, call: AttentionCall, fused: Callable[[AttentionCall], Tensor]
    ) -> Float[Tensor, "batch heads queries width"]:
        gate = cast(GroupGate, self.gates.of(call.place))
        dtype = gate.key_maps.dtype
        if call.queries == call.keys:
            self._require_cache(call)
            self._caches[call.place] = CompressedKeys(gate, self.rope)
        else:
            self._require_same(call)
        cache = self._caches[call.place]
        real = real_keys(call)
        q, k, by = self.before(call)
        by = _own(gate, by, real)
        with torch.no_grad():
            cache.append(k.to(dtype), by, real[:, -call.queries :])
        self._last[call.place] = call.k[:, :, -1]
        if call.queries > 1 or call.keys == 1:
            return fused(call)
        require_plain(call)
        there = cache.real[:, None]
        with torch.no_grad():
            if self.choose is None:
                scores = gate.scores(gate.queries(q.to(dtype), by), cache.keys, there)
            else:
                scores = routing.over_group(self.choose(call, gate.block, real), call.k.shape[1])
                scores = scores.masked_fill(~there[:, None], MASKED)
            kept = select(scores, budget=self.budget, threshold=self.threshold, block=gate.block, valid=there)
        self.kept.keep(call.place, kept, detach=True)
        self._run.counts(self, call.place, int(kept.sum()))
        may = kept.repeat_interleave(gate.block, -1)[..., : call.keys] & real[:, None, None]
        self.read.append((int(may.sum()), int(real.sum()) * may.shape[1]))
        numbers, valid = routing.packed(may[:, :, 0])
        k, v = (grouped.gathered(x, numbers) for x in (call.k, call.v))
        return grouped.attend(call.q, k, v, call.scale, readable=valid[:, :, None])

    def keys_read(self) -> float:
        """Of the keys that there were, those that decoding read; NaN where nothing was decoded."""
        there = sum(of for _, of in self.read)
        return sum(read for read, _ in self.read) / there if there else float("nan")

    def _require_cache(self, call: AttentionCall) -> None:
        """All tokens anew, and one more than before, is decoding that keeps no cache: nothing would be left out."""
        before, last = self._caches.get(call.place), self._last.get(call.place)
        if before is None or last is None or before.tokens != call.keys - 1 or len(last) != call.batch:
            return
        if torch.allclose(last, call.k[:, :, -2], atol=1e-3, rtol=1e-3):
            raise InputError("model: decodes without a cache, and reads everything; decode with use_cache=True")

    def _require_same(self, call: AttentionCall) -> None:
        """The cache must be the one that was seen growing."""
        cache, before = self._caches.get(call.place), call.keys - call.queries
        if cache is None or cache.tokens != before:
            seen = 0 if cache is None else cache.tokens
            raise InputError(
                f"model: {call.place.path} reads {before} keys of a cache of which {seen} were seen; begin with the prompt "
                f"inside of the context, without drafts"
            )
        if not torch.equal(self._last[call.place], call.k[:, :, before - 1]):
            raise InputError("model: the items of the cache changed places; decode without beams (num_beams=1)")


class SeerRowLoss(GateLoss):
    """What SeerAttention-R's gates have not learned of single rows of attention maps; for `distil_gates`.

    The Kullback-Leibler divergence from `row_target` to the gate's softmax over blocks, its mean over all elements of the rows
    that count as in the authors' code, averaged over texts.

    Args:
        gates: that learn.
        scale: factor on the loss.
        skipped: share of a text's first rows that do not count.
    """

    def __init__(self, gates: SeerAttentionR, scale: float = 10.0, skipped: float = 0.5) -> None:
        super().__init__(gates, scale)
        if not 0 <= skipped < 1:
            raise InputError(f"skipped: expected a share from 0 to below 1, got {skipped}")
        self.skipped = skipped

    def loss(self, call: AttentionCall, q: Tensor, k: Tensor, by: Angles) -> Float[Tensor, ""]:
        gate = cast(GroupGate, self.gates.of(call.place))
        dtype, real = gate.key_maps.dtype, real_keys(call)
        by = _own(gate, by, real)
        number = real.long().cumsum(1) - 1
        lengths = real.sum(1)
        counts = real & (number >= (lengths * self.skipped).long()[:, None])
        first = int(counts.any(0).to(torch.uint8).argmax())
        rows = torch.arange(first, call.keys, device=q.device)
        with torch.no_grad():
            target = row_target(call.q[:, :, first:], call.k, gate.block, real, call.scale)
        valid = valid_blocks(rows, call.keys, gate.block, real)
        keys = gate.keys(k.to(dtype), by.at(block_starts(real, gate.block)), real)
        at = Angles(*(x[:, first:] for x in by))
        logits = gate.scores(gate.queries(q[:, :, first:].to(dtype), at), keys, valid)
        each = divergence(logits, target).masked_fill(~counts[:, None, first:, None], 0.0).sum((1, 2, 3))
        blocks = valid.any(1).sum(1)
        return (each / (counts.sum(1) * blocks * target.shape[1]).clamp(min=1)).mean()


def _own(gate: GroupGate, by: Angles, real: Bool[Tensor, "batch keys"]) -> Angles:
    """Angles of the last tokens as wide as the gate: the model's, or its own where it is of another width."""
    if gate.gate_width == gate.width:
        return by
    number = (real.long().cumsum(1) - 1).clamp(min=0)
    return angles(number[:, -by.cos.shape[1] :], gate.gate_width)
