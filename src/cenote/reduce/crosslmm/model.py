"""A video language model: an encoder of frames, few visual tokens in a decoder's sequence, dual layers between its blocks.

The decoder is the user's own and stays as it is; dual layers act in it while it runs.

Source: Yan, Han, Tsai, Xue, Fang, Hong, Guo, Zhang, "CrossLMM: Decoupling Long Video Sequences from LMMs via Dual
Cross-Attention Mechanisms" (2025), arXiv 2505.17020. No code was published: what is inferred is named so.

Does not know: decoders that read frames by themselves, beams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.language import accepted
from cenote.core.masks import positions
from cenote.core.requirements import require_at_least, require_one_of
from cenote.models.caches import filled, held
from cenote.models.live import BlockEdit, Place, Where, attentions, blocks, edited, embeddings, one_stack
from cenote.models.live.passing import passing
from cenote.reduce.crosslmm.dual import DualCrossAttention, Memory
from cenote.reduce.crosslmm.merging import Mode, VisualProjector, token_merge

Inside = Literal["before", "after attention"]


class Seen(NamedTuple):
    """Frames as a decoder is told of them.

    Attributes:
        tokens: merged, for its sequence, `[batch, frames * merged, dim]`.
        tokens_mask: True = of a real frame.
        originals: all of them, for the dual layers, `[batch, frames * tokens, dim]`.
        mask: True = of a real frame.
    """

    tokens: Float[Tensor, "batch merged dim"]
    tokens_mask: Bool[Tensor, "batch merged"]
    originals: Float[Tensor, "batch originals dim"]
    mask: Bool[Tensor, "batch originals"]


class CrossLMM(nn.Module):
    """Frames and text to logits of the next token.

    Each frame becomes `side^2` merged tokens in the decoder's sequence; before every `every`-th block, a dual layer lets these
    and the text read all of the frame's tokens. At the start its logits are those of the decoder on merged tokens, to the bit.

    Args:
        decoder: a causal decoder of transformers; it is run, not changed.
        encoder: frames `[frames, ...]` -> their tokens `[frames, tokens, dim]`, a square grid each.
        dim: of the encoder's tokens.
        placeholder: token that stands in the text where a merged token goes.
        side: of the merged grid of a frame, `p`.
        every: blocks from one dual layer to the next, `K`.
        heads: of the dual layers; those of the decoder's attention by default.
        inside: where a dual layer stands: `"before"` its block, or in it, `"after attention"`.
        merge: see `token_merge`.
        dual: whether there are dual layers; else merged tokens are all that the decoder is told.
        hidden: of the projector; the decoder's width by default.
        layer: further settings of `DualCrossAttention`: visual, text, shared, hidden, chunk.

    Example:
        >>> from transformers import Qwen2Config, Qwen2ForCausalLM
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
        >>> decoder = Qwen2ForCausalLM(Qwen2Config(vocab_size=20, num_key_value_heads=1, **sizes)).eval()
        >>> model = CrossLMM(decoder, lambda frames: frames.flatten(2).mT, dim=3, placeholder=1, side=1, every=2).eval()
        >>> frames, text = torch.randn(1, 4, 3, 6, 6), torch.tensor([[5, 6, 7]])
        >>> ids, mask = model.prompt(text, frames)
        >>> model(ids, frames, mask).shape
        torch.Size([1, 7, 20])

    Note: a mask of visual positions in place of two runs of tokens, and the separate layer (its figure) in place of one inside
        of the block (its equations), are inferred; see also `DualCrossAttention`.
    """

    def __init__(
        self,
        decoder: nn.Module,
        encoder: nn.Module | Callable[[Tensor], Tensor],
        *,
        dim: int,
        placeholder: int,
        side: int = 3,
        every: int = 4,
        heads: int | None = None,
        inside: Inside = "before",
        merge: Mode = "avg",
        dual: bool = True,
        hidden: int | None = None,
        layer: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        require_at_least(1, dim=dim, side=side, every=every)
        require_at_least(0, placeholder=placeholder)
        require_one_of(("before", "after attention"), inside=inside)
        self.stack = one_stack(decoder).stack
        count = sum(place.stack == self.stack for place in blocks(decoder))
        words = next(m for m in embeddings(decoder).modules() if isinstance(m, nn.Embedding))
        if placeholder >= words.num_embeddings:
            raise InputError(f"placeholder: {placeholder}, and the decoder knows {words.num_embeddings} tokens")
        width = words.embedding_dim
        if heads is None:
            heads = int(getattr(getattr(decoder, "config", None), "num_attention_heads", 1))
        self.decoder, self.encoder = decoder, encoder
        self.placeholder, self.side, self.inside, self.merge = placeholder, side, inside, merge
        self.projector = VisualProjector(dim, width, hidden)
        numbers = range(0, count, every) if dual else ()
        self.layers = nn.ModuleDict({str(n): DualCrossAttention(width, heads, **(layer or {})) for n in numbers})

    def see(
        self, frames: Float[Tensor, "batch frames *size"], frame_mask: Bool[Tensor, "batch frames"] | None = None
    ) -> Seen:
        """Encode, merge and project frames; those that only fill up are not looked at.

        Args:
            frames: as the encoder takes them.
            frame_mask: True = a real frame; None for all.

        Raises:
            InputError: for a mask that does not fit, or an encoder that gives no tokens of each frame.
        """
        real = _frame_mask(frames, frame_mask)
        batch, count = real.shape
        found = self.encoder(frames[real])
        if not isinstance(found, Tensor) or found.dim() != 3 or len(found) != int(real.sum()):
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InputError(f"encoder: expected tokens [{int(real.sum())}, tokens, dim], got {got}")
        merged = self.projector(token_merge(found, self.side, self.merge))
        whole = self.projector(found) if self.layers else found.new_zeros(len(found), 0, merged.shape[2])
        parts = []
        for x in (merged, whole):
            every = x.new_zeros(batch, count, *x.shape[1:])
            parts += [every.index_put((real,), x).flatten(1, 2), real.repeat_interleave(x.shape[1], 1)]
        return Seen(*parts)

    def prompt(
        self,
        text: Int[Tensor, "batch words"],
        frames: Float[Tensor, "batch frames *size"],
        mask: Bool[Tensor, "batch words"] | None = None,
        frame_mask: Bool[Tensor, "batch frames"] | None = None,
    ) -> tuple[Int[Tensor, "batch tokens"], Bool[Tensor, "batch tokens"]]:
        """Placeholders of all frames, and the text behind them, filled up on the left: numbers and mask."""
        told = _frame_mask(frames, frame_mask).repeat_interleave(self.side**2, 1)
        words = torch.ones_like(text, dtype=torch.bool) if mask is None else mask
        ids = torch.cat([torch.full_like(told, self.placeholder, dtype=text.dtype), text], 1)
        real = torch.cat([told, words], 1)
        order = real.to(torch.uint8).argsort(dim=1, stable=True)
        return ids.gather(1, order), real.gather(1, order)

    def forward(
        self,
        ids: Int[Tensor, "batch tokens"],
        frames: Float[Tensor, "batch frames *size"] | None = None,
        mask: Bool[Tensor, "batch tokens"] | None = None,
        frame_mask: Bool[Tensor, "batch frames"] | None = None,
    ) -> Float[Tensor, "batch tokens vocab"]:
        """Logits.

        Args:
            ids: numbers of tokens, `placeholder` where merged tokens go, in the order of frames; see `prompt`.
            frames: of each item; None for text alone, on which the decoder runs as it is.
            mask: True on real tokens.
            frame_mask: True on real frames.

        Raises:
            InputError: where there are not as many placeholders as merged tokens.
        """
        return self.run(ids, None if frames is None else self.see(frames, frame_mask), mask)

    def run(
        self, ids: Int[Tensor, "batch tokens"], seen: Seen | None, mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch tokens vocab"]:
        """The same of frames that were seen before, or of tokens made otherwise."""
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        x = self.spliced(ids, seen, real)
        with self._reading(self.remembered(seen), ids == self.placeholder, real):
            return cast(Tensor, self._decode(x, real, positions(real)).logits)

    @torch.no_grad()
    def generate(
        self,
        ids: Int[Tensor, "batch tokens"],
        frames: Float[Tensor, "batch frames *size"] | None = None,
        mask: Bool[Tensor, "batch tokens"] | None = None,
        frame_mask: Bool[Tensor, "batch frames"] | None = None,
        *,
        new_tokens: int = 32,
        end: int | None = None,
    ) -> Int[Tensor, "batch made"]:
        """The likeliest next token but the placeholder, again and again; keys and values of the frames are made once and stay.

        Args:
            ids, frames, mask, frame_mask: as of `forward`; padding on the left.
            new_tokens: at most.
            end: token behind which an answer is over; such an answer is filled up with it.

        Raises:
            InputError: as `forward`, and for prompts that are padded on the right.
        """
        require_at_least(1, new_tokens=new_tokens)
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        if not bool(real[:, -1].all()):
            raise InputError("mask: a prompt ends in padding; pad prompts on the left")
        seen = None if frames is None else self.see(frames, frame_mask)
        memories, x, visual = self.remembered(seen), self.spliced(ids, seen, real), ids == self.placeholder
        told, now, made = positions(real), real, []
        past: dict[str, Any] = {}
        over = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        for _ in range(new_tokens):
            with self._reading(memories, visual, now):
                output = self._decode(x, real, told, use_cache=True, **past)
            # no frame stands behind a placeholder that is made
            behind = output.logits[:, -1].index_fill(1, ids.new_tensor([self.placeholder]), float("-inf"))
            token = behind.argmax(-1)
            if end is not None:
                token = token.masked_fill(over, end)
                over = over | (token == end)
            made.append(token)
            if bool(over.all()):
                break
            past = filled(self.decoder, held(output))
            x = embeddings(self.decoder)(token[:, None])
            visual, now = torch.zeros_like(token, dtype=torch.bool)[:, None], torch.ones_like(real[:, :1])
            real, told = torch.cat([real, now], 1), told[:, -1:] + 1
        return torch.stack(made, 1)

    def gates(self) -> dict[int, dict[str, float]]:
        """`tanh` of the gates of each dual layer: "v2v", "t2v", "ffn"."""
        found: dict[int, dict[str, float]] = {}
        for name, layer in self._dual():
            asking = {"v2v": layer.v2v, "t2v": layer.t2v}
            gates = {kind: cross.gate for kind, cross in asking.items() if cross is not None}
            gates |= {} if layer.gate is None else {"ffn": layer.gate}
            found[name] = {kind: float(torch.tanh(gate)) for kind, gate in gates.items()}
        return found

    def spliced(
        self, ids: Int[Tensor, "batch tokens"], seen: Seen | None, real: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """What the decoder reads: its own embeddings, and merged tokens in the places of placeholders.

        Raises:
            InputError: where there are not as many placeholders as merged tokens.
        """
        where = (ids == self.placeholder) & real
        x = embeddings(self.decoder)(ids)
        told = where.sum(1)
        expected = torch.zeros_like(told) if seen is None else seen.tokens_mask.sum(1)
        if not torch.equal(told, expected):
            raise InputError(
                f"ids: has {told.tolist()} placeholders ({self.placeholder}), and the frames are {expected.tolist()} merged "
                f"tokens; make them with prompt(text, frames)"
            )
        return x if seen is None else x.masked_scatter(where[..., None], seen.tokens[seen.tokens_mask].to(x.dtype))

    def remembered(self, seen: Seen | None) -> dict[int, Memory]:
        """Of each dual layer its keys and values of all tokens."""
        if seen is None:
            return {}
        return {block: layer.remember(seen.originals, seen.mask) for block, layer in self._dual()}

    def _dual(self) -> Iterator[tuple[int, DualCrossAttention]]:
        for name, layer in self.layers.items():
            yield int(name), cast(DualCrossAttention, layer)

    def _decode(
        self, x: Tensor, real: Bool[Tensor, "batch tokens"], told: Int[Tensor, "batch queries"], **given: Any
    ) -> Any:
        given = given if "use_cache" in given else {**accepted(self.decoder, use_cache=False), **given}
        return self.decoder(inputs_embeds=x, attention_mask=real.long(), position_ids=told.clamp(min=0), **given)

    @contextmanager
    def _reading(
        self,
        memories: Mapping[int, Memory],
        visual: Bool[Tensor, "batch tokens"],
        real: Bool[Tensor, "batch tokens"],
    ) -> Iterator[None]:
        """The decoder, with dual layers that read these memories."""
        if not memories:
            yield
            return
        visual, text = visual & real, real & ~visual
        reads = {
            block: partial(layer, memory=memories[block], visual=visual, text=text) for block, layer in self._dual()
        }
        edit = _Reads(reads, Where(blocks=set(reads), stack=self.stack), self.inside == "before")
        changes: dict[str, Any] = {}
        if self.inside == "after attention":
            places = [p for p in attentions(self.decoder) if p.stack == self.stack and p.block in reads]
            changes = {place.path: partial(edit.attended, place.block) for place in places}
        with edited(self.decoder, edit), passing(self.decoder, changes):
            yield


class _Reads(BlockEdit):
    """Dual layers in their places."""

    def __init__(self, reads: Mapping[int, Callable[[Tensor], Tensor]], at: Where, before: bool) -> None:
        self.reads, self.at, self.before = reads, at, before
        self.entered: Tensor | None = None

    def enters(self, place: Place, h: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        if self.before:
            return self.reads[place.block](h)
        self.entered = h
        return h

    def attended(self, block: int, y: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        """What attention gives, with what is read of the residual stream behind it."""
        assert self.entered is not None
        h = self.entered + y
        return y + (self.reads[block](h) - h)


def _frame_mask(
    frames: Float[Tensor, "batch frames *size"], frame_mask: Bool[Tensor, "batch frames"] | None
) -> Bool[Tensor, "batch frames"]:
    if frame_mask is None:
        return torch.ones(frames.shape[:2], dtype=torch.bool, device=frames.device)
    if frame_mask.dtype != torch.bool or frame_mask.shape != frames.shape[:2]:
        raise InputError(
            f"frame_mask: expected bool {tuple(frames.shape[:2])}, got {frame_mask.dtype} {tuple(frame_mask.shape)}"
        )
    return frame_mask
