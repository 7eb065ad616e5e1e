"""Heads that a pursuit of colour words ranks first write colours: turned round, they cost the answers about colours more than
those about countries, and more than random heads of the same layers; and a head that writes five planted words with both signs
is found with exactly these, where the averaged logit lens sees nothing.

Refuted if turning the first heads round costs colours no more than countries, or no more than turning as many random heads of
the same layers; or if the planted head does not lead, or the lens ranks it first as often.

A decoder of three blocks learns 60 subjects' colour, country and animal by heart; prompts are of a subject and a relation. The
first one, two and three heads are turned round, and falls of accuracy are means over the three.

Knocked out: the word list. As many random attributes of any relation, as frequent in training, rank the heads instead; among
planted heads, words that none of them writes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cenote.explain import Dictionary, SteeredHeads, concept_heads, head_outputs, lens, random_heads
from cenote.models.live import edited
from cenote.study.harness import Arms, Check, Findings, Part, Size, above, draw_arms, gate, seeds_of, study
from cenote.study.harness.training import descend

SUBJECTS, RELATIONS, WORDS = 60, 3, 8
WIDTH, BLOCKS, HEADS = 64, 3, 8
STEPS: dict[Size, int] = {"smoke": 20, "small": 300, "full": 600}
LEARNING_RATE = 3e-3
ATOMS, TURNED, DRAWS = 4, (1, 2, 3), 10
COLOUR, COUNTRY = 0, 1
PLANTED_HEADS, PLANTED_WIDTH, DICTIONARY, PLANTED_WORDS, SAMPLES, NOISE = 20, 64, 200, 5, 300, 0.1
CONCEPT = 20

WORD_LIST, RANDOM_WORDS, RANDOM_HEADS = "colour words", "random words", "random heads"
PURSUIT, FOREIGN, LENS = "pursuit", "pursuit, foreign words", "averaged lens"


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.maps, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        q, k, v = self.maps(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a feed-forward part behind pre-norms."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.attention, self.second = nn.LayerNorm(WIDTH), Attention(), nn.LayerNorm(WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        x = x + self.attention(self.first(x))
        return x + self.narrow(F.gelu(self.wide(self.second(x))))


class Decoder(nn.Module):
    """From a subject and a relation to logits of all attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(SUBJECTS + RELATIONS, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(2, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm, self.words = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, RELATIONS * WORDS, bias=False)

    def forward(self, input_ids: Int[Tensor, "batch 2"]) -> Float[Tensor, "batch words"]:
        x = self.tokens(input_ids) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.words(self.norm(x[:, -1]))


@study
def run(seed: int, size: Size) -> Findings:
    """Train one decoder per seed, and turn heads round; look for planted heads."""
    seeds = seeds_of(seed, size)
    colour, lead_over_country = Arms(), Arms()
    before, curves = [], []
    found: dict[str, list[tuple[float, float]]] = {WORD_LIST: [], RANDOM_WORDS: [], RANDOM_HEADS: []}
    for s in seeds:
        model, prompts, answers, curve = _trained(s, STEPS[size])
        curves.append(curve)
        before.append(_accuracy(model, prompts, answers))
        for arm, falls in _turned(model, prompts, answers, s).items():
            found[arm].append(falls)
    for arm, of_seeds in found.items():
        colour[arm] = tuple(c for c, _ in of_seeds)
        lead_over_country[arm] = tuple(c - o for c, o in of_seeds)
    planted = [_planted(s) for s in seeds]
    first, lead = Arms(), Arms()
    for arm in (PURSUIT, FOREIGN, LENS):
        first[arm] = tuple(p[arm][0] for p in planted)
        lead[arm] = tuple(p[arm][1] for p in planted)

    def rule(arm: str) -> tuple[Check, ...]:
        return (
            above(
                f"fall of colours' accuracy minus that of countries', {arm}", lead_over_country[arm], 0.1, refuted=0.0
            ),
            above(
                f"fall of colours' accuracy, {arm} minus random heads of the same layers",
                colour.minus(arm, RANDOM_HEADS),
                0.05,
                refuted=0.0,
            ),
        )

    def planted_rule(arm: str) -> tuple[Check, ...]:
        return (
            above(f"score of the planted head above that of the best other, {arm}", lead[arm], 0.3, refuted=0.0),
            above(f"planted head ranked first, {arm} minus {LENS}", first.minus(arm, LENS), 0.2, refuted=0.0),
        )

    known = above("accuracy of colours and countries before, above 0.9", [min(b) - 0.9 for b in before], 0.0)
    chance = above("planted head's words explain more than nothing", [p["explained"][0] for p in planted], 0.5)
    return Findings(
        seeds=seeds,
        parts=(
            Part(rule, WORD_LIST, knocked_out=(RANDOM_WORDS,), against=(RANDOM_HEADS,)),
            Part(planted_rule, PURSUIT, knocked_out=(FOREIGN,), against=(LENS,)),
        ),
        gates=(
            *(gate(arm, known, curves) for arm in (WORD_LIST, RANDOM_WORDS, RANDOM_HEADS)),
            *(gate(arm, chance, None) for arm in (PURSUIT, FOREIGN, LENS)),
        ),
        checks=(
            above(
                "share of the planted words among the first five taken",
                [p["words"][0] for p in planted],
                0.99,
                in_rule=False,
            ),
        ),
        table=[
            *colour.table("fall of colours' accuracy"),
            *lead_over_country.table("fall of colours' minus countries'"),
            *first.table("planted head ranked first"),
            *lead.table("planted head's score above the best other"),
        ],
        figure=partial(_draw, colour=colour),
        notes=(
            f"Falls are means over the first {', '.join(map(str, TURNED))} heads, turned round in all positions; random heads "
            f"are {DRAWS} draws of the same layers each time.",
            "The lens scores a head by its largest mean product with a concept's words; planted coefficients come with both "
            "signs, each as often.",
        ),
    )


def _trained(seed: int, steps: int) -> tuple[Decoder, Tensor, Tensor, list[float]]:
    """A decoder, `prompts [relations, subjects, 2]`, `answers [relations, subjects]` and its losses."""
    torch.manual_seed(seed)
    model = Decoder()
    subjects = torch.arange(SUBJECTS)
    prompts = torch.stack(
        [torch.stack([subjects, torch.full_like(subjects, SUBJECTS + r)], 1) for r in range(RELATIONS)]
    )
    answers = torch.stack([r * WORDS + torch.randperm(SUBJECTS) % WORDS for r in range(RELATIONS)])
    losses = (F.cross_entropy(model(prompts.flatten(0, 1)), answers.flatten()) for _ in range(steps))
    curve = descend(model.parameters(), losses, steps, LEARNING_RATE)
    return model.eval(), prompts, answers, curve


@torch.no_grad()
def _accuracy(model: Decoder, prompts: Tensor, answers: Tensor) -> tuple[float, float]:
    """Of colours and of countries."""
    right = (model(prompts.flatten(0, 1)).argmax(1) == answers.flatten()).view(RELATIONS, -1).float().mean(1)
    return float(right[COLOUR]), float(right[COUNTRY])


def _turned(model: Decoder, prompts: Tensor, answers: Tensor, seed: int) -> dict[str, tuple[float, float]]:
    """Falls of the two accuracies, of each arm."""
    outputs = head_outputs(model, [{"input_ids": prompts.flatten(0, 1)}])
    rows = model.words.weight.detach()
    before = np.array(_accuracy(model, prompts, answers))
    generator = torch.Generator().manual_seed(seed)
    lists = {
        WORD_LIST: torch.arange(COLOUR * WORDS, (COLOUR + 1) * WORDS),
        RANDOM_WORDS: torch.randperm(RELATIONS * WORDS, generator=generator)[:WORDS],
    }

    def falls(heads: list[tuple[int, int]]) -> np.ndarray:
        with edited(model, SteeredHeads(heads, -1.0, HEADS)):
            return before - np.array(_accuracy(model, prompts, answers))

    found, chosen = {}, {}
    for arm, tokens in lists.items():
        ranked = concept_heads(outputs, Dictionary(rows[tokens], tokens, (), ()), ATOMS)
        chosen[arm] = [ranked.best(k) for k in TURNED]
        found[arm] = np.mean([falls(heads) for heads in chosen[arm]], 0)
    drawn = [
        falls(random_heads(heads, BLOCKS, HEADS, seed=1000 * seed + draw))
        for heads in chosen[WORD_LIST]
        for draw in range(DRAWS)
    ]
    found[RANDOM_HEADS] = np.mean(drawn, 0)
    return {arm: (float(f[0]), float(f[1])) for arm, f in found.items()}


def _planted(seed: int) -> dict[str, tuple[float, float]]:
    """Of each arm whether the planted head is ranked first, and its lead; what explains it, and the words that were taken."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    atoms = F.normalize(drawn(DICTIONARY, PLANTED_WIDTH), dim=1)
    planted = int(torch.randint(PLANTED_HEADS, (), generator=generator))
    # words 0 to 19 are the concept, the last 20 nobody writes
    others = torch.arange(CONCEPT, DICTIONARY - CONCEPT)
    outputs = torch.zeros(1, PLANTED_HEADS, SAMPLES, PLANTED_WIDTH)
    for head in range(PLANTED_HEADS):
        pool = torch.arange(CONCEPT) if head == planted else others
        words = pool[torch.randperm(len(pool), generator=generator)[:PLANTED_WORDS]]
        half = drawn(SAMPLES // 2, PLANTED_WORDS)
        outputs[0, head] = torch.cat([half, -half]) @ atoms[words] + NOISE * drawn(SAMPLES, PLANTED_WIDTH)
        if head == planted:
            written = set(words.tolist())
    concept, foreign = torch.arange(CONCEPT), torch.arange(DICTIONARY - CONCEPT, DICTIONARY)
    ranked = {
        arm: concept_heads(outputs, Dictionary(atoms[tokens], tokens, (), ()), PLANTED_WORDS)
        for arm, tokens in ((PURSUIT, concept), (FOREIGN, foreign))
    }
    scores = {arm: found.scores[0] for arm, found in ranked.items()}
    scores[LENS] = torch.stack([lens(h, atoms[concept]).abs().max() for h in outputs[0]])
    taken = set(ranked[PURSUIT].atoms[0, planted].tolist())
    best = {arm: float(s[planted] - s[torch.arange(PLANTED_HEADS) != planted].max()) for arm, s in scores.items()}
    return {
        **{arm: (float(lead > 0), lead) for arm, lead in best.items()},
        "explained": (float(ranked[PURSUIT].scores[0, planted]), 0.0),
        "words": (len(taken & written) / PLANTED_WORDS, 0.0),
    }


def _draw(figure: Any, colour: Arms) -> None:
    draw_arms(figure.subplots(), colour, "fall of colours' accuracy")
