"""GistPool answers questions about a compressed context better than gisting does, by more than 2 points, and at least as well
as average pooling (within 2 points), with 2 and with 4 tokens per gist.

Refuted if GistPool's lead over gisting is no more than 2 points, or if it is 5 points or more behind average pooling, at either
ratio.

A context is eight facts in any order, each one token that stands for a key and a value; then eight keys are asked for, one
after the other, and the value is the answer. A decoder of two blocks learns this with the whole context; then every arm trains
copies of its weights, as many steps. Gisting is given two sets of weights, as GistPool has; GistPool has the shift, the spread
and the window mask besides.

Knocked out: the window mask (gists read all that stands before them), and the context (at test, that of another item).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from cenote.core.answers import UNASKED, answer_loss
from cenote.models.own_weights import OwnWeights
from cenote.reduce.gistpool.compressors import AveragePool, Compressor, FullContext, GistPool, NoContext
from cenote.reduce.gistpool.training import AskedContexts, train_compressor
from cenote.study.harness import Arms, Check, Findings, Part, Size, above, below, gate, seeds_of, study
from cenote.study.harness.training import descend

SEEDS = {"small": 3, "full": 5}
KEYS, VALUES, FACTS = 10, 5, 8
WIDTH, BLOCKS, HEADS, SPREAD_OF_WEIGHTS = 32, 2, 4, 0.1
RATIOS = (2, 4)
STEPS: dict[Size, int] = {"smoke": 2, "small": 300, "full": 1000}
BASE_STEPS: dict[Size, int] = {"smoke": 2, "small": 300, "full": 600}
BATCH, TEST = 32, 256
BASE_RATE, RATE = 3e-3, 5e-3
CHANCE, KNOWN = 0.2, 0.95

POOLED, AVERAGE, GIST, OPEN, SWAPPED, WHOLE, NONE = (
    "GistPool",
    "average pooling",
    "gisting, two sets of weights",
    "GistPool, open window",
    "GistPool, another's context",
    "whole context",
    "no context",
)
MAKES: dict[str, Callable[[nn.Module, int], Compressor]] = {
    POOLED: partial(GistPool, adapt=OwnWeights),
    AVERAGE: partial(AveragePool, adapt=OwnWeights),
    GIST: partial(GistPool.plain, separate=True, adapt=OwnWeights),
    OPEN: partial(GistPool, window=False, adapt=OwnWeights),
}


@study
def run(seed: int, size: Size) -> Findings:
    """Train one decoder per seed and, from it, every arm at both ratios; ask for all facts of new contexts."""
    seeds = seeds_of(seed, size, **SEEDS)
    found: dict[tuple[str, int], list[float]] = {}
    curves: dict[str, list[list[float]]] = {arm: [] for arm in (*MAKES, WHOLE)}
    bounds: dict[str, list[float]] = {WHOLE: [], NONE: []}
    for s in seeds:
        model, losses = _decoder(s, BASE_STEPS[size])
        curves[WHOLE].append(losses)
        test = facts(TEST, torch.Generator().manual_seed(10_000 + s))
        bounds[WHOLE].append(_right(FullContext(model, adapt=None), model, test))
        bounds[NONE].append(_right(NoContext(model, adapt=None), model, test))
        for arm, make in MAKES.items():
            for ratio in RATIOS:
                torch.manual_seed(s)
                compressor, draws = make(model, ratio), torch.Generator().manual_seed(s)
                curves[arm].append(
                    train_compressor(compressor, model, lambda d=draws: facts(BATCH, d), steps=STEPS[size], lr=RATE)  # type: ignore[misc]
                )
                found.setdefault((arm, ratio), []).append(_right(compressor, model, test))
                if arm == POOLED:
                    swapped = test._replace(context=test.context.roll(1, 0))
                    found.setdefault((SWAPPED, ratio), []).append(_right(compressor, model, swapped))
    by_ratio = {ratio: Arms() for ratio in RATIOS}
    for ratio, arms in by_ratio.items():
        for arm in (*MAKES, SWAPPED):
            arms[arm] = tuple(found[arm, ratio])

    def against_gisting(arm: str) -> tuple[Check, ...]:
        return tuple(
            above(f"accuracy at {ratio} tokens per gist, {arm} minus gisting", arms.minus(arm, GIST), 0.02, 0.02)
            for ratio, arms in by_ratio.items()
        )

    def against_average(arm: str) -> tuple[Check, ...]:
        return tuple(
            above(f"accuracy at {ratio} tokens per gist, {arm} minus average", arms.minus(arm, AVERAGE), -0.02, -0.05)
            for ratio, arms in by_ratio.items()
        )

    def least(arm: str) -> Check:
        worst = np.min([by_ratio[ratio][arm] for ratio in RATIOS], 0).tolist()
        return above("accuracy, the lower of both ratios", worst, CHANCE)

    return Findings(
        seeds=seeds,
        parts=(
            Part(against_gisting, POOLED, knocked_out=(OPEN, SWAPPED), against=(GIST,)),
            Part(against_average, POOLED, knocked_out=(OPEN, SWAPPED), against=(AVERAGE,)),
        ),
        gates=(
            gate(WHOLE, above("accuracy with the whole context", bounds[WHOLE], KNOWN), curves[WHOLE]),
            gate(NONE, below("accuracy without a context", bounds[NONE], CHANCE + 0.05), None),
            *(gate(arm, least(arm), curves[arm]) for arm in (POOLED, AVERAGE, GIST)),
            gate(OPEN, None, curves[OPEN]),
            gate(SWAPPED, None, None),
        ),
        checks=tuple(
            above(f"at {ratio} tokens per gist, {text}", values, 0.0, in_rule=False)
            for ratio, arms in by_ratio.items()
            for text, values in (
                ("the window mask: GistPool minus open window", arms.minus(POOLED, OPEN)),
                ("average pooling minus gisting", arms.minus(AVERAGE, GIST)),
                ("whole context minus GistPool", np.subtract(bounds[WHOLE], arms[POOLED]).tolist()),
            )
        ),
        table=[row for ratio, arms in by_ratio.items() for row in arms.table(f"accuracy, {ratio} tokens per gist")],
        figure=partial(_draw, by_ratio=by_ratio, curves=curves),
        notes=(
            "A fact is one token, not a key and a value, so that the decoder learns to recall within seconds.",
            "The seeds differ in the decoder, in its training and in that of every arm. Without a context no training can beat "
            "chance, as values are drawn evenly; that arm is the decoder as it is.",
        ),
    )


def facts(items: int, generator: torch.Generator) -> AskedContexts:
    """Contexts of facts, and prompts that ask for all of them: a key, its value, the next key.

    >>> asked = facts(3, torch.Generator().manual_seed(0))
    >>> asked.context.shape, asked.prompt.shape, int((asked.labels != UNASKED).sum())
    (torch.Size([3, 8]), torch.Size([3, 16]), 24)
    """
    keys = torch.rand(items, KEYS, generator=generator).argsort(1)[:, :FACTS]
    values = torch.randint(VALUES, (items, FACTS), generator=generator)
    order = torch.rand(items, FACTS, generator=generator).argsort(1)
    asked, told = KEYS * VALUES + keys.gather(1, order), KEYS * VALUES + KEYS + values.gather(1, order)
    prompt = torch.stack([asked, told], 2).flatten(1)
    labels = prompt.clone()
    labels[:, ::2] = UNASKED
    return AskedContexts(keys * VALUES + values, prompt, labels)


def _decoder(seed: int, steps: int) -> tuple[nn.Module, list[float]]:
    """A decoder that recalls facts from a whole context, and the losses of its training."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=KEYS * VALUES + KEYS + VALUES,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=BLOCKS,
            num_attention_heads=HEADS,
            max_position_embeddings=128,
            initializer_range=SPREAD_OF_WEIGHTS,
        )
    )
    draws = torch.Generator().manual_seed(seed)

    def loss() -> torch.Tensor:
        asked = facts(BATCH, draws)
        logits = model(torch.cat([asked.context, asked.prompt], 1), use_cache=False).logits
        return answer_loss(logits[:, FACTS:], asked.labels)

    losses = descend(model.parameters(), (loss() for _ in range(steps)), steps, BASE_RATE, clip=1.0)
    return model.eval(), losses


@torch.no_grad()
def _right(compressor: Compressor, model: nn.Module, asked: AskedContexts) -> float:
    """Share of the facts of which the value is the likeliest token."""
    logits = compressor(model, asked.context, asked.prompt)[:, :-1]
    gold = asked.labels[:, 1:]
    return float((logits.argmax(-1) == gold)[gold != UNASKED].float().mean())


def _draw(figure: Any, by_ratio: dict[int, Arms], curves: dict[str, list[list[float]]]) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    names = list(by_ratio[RATIOS[0]])
    for number, (ratio, arms) in enumerate(by_ratio.items()):
        means = [float(np.mean(arms[name])) for name in names]
        left.barh([n + 0.4 * number for n in range(len(names))], means, height=0.38, label=f"{ratio} tokens per gist")
    left.set_yticks([n + 0.2 for n in range(len(names))], names)
    left.set_xlabel("accuracy, all facts of 256 contexts")
    left.legend(fontsize=8)
    for arm in MAKES:
        curve = np.mean(curves[arm], 0)
        width = max(1, len(curve) // 30)
        right.plot(np.convolve(curve, np.ones(width) / width, "valid"), label=arm)
    right.set_xlabel("step")
    right.set_ylabel("loss of answers, mean of both ratios")
    right.legend(fontsize=7)
