"""Global average pooling of class maps regularises: with 200 training digits at random places of a larger canvas it
classifies better than a fully connected layer on the same trunk, its train-test gap is smaller, and the map of the named
class is largest on the digit (in more than 80 % of test images).

Refuted if the fully connected layer classifies at least as well on the canvas, if its train-test gap is no larger, or if the
largest value of the named class's map lies on the digit in less than half of the test images.

The trunk: mlpconv 16-16-16, maximum over 2 x 2, mlpconv 32-32 and one more 1 x 1 layer to the class maps. The fully connected
rivals replace that last layer and the mean by a linear layer on all positions of the 32 channels. Also measured, not part of
the rule: digits in the middle (position then carries the class), the rival with dropout, and mlpconv against plain
convolutions with about as many parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cenote.pool import GlobalAveragePool, MLPConv, NetworkInNetwork
from cenote.study.harness import Arms, Findings, Size, above, draw_arms, draw_picture, seeds_of, study
from cenote.study.harness.data import Digits
from cenote.study.harness.training import Together, accuracy, cross_entropy, epochs, fit, steps_of
from cenote.study.harness.window_cnn import SIDE, Build, Canvas, images, on_canvas

TRAIN = 200
BATCH = 50
LEARNING_RATE = 3e-3
EPOCHS: dict[Size, int] = {"smoke": 1, "small": 60, "full": 60}
TEST: dict[Size, int] = {"smoke": 100, "small": 1597, "full": 1597}
CANVAS, LARGE_CANVAS = 14, 24
CLASSES = 10


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


NETS: dict[str, Callable[[int], nn.Module]] = {
    "global average": lambda _side: network(),
    "fully connected": FullyConnected,
    "fully connected, dropout": partial(FullyConnected, dropout=0.5),
    "plain convolutions, global average": lambda _side: PlainConvolutions(),
}


@study
def run(seed: int, size: Size) -> Findings:
    """Train every net on few digits, in the middle and on canvases; look where the maps are largest."""
    seeds = seeds_of(seed, size)
    arms = {side: Arms() for side in (SIDE, CANVAS)}
    gaps = {side: Arms() for side in (SIDE, CANVAS)}
    for side in (SIDE, CANVAS):
        train, test = _split(side, seeds, size)
        for name, net in NETS.items():
            model = _trained(partial(net, side), train, seeds, size)
            arms[side][name] = accuracy(model, test.x, test.y)
            seen = accuracy(model, train.x, train.y)
            gaps[side][name] = tuple(a - b for a, b in zip(seen, arms[side][name], strict=True))
    hits, named, picture = _localised(seeds, size)
    rival, ours = "fully connected", "global average"
    canvas, middle = arms[CANVAS], arms[SIDE]
    return Findings(
        seeds=seeds,
        checks=(
            above("canvas: accuracy, global average minus fully connected", canvas.minus(ours, rival), expected=0.0),
            above(
                "canvas: train-test gap, fully connected minus global average",
                gaps[CANVAS].minus(rival, ours),
                expected=0.0,
            ),
            above("named class's map is largest on the digit", hits["largest value"], expected=0.8, refuted=0.5),
            above(
                "canvas: accuracy, global average minus dropout",
                canvas.minus(ours, f"{rival}, dropout"),
                0.0,
                in_rule=False,
            ),
            above(
                "middle: accuracy, global average minus fully connected",
                middle.minus(ours, rival),
                -0.01,
                in_rule=False,
            ),
            above(
                "middle: train-test gap, fully connected minus global average",
                gaps[SIDE].minus(rival, ours),
                0.0,
                in_rule=False,
            ),
            above(
                "canvas: accuracy, mlpconv minus plain convolutions",
                canvas.minus(ours, "plain convolutions, global average"),
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


def _localised(seeds: tuple[int, ...], size: Size) -> tuple[Arms, Arms, tuple[Tensor, Tensor]]:
    """How often the named class's map is largest on the digit, and a random position's share; accuracy; one picture."""
    train, test = _split(LARGE_CANVAS, seeds, size)
    model = _trained(network, train, seeds, size)
    hits: list[float] = []
    chance: list[float] = []
    for i, net in enumerate(model.modules()):
        with torch.no_grad():
            logits, maps = net.evidence(test.x[i])
        named = maps[torch.arange(len(maps)), logits.argmax(1)]
        scale = LARGE_CANVAS // named.shape[-1]
        largest = named.flatten(1).argmax(1)
        anywhere = torch.randint(named[0].numel(), (len(named),), generator=torch.Generator().manual_seed(seeds[i]))
        for at, shares in ((largest, hits), (anywhere, chance)):
            # the middle of the cell, in pixels
            rows, columns = ((part + 0.5) * scale for part in (at // named.shape[-1], at % named.shape[-1]))
            inside = [(p >= c) & (p < c + SIDE) for p, c in zip((rows, columns), test.place[i].T, strict=True)]
            shares.append(float((inside[0] & inside[1]).double().mean()))
        if i == 0:
            picture = test.x[i, 0, 0], named[0]
    shares_of = Arms({"largest value": tuple(hits), "random position": tuple(chance)})
    return shares_of, Arms({"global average": accuracy(model, test.x, test.y)}), picture


def _draw(
    figure: Any, canvas: Arms, middle: Arms, picture: tuple[Float[Tensor, "h w"], Float[Tensor, "h2 w2"]]
) -> None:
    first, second, third, fourth = figure.subplots(1, 4, width_ratios=(3, 3, 2, 2))
    draw_arms(first, canvas, "accuracy, canvas")
    draw_arms(second, middle, "accuracy, middle")
    second.set_yticklabels([])
    draw_picture(third, picture[0], "one canvas", cmap="gray_r")
    draw_picture(fourth, picture[1], "its class's map", cmap="viridis")
