"""SeerAttention's gates beside the attention of a real decoder: sparse prompts, and what the gates learn.

Source: Gao et al., "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs" (2024), arXiv 2410.13276, NeurIPS 2025.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core.answers import UNASKED, answer_loss
from cenote.core.errors import InputError
from cenote.core.language import accepted
from cenote.core.requirements import require_at_least, require_positive
from cenote.core.rotary import Angles, angles
from cenote.mix.block_rivals import BlockScorer
from cenote.mix.blocks import Leftward, Pooling, block_attention, leftward, pooled_target
from cenote.mix.layer_gates import (
    BeforePositions,
    GateLoss,
    Heads,
    LayerGates,
    Texts,
    divergence,
    real_keys,
    require_plain,
    told,
    warmed_cosine,
    whole_prompt,
)
from cenote.mix.seerattention.gate import LATER, BlockGate, above, earlier, top_share
from cenote.models.live import AttentionCall, Where, edited
from cenote.models.live.edits import Trace


class SeerAttention(LayerGates):
    """Gates for the prompts of a frozen decoder, one in each block.

    Train them with `cenote.mix.layer_gates.distil_gates(SeerLoss(gates), model, draw, steps=...)`; run the decoder with them by
    `edited(model, SparsePrompts(gates, share=0.2))`.

    Args:
        model: a causal decoder with rotary positions; it is not changed, nor held.
        block: tokens of a block.
        gate_width: `None` for the width of a head, whose positions are then those of the model.
        q_pools, k_pools, force_double: of each gate, see `BlockGate`.
        blocks: numbers of the decoder's blocks that have a gate; None for all.

    Raises:
        InputError: where the model is no such decoder.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)).eval()
        >>> gates = SeerAttention(model, block=4)
        >>> with torch.no_grad(), edited(model, SparsePrompts(gates, share=0.5)):
        ...     model(torch.arange(16)[None]).logits.shape
        torch.Size([1, 16, 20])

    Source: Gao et al. (2024), arXiv 2410.13276.

    Note:
        Of the paper's rivals MInference and MoA are kernels for GPUs and cannot be installed beside; what scores blocks without
        training, and the upper bound, are in `cenote.mix.block_rivals`.
    """

    def __init__(
        self,
        model: nn.Module,
        block: int = 64,
        gate_width: int | None = None,
        q_pools: Sequence[Pooling] = ("avg",),
        k_pools: Sequence[Pooling] = ("max", "min", "avg"),
        *,
        force_double: bool = False,
        blocks: Collection[int] | None = None,
    ) -> None:
        super().__init__(
            model,
            blocks,
            block=block,
            gate_width=gate_width,
            q_pools=list(q_pools),
            k_pools=list(k_pools),
            force_double=force_double,
        )

    @staticmethod
    def gate(heads: Heads, **settings: Any) -> BlockGate:
        return BlockGate(heads.width, heads.queries, heads.keys, **settings)


class SparsePrompts(BeforePositions):
    """A prompt reads the blocks alone that its gates keep; decoding behind it reads everything.

    Give either a threshold or a share; both may be set anew between two prompts. For `cenote.models.live.edited`.

    Args:
        gates: of the model.
        threshold: blocks whose softmax among those of a row is above it; the release has 0.002.
        share: of the causal map, about; 1 for all.
        keep_diagonal: a block always reads itself; False as in the authors' code.
        last_dense: the last two rows of blocks read everything.
        at: the places; those that have gates by default.
        choose: in place of the gates, what scores blocks, see `cenote.mix.block_rivals`.

    Attributes:
        kept: of each place the blocks that each prompt kept, `[batch, heads, blocks, blocks]`.

    Raises:
        InputError: unless either a threshold or a share is given; in use, for attention with soft caps, sinks or biases.
    """

    def __init__(
        self,
        gates: SeerAttention,
        *,
        threshold: float | None = None,
        share: float | None = None,
        keep_diagonal: bool = True,
        last_dense: bool = True,
        at: Where | None = None,
        choose: BlockScorer | None = None,
    ) -> None:
        super().__init__(gates, at)
        if (threshold is None) == (share is None):
            raise InputError("threshold: give either a threshold or a share")
        self.threshold, self.share = threshold, share
        self.options = {"keep_diagonal": keep_diagonal, "last_dense": last_dense}
        self.choose = choose
        self.kept = Trace()

    def begins(self) -> None:
        self.kept.clear()

    def attends(
        self, call: AttentionCall, fused: Callable[[AttentionCall], Tensor]
    ) -> Float[Tensor, "batch heads queries width"]:
        if not whole_prompt(call):
            return fused(call)
        require_plain(call)
        laid = leftward(real_keys(call))
        kept = self._chosen(call, laid)
        self.kept.keep(call.place, kept, detach=True)
        block = _gate(self.gates, call).block
        rows = kept.repeat_interleave(block, 2)[:, :, : call.queries]
        q, k, v = (laid.laid(x) for x in (call.q, call.k, call.v))
        return laid.back(block_attention(q, k, v, rows, block, laid.real, call.scale))

    def _chosen(self, call: AttentionCall, laid: Leftward) -> Bool[Tensor, "batch heads blocks blocks"]:
        gate = _gate(self.gates, call)
        with torch.no_grad():
            if self.choose is None:
                logits = _logits(gate, *self.before(call), laid)
            else:
                logits = self.choose(call.replace(q=laid.laid(call.q), k=laid.laid(call.k)), gate.block, laid.real)
                logits = logits.masked_fill(~earlier(logits, laid.real, gate.block), LATER)
        if self.share is not None:
            return top_share(logits, self.share, laid.real, block=gate.block, **self.options)
        assert self.threshold is not None
        return above(logits, self.threshold, laid.real, block=gate.block, **self.options)


class SeerLoss(GateLoss):
    """What SeerAttention's gates have not learned of the pooled attention maps; for `cenote.mix.layer_gates.distil_gates`.

    The Kullback-Leibler divergence from `pooled_target` to the gate's softmax, its mean over all elements as in the authors'
    code, without the first quarter of rows.

    Args:
        gates: that learn.
        scale: factor on the loss.
        skipped: share of first rows of blocks that do not count.
    """

    def __init__(self, gates: SeerAttention, scale: float = 10.0, skipped: float = 0.25) -> None:
        super().__init__(gates, scale)
        self.skipped = skipped

    def loss(self, call: AttentionCall, q: Tensor, k: Tensor, by: Angles) -> Float[Tensor, ""]:
        gate = _gate(self.gates, call)
        laid = leftward(real_keys(call))
        logits = _logits(gate, q, k, by, laid)
        with torch.no_grad():
            target = pooled_target(laid.laid(call.q), laid.laid(call.k), gate.block, laid.real, call.scale)
        return gate_loss(logits, target, self.skipped)


def gate_loss(
    logits: Float[Tensor, "batch heads blocks blocks"],
    target: Float[Tensor, "batch heads blocks blocks"],
    skipped: float = 0.25,
) -> Float[Tensor, ""]:
    """`mean t (log t - log softmax(logits))`, over all elements of the rows that count.

    Args:
        logits: of a gate.
        target: rows that sum to 1, or to 0 where there is nothing to learn.
        skipped: share of first rows that do not count.
    """
    if not 0 <= skipped < 1:
        raise InputError(f"skipped: expected a share from 0 to below 1, got {skipped}")
    first = int(logits.shape[2] * skipped)
    return divergence(logits[:, :, first:], target[:, :, first:]).mean()


def train_jointly(
    gates: SeerAttention,
    model: nn.Module,
    draw: Callable[[], Texts],
    *,
    steps: int,
    share: float,
    lr: float = 1e-5,
    gate_lr: float = 1e-3,
    scale: float = 10.0,
    warmup: int = 20,
) -> list[tuple[float, float]]:
    """Train a decoder and its gates together, its attention sparse by the gates meanwhile: for longer contexts.

    The loss is that of the next token and `scale` times that of the gates. To extend a decoder by YaRN, load it so
    (`rope_parameters` of its configuration); gates see what is before positions whatever these are. The loss of the gates
    reaches the gates alone, and their choice passes no gradient (inferred).

    Args:
        gates: of the model.
        model: which is changed.
        draw: gives the texts of a step.
        steps: how many.
        share: of the causal map that is read.
        lr, gate_lr: largest rates of the model and of its gates.
        scale: factor on the gates' loss.
        warmup: steps over which rates rise; they fall along a cosine.

    Returns:
        The loss of the next token and that of the gates, step by step.
    """
    require_at_least(1, steps=steps)
    require_positive(lr=lr, gate_lr=gate_lr)
    groups = [{"params": list(model.parameters()), "lr": lr}, {"params": list(gates.parameters()), "lr": gate_lr}]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, warmed_cosine(steps, warmup))
    # targets are those of full attention, each block's on what it reads
    learning, sparse = SeerLoss(gates, scale), SparsePrompts(gates, share=share)
    losses = []
    for _ in range(steps):
        ids, mask = draw()
        optimiser.zero_grad()
        with edited(model, learning, sparse):
            logits = model(input_ids=ids, **told(mask), **accepted(model, use_cache=False)).logits
        loss = answer_loss(logits, ids if mask is None else ids.masked_fill(~mask, UNASKED))
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append((float(loss.detach()), sum(learning.losses)))
    return losses


def _gate(gates: LayerGates, call: AttentionCall) -> BlockGate:
    return cast(BlockGate, gates.of(call.place))


def _logits(
    gate: BlockGate, q: Tensor, k: Tensor, by: Angles, laid: Leftward
) -> Float[Tensor, "batch heads blocks blocks"]:
    dtype = gate.key_maps.dtype
    starts = by.at(laid.order[:, :: gate.block])
    if gate.gate_width != gate.width:
        starts = angles(torch.arange(0, q.shape[2], gate.block, device=q.device)[None], gate.gate_width)
    return gate(laid.laid(q).to(dtype), laid.laid(k).to(dtype), starts, laid.real)
