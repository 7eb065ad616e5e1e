"""One exponent per group of channels lets each group find its own pooling: fitted to a target that is the mean in one half
of the channels and the maximum in the other, GGeM's exponents become 1 (within 0.2) and more than 10, and its error is at
least 5 times below that of GeM, which has one exponent for all.

Refuted if an exponent ends outside of these bounds, or if GeM's error is less than 5 times GGeM's.

Also measured, not part of the rule: accuracy on sets of tiles where one of 16 is a digit (all weights trained), and accuracy
of a small vision transformer fine-tuned on digits, where the published margin of 0.1 to 0.7 points over other poolings is
too small to be seen; and retrieval of digits of classes that were never trained, by pooled maps of a convolutional net.

Knocked out: which channels share an exponent (every other channel, so that each group has mean and maximum channels alike), and
that exponents are learned (frozen where they start).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cenote.features.digits_mae import DigitsEncoder
from cenote.pool import GeM, GGeM, MaxPool, MeanPool, Pool
from cenote.study.ggem.retrieval import WIDTH as MAP_WIDTH
from cenote.study.ggem.retrieval import retrieved
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
from cenote.study.harness.data import backbone
from cenote.study.harness.tiles import WIDTH, classifiers, train_and_test
from cenote.study.harness.training import Together, accuracy, constant, cross_entropy, epochs, fit, steps_of

SETS, TOKENS, CHANNELS = 256, 20, 16
STEPS: dict[Size, int] = {"smoke": 20, "small": 400, "full": 400}
ITEMS: dict[Size, int] = {"smoke": 128, "small": 1200, "full": 1200}
FINE_TUNING: dict[Size, int] = {"smoke": 1, "small": 10, "full": 30}

ON_TILES: dict[str, Callable[[], Pool]] = {
    "mean": partial(MeanPool, WIDTH),
    "max": partial(MaxPool, WIDTH),
    "GeM": partial(GeM, WIDTH, p=4.0),
    "GGeM": partial(GGeM, WIDTH, groups=12, p=4.0),
}
ON_MAPS: dict[str, Callable[[], Pool]] = {
    "mean": partial(MeanPool, MAP_WIDTH),
    "max": partial(MaxPool, MAP_WIDTH),
    "GeM": partial(GeM, MAP_WIDTH),
    "GGeM": partial(GGeM, MAP_WIDTH, groups=8),
}
# the exponents barely move at the learning rate of the network, so the comparison is also run with one of their own
FAST = 0.05
HEADS = 4
TOKENS_OF: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform": lambda u: u,
    "half-normal": lambda u: torch.erfinv(u),
    "exponential": lambda u: -torch.log1p(-u),
}


class Scattered(GGeM):
    """GGeM whose groups are every other channel."""

    def _exponent(self) -> Float[Tensor, "dim"]:
        return self.p.repeat(self.dim // self.groups)


SCATTERED, FROZEN = "GGeM, groups scattered", "GGeM, exponents frozen"
FITTED: dict[str, Callable[[], Pool]] = {
    "GGeM": partial(GGeM, CHANNELS, groups=2),
    "GeM": partial(GeM, CHANNELS),
    SCATTERED: partial(Scattered, CHANNELS, groups=2),
    FROZEN: partial(GGeM, CHANNELS, groups=2, learnable=False),
}


class Mechanism(NamedTuple):
    """What the fit to a known target gave: exponents of each group and errors on fresh sets, of each arm, and losses."""

    exponents: Arms
    errors: Arms
    losses: dict[str, list[float]]

    def ratio(self, arm: str) -> tuple[float, ...]:
        """GeM's error over that of an arm."""
        return tuple(a / b for a, b in zip(self.errors["GeM"], self.errors[arm], strict=True))


@study
def run(seed: int, size: Size) -> Findings:
    """Fit exponents to a known target; then compare poolings on tiles and in fine-tuning."""
    seeds = seeds_of(seed, size)
    steps = STEPS[size]
    fitted = _mechanism(seeds, steps, "uniform")
    longer = _mechanism(seeds, 4 * steps, "uniform").ratio("GGeM")
    others = {name: _mechanism(seeds, steps, name).ratio("GGeM") for name in TOKENS_OF if name != "uniform"}
    tiles, moved = _tiles(seeds, size)
    tuned = _fine_tuned(seeds, size)
    found = Arms({name: retrieved(pool, seeds, size) for name, pool in ON_MAPS.items()})
    what = "GeM's error over GGeM's"

    def rule(arm: str) -> tuple[Check, ...]:
        near_one = tuple(abs(p - 1) for p in fitted.exponents[f"{arm}, mean channels"])
        return (
            above(f"GeM's error over that of {arm}", fitted.ratio(arm), expected=5.0),
            below(f"distance of the mean channels' exponent from 1, {arm}", near_one, expected=0.2),
            above(
                f"exponent of the maximum channels, {arm}", fitted.exponents[f"{arm}, maximum channels"], expected=10.0
            ),
        )

    def nearer(arm: str) -> Check:
        return above("squared error of the mean minus its own", fitted.errors.minus("mean", arm), expected=0.0)

    return Findings(
        seeds=seeds,
        parts=(Part(rule, "GGeM", knocked_out=(SCATTERED, FROZEN), against=("GeM",)),),
        gates=(
            *(gate(arm, nearer(arm), fitted.losses[arm]) for arm in ("GGeM", "GeM", SCATTERED)),
            gate(FROZEN, None, None),
        ),
        checks=(
            above(f"{what}, 4 times the steps", longer, expected=5.0, in_rule=False),
            *(above(f"{what}, {name} tokens", r, expected=5.0, in_rule=False) for name, r in others.items()),
            above("tiles: accuracy, GeM minus mean", tiles.minus("GeM", "mean"), expected=0.0, in_rule=False),
            above("tiles: accuracy, GGeM minus GeM", tiles.minus("GGeM", "GeM"), expected=0.0, in_rule=False),
            above(
                "tiles: accuracy, GGeM minus GeM, fast exponents",
                tiles.minus("GGeM, fast exponents", "GeM, fast exponents"),
                expected=0.0,
                in_rule=False,
            ),
            *(
                between(f"fine-tuned: accuracy, GGeM minus {arm}", tuned.minus("GGeM", arm), -0.01, 0.01, in_rule=False)
                for arm in ("mean", "max", "GeM")
            ),
            *(
                above(
                    f"retrieval: mean average precision, GGeM minus {arm}",
                    found.minus("GGeM", arm),
                    expected=0.0,
                    in_rule=False,
                )
                for arm in ("mean", "max", "GeM")
            ),
        ),
        table=[
            *fitted.exponents.table("exponent"),
            *fitted.errors.table("mean squared error"),
            *tiles.table("accuracy on tiles"),
            *moved.table("largest change of an exponent on tiles"),
            *tuned.table("accuracy, fine-tuned"),
            *found.table("mean average precision, unseen classes"),
        ],
        figure=partial(_draw, exponents=fitted.exponents, tiles=tiles, tuned=tuned),
        notes=(
            "The rule checks the mechanism. The paper's claim is accuracy on ImageNet-1K after fine-tuning (0.1 to 0.7 points "
            "over the baselines); the two comparisons of accuracy here are far too small to confirm or refute that margin.",
            "GGeM's remaining error stands in the maximum channels: their exponent is still growing when the steps end. "
            "Tokens are uniform in [0, 1) and exponents start at 3; the bound of 5 was fixed before they were chosen.",
            "Retrieval: trained on digits 0 to 5 at random places of a canvas, asked for 6 to 9; every digit is a query for "
            "all others of its class, by cosine of the pooled map.",
            "At the learning rate of the network the exponents stay close to where they start, so that GeM and GGeM are nearly "
            "the same function; with fast exponents they have a learning rate of 0.05 of their own.",
        ),
        tried=(
            "The mechanism with uniform tokens, 400 steps, as the rule says: the first run and the one that counts. Its ratio "
            "fell short of 5, so longer fits and other token distributions were added as further checks, outside the rule.",
        ),
    )


def _mechanism(seeds: tuple[int, ...], steps: int, tokens: str) -> Mechanism:
    x, y = _mean_and_maximum(seeds, tokens)
    fresh_x, fresh_y = _mean_and_maximum(tuple(s + 1000 for s in seeds), tokens)
    fitted = Mechanism(Arms(), Arms(mean=_per_seed(fresh_x.mean(2) - fresh_y)), {})
    for name, pool in FITTED.items():
        model = Together(pool, seeds)
        if name != FROZEN:
            batches = itertools.repeat((x, y))
            fit(model, batches, F.mse_loss, steps, 0.05, optimiser=torch.optim.Adam, decay=constant)
        fitted.losses[name] = model.losses
        with torch.no_grad():
            fitted.errors[name] = _per_seed(model(fresh_x) - fresh_y)
        of_groups = model.parameters["p"].detach().T.tolist()
        # of scattered groups, which have both, the first and the second
        parts = ("all channels",) if name == "GeM" else ("mean channels", "maximum channels")
        fitted.exponents.update({f"{name}, {part}": tuple(p) for part, p in zip(parts, of_groups, strict=True)})
    return fitted


def _per_seed(difference: Float[Tensor, "seeds sets channels"]) -> tuple[float, ...]:
    return tuple(difference.square().flatten(1).mean(1).tolist())


def _mean_and_maximum(seeds: tuple[int, ...], tokens: str) -> tuple[Tensor, Tensor]:
    drawn = [torch.rand(SETS, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(s)) for s in seeds]
    x = TOKENS_OF[tokens](torch.stack(drawn))
    half = CHANNELS // 2
    return x, torch.cat([x[..., :half].mean(2), x[..., half:].amax(2)], -1)


def _tiles(seeds: tuple[int, ...], size: Size) -> tuple[Arms, Arms]:
    """Accuracy, and how far the exponents moved."""
    train, test = train_and_test(seeds, size)
    arms, moved = Arms(), Arms()
    rates: dict[str, dict[str, float] | None] = dict.fromkeys(ON_TILES)
    rates |= {f"{name}, fast exponents": {"pool.p": FAST} for name in ("GeM", "GGeM")}
    for name, own_rates in rates.items():
        model = classifiers(ON_TILES[name.partition(",")[0]], train, seeds, size, own_rates)
        arms[name] = accuracy(model, test.x, test.y)
        if "pool.p" in model.parameters:
            change = (model.parameters["pool.p"].detach() - model.base.get_parameter("pool.p")).abs()
            moved[name] = tuple(change.amax(1).tolist())
    return arms, moved


class FineTuned(nn.Module):
    """The digits backbone, a pooling of its patch tokens, a linear classifier; all of it is trained."""

    def __init__(self, encoder: DigitsEncoder, pool: Pool) -> None:
        super().__init__()
        self.encoder = encoder
        self.pool = pool
        self.classifier = nn.Linear(pool.out_dim, 10)

    def forward(self, images: Float[Tensor, "batch 8 8"]) -> Float[Tensor, "batch classes"]:
        return self.classifier(self.pool(self.encoder(images)[:, 1:]))


def _tuned(pool: Callable[[], Pool]) -> FineTuned:
    return FineTuned(backbone().encoder, pool())


def _fine_tuned(seeds: tuple[int, ...], size: Size) -> Arms:
    encoder, train, test = backbone()
    dim, items, batch = encoder.norm.normalized_shape[0], ITEMS[size], 64
    x, y = (v[:items].expand(len(seeds), *v[:items].shape) for v in train)
    test_x, test_y = (v.expand(len(seeds), *v.shape) for v in test)
    pools: dict[str, Callable[[], Pool]] = {
        "mean": partial(MeanPool, dim),
        "max": partial(MaxPool, dim),
        "GeM": partial(GeM, dim),
        # as many groups as the backbone has heads
        "GGeM": partial(GGeM, dim, groups=HEADS),
    }
    arms = Arms()
    for name, pool in pools.items():
        model = Together(partial(_tuned, pool), seeds)
        fit(model, epochs(x, y, batch, seeds), cross_entropy, steps_of(items, batch, FINE_TUNING[size]), 1e-3)
        arms[name] = accuracy(model, test_x, test_y)
    return arms


def _draw(figure: Any, exponents: Arms, tiles: Arms, tuned: Arms) -> None:
    first, second, third = figure.subplots(1, 3)
    whole = {name: values for name, values in exponents.items() if not name.startswith((SCATTERED, FROZEN))}
    halves = {name.replace("channels", "half").replace("all half", "all"): values for name, values in whole.items()}
    draw_arms(first, Arms(halves), "fitted exponent")
    draw_arms(second, Arms({name: tiles[name] for name in ON_TILES}), "accuracy on tiles")
    draw_arms(third, tuned, "accuracy, tuned")
