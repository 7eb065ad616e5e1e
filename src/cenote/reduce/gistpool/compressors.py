"""Ways to compress the context of a decoder: GistPool, average pooling, plain gisting, and the bounds on either side.

A context is read once; what is left of it is fed to the decoder's own blocks, each of which makes keys and values of it.
Prompts then read these as they would read the context's. No architecture is known by name, and the model stays as it is.

Source: Petrov, Sandler, Zhmoginov, Miller, Vladymyrov, "Long Context In-Context Compression by Getting to the Gist of Gisting"
(2025), arXiv 2504.08934. Its full text and code could not be had; what is inferred is named so.

Does not know: sliding windows, encoder-decoders, decoders that are told no positions.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, Protocol, cast, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.language import accepted
from cenote.core.masks import positions
from cenote.core.requirements import require_at_least, require_one_of
from cenote.models.caches import KeysValues, filled, held
from cenote.models.live import AttentionCall, AttentionEdit, BlockEdit, Place, Where, edited, embeddings, one_stack
from cenote.models.low_rank import LINEARS, LowRank
from cenote.reduce.gistpool.compressed import Compressed, empty
from cenote.reduce.gistpool.windows import Layout, Windows, interleaved, readable, windows
from cenote.reduce.gistpool.windows import Place as At


class Adapted(Protocol):
    """Weights that a model has for a while, such as `LowRank` and `OwnWeights`."""

    def on(self, model: nn.Module) -> AbstractContextManager[None]:
        """Within the block the model computes with them."""


Adapt = Callable[[nn.Module], Adapted]


def low_rank(model: nn.Module, rank: int = 16) -> LowRank:
    """What is trained by default: all linear layers of all blocks, by low rank.

    Args:
        model: a decoder whose blocks name their layers as Llama's do.
        rank: of what is added.
    """
    return LowRank(model, LINEARS, rank=rank, alpha=2.0 * rank, dropout=0.0)


class Compressor(nn.Module, ABC):
    """Turns contexts into keys and values, and answers prompts that read these; its parameters are all that is trained.

    Args:
        model: a causal decoder of transformers, which is frozen; give the same one to every method.
        adapt: makes the weights that are trained beside those of the model, see `low_rank`; `OwnWeights` for a full copy,
            `None`: none.

    Raises:
        InputError: where the model is no causal decoder that is told positions.
    """

    def __init__(self, model: nn.Module, adapt: Adapt | None = low_rank) -> None:
        super().__init__()
        taken = inspect.signature(model.forward).parameters
        lacking = [name for name in ("inputs_embeds", "position_ids", "attention_mask") if name not in taken]
        if lacking:
            raise InputError(f"model: {type(model).__name__} takes no {', '.join(lacking)}; give a causal decoder")
        self.stack = one_stack(model).stack
        model.requires_grad_(False)
        self.answering = cast(nn.Module | None, None if adapt is None else adapt(model))

    @abstractmethod
    def compress(
        self, model: nn.Module, context: Int[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Compressed:
        """Read contexts once.

        Args:
            model: as above.
            context: numbers of tokens.
            mask: True on real tokens, padding on either side; None for all.

        Raises:
            InputError: where a context is empty, or the model keeps no keys of all tokens.
        """

    def forward(
        self,
        model: nn.Module,
        context: Int[Tensor, "batch tokens"],
        prompt: Int[Tensor, "batch words"],
        context_mask: Bool[Tensor, "batch tokens"] | None = None,
        prompt_mask: Bool[Tensor, "batch words"] | None = None,
    ) -> Float[Tensor, "batch words vocab"]:
        """Logits of each prompt behind its compressed context."""
        return self.answer(model, prompt, self.compress(model, context, context_mask), prompt_mask)

    def answer(
        self,
        model: nn.Module,
        prompt: Int[Tensor, "batch words"],
        compressed: Compressed,
        mask: Bool[Tensor, "batch words"] | None = None,
    ) -> Float[Tensor, "batch words vocab"]:
        """Logits of prompts; what was compressed stays as it is.

        Args:
            model: as above.
            prompt: numbers of tokens, one prompt per context; see `Compressed.of` for several.
            compressed: their contexts.
            mask: True on real tokens of the prompts.

        Raises:
            InputError: for another number of prompts than of contexts.
        """
        real = _real(prompt, mask, "prompt")
        if len(prompt) != len(compressed):
            raise InputError(
                f"prompt: {len(prompt)} prompts and {len(compressed)} contexts; choose contexts with compressed.of(items)"
            )
        with _weights(self.answering, model):
            return _run(model, prompt, real, compressed.blocks, compressed.mask, compressed.ends).logits

    @torch.no_grad()
    def generate(
        self,
        model: nn.Module,
        prompt: Int[Tensor, "batch words"],
        compressed: Compressed,
        mask: Bool[Tensor, "batch words"] | None = None,
        *,
        new_tokens: int = 32,
        end: int | None = None,
    ) -> Int[Tensor, "batch made"]:
        """The likeliest next token, again and again; keys and values of what was made stay behind those of the context.

        Args:
            model, prompt, compressed, mask: as of `answer`; padding on the left.
            new_tokens: at most.
            end: token behind which an answer is over; such an answer is filled up with it.

        Raises:
            InputError: as `answer`, and for prompts that are padded on the right.
        """
        require_at_least(1, new_tokens=new_tokens)
        real = _real(prompt, mask, "prompt")
        if not bool(real[:, -1].all()):
            raise InputError("mask: a prompt ends in padding; pad prompts on the left")
        blocks: Sequence[KeysValues] = compressed.blocks
        before = compressed.mask
        start, made, over = compressed.ends, [], torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
        with _weights(self.answering, model):
            for _ in range(new_tokens):
                output = _run(model, prompt, real, blocks, before, start, use_cache=True)
                token = output.logits[:, -1].argmax(-1)
                if end is not None:
                    token = token.masked_fill(over, end)
                    over = over | (token == end)
                made.append(token)
                if bool(over.all()):
                    break
                blocks, before, start = held(output), torch.cat([before, real], 1), start + real.sum(1)
                prompt, real = token[:, None], torch.ones_like(token, dtype=torch.bool)[:, None]
        return torch.stack(made, 1)

    def _of_blocks(self) -> Where:
        return Where(stack=self.stack)

    def _keys(
        self, model: nn.Module, states: Sequence[Tensor], cut: Windows, at: Int[Tensor, "batch windows"]
    ) -> tuple[KeysValues, ...]:
        """Keys and values that the blocks make of what each of them is given to read, at these positions."""
        with _weights(self.answering, model), edited(model, _Fed(states, self._of_blocks())):
            output = model(
                inputs_embeds=states[0].to(_dtype(model)),
                attention_mask=cut.mask.long(),
                position_ids=at,
                **accepted(model, logits_to_keep=1, use_cache=True),
            )
        return tuple(held(output))


class NoContext(Compressor):
    """Prompts without their contexts: the lower bound, trained by itself.

    Args:
        model, adapt: as of `Compressor`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)).eval()
        >>> none, words = NoContext(model, adapt=None), torch.tensor([[3, 4, 5, 6]])
        >>> alone = none.answer(model, words[:, 3:], none.compress(model, words[:, :3]))
        >>> torch.allclose(alone, model(words[:, 3:]).logits, atol=1e-5)
        True
    """

    def compress(
        self,
        model: nn.Module,  # noqa: ARG002
        context: Int[Tensor, "batch tokens"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Compressed:
        """Nothing is left, see `Compressor.compress`."""
        _real(context, mask, "context")
        return empty(len(context), context)


class FullContext(Compressor):
    """Prompts behind their whole contexts: the upper bound.

    Args:
        model, adapt: as of `Compressor`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)).eval()
        >>> full, words = FullContext(model, adapt=None), torch.tensor([[3, 4, 5, 6]])
        >>> behind = full.answer(model, words[:, 3:], full.compress(model, words[:, :3]))
        >>> torch.allclose(behind, model(words).logits[:, 3:], atol=1e-5)
        True
    """

    def compress(
        self, model: nn.Module, context: Int[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Compressed:
        """Every token is kept, see `Compressor.compress`."""
        real = _real(context, mask, "context")
        with _weights(self.answering, model):
            blocks = held(_run(model, context, real, use_cache=True))
        return Compressed(tuple(blocks), real, positions(real).clamp(min=0), real.sum(1), real.sum(1))


class AveragePool(Compressor):
    """Window means in place of the context: each block reads the means of what it would have read, `mean_(t in W_j) h_t`.

    Args:
        model, adapt: as of `Compressor`.
        ratio: tokens per window.
        pooled: `"states"`: the means are taken of what blocks read, and keys and values made of these; `"keys"`: of keys and
            values, after positions.
        overlap: tokens before a window that it holds, too.
        place: the position that a window has, of its last or of its middle token.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)).eval()
        >>> pool = AveragePool(model, ratio=2)
        >>> left = pool.compress(model, torch.tensor([[3, 4, 5, 6, 7]]))
        >>> left.mask.shape, left.positions.tolist()
        (torch.Size([1, 3]), [[1, 3, 4]])

    Note: how the authors' baseline makes keys and values of means is inferred.
    """

    def __init__(
        self,
        model: nn.Module,
        ratio: int,
        *,
        pooled: Literal["states", "keys"] = "states",
        overlap: int = 0,
        place: At = "end",
        adapt: Adapt | None = low_rank,
    ) -> None:
        require_at_least(1, ratio=ratio)
        require_at_least(0, overlap=overlap)
        require_one_of(("states", "keys"), pooled=pooled)
        require_one_of(get_args(At), place=place)
        super().__init__(model, adapt)
        self.ratio, self.pooled, self.overlap, self.place = ratio, pooled, overlap, place

    def compress(
        self, model: nn.Module, context: Int[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Compressed:
        """One slot per window, see `Compressor.compress`."""
        real = _real(context, mask, "context")
        cut = windows(real, self.ratio, self.overlap)
        at = cut.last if self.place == "end" else cut.middle()
        if self.pooled == "states":
            means = _States(cut.means, self._of_blocks())
            with _weights(self.answering, model), edited(model, means):
                _run(model, context, real, use_cache=False)
            blocks = self._keys(model, means.found[:-1], cut, at)
        else:
            with _weights(self.answering, model):
                whole = held(_run(model, context, real, use_cache=True))
            blocks = tuple(KeysValues(_pooled(b.keys, cut), _pooled(b.values, cut)) for b in whole)
        return Compressed(blocks, cut.mask, at, real.sum(1), real.sum(1))


class GistPool(Compressor):
    """Gist tokens that pool windows of the context, `ceil(n / r)` of them.

    Gist `g_j` stands behind its window `W_j` and reads `W_j` and itself; the context never reads gists. In block i a prompt
    reads keys and values that block i makes of `h_g^(i+1)`, what its own reading left there, so that it owns in state i + 1
    what a gist read in block i. One set of weights compresses, another answers; both start as the model's.

    Args:
        model, adapt: as of `Compressor`.
        ratio: tokens per gist, `r`.
        shift: read gists one layer up; else block i reads `h_g^i`.
        separate: two sets of weights; else one does both.
        spread: gists among the tokens; else all of them behind the context.
        window: gists kept to their windows; else they read all before them, other gists too.
        itself: a gist that is kept to its window reads itself, too.
        even: gists weigh all that they read evenly, as average pooling does; else by their attention.
        overlap: tokens before a window that it holds, too.
        place: the position that a spread gist has, of its window's last or of its middle token.
        gists: vectors that are learned: 1, that of every gist, or as many as there may be gists.

    Raises:
        InputError: as `Compressor`; where a context has more gists than `gists`, if that is not 1.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)).eval()
        >>> pool = GistPool(model, ratio=4)
        >>> left = pool.compress(model, torch.tensor([[3, 4, 5, 6, 7, 8, 9]]))
        >>> left.mask.shape, pool.answer(model, torch.tensor([[3, 4]]), left).shape
        (torch.Size([1, 2]), torch.Size([1, 2, 20]))

    Note: the position of a gist, its own slot, what the context reads, the projections of a shifted gist, and that gists start
        as the mean of the vocabulary are inferred.
    """

    def __init__(
        self,
        model: nn.Module,
        ratio: int,
        *,
        shift: bool = True,
        separate: bool = True,
        spread: bool = True,
        window: bool = True,
        itself: bool = True,
        even: bool = False,
        overlap: int = 0,
        place: At = "end",
        gists: int = 1,
        adapt: Adapt | None = low_rank,
    ) -> None:
        require_at_least(1, ratio=ratio, gists=gists)
        require_at_least(0, overlap=overlap)
        require_one_of(get_args(At), place=place)
        super().__init__(model, adapt)
        self.ratio, self.shift, self.spread, self.window = ratio, shift, spread, window
        self.itself, self.even, self.overlap, self.place = itself, even, overlap, place
        self.compressing = cast(nn.Module | None, adapt(model) if separate and adapt is not None else None)
        self.separate = separate
        vocabulary = _vocabulary(model)
        self.gists = nn.Parameter(vocabulary.detach().float().mean(0).repeat(gists, 1))

    @classmethod
    def plain(cls, model: nn.Module, ratio: int, **options: Any) -> GistPool:
        """Gisting as it was: gists behind the context that read all before them, not shifted, by one set of weights.

        Source: Mu, Li, Goodman, "Learning to Compress Prompts with Gist Tokens", NeurIPS 2023.
        """
        return cls(model, ratio, **{"shift": False, "separate": False, "spread": False, "window": False, **options})

    def compress(
        self, model: nn.Module, context: Int[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Compressed:
        """One slot per gist, see `Compressor.compress`."""
        real = _real(context, mask, "context")
        cut = windows(real, self.ratio, self.overlap)
        layout = interleaved(real, cut, self.spread, self.place)
        with _weights(self.compressing if self.separate else self.answering, model):
            states = self._gisted(model, context, cut, layout)
        at = layout.gists(layout.positions)
        blocks = self._keys(model, states[1:] if self.shift else states[:-1], cut, at)
        return Compressed(blocks, cut.mask, at, layout.ends, real.sum(1))

    def _gisted(
        self, model: nn.Module, context: Int[Tensor, "batch tokens"], cut: Windows, layout: Layout
    ) -> list[Tensor]:
        """States of the gists, from what enters the first block to what the last wrote."""
        words = embeddings(model)(context.gather(1, layout.source.masked_fill(layout.gist, 0)))
        number = layout.source.masked_fill(~layout.gist, 0)
        number = positions(cut.mask).clamp(min=0).gather(1, number)
        if len(self.gists) == 1:
            number = torch.zeros_like(number)
        elif int(number.max()) >= len(self.gists):
            raise InputError(
                f"gists: {len(self.gists)} vectors, and a context of {int(cut.mask.sum(1).max())} windows; give more, or 1"
            )
        x = torch.where(layout.gist[..., None], self.gists[number].to(words.dtype), words)
        states = _States(layout.gists, self._of_blocks())
        may = readable(layout, cut, self.window, self.itself)
        even = layout.gist if self.even else None
        with edited(model, states, _MayRead(may, Where(kinds=["self"], stack=self.stack), even)):
            model(
                inputs_embeds=x,
                attention_mask=layout.mask.long(),
                position_ids=layout.positions,
                **accepted(model, logits_to_keep=1, use_cache=False),
            )
        return states.found


class _MayRead(AttentionEdit):
    """Attention that reads no more than this, of what it would; some queries weigh it evenly."""

    def __init__(
        self, may: Bool[Tensor, "batch slots slots"], at: Where, even: Bool[Tensor, "batch slots"] | None
    ) -> None:
        self.may, self.at, self.even = may, at, even

    def inputs(self, call: AttentionCall) -> AttentionCall:
        before = call.allowed

        def allowed(rows: Int[Tensor, "batch rows"]) -> Bool[Tensor, "_batch _heads _rows keys"]:
            mine = self.may[torch.arange(len(rows), device=rows.device)[:, None], rows][:, None]
            return mine if before is None else mine & before(rows)

        q = call.q if self.even is None else call.q.masked_fill(self.even[:, None, :, None], 0.0)
        return call.replace(q=q, allowed=allowed)


class _States(BlockEdit):
    """What is kept of states 0 to the last, with its graph."""

    def __init__(self, kept: Callable[[Tensor], Tensor], at: Where) -> None:
        self.kept, self.at = kept, at
        self.found: list[Tensor] = []

    def begins(self) -> None:
        self.found = []

    def enters(self, place: Place, h: Float[Tensor, "batch slots dim"]) -> Float[Tensor, "batch slots dim"]:
        if place.block == 0:
            self.found.append(self.kept(h))
        return h

    def leaves(self, place: Place, h: Float[Tensor, "batch slots dim"]) -> Float[Tensor, "batch slots dim"]:  # noqa: ARG002
        self.found.append(self.kept(h))
        return h


class _Fed(BlockEdit):
    """Each block reads what it is given, whatever the one before it wrote."""

    def __init__(self, states: Sequence[Tensor], at: Where) -> None:
        self.states, self.at = states, at

    def enters(self, place: Place, h: Float[Tensor, "batch slots dim"]) -> Float[Tensor, "batch slots dim"]:
        return self.states[place.block].to(h.dtype)


@contextmanager
def _weights(adapted: nn.Module | None, model: nn.Module) -> Iterator[None]:
    with nullcontext() if adapted is None else cast(Adapted, adapted).on(model):
        yield


def _run(
    model: nn.Module,
    ids: Int[Tensor, "batch tokens"],
    real: Bool[Tensor, "batch tokens"],
    blocks: Sequence[KeysValues] = (),
    before: Bool[Tensor, "batch slots"] | None = None,
    start: Int[Tensor, "batch"] | None = None,
    use_cache: bool | None = None,
) -> Any:
    """The model on tokens behind these keys and values, the first real one at this position."""
    told = positions(real).clamp(min=0)
    return model(
        ids,
        attention_mask=(real if before is None else torch.cat([before, real], 1)).long(),
        position_ids=told if start is None else told + start[:, None],
        **(filled(model, blocks) if blocks else {}),
        **({} if use_cache is None else accepted(model, use_cache=use_cache)),
    )


def _pooled(x: Float[Tensor, "batch heads tokens width"], cut: Windows) -> Float[Tensor, "batch heads windows width"]:
    """Window means of keys or values."""
    heads = x.shape[1]
    return cut.means(x.transpose(1, 2).flatten(2)).unflatten(2, (heads, -1)).transpose(1, 2)


def _real(
    ids: Int[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"] | None, name: str
) -> Bool[Tensor, "batch tokens"]:
    """Which tokens are real; raise where a text has none."""
    if ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise InputError(f"{name}: expected numbers of tokens [batch, tokens], got {ids.dtype} {tuple(ids.shape)}")
    if mask is None:
        mask = torch.ones_like(ids, dtype=torch.bool)
    if mask.dtype != torch.bool or mask.shape != ids.shape:
        raise InputError(f"mask: expected bool {tuple(ids.shape)} for {name}, got {mask.dtype} {tuple(mask.shape)}")
    if not ids.shape[1] or not bool(mask.any(1).all()):
        raise InputError(f"{name}: is empty in some item; give at least one token")
    return mask


def _vocabulary(model: nn.Module) -> Float[Tensor, "words dim"]:
    return next(m for m in embeddings(model).modules() if isinstance(m, nn.Embedding)).weight


def _dtype(model: nn.Module) -> torch.dtype:
    return _vocabulary(model).dtype
