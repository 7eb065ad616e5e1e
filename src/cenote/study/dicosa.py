"""Where captions mention only some concepts of a video, weighing the concepts pair by pair (DiCoSA) retrieves better than
giving all blocks the same weight.

Refuted if blocks of uniform weight retrieve as well or better.

Also measured, not part of the rule: the expected order of the simpler arms, the cosine with the mean frame, the cosine with the
frames pooled as the text asks, and uniform blocks.

A video has 8 independent concepts, each one of 20 words of a vocabulary of its own, and a third of its frames shows them; the
others are noise. A caption names 2 to 5 of the concepts; the rest of its vector is noise.

Knocked out: whose the weights are (those of each pair are computed from the caption of another, in training and test).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cenote.pool import DiCoSA
from cenote.study.harness import Arms, Check, Findings, Part, Size, above, draw_arms, gate, seeds_of, study
from cenote.study.harness.training import descend, shuffled

CONCEPTS, WORDS, WIDTH = 8, 20, 8
DIM = CONCEPTS * WIDTH
FRAMES, SHOWN = 12, 4
NAMED = (2, 5)
NOISE = 0.3
TRAIN, TEST = 2000, 500
CHANCE = 1 / TEST
BATCH = 100
LEARNING_RATE = 1e-3
EPOCHS: dict[Size, int] = {"smoke": 1, "small": 20, "full": 100}

MEAN, POOLED, UNIFORM, ADAPTIVE = "mean frame", "text-conditioned frames", "uniform blocks", "DiCoSA"
ASTRAY = "DiCoSA, weights of other captions"
ORDER = (MEAN, POOLED, UNIFORM, ADAPTIVE, ASTRAY)


class OfOthers(DiCoSA):
    """DiCoSA that weighs the concepts of each pair as the caption before it would have them."""

    def _factors(
        self, text: Float[Tensor, "texts dim"], video: Float[Tensor, "texts videos dim"]
    ) -> Float[Tensor, "texts videos blocks"]:
        return super()._factors(text.roll(1, 0), video)


@study
def run(seed: int, size: Size) -> Findings:
    """Train every arm once per seed on the same pairs; retrieve each test caption's video among all."""
    seeds = seeds_of(seed, size)
    train, test = (TRAIN, TEST) if size != "smoke" else (200, 100)
    recall: dict[str, list[float]] = {name: [] for name in ORDER}
    losses: dict[str, list[list[float]]] = {name: [] for name in ORDER}
    for s in seeds:
        generator = torch.Generator().manual_seed(s)
        words = nn.functional.normalize(torch.randn(CONCEPTS, WORDS, WIDTH, generator=generator), dim=-1) * WIDTH**0.5
        shown, asked = pairs(words, train, generator), pairs(words, test, generator)
        for name, of_seeds in recall.items():
            torch.manual_seed(s)
            towers = Towers(name)
            losses[name].append(_fit(towers, shown, EPOCHS[size], s))
            of_seeds.append(_recall(towers, asked))
    arms = Arms({name: tuple(of_seeds) for name, of_seeds in recall.items()})

    def rule(arm: str) -> tuple[Check, ...]:
        return (above(f"R@1, {arm} minus uniform blocks", arms.minus(arm, UNIFORM), 0.0),)

    return Findings(
        seeds=seeds,
        parts=(Part(rule, ADAPTIVE, knocked_out=(ASTRAY,), against=(UNIFORM,)),),
        gates=(
            *(gate(arm, above("R@1", arms[arm], CHANCE), losses[arm]) for arm in (ADAPTIVE, UNIFORM)),
            gate(ASTRAY, None, losses[ASTRAY]),
        ),
        checks=(
            above("R@1, uniform blocks minus text-conditioned frames", arms.minus(UNIFORM, POOLED), 0.0, in_rule=False),
            above("R@1, text-conditioned frames minus mean frame", arms.minus(POOLED, MEAN), 0.0, in_rule=False),
        ),
        table=arms.table(f"R@1 among {test} videos"),
        figure=partial(_draw, arms=arms),
        notes=(
            f"{CONCEPTS} concepts of width {WIDTH}, {FRAMES} frames of which {SHOWN} show the video's concepts, noise of "
            f"{NOISE:g} on what is shown; {train} training pairs, {EPOCHS[size]} passes in batches of {BATCH}, Adam at "
            f"{LEARNING_RATE:g}.",
            "Every arm has one linear map per side, which starts as the identity and is trained, and a trained temperature of "
            "the loss; the temperature of the frames is 3. The arms of whole vectors have no decoupling loss.",
        ),
    )


class Pairs(NamedTuple):
    """Captions and the frames of the videos they belong to."""

    text: Float[Tensor, "pairs dim"]
    frames: Float[Tensor, "pairs frames dim"]


class Towers(nn.Module):
    """A linear map per side, and the arm's similarity."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.text, self.video = (nn.Linear(DIM, DIM) for _ in range(2))
        for side in (self.text, self.video):
            nn.init.eye_(side.weight)
            nn.init.zeros_(side.bias)
        whole = name in (MEAN, POOLED)
        self.head = (OfOthers if name == ASTRAY else DiCoSA)(
            DIM,
            blocks=1 if whole else CONCEPTS,
            temp=1e9 if name == MEAN else 3.0,
            alpha=0.0 if whole else 0.01,
            beta=0.0 if whole else 0.005,
        )
        if name not in (ADAPTIVE, ASTRAY):
            self.head.weight_fc.requires_grad_(False)
            last = self.head.weight_fc[2]
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.weight)
            nn.init.constant_(last.bias, 1 / self.head.blocks)

    def forward(self, pairs: Pairs) -> Float[Tensor, "texts videos"]:
        return self.head(self.text(pairs.text), self.video(pairs.frames))

    def loss(self, pairs: Pairs) -> Float[Tensor, ""]:
        """Contrastive and decoupling loss of a batch of matched pairs."""
        return self.head.losses(self.text(pairs.text), self.video(pairs.frames)).total


def pairs(words: Float[Tensor, "concepts words width"], count: int, generator: torch.Generator) -> Pairs:
    """Draw videos and a caption for each.

    >>> drawn = pairs(torch.randn(8, 20, 8), 3, torch.Generator().manual_seed(0))
    >>> drawn.text.shape, drawn.frames.shape
    (torch.Size([3, 64]), torch.Size([3, 12, 64]))
    """
    chosen = torch.randint(words.shape[1], (count, CONCEPTS), generator=generator)
    concepts = words[torch.arange(CONCEPTS), chosen]
    number = torch.randint(NAMED[0], NAMED[1] + 1, (count, 1), generator=generator)
    named = torch.rand(count, CONCEPTS, generator=generator).argsort(1) < number
    text = concepts + NOISE * torch.randn(concepts.shape, generator=generator)
    text = torch.where(named.unsqueeze(-1), text, torch.randn(concepts.shape, generator=generator))
    shows = (torch.rand(count, FRAMES, generator=generator).argsort(1) < SHOWN).unsqueeze(-1)
    noise = torch.randn(count, FRAMES, DIM, generator=generator)
    return Pairs(text.flatten(1), torch.where(shows, concepts.flatten(1).unsqueeze(1) + NOISE * noise, noise))


def _fit(towers: Towers, data: Pairs, epochs: int, seed: int) -> list[float]:
    batches = shuffled(len(data.text), BATCH, epochs, torch.Generator().manual_seed(seed))
    losses = (towers.loss(Pairs(data.text[chosen], data.frames[chosen])) for chosen in batches)
    trained = [p for p in towers.parameters() if p.requires_grad]
    return descend(trained, losses, epochs * (len(data.text) // BATCH), LEARNING_RATE)


@torch.no_grad()
def _recall(towers: Towers, data: Pairs) -> float:
    best = towers(data).argmax(1)
    return float((best == torch.arange(len(best))).double().mean())


def _draw(figure: Any, arms: Arms) -> None:
    draw_arms(figure.subplots(), arms, "recall at 1")
