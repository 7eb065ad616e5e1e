"""The pages of a decoder: its layers by heads, and its probability on listed answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cenote.core import files
from cenote.explain.repeated_tokens import FoundHead
from cenote.jobs.explain.choices import Choices
from cenote.jobs.explain.heads import Heads
from cenote.report.assets import environment, flat, shell
from cenote.report.formats import Units

LEVELS = 12
PAGE = "report.html"
PLAIN = Units(percent=False, digits=3)
MOST_QUESTIONS = 200


@dataclass(frozen=True)
class Layers:
    """A picture of all heads, a row per layer and a column per head.

    Attributes:
        name: what is shown.
        full: the score of the strongest colour.
        levels: opacity in per cent, and the heads that have it, as a path of unit squares.
        framed: those that are sure to be of the kind.
        best: these heads, best first, with words where they have any.
    """

    name: str
    full: float
    levels: tuple[tuple[int, str], ...]
    framed: str
    best: tuple[tuple[FoundHead, str], ...]


def write_heads(found: Heads, out: Path) -> Path:
    """Write the page of an atlas of heads, and tell where."""
    pictures = [
        picture(name, kind.scores, [(head, "") for head in kind.found], 1.0) for name, kind in found.kinds.items()
    ]
    if found.concept is not None:
        c = found.concept
        largest = max(max(map(max, c.scores)), 1e-9)
        pictures.append(picture(c.name, c.scores, [(head, ", ".join(words)) for head, words in c.best], largest))
    layers, heads = found.shape
    return _written(out, "heads.html.j2", c=found, pictures=pictures, layers=layers, heads=heads)


def write_choices(found: Choices, out: Path) -> Path:
    """Write the page of an audit of choices, and tell where."""
    return _written(out, "choices.html.j2", c=found, rules=list(found.styles[0].accuracies), most=MOST_QUESTIONS)


def picture(name: str, scores: Sequence[Sequence[float]], best: Sequence[tuple[FoundHead, str]], full: float) -> Layers:
    """Scores as colours.

    >>> drawn = picture("induction", [[0.0, 1.0]], [(FoundHead(0, 1, 1.0), "")], 1.0)
    >>> drawn.levels, drawn.framed
    (((100, 'M1 0h1v1h-1z'),), 'M1 0h1v1h-1z')
    """
    levels: dict[int, str] = {}
    for layer, row in enumerate(scores):
        for head, score in enumerate(row):
            level = round(LEVELS * min(max(score / full, 0.0), 1.0))
            if level:
                levels[level] = levels.get(level, "") + _square(layer, head)
    framed = "".join(_square(head.layer, head.head) for head, _ in best)
    drawn = tuple((round(100 * level / LEVELS), path) for level, path in sorted(levels.items()))
    return Layers(name, full, drawn, framed, tuple(best))


def _square(layer: int, head: int) -> str:
    return f"M{head} {layer}h1v1h-1z"


def _written(out: Path, template: str, *, c: Heads | Choices, **more: object) -> Path:
    page = environment(PLAIN).get_template(template).render(c=c, provenance=flat(c.provenance), **more, **shell())
    path = Path(out) / PAGE
    files.write_whole(path, page)
    return path
