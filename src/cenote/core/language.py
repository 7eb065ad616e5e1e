"""What a causal language model thinks of a text behind another: log-probabilities of continuations of a prompt.

The scores are those of the whole string token by token, as in lm-evaluation-harness: white space at the end of a prompt belongs
to the continuation. A prompt and a continuation that do not come apart between two tokens are an error, not a shifted score.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cenote.core.errors import InputError


class Scored(NamedTuple):
    """Of each continuation of a prompt.

    Attributes:
        total: log-probability of the whole string, `[continuations]`.
        first: of its first token.
        tokens: how many it has.
    """

    total: Float[Tensor, "continuations"]
    first: Float[Tensor, "continuations"]
    tokens: Int[Tensor, "continuations"]

    @property
    def per_token(self) -> Float[Tensor, "continuations"]:
        """The mean of a token's log-probability."""
        return self.total / self.tokens


class Encoded(NamedTuple):
    """Numbers of the tokens of a prompt, and of those of each continuation behind it."""

    prompt: list[int]
    continuations: list[list[int]]


def accepted(model: nn.Module, **asked: Any) -> dict[str, Any]:
    """Those arguments that a model's forward knows.

    >>> accepted(torch.nn.ReLU(), input=3, use_cache=False)
    {'input': 3}
    """
    known = inspect.signature(model.forward).parameters
    return {name: value for name, value in asked.items() if name in known}


def encoded(
    tokenizer: Any, prompt: str, continuations: Sequence[str], *, special_tokens: bool = True, item: str = "prompt"
) -> Encoded:
    """The tokens of a prompt and its continuations, of the whole strings.

    Args:
        tokenizer: of transformers.
        prompt: what is given; white space at its end is moved to the continuations.
        continuations: what is scored.
        special_tokens: whether the tokenizer puts its own tokens in front; those behind are dropped.
        item: what errors call it.

    Raises:
        InputError: for an empty continuation; where prompt and continuation merge into one token; where there is nothing to
            begin with.
    """
    if not continuations:
        raise InputError(f"{item}: has no continuations")
    bare = prompt.rstrip()
    space = prompt[len(bare) :]
    before = _tokens(tokenizer, bare, special_tokens)
    found = []
    for continuation in continuations:
        if not continuation.strip():
            raise InputError(f"{item}: a continuation is empty: {continuation!r}")
        text = space + continuation
        whole = _tokens(tokenizer, bare + text, special_tokens)
        if whole[: len(before)] != before:
            at = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(whole))
            merged = tokenizer.decode(whole[at : at + 1])
            raise InputError(
                f"{item}: the prompt's end {bare[-12:]!r} and {text[:24]!r} merge into the token {merged!r}; put a space "
                f"between them, or the prompt's last word into the continuation"
            )
        found.append(whole[len(before) :])
        if not found[-1]:
            raise InputError(f"{item}: the continuation {continuation!r} has no token")
    if not before:
        start = next(
            (t for n in ("bos_token_id", "eos_token_id") if (t := getattr(tokenizer, n, None)) is not None), None
        )
        if start is None:
            raise InputError(f"{item}: is empty, and the tokenizer has no token to begin with")
        before = [int(start)]
    return Encoded(before, found)


@torch.no_grad()
def log_probabilities(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    continuations: Sequence[str],
    *,
    special_tokens: bool = True,
    item: str = "prompt",
) -> Scored:
    """Of each continuation of a prompt, which runs once; the continuations are one batch behind its cache.

    Args:
        model: a causal language model, in eval mode.
        tokenizer: its own.
        prompt: what is given.
        continuations: what is scored, such as `" yes"`, `" no"`.
        special_tokens: whether the tokenizer puts its own tokens in front of the prompt.
        item: what errors call it.

    Raises:
        InputError: as `encoded`; where prompt and continuation are longer than the model takes.
    """
    ids = encoded(tokenizer, prompt, continuations, special_tokens=special_tokens, item=item)
    _require_length(model, ids, item)
    return scored(model, ids)


@torch.no_grad()
def scored(model: nn.Module, ids: Encoded) -> Scored:
    """The same of tokens."""
    device = next(model.parameters()).device
    counts = torch.tensor([len(tokens) for tokens in ids.continuations], device=device)
    # what stands behind a continuation cannot be read by it
    padded = nn.utils.rnn.pad_sequence([torch.tensor(t, device=device) for t in ids.continuations], batch_first=True)
    prompt = torch.tensor([ids.prompt], device=device)
    longest, several = padded.shape[1], len(padded)
    first, cache = _read(model, prompt, cached=longest > 1)
    ahead = first.expand(several, 1, -1)
    if longest > 1:
        if hasattr(cache, "batch_repeat_interleave"):
            cache.batch_repeat_interleave(several)
            behind = model(padded[:, :-1], past_key_values=cache, use_cache=True).logits
        else:
            behind = model(torch.cat([prompt.expand(several, -1), padded[:, :-1]], 1)).logits[:, prompt.shape[1] :]
        ahead = torch.cat([ahead, behind], 1)
    each = ahead.float().log_softmax(-1).gather(-1, padded[..., None])[..., 0]
    real = torch.arange(longest, device=device) < counts[:, None]
    return Scored(each.masked_fill(~real, 0.0).sum(1), each[:, 0], counts)


def _read(model: nn.Module, prompt: Int[Tensor, "1 tokens"], cached: bool) -> tuple[Float[Tensor, "1 1 vocab"], Any]:
    given = accepted(model, logits_to_keep=1, use_cache=cached)
    output = model(prompt, **given)
    cache = getattr(output, "past_key_values", None) if cached else None
    return output.logits[:, -1:], cache


def _tokens(tokenizer: Any, text: str, special_tokens: bool) -> list[int]:
    """Without what the tokenizer puts behind."""
    ids: Mapping[str, list[int]] = tokenizer(text, add_special_tokens=special_tokens)
    found = list(ids["input_ids"])
    if not special_tokens:
        return found
    plain = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    for start in range(len(found) - len(plain) + 1):
        if found[start : start + len(plain)] == plain:
            return found[: start + len(plain)]
    return found


def _require_length(model: nn.Module, ids: Encoded, item: str) -> None:
    limit = longest(model)
    asked = len(ids.prompt) + max(map(len, ids.continuations))
    if limit is not None and asked > limit:
        raise InputError(f"{item}: prompt and continuation are {asked} tokens, and the model takes {limit}")


def longest(model: nn.Module) -> int | None:
    """How many tokens a model takes, where its configuration tells."""
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None
