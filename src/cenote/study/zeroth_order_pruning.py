"""Of the image tokens of a small vision-language model, those chosen by the product of sensitivity and dissimilarity answer, at
4 and 8 of 64, at least as well as the better of its two parts (to a point), better than random ones by more than 5 points, and
better than with the sensitivities shuffled.

Refuted if the product is more than 2 points below the better part, or not above random tokens, or not above shuffled
sensitivities.

Canvases of 8 x 8 patches carry four coloured shapes of 2 x 2; the question names one, the answer is its colour. A LLaVA of
a drawn CLIP, a projector and a Llama of four blocks learns it; then 32, 16, 8 or 4 of the tokens enter the Llama.

Knocked out: which token is sensitive (sensitivities shuffled over the tokens of each image), and that it is this projector's
sensitivity (another one, as it was drawn; dissimilarities are the trained one's).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.compare.ranking import spearman
from cenote.models.live import Shorten, edited
from cenote.models.live.entering import features_entering
from cenote.reduce import TopAttentionTokens, losses_left_out, select, sensitivity
from cenote.study.harness import Arms, Check, Findings, Part, Size, above, below, draw_arms, gate, seeds_of, study
from cenote.study.harness.canvases import (
    CHANCE,
    STACK,
    STEPS,
    TEST,
    TRAIN,
    Canvases,
    canvases,
    colour_logits,
    small_llava,
    trained,
)

SEEDS = {"small": 3, "full": 5}
TOKENS = (32, 16, 8, 4)
FEW = (8, 4)
LEFT_OUT = (16, 64)
"""Items, and tokens of each, that are left out in turn."""
OTHERS = 1000
"""Between seeds of training and of tests, of drawn projectors, of shuffles."""

PRODUCT, SHUFFLED, OTHER = "product", "sensitivity shuffled", "sensitivity of a drawn projector"
BETTER, RANDOM = "the better of its parts", "random"


@study
def run(seed: int, size: Size) -> Findings:
    """Train one model per seed; answer with fewer tokens by each rule."""
    seeds = seeds_of(seed, size, **SEEDS)
    steps, items, drawn = (4, 16, 64) if size == "smoke" else (STEPS, TEST, TRAIN)
    counts, left_out = (FEW, (4, 4)) if size == "smoke" else (TOKENS, LEFT_OUT)
    by_tokens = {k: Arms() for k in counts}
    whole, blank, agreement, losses = [], [], [], []
    for one in seeds:
        model, curve = trained(one, steps, drawn)
        data = canvases(items, one + OTHERS)
        losses.append(curve)
        whole.append(_right(model, data))
        blank.append(_right(model, data._replace(pixels=torch.zeros_like(data.pixels))))
        scores = _scores(model, data, one)
        for k in counts:
            for name, value in _by_rule(model, data, scores, k, one).items():
                by_tokens[k][name] = (*by_tokens[k].get(name, ()), value)
        agreement.append(_with_left_out(model, data, scores[PRODUCT], *left_out))
    few = Arms({n: tuple(map(_mean, zip(*(by_tokens[k][n] for k in FEW), strict=True))) for n in by_tokens[FEW[0]]})
    few[BETTER] = tuple(map(max, few["sensitivity alone"], few["diversity alone"]))

    def rule(arm: str) -> tuple[Check, ...]:
        return (
            above(f"accuracy at 4 and 8 tokens, {arm} minus {BETTER}", few.minus(arm, BETTER), -0.01, -0.02),
            above(f"accuracy at 4 and 8 tokens, {arm} minus {RANDOM}", few.minus(arm, RANDOM), 0.05, 0.0),
            above(f"accuracy at 4 and 8 tokens, {arm} minus {SHUFFLED}", few.minus(arm, SHUFFLED), 0.01, 0.0),
        )

    learnt = partial(above, "accuracy of the model with all tokens", whole, 0.9)
    compared = (PRODUCT, BETTER, RANDOM)
    return Findings(
        seeds=seeds,
        parts=(Part(rule, PRODUCT, knocked_out=(SHUFFLED, OTHER), against=(BETTER, RANDOM)),),
        gates=tuple(gate(arm, learnt(), losses) for arm in (*compared, SHUFFLED, OTHER)),
        checks=(
            below("accuracy with the image blanked", blank, CHANCE + 0.1, in_rule=False),
            above(
                "rank correlation of sensitivity with the loss of leaving a token out", agreement, 0.0, in_rule=False
            ),
        ),
        table=[row for k in counts for row in by_tokens[k].table(f"accuracy, {k} of 64 tokens")],
        figure=partial(_draw, arms=few),
        notes=(
            f"Chance is {CHANCE:.2f}; with all tokens the accuracy is {_mean(whole):.3f}, with a blank image "
            f"{_mean(blank):.3f}. The vision tower is drawn and stays as it is: each patch's token holds what the patch shows.",
            "Attention rank drops tokens behind the second block of the Llama, the others before the first.",
        ),
    )


def _right(model: Any, data: Canvases) -> float:
    return float((colour_logits(model, data).argmax(1) == data.colours).double().mean())


@torch.no_grad()
def _scores(model: Any, data: Canvases, seed: int) -> dict[str, Float[Tensor, "items patches"]]:
    """Sensitivities of the trained projector, shuffled ones, and those of a drawn projector."""
    model_of = model.model
    states = model_of.vision_tower(data.pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
    own = sensitivity(model_of.multi_modal_projector, states, seed=seed)
    order = torch.rand(own.shape, generator=torch.Generator().manual_seed(seed)).argsort(1)
    drawn = small_llava(seed + OTHERS).model.multi_modal_projector
    return {PRODUCT: own, SHUFFLED: own.gather(1, order), OTHER: sensitivity(drawn, states, seed=seed)}


def _by_rule(model: Any, data: Canvases, scores: dict[str, Tensor], tokens: int, seed: int) -> dict[str, float]:
    """Accuracy with so many tokens, of each way to choose them."""
    own = scores[PRODUCT]
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        PRODUCT: lambda z: _chosen(own, z, tokens, "product"),
        "sum": lambda z: _chosen(own, z, tokens, "sum"),
        "sensitivity alone": lambda z: _chosen(own, z, tokens, "sensitivity"),
        "diversity alone": lambda z: _chosen(own, z, tokens, "diversity"),
        SHUFFLED: lambda z: _chosen(scores[SHUFFLED], z, tokens, "product"),
        OTHER: lambda z: _chosen(scores[OTHER], z, tokens, "product"),
        RANDOM: lambda z: _drawn(z, tokens, seed),
    }
    projector = model.model.multi_modal_projector
    found = {}
    for name, way in ways.items():
        with features_entering(model, projector, _of_rows(way), data.image, STACK):
            found[name] = _right(model, data)
    ranked = Shorten(TopAttentionTokens(tokens=tokens), 1, span="image", stack=STACK)
    with edited(model, ranked, spans={"image": data.image}):
        found["attention rank"] = _right(model, data)
    return found


def _of_rows(way: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda _, z: way(z)


def _chosen(scores: Tensor, z: Tensor, tokens: int, rule: Any) -> Bool[Tensor, "items patches"]:
    at = select(scores, z, torch.full((len(z),), tokens), rule=rule)
    return torch.zeros(z.shape[:2], dtype=torch.bool).scatter(1, at, True)


def _drawn(z: Tensor, tokens: int, seed: int) -> Bool[Tensor, "items patches"]:
    at = torch.rand(z.shape[:2], generator=torch.Generator().manual_seed(seed)).argsort(1)[:, :tokens]
    return torch.zeros(z.shape[:2], dtype=torch.bool).scatter(1, at, True)


def _with_left_out(model: Any, data: Canvases, scores: Tensor, items: int, tokens: int) -> float:
    """Rank correlation of sensitivity with how much the loss rises without a token; mean over some items."""
    few = Canvases(*(part[:items] for part in data))
    projector = model.model.multi_modal_projector

    def loss(kept: Tensor) -> Tensor:
        with features_entering(model, projector, lambda _, z: kept[:, : z.shape[1]], few.image, STACK):
            logits = colour_logits(model, few)
        return torch.nn.functional.cross_entropy(logits, few.colours, reduction="none")

    rises = losses_left_out(loss, few.image & (few.image.cumsum(1) <= tokens))[:, :tokens]
    return _mean([spearman(s.numpy(), r.numpy()) for s, r in zip(scores[:items, :tokens], rises, strict=True)])


def _mean(values: Any) -> float:
    found = list(values)
    return sum(found) / len(found)


def _draw(figure: Any, arms: Arms) -> None:
    draw_arms(figure.subplots(), arms, "accuracy, mean of 4 and 8 of 64 tokens")
