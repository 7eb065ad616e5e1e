"""Facts planted in prose: what a decoder still knows of a long text after something was done to its context.

Perplexity hardly moves where facts are lost; this is the measure that does. In a text stand sentences such as "The special
magic number for Oslo is 48213."; behind it each is asked for, and counts where every token of the number is the likeliest,
behind the true ones before it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cenote.core.answers import UNASKED, Answered, answered
from cenote.core.errors import InputError
from cenote.core.language import encoded
from cenote.core.requirements import require_at_least

CITIES = (
    "Accra", "Amman", "Ankara", "Athens", "Baku", "Bamako", "Bangkok", "Beirut", "Belgrade", "Berlin", "Bern", "Bogota",
    "Brussels", "Budapest", "Cairo", "Canberra", "Caracas", "Dakar", "Damascus", "Delhi", "Dhaka", "Dublin", "Hanoi",
    "Harare", "Havana", "Helsinki", "Jakarta", "Kabul", "Kampala", "Kiev", "Lagos", "Lima", "Lisbon", "London",
    "Luanda", "Madrid", "Manila", "Minsk", "Moscow", "Nairobi", "Oslo", "Ottawa", "Paris", "Prague", "Quito", "Rabat",
    "Riga", "Rome", "Santiago", "Seoul", "Sofia", "Stockholm", "Tallinn", "Tehran", "Tokyo", "Tripoli", "Tunis",
    "Vienna", "Vilnius", "Warsaw", "Zagreb",
)  # fmt: skip
QUESTION = "The special magic number for {city} is"
SENTENCE = re.compile(r"(?<=[.!?])\s+")

Tell = Callable[
    [Int[Tensor, "1 tokens"], Int[Tensor, "facts words"], Bool[Tensor, "facts words"]],
    Float[Tensor, "facts words vocab"],
]
"""A context, prompts behind it that are padded on the left, and which of their tokens are real -> logits of the prompts."""


class Planted(NamedTuple):
    """A text with facts in it.

    Attributes:
        text: the whole.
        questions: of each fact its sentence as far as the number.
        answers: the numbers, with the space before them.
        places: which of the text's sentences each fact is, from 0.
        sentences: how many there are.
    """

    text: str
    questions: list[str]
    answers: list[str]
    places: list[int]
    sentences: int


class FactPrompts(NamedTuple):
    """A context and its questions as tokens.

    Attributes:
        context: `[1, tokens]`.
        prompt: questions with their answers, padded on the left, `[facts, words]`.
        labels: of each word of an answer its number, else `UNASKED`.
        mask: True on real words.
    """

    context: Int[Tensor, "1 tokens"]
    prompt: Int[Tensor, "facts words"]
    labels: Int[Tensor, "facts words"]
    mask: Bool[Tensor, "facts words"]


def planted(texts: Sequence[str], facts: int = 8, *, seed: int = 0, digits: int = 5) -> Planted:
    """Put facts between the sentences of some texts, at random places, one after the other.

    Args:
        texts: prose, such as abstracts.
        facts: how many, each of a city of its own.
        seed: of cities, numbers and places.
        digits: of each number.

    Raises:
        InputError: for more facts than there are cities, or texts without a sentence.

    Example:
        >>> made = planted(["The flow separates. It joins again."], facts=1)
        >>> made.text
        'The flow separates. The special magic number for Tokyo is 60494. It joins again.'
        >>> made.questions, made.answers
        (['The special magic number for Tokyo is'], [' 60494'])
    """
    require_at_least(1, facts=facts, digits=digits)
    if facts > len(CITIES):
        raise InputError(f"facts: expected at most {len(CITIES)}, one per city, got {facts}")
    told = [sentence for text in texts for sentence in SENTENCE.split(text.strip()) if sentence]
    if not told:
        raise InputError("texts: have no sentence between which facts could stand")
    draw = random.Random(seed)
    cities = draw.sample(CITIES, facts)
    numbers = [str(draw.randrange(10 ** (digits - 1), 10**digits)) for _ in cities]
    slots = sorted(draw.randrange(len(told) + 1) for _ in cities)
    questions = [QUESTION.format(city=city) for city in cities]
    whole, places = list(told), []
    for before, (slot, question, number) in enumerate(zip(slots, questions, numbers, strict=True)):
        places.append(slot + before)
        whole.insert(slot + before, f"{question} {number}.")
    return Planted(" ".join(whole), questions, [f" {number}" for number in numbers], places, len(whole))


def prompts(tokenizer: Any, made: Planted, *, special_tokens: bool = True) -> FactPrompts:
    """The tokens of a text, and of the questions that stand behind it on a line of their own.

    Args:
        tokenizer: of transformers.
        made: text and questions.
        special_tokens: whether the tokenizer puts its own before the text.
    """
    context = torch.tensor([encoded(tokenizer, made.text, [" ."], special_tokens=special_tokens).prompt])
    rows, told = [], []
    for question, answer in zip(made.questions, made.answers, strict=True):
        ids = encoded(tokenizer, f"\n{question}", [answer], special_tokens=False)
        rows.append(ids.prompt + ids.continuations[0])
        told.append(len(ids.continuations[0]))
    longest = max(map(len, rows))
    prompt = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    at = torch.arange(longest)
    mask = at >= torch.tensor([[longest - len(row)] for row in rows])
    labels = prompt.masked_fill(at < longest - torch.tensor(told)[:, None], UNASKED)
    return FactPrompts(context, prompt, labels, mask)


@torch.no_grad()
def recalled(tell: Tell, asked: FactPrompts) -> Answered:
    """Of each fact, whether its number is told, how likely it is, and what is told in its place.

    Args:
        tell: what is measured; see `Tell`.
        asked: from `prompts`.
    """
    return answered(tell(asked.context, asked.prompt, asked.mask), asked.labels)
