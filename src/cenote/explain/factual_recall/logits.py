"""The logits of chosen tokens as a sum: embedding, each head, each feed-forward part, and each head's source tokens.

Source: Chughtai, Cooney and Nanda, "Summing Up the Facts: Additive Mechanisms Behind Factual Recall in LLMs" (2024),
arXiv 2402.07321.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core import InputError
from cenote.explain.decomposition import Part, Parts
from cenote.explain.queried import one_hot, real_tokens
from cenote.models.live import Layer, final_norm, frozen, layers, of_heads, one_stack

CLOSE = 1e-3
"""How far sums of states may be from states, relative to the largest number."""


@dataclass(frozen=True, eq=False)
class LogitParts:
    """What made the logits of some tokens behind the last real token of each prompt.

    Attributes:
        parts: `"embedding"`, `"head L.H"`, `"attention bias L"`, `"mlp L"`, `"constant"`; they sum to the logits,
            before any soft cap.
        sources: of each head by source token, `[batch, layers, heads, tokens, targets]`; they sum to the head's part.
        mask: the prompt's tokens, `[batch, tokens]`.
    """

    parts: Parts
    sources: Float[Tensor, "batch layers heads tokens targets"]
    mask: Bool[Tensor, "batch tokens"]

    @property
    def heads(self) -> Float[Tensor, "batch layers heads targets"]:
        """Each head's part."""
        batch, count, heads, _, targets = self.sources.shape
        chosen = [i for i, name in enumerate(self.parts.names) if name.startswith("head ")]
        return self.parts.values[:, chosen].view(batch, count, heads, targets)

    @property
    def mlps(self) -> Float[Tensor, "batch layers targets"]:
        """Each feed-forward part."""
        return self.parts.values[:, [i for i, name in enumerate(self.parts.names) if name.startswith("mlp ")]]

    def groups(
        self, spans: Mapping[str, Bool[Tensor, "batch tokens"]]
    ) -> dict[str, Float[Tensor, "batch layers heads targets"]]:
        """Sums over groups of source tokens, and `"other"`, over those that are in none.

        Raises:
            InputError: where groups overlap, or are of other tokens.
        """
        taken = torch.zeros_like(self.mask)
        for name, span in spans.items():
            if span.shape != self.mask.shape or span.dtype != torch.bool:
                raise InputError(
                    f"spans: {name!r} is {span.dtype} {tuple(span.shape)}, expected {tuple(self.mask.shape)}"
                )
            if bool((taken & span).any()):
                raise InputError(f"spans: {name!r} shares a token with another group")
            taken = taken | span
        whole = {**spans, "other": ~taken}
        return {
            name: torch.einsum("blhtv,bt->blhv", self.sources, span.to(self.sources)) for name, span in whole.items()
        }

    def top_sources(self, k: int, item: int = 0, target: int = 0) -> list[Part]:
        """Which heads, reading which token, moved this logit most: `"head L.H from T"`, T the number of the token."""
        if k < 1:
            raise InputError(f"k: expected at least 1, got {k}")
        found = self.sources[item, ..., target]
        order = found.flatten().abs().argsort(descending=True)[:k].tolist()
        places = [torch.unravel_index(torch.tensor(i), found.shape) for i in order]
        return [
            Part(f"head {int(layer)}.{int(head)} from {int(token)}", float(found[layer, head, token]))
            for layer, head, token in places
        ]


@torch.no_grad()
def logit_parts(
    model: nn.Module,
    inputs: Mapping[str, Any],
    targets: Int[Tensor, "batch targets"],
    *,
    centred: bool = False,
    stack: str | None = None,
) -> LogitParts:
    """Take logits apart, exactly: the final norm is held at its true statistics, and all else is linear.

    A target's direction goes through the final norm and each head's output map first, so that tokens meet one number per head
    and target: memory does not know the vocabulary. Only the last row of attention is computed again.

    Args:
        model: a causal language model with pre-norms, in eval mode; grouped queries, rotations, attention beside the
            feed-forward part, and tied embeddings are all the same to it.
        inputs: `input_ids`, with an `attention_mask` where there is padding.
        targets: numbers of tokens whose logits are explained.
        centred: of logits less their mean over the vocabulary.
        stack: path of the list of blocks, where a model has several.

    Raises:
        InputError: for encoders, post-norms, norms behind attention; where the parts would not be what they are called.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=2, n_head=2)).eval()
        >>> ids = torch.tensor([[5, 6, 7]])
        >>> found = logit_parts(model, {"input_ids": ids}, torch.tensor([[3, 4]]))
        >>> torch.allclose(found.parts.values.sum(1), model(ids).logits[:, -1, 3:5], atol=1e-5)
        True

    Source: Chughtai et al. (2024), arXiv 2402.07321.
    """
    norm, unembedding = _end_of(model, stack)
    end = _End()
    with end.watched(norm, unembedding):
        ran = layers(model, inputs, stack)
    mask = real_tokens(inputs, ran[0].call)
    if targets.dim() != 2 or len(targets) != len(mask):
        raise InputError(f"targets: expected [{len(mask)}, targets] numbers of tokens, got {list(targets.shape)}")
    if not 0 <= int(targets.min()) <= int(targets.max()) < len(unembedding.weight):
        raise InputError(f"targets: expected numbers below {len(unembedding.weight)}, got {targets.tolist()}")
    at = one_hot(mask, "last").bool()
    read, wrote = end.states(ran[-1], at)
    fixed = frozen(norm, read, wrote)
    rows, offset = _rows(unembedding, targets, centred)
    # [batch, targets, dim]: what a state's component is multiplied with
    u = fixed.back(rows) / fixed.deviation[:, None, None]
    names, values, sources = _taken_apart(ran, at, u)
    constant = rows @ fixed.bias + offset
    total = (rows @ wrote.double()[..., None])[..., 0] + offset
    parts = Parts(
        torch.stack([*values, constant], 1).to(torch.promote_types(wrote.dtype, torch.float32)),
        (*names, "constant"),
        total.to(torch.promote_types(wrote.dtype, torch.float32)),
    )
    return LogitParts(parts, torch.stack(sources, 1).to(parts.values.dtype), mask)


def _taken_apart(
    ran: list[Layer], at: Bool[Tensor, "batch tokens"], u: Float[Tensor, "batch targets dim"]
) -> tuple[list[str], list[Tensor], list[Tensor]]:
    names, values = ["embedding"], [_met(ran[0].read[at], u)]
    sources = []
    for number, layer in enumerate(ran):
        call = layer.call
        maps = of_heads(layer.projection, call.heads).double()
        y = layer.heads.transpose(1, 2)[at].double()
        bias = getattr(layer.projection, "bias", None)
        out = torch.einsum("bhw,hwd->bd", y, maps)
        _require_added(layer, at, out if bias is None else out + bias.double())
        # targets first: [batch, heads, width, targets]
        through = torch.einsum("hwd,btd->bhwt", maps, u)
        by_head = torch.einsum("bhw,bhwt->bht", y, through)
        names += [f"head {number}.{head}" for head in range(call.heads)]
        values += list(by_head.unbind(1))
        read, wrote = layer.read[at].double(), layer.wrote[at].double()
        if bias is not None:
            names.append(f"attention bias {number}")
            values.append(_met(bias.double().expand_as(out), u))
            out = out + bias.double()
        names.append(f"mlp {number}")
        values.append(_met(wrote - read - out, u))
        weights = call.only(at).weights()[:, :, 0].double()
        groups = call.heads // call.v.shape[1]
        kept = torch.einsum("bgjw,bgqwt->bgqjt", call.v.double(), through.unflatten(1, (-1, groups))).flatten(1, 2)
        sources.append(weights[..., None] * kept)
        _require_linear(layer, sources[-1].sum(2), by_head)
    return names, values, sources


class _End:
    """What the final norm read and wrote, and what the unembedding was given, as they ran."""

    def __init__(self) -> None:
        self.norm: tuple[Tensor, Tensor] | None = None
        self.given: Tensor | None = None

    @contextmanager
    def watched(self, norm: nn.Module, unembedding: nn.Module) -> Iterator[None]:
        def norm_ran(_: nn.Module, given: tuple[Tensor, ...], wrote: Tensor) -> None:
            self.norm = given[0].detach(), wrote.detach()

        def unembedding_runs(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            self.given = given[0].detach()

        handles = [norm.register_forward_hook(norm_ran), unembedding.register_forward_pre_hook(unembedding_runs)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def states(self, last: Layer, at: Bool[Tensor, "batch tokens"]) -> tuple[Tensor, Tensor]:
        """At the end of each prompt, before and behind the final norm."""
        if self.norm is None or self.given is None:
            raise InputError("model: its final norm or its unembedding did not run")
        read, wrote = self.norm
        if not torch.equal(read[at], last.wrote[at]):
            raise InputError("model: its final norm does not read what the last block wrote")
        if not torch.equal(self.given[:, -1], wrote[:, -1]):
            raise InputError(
                "model: something stands between its final norm and its unembedding; logits are no sum of parts"
            )
        return read[at], wrote[at]


def _end_of(model: nn.Module, stack: str | None) -> tuple[nn.Module, Any]:
    stack = one_stack(model, stack).stack
    norm = final_norm(model, stack)
    find = getattr(model, "get_output_embeddings", None)
    unembedding = find() if callable(find) else None
    if unembedding is None or getattr(unembedding, "weight", None) is None:
        raise InputError(
            f"model: {type(model).__name__} has no map from states to logits; load the causal language model, not its trunk"
        )
    if norm is None:
        raise InputError(
            f"model: nothing behind the blocks of {type(model).__name__} is a final norm; logits are taken apart in decoders "
            f"with pre-norms (GPT-2, GPT-NeoX, Llama)"
        )
    return norm, unembedding


def _rows(
    unembedding: Any, targets: Int[Tensor, "batch targets"], centred: bool
) -> tuple[Float[Tensor, "batch targets dim"], Float[Tensor, "batch targets"]]:
    """Directions and offsets of the targets' logits."""
    weight, bias = unembedding.weight, getattr(unembedding, "bias", None)
    if weight.dim() != 2 or not weight.is_floating_point():
        raise InputError("model: the weights of its unembedding cannot be read; load it without quantisation")
    rows = weight[targets].double()
    offset = (
        torch.zeros(targets.shape, dtype=torch.float64, device=rows.device) if bias is None else bias[targets].double()
    )
    if centred:
        rows = rows - weight.mean(0, dtype=torch.float64)
        offset = offset if bias is None else offset - bias.double().mean()
    return rows, offset


def _met(c: Float[Tensor, "batch dim"], u: Float[Tensor, "batch targets dim"]) -> Float[Tensor, "batch targets"]:
    return (u @ c.double()[..., None])[..., 0]


def _require_added(layer: Layer, at: Tensor, out: Float[Tensor, "batch dim"]) -> None:
    """Attention's output is added as it is: what the second norm reads holds it, unless the two parts stand side by side."""
    path = layer.call.place.path
    if layer.order != "pre":
        raise InputError(
            f"model: the norms of the block of {path} do not stand before its parts alone; logits are taken apart in decoders "
            f"with pre-norms (GPT-2, GPT-NeoX, Llama)"
        )
    if len(layer.norms) < 2:
        return
    read, second = layer.read[at].double(), layer.norms[1].read[at].double()
    scale = second.abs().max()
    if not (
        bool((second - read).abs().max() <= CLOSE * scale) or bool((second - read - out).abs().max() <= CLOSE * scale)
    ):
        raise InputError(f"model: the block of {path} does not add the outputs of its heads as they are")


def _require_linear(layer: Layer, summed: Tensor, by_head: Tensor) -> None:
    if not bool((summed - by_head).abs().max() <= CLOSE * by_head.abs().max().clamp(min=1e-6)):
        raise InputError(
            f"model: the heads of {layer.call.place.path} are no weighted sums of values; something stands behind attention"
        )
