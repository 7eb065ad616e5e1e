"""Fusing the levels of a small encoder by attention segments digits of two sizes on a striped background at least as well as
their sum, and as a concatenation with as many parameters (less one point of mean intersection over union).

Refuted if attentive fusion is more than a point of mean intersection over union below the concatenation with 3 x 3
convolutions, which has as many parameters, or if it is below the sum.

Also measured, not part of the rule: sharpness of borders (F1 of the borders of the prediction, a pixel of tolerance), and
scale-space rendering: trained on scales 0.5 and 1, evaluated on 0.5, 1 and 2, against the average of the scales, and whether
small digits get more of their weight from the largest scale than large ones.

Knocked out: the gates (both 0.5 everywhere, with all modules and parameters present, so that the maps are averaged).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from cenote.pool import AFAIDAUp, AFASegmenter, BinaryAFA
from cenote.pool.spatial.attentive_feature_aggregation.fusion import Gated
from cenote.study.harness import Arms, Check, Findings, Part, Size, above, draw_arms, gate, seeds_of, study
from cenote.study.harness.data import digits
from cenote.study.harness.training import descend

SEEDS = {"small": 3, "full": 5}
SIDE, CLASSES = 32, 11
CHANNELS = (16, 24, 32)
BATCH, LEARNING_RATE = 16, 4e-3
STEPS: dict[Size, int] = {"smoke": 2, "small": 1200, "full": 3000}
RENDERED: dict[Size, int] = {"smoke": 2, "small": 1200, "full": 3000}
TESTS: dict[Size, int] = {"smoke": 4, "small": 150, "full": 400}
SCALES = (0.5, 1.0, 2.0)
# overlap of an arm that names the digits; of one that knows the background alone it is 0.08
LEARNED = 0.5


class Scenes(NamedTuple):
    """Canvases of one to three digits; labels are 0 to 9 on a digit's strokes and 10 on the background.

    `small` and `large` say where digits of 8 x 8 and of 16 x 16 pixels have their strokes.
    """

    x: Float[Tensor, "items 1 side side"]
    y: Int[Tensor, "items side side"]
    small: Bool[Tensor, "items side side"]
    large: Bool[Tensor, "items side side"]


class Encoder(nn.Module):
    """Three levels at strides 1, 2 and 4."""

    def __init__(self) -> None:
        super().__init__()
        before = (1, *CHANNELS)
        self.levels = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 1 if i == 0 else 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for i, (a, b) in enumerate(zip(before, CHANNELS, strict=False))
        )

    def forward(self, x: Float[Tensor, "batch 1 side side"]) -> list[Tensor]:
        found = []
        for level in self.levels:
            x = level(x)
            found.append(x)
        return found


class Sum(nn.Module):
    """The rival without parameters."""

    def __init__(self, _channels: int) -> None:
        super().__init__()

    def forward(self, shallow: Tensor, deep: Tensor) -> Tensor:
        return shallow + deep


class Concatenation(nn.Module):
    """Both maps side by side, then a convolution back to their channels."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(2 * channels, channels, kernel_size, padding=kernel_size // 2, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        )

    def forward(self, shallow: Tensor, deep: Tensor) -> Tensor:
        return self.conv(torch.cat([shallow, deep], 1))


class HalfOpen(BinaryAFA):
    """Attentive fusion whose gates are all 0.5; the parameters are there and do nothing."""

    def attend(self, shallow: Tensor, deep: Tensor, mask: Tensor | None = None) -> Gated:
        found = super().attend(shallow, deep, mask)
        idle = 0 * (found.spatial.sum() + found.channel.sum())
        return found._replace(output=(shallow + deep) / 4 + idle)


class Segmenter(nn.Module):
    """Encoder, one node that fuses its levels, a classifier per pixel."""

    def __init__(self, fuse: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.node = AFAIDAUp(CHANNELS, (1, 2, 4), fuse=fuse)
        self.classifier = nn.Conv2d(CHANNELS[0], CLASSES, 1)

    def forward(self, x: Float[Tensor, "batch 1 side side"]) -> Float[Tensor, "batch classes side side"]:
        return self.classifier(self.node(self.encoder(x))[-1])


SUM, SAME_SIZE, ATTENTIVE, OPEN = "sum", "concatenation, 3 x 3", "attentive", "attentive, gates of 0.5"
FUSIONS: dict[str, Callable[[int], nn.Module]] = {
    SUM: Sum,
    "concatenation, 1 x 1": partial(Concatenation, kernel_size=1),
    SAME_SIZE: partial(Concatenation, kernel_size=3),
    ATTENTIVE: BinaryAFA,
    OPEN: HalfOpen,
}


@study
def run(seed: int, size: Size) -> Findings:
    """Train the fusions on the same canvases; then train and evaluate scale-space rendering."""
    seeds = seeds_of(seed, size, **SEEDS)
    overlap, borders, losses = Arms(), Arms(), {}
    for name, fuse in FUSIONS.items():
        found = [_fused(fuse, s, size) for s in seeds]
        overlap[name], borders[name] = tuple(f.overlap for f in found), tuple(f.borders for f in found)
        losses[name] = [f.losses for f in found]
    scales, weights = Arms(), Arms()
    rendered = [_rendered(s, size) for s in seeds]
    for name in rendered[0][0]:
        scales[name] = tuple(r[0][name] for r in rendered)
    for name in rendered[0][1]:
        weights[name] = tuple(r[1][name] for r in rendered)

    def rule(arm: str) -> tuple[Check, ...]:
        return (
            above(
                f"overlap, {arm} minus concatenation with as many parameters",
                overlap.minus(arm, SAME_SIZE),
                expected=-0.01,
            ),
            above(f"overlap, {arm} minus sum", overlap.minus(arm, SUM), expected=0.0),
        )

    return Findings(
        seeds=seeds,
        parts=(Part(rule, ATTENTIVE, knocked_out=(OPEN,), against=(SAME_SIZE, SUM)),),
        gates=(
            *(
                gate(name, above("mean intersection over union", overlap[name], LEARNED), losses[name])
                for name in (ATTENTIVE, SAME_SIZE, SUM)
            ),
            gate(OPEN, None, losses[OPEN]),
        ),
        checks=(
            above(
                "F1 of borders, attentive minus concatenation with as many parameters",
                borders.minus(ATTENTIVE, SAME_SIZE),
                expected=0.0,
                in_rule=False,
            ),
            above(
                "overlap, scale-space rendering minus average of the scales",
                scales.minus("rendered", "average"),
                expected=0.0,
                in_rule=False,
            ),
            above(
                "share of the largest scale, on small digits minus on large ones",
                weights.minus("small digits", "large digits"),
                expected=0.0,
                in_rule=False,
            ),
        ),
        table=[
            *overlap.table(
                "mean intersection over union",
                parameters={n: sum(p.numel() for p in Segmenter(f).parameters()) for n, f in FUSIONS.items()},
            ),
            *borders.table("F1 of borders"),
            *scales.table("mean intersection over union, three scales"),
            *weights.table("share of the weight that the largest scale gets"),
        ],
        figure=partial(_draw, overlap=overlap, scales=scales),
        notes=(
            f"One to three digits of 8 x 8 or 16 x 16 pixels on {SIDE} x {SIDE} canvases with stripes and noise; fresh ones at "
            f"every step, batches of {BATCH}, {STEPS[size]} steps ({RENDERED[size]} with rendering). Mean over 10 digits and "
            "the background.",
            "The claims of the paper are on Cityscapes and BDD100K with large backbones.",
        ),
    )


def scenes(items: int, split: str, generator: torch.Generator) -> Scenes:
    """Fresh canvases with digits of that split.

    >>> found = scenes(2, "test", torch.Generator().manual_seed(0))
    >>> found.x.shape, bool((found.y[found.small | found.large] < 10).all())
    (torch.Size([2, 1, 32, 32]), True)
    """
    source = digits(split)
    rows = torch.arange(SIDE)
    phase = 6.28 * torch.rand(items, 1, 1, generator=generator)
    direction = torch.rand(items, 2, 1, 1, generator=generator) * 2 - 1
    stripes = torch.sin(phase + direction[:, 0] * rows.unsqueeze(1) + direction[:, 1] * rows)
    x = 0.25 + 0.15 * stripes + 0.1 * torch.randn(items, SIDE, SIDE, generator=generator)
    y = torch.full((items, SIDE, SIDE), CLASSES - 1)
    where = {1: torch.zeros_like(y, dtype=torch.bool), 2: torch.zeros_like(y, dtype=torch.bool)}
    counts = torch.randint(1, 4, (items,), generator=generator).tolist()
    for i in range(items):
        for _ in range(counts[i]):
            which, scale = int(torch.randint(len(source.y), (), generator=generator)), 1
            scale += int(torch.randint(2, (), generator=generator))
            side = 8 * scale
            top, left = torch.randint(SIDE - side + 1, (2,), generator=generator).tolist()
            digit = source.x[which].view(8, 8).repeat_interleave(scale, 0).repeat_interleave(scale, 1)
            at = (i, slice(top, top + side), slice(left, left + side))
            stroke = digit > 0.3
            x[at] = torch.where(stroke, digit, x[at])
            y[at] = y[at].masked_fill(stroke, int(source.y[which]))
            for s, mask in where.items():
                mask[at] = mask[at] & ~stroke | (stroke if s == scale else torch.zeros_like(stroke))
    return Scenes(x.unsqueeze(1), y, where[1], where[2])


class _Fused(NamedTuple):
    """Overlap and F1 of borders of a trained fusion, and its losses step by step."""

    overlap: float
    borders: float
    losses: list[float]


def _trained(model: nn.Module, loss: Callable[[Scenes], Tensor], seed: int, steps: int) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    losses = (loss(scenes(BATCH, "train", generator)) for _ in range(steps))
    curve = descend(model.parameters(), losses, steps, LEARNING_RATE)
    model.eval()
    return curve


def _fused(fuse: Callable[[int], nn.Module], seed: int, size: Size) -> _Fused:
    torch.manual_seed(seed)
    model = Segmenter(fuse)
    # the background is most of a canvas
    weight = torch.tensor([3.0] * (CLASSES - 1) + [1.0])
    curve = _trained(model, lambda s: F.cross_entropy(model(s.x), s.y, weight), seed, STEPS[size])
    test = scenes(TESTS[size], "test", torch.Generator().manual_seed(seed + 1000))
    with torch.no_grad():
        guess = model(test.x).argmax(1)
    return _Fused(intersection_over_union(guess, test.y), border_f1(guess, test.y), curve)


def _rendered(seed: int, size: Size) -> tuple[dict[str, float], dict[str, float]]:
    """Overlap of rendering, average and each scale; share of the largest scale by the size of the digit."""
    torch.manual_seed(seed)
    model = AFASegmenter(Encoder(), CHANNELS, CLASSES)
    _trained(model, lambda s: model.loss(model.at_scales(s.x), s.y), seed, RENDERED[size])
    test = scenes(TESTS[size], "test", torch.Generator().manual_seed(seed + 1000))
    with torch.no_grad():
        found = model.at_scales(test.x, SCALES)
    maps = {"rendered": found.output, "average": found.by_scale.mean(1)}
    maps |= {f"scale {s:g}": found.by_scale[:, i] for i, s in enumerate(SCALES)}
    overlap = {name: intersection_over_union(p.argmax(1), test.y) for name, p in maps.items()}
    share = found.weights[:, -1] / found.weights.sum(1).clamp(min=1e-8)
    masks = {"small digits": test.small, "large digits": test.large}
    return overlap, {name: float(share[mask].mean()) for name, mask in masks.items()}


def intersection_over_union(
    guess: Int[Tensor, "items height width"], truth: Int[Tensor, "items height width"]
) -> float:
    """Mean over the classes that occur.

    >>> intersection_over_union(torch.tensor([[[0, 1]]]), torch.tensor([[[0, 0]]]))
    0.25
    """
    shares = []
    for c in range(CLASSES):
        both, either = ((guess == c) & (truth == c)).sum(), ((guess == c) | (truth == c)).sum()
        if either > 0:
            shares.append(float(both / either))
    return sum(shares) / len(shares)


def border_f1(guess: Int[Tensor, "items height width"], truth: Int[Tensor, "items height width"]) -> float:
    """Harmonic mean of the shares of borders that have a border of the other map within a pixel.

    >>> border_f1(torch.eye(4).long().unsqueeze(0), torch.eye(4).long().unsqueeze(0))
    1.0
    """
    ours, theirs = _borders(guess), _borders(truth)
    near = [F.max_pool2d(b.float().unsqueeze(1), 3, 1, 1).squeeze(1) > 0 for b in (ours, theirs)]
    precision = float((ours & near[1]).sum() / ours.sum().clamp(min=1))
    recall = float((theirs & near[0]).sum() / theirs.sum().clamp(min=1))
    return 2 * precision * recall / max(precision + recall, 1e-12)


def _borders(labels: Int[Tensor, "items side side"]) -> Bool[Tensor, "items side side"]:
    borders = torch.zeros_like(labels, dtype=torch.bool)
    borders[:, 1:] |= labels.diff(dim=1) != 0
    borders[:, :, 1:] |= labels.diff(dim=2) != 0
    return borders


def _draw(figure: Any, overlap: Arms, scales: Arms) -> None:
    left, right = figure.subplots(1, 2)
    draw_arms(left, overlap, "mean intersection over union")
    draw_arms(right, scales, "mean intersection over union, scales fused")
