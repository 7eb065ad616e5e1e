"""A stack's blocks as they ran: what attention read and gave, the map behind the heads, what stood before each norm.

Found by what happens, not by names: the output projection is the module that is given the outputs of the heads; norms are
post-norms where the block's output is that of its last one, pre-norms where its input is what the first one reads.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.language import accepted
from cenote.models.live.calls import AttentionCall, Place
from cenote.models.live.edited import edited
from cenote.models.live.edits import HeadRecorder, InputsRecorder, StateRecorder, Where
from cenote.models.live.places import NORM, attentions, blocks

LARGE = 1e4
"""Of what a norm is tried with: its epsilon does not matter beside."""
FORM = 1e-3
"""How far a norm may be from `gain (x - mean) / deviation + bias`, relative to the largest output."""


class Normed(NamedTuple):
    """A norm, and what it read and wrote, `[batch, tokens, dim]`."""

    module: nn.Module
    read: Float[Tensor, "batch tokens dim"]
    wrote: Float[Tensor, "batch tokens dim"]


class Layer(NamedTuple):
    """A block as it ran.

    Attributes:
        call: attention's queries, keys, values.
        heads: outputs of the heads, `[batch, heads, tokens, width]`.
        projection: what they go through next.
        read, wrote: the block's hidden states.
        norms: those beside attention, in the order in which they ran.
    """

    call: AttentionCall
    heads: Float[Tensor, "batch heads tokens width"]
    projection: nn.Module
    read: Float[Tensor, "batch tokens dim"]
    wrote: Float[Tensor, "batch tokens dim"]
    norms: tuple[Normed, ...]

    @property
    def order(self) -> Literal["pre", "post", "other"]:
        """Where the norms stand: before attention and the feed-forward part, behind each sum, or otherwise."""
        if len(self.norms) == 2 and torch.equal(self.norms[-1].wrote, self.wrote):
            return "post"
        if self.norms and len(self.norms) <= 2 and torch.equal(self.norms[0].read, self.read):
            return "pre"
        return "other"


def one_stack(model: nn.Module, stack: str | None = None) -> Where:
    """The self-attention of a model's list of blocks.

    Raises:
        InputError: where it has several and none is named, or none of that name.
    """
    everywhere = attentions(model)
    if not everywhere:
        raise InputError(
            f"model: found no attention in {type(model).__name__}; expected a transformer whose blocks attend, such as those "
            f"that `cenote models show` can reach"
        )
    found = {place.stack for place in everywhere if place.kind == "self" and stack in (None, place.stack)}
    if len(found) != 1:
        there = ", ".join(repr(s) for s in sorted({p.stack for p in everywhere})) or "none"
        raise InputError(
            f"stack: {len(found)} lists of blocks with self-attention are called {stack!r}; there are: {there}"
            if stack is not None
            else f"stack: the model has {len(found)} lists of blocks with self-attention; name one of: {there}"
        )
    return Where(kinds=["self"], stack=found.pop())


def few_logits(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same inputs, asking for the logits of the last token alone, and no cache, where the model can be asked."""
    return {**accepted(model, logits_to_keep=1, use_cache=False), **inputs}


def layers(model: nn.Module, inputs: Mapping[str, Any], stack: str | None = None) -> list[Layer]:
    """Run a model once and keep what its blocks did; its output stays the same to the bit.

    Args:
        model: in eval mode.
        inputs: of its forward.
        stack: path of the list of blocks, where a model has several.

    Raises:
        InputError: where a block's attention cannot be reached, runs more than once, or has no output projection that is a
            module of its own.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
        >>> model = BertModel(BertConfig(vocab_size=20, **sizes)).eval()
        >>> [layer.order for layer in layers(model, {"input_ids": torch.tensor([[5, 6, 7]])})]
        ['post', 'post']
    """
    at = one_stack(model, stack)
    calls, heads, states = InputsRecorder(at), HeadRecorder(at), StateRecorder(Where(stack=at.stack))
    places = [place for place in attentions(model) if place in at]
    of_block = {place.block: place for place in blocks(model) if place.stack == at.stack}
    watched = [_Watched(place, of_block[place.block].module, heads) for place in places]
    with edited(model, calls, heads, states), _hooked(watched):
        model(**few_logits(model, inputs))
    found = []
    for place, seen in zip(places, watched, strict=True):
        if len(calls.found[place]) != 1:
            raise InputError(f"model: {place.path} ran {len(calls.found[place])} times in one forward; expected once")
        if seen.projection is None:
            raise InputError(
                f"model: no module of the block of {place.path} is given the outputs of its heads; the output projection must "
                f"be a module of its own"
            )
        block = of_block[place.block]
        read = states.read[block][0] if place.block == 0 else states.written[of_block[place.block - 1]][0]
        found.append(
            Layer(
                calls.found[place][0],
                heads.found[place][0],
                seen.projection,
                read,
                states.written[block][0],
                tuple(seen.norms),
            )
        )
    return found


class _Watched:
    """Of one block: its norms as they run, and the module that reads the outputs of its heads."""

    def __init__(self, place: Place, block: nn.Module, heads: HeadRecorder) -> None:
        self.place, self.block, self.heads = place, block, heads
        self.projection: nn.Module | None = None
        self.norms: list[Normed] = []

    def modules(self) -> Iterator[tuple[nn.Module, bool]]:
        """Leaves that may be the projection, and norms, which are told."""
        inside = set(self.place.module.modules())
        for module in self.block.modules():
            if any(True for _ in module.children()):
                continue
            if NORM.search(type(module).__name__):
                if module not in inside:
                    yield module, True
            elif getattr(module, "weight", None) is not None:
                yield module, False

    def norm_ran(self, module: nn.Module, given: Any, wrote: Any) -> None:
        self.norms.append(Normed(module, given[0].detach(), wrote.detach()))

    def leaf_runs(self, module: nn.Module, given: Any) -> None:
        steps = self.heads.found.get(self.place)
        if self.projection is not None or not steps or not given or not isinstance(given[0], Tensor):
            return
        y = steps[-1].transpose(1, 2).flatten(2)
        if given[0].numel() == y.numel() and torch.equal(given[0].reshape(y.shape), y):
            self.projection = module


@contextmanager
def _hooked(watched: Sequence[_Watched]) -> Iterator[None]:
    handles = []
    try:
        for seen in watched:
            for module, is_norm in seen.modules():
                handles.append(
                    module.register_forward_hook(seen.norm_ran)
                    if is_norm
                    else module.register_forward_pre_hook(seen.leaf_runs)
                )
        yield
    finally:
        for handle in handles:
            handle.remove()


def of_heads(projection: nn.Module, heads: int) -> Float[Tensor, "heads width dim"]:
    """What a projection makes of each head's output: `y_h W_h`, summed over heads, is its output without the bias.

    Raises:
        InputError: for weights that are not there as numbers, as those of quantised modules.
    """
    weight = getattr(projection, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        raise InputError(
            f"model: the output projection is a {type(projection).__name__}, and its weights cannot be read as numbers; load "
            f"the model without quantisation"
        )
    # of Conv1D, as in GPT-2, the other way round
    ahead = weight.T if isinstance(projection, nn.Linear) else weight
    return ahead.detach().reshape(heads, -1, ahead.shape[1])


class Frozen(NamedTuple):
    """A norm at the statistics that it met: `gain (x - mean) / deviation + bias`, the mean 0 where it does not centre.

    Attributes:
        gain, bias: `[dim]`.
        centres: whether it takes the mean away.
        deviation: of each token, `[batch, tokens]`.
    """

    gain: Float[Tensor, "dim"]
    bias: Float[Tensor, "dim"]
    centres: bool
    deviation: Float[Tensor, "*tokens"]

    def mapped(self, x: Float[Tensor, "*any dim"]) -> Float[Tensor, "*any dim"]:
        """`gain (x - mean)`: the linear part, before the deviation."""
        centred = x - x.mean(-1, keepdim=True) if self.centres else x
        return self.gain.to(x.dtype) * centred

    def back(self, u: Float[Tensor, "*any dim"]) -> Float[Tensor, "*any dim"]:
        """The transposed map: `u . mapped(x) = back(u) . x`."""
        gained = self.gain.to(u.dtype) * u
        return gained - gained.mean(-1, keepdim=True) if self.centres else gained


@torch.no_grad()
def frozen(norm: nn.Module, read: Float[Tensor, "*tokens dim"], wrote: Float[Tensor, "*tokens dim"]) -> Frozen:
    """A norm with the statistics of what it read held fixed; found by what it does, LayerNorm or RMSNorm of any name.

    Raises:
        InputError: where it does something else.

    Example:
        >>> norm, x = torch.nn.LayerNorm(4), torch.randn(3, 4)
        >>> fixed = frozen(norm, x, norm(x))
        >>> torch.allclose(fixed.mapped(x) / fixed.deviation[:, None] + fixed.bias, norm(x).double(), atol=1e-6)
        True
    """
    trial = copy.deepcopy(norm).double()
    dim = read.shape[-1]
    flat = torch.ones(dim, dtype=torch.float64, device=read.device)
    uneven = flat.clone()
    uneven[::2] = -1.0
    bias = trial(torch.zeros_like(flat)).double()
    level = trial(LARGE * flat).double() - bias
    centres = dim > 1 and bool((level.abs() < 1e-4).all())
    centred = uneven - uneven.mean() if centres else uneven
    gain = (trial(LARGE * uneven).double() - bias) * centred.square().mean().sqrt() / centred
    plain = Frozen(gain, bias, centres, torch.ones(read.shape[:-1], device=read.device))
    mapped, given = plain.mapped(read.double()), wrote.double() - bias
    power = mapped.square().sum(-1)
    deviation = power / (mapped * given).sum(-1).masked_fill(power == 0, 1.0)
    deviation = deviation.masked_fill(power == 0, 1.0)
    off = (mapped / deviation[..., None] - given).abs().amax()
    if not bool(off <= FORM * wrote.double().abs().amax().clamp(min=1e-6)):
        raise InputError(
            f"model: {type(norm).__name__} is no norm of the form gain (x - mean) / deviation + bias; its statistics cannot be "
            f"held fixed"
        )
    return Frozen(gain, bias, centres, deviation)
