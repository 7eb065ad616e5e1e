"""Tasks in which positions must count some tokens and not others.

Source: Golovneva et al. (2024), arXiv 2405.18719; the flip-flop language: Liu et al. (2023), arXiv 2306.00946.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from cenote.core import InputError
from cenote.core.requirements import require_at_least

FLIP_FLOP = {"0": 0, "1": 1, "write": 2, "read": 3, "ignore": 4}
COUNTING = ("pass", "=", "++", "print", "0")


class Task(NamedTuple):
    """Texts, and which of their tokens are answers."""

    tokens: Int[Tensor, "texts tokens"]
    answers: Bool[Tensor, "texts tokens"]


def flip_flop(
    texts: int, pairs: int, ignored: float, generator: torch.Generator | None = None, last_only: bool = False
) -> Task:
    """Pairs of an instruction and a bit; behind `read` the bit is the one that was written last.

    The first instruction is `write`, the last `read`.

    Args:
        pairs: of each text.
        ignored: share of `ignore` among the instructions between; the others are `write` or `read` alike.
        last_only: only the last bit is an answer; otherwise those of all `read`.

    >>> task = flip_flop(1, 4, 0.5, torch.Generator().manual_seed(0))
    >>> task.tokens.shape, int(task.answers[0, -1])
    (torch.Size([1, 8]), 1)
    """
    require_at_least(2, pairs=pairs)
    if not 0 <= ignored <= 1:
        raise InputError(f"ignored: expected a share from 0 to 1, got {ignored}")
    drawn = torch.rand(texts, pairs, generator=generator)
    instruction = torch.where(drawn < ignored, FLIP_FLOP["ignore"], FLIP_FLOP["write"])
    instruction = torch.where(drawn >= (1 + ignored) / 2, FLIP_FLOP["read"], instruction)
    instruction[:, 0], instruction[:, -1] = FLIP_FLOP["write"], FLIP_FLOP["read"]
    bits = torch.randint(0, 2, (texts, pairs), generator=generator)
    at = torch.arange(pairs).expand(texts, -1)
    written = at.masked_fill(instruction != FLIP_FLOP["write"], -1).cummax(1).values
    reads = instruction == FLIP_FLOP["read"]
    bits = torch.where(reads, bits.gather(1, written), bits)
    answers = torch.zeros(texts, 2 * pairs, dtype=torch.bool)
    answers[:, 1::2] = reads
    if last_only:
        answers[:, :-1] = False
    return Task(torch.stack([instruction, bits], -1).flatten(1), answers)


def counting(
    texts: int,
    steps: int,
    variables: int = 1,
    most: int = 10,
    weights: tuple[float, float, float] = (50, 1, 7),
    generator: torch.Generator | None = None,
) -> Task:
    """Statements `pass`, `x = 0`, `x ++`; at the end `print x`, and how often x was increased since it was set to 0.

    Every statement is three tokens: `pass pass pass`, `x = 0`, `x ++ ++`. Every variable is set to 0 at the start.

    Args:
        steps: statements of each text, those at the start included.
        variables: how many.
        most: a variable that has been increased so often is increased no more.
        weights: of the three statements.

    >>> counting(1, 6, generator=torch.Generator().manual_seed(0)).tokens.shape
    torch.Size([1, 21])
    """
    require_at_least(1, variables=variables, most=most)
    if steps <= variables:
        raise InputError(
            f"steps: {variables} variables are set first; expected more than {variables} steps, got {steps}"
        )
    word = {name: i for i, name in enumerate(COUNTING)}
    first_number, first_variable = word["0"], word["0"] + most + 1
    kinds = torch.multinomial(
        torch.tensor(weights, dtype=torch.float64), texts * steps, replacement=True, generator=generator
    )
    kinds = kinds.view(texts, steps)
    which = torch.randint(0, variables, (texts, steps), generator=generator)
    kinds[:, :variables], which[:, :variables] = 1, torch.arange(variables)
    held = torch.zeros(texts, variables, dtype=torch.long)
    lines = []
    for step in range(steps):
        kind, x = kinds[:, step], which[:, step : step + 1]
        kind = torch.where((kind == 2) & (held.gather(1, x)[:, 0] >= most), 0, kind)
        value = held.gather(1, x)[:, 0]
        held = held.scatter(1, x, torch.where(kind == 1, 0, value + (kind == 2).long())[:, None])
        name = torch.where(kind == 0, word["pass"], first_variable + x[:, 0])
        second = torch.tensor([word["pass"], word["="], word["++"]])[kind]
        third = torch.tensor([word["pass"], first_number, word["++"]])[kind]
        lines += [name, second, third]
    asked = torch.randint(0, variables, (texts, 1), generator=generator)
    lines += [
        torch.full((texts,), word["print"]),
        first_variable + asked[:, 0],
        first_number + held.gather(1, asked)[:, 0],
    ]
    tokens = torch.stack(lines, 1)
    answers = torch.zeros_like(tokens, dtype=torch.bool)
    answers[:, -1] = True
    return Task(tokens, answers)


def selective_copy(
    texts: int,
    marks: int = 8,
    blanks: int = 24,
    kinds: int = 8,
    generator: torch.Generator | None = None,
) -> Task:
    """Marks among blanks, a separator, and the marks again without the blanks.

    Args:
        marks: how many there are; many blanks for each are dense blanks, few sparse ones.
        blanks: how many there are.
        kinds: of marks; the blank is `kinds`, the separator `kinds + 1`.

    >>> task = selective_copy(1, marks=2, blanks=3, generator=torch.Generator().manual_seed(0))
    >>> task.tokens.shape, task.answers.sum().item()
    (torch.Size([1, 8]), 2)
    """
    require_at_least(1, marks=marks, kinds=kinds)
    require_at_least(0, blanks=blanks)
    chosen = torch.randint(0, kinds, (texts, marks), generator=generator)
    order = torch.rand(texts, marks + blanks, generator=generator).argsort(1)[:, :marks].sort(1).values
    mixed = torch.full((texts, marks + blanks), kinds).scatter(1, order, chosen)
    tokens = torch.cat([mixed, torch.full((texts, 1), kinds + 1), chosen], 1)
    answers = torch.zeros_like(tokens, dtype=torch.bool)
    answers[:, -marks:] = True
    return Task(tokens, answers)
