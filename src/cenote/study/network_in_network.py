"""Global average pooling of class maps regularises: with 200 training digits at random places of a larger canvas it
classifies better than a fully connected layer on the same trunk, its train-test gap is smaller, and the map of the named
class is largest on the digit (in more than 80 % of test images).

Refuted if the fully connected layer classifies at least as well on the canvas, if its train-test gap is no larger, or if the
largest value of the named class's map lies on the digit in less than half of the test images.

The trunk: mlpconv 16-16-16, maximum over 2 x 2, mlpconv 32-32 and one more 1 x 1 layer to the class maps. The fully connected
rivals replace that last layer and the mean by a linear layer on all positions of the 32 channels. Also measured, not part of
the rule: digits in the middle (position then carries the class), the rival with dropout, and mlpconv against plain
convolutions with about as many parameters.

Knocked out: that all positions count alike (each class map is summed with weights of its own for every position, learned from
a random start; what then counts as its map is what it adds to the logit).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cenote.pool import GlobalAveragePool, MLPConv, NetworkInNetwork
from cenote.pool.spatial.network_in_network import Evidence
from cenote.study.harness import (
    Arms,
    Check,
    Findings,
    Part,
    Size,
    above,
    draw_arms,
    draw_picture,
    gate,
    seeds_of,
    study,
)
from cenote.study.harness.data import Digits
from cenote.study.harness.training import Together, accuracy, cross_entropy, epochs, fit, steps_of
from cenote.study.harness.window_cnn import SIDE, Build, Canvas, images, on_canvas

TRAIN = 200
BATCH = 50
LEARNING_RATE = 3e-3
EPOCHS: dict[Size, int] = {"smoke": 1, "small": 120, "full": 120}
TEST: dict[Size, int] = {"smoke": 100, "small": 1597, "full": 1597}
CANVAS, LARGE_CANVAS = 14, 24
CLASSES = 10
CHANCE = 0.11


class FullyConnected(nn.Sequential):
    """The trunk without class maps, and a linear layer on all of its positions."""

    def __init__(self, side: int, dropout: float = 0.0) -> None:
        super().__init__(
            MLPConv(1, (16, 16, 16), padding=1),
            nn.MaxPool2d(2),
            MLPConv(16, (32, 32), padding=1),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(32 * (side // 2) ** 2, CLASSES),
        )


class PlainConvolutions(nn.Sequential):
    """About as many parameters as the net with mlpconv, in 3 x 3 convolutions."""

    def __init__(self) -> None:
        super().__init__(
            MLPConv(1, (26,), padding=1),
            nn.MaxPool2d(2),
            MLPConv(26, (26,), padding=1),
            nn.Conv2d(26, CLASSES, 1),
            GlobalAveragePool(),
        )


def network() -> NetworkInNetwork:
    """The net under study: class maps and their mean."""
    pools = [partial(nn.MaxPool2d, 2)]
    return NetworkInNetwork(1, CLASSES, ((16, 16, 16), (32, 32)), (3, 3), pools, dropout=0.0)


class WeightsPerPlace(NetworkInNetwork):
    """The net with a learned weight for every class and position in place of the mean."""

    def __init__(self, side: int) -> None:
        super().__init__(1, CLASSES, ((16, 16, 16), (32, 32)), (3, 3), [partial(nn.MaxPool2d, 2)], dropout=0.0)
        reach = 2 / side
        self.places = nn.Parameter(torch.empty(CLASSES, side // 2, side // 2).uniform_(-reach, reach))

    def evidence(self, x: Float[Tensor, "batch channels height width"]) -> Evidence:
        """Logits, and what each position adds to them."""
        maps = self.places * self.trunk(x)
        return Evidence(maps.sum((2, 3)), maps)


OURS, RIVAL, PLACES = "global average", "fully connected", "weights per place"
NETS: dict[str, Callable[[int], nn.Module]] = {
    OURS: lambda _side: network(),
    RIVAL: FullyConnected,
    PLACES: WeightsPerPlace,
    "fully connected, dropout": partial(FullyConnected, dropout=0.5),
    "plain convolutions, global average": lambda _side: PlainConvolutions(),
}


@study
def run(seed: int, size: Size) -> Findings:
    """Train every net on few digits, in the middle and on canvases; look where the maps are largest."""
    seeds = seeds_of(seed, size)
    arms = {side: Arms() for side in (SIDE, CANVAS)}
    gaps = {side: Arms() for side in (SIDE, CANVAS)}
    losses: dict[str, list[float]] = {}
    for side in (SIDE, CANVAS):
        train, test = _split(side, seeds, size)
        for name, net in NETS.items():
            model = _trained(partial(net, side), train, seeds, size)
            arms[side][name] = accuracy(model, test.x, test.y)
            if side == CANVAS:
                losses[name] = model.losses
            seen = accuracy(model, train.x, train.y)
            gaps[side][name] = tuple(a - b for a, b in zip(seen, arms[side][name], strict=True))
    hits, named, large_losses, picture = _localised(seeds, size)
    canvas, middle = arms[CANVAS], arms[SIDE]

    def rule(arm: str) -> tuple[Check, ...]:
        return (
            above(f"canvas: accuracy, {arm} minus fully connected", canvas.minus(arm, RIVAL), expected=0.0),
            above(f"canvas: train-test gap, fully connected minus {arm}", gaps[CANVAS].minus(RIVAL, arm), expected=0.0),
            above(f"named class's map is largest on the digit, {arm}", hits[arm], expected=0.8, refuted=0.5),
        )

    return Findings(
        seeds=seeds,
        parts=(Part(rule, OURS, knocked_out=(PLACES,), against=(RIVAL,)),),
        gates=(
            *(gate(arm, above("canvas: accuracy", canvas[arm], CHANCE), losses[arm]) for arm in (OURS, RIVAL, PLACES)),
            *(
                gate(arm, above("large canvas: accuracy", named[arm], CHANCE), large_losses[arm])
                for arm in (OURS, PLACES)
            ),
        ),
        checks=(
            above(
                "canvas: accuracy, global average minus dropout",
                canvas.minus(OURS, f"{RIVAL}, dropout"),
                0.0,
                in_rule=False,
            ),
            above(
                "middle: accuracy, global average minus fully connected",
                middle.minus(OURS, RIVAL),
                -0.01,
                in_rule=False,
            ),
            above(
                "middle: train-test gap, fully connected minus global average",
                gaps[SIDE].minus(RIVAL, OURS),
                0.0,
                in_rule=False,
            ),
            above(
                "canvas: accuracy, mlpconv minus plain convolutions",
                canvas.minus(OURS, "plain convolutions, global average"),
                expected=-0.01,
                in_rule=False,
            ),
        ),
        table=[
            *canvas.table("accuracy, canvas", parameters=_sizes(CANVAS)),
            *gaps[CANVAS].table("train-test gap, canvas"),
            *middle.table("accuracy, middle", parameters=_sizes(SIDE)),
            *gaps[SIDE].table("train-test gap, middle"),
            *hits.table(f"share of {LARGE_CANVAS} x {LARGE_CANVAS} canvases on the digit"),
            *named.table(f"accuracy, {LARGE_CANVAS} x {LARGE_CANVAS} canvas"),
        ],
        figure=partial(_draw, canvas=canvas, middle=middle, picture=picture),
        notes=(
            f"{TRAIN} training digits, each drawn at one place; all others for testing. Accuracy on canvases of "
            f"{CANVAS} x {CANVAS}; the place of the largest value on {LARGE_CANVAS} x {LARGE_CANVAS}, a digit covers 11 %.",
            "No ReLU stands before the mean, and no dropout between the blocks, so that arms differ in their head alone.",
        ),
    )


def _split(side: int, seeds: tuple[int, ...], size: Size) -> tuple[Canvas, Canvas]:
    train, test = images(TRAIN)
    test = Digits(test.x[: TEST[size]], test.y[: TEST[size]])
    return on_canvas(train, side, seeds), on_canvas(test, side, tuple(s + 1000 for s in seeds))


def _trained(net: Build, train: Canvas, seeds: tuple[int, ...], size: Size) -> Together:
    model = Together(net, seeds)
    steps = steps_of(TRAIN, BATCH, EPOCHS[size])
    fit(model, epochs(train.x, train.y, BATCH, seeds), cross_entropy, steps, LEARNING_RATE)
    return model


def _sizes(side: int) -> dict[str, int]:
    return {name: sum(p.numel() for p in net(side).parameters()) for name, net in NETS.items()}


def _localised(seeds: tuple[int, ...], size: Size) -> tuple[Arms, Arms, dict[str, list[float]], tuple[Tensor, Tensor]]:
    """How often the named class's map is largest on the digit, and a random position's share; accuracy, losses; one picture."""
    train, test = _split(LARGE_CANVAS, seeds, size)
    hits, named, losses = Arms(), Arms(), {}
    for arm in (PLACES, OURS):
        model = _trained(partial(NETS[arm], LARGE_CANVAS), train, seeds, size)
        named[arm], losses[arm] = accuracy(model, test.x, test.y), model.losses
        maps = [_named_maps(net, x) for net, x in zip(model.modules(), test.x, strict=True)]
        hits[arm] = tuple(_on_digit(m.flatten(1).argmax(1), m, p) for m, p in zip(maps, test.place, strict=True))
    chance = []
    for m, place, s in zip(maps, test.place, seeds, strict=True):
        anywhere = torch.randint(m[0].numel(), (len(m),), generator=torch.Generator().manual_seed(s))
        chance.append(_on_digit(anywhere, m, place))
    hits["random position"] = tuple(chance)
    return hits, named, losses, (test.x[0, 0, 0], maps[0][0])


@torch.no_grad()
def _named_maps(net: NetworkInNetwork, x: Float[Tensor, "items 1 side side"]) -> Float[Tensor, "items cells cells"]:
    logits, maps = net.evidence(x)
    return maps[torch.arange(len(maps)), logits.argmax(1)]


def _on_digit(
    at: Int[Tensor, "items"], maps: Float[Tensor, "items cells cells"], place: Int[Tensor, "items 2"]
) -> float:
    """Share of the maps whose cell `at` has its middle on the digit."""
    cells = maps.shape[-1]
    # in pixels
    rows, columns = ((part + 0.5) * (LARGE_CANVAS // cells) for part in (at // cells, at % cells))
    inside = [(p >= c) & (p < c + SIDE) for p, c in zip((rows, columns), place.T, strict=True)]
    return float((inside[0] & inside[1]).double().mean())


def _draw(
    figure: Any, canvas: Arms, middle: Arms, picture: tuple[Float[Tensor, "h w"], Float[Tensor, "h2 w2"]]
) -> None:
    first, second, third, fourth = figure.subplots(1, 4, width_ratios=(3, 3, 2, 2))
    draw_arms(first, canvas, "accuracy, canvas")
    draw_arms(second, middle, "accuracy, middle")
    second.set_yticklabels([])
    draw_picture(third, picture[0], "one canvas", cmap="gray_r")
    draw_picture(fourth, picture[1], "its class's map", cmap="viridis")
