"""A gate per window can learn what no mixture can: where half of the windows want their maximum and half their mean, as the
sign of the left column minus the right says, gated pooling comes more than 5 times closer than the best mixture there is. And
in a small convolutional net on digits a learned mixture classifies better than the mean, and gated and tree pooling at least
as well as the mixture (less one point).

Refuted if the best mixture's error is at most 5 times that of the gate, if mixed pooling classifies no better than the mean,
or if gated or tree pooling is more than a point below mixed.

The best mixture is not trained: its blend is the closed form optimum on the very windows that it is judged on. Also measured,
not part of the rule: "tree, then gated" (the authors' best net), every learned pooling against the maximum, and accuracy on
test digits that are shifted by a pixel or rotated by up to 20 degrees.

Knocked out: what the gate reads (each window is given the gate of a random window of the same map, in training and test), that
the mixture is learned (one half, frozen), and that the leaves of the tree differ (both are one filter).
"""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cenote.pool import GatedPool2d, MixedPool2d, TreePool2d
from cenote.study.harness import Arms, Check, Findings, Part, Size, above, draw_arms, gate, seeds_of, study
from cenote.study.harness.training import Together, accuracy, constant, fit
from cenote.study.harness.window_cnn import Build, images, over_seeds, trained_cnn

MAPS, MAP_SIDE = 64, 8
STEPS: dict[Size, int] = {"smoke": 20, "small": 400, "full": 400}
ANGLES = (0, 10, 20)
SEEDS = {"small": 10, "full": 20}
CHANCE = 0.11


class Astray(GatedPool2d):
    """A gate that opens for other windows than it reads."""

    def _gates(self, x: Float[Tensor, "batch channels *map"]) -> Float[Tensor, "batch channels *windows"]:
        gates = super()._gates(x)
        flat = gates.flatten(2)
        return flat.gather(2, torch.rand_like(flat).argsort(2)).view_as(gates)


class OneLeaf(TreePool2d):
    """A tree whose leaves are all the first one: a convolution over each window."""

    def pool(self, x: Float[Tensor, "batch channels *map"]) -> Float[Tensor, "batch channels *windows"]:
        return self.windows.filtered(x, self.leaves[:1].to(x.dtype))[0]


class Half(MixedPool2d):
    """A mixture of halves that is not learned."""

    def __init__(self, kernel_size: int) -> None:
        super().__init__(kernel_size)
        self.a.requires_grad_(False)


ASTRAY, ONE_LEAF, HALF, BEST = "gated, by other windows", "tree, one leaf", "mixed, halves frozen", "best mixture"
POOLS: dict[str, tuple[Build, Build]] = {
    "mean": (partial(nn.AvgPool2d, 2), partial(nn.AvgPool2d, 2)),
    "max": (partial(nn.MaxPool2d, 2), partial(nn.MaxPool2d, 2)),
    "mixed": (partial(MixedPool2d, 2), partial(MixedPool2d, 2)),
    "gated": (partial(GatedPool2d, 2), partial(GatedPool2d, 2)),
    "tree": (partial(TreePool2d, 2), partial(TreePool2d, 2)),
    "tree, then gated": (partial(TreePool2d, 2), partial(GatedPool2d, 2)),
    ASTRAY: (partial(Astray, 2), partial(Astray, 2)),
    ONE_LEAF: (partial(OneLeaf, 2), partial(OneLeaf, 2)),
    HALF: (partial(Half, 2), partial(Half, 2)),
}
LEARNED = ("mixed", "gated", "tree", "tree, then gated")


@study
def run(seed: int, size: Size) -> Findings:
    """Fit a gate to a target that only a gate can follow; compare poolings in a small net."""
    seeds = seeds_of(seed, size, **SEEDS)
    errors, fitted = _errors(seeds, size)
    test = over_seeds(images()[1], seeds)
    arms, moved, losses = Arms(), {}, {}
    for name, (first, second) in POOLS.items():
        model = trained_cnn(first, second, seeds, size)
        arms[name], losses[name] = accuracy(model, test.x, test.y), model.losses
        if name not in (ASTRAY, ONE_LEAF, HALF):
            moved[name] = _on_moved(model, seeds)

    def rule_of_the_gate(arm: str) -> tuple[Check, ...]:
        ratio = tuple(m / g for m, g in zip(errors[BEST], errors[arm], strict=True))
        return (above(f"error of the best mixture over that of {arm}", ratio, expected=5.0),)

    def rule_of_the_mixture(arm: str) -> tuple[Check, ...]:
        return (above(f"digits: accuracy, {arm} minus mean", arms.minus(arm, "mean"), expected=0.0),)

    def rule_of_the_others(arm: str) -> tuple[Check, ...]:
        return (above(f"digits: accuracy, {arm} minus mixed", arms.minus(arm, "mixed"), expected=-0.01),)

    def nearer(arm: str) -> Check:
        return above("squared error of the mean minus its own", errors.minus("mean", arm), expected=0.0)

    return Findings(
        seeds=seeds,
        parts=(
            Part(rule_of_the_gate, "gated", knocked_out=(ASTRAY,), against=(BEST,)),
            Part(rule_of_the_mixture, "mixed", knocked_out=(HALF,), against=("mean",)),
            Part(rule_of_the_others, "gated", knocked_out=(ASTRAY,), against=("mixed",)),
            Part(rule_of_the_others, "tree", knocked_out=(ONE_LEAF,), against=("mixed",)),
        ),
        gates=(
            gate("gated", nearer("gated"), fitted["gated"]),
            gate(ASTRAY, nearer(ASTRAY), fitted[ASTRAY]),
            gate(BEST, nearer(BEST), None),
            *(
                gate(arm, above("digits: accuracy", arms[arm], CHANCE), losses[arm])
                for arm in ("mean", "mixed", "gated", "tree", ASTRAY, ONE_LEAF, HALF)
            ),
        ),
        checks=(
            above(
                "digits: accuracy, tree, then gated minus mixed",
                arms.minus("tree, then gated", "mixed"),
                expected=-0.01,
                in_rule=False,
            ),
            *(
                above(f"digits: accuracy, {name} minus max", arms.minus(name, "max"), expected=0.0, in_rule=False)
                for name in LEARNED
            ),
        ),
        table=[
            *errors.table("mean squared error against the target"),
            *arms.table("accuracy, 1,197 test digits"),
            *(
                row
                for how in moved["mean"]
                for row in Arms({n: m[how] for n, m in moved.items()}).table(f"accuracy, {how}")
            ),
        ],
        figure=partial(_draw, errors=errors, arms=arms, moved=moved),
        notes=(
            "Margins of less than a point of accuracy cannot be seen on 1,197 digits and this many seeds.",
            "That everything learned beats the maximum, as on the paper's larger images, was not expected here and is reported "
            "outside the rule.",
            "All parameters have the learning rate of the net (3e-3 falling to 0), 225 steps: gates and blends move little.",
        ),
        tried=(
            "The gate was fitted in a unit test of the package (maps of standard deviation 2, 300 steps) before this study; "
            "here maps have standard deviation 1.",
            "In the first run of this study gated and tree pooling against mixed stood outside the rule; tree pooling was 5 "
            "points below mixed, and the rule was made stricter for it.",
            "Five seeds left tree against mixed open (-0.0498, -0.0899 to -0.0097). They were made ten, once; nothing else was "
            "changed.",
        ),
    )


def _errors(seeds: tuple[int, ...], size: Size) -> tuple[Arms, dict[str, list[float]]]:
    """Mean squared errors on maps that were not trained on, and the losses in training."""
    x, y = _teacher(seeds)
    fresh_x, fresh_y = _teacher(tuple(s + 1000 for s in seeds))
    pools: dict[str, Build] = {
        "gated": partial(GatedPool2d, 2),
        "tree": partial(TreePool2d, 2),
        "mixed": partial(MixedPool2d, 2),
        ASTRAY: partial(Astray, 2),
    }
    errors, losses = Arms(), {}
    for name, pool in pools.items():
        model = Together(pool, seeds)
        losses[name] = fit(
            model, itertools.repeat((x, y)), F.mse_loss, STEPS[size], 0.1, optimiser=torch.optim.Adam, decay=constant
        )
        with torch.no_grad():
            errors[name] = _per_seed(model(fresh_x) - fresh_y)
    largest, mean = _both(fresh_x)
    gap = largest - mean
    share = (gap * (fresh_y - mean)).sum((1, 2, 3, 4), keepdim=True) / gap.square().sum((1, 2, 3, 4), keepdim=True)
    errors[BEST] = _per_seed(mean + share * gap - fresh_y)
    errors["mean"] = _per_seed(mean - fresh_y)
    return errors, losses


def _per_seed(difference: Tensor) -> tuple[float, ...]:
    return tuple(difference.square().flatten(1).mean(1).tolist())


def _teacher(seeds: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Maps, and the maximum of each 2 x 2 window whose left column outweighs its right, the mean of each other."""
    drawn = [torch.randn(MAPS, 1, MAP_SIDE, MAP_SIDE, generator=torch.Generator().manual_seed(s)) for s in seeds]
    x = torch.stack(drawn)
    columns = x[..., ::2, :] + x[..., 1::2, :]
    largest, mean = _both(x)
    return x, torch.where(columns[..., ::2] > columns[..., 1::2], largest, mean)


def _both(x: Float[Tensor, "seeds maps 1 side side"]) -> tuple[Tensor, Tensor]:
    flat = x.flatten(0, 1)
    return tuple(p(flat, 2).unflatten(0, x.shape[:2]) for p in (F.max_pool2d, F.avg_pool2d))


def _on_moved(model: Together, seeds: tuple[int, ...]) -> dict[str, tuple[float, ...]]:
    """Accuracy on test digits that are shifted to a side or rotated either way, the mean over the directions."""
    x, y = images()[1]
    ways: dict[str, list[Tensor]] = {
        "shifted by 1 pixel": [_warped(x, 0, *step) for step in ((1, 0), (-1, 0), (0, 1), (0, -1))],
        **{f"rotated by {a} degrees": [_warped(x, s * a) for s in (1, -1)] for a in ANGLES[1:]},
    }
    out = {}
    for way, versions in ways.items():
        each = [accuracy(model, v.expand(len(seeds), *v.shape), y.expand(len(seeds), -1)) for v in versions]
        out[way] = tuple(sum(a) / len(a) for a in zip(*each, strict=True))
    return out


def _warped(x: Float[Tensor, "items 1 8 8"], degrees: float, right: int = 0, down: int = 0) -> Tensor:
    angle, side = math.radians(degrees), x.shape[-1]
    rows = [
        [math.cos(angle), -math.sin(angle), -2 * right / side],
        [math.sin(angle), math.cos(angle), -2 * down / side],
    ]
    grid = F.affine_grid(torch.tensor([rows]).expand(len(x), -1, -1), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def _draw(figure: Any, errors: Arms, arms: Arms, moved: dict[str, dict[str, tuple[float, ...]]]) -> None:
    first, second, third = figure.subplots(1, 3)
    draw_arms(first, errors, "squared error, target of a gate")
    draw_arms(second, arms, "accuracy on digits")
    for name in moved:
        rotated = [sum(moved[name][f"rotated by {a} degrees"]) / len(arms[name]) for a in ANGLES[1:]]
        third.plot(ANGLES, [sum(arms[name]) / len(arms[name]), *rotated], marker="o", markersize=3, label=name)
    third.set_xlabel("rotation, degrees")
    third.set_ylabel("accuracy")
    third.legend(fontsize=7, frameon=False)
    third.spines[["top", "right"]].set_visible(False)
