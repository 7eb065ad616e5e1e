"""What a translator is trained on: parallel text with its pictures, pictures with captions, and more text to choose from."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from cenote.core.errors import InputError


class Caption(NamedTuple):
    """A text, its translation, and the file of its picture; `None` where there is none.

    Attributes:
        source, target: texts.
        image: file of the picture.
    """

    source: str
    target: str | None = None
    image: Path | None = None


def read_parallel(
    source: str | Path, target: str | Path, images: str | Path | None = None, folder: str | Path | None = None
) -> list[Caption]:
    """Parallel text, UTF-8, a sentence per line on both sides, and the names of the pictures, likewise (as Multi30k is given).

    Args:
        source, target: files of the two languages.
        images: file with the name of one picture per line, what follows `#` left out; `None`: text alone.
        folder: that the pictures lie in; default that of `images`.

    Raises:
        InputError: where a file is not there, they differ in their number of lines, or a picture is not there.
    """
    texts, translations = _lines("source", source), _lines("target", target)
    if len(texts) != len(translations):
        raise InputError(f"target: expected {len(texts)} lines as in {source}, got {len(translations)} in {target}")
    if images is None:
        return [Caption(a, b) for a, b in zip(texts, translations, strict=True)]
    pictures = _pictures(images, folder, len(texts))
    return [Caption(a, b, image) for a, b, image in zip(texts, translations, pictures, strict=True)]


def read_image_text(path: str | Path, folder: str | Path | None = None) -> list[Caption]:
    """Pictures with captions and no translation, UTF-8: `name<TAB>caption` per line, `name#3` for the third of several.

    Args:
        path: of the file.
        folder: that the pictures lie in; default that of `path`.

    Raises:
        InputError: where a file or a picture is not there, or a line has no tab, naming it.
    """
    found = []
    place = Path(path).parent if folder is None else Path(folder)
    for number, line in enumerate(_lines("path", path), 1):
        name, tab, text = line.partition("\t")
        if not tab:
            raise InputError(f"path: expected a name, a tab and a caption, got {line[:60]!r} in line {number}")
        found.append(Caption(text, None, _picture(place, name, number)))
    return found


def choose_in_domain(candidates: Sequence[Caption], domain: Iterable[str], k: int) -> list[Caption]:
    """Of more parallel text the `k` pairs that are most like a domain: lowest difference of cross-entropies, in order of it.

    `H_domain(s) - H_candidates(s)` per word of the source, both by bigrams with one added to every count, of the domain and of
    the candidates themselves.

    Args:
        candidates: parallel text.
        domain: text of the domain, captions say.
        k: how many.

    Raises:
        InputError: where there are fewer candidates, or the domain has no text.

    Example:
        >>> chosen = choose_in_domain([Caption("the treaty is signed"), Caption("a dog runs")], ["a dog sits", "a man runs"], 1)
        >>> chosen[0].source
        'a dog runs'

    Source: Moore, Lewis, "Intelligent Selection of Language Model Training Data", ACL 2010; that the submission chose text of
    its domain is said in its abstract, how is not known to us.
    """
    if not 0 <= k <= len(candidates):
        raise InputError(f"k: expected 0 to {len(candidates)}, the number of candidates, got {k}")
    inside, outside = _Bigrams(domain), _Bigrams(c.source for c in candidates)
    words = len(inside.words | outside.words)
    return sorted(candidates, key=lambda c: inside.entropy(c.source, words) - outside.entropy(c.source, words))[:k]


def back_translated(captions: Sequence[Caption], backwards: Callable[[Sequence[str]], Sequence[str]]) -> list[Caption]:
    """Captions in the target language with sources that a translator in the other direction made.

    Args:
        captions: with texts in the target language as `target`, or, where there is none, as `source`; pictures are kept.
        backwards: texts in the target language to texts in the source language, as `translate_lines` with a model of it.

    Raises:
        InputError: where it gives another number of texts.

    Example:
        >>> back_translated([Caption("ein Hund")], lambda lines: ["a dog" for _ in lines])
        [Caption(source='a dog', target='ein Hund', image=None)]

    Source: Sennrich, Haddow, Birch, "Improving Neural Machine Translation Models with Monolingual Data", ACL 2016.
    """
    targets = [c.source if c.target is None else c.target for c in captions]
    sources = backwards(targets)
    if len(sources) != len(targets):
        raise InputError(f"backwards: expected {len(targets)} texts, one for each caption, got {len(sources)}")
    return [Caption(s, t, c.image) for s, t, c in zip(sources, targets, captions, strict=True)]


class _Bigrams:
    """Counts of words and of pairs of them."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.pairs: Counter[tuple[str, str]] = Counter()
        self.first: Counter[str] = Counter()
        for line in lines:
            pairs = _with_ends(line)
            self.pairs.update(pairs)
            self.first.update(a for a, _ in pairs)
        self.words = {b for _, b in self.pairs}
        if not self.words:
            raise InputError("domain: has no text")

    def entropy(self, line: str, words: int) -> float:
        """Mean of `-log2 p` over the words of a text."""
        pairs = _with_ends(line)
        return -math.fsum(math.log2((self.pairs[p] + 1) / (self.first[p[0]] + words)) for p in pairs) / len(pairs)


def _with_ends(line: str) -> list[tuple[str, str]]:
    words = ["<s>", *line.split(), "</s>"]
    return list(itertools.pairwise(words))


def _lines(name: str, path: str | Path) -> list[str]:
    if not Path(path).is_file():
        raise InputError(f"{name}: there is no file {path}")
    return Path(path).read_text("utf-8").splitlines()


def _pictures(images: str | Path, folder: str | Path | None, count: int) -> list[Path]:
    names = _lines("images", images)
    if len(names) != count:
        raise InputError(f"images: expected {count} names, one for each sentence, got {len(names)} in {images}")
    place = Path(images).parent if folder is None else Path(folder)
    return [_picture(place, name, number) for number, name in enumerate(names, 1)]


def _picture(folder: Path, name: str, line: int) -> Path:
    path = folder / name.partition("#")[0].strip()
    if not path.is_file():
        raise InputError(f"images: there is no file {path}, which line {line} names")
    return path
