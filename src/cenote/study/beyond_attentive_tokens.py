"""At equal numbers of tokens, a vision transformer without fine-tuning is no less right with attentive tokens matched and
inattentive ones clustered than with the most attentive ones alone and than with clusters of all, where each of two blocks
leaves three or two tenths; and what is left is more diverse than the most attentive tokens.

Refuted if the most attentive tokens alone or clusters of all are more than a point better, or no less alike.

Two tasks: digits whose 64 pixels are tokens; and canvases of 32 x 32 pixels in 64 patches whose classes are the digit together
with which way stripes behind it run, so that the background says something. Networks are trained without reduction and must
be right in 90 % first.

Knocked out: similarity (random clusters and random pairs, as many and as large), and importance (attention permuted over the
tokens of each image, for the split and for the weights).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cenote.core.clusters import greedy_pairs
from cenote.reduce import AttentiveAndDiverse, FusedTopTokens, RandomTokens, TopAttentionTokens, bat, mean_cosine
from cenote.reduce.beyond_attentive_tokens.reducer import Split
from cenote.study.harness import Arms, Check, Findings, Part, Size, above, draw_arms, gate, seeds_of, study
from cenote.study.harness.reduced_vit import PATCHES, Reading, Trained, on_canvases, on_digits, runs

SEEDS = {"small": 3, "full": 5}
BLOCKS = (1, 2)
KEPT = (0.7, 0.5, 0.3, 0.2)
FEW = (0.3, 0.2)
LEVEL = 0.9
PIXELS, CANVASES = "pixels", "canvases"


class RandomGroups(AttentiveAndDiverse):
    """Clusters and pairs of the same sizes, of random tokens."""

    def matched(self, x: Tensor, pairs: Tensor, mask: Tensor) -> Tensor:  # noqa: ARG002
        return greedy_pairs(
            torch.rand(*mask.shape, mask.shape[1], generator=torch.Generator().manual_seed(0)), pairs, mask
        )

    def clustered(self, x: Tensor, counts: Tensor, mask: Tensor) -> Tensor:
        found = super().clustered(x, counts, mask)
        for item, real in enumerate(mask):
            own = real.nonzero().squeeze(1)
            found[item, own] = found[item, own[torch.randperm(len(own), generator=torch.Generator().manual_seed(item))]]
        return found


class AttentionPermuted(AttentiveAndDiverse):
    """Attention of other tokens of the same image."""

    def reduce(self, x: Tensor, sizes: Tensor, mask: Tensor, *, attention: Tensor) -> Any:
        real = mask[0].nonzero().squeeze(1)
        order = torch.rand(len(x), len(real), generator=torch.Generator().manual_seed(0)).argsort(1)
        moved = attention.clone()
        moved[:, :, real] = attention[:, :, real].gather(2, order[:, None].expand(-1, attention.shape[1], -1))
        return super().reduce(x, sizes, mask, attention=moved)


class ClustersOfAll(AttentiveAndDiverse):
    """Nothing is attentive: all is clustered."""

    def split(self, tokens: Tensor) -> Split:
        left = self.budget.of(tokens)
        return Split(torch.zeros_like(left), torch.zeros_like(left), left)


BOTH, TOP, FUSED, ALL, RANDOM = "BAT", "top attention", "EViT", "clusters of all", "random"
GROUPS, MOVED = "BAT, random groups", "BAT, attention permuted"
ARMS: dict[str, Any] = {
    BOTH: AttentiveAndDiverse,
    TOP: TopAttentionTokens,
    FUSED: FusedTopTokens,
    ALL: ClustersOfAll,
    RANDOM: RandomTokens,
    GROUPS: RandomGroups,
    MOVED: AttentionPermuted,
}


class Measured(NamedTuple):
    """Of an arm: accuracy, and the mean cosine of what the last cut leaves."""

    right: float
    alike: float


@study
def run(seed: int, size: Size) -> Findings:
    """Train both networks of each seed; reduce their tokens by every arm."""
    seeds = seeds_of(seed, size, **SEEDS)
    networks = {
        PIXELS: [on_digits(s, size, patch=1) for s in seeds],
        CANVASES: [on_canvases(s, size, backgrounds=True) for s in seeds],
    }
    right = {(task, kept): Arms() for task in networks for kept in KEPT}
    alike = {place: Arms() for place in right}
    for (task, kept), arms in right.items():
        for name, kind in ARMS.items():
            found = [_measured(network, kind, kept) for network in networks[task]]
            arms[name], alike[task, kept][name] = zip(*found, strict=True)
    few = [place for place in right if place[1] in FEW]

    def names(arm: str) -> tuple[Check, ...]:
        return tuple(
            above(
                f"{task}, {kept} kept: accuracy, {arm} minus {rival}",
                right[task, kept].minus(arm, rival),
                expected=0.0,
                refuted=-0.01,
            )
            for task, kept in few
            for rival in (TOP, ALL)
        )

    def differs(arm: str) -> tuple[Check, ...]:
        return tuple(
            above(
                f"{task}, {kept} kept: mean cosine, {TOP} minus {arm}", alike[task, kept].minus(TOP, arm), expected=0.0
            )
            for task, kept in few
        )

    gates = []
    accurate = [
        above(f"accuracy of the unreduced network, {task}", [n.accuracy for n in networks[task]], LEVEL)
        for task in networks
    ]
    for check, task in zip(accurate, networks, strict=True):
        losses = [n.losses for n in networks[task]]
        gates += [gate(name, check, losses) for name in (BOTH, TOP, ALL)]
    return Findings(
        seeds=seeds,
        parts=(
            Part(names, BOTH, knocked_out=(GROUPS, MOVED), against=(TOP, ALL)),
            Part(differs, BOTH, knocked_out=(GROUPS,), against=(TOP,)),
        ),
        gates=(*gates, *(gate(name, None, None) for name in (GROUPS, MOVED))),
        checks=tuple(
            above(f"{task}, {kept} kept: accuracy, {a} minus {b}", right[task, kept].minus(a, b), 0.0, in_rule=False)
            for task, kept in few
            for a, b in ((BOTH, GROUPS), (BOTH, MOVED), (BOTH, FUSED), (ALL, MOVED), (BOTH, RANDOM))
        ),
        table=[
            row
            for place in right
            for row in (
                *right[place].table(f"accuracy, {place[0]}, {place[1]} kept"),
                *alike[place].table(f"mean cosine, {place[0]}, {place[1]} kept"),
            )
        ],
        figure=partial(_draw, arms=right[CANVASES, FEW[-1]]),
        notes=(
            "The seeds differ in initialisation, in the order of training and, of canvases, in what stands on them.",
            *(
                f"Unreduced on {task} the networks are right in {', '.join(f'{n.accuracy:.3f}' for n in of_task)}."
                for task, of_task in networks.items()
            ),
        ),
    )


def _measured(network: Trained, kind: Any, kept: float) -> Measured:
    at = {block: kind(tokens=reducer.budget.tokens) for block, reducer in bat(PATCHES, kept, blocks=BLOCKS).items()}
    reading = Reading(at[BLOCKS[-1]])
    logits = torch.cat([r.logits for r in runs(network, {**at, BLOCKS[-1]: reading})])
    alike = torch.cat([mean_cosine(left, 1) for _, _, left in reading.seen])
    return Measured(float((logits.argmax(-1) == network.test[1]).double().mean()), float(alike.mean()))


def _draw(figure: Any, arms: Arms) -> None:
    draw_arms(figure.subplots(), arms, "accuracy on canvases, two tenths kept in each of two blocks")
