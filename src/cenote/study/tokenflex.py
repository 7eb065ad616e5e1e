"""One projector trained with a number of visual tokens drawn at every step serves each number about as well as a model trained
for it alone (within 3 points at the fewest, 2 at the most), where a model trained for the most loses more than 15 points when
it is given the fewest.

Refuted if the flexible model is more than 5 points below the fixed one at any number, or if the model trained for the most
tokens loses nothing at the fewest.

Canvases of 64 x 64 pixels hold one to four handwritten digits in their quadrants. A small language model reads the visual
tokens and five questions: which digit stands in each quadrant, and how many there are. Every model has as many steps.

Knocked out: the draw of the number (a model trained for the middle one alone serves all), and the pooling (as many cells of the
grid, drawn at random in every pass, stand for the means).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cenote.pool import TokenCountSampler, TokenFlex, check_placeholders
from cenote.study.harness import Arms, Check, Findings, Part, Size, above, draw_arms, gate, seeds_of, study
from cenote.study.harness.data import Digits, digits
from cenote.study.harness.training import descend

SEEDS = {"small": 4, "full": 10}
COUNTS = (16, 36, 64)
FEWEST, MOST = COUNTS[0], COUNTS[-1]
CANVAS, DIGIT, PATCH, FIELD = 64, 16, 4, 12
GRID = CANVAS // PATCH
DIM, HEADS, LAYERS = 64, 4, 2
PLACES = 16
NOTHING, ONE = 10, 11
ANSWERS = 15
QUESTIONS = 5
PLACEHOLDER = QUESTIONS
BATCH, LEARNING_RATE = 32, 2e-3
STEPS: dict[Size, int] = {"smoke": 3, "small": 800, "full": 3000}
TEST: dict[Size, int] = {"smoke": 32, "small": 500, "full": 1000}
FLEX, CELLS = "flexible", "flexible, cells at random"


class Canvases(NamedTuple):
    """Vision features of canvases, and the answers to the five questions."""

    x: Float[Tensor, "images cells dim"]
    y: Int[Tensor, "images questions"]


@study
def run(seed: int, size: Size) -> Findings:
    """Train a flexible model and one per number of tokens; ask each with every number."""
    seeds = seeds_of(seed, size, **SEEDS)
    arms = Arms()
    losses: dict[str, list[list[float]]] = {}
    commonest: tuple[float, ...] = ()
    models = {FLEX: COUNTS, CELLS: COUNTS, **{fixed(n): (n,) for n in COUNTS}}
    for s in seeds:
        test = canvases(digits("test"), TEST[size], torch.Generator().manual_seed(s + 1000))
        commonest = (*commonest, float((test.y == test.y.mode(0).values).double().mean()))
        for name, counts in models.items():
            model, curve = _trained(counts, STEPS[size], s, Cells if name == CELLS else TokenFlex)
            losses[name] = [*losses.get(name, []), curve]
            for n in COUNTS:
                arms[_at(name, n)] = (*arms.get(_at(name, n), ()), _accuracy(model, test, n))
    lost = arms.minus(_at(fixed(MOST), MOST), _at(fixed(MOST), FEWEST))

    def rule(arm: str) -> tuple[Check, ...]:
        return (
            *(
                above(
                    f"{n} tokens: accuracy, {arm} minus fixed at {n}",
                    arms.minus(_at(arm, n), _at(fixed(n), n)),
                    *bounds,
                )
                for n, bounds in zip(COUNTS, ((-0.03, -0.05), (-0.05, -0.05), (-0.02, -0.05)), strict=True)
            ),
            above(f"lost by the model fixed at {MOST} when given {FEWEST}", lost, 0.15, 0.0),
        )

    def beats(arm: str, count: int) -> Check:
        lead = [a - c for a, c in zip(arms[_at(arm, count)], commonest, strict=True)]
        return above(f"accuracy at {count} tokens minus that of the commonest answers", lead, 0.0)

    return Findings(
        seeds=seeds,
        parts=(Part(rule, FLEX, knocked_out=(fixed(COUNTS[1]), CELLS), against=(fixed(FEWEST), fixed(MOST))),),
        gates=(
            gate(FLEX, beats(FLEX, FEWEST), losses[FLEX]),
            *(gate(fixed(n), beats(fixed(n), n), losses[fixed(n)]) for n in COUNTS),
            gate(CELLS, None, losses[CELLS]),
        ),
        checks=(),
        table=arms.table("accuracy over five questions"),
        figure=partial(_draw, arms=arms),
        notes=(
            f"Vision features stand for a frozen encoder: {DIM - PLACES} random rectified features of each {FIELD} x {FIELD} "
            f"pixels around a patch of {PATCH} x {PATCH}, and {PLACES} sines and cosines of its place, a grid of {GRID}^2. "
            f"The language model: {LAYERS} causal blocks of width {DIM}, {HEADS} heads, rotary positions, from scratch.",
            f"{STEPS[size]:,} steps of {BATCH} canvases, Adam at {LEARNING_RATE:g} along a cosine; {TEST[size]} test canvases "
            f"with other digits. The flexible model draws {', '.join(map(str, COUNTS))} tokens alike: "
            f"{TokenCountSampler(COUNTS).expected:.1f} per step.",
        ),
        tried=(
            f"With digits at random places of their quadrants the model fixed at {MOST} named half of the quadrants after "
            "800 steps (one training with another seed); they were put in the middle before any other model was trained.",
        ),
    )


def canvases(source: Digits, count: int, generator: torch.Generator) -> Canvases:
    """One to four digits in the middle of the quadrants of an empty canvas.

    >>> drawn = canvases(digits("test"), 3, torch.Generator().manual_seed(0))
    >>> drawn.x.shape, drawn.y.shape, int((drawn.y[0, :4] < 10).sum()) == int(drawn.y[0, 4]) - 10
    (torch.Size([3, 256, 64]), torch.Size([3, 5]), True)
    """
    images = source.x.view(-1, 1, 8, 8).repeat_interleave(2, 2).repeat_interleave(2, 3)[:, 0]
    chosen = torch.randint(len(images), (count, 4), generator=generator)
    shown = torch.randint(1, 5, (count, 1), generator=generator)
    there = torch.rand(count, 4, generator=generator).argsort(1) < shown
    margin = (CANVAS // 2 - DIGIT) // 2
    quadrants = F.pad(images[chosen] * there[:, :, None, None], (margin,) * 4)
    x = quadrants.unflatten(1, (2, 2)).permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2)
    y = torch.where(there, source.y[chosen], NOTHING)
    return Canvases(_seen(x), torch.cat([y, shown + ONE - 1], 1))


def fixed(count: int) -> str:
    """Name of the model that is trained with so many tokens."""
    return f"fixed at {count}"


def _at(name: str, count: int) -> str:
    return f"{name}, {count} tokens"


def _seen(x: Float[Tensor, "images height width"]) -> Float[Tensor, "images cells dim"]:
    generator = torch.Generator().manual_seed(0)
    kernels = torch.randn(DIM - PLACES, 1, FIELD, FIELD, generator=generator) / FIELD
    bias = 0.5 * torch.randn(DIM - PLACES, generator=generator)
    local = torch.relu(F.conv2d(x.unsqueeze(1), kernels, bias, PATCH, (FIELD - PATCH) // 2))
    along = torch.arange(GRID) * torch.pi / GRID * torch.tensor([[0.5], [1.0], [2.0], [4.0]])
    waves = torch.cat([along.sin(), along.cos()])
    rows, columns = waves.unsqueeze(2).expand(-1, -1, GRID), waves.unsqueeze(1).expand(-1, GRID, -1)
    places = torch.cat([rows, columns]).expand(len(x), -1, -1, -1)
    return torch.cat([local, places], 1).flatten(2).transpose(1, 2)


class _Block(nn.Module):
    """Causal attention with rotary positions, and a perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(DIM), nn.LayerNorm(DIM)])
        self.qkv = nn.Linear(DIM, 3 * DIM, bias=False)
        self.out = nn.Linear(DIM, DIM, bias=False)
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))

    def forward(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch length dim"]:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(_turned(q), _turned(k), v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


def _turned(x: Float[Tensor, "batch heads length width"]) -> Float[Tensor, "batch heads length width"]:
    half = x.shape[3] // 2
    angle = torch.arange(x.shape[2]).unsqueeze(1) * 10_000.0 ** (-torch.arange(half) / half)
    first, second = x.split(half, 3)
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], 3)


class Cells(TokenFlex):
    """Projects cells that are drawn at random instead of means."""

    def forward(self, x: Tensor, num_tokens: int | tuple[int, int] | None = None) -> Float[Tensor, "batch tokens dim"]:
        assert isinstance(num_tokens, int)
        chosen = torch.randperm(x.shape[1])[:num_tokens].sort().values
        return super().forward(x[:, chosen], num_tokens)


class _Reader(nn.Module):
    """Visual tokens in the places of the text's placeholders, then the questions; answers where the questions stand."""

    def __init__(self, projector: type[TokenFlex]) -> None:
        super().__init__()
        self.projector = projector(DIM, DIM, MOST, norm=True)
        self.words = nn.Embedding(QUESTIONS + 1, DIM)
        self.blocks = nn.Sequential(*(_Block() for _ in range(LAYERS)))
        self.answer = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, ANSWERS))

    def forward(self, x: Float[Tensor, "batch cells dim"], count: int) -> Float[Tensor, "batch questions answers"]:
        ids = torch.cat([torch.full((count,), PLACEHOLDER), torch.arange(QUESTIONS)]).expand(len(x), -1)
        check_placeholders(ids, PLACEHOLDER, count)
        text = self.words(ids[:, count:])
        return self.answer(self.blocks(torch.cat([self.projector(x, count), text], 1))[:, count:])


def _trained(counts: tuple[int, ...], steps: int, seed: int, projector: type[TokenFlex]) -> tuple[_Reader, list[float]]:
    """A model, and its losses step by step."""
    torch.manual_seed(seed)
    model = _Reader(projector)
    generator = torch.Generator().manual_seed(seed)
    sampler = TokenCountSampler(counts, seed=seed)

    def losses() -> Iterator[Tensor]:
        for step in range(steps):
            x, y = canvases(digits("train"), BATCH, generator)
            yield F.cross_entropy(model(x, sampler.at(step)).flatten(0, 1), y.flatten())

    return model, descend(model.parameters(), losses(), steps, LEARNING_RATE, clip=1.0)


@torch.no_grad()
def _accuracy(model: _Reader, data: Canvases, count: int) -> float:
    named = torch.cat([model(x, count).argmax(2) for x in data.x.split(BATCH)])
    return float((named == data.y).double().mean())


def _draw(figure: Any, arms: Arms) -> None:
    draw_arms(figure.subplots(), arms, "accuracy over five questions")
