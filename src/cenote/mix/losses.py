"""How well a decoder tells a text, token by token, with the whole text at once or decoding through its cache."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.language import accepted
from cenote.mix.layer_gates import told
from cenote.models.caches import ARGUMENTS


@torch.no_grad()
def token_losses(
    model: nn.Module, ids: Int[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"] | None = None
) -> Float[Tensor, "batch tokens_less_1"]:
    """`-log p` of each token but the first, the text read at once; NaN where it or the token before it is padding.

    Args:
        model: a causal decoder, with whatever edits it has entered.
        ids: numbers of tokens.
        mask: True on real ones.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)).eval()
        >>> token_losses(model, torch.tensor([[3, 4, 5]])).shape
        torch.Size([1, 2])
    """
    logits = model(input_ids=ids, **told(mask), **accepted(model, use_cache=False)).logits
    losses = _told(logits[:, :-1], ids[:, 1:])
    return losses if mask is None else losses.masked_fill(~(mask[:, 1:] & mask[:, :-1]), float("nan"))


@torch.no_grad()
def decoded_losses(
    model: nn.Module,
    ids: Int[Tensor, "batch tokens"],
    prompt: int,
    mask: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch told"]:
    """The same of the tokens behind a prompt, each told by the true ones before it, one step of decoding after the other.

    Args:
        model, ids, mask: as of `token_losses`; padding on the left.
        prompt: how many tokens are read at once.

    Raises:
        InputError: where nothing is left behind the prompt, or the model takes no cache.
    """
    tokens = ids.shape[1]
    if not 0 < prompt < tokens:
        raise InputError(f"prompt: expected from 1 to {tokens - 1} tokens, got {prompt}")
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    number = (mask.long().cumsum(1) - 1).clamp(min=0)
    name = next((n for n in ARGUMENTS if n in inspect.signature(model.forward).parameters), None)
    if name is None:
        raise InputError(f"model: {type(model).__name__} takes no cache; give a causal decoder")
    found, cache, start = [], None, 0
    for end in range(prompt, tokens):
        output = model(
            input_ids=ids[:, start:end],
            attention_mask=mask[:, :end].long(),
            position_ids=number[:, start:end],
            use_cache=True,
            **{name: cache},
            **accepted(model, logits_to_keep=1),
        )
        cache, start = getattr(output, name), end
        found.append(_told(output.logits[:, -1:], ids[:, end : end + 1]))
    return torch.cat(found, 1)


def losses_by_length(model: nn.Module, ids: Int[Tensor, "batch tokens"], lengths: Sequence[int]) -> dict[int, float]:
    """The mean loss of texts cut to these lengths; its exponential is perplexity.

    Raises:
        InputError: for a length that the texts do not have.
    """
    found = {}
    for length in lengths:
        if not 2 <= length <= ids.shape[1]:
            raise InputError(f"lengths: expected from 2 to {ids.shape[1]} tokens, got {length}")
        found[length] = float(token_losses(model, ids[:, :length]).mean())
    return found


def trailing(losses: Float[Tensor, "batch tokens"], last: int) -> Float[Tensor, ""]:
    """The mean loss of the last tokens, which have most to read; NaN counts as none."""
    return losses[:, -last:].nanmean()


def _told(logits: Tensor, gold: Tensor) -> Tensor:
    return -logits.float().log_softmax(-1).gather(-1, gold[..., None])[..., 0]
