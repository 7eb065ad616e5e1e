"""With one token per frame in its sequence, a decoder whose dual layers read all tokens from outside answers questions about
single places in four frames far better than with these tokens alone (by more than 20 points), and nearly as well as with all
tokens in its sequence (within 5 points).

Refuted if dual layers gain no more than 5 points over merged tokens alone, or stay 20 points or more behind all tokens.

A frame is a grid of 3 x 3 tokens, each of which shows its frame's number and its row; in each row one of them shows one of
eight signs. The questions are of a frame and a row, all twelve of a clip one after the other, and the sign is the answer.
Tokens are given as they are, with noise: no encoder is trained that could put into a frame's mean what dual layers are to
fetch. All arms start from the same decoder of random weights and are trained for as many steps; gates have ten times the
rate of weights.

Knocked out: the memory (the dual layers read merged tokens, each as often as its frame has tokens, in training and test), and
the clip (at test, the memory is that of another one).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core.answers import UNASKED
from cenote.reduce.crosslmm.model import CrossLMM, Seen
from cenote.reduce.crosslmm.training import Clips, train_crosslmm, training_stage
from cenote.study.harness import Arms, Check, Findings, Part, Size, above, draw_arms, gate, seeds_of, study

SEEDS = {"small": 3, "full": 5}
FRAMES, SIDE, SIGNS, NOISE = 4, 3, 8, 0.1
DIM = SIGNS + FRAMES + SIDE
WIDTH, BLOCKS, HEADS, EVERY, SPREAD_OF_WEIGHTS = 48, 2, 4, 1, 0.1
STEPS: dict[Size, int] = {"smoke": 2, "small": 250, "full": 1000}
BATCH, TEST, RATE, GATE_RATE = 32, 256, 5e-3, 5e-2
CHANCE, KNOWN = 1 / SIGNS, 0.9
PLACEHOLDER = 0
"""The first token; behind it stand the questions, then the signs."""

MERGED, DUAL, V2V, WHOLE, SAME, SWAPPED = (
    "merged tokens alone",
    "dual layers",
    "dual layers, V2V only",
    "all tokens in the sequence",
    "dual layers, memory of merged tokens",
    "dual layers, memory of another clip",
)


class Repeating(CrossLMM):
    """Dual layers that read merged tokens, each as often as its frame has tokens."""

    def see(
        self, frames: Float[Tensor, "batch frames *size"], frame_mask: Bool[Tensor, "batch frames"] | None = None
    ) -> Seen:
        seen = super().see(frames, frame_mask)
        times = seen.originals.shape[1] // seen.tokens.shape[1]
        return seen._replace(originals=seen.tokens.repeat_interleave(times, 1))


MAKES: dict[str, Callable[[nn.Module], CrossLMM]] = {
    MERGED: partial(CrossLMM, dual=False, side=1),
    DUAL: partial(CrossLMM, side=1),
    V2V: partial(CrossLMM, side=1, layer={"text": False}),
    WHOLE: partial(CrossLMM, dual=False, side=SIDE),
    SAME: partial(Repeating, side=1),
}


class Shown(NamedTuple):
    """Clips, the numbers of the questions about them, and the signs that answer these."""

    frames: Float[Tensor, "clips frames tokens dim"]
    asked: Int[Tensor, "clips questions"]
    told: Int[Tensor, "clips questions"]


@study
def run(seed: int, size: Size) -> Findings:
    """Train every arm on the same clips; ask all questions of new ones."""
    seeds = seeds_of(seed, size, **SEEDS)
    found: dict[str, list[float]] = {arm: [] for arm in (*MAKES, SWAPPED)}
    curves: dict[str, list[list[float]]] = {arm: [] for arm in MAKES}
    gates: list[dict[int, dict[str, float]]] = []
    for s in seeds:
        test = clips(TEST, torch.Generator().manual_seed(10_000 + s))
        for arm, make in MAKES.items():
            model, draws = _model(make, s), torch.Generator().manual_seed(s)
            groups = training_stage(model, 2, lr=RATE, gate_lr=GATE_RATE)
            curves[arm].append(
                train_crosslmm(model, lambda m=model, d=draws: asked(m, clips(BATCH, d)), groups, steps=STEPS[size])  # type: ignore[misc]
            )
            found[arm].append(_right(model, test))
            if arm == DUAL:
                found[SWAPPED].append(_right(model, test, swapped=True))
                gates.append(model.gates())
    arms = Arms({arm: tuple(values) for arm, values in found.items()})

    def rule(arm: str) -> tuple[Check, ...]:
        return (
            above(f"accuracy, {arm} minus {MERGED}", arms.minus(arm, MERGED), 0.20, 0.05),
            above(f"accuracy, {arm} minus {WHOLE}", arms.minus(arm, WHOLE), -0.05, -0.20),
        )

    return Findings(
        seeds=seeds,
        parts=(Part(rule, DUAL, knocked_out=(SAME, SWAPPED), against=(MERGED, WHOLE)),),
        gates=(
            gate(WHOLE, above(f"accuracy, {WHOLE}", arms[WHOLE], KNOWN), curves[WHOLE]),
            *(gate(arm, above("accuracy", arms[arm], CHANCE), curves[arm]) for arm in (DUAL, MERGED)),
            gate(SAME, None, curves[SAME]),
            gate(SWAPPED, None, None),
        ),
        checks=(
            above(f"accuracy, {V2V} minus {MERGED}", arms.minus(V2V, MERGED), 0.0, in_rule=False),
            above(f"accuracy, {DUAL} minus {V2V}", arms.minus(DUAL, V2V), 0.0, in_rule=False),
        ),
        table=arms.table("accuracy"),
        figure=partial(_draw, arms=arms, curves=curves),
        notes=(
            f"Tokens in the sequence beside the questions: {FRAMES} with merged tokens and dual layers, {FRAMES * SIDE**2} "
            f"with all. The encoder is frozen in all arms: it gives tokens as they are.",
            "Gates after training, tanh, means over the seeds: " + _said(gates) + ".",
        ),
    )


def clips(items: int, generator: torch.Generator) -> Shown:
    """Frames of signs, and all questions about each clip in a fresh order.

    >>> shown = clips(2, torch.Generator().manual_seed(0))
    >>> shown.frames.shape, shown.told.shape
    (torch.Size([2, 4, 9, 15]), torch.Size([2, 12]))
    """
    rows = torch.arange(SIDE).repeat_interleave(SIDE)
    sign = torch.randint(SIGNS, (items, FRAMES, SIDE), generator=generator)
    column = torch.randint(SIDE, (items, FRAMES, SIDE), generator=generator)
    there = F.one_hot(column, SIDE).flatten(2)[..., None]
    shown = there * F.one_hot(sign, SIGNS)[:, :, rows]
    number = F.one_hot(torch.arange(FRAMES), FRAMES)[:, None].expand(items, -1, SIDE**2, -1)
    row = F.one_hot(rows, SIDE).expand(items, FRAMES, -1, -1)
    frames = torch.cat([shown, number, row], -1).float()
    frames = frames + NOISE * torch.randn(frames.shape, generator=generator)
    order = torch.rand(items, FRAMES * SIDE, generator=generator).argsort(1)
    return Shown(frames, order, sign.flatten(1).gather(1, order))


def asked(model: CrossLMM, shown: Shown) -> Clips:
    """The clips as a model is told of them: placeholders, a question, its answer, the next question."""
    questions, answers = 1 + shown.asked, 1 + FRAMES * SIDE + shown.told
    ids, mask = model.prompt(torch.stack([questions, answers], 2).flatten(1), shown.frames)
    words = 2 * questions.shape[1]
    labels = torch.full_like(ids, UNASKED)
    labels[:, -words + 1 :: 2] = answers
    return Clips(ids, labels, shown.frames, mask)


def _model(make: Callable[..., CrossLMM], seed: int) -> CrossLMM:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=1 + FRAMES * SIDE + SIGNS,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=128,
        initializer_range=SPREAD_OF_WEIGHTS,
    )
    return make(Qwen2ForCausalLM(config), nn.Identity(), dim=DIM, placeholder=PLACEHOLDER, every=EVERY)


@torch.no_grad()
def _right(model: CrossLMM, shown: Shown, swapped: bool = False) -> float:
    """Share of the questions of which the right sign is the likeliest token."""
    told = asked(model, shown)
    seen = model.see(shown.frames)
    if swapped:
        seen = seen._replace(originals=seen.originals.roll(1, 0))
    logits = model.run(told.ids, seen, told.mask)[:, :-1]
    gold = told.labels[:, 1:]
    return float((logits.argmax(-1) == gold)[gold != UNASKED].float().mean())


def _said(gates: list[dict[int, dict[str, float]]]) -> str:
    """Means of gates over seeds, block by block, in words."""
    return "; ".join(
        f"block {block} " + ", ".join(f"{kind} {np.mean([g[block][kind] for g in gates]):.2f}" for kind in of_block)
        for block, of_block in gates[0].items()
    )


def _draw(figure: Any, arms: Arms, curves: dict[str, list[list[float]]]) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    draw_arms(left, arms, f"accuracy, all questions about {TEST} clips")
    for arm, of_seeds in curves.items():
        right.plot(np.mean(of_seeds, 0), label=arm)
    right.set_xlabel("step")
    right.set_ylabel("loss of answers")
    right.legend(fontsize=7)
