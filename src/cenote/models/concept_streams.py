"""Tokens that look on in a diffusion transformer with two streams: they are carried beside the prompt, by its weights.

Of diffusers it knows the names of a joint block's parts (`FluxTransformerBlock`, `JointTransformerBlock` of SD3): the
model runs as it would, to the bit, for nothing reads these tokens but themselves. How they read, and what is made of
it, is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cenote.core import InputError
from cenote.models.live import AttentionCall, AttentionEdit, Place, Where, edited

PARTS = ("norm1_context", "attn", "norm2_context", "ff_context")


@dataclass(frozen=True, eq=False)
class Seen:
    """One joint attention, with the looking-on tokens' own queries, keys and values; all `[batch, heads, tokens, width]`.

    Attributes:
        place: where.
        step: which forward pass of the model, from 0.
        q, k, v: of the tokens.
        image_q, image_k, image_v: of the image, after positions.
        image_y: outputs of the heads at the image, before their projection.
        prompt_to_image: attention of the prompt's tokens to the image, mean over the heads, `[batch, prompt, pixels]`.
    """

    place: Place
    step: int
    q: Tensor
    k: Tensor
    v: Tensor
    image_q: Tensor
    image_k: Tensor
    image_v: Tensor
    image_y: Tensor
    prompt_to_image: Tensor


class TextSide:
    """The prompt's half of a joint block, for other tokens.

    Args:
        block: of diffusers.
    """

    def __init__(self, block: nn.Module) -> None:
        missing = [name for name in PARTS[:2] if not hasattr(block, name)]
        if missing or not hasattr(block.attn, "add_q_proj"):
            raise InputError(
                f"model: {type(block).__name__} is no block with two streams (it has no {', '.join(missing) or 'add_q_proj'}); "
                "FluxTransformer2DModel and SD3Transformer2DModel have them"
            )
        self.block: Any = block
        self.last = getattr(block, "norm2_context", None) is None
        """SD3's last block writes no text."""

    def enter(self, x: Tensor, condition: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Queries, keys and values of the tokens, and what `leave` needs."""
        if self.last:
            normed, rest = self.block.norm1_context(x, condition), []
        else:
            normed, *rest = self.block.norm1_context(x, emb=condition)
        attn = self.block.attn
        names = (("add_q_proj", "norm_added_q"), ("add_k_proj", "norm_added_k"), ("add_v_proj", ""))
        found = []
        for projection, norm in names:
            split = getattr(attn, projection)(normed).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            own = getattr(attn, norm, None) if norm else None
            found.append(split if own is None else own(split))
        return found, rest

    def leave(self, x: Tensor, y: Tensor, rest: list[Tensor]) -> Tensor:
        """The tokens' next states from their heads' outputs."""
        if self.last:
            return x
        gate, shift, scale, gate_mlp = rest
        x = x + gate.unsqueeze(1) * self.block.attn.to_add_out(y.transpose(1, 2).flatten(2))
        normed = self.block.norm2_context(x) * (1 + scale[:, None]) + shift[:, None]
        return x + gate_mlp.unsqueeze(1) * self.block.ff_context(normed)


class _Stream(AttentionEdit):
    """Carries the tokens from joint block to joint block; `step` begins anew with every forward pass."""

    at = Where(kinds=["joint"])

    def __init__(self, model: Any, tokens: Tensor, look: Callable[[Seen], Tensor]) -> None:
        self.model, self.tokens, self.look = model, tokens, look
        self.x: Tensor | None = None
        self.condition: Tensor | None = None
        self.step = -1
        self.image: int | None = None
        self.first_is_image: dict[str, Tensor] = {}

    def begins(self) -> None:
        self.x, self.condition, self.step = None, None, -1

    def starts(self, condition: Tensor) -> None:
        """A forward pass begins: the tokens are embedded, with the condition that is theirs."""
        x = self.model.context_embedder(self.tokens.to(condition))
        self.x, self.condition, self.step = x.expand(len(condition), -1, -1), condition, self.step + 1

    @torch.no_grad()
    def context(
        self, call: AttentionCall, y: Float[Tensor, "batch heads queries width"]
    ) -> Float[Tensor, "batch heads queries width"]:
        block = self.model.get_submodule(call.place.path.rpartition(".")[0])
        values = self.first_is_image.pop(call.place.path, None)
        # other attention of the same block (SD3.5 has one of the image alone) has no prompt
        if self.x is None or self.condition is None or values is None or values.shape[1] == call.queries:
            return y
        side = TextSide(block)
        pixels = values.shape[1]
        own = values.unflatten(-1, (call.v.shape[1], -1)).transpose(1, 2)
        image_first = torch.equal(own[:, :, 0], call.v[:, :, 0])
        image = slice(0, pixels) if image_first else slice(call.queries - pixels, call.queries)
        prompt = slice(pixels, call.queries) if image_first else slice(0, call.queries - pixels)
        (q, k, v), rest = side.enter(self.x, self.condition)
        scores = (call.q[:, :, prompt] @ call.k.mT * call.scale).softmax(-1)[..., image].mean(1)
        image_q, image_k, image_v, image_y = (t[:, :, image] for t in (call.q, call.k, call.v, y))
        looked = self.look(Seen(call.place, self.step, q, k, v, image_q, image_k, image_v, image_y, scores))
        self.x = side.leave(self.x, looked, rest)
        return y


@contextmanager
def looking_on(
    model: nn.Module, tokens: Float[Tensor, "items tokens dim"], look: Callable[[Seen], Tensor]
) -> Iterator[None]:
    """Carry tokens beside the prompt of a diffusion transformer, through each of its forward passes, loops included.

    Their condition is that of the image with a pooled prompt of zeros. They stand at position zero, where rotary
    embeddings turn nothing.

    Args:
        model: `FluxTransformer2DModel` or `SD3Transformer2DModel` of diffusers, or one whose joint blocks have their names.
        tokens: embeddings, as the model takes those of a prompt.
        look: called in each joint block; gives the heads' outputs of the tokens, `[batch, heads, tokens, width]`.

    Raises:
        InputError: where the model has no joint blocks, or tokens are of another width.
    """
    parts = [getattr(model, name, None) for name in ("time_text_embed", "context_embedder")]
    embedder = parts[1]
    if not isinstance(embedder, nn.Linear) or not isinstance(parts[0], nn.Module):
        raise InputError(
            f"model: {type(model).__name__} has no time_text_embed and context_embedder; give a FluxTransformer2DModel or "
            "SD3Transformer2DModel (of a pipeline: pipeline.transformer)"
        )
    if len(tokens) != 1:
        raise InputError(
            f"tokens: expected those of one item, which all items of a batch share, got {len(tokens)} items"
        )
    if tokens.shape[-1] != embedder.in_features:
        raise InputError(f"tokens: expected width {embedder.in_features}, as of the prompt, got {tokens.shape[-1]}")
    stream = _Stream(model, tokens, look)
    condition: Any = parts[0]
    busy = False

    def conditioned(module: nn.Module, given: tuple[Any, ...], _found: Tensor) -> None:
        nonlocal busy
        if busy:
            return
        busy = True
        try:
            with torch.no_grad():
                stream.starts(module(*given[:-1], torch.zeros_like(given[-1])))
        finally:
            busy = False

    hooks = [condition.register_forward_hook(conditioned)]
    for name, module in model.named_modules():
        if hasattr(module, "add_q_proj") and hasattr(module, "to_v"):
            hooks.append(module.to_v.register_forward_hook(_kept(stream, name)))
    try:
        with edited(model, stream):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _kept(stream: _Stream, name: str) -> Callable[..., None]:
    def hook(_module: nn.Module, _given: tuple[Any, ...], found: Tensor) -> None:
        stream.first_is_image[name] = found

    return hook


@torch.no_grad()
def words_encoded(
    words: list[str], tokenizer: Any, encoder: nn.Module, mean: bool = False
) -> Float[Tensor, "1 words dim"]:
    """Each word by itself through a text encoder: its first token, or the mean of its tokens.

    Args:
        words: one token each, as a rule.
        tokenizer, encoder: of the prompt, as T5's.
        mean: over the word's tokens; special ones are left out.
    """
    if not words:
        raise InputError("words: expected at least one, got none")
    found = []
    for word in words:
        given = tokenizer(word, return_tensors="pt")
        states = encoder(given["input_ids"], attention_mask=given["attention_mask"])[0][0]
        special = torch.tensor(
            tokenizer.get_special_tokens_mask(given["input_ids"][0].tolist(), already_has_special_tokens=True)
        ).bool()
        if bool(special.all()):
            raise InputError(f"words: {word!r} has no token of its own")
        found.append(states[~special].mean(0) if mean else states[~special][0])
    return torch.stack(found)[None]
