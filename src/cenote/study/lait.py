"""An encoder of six layers answers questions about another segment as well when its first four layers see one segment at a time
(within 2 points), not when all six do (more than 20 points lost); and with segments kept, all pairs of 50 and 50 are scored at
least three times as fast.

Refuted if four layers apart, or two, lose 5 points or more, if six lose 20 or less, or if keeping makes scoring less than twice
as fast.

The first segment is 16 pairs of a key and a value, the second 4 questions, each a key and a value; the answer is whether the
values are those of the keys. It cannot be told from the segments alone. All arms are one encoder with the mean of all tokens
and a linear layer, trained by the same steps; only who reads whom differs.

Knocked out: the joint layers (all six layers are apart, which is the same as the last two blocked at P = 4); the segments (the
first four layers read within random groups of 16 and 4 tokens); the first four layers, left out. Of keeping: P = 0, where there
is nothing to keep but embeddings.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from cenote.reduce import LAITEncoder, relative_pairs
from cenote.study.harness import Arms, Check, Findings, Part, Size, above, below, draw_arms, gate, seeds_of, study
from cenote.study.harness.training import Together, cross_entropy, fit, outputs

SEEDS = {"small": 3, "full": 5}
PAIRS, QUESTIONS, VALUES = 16, 4, 4
LAYERS, DIM, HEADS, INNER = 6, 32, 2, 64
STEPS = {"smoke": 2, "small": 800, "full": 3000}
TEST = {"smoke": 16, "small": 1000, "full": 1000}
BATCH, RATE = 32, 2e-3
SIDE = {"smoke": 3, "small": 50, "full": 50}
TOKENS = PAIRS + QUESTIONS
CHANCE = 0.5

SPLITS = {"P = 0": 0, "P = 2": 2, "P = 4": 4}
WHOLE, SPLIT, APART = "P = 0", "P = 4", "P = 6"
GROUPS, SKIPPED = "P = 4, random groups", "P = 4, first layers left out"


class Block(nn.Module):
    """Attention under a mask, and a network of two layers, behind norms."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.output = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.network = nn.Sequential(nn.Linear(DIM, INNER), nn.GELU(), nn.Linear(INNER, DIM))

    def forward(
        self, hidden_states: Float[Tensor, "batch tokens dim"], mask: Shaped[Tensor, "batch 1 _queries tokens"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """`mask`: True = may be read."""
        qkv = self.qkv(self.norm1(hidden_states)).unflatten(-1, (3, HEADS, -1)).movedim(-3, 0).transpose(2, 3)
        y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], mask)
        h = hidden_states + self.output(y.transpose(1, 2).flatten(2))
        return h + self.network(self.norm2(h))


class Reader(nn.Module):
    """An encoder of pairs: a token is the number of a key, a value and a segment."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(2 * PAIRS * VALUES, DIM)
        keys, values, kinds = (torch.randn(n, DIM) for n in (PAIRS, VALUES, 2))
        # a pair is the sum of its parts
        whole = kinds[:, None, None] + keys[None, :, None] + values[None, None]
        self.words.weight.data.copy_(whole.flatten(0, 2))
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(
        self, input_ids: Int[Tensor, "batch tokens"], attention_mask: Int[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """All blocks over all real tokens."""
        mask = (attention_mask > 0)[:, None, None]
        h = self.words(input_ids)
        for block in self.blocks:
            h = block(h, mask)
        return h


class Answers(nn.Module):
    """A `Reader` in which who reads whom is said, and a head."""

    def __init__(self, split: int, skip: int = 0) -> None:
        super().__init__()
        self.reader, self.head = Reader(), nn.Linear(DIM, 2)
        self.split, self.skip = split, skip

    def forward(self, x: Int[Tensor, "batch 2 tokens"]) -> Float[Tensor, "batch 2"]:
        """Whether the values are those of the keys; `x` holds numbers of tokens and of groups."""
        group = x[:, 1]
        apart = (group[:, :, None] == group[:, None])[:, None]
        h = self.reader.words(x[:, 0])
        for number, block in enumerate(self.reader.blocks):
            if number >= self.skip:
                h = block(h, apart if number < self.split else torch.ones_like(apart))
        return self.head(h.mean(1))


def items_of(count: int, generator: torch.Generator, random_groups: bool) -> tuple[Tensor, Tensor]:
    """Tokens and groups `[items, 2, tokens]`, and whether all questions have the values of the pairs (half of them)."""
    keys = torch.rand(count, PAIRS, generator=generator).argsort(1)
    values = torch.randint(VALUES, (count, PAIRS), generator=generator)
    chosen = torch.rand(count, PAIRS, generator=generator).argsort(1)[:, :QUESTIONS]
    asked, said = keys.gather(1, chosen), values.gather(1, chosen)
    y = torch.randint(2, (count,), generator=generator)
    other = (said + torch.randint(1, VALUES, said.shape, generator=generator)) % VALUES
    said = torch.where(y[:, None] == 1, said, other)
    tokens = torch.cat([keys * VALUES + values, (PAIRS + asked) * VALUES + said], 1)
    group = torch.cat([torch.zeros(PAIRS), torch.ones(QUESTIONS)]).long().expand(count, -1)
    if random_groups:
        group = group.gather(1, torch.rand(count, TOKENS, generator=generator).argsort(1))
    return torch.stack([tokens, group], 1), y


def batches(seeds: tuple[int, ...], random_groups: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Without end, each seed's own; the same items for all arms, whatever their groups."""
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    while True:
        found = [items_of(BATCH, g, random_groups) for g in generators]
        yield torch.stack([x for x, _ in found]), torch.stack([y for _, y in found])


@study
def run(seed: int, size: Size) -> Findings:
    """Train every arm; compare accuracy, pairs of tokens, and the time of scoring all pairs of two lists."""
    seeds = seeds_of(seed, size, **SEEDS)
    arms, losses, lait = Arms(), {}, {}
    made = {**SPLITS, APART: LAYERS, GROUPS: 4, SKIPPED: 4}
    for name, split in made.items():
        model = Together(partial(Answers, split, split if name == SKIPPED else 0), seeds)
        fit(model, batches(seeds, name == GROUPS), cross_entropy, STEPS[size], RATE)
        tests = [items_of(TEST[size], torch.Generator().manual_seed(1000 + s), name == GROUPS) for s in seeds]
        x, y = torch.stack([x for x, _ in tests]), torch.stack([y for _, y in tests])
        arms[name] = tuple((outputs(model, x).argmax(-1) == y).double().mean(1).tolist())
        losses[name] = model.losses
        if name in SPLITS:
            lait[name] = [Scorer(m, split) for m in model.modules()]
            agree = [s.agrees(xs) for s, xs in zip(lait[name], x, strict=True)]
            assert all(agree), f"{name}: LAITEncoder gives other answers than the encoder that was trained"
    speed = Arms()
    for name in (WHOLE, SPLIT):
        speed[name] = tuple(s.speed_up(SIDE[size], seeds[n]) for n, s in enumerate(lait[name]))

    def rule(arm: str) -> tuple[Check, ...]:
        return (
            below(f"accuracy, {WHOLE} minus {arm}", arms.minus(WHOLE, arm), expected=0.02, refuted=0.05),
            below(f"accuracy, {WHOLE} minus P = 2", arms.minus(WHOLE, "P = 2"), expected=0.02, refuted=0.05),
            above(f"accuracy, {arm} minus {APART}", arms.minus(arm, APART), expected=0.2),
        )

    def faster(arm: str) -> tuple[Check, ...]:
        return (above(f"time without keeping by time with it, {arm}", speed[arm], expected=3.0, refuted=2.0),)

    pairs = {name: f"{relative_pairs([PAIRS, QUESTIONS], LAYERS, split):.2f}" for name, split in made.items()}
    return Findings(
        seeds=seeds,
        parts=(
            Part(rule, SPLIT, knocked_out=(APART, GROUPS, SKIPPED), against=(WHOLE, "P = 2")),
            Part(faster, SPLIT, knocked_out=(WHOLE,)),
        ),
        gates=(
            gate(WHOLE, above(f"accuracy, {WHOLE}", arms[WHOLE], 0.95), losses[WHOLE]),
            *(gate(n, above(f"accuracy, {n}", arms[n], CHANCE), losses[n]) for n in ("P = 2", SPLIT)),
            *(gate(n, None, losses[n]) for n in (APART, GROUPS, SKIPPED)),
        ),
        checks=tuple(
            above(f"accuracy, {SPLIT} minus {arm}", arms.minus(SPLIT, arm), expected=0.0, in_rule=False)
            for arm in (GROUPS, SKIPPED)
        ),
        table=arms.table("accuracy", pairs=pairs) + speed.table("time without keeping by time with it"),
        figure=partial(_draw, arms=arms),
        notes=(
            "With six layers, four of them kept, three times as fast is what the layers alone would give.",
            "Each arm's answers are those of LAITEncoder around the trained encoder, which is checked.",
        ),
    )


class Scorer:
    """A trained encoder, its head, and LAIT around it."""

    def __init__(self, trained: Any, split: int) -> None:
        self.trained, self.lait = trained, LAITEncoder(trained.reader, split).eval()

    @torch.no_grad()
    def agrees(self, x: Int[Tensor, "items 2 tokens"]) -> bool:
        """Whether it gives what was trained."""
        ids, mask = _folded(x[:16, 0])
        joint = self.lait(ids, mask)
        logits = self.trained.head(joint.states.sum(1) / joint.mask.sum(1, keepdim=True))
        return bool(torch.allclose(logits, self.trained(x[:16]), atol=1e-4))

    @torch.no_grad()
    def speed_up(self, side: int, seed: int) -> float:
        """Time of all pairs of so many first and so many second segments, by that with the first part once for each segment."""
        x, _ = items_of(side, torch.Generator().manual_seed(seed), False)
        ids, mask = _folded(x[:, 0])
        first, second = torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side)

        def all_anew() -> None:
            for a, b in zip(first.split(250), second.split(250), strict=True):
                self.lait(torch.stack([ids[a, 0], ids[b, 1]], 1), torch.stack([mask[a, 0], mask[b, 1]], 1))

        def kept() -> None:
            states = self.lait.encode_segments(ids, mask)
            for a, b in zip(first.split(250), second.split(250), strict=True):
                pair = torch.stack([states[a, 0], states[b, 1]], 1)
                self.lait.encode_joint(pair, torch.stack([mask[a, 0], mask[b, 1]], 1))

        return _fastest(all_anew) / _fastest(kept)


def _folded(tokens: Int[Tensor, "items tokens"]) -> tuple[Tensor, Tensor]:
    """Segments `[items, 2, 16]` and which tokens are real."""
    ids = torch.stack([tokens[:, :PAIRS], F.pad(tokens[:, PAIRS:], (0, PAIRS - QUESTIONS))], 1)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 1, QUESTIONS:] = False
    return ids, mask


def _fastest(work: Any, runs: int = 3) -> float:
    times = []
    for _ in range(runs):
        begin = time.process_time()
        work()
        times.append(time.process_time() - begin)
    return min(times)


def _draw(figure: Any, arms: Arms) -> None:
    draw_arms(figure.subplots(), arms, "accuracy")
