"""Texts as terms: entities, frames and other words with their kinds, one context for each pair of entities.

Source: Rusnachenko, Loukachevitch, "Studying Attention Models in Sentiment Attitude Extraction Task", NLDB 2020.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import permutations
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least
from cenote.pool.sequence.sentiment_attitudes.attention import combined_keys
from cenote.pool.sequence.vocabulary import Vocabulary
from cenote.pool.sequence.word_encoders import PlaceEmbedding

TERMS, SYNONYMS, FRAMES = 50, 3, 5
"""Terms of a context, synonyms of either entity, and frames that are used as keys at most, in the authors' settings."""

KINDS = ("word", "entity", "frame", "sentiment", "preposition", "token")
"""Of a term: a plain word, a named entity, an entry of the frames, of a sentiment lexicon, a preposition, a sign or number."""

NEUTRAL = "neutral"


class Entity(NamedTuple):
    """A named entity: words `start` to before `end`, and what it is called; synonyms are called the same."""

    start: int
    end: int
    name: str


class Context(NamedTuple):
    """One pair of entities of a sentence, with the terms around them.

    Attributes:
        terms: each a word, a frame of one or more words, or an entity.
        kinds: of each term, one of `KINDS`.
        subject, object_: numbers of their terms.
        subject_synonyms, object_synonyms: numbers of other terms that are called the same.
        frames: numbers of the frames.
        pair: what subject and object are called.
        document: that the sentence is from.
        label: the attitude of the subject to the object: `"positive"`, `"negative"`, `NEUTRAL`, or `None`.
    """

    terms: tuple[str, ...]
    kinds: tuple[str, ...]
    subject: int
    object_: int
    subject_synonyms: tuple[int, ...]
    object_synonyms: tuple[int, ...]
    frames: tuple[int, ...]
    pair: tuple[str, str]
    document: str = ""
    label: str | None = None


def contexts_of(
    words: Sequence[str],
    entities: Sequence[Entity],
    frames: Collection[str],
    *,
    sentiment: Collection[str] = (),
    prepositions: Collection[str] = (),
    attitudes: Mapping[tuple[str, str], str] | None = None,
    document: str = "",
    longest: int = TERMS,
) -> list[Context]:
    """The contexts of a sentence: one for each ordered pair of entities that are called differently.

    An entity is one term, and so is a frame, of words that follow each other, the longest first. A sentence with more than
    `longest` terms is cut to a window around the pair; pairs that are farther apart have no context. Of entities that are
    called the same, only the nearest to each other make a pair.

    Args:
        words: of the sentence.
        entities: in it; they do not overlap.
        frames: in lower case, several words between spaces.
        sentiment, prepositions: words of these kinds, in lower case.
        attitudes: of a pair of names, what the document says; pairs that are not there are neutral. `None`: not known.
        document: its name.
        longest: most terms of a context.

    Raises:
        InputError: where an entity has no word, lies beyond the sentence, or overlaps another.

    Example:
        >>> words = "Alice will not support Bob".split()
        >>> first, second = contexts_of(words, [Entity(0, 1, "alice"), Entity(4, 5, "bob")], ["support"])
        >>> first.terms, first.frames, first.pair
        (('Alice', 'will', 'not', 'support', 'Bob'), (3,), ('alice', 'bob'))

    Source: Rusnachenko, Loukachevitch, "Studying Attention Models in Sentiment Attitude Extraction Task", NLDB 2020.
    """
    require_at_least(2, longest=longest)
    terms, kinds, places = _terms(words, entities, frames, sentiment, prepositions)
    named: dict[str, list[int]] = {}
    for place, entity in places.items():
        named.setdefault(entity.name, []).append(place)
    found = []
    for subject_name, object_name in permutations(named, 2):
        subject, object_ = min(
            ((s, o) for s in named[subject_name] for o in named[object_name]), key=lambda pair: abs(pair[0] - pair[1])
        )
        first, last = min(subject, object_), max(subject, object_)
        if last - first >= longest:
            continue
        # as much before the pair as behind it, where there is as much
        start = max(0, min(first - (longest - 1 - last + first) // 2, len(terms) - longest))
        stop = min(start + longest, len(terms))

        def shifted(numbers: Sequence[int], start: int = start, stop: int = stop) -> tuple[int, ...]:
            return tuple(n - start for n in numbers if start <= n < stop)

        label = None if attitudes is None else attitudes.get((subject_name, object_name), NEUTRAL)
        found.append(
            Context(
                tuple(terms[start:stop]),
                tuple(kinds[start:stop]),
                subject - start,
                object_ - start,
                shifted([n for n in named[subject_name] if n != subject]),
                shifted([n for n in named[object_name] if n != object_]),
                shifted([n for n, kind in enumerate(kinds) if kind == "frame"]),
                (subject_name, object_name),
                document,
                label,
            )
        )
    return found


class AttitudeBatch(NamedTuple):
    """Contexts as numbers.

    Attributes:
        terms: `[batch, terms]`.
        entities: `[batch, 2]`, places of subject and object.
        kinds: `[batch, terms]`, numbers of `KINDS`, or `None`.
        frames: `[batch, 5]`, places of the frames, -1 where there is none.
        synonyms: `[batch, 6]`, places of the synonyms of subject and object, -1 where there is none.
        mask: `[batch, terms]`, True on real terms, which come first; `None`: all.
    """

    terms: Int[Tensor, "batch terms"]
    entities: Int[Tensor, "batch 2"]
    kinds: Int[Tensor, "batch terms"] | None = None
    frames: Int[Tensor, "batch frames"] | None = None
    synonyms: Int[Tensor, "batch synonyms"] | None = None
    mask: Bool[Tensor, "batch terms"] | None = None

    def keys(self, which: str) -> Int[Tensor, "batch keys"]:
        """The terms that attention asks from: `e` the entities, `s` their synonyms, `f` the frames, or several, as `sef`.

        Raises:
            InputError: where the batch has none of them, or there is no such letter.
        """
        by_letter = {"e": self.entities, "s": self.synonyms, "f": self.frames}
        lists = []
        for letter in which:
            if (keys := by_letter.get(letter)) is None:
                raise InputError(f"keys: expected letters of e, s and f that the batch has, got {which!r}")
            lists.append(keys)
        return lists[0] if len(lists) == 1 else combined_keys(*lists)


def batch_of(contexts: Sequence[Context], vocabulary: Vocabulary, terms: int | None = None) -> AttitudeBatch:
    """Contexts as numbers.

    Args:
        contexts: at least one.
        vocabulary: of terms in lower case.
        terms: of every context, padded; default the longest of them. The biases of IAN need 50.

    Raises:
        InputError: where there is none, or one is longer.
    """
    if not contexts:
        raise InputError("contexts: expected at least one, got none")
    ids, mask = vocabulary.batch([[term.lower() for term in c.terms] for c in contexts])
    kinds = torch.zeros_like(ids)
    for row, c in zip(kinds, contexts, strict=True):
        row[: len(c.kinds)] = torch.tensor([KINDS.index(kind) for kind in c.kinds])
    if terms is not None:
        if ids.shape[1] > terms:
            raise InputError(
                f"contexts: expected at most {terms} terms, got {ids.shape[1]}; cut them with longest={terms}"
            )
        ids, kinds, mask = (nn.functional.pad(t, (0, terms - t.shape[1])) for t in (ids, kinds, mask))
    synonyms = [[*_filled(c.subject_synonyms, SYNONYMS), *_filled(c.object_synonyms, SYNONYMS)] for c in contexts]
    return AttitudeBatch(
        ids,
        torch.tensor([[c.subject, c.object_] for c in contexts]),
        kinds,
        torch.tensor([_filled(c.frames, FRAMES) for c in contexts]),
        torch.tensor(synonyms),
        mask,
    )


class TermVectors(nn.Module):
    """Vectors of terms: `x_n = [word ; distance to the subject ; distance to the object ; kind]`, one table for both distances.

    Args:
        words: number of terms in the vocabulary.
        dim: width of a word's vector.
        reach: distances that are told apart.
        placed: width of a distance's vector.
        kinds: number of kinds; 0: not read.
        kind_width: width of a kind's vector.

    Attributes:
        out_dim: width of a term.

    Example:
        >>> TermVectors(20, 8)(AttitudeBatch(torch.zeros(2, 6, dtype=torch.long), torch.tensor([[0, 3], [4, 1]]))).shape
        torch.Size([2, 6, 18])
    """

    def __init__(
        self, words: int, dim: int = 100, reach: int = TERMS, placed: int = 5, kinds: int = 0, kind_width: int = 5
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(words, dim)
        self.places = PlaceEmbedding(reach, placed)
        self.kinds = nn.Embedding(kinds, kind_width) if kinds else None
        self.out_dim = dim + 2 * placed + (kind_width if kinds else 0)

    def forward(self, batch: AttitudeBatch) -> Float[Tensor, "batch terms width"]:
        """Vectors of the terms.

        Raises:
            InputError: where kinds are read and the batch has none.
        """
        count = batch.terms.shape[1]
        near = [self.places(batch.entities[:, i : i + 1], count) for i in (0, 1)]
        parts = [self.words(batch.terms), *near]
        if self.kinds is not None:
            if batch.kinds is None:
                raise InputError("kinds: these vectors read the kind of each term; give kinds")
            parts.append(self.kinds(batch.kinds))
        return torch.cat(parts, -1)


def _terms(
    words: Sequence[str],
    entities: Sequence[Entity],
    frames: Collection[str],
    sentiment: Collection[str],
    prepositions: Collection[str],
) -> tuple[list[str], list[str], dict[int, Entity]]:
    starts: dict[int, Entity] = {}
    before = 0
    for entity in sorted(entities):
        if not before <= entity.start < entity.end <= len(words):
            raise InputError(f"entities: expected spans of the {len(words)} words that do not overlap, got {entity}")
        starts[entity.start] = entity
        before = entity.end
    longest = max((len(frame.split()) for frame in frames), default=0)
    terms: list[str] = []
    kinds: list[str] = []
    places: dict[int, Entity] = {}
    at = 0
    while at < len(words):
        if (here := starts.get(at)) is not None:
            places[len(terms)] = here
            terms.append(" ".join(words[at : here.end]))
            kinds.append("entity")
            at = here.end
            continue
        until = next((n for n in range(at, len(words)) if n in starts), len(words))
        size = next(
            (k for k in range(min(longest, until - at), 0, -1) if " ".join(words[at : at + k]).lower() in frames), 0
        )
        terms.append(" ".join(words[at : at + max(size, 1)]))
        kinds.append("frame" if size else _kind(words[at], sentiment, prepositions))
        at += max(size, 1)
    return terms, kinds, places


def _kind(word: str, sentiment: Collection[str], prepositions: Collection[str]) -> str:
    low = word.lower()
    if low in sentiment:
        return "sentiment"
    if low in prepositions:
        return "preposition"
    return "word" if any(letter.isalpha() for letter in word) else "token"


def _filled(numbers: Sequence[int], count: int) -> list[int]:
    return [*numbers[:count], *[-1] * (count - len(numbers[:count]))]
