"""A character model whose middle layers run on words predicts English better than one whose middle layers run on five
characters each, comes near the model that runs on characters throughout, in less time, and, where it learns where to cut, cuts
as often as its prior says.

Refuted if fixed segments are not above words in bits per character, if words are 0.2 bits or more above the model on
characters, if a step on words takes as long as one on characters, or if the learned rate lies outside 0.15 to 0.25.

The text is the language reference that comes with Python (`pydoc_data`), in 27 symbols: 200,000 characters to train on, then
8,000 to test on. All arms have four layers of one width and the same steps; only where the middle layers' segments end differs.
A count of pairs of characters is the level that every arm must beat.

Knocked out: the text (cuts whose lengths are drawn from the words' lengths, wherever they fall); the ends of words (their own
lengths, two characters late); the middle (no cut at all: the layers on segments see only the null group); and, of the learned
cuts, the prior.
"""

from __future__ import annotations

import time
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cenote.reduce import (
    HourglassLM,
    boundary_scores,
    evaluate_hourglass,
    space_boundaries,
    train_hourglass,
)
from cenote.reduce.dynamic_token_pooling.text import encode, plain
from cenote.study.harness import (
    Arms,
    Check,
    Findings,
    Part,
    Size,
    above,
    below,
    between,
    draw_arms,
    gate,
    seeds_of,
    study,
)

SEEDS = {"small": 3, "full": 5}
TRAIN = 200_000
TEST = {"smoke": 512, "small": 8_000, "full": 8_000}
LENGTH, BATCH, DIM, HEADS, INNER = 128, 4, 32, 2, 128
STEPS = {"smoke": 3, "small": 600, "full": 2400}
RATE, WARM_UP = 3e-3, 60
EVERY, PRIOR, LATE = 5, 0.2, 2
SPACE = 0
WEAK = 1e-9

WORDS, FIXED, VANILLA, GUMBEL = "words", "fixed, 5", "characters throughout", "learned"
DRAWN, MOVED, EMPTY, FREE = "lengths drawn", "words, two late", "no cut", "learned, no prior"


class Text(NamedTuple):
    """Characters to train and to test on, and the bits per character of the test by counted pairs."""

    train: Int[Tensor, "train"]
    test: Int[Tensor, "test"]
    pairs: float


class NoPrior(HourglassLM):
    """Learned cuts whose number nothing holds."""

    def _boundary_loss(self, *given: Any) -> Float[Tensor, ""]:
        return WEAK * super()._boundary_loss(*given)


@cache
def text(size: Size) -> Text:
    """Of the language reference, its topics in the order of their names."""
    from pydoc_data.topics import topics

    ids = encode(plain("\n".join(topics[name] for name in sorted(topics)))[: TRAIN + TEST[size]])
    train, test = ids[:TRAIN], ids[TRAIN:]
    counts = torch.ones(27, 27).index_put((train[:-1], train[1:]), torch.ones(()), accumulate=True)
    shares = counts / counts.sum(1, keepdim=True)
    return Text(train, test, float(-shares[test[:-1], test[1:]].log2().mean()))


def cuts(arm: str, ids: Int[Tensor, "tokens"], seed: int) -> Bool[Tensor, "tokens"] | None:
    """Where the segments of an arm end; `None`: as the model says."""
    words = space_boundaries(ids, SPACE)
    if arm == WORDS:
        return words
    if arm == MOVED:
        return words.roll(LATE)
    if arm == EMPTY:
        return torch.zeros_like(words)
    if arm == DRAWN:
        lengths = words.nonzero()[:, 0].diff()
        generator = torch.Generator().manual_seed(seed)
        drawn = lengths[torch.randint(len(lengths), (len(ids),), generator=generator)]
        ends = drawn.cumsum(0) - 1
        return torch.zeros_like(words).index_fill(0, ends[ends < len(ids)], True)
    return None


def model_of(arm: str, seed: int) -> HourglassLM:
    """Fresh; of one seed the layers of all arms that have the same begin alike."""
    torch.manual_seed(seed)
    kind = {FIXED: "fixed", VANILLA: "none", GUMBEL: "gumbel", FREE: "gumbel"}.get(arm, "whitespace")
    cls = NoPrior if arm == FREE else HourglassLM
    return cls(
        27,
        (1, 2, 1),
        DIM,
        HEADS,
        inner=INNER,
        dropout=0.0,
        boundaries=kind,  # type: ignore[arg-type]
        every=EVERY,
        prior=PRIOR,
    )


@study
def run(seed: int, size: Size) -> Findings:
    """Train every arm on the same chunks; compare bits per character, time, and how often it cuts."""
    seeds = seeds_of(seed, size, **SEEDS)
    data = text(size)
    bits, seconds, rates, losses = Arms(), Arms(), Arms(), {}
    spaces: list[float] = []
    for arm in (WORDS, FIXED, VANILLA, GUMBEL, DRAWN, MOVED, EMPTY, FREE):
        found, curves = [], []
        for s in seeds:
            with torch.random.fork_rng():
                model = model_of(arm, s)
            begin = time.process_time()
            trained = train_hourglass(
                model,
                data.train,
                cuts(arm, data.train, s),
                steps=STEPS[size],
                batch=BATCH,
                length=LENGTH,
                lr=RATE,
                warm_up=WARM_UP,
                random_state=s,
            )
            took = (time.process_time() - begin) / STEPS[size]
            test = evaluate_hourglass(
                model, data.test, cuts(arm, data.test, s + 1), context=LENGTH, target=LENGTH // 2, batch=16
            )
            last = trained.rates[-max(1, STEPS[size] // 10) :]
            found.append((test.bits_per_character, took, sum(last) / len(last)))
            curves.append(trained.losses)
            if arm == GUMBEL:
                piece = data.test[: LENGTH * 4].view(4, LENGTH)
                own = model.boundaries_of(piece)
                spaces.append(boundary_scores(own, space_boundaries(piece, SPACE)).f1)
        bits[arm], seconds[arm], rates[arm] = map(tuple, zip(*found, strict=True))
        losses[arm] = curves
    pairs = (data.pairs,) * len(seeds)

    def better(arm: str) -> tuple[Check, ...]:
        return (above(f"bits per character, fixed minus {arm}", bits.minus(FIXED, arm), expected=0.0),)

    def near(arm: str) -> tuple[Check, ...]:
        share = tuple(a / b for a, b in zip(seconds[arm], seconds[VANILLA], strict=True))
        return (
            below(f"bits per character, {arm} minus characters", bits.minus(arm, VANILLA), expected=0.1, refuted=0.2),
            below(f"time of a step, {arm} by characters", share, expected=1.0),
        )

    def held(arm: str) -> tuple[Check, ...]:
        return (between(f"share of cuts, {arm}", rates[arm], PRIOR - 0.05, PRIOR + 0.05),)

    def trained_well(arm: str) -> Check:
        lead = tuple(a - b for a, b in zip(pairs, bits[arm], strict=True))
        return above(f"bits per character, counted pairs minus {arm}", lead, expected=0.0)

    return Findings(
        seeds=seeds,
        parts=(
            Part(better, WORDS, knocked_out=(DRAWN, MOVED, EMPTY), against=(FIXED,)),
            Part(near, WORDS, knocked_out=(EMPTY,), against=(VANILLA,)),
            Part(held, GUMBEL, knocked_out=(FREE,)),
        ),
        gates=(
            *(gate(arm, trained_well(arm), losses[arm]) for arm in (WORDS, FIXED, VANILLA, GUMBEL, DRAWN, MOVED)),
            *(gate(arm, None, losses[arm]) for arm in (EMPTY, FREE)),
        ),
        checks=(
            above("bits per character, no cut minus words", bits.minus(EMPTY, WORDS), 0.0, in_rule=False),
            above("bits per character, lengths drawn minus words", bits.minus(DRAWN, WORDS), 0.0, in_rule=False),
            above("F1 of learned cuts against spaces", spaces, 0.5, in_rule=False),
        ),
        table=bits.table("bits per character") + rates.table("share of cuts") + seconds.table("seconds of a step"),
        figure=partial(_draw, bits=bits),
        notes=(
            "A word takes 5.8 characters with its space, so that fixed segments of 5 are the finer ones.",
            "The published model has 12 layers of width 512 and 200,000 steps of 8 times 2,048 characters.",
        ),
    )


def _draw(figure: Any, bits: Arms) -> None:
    draw_arms(figure.subplots(), bits, "bits per character of 8,000 characters")
