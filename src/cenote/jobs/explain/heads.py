"""What each head of a decoder does: repeated random tokens tell four kinds, a list of words tells which heads write of it."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor

from cenote.compare.provenance import provenance
from cenote.core import InputError
from cenote.explain.head_pursuit.heads import ConceptHeads, concept_dictionary, concept_heads, head_outputs
from cenote.explain.repeated_tokens import FoundHead, head_atlas
from cenote.jobs.explain.kept import Kept
from cenote.models.decoder import Decoder

JOB = "heads"
FILE = "heads.json"
SEQUENCES, PERIOD = 16, 64
PROMPTS, LISTED, SHORTEST = 64, 4, 4


@dataclass(frozen=True)
class Kind:
    """Heads of one kind.

    Attributes:
        scores: of each head, `[layers][heads]`.
        found: those that are sure to be of it, best first.
    """

    scores: tuple[tuple[float, ...], ...]
    found: tuple[FoundHead, ...]


@dataclass(frozen=True)
class Concept:
    """Heads that write about the words of a list.

    Attributes:
        name: of the list.
        words: how many.
        scores: share of what a head writes that the words explain, less that of random words, `[layers][heads]`.
        best: one head in a hundred, best first, with the words that it writes about most.
        split: words of several tokens, whose first one stands for them.
    """

    name: str
    words: int
    scores: tuple[tuple[float, ...], ...]
    best: tuple[tuple[FoundHead, tuple[str, ...]], ...]
    split: tuple[str, ...] = ()


@dataclass(frozen=True)
class Heads(Kept):
    """The atlas of a decoder's heads.

    Attributes:
        model: its name.
        kinds: induction, previous token, duplicate token, sink.
        concept: where words were given.
        provenance: where it is from.
        job: tells the file from those of other jobs.
    """

    file: ClassVar[str] = FILE
    what: ClassVar[str] = "atlas of heads"
    again: ClassVar[str] = "cenote explain --heads"

    model: str
    kinds: dict[str, Kind]
    concept: Concept | None = None
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)
    job: str = JOB

    @property
    def shape(self) -> tuple[int, int]:
        """Layers, and heads of each."""
        scores = next(iter(self.kinds.values())).scores
        return len(scores), len(scores[0])

    @property
    def sentence(self) -> str:
        """The finding in words.

        >>> Heads("tiny", {"induction": Kind(((0.1, 0.9),), (FoundHead(0, 1, 0.9),)), "sink": Kind(((0.0, 0.0),), ())}).sentence
        'tiny has 1 induction head (strongest: layer 0, head 1, 0.90) and no sink heads, of 2 in all.'
        """
        layers, heads = self.shape
        told = []
        for name, kind in self.kinds.items():
            many = len(kind.found)
            best = f" (strongest: {_at(kind.found[0])}, {kind.found[0].score:.2f})" if many else ""
            told.append(f"{many or 'no'} {name} head{'' if many == 1 else 's'}{best}")
        said = f"{self.model} has {', '.join(told[:-1])} and {told[-1]}, of {layers * heads} in all."
        if self.concept is not None:
            first, words = self.concept.best[0]
            about = f", {', '.join(words[:3])} first" if words else ""
            said += (
                f" Most about {self.concept.name} writes {_at(first)} ({first.score:+.2f} over random words{about})."
            )
        return said

    @classmethod
    def of_json(cls, raw: Any) -> Self:
        kinds = {name: Kind(_grid(k["scores"]), _heads(k["found"])) for name, k in raw["kinds"].items()}
        concept = None
        if (told := raw["concept"]) is not None:
            best = tuple((FoundHead(*head), tuple(words)) for head, words in told["best"])
            concept = Concept(told["name"], told["words"], _grid(told["scores"]), best, tuple(told["split"]))
        return cls(raw["model"], kinds, concept, raw["provenance"])


def heads(
    decoder: Decoder,
    concept: Sequence[str] | None = None,
    *,
    concept_name: str = "the concept",
    sequences: int = SEQUENCES,
    period: int | None = None,
    seed: int = 0,
) -> Heads:
    """Look at every head of a decoder.

    Args:
        decoder: from `cenote.models.decoder.load_decoder`.
        concept: words, a direction each; lists of them are the prompts at whose ends heads are read.
        concept_name: what to call them.
        sequences: of random tokens, each said twice; the standard errors are over them.
        period: tokens before they are said again; default: 64, or what the model reads.
        seed: of all draws.

    Raises:
        InputError: before the model is asked, where words or model cannot be used.
    """
    words = None if concept is None else _words(concept)
    longest = getattr(decoder.model.config, "max_position_embeddings", None)
    if period is None:
        # two periods, and the spread of an eighth around each
        period = PERIOD if not isinstance(longest, int) else min(PERIOD, longest // 2 - longest // 8)
    if period < SHORTEST:
        raise InputError(f"model: {decoder.name} reads {longest} tokens, too few to say {SHORTEST} twice")
    atlas = head_atlas(decoder.model, decoder.plain_tokens, sequences=sequences, period=period, seed=seed)
    kinds = {name: Kind(_rounded(found.scores), tuple(found.heads())) for name, found in atlas.items()}
    made = None if words is None else _about(decoder, words, concept_name, seed)
    return Heads(
        Path(decoder.name).name,
        kinds,
        made,
        provenance(
            "cenote.jobs.explain.heads.heads",
            model_sha256=decoder.digest,
            sequences=sequences,
            period=period,
            seed=seed,
        ),
    )


def prompts(words: Sequence[str], seed: int = 0) -> list[str]:
    """Lists of four of the words, after which another may come.

    >>> len(prompts(["red", "blue", "green", "pink", "grey"])), prompts(["red", "blue", "red"])[0].count(",")
    (64, 3)
    """
    generator = random.Random(seed)
    return [", ".join(generator.sample(words, min(LISTED, len(words)))) + "," for _ in range(PROMPTS)]


def _about(decoder: Decoder, words: Sequence[str], name: str, seed: int) -> Concept:
    dictionary = concept_dictionary(decoder.model, decoder.tokenizer, words)
    encoded = [decoder.tokenizer(text, return_tensors="pt") for text in prompts(words, seed)]
    device = next(decoder.model.parameters()).device
    dictionary = dictionary._replace(rows=dictionary.rows.cpu())
    outputs = head_outputs(decoder.model, ({"input_ids": one["input_ids"].to(device)} for one in encoded))
    unembedding = decoder.model.get_output_embeddings().weight.detach().float().cpu()  # type: ignore[operator]
    found = concept_heads(outputs.cpu(), dictionary, baseline=unembedding, seed=seed)
    best = tuple(
        (FoundHead(layer, head, round(float(found.scores[layer, head]), 6)), _written(decoder, found, layer, head))
        for layer, head in found.best()
    )
    return Concept(name, len(words), _rounded(found.scores), best, dictionary.split)


def _written(decoder: Decoder, found: ConceptHeads, layer: int, head: int) -> tuple[str, ...]:
    return tuple(decoder.tokenizer.decode([i]).strip() for i in found.atoms[layer, head].tolist() if i >= 0)


def _words(given: Sequence[str]) -> list[str]:
    words = list(dict.fromkeys(w.strip() for w in given if w.strip()))
    if len(words) < 2:
        raise InputError(f"concept: expected a word a line, at least 2, got {len(words)}")
    return words


def _at(head: FoundHead) -> str:
    return f"layer {head.layer}, head {head.head}"


def _rounded(scores: Tensor) -> tuple[tuple[float, ...], ...]:
    return _grid([[round(v, 6) for v in row] for row in scores.tolist()])


def _grid(rows: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in rows)


def _heads(rows: Sequence[Sequence[Any] | Mapping[str, Any]]) -> tuple[FoundHead, ...]:
    return tuple(FoundHead(*row) for row in rows)
