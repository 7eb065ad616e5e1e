"""Where the probes looked, as pictures: weights over an image, as bars over words, or over the instances of a bag."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

from cenote.core import InputError
from cenote.jobs.probe.result import Comparison
from cenote.report.attention import Attention, Item

if TYPE_CHECKING:
    from PIL import Image

# full colour stands for at least so many even shares, so that a mean looks pale and not like a hit everywhere
FULL_COLOUR = 4.0
MOST_CELLS = 32
MOST_BARS = 120
BAR_HEIGHT = 100
MOST_WORDS = 160
HEAVIEST = 12
PICTURE_SIDE = 224
CRISP_SIDE = 64
LEVELS = 64
# dark violet, red, orange, pale yellow; opacity grows with the weight
RAMP = ((0.0, (58, 12, 92)), (0.35, (168, 34, 92)), (0.7, (240, 116, 32)), (1.0, (255, 232, 128)))


@dataclass(frozen=True)
class Picture:
    """An item's image, made small: a data address, its shape, and whether it is so small that pixels should show."""

    address: str
    width: int
    height: int
    crisp: bool


@dataclass(frozen=True)
class Bars:
    """SVG paths over `count` bars of height `BAR_HEIGHT`: weights of unlabelled and of labelled instances.

    Attributes:
        per_bar: instances that share one bar (the largest weight of each kind shows).
        even: height of an even share.
    """

    count: int
    per_bar: int
    plain: str
    labelled: str
    marks: str
    even: float


@dataclass(frozen=True)
class Word:
    """A token of a text: what it stands for, whether that begins a word, its bar in per cent, whether it carries a label."""

    text: str
    begins: bool
    height: int
    labelled: bool


@dataclass(frozen=True)
class Look:
    """One method on one item.

    Attributes:
        correct: whether the prediction is the label; `None` where that is not a question of yes and no.
        overlay: data address of the weights over the grid.
        bars: the weights over a bag.
        words: of a text, in place of the bars; of a long one beside them, only the heaviest.
        spread: how many tokens carry the mean weight, exp of its entropy.
        spreads: of the most pointed and of the widest head.
        heads: over which the weights are averaged.
        shown: tokens that have weights here; of long items only the first are kept.
    """

    method: str
    prediction: str
    correct: bool | None
    overlay: str | None = None
    bars: Bars | None = None
    words: tuple[Word, ...] = ()
    spread: float = 0.0
    spreads: tuple[float, float] = (0.0, 0.0)
    heads: int = 0
    shown: int = 0

    @property
    def weighs(self) -> bool:
        """Whether there is something to draw."""
        return self.overlay is not None or self.bars is not None or bool(self.words)


@dataclass(frozen=True)
class Sample:
    """One item with all methods, best first."""

    item: Item
    picture: Picture | None
    outlines: str
    looks: tuple[Look, ...]

    @property
    def drawn(self) -> tuple[Look, ...]:
        """Methods with weights."""
        return tuple(look for look in self.looks if look.weighs)

    @property
    def blind(self) -> tuple[Look, ...]:
        """Methods without."""
        return tuple(look for look in self.looks if not look.weighs)


def samples(comparison: Comparison, attention: Attention, count: int) -> tuple[Sample, ...]:
    """The first `count` items, drawn for all compared methods."""
    exact = comparison.dataset.get("task") in ("binary", "multiclass")
    drawn = []
    for number, item in enumerate(attention.items[:count]):
        grid = attention.grid if attention.grid and item.tokens == attention.grid[0] * attention.grid[1] else None
        grid = None if item.unpictured else grid
        looks = []
        for result in comparison.results:
            if result.reference:
                continue
            weights = attention.weights.get((result.method, number))
            prediction = item.predictions.get(result.method, "")
            correct = prediction == item.label if exact and prediction else None
            looks.append(_look(result.method, prediction, correct, weights, item, grid))
        outlines = "" if grid is None or item.labelled is None else _outlines(item.labelled, grid)
        drawn.append(Sample(item, None if item.image is None else picture(item), outlines, tuple(looks)))
    return tuple(drawn)


def _look(
    method: str,
    prediction: str,
    correct: bool | None,
    weights: Float[ndarray, "heads tokens"] | None,
    item: Item,
    grid: tuple[int, int] | None,
) -> Look:
    if weights is None or not weights.size:
        return Look(method, prediction, correct)
    per_head = shares_per_head(weights)
    shares = per_head.mean(0)
    spread = effective_tokens(shares)
    each = [effective_tokens(head) for head in per_head]
    spreads = min(each), max(each)
    if grid is not None:
        return Look(method, prediction, correct, overlay(shares, grid), None, (), spread, spreads, *weights.shape)
    drawn = None if item.words and len(shares) <= MOST_WORDS else bars(shares, item.labelled)
    said = words(shares, item)
    return Look(method, prediction, correct, None, drawn, said, spread, spreads, *weights.shape)


def shares_per_head(weights: Float[ndarray, "heads tokens"]) -> Float[ndarray, "heads tokens"]:
    """Shares that sum to one in every head, so that all heads count alike; what is no number counts as nothing.

    >>> shares_per_head(np.array([[1.0, 1.0], [0.0, 50.0]])).tolist()
    [[0.5, 0.5], [0.0, 1.0]]
    """
    clean = np.nan_to_num(weights.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0).clip(min=0)
    totals = clean.sum(1, keepdims=True)
    return np.divide(clean, totals, out=np.zeros_like(clean), where=totals > 0)


def effective_tokens(shares: Float[ndarray, "tokens"]) -> float:
    """exp of the entropy: an even weight over n tokens gives n, also where a part of the weight lies elsewhere.

    >>> round(effective_tokens(np.array([0.5, 0.5, 0.0])), 6), round(effective_tokens(np.array([0.2, 0.2, 0.0])), 6)
    (2.0, 2.0)
    """
    used = shares[shares > 0]
    used = used / used.sum()
    return float(np.exp(-(used * np.log(used)).sum())) if used.size else 0.0


def strength(shares: Float[ndarray, "tokens"]) -> Float[ndarray, "tokens"]:
    """Between 0 and 1; full at the largest share, but at four even shares at the least."""
    return shares / _full(shares)


def _full(shares: Float[ndarray, "tokens"]) -> float:
    return max(float(shares.max()), FULL_COLOUR / shares.size)


def overlay(shares: Float[ndarray, "tokens"], grid: tuple[int, int]) -> str:
    """A small transparent PNG, one pixel per patch (patches that were not kept stay clear)."""
    from PIL import Image

    cells = np.zeros(grid[0] * grid[1], dtype=np.float32)
    cells[: len(shares)] = strength(shares)[: cells.size]
    plane = Image.fromarray(cells.reshape(grid), mode="F")
    if max(grid) > MOST_CELLS:
        shrink = MOST_CELLS / max(grid)
        plane = plane.resize((max(1, round(grid[1] * shrink)), max(1, round(grid[0] * shrink))), Image.Resampling.BOX)
    levels = (np.asarray(plane).clip(0, 1) * (LEVELS - 1)).round().astype(np.uint8)
    image = Image.fromarray(levels, mode="P")
    at = np.linspace(0, 1, LEVELS)
    stops = [s for s, _ in RAMP]
    colours = np.stack([np.interp(at, stops, [c[k] for _, c in RAMP]) for k in range(3)], 1).round().astype(np.uint8)
    image.putpalette(colours.tobytes())
    opacity = (255 * 0.88 * at**0.75).round().astype(np.uint8).tobytes()
    return _address(image, "PNG", transparency=opacity, optimize=True)


def picture(item: Item) -> Picture:
    """The item's image, small enough for a page that holds a dozen."""
    from PIL import Image, UnidentifiedImageError

    assert item.image is not None
    try:
        image: Image.Image = Image.open(io.BytesIO(item.image))
        image = image.convert("L" if image.mode in ("1", "L", "I", "I;16", "F") else "RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"out: the image of item {item.id!r} in attention.json is no picture: {error}") from error
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    crisp = max(image.size) <= CRISP_SIDE
    address = _address(image, "PNG", optimize=True) if crisp else _address(image, "JPEG", quality=82)
    return Picture(address, image.width, image.height, crisp)


def bars(shares: Float[ndarray, "tokens"], labelled: Sequence[bool] | None) -> Bars:
    """Bars in the order of the bag; of a long bag neighbours share a bar."""
    per_bar = -(-len(shares) // MOST_BARS)
    count = -(-len(shares) // per_bar)
    marked = np.zeros(count * per_bar, dtype=bool)
    known = np.asarray(labelled or (), dtype=bool)[: len(shares)]
    marked[: len(known)] = known
    heights = np.zeros(count * per_bar)
    heights[: len(shares)] = strength(shares) * BAR_HEIGHT

    def path(chosen: Bool[ndarray, "tokens"]) -> str:
        tallest = np.where(chosen, heights, 0).reshape(count, per_bar).max(1).round().astype(int)
        return "".join(f"M{i}.5 {BAR_HEIGHT}V{BAR_HEIGHT - tallest[i]}" for i in np.flatnonzero(tallest))

    with_mark = np.flatnonzero(marked.reshape(count, per_bar).any(1))
    marks = "".join(f"M{i}.5 {BAR_HEIGHT + 5}v7" for i in with_mark)
    even = BAR_HEIGHT * (1 - 1 / len(shares) / _full(shares))
    return Bars(count, per_bar, path(~marked), path(marked), marks, round(even, 1))


def words(shares: Float[ndarray, "tokens"], item: Item) -> tuple[Word, ...]:
    """Each token of a text with the height of its bar; of a text of more than `MOST_WORDS` the heaviest, in its order."""
    if item.words is None:
        return ()
    heights = (100 * strength(shares)).round().astype(int)
    chosen = range(len(shares))
    if len(shares) > MOST_WORDS:
        chosen = sorted(np.argsort(-shares, kind="stable")[:HEAVIEST].tolist())  # type: ignore[assignment]
    marks = item.labelled or (False,) * len(shares)
    return tuple(
        Word(item.words[i].strip(), len(shares) > MOST_WORDS or item.words[i][:1] == " ", int(heights[i]), marks[i])
        for i in chosen
    )


def _outlines(labelled: Sequence[bool], grid: tuple[int, int]) -> str:
    """Squares around the labelled patches, in units of a patch."""
    places = (divmod(i, grid[1]) for i, on in enumerate(labelled[: grid[0] * grid[1]]) if on)
    return "".join(f"M{column} {row}h1v1h-1z" for row, column in places)


def _address(image: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
