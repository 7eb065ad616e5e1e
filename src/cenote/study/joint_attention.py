"""Painting the map of joint attention pixel by pixel from the joint token finds what a group looks at more closely than
predicting the whole map from that token, and than averaging the people's gaze cones.

Refuted if predicting the whole map is as close or closer.

Scenes have 6 to 12 people at random places and a hidden ball; some look at it, with angular noise, the others, told apart by
their action, look elsewhere. Also measured: the mean of the people's own maps, the field without actions, and how much the
joint token attends to those who do not look at the ball.

Knocked out: the meeting of the gazes (they are permuted among the people of each scene, in training and test), and the
smoothness of the field (it reads the coordinates of the pixels in one random order, the same throughout).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.pool import JointAttention, JointAttentionPool, best_point, gaussian_target
from cenote.pool.attention.joint_attention.field import FieldHead, coordinates
from cenote.study.harness import Arms, Check, Findings, Part, Size, above, draw_arms, gate, seeds_of, study
from cenote.study.harness.training import descend, shuffled

SEEDS = {"small": 3, "full": 5}
MAP = (32, 64)
EXTENT = (2.0, 1.0)
PIXELS = 192
PEOPLE = (6, 12)
WIDTH, LAYERS, HEADS = 16, 3, 2
SIGMA = 3.0
ANGLE = 0.15
INATTENTIVE = 0.7
CONE = 0.5
BATCH = 16
LEARNING_RATE = 3e-3
SCENES: dict[Size, tuple[int, int]] = {"smoke": (64, 32), "small": (2000, 500), "full": (20_000, 500)}
EPOCHS: dict[Size, int] = {"smoke": 1, "small": 60, "full": 60}

# share of the distance of a trivial guess that an arm that was trained may be at most
LEARNED = 0.75

CONES, EACH, WHOLE, FIELD, BLIND = "mean gaze cone", "mean of own maps", "whole map", "field", "field without actions"
PERMUTED, SCRAMBLED = "field, gazes permuted", "field, pixels scrambled"


class Scenes(NamedTuple):
    """People, what they look at, and who of them does; coordinates in heights of the image from its top left corner."""

    position: Float[Tensor, "scenes people 2"]
    gaze: Float[Tensor, "scenes people 2"]
    action: Float[Tensor, "scenes people 2"]
    mask: Bool[Tensor, "scenes people"]
    attentive: Bool[Tensor, "scenes people"]
    ball: Float[Tensor, "scenes 2"]

    def select(self, chosen: Tensor) -> Scenes:
        """These scenes."""
        return Scenes(*(field[chosen] for field in self))


@study
def run(seed: int, size: Size) -> Findings:
    """Train each arm once per seed on the same scenes; measure the distance of the best pixel from the ball."""
    seeds = seeds_of(seed, size, **SEEDS)
    trained_on, tested_on = SCENES[size]
    distance, hit, losses = Arms(), Arms(), {}
    shares = []
    everywhere = torch.arange(MAP[0] * MAP[1])
    builds: dict[str, Callable[[], nn.Module]] = {
        WHOLE: WholeMap,
        FIELD: Field,
        EACH: partial(Field, aggregation="ind_only"),
        BLIND: partial(Field, blind=True),
        PERMUTED: Field,
        SCRAMBLED: partial(Field, scrambled=True),
    }
    drawn = [
        (
            scenes(trained_on, torch.Generator().manual_seed(s)),
            scenes(tested_on, torch.Generator().manual_seed(s + 1000)),
        )
        for s in seeds
    ]
    for name in (CONES, *builds):
        runs, curves = [], []
        for s, (train, test) in zip(seeds, drawn, strict=True):
            if name == PERMUTED:
                train, test = (permuted(part, torch.Generator().manual_seed(s)) for part in (train, test))
            if name == CONES:
                runs.append(_distances(gaze_cones(test), test))
                continue
            torch.manual_seed(s)
            model = builds[name]()
            curves.append(_fit(model, train, EPOCHS[size], s))
            with torch.no_grad():
                runs.append(_distances(model(test, everywhere).unflatten(1, MAP), test))
            if name == FIELD:
                shares.append(_attention(model, test))
        losses[name] = curves
        distance[name] = tuple(float(d.mean()) for d in runs)
        # a tenth of the image's width, which is 2 heights
        hit[name] = tuple(float((d < 0.2).double().mean()) for d in runs)
    trivial = [LEARNED * min(_trivial(test)) for _, test in drawn]

    def rule(arm: str) -> tuple[Check, ...]:
        cones = distance.minus(CONES, arm)
        return (
            above(f"distance to the ball, whole map minus {arm}", distance.minus(WHOLE, arm), 0.0),
            above(f"distance to the ball, mean gaze cone minus {arm}", cones, 0.0, refuted=-math.inf),
        )

    def beats(arm: str) -> Check:
        closer = [t - d for t, d in zip(trivial, distance[arm], strict=True)]
        return above(f"distance to the ball, {LEARNED:g} of the best trivial guess minus {arm}", closer, 0.0)

    return Findings(
        seeds=seeds,
        parts=(Part(rule, FIELD, knocked_out=(PERMUTED, SCRAMBLED), against=(WHOLE, CONES)),),
        gates=(
            *(gate(name, beats(name), losses[name]) for name in (FIELD, WHOLE)),
            gate(CONES, beats(CONES), None),
            *(gate(name, None, losses[name]) for name in (PERMUTED, SCRAMBLED)),
        ),
        checks=(
            above(
                "distance to the ball, field without actions minus field",
                distance.minus(BLIND, FIELD),
                0.0,
                in_rule=False,
            ),
            above(
                "distance to the ball, mean of own maps minus field", distance.minus(EACH, FIELD), 0.0, in_rule=False
            ),
            above(
                "attention of the joint token to an attentive minus an inattentive person", shares, 0.0, in_rule=False
            ),
        ),
        table=[
            *distance.table("distance to the ball, in heights of the image"),
            *hit.table("share within a tenth of the width"),
        ],
        figure=partial(_draw, distance=distance, hit=hit),
        notes=(
            f"Maps of {MAP[0]} x {MAP[1]}, width {WIDTH}, {LAYERS} layers, {HEADS} heads; {trained_on:,} scenes, "
            f"{EPOCHS[size]} passes in batches of {BATCH}, Adam at {LEARNING_RATE:g}. Every step of every arm sees "
            f"{PIXELS} random pixels of a hill of {SIGMA:g} pixels around the ball; the loss is the squared error.",
            f"Each person is inattentive with probability {INATTENTIVE:g}; at least two look at the ball, with an angular "
            f"noise of {ANGLE:g} radians.",
            "The whole map is predicted by a linear layer from the joint token to a map of a quarter of the height and width, "
            "enlarged bilinearly.",
            "Trivial guesses: the middle of the image, and the mean of the people's places.",
            f"A gaze cone is exp(-angle^2 / {CONE:g}); its arm is not trained and does not read the actions.",
        ),
        tried=(
            "With half of the people inattentive instead of 0.7 of them, the mean gaze cone, which is not trained, was 0.126 "
            "heights from the ball (2 seeds, 32 scenes each).",
        ),
    )


class Field(nn.Module):
    """The published head."""

    def __init__(self, aggregation: Any = "token_only", blind: bool = False, scrambled: bool = False) -> None:
        super().__init__()
        pixels = MAP[0] * MAP[1]
        self.order = (
            torch.randperm(pixels, generator=torch.Generator().manual_seed(0)) if scrambled else torch.arange(pixels)
        )
        use: Any = ("position", "gaze") if blind else ("position", "gaze", "action")
        self.model = JointAttention(2, WIDTH, LAYERS, HEADS, aggregation=aggregation, use=use)

    def forward(self, data: Scenes, pixels: Int[Tensor, "pixels"]) -> Float[Tensor, "scenes pixels"]:
        model, points = self.model, coordinates(MAP)[self.order[pixels]]
        assert isinstance(model.field, FieldHead)
        encoded = model.group.encode(people(data, model.use == ("position", "gaze")), data.mask)
        if model.aggregation == "token_only":
            return model.field.at(encoded.joint.unsqueeze(1), points).squeeze(1)
        own = model.field.at(encoded.people, points).masked_fill(~data.mask.unsqueeze(-1), 0)
        return own.sum(1) / data.mask.sum(1, keepdim=True)


class WholeMap(nn.Module):
    """The same people, the same token, and a linear layer that writes a small map at once."""

    def __init__(self) -> None:
        super().__init__()
        self.group = JointAttentionPool(6, WIDTH, LAYERS, HEADS)
        self.head = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, MAP[0] * MAP[1] // 16))

    def forward(self, data: Scenes, pixels: Int[Tensor, "pixels"]) -> Float[Tensor, "scenes pixels"]:
        small = self.head(self.group(people(data), data.mask)).unflatten(1, (1, MAP[0] // 4, MAP[1] // 4))
        return F.interpolate(small, size=MAP, mode="bilinear").flatten(1)[:, pixels]


def people(data: Scenes, blind: bool = False) -> Float[Tensor, "scenes people features"]:
    """What is read of each person; positions in shares of the image."""
    position = data.position / torch.tensor(EXTENT)
    return torch.cat([position, data.gaze] if blind else [position, data.gaze, data.action], -1)


def scenes(count: int, generator: torch.Generator) -> Scenes:
    """Draw scenes.

    >>> drawn = scenes(5, torch.Generator().manual_seed(0))
    >>> drawn.position.shape, drawn.attentive.sum(1).min().item() >= 2
    (torch.Size([5, 12, 2]), True)
    """
    most = PEOPLE[1]
    extent = torch.tensor(EXTENT)
    position = torch.rand(count, most, 2, generator=generator) * extent
    ball = torch.rand(count, 2, generator=generator) * extent
    number = torch.randint(PEOPLE[0], most + 1, (count, 1), generator=generator)
    mask = torch.arange(most) < number
    attentive = torch.rand(count, most, generator=generator) >= INATTENTIVE
    attentive[:, :2] = True
    away = ball.unsqueeze(1) - position
    angle = torch.atan2(away[..., 1], away[..., 0]) + ANGLE * torch.randn(count, most, generator=generator)
    anywhere = 2 * torch.pi * torch.rand(count, most, generator=generator)
    angle = torch.where(attentive, angle, anywhere)
    gaze = torch.stack([angle.cos(), angle.sin()], -1)
    action = F.one_hot(attentive.long(), 2).float()
    shown = mask.unsqueeze(-1)
    return Scenes(position * shown, gaze * shown, action * shown, mask, attentive & mask, ball)


def permuted(data: Scenes, generator: torch.Generator) -> Scenes:
    """The same scenes, in which each looks whither another one of them does.

    >>> drawn = scenes(5, torch.Generator().manual_seed(0))
    >>> other = permuted(drawn, torch.Generator().manual_seed(0))
    >>> torch.equal(other.gaze, drawn.gaze), torch.allclose(other.gaze.sum(1), drawn.gaze.sum(1), atol=1e-5)
    (False, True)
    """
    # padding stays behind the people
    order = (torch.rand(data.mask.shape, generator=generator) + 2 * ~data.mask).argsort(1)
    return data._replace(gaze=data.gaze.gather(1, order.unsqueeze(-1).expand_as(data.gaze)))


def gaze_cones(data: Scenes) -> Float[Tensor, "scenes height width"]:
    """The mean over the people of `exp(-angle^2 / c)` between a person's gaze and the way to each pixel."""
    pixels = coordinates(MAP) * torch.tensor(EXTENT)
    away = F.normalize(pixels - data.position.unsqueeze(2), dim=-1)
    cosine = (away * data.gaze.unsqueeze(2)).sum(-1).clamp(-1, 1)
    cones = torch.exp(-cosine.arccos().square() / CONE).masked_fill(~data.mask.unsqueeze(-1), 0)
    return (cones.sum(1) / data.mask.sum(1, keepdim=True)).unflatten(1, MAP)


def _fit(model: nn.Module, data: Scenes, epochs: int, seed: int) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    target = gaussian_target((data.ball / torch.tensor(EXTENT)).unsqueeze(1), MAP, sigma=SIGMA).flatten(1)

    def losses() -> Iterator[Tensor]:
        for chosen in shuffled(len(target), BATCH, epochs, generator):
            pixels = torch.randperm(MAP[0] * MAP[1], generator=generator)[:PIXELS]
            yield F.mse_loss(model(data.select(chosen), pixels), target[chosen][:, pixels])

    return descend(model.parameters(), losses(), epochs * -(-len(target) // BATCH), LEARNING_RATE)


def _trivial(data: Scenes) -> tuple[float, float]:
    """Distance from the ball of the middle of the image, and of the mean of the people's places."""
    middle = torch.tensor(EXTENT) / 2
    places = data.position.sum(1) / data.mask.sum(1, keepdim=True)
    return float((middle - data.ball).norm(dim=-1).mean()), float((places - data.ball).norm(dim=-1).mean())


def _distances(maps: Float[Tensor, "scenes height width"], data: Scenes) -> Float[Tensor, "scenes"]:
    found = best_point(maps) * torch.tensor(EXTENT)
    return (found - data.ball).norm(dim=-1)


@torch.no_grad()
def _attention(model: nn.Module, data: Scenes) -> float:
    """Mean weight of an attentive person minus that of an inattentive one, in all layers of the joint token."""
    assert isinstance(model, Field)
    weights = model.model.group.encode(people(data), data.mask).attention[..., -1, :-1].mean((1, 2))
    idle = data.mask & ~data.attentive
    return float(weights[data.attentive].mean() - weights[idle].mean())


def _draw(figure: Any, distance: Arms, hit: Arms) -> None:
    left, right = figure.subplots(1, 2)
    draw_arms(left, distance, "distance to the ball, heights of the image\n(lower is better)")
    draw_arms(right, hit, "share within a tenth of the width\n(higher is better)")
