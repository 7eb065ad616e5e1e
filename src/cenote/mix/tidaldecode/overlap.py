"""Which layer should choose for which: how much of what a layer would choose another has chosen, measured on texts.

Source: Yang, Zhang, Chen, Li and Jia, "TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention",
arXiv 2410.05076, 2025.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cenote.core import routing
from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least, require_one_of
from cenote.mix.policies import Share
from cenote.mix.tidaldecode.policy import TidalDecode, select_scores
from cenote.models.live import AttentionCall, few_logits, one_stack, recorded

ROWS = 16
"""Queries of a text that are looked at."""


class Overlap(NamedTuple):
    """Of the layer that chooses, down, and the one that reads, across; means over queries and heads.

    Attributes:
        recall: part of the reader's own top k that the chooser's holds, `[layers, layers]`.
        mass: part of the reader's attention that the chooser's top k holds.
        chance: what positions drawn at random would hold of either.
    """

    recall: Float[Tensor, "layers layers"]
    mass: Float[Tensor, "layers layers"]
    chance: float


class ChosenLayers(NamedTuple):
    """Which layer should choose anew.

    Attributes:
        correction: the proposal.
        score: for every candidate, the mean over the sparse layers of what `by` says they find in what was chosen for them.
        single: the same with the first selection alone.
        overlap: what it was computed from.
        policy: with these layers, for this model alone.
    """

    correction: int
    score: dict[int, float]
    single: float
    overlap: Overlap
    policy: TidalDecode


@torch.no_grad()
def overlap(
    model: nn.Module,
    texts: Iterable[Mapping[str, Any]],
    budget: int,
    share: Share = "query_head",
    rows: int = ROWS,
    stack: str | None = None,
) -> Overlap:
    """Measure how positions persist over layers.

    Args:
        model: a decoder.
        texts: inputs of its forward, one text each, longer than the budget.
        budget: k.
        share: as of `TidalDecode`.
        rows: how many queries of the second half of a text are looked at, evenly spaced.
        stack: path of the list of blocks, where a model has several.

    Raises:
        InputError: for texts that are not longer than the budget, or several in one batch.
    """
    require_at_least(1, budget=budget, rows=rows)
    require_one_of(get_args(Share), share=share)
    recalls, masses, chances = [], [], []
    for inputs in texts:
        with recorded(model, "inputs", at=one_stack(model, stack)) as found:
            model(**few_logits(model, inputs))
        calls = [calls[0] for place, calls in found["inputs"].items() if place.kind == "self"]
        if calls[0].batch != 1 or calls[0].keys <= budget:
            raise InputError(
                f"texts: expected one at a time, longer than the budget of {budget}, got {calls[0].batch} of "
                f"{calls[0].keys} tokens"
            )
        recall, mass, chance = _of_text([_few(call, rows) for call in calls], budget, share)
        recalls.append(recall)
        masses.append(mass)
        chances.append(chance)
    if not recalls:
        raise InputError("texts: expected at least one, got none")
    return Overlap(torch.stack(recalls).mean(0), torch.stack(masses).mean(0), sum(chances) / len(chances))


def choose_layers(
    model: nn.Module,
    texts: Iterable[Mapping[str, Any]],
    budget: int,
    start: int = 2,
    share: Share = "query_head",
    rows: int = ROWS,
    stack: str | None = None,
) -> ChosenLayers:
    """Propose the layer that chooses anew, for this model and texts like these.

    Args:
        model, texts, budget, share, rows, stack: as of `overlap`.
        start: the first layer that chooses.

    Raises:
        InputError: as `overlap`; where no layer is left that could choose anew and one that would read it.
    """
    require_at_least(0, start=start)
    found = overlap(model, texts, budget, share, rows, stack)
    layers = len(found.mass)
    if start + 2 >= layers:
        raise InputError(f"start: layer {start} of {layers} leaves none to choose anew and be read by another")
    score = {c: _score(found.mass, start, c) for c in range(start + 1, layers - 1)}
    best = max(score, key=lambda c: (score[c], -c))
    policy = TidalDecode(budget, start, best, share, layers=layers)
    return ChosenLayers(best, score, _score(found.mass, start, start), found, policy)


def _score(mass: Float[Tensor, "layers layers"], start: int, correction: int) -> float:
    """So much of their attention do the layers behind the first choice find in what was chosen for them; one that chooses anew
    finds all."""
    layers = len(mass)
    parts = [
        1.0 if layer == correction else float(mass[start if layer < correction else correction, layer])
        for layer in range(start + 1, layers)
    ]
    return sum(parts) / len(parts)


def _few(call: AttentionCall, rows: int) -> AttentionCall:
    """Some queries of the second half."""
    first = call.queries // 2
    at = torch.linspace(first, call.queries - 1, min(rows, call.queries - first), device=call.q.device).long()
    chosen = torch.zeros(1, call.queries, dtype=torch.bool, device=call.q.device)
    chosen[0, at] = True
    return call.only(chosen)


def _of_text(calls: list[AttentionCall], budget: int, share: Share) -> tuple[Tensor, Tensor, float]:
    weights, chosen = [], []
    for call in calls:
        readable = call.readable()
        may = torch.ones(1, 1, call.queries, call.keys, dtype=torch.bool) if readable is None else readable[:, :1]
        scores = select_scores(call.q, call.k, call.scale, share)
        best = routing.best(scores, budget, may.expand_as(scores))
        group = call.heads // best.shape[1]
        chosen.append(best.repeat_interleave(group, 1).float())
        weights.append(call.weights())
    sets, mass = torch.stack(chosen), torch.stack(weights)
    covered = torch.einsum("abhqk,cbhqk->acbhq", sets, mass).mean((2, 3, 4))
    both = torch.einsum("abhqk,cbhqk->acbhq", sets, sets) / sets.sum(-1).clamp(min=1)
    seen = calls[0].numbers().float().mean() + 1
    return both.mean((2, 3, 4)), covered, min(1.0, budget / float(seen))
