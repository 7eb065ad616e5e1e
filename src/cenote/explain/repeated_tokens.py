"""What each head of a decoder attends to on random tokens that are repeated: induction, previous-token, duplicate-token, sink.

Every sequence has a period of its own, and a score is compared with that at the offset of another sequence: a head that looks
back by a fixed number of tokens gains nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cenote.core import InputError
from cenote.models.live import AttentionCall, few_logits, one_stack, recorded

KINDS = ("induction", "previous token", "duplicate token", "sink")
LEAST, ERRORS = 0.1, 5.0
ROWS = 64
"""Queries whose maps are there at a time."""


class FoundHead(NamedTuple):
    """A head that does what is asked of it."""

    layer: int
    head: int
    score: float


class HeadScores(NamedTuple):
    """Of one kind.

    Attributes:
        scores: mean attention to where such a head looks, `[layers, heads]`.
        control: the same at a shuffled offset.
        errors: by how many standard errors, over sequences, the score is above the control.
    """

    scores: Float[Tensor, "layers heads"]
    control: Float[Tensor, "layers heads"]
    errors: Float[Tensor, "layers heads"]

    def heads(self, least: float = LEAST, errors: float = ERRORS) -> list[FoundHead]:
        """Those with at least this score that are so many standard errors above the control, best first."""
        chosen = (self.scores >= least) & (self.errors > errors)
        found = [FoundHead(layer, head, float(self.scores[layer, head])) for layer, head in chosen.nonzero().tolist()]
        return sorted(found, key=lambda one: -one.score)


class Repeated(NamedTuple):
    """Random tokens said again and again: `ids [sequences, tokens]`, and after how many tokens each begins anew."""

    ids: Int[Tensor, "sequences tokens"]
    periods: Int[Tensor, "sequences"]


def repeated(sequences: int, period: int, tokens: tuple[int, int], *, spread: int = 8, seed: int = 0) -> Repeated:
    """Sequences of twice the longest period.

    Args:
        sequences: how many.
        period: mean period.
        tokens: the first number that is drawn and the one behind the last.
        spread: periods are drawn up to so far on either side; 0 for one and the same.
        seed: of all draws.

    Example:
        >>> ids, periods = repeated(2, 4, (5, 9), spread=0)
        >>> ids.shape, bool((ids[:, :4] == ids[:, 4:]).all())
        (torch.Size([2, 8]), True)
    """
    if sequences < 2 or not 0 <= spread < period - 1:
        raise InputError(
            f"sequences, spread: expected at least 2, and below the period less one, got {sequences} and {spread} of {period}"
        )
    generator = torch.Generator().manual_seed(seed)
    longest = period + spread
    # no two neighbours alike, the last and the first included, so that another sequence has another offset
    steps = torch.randperm(2 * spread + 1, generator=generator)
    chosen = torch.arange(sequences) % len(steps)
    if chosen[-1] == 0 and spread:
        chosen[-1] = 1
    periods = period - spread + steps[chosen]
    drawn = torch.randint(*tokens, (sequences, longest), generator=generator)
    at = torch.arange(2 * longest) % periods[:, None]
    return Repeated(drawn.gather(1, at), periods)


@torch.no_grad()
def head_atlas(
    model: nn.Module,
    tokens: tuple[int, int],
    *,
    sequences: int = 16,
    period: int = 64,
    seed: int = 0,
    batch: int = 8,
    stack: str | None = None,
) -> dict[str, HeadScores]:
    """Score every head of a decoder for each of `KINDS`.

    Args:
        model: in eval mode; the attention function that was loaded stays.
        tokens: from which random ones are drawn: the first number and the one behind the last.
        sequences: how many; the standard errors are over them.
        period: of tokens, on the mean.
        seed: of the draws.
        batch: sequences at a time.
        stack: path of the list of blocks, where a model has several.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=90, n_embd=8, n_layer=2, n_head=2)).eval()
        >>> found = head_atlas(model, (0, 90), sequences=4, period=12)
        >>> found["induction"].scores.shape, found["induction"].heads()
        (torch.Size([2, 2]), [])
    """
    ids, periods = repeated(sequences, period, tokens, spread=min(8, period // 4), seed=seed)
    others = periods.roll(1)
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {kind: [] for kind in KINDS}
    generator = torch.Generator().manual_seed(seed)
    # where a control looks that has no period: further back than the last token, at no fixed distance
    lags = torch.randint(2, period, (sequences, ids.shape[1]), generator=generator)
    for start in range(0, sequences, batch):
        part = slice(start, start + batch)
        with recorded(model, "inputs", at=one_stack(model, stack)) as found:
            model(**few_logits(model, {"input_ids": ids[part].to(next(model.parameters()).device)}))
        calls = [call for (call, *_) in found["inputs"].values()]
        second = torch.arange(ids.shape[1]) >= torch.maximum(periods, others)[part, None]
        now = torch.arange(ids.shape[1])
        own, other = periods[part, None], others[part, None]
        targets: dict[str, tuple[Tensor, Tensor]] = {
            "induction": (now - own + 1, now - other + 1),
            "previous token": ((now - 1).expand(len(own), -1), now - lags[part]),
            "duplicate token": (now - own, now - other),
            "sink": (torch.zeros_like(lags[part]), now - lags[part]),
        }
        for kind, pair in targets.items():
            scores = [torch.stack([_attended(call, at, second) for call in calls], 1) for at in pair]
            seen[kind].append((scores[0], scores[1]))
    return {kind: _compared(*map(torch.cat, zip(*parts, strict=True))) for kind, parts in seen.items()}


def _attended(call: AttentionCall, at: Int[Tensor, "batch tokens"], real: Tensor) -> Float[Tensor, "batch heads"]:
    """Mean attention of each sequence's real queries to one key each."""
    at, real = at.clamp(min=0).to(call.q.device), real.to(call.q.device)
    total = torch.zeros(call.batch, call.heads, device=call.q.device)
    for start in range(0, call.queries, ROWS):
        rows = slice(start, start + ROWS)
        if not bool(real[:, rows].any()):
            continue
        chosen = torch.zeros(call.batch, call.queries, dtype=torch.bool, device=call.q.device)
        chosen[:, rows] = True
        weights = call.only(chosen).weights()
        index = at[:, None, rows, None].expand(-1, call.heads, -1, 1)
        total += (weights.gather(3, index)[..., 0] * real[:, None, rows]).sum(2)
    return total / real.sum(1)[:, None]


def _compared(scores: Tensor, control: Tensor) -> HeadScores:
    lead = scores - control
    error = lead.std(0) / len(lead) ** 0.5
    return HeadScores(scores.mean(0), control.mean(0), lead.mean(0) / error.clamp(min=1e-12))
