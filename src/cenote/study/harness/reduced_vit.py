"""Small vision transformers on digits, alone and on canvases, run with fewer tokens behind the attention of some blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from cenote.reduce import ReducibleViT, reconstruction_loss, train_reduced
from cenote.reduce.reducible_vit.model import VisionRun
from cenote.study.harness.data import Digits, digits
from cenote.study.harness.verdict import Size

PATCHES = 64
WIDTH, DEPTH, HEADS = 32, 4, 4
BATCH = 64
RATE, WARM_UP = 3e-3, 1
PLACES = 0.5
TUNED = 1200
SHIFTS: dict[Size, int] = {"smoke": 1, "small": 10, "full": 20}
EPOCHS: dict[Size, int] = {"smoke": 1, "small": 6, "full": 6}
CANVAS_EPOCHS: dict[Size, int] = {"smoke": 1, "small": 3, "full": 4}
DRAWS: dict[Size, int] = {"smoke": 1, "small": 12, "full": 16}
KEPT: dict[Size, int] = {"smoke": 24, "small": 10_000, "full": 10_000}
CANVAS, CELL, ENLARGED, STEP = 32, 4, 16, 8
CONTRAST = 0.6

Images = tuple[Float[Tensor, "items 1 height width"], Int[Tensor, "items"]]


class Trained(NamedTuple):
    """A network of one seed with its images: training and test, the losses of its training, and its accuracy unreduced."""

    vit: ReducibleViT
    train: Images
    test: Images
    losses: list[float]
    accuracy: float


def on_digits(seed: int, size: Size, *, patch: int) -> Trained:
    """A network that names digits of 8 x 8 pixels, trained on shifted ones; with a `patch` of 1 each pixel is a token."""
    generator = torch.Generator().manual_seed(seed)
    train, test = digits("train"), digits("test")
    shifted = shifts(train.x.view(-1, 1, 8, 8).repeat(SHIFTS[size], 1, 1, 1), generator)
    images = (shifted[: KEPT[size]], train.y.repeat(SHIFTS[size])[: KEPT[size]])
    tested = (test.x.view(-1, 1, 8, 8)[: KEPT[size]], test.y[: KEPT[size]])
    return _trained(seed, EPOCHS[size], images, tested, classes=10, image=8, patch=patch)


def shifts(images: Float[Tensor, "items 1 8 8"], generator: torch.Generator) -> Float[Tensor, "items 1 8 8"]:
    """Each moved by up to one pixel in either direction; what comes in is empty."""
    wider = F.pad(images, (1, 1, 1, 1))
    by = torch.randint(3, (len(images), 2), generator=generator)
    at = torch.arange(8)
    rows, columns = by[:, :1] + at, by[:, 1:] + at
    return wider[torch.arange(len(images))[:, None, None], 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)


def on_canvases(seed: int, size: Size, *, backgrounds: bool = False) -> Trained:
    """A network that names the digit on a canvas; with `backgrounds` also which way the stripes run, of 20 classes then."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for source, draws in ((digits("train"), DRAWS[size]), (digits("test"), 1)):
        x, y, stripes = canvases(source, draws, generator)
        made.append((x[: KEPT[size]], (y + 10 * stripes if backgrounds else y)[: KEPT[size]]))
    return _trained(seed, CANVAS_EPOCHS[size], *made, classes=20 if backgrounds else 10, image=CANVAS, patch=CELL)


def canvases(
    source: Digits, draws: int, generator: torch.Generator
) -> tuple[Float[Tensor, "items 1 32 32"], Int[Tensor, "items"], Int[Tensor, "items"]]:
    """Digits of 16 x 16 pixels at random places of a grid of cells, on a ground that is half plain and half striped; their
    classes; and which way the stripes run.

    >>> x, y, stripes = canvases(digits("test"), 1, torch.Generator().manual_seed(0))
    >>> x.shape, sorted(stripes.unique().tolist())
    (torch.Size([597, 1, 32, 32]), [0, 1])
    """
    items = len(source.y) * draws
    digit = F.interpolate(source.x.view(-1, 1, 8, 8), scale_factor=2.0).repeat(draws, 1, 1, 1)
    places = torch.randint((CANVAS - ENLARGED) // STEP + 1, (items, 2), generator=generator) * STEP
    stripes = torch.randint(2, (items,), generator=generator)
    wave = 2 + 2 * torch.rand(items, 1, 1, generator=generator)
    phase = 6.3 * torch.rand(items, 1, 1, generator=generator)
    at = torch.arange(CANVAS, dtype=torch.float32)
    across, down = at.view(1, 1, -1).expand(items, CANVAS, -1), at.view(1, -1, 1).expand(items, -1, CANVAS)
    along = torch.where(stripes.view(-1, 1, 1) == 1, across + down, across - down)
    ground = CONTRAST * (0.5 + 0.5 * (along / wave + phase).sin())
    # one of the four halves is striped
    half = torch.randint(4, (items, 1, 1), generator=generator)
    line = torch.where(half < 2, across, down)
    ground = torch.where((line < CANVAS // 2) == (half % 2 == 0), ground, 0.0)
    x, inside = ground.unsqueeze(1), torch.arange(ENLARGED)
    rows, columns = places[:, :1] + inside, places[:, 1:] + inside
    x[torch.arange(items)[:, None, None], 0, rows[:, :, None], columns[:, None, :]] = digit[:, 0]
    return x, source.y.repeat(draws), stripes


@torch.no_grad()
def runs(
    trained: Trained, at: Mapping[int, Any], images: Images | None = None, *, proportional: bool = True
) -> list[VisionRun]:
    """The network on its test images, or others, so many at a time."""
    x, _ = trained.test if images is None else images
    return [trained.vit.run(part, at, proportional=proportional) for part in x.split(256)]


def accuracy_with(trained: Trained, at: Mapping[int, Any]) -> float:
    """Of the test images with reducers in some blocks."""
    logits = torch.cat([run.logits for run in runs(trained, at)])
    return float((logits.argmax(-1) == trained.test[1]).double().mean())


def fine_tuned(trained: Trained, at: Mapping[int, Any], epochs: int, rate: float, seed: int) -> Trained:
    """A copy of the network, trained on with reducers in some blocks."""
    state = {name: value.clone() for name, value in trained.vit.state_dict().items()}
    vit = _vit(trained.vit.head.out_features, *_form(trained))
    vit.load_state_dict(state)
    x, y = (part[:TUNED] for part in trained.train)
    losses = train_reduced(vit, x, y, at, epochs=epochs, learning_rate=rate, batch=BATCH, seed=seed)
    return trained._replace(vit=vit, losses=losses)


class Reading:
    """Stands before a reducer and keeps the tokens that it was given, and what it made of them.

    Args:
        reducer: that stands in a block.
    """

    def __init__(self, reducer: Any) -> None:
        self.reducer, self.needs = reducer, frozenset({*reducer.needs, "attention"})
        self.rows = getattr(reducer, "rows", "first") if "attention" in reducer.needs else "all"
        self.seen: list[tuple[Tensor, Tensor, Any]] = []

    def __call__(self, x: Tensor, sizes: Any = None, mask: Any = None, protect: Any = None, **signals: Tensor) -> Any:
        asked = {name: signal for name, signal in signals.items() if name in self.reducer.needs}
        found = self.reducer(x, sizes, mask, protect=protect, **asked)
        self.seen.append((x, signals["attention"].sum(1), found))
        return found


def rebuilt(readings: Reading, images: int = 256) -> tuple[float, float]:
    """The reconstruction loss per image, plain and by significance, of the patches of the first images that came."""
    x, weights, found = readings.seen[0]
    patches = found._replace(
        tokens=found.tokens[:images, 1:], sizes=found.sizes[:images, 1:], mask=found.real[:images, 1:]
    )
    x, weights = x[:images, 1:], weights[:images, 1:]
    weights = weights * weights.shape[1] / weights.sum(1, keepdim=True)
    losses = (reconstruction_loss(x, patches), reconstruction_loss(x, patches, weights))
    return float(losses[0].mean()), float(losses[1].mean())


def _form(trained: Trained) -> tuple[int, int]:
    return trained.test[0].shape[-1], trained.vit.patch


def _vit(classes: int, image: int, patch: int) -> ReducibleViT:
    return ReducibleViT(image, patch, WIDTH, depth=DEPTH, heads=HEADS, classes=classes, channels=1, hidden=2 * WIDTH)


def _trained(seed: int, epochs: int, train: Images, test: Images, *, classes: int, image: int, patch: int) -> Trained:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vit = _vit(classes, image, patch)
        # as large as what a patch says, or places are learned last
        torch.nn.init.normal_(vit.pos_embed, std=PLACES)
    warm_up = min(WARM_UP, epochs - 1)
    losses = train_reduced(vit, *train, epochs=epochs, learning_rate=RATE, warm_up=warm_up, batch=BATCH, seed=seed)
    found = Trained(vit, train, test, losses, 0.0)
    return found._replace(accuracy=accuracy_with(found, {}))
