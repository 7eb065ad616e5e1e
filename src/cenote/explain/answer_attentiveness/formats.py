"""How a question is put: without its choices, with them in a sentence, or with letters; with examples before.

Source: Wiegreffe et al. (2023), arXiv 2305.14596.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

from cenote.core import InputError
from cenote.core.requirements import require_one_of

Format = Literal["no_answer_choices", "string_answer_choices", "enumerated_answer_choices"]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
BETWEEN = "\n\n"


class Question(NamedTuple):
    """A question, its choices, and the number of the right one."""

    text: str
    choices: Sequence[str]
    gold: int


class Put(NamedTuple):
    """A prompt, and what stands for each choice behind it."""

    prompt: str
    continuations: list[str]


def put(question: Question, style: Format, examples: Sequence[Question] = (), header: str = "") -> Put:
    """A question as a prompt.

    Args:
        question: what is asked.
        style: whether and how choices are shown.
        examples: put before it in the same style, their right answers shown.
        header: a first line, such as "Let's answer science questions."

    Example:
        >>> question = Question("What is wet?", ["sand", "water"], 1)
        >>> put(question, "string_answer_choices").prompt
        'question: What is wet?\\nanswer choices: sand or water\\nThe correct answer is:'
        >>> put(question, "enumerated_answer_choices").continuations
        [' A', ' B']
    """
    require_one_of(get_args(Format), style=style)
    shots = [_asked(example, style) + continuations(example, style)[example.gold] for example in examples]
    return Put(
        BETWEEN.join([*([header] if header else []), *shots, _asked(question, style)]), continuations(question, style)
    )


def unconditional(question: Question, style: Format) -> Put:
    """The same style without the question: what the choices are likely anyway.

    >>> unconditional(Question("What is wet?", ["sand", "water"], 1), "no_answer_choices")
    Put(prompt='?', continuations=[' sand', ' water'])
    """
    require_one_of(get_args(Format), style=style)
    prompt = "?" if style == "no_answer_choices" else _shown(question, style)
    return Put(prompt, continuations(question, style))


def continuations(question: Question, style: Format) -> list[str]:
    """What stands for each choice."""
    _require(question)
    if style == "enumerated_answer_choices":
        return [f" {letter}" for letter in LETTERS[: len(question.choices)]]
    return [f" {choice}" for choice in question.choices]


def examples_of(pool: Sequence[Question], shots: int, seed: int = 0) -> list[Question]:
    """The same for all questions: the first of the pool after it was shuffled by the seed."""
    if not 0 <= shots <= len(pool):
        raise InputError(f"shots: expected 0 to {len(pool)}, as many as the pool has, got {shots}")
    order = list(pool)
    random.Random(seed).shuffle(order)
    return order[:shots]


def fitting(
    question: Question,
    style: Format,
    examples: Sequence[Question],
    fits: Callable[[Put], bool],
    header: str = "",
    item: str = "question",
) -> Put:
    """With as many examples as fit: the last is dropped until it does.

    Raises:
        InputError: naming the item, where it does not fit without any.
    """
    for count in range(len(examples), -1, -1):
        found = put(question, style, examples[:count], header)
        if fits(found):
            return found
    raise InputError(f"{item}: is longer than the model takes, without any example")


def prefixes(choices: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of choices of which the first begins the second: their masses overlap.

    >>> prefixes(["a cat", "a", "a cat"])
    [('a cat', 'a cat'), ('a', 'a cat'), ('a', 'a cat')]
    """
    return [
        (first, second)
        for i, first in enumerate(choices)
        for j, second in enumerate(choices)
        if i != j and second.startswith(first) and (first != second or i < j)
    ]


def _asked(question: Question, style: Format) -> str:
    if style == "no_answer_choices":
        return question.text
    name = "question" if style == "string_answer_choices" else "Question"
    return f"{name}: {question.text}\n{_shown(question, style)}"


def _shown(question: Question, style: Format) -> str:
    if style == "enumerated_answer_choices":
        lines = [f" {letter}: {choice}" for letter, choice in zip(LETTERS, question.choices, strict=False)]
        return "\n".join(["Choices:", *lines, "Answer:"])
    *others, last = question.choices
    listed = f"{others[0]} or {last}" if len(others) == 1 else ", ".join([*others, f"or {last}" if others else last])
    return f"answer choices: {listed}\nThe correct answer is:"


def _require(question: Question) -> None:
    if not 1 <= len(question.choices) <= len(LETTERS):
        raise InputError(f"choices: expected 1 to {len(LETTERS)}, got {len(question.choices)} of {question.text!r}")
    if not 0 <= question.gold < len(question.choices):
        raise InputError(f"gold: expected a number below {len(question.choices)}, got {question.gold}")
