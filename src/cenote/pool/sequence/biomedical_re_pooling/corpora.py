"""Sentences with two mentions and their relation, read from the corpora of the field: standoff annotation, and DDI XML.

Source: the formats of BioNLP's Bacteria Biotope task (BB3, 2016) and of the DDI corpus (SemEval-2013), as used in "On the
Effectiveness of the Pooling Methods for Biomedical Relation Extraction with Deep Learning", LOUHI 2019 (inferred).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from cenote.core.errors import InputError
from cenote.pool.sequence.dependency_trees import ParsedSentence

NEGATIVE = "none"
"""The class of pairs between which the text states no relation."""

_WORD = re.compile(r"\w+|[^\w\s]")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])|\n+")


class RelationExample(NamedTuple):
    """A sentence with two mentions.

    Attributes:
        words: of the sentence.
        subject, object_: `(start, end)` of each mention, end exclusive.
        label: the relation, `NEGATIVE` where there is none, `None` where it is not known.
        types: what kind of thing the subject is, and the object; `None` where that is not known.
        heads: of each word the index of its head, -1 for the root; `None` without a tree.
        relations: of each word to its head; `None` without a tree.
        tags: of each word, BIO tags for instance; `None` without.
    """

    words: tuple[str, ...]
    subject: tuple[int, int]
    object_: tuple[int, int]
    label: str | None = None
    types: tuple[str, str] | None = None
    heads: tuple[int, ...] | None = None
    relations: tuple[str, ...] | None = None
    tags: tuple[str, ...] | None = None


class Word(NamedTuple):
    """A word and where it stands in its text."""

    text: str
    start: int
    end: int


class Mention(NamedTuple):
    """Something that a text names, at characters `start` to before `end`."""

    kind: str
    start: int
    end: int


def words_in(text: str) -> list[Word]:
    """Words and signs with their places.

    >>> words_in("E. coli")[1]
    Word(text='.', start=1, end=2)
    """
    return [Word(found.group(), *found.span()) for found in _WORD.finditer(text)]


def aligned(words: Sequence[Word], start: int, end: int) -> tuple[int, int]:
    """The words that characters `start` to before `end` touch, as a span of words; `(0, 0)` where they touch none.

    >>> aligned(words_in("the E. coli strain"), 4, 11)
    (1, 4)
    """
    touched = [i for i, word in enumerate(words) if word.start < end and word.end > start]
    return (touched[0], touched[-1] + 1) if touched else (0, 0)


def read_standoff(folder: str | Path, pairs: Sequence[tuple[str, str]]) -> list[RelationExample]:
    """Documents in standoff annotation (BioNLP's Bacteria Biotope): texts `NAME.txt`, mentions `NAME.a1`, relations `NAME.a2`.

    Every pair of mentions of the given kinds in one sentence is an example, in the order of the text; a pair with no relation
    has the negative class. Relations across sentences are left out. Where there is no `NAME.a2`, labels are `None`.

    Args:
        folder: with the files, UTF-8.
        pairs: kinds of subject and object, such as `("Bacteria", "Habitat")`.

    Raises:
        InputError: where there is no text, or a line of annotation is malformed, naming it.
    """
    texts = sorted(Path(folder).glob("*.txt"))
    if not texts:
        raise InputError(f"folder: there is no .txt file in {folder}")
    return [example for path in texts for example in _document(path, pairs)]


def read_ddi(path: str | Path) -> list[RelationExample]:
    """A document, or all of a folder, of the DDI corpus in XML: every annotated pair of drugs of a sentence is an example.

    The label is the type of the interaction, `NEGATIVE` where the pair does not interact.

    Args:
        path: of the file or folder.

    Raises:
        InputError: where there is no such file, or it is not the corpus's XML.
    """
    path = Path(path)
    files = sorted(path.glob("*.xml")) if path.is_dir() else [path]
    if not files or not all(f.is_file() for f in files):
        raise InputError(f"path: there is no XML file at {path}")
    return [example for file in files for example in _ddi_document(file)]


def with_trees(
    examples: Sequence[RelationExample], parse: Callable[[Sequence[str]], ParsedSentence]
) -> list[RelationExample]:
    """The examples with the tree of their sentence, from a parser or from what was parsed before; each sentence is parsed once.

    Args:
        examples: with or without trees.
        parse: words to a parsed sentence; it must keep the words.

    Raises:
        InputError: where it gives another number of words.

    Example:
        >>> example = RelationExample(("aspirin", "helps"), (0, 1), (1, 2))
        >>> chain = ParsedSentence(("aspirin", "helps"), (1, -1), ("nsubj", "root"), ("NOUN", "VERB"))
        >>> with_trees([example], lambda words: chain)[0].heads
        (1, -1)
    """
    trees: dict[tuple[str, ...], ParsedSentence] = {}
    found = []
    for example in examples:
        if example.words not in trees:
            trees[example.words] = parse(example.words)
        tree = trees[example.words]
        if len(tree.heads) != len(example.words):
            raise InputError(
                f"parse: gave {len(tree.heads)} words for the {len(example.words)} of {' '.join(example.words)!r}"
            )
        found.append(example._replace(heads=tree.heads, relations=tree.relations))
    return found


def _document(path: Path, pairs: Sequence[tuple[str, str]]) -> Iterator[RelationExample]:
    text = path.read_text("utf-8")
    mentions: dict[str, Mention] = {}
    for line in _lines(path.with_suffix(".a1")):
        name, _, rest = line.partition("\t")
        if name.startswith("T"):
            mentions[name] = _mention(rest.partition("\t")[0], line)
    known = path.with_suffix(".a2").is_file()
    labels: dict[tuple[str, str], str] = {}
    for line in _lines(path.with_suffix(".a2")):
        name, _, rest = line.partition("\t")
        if name.startswith("R"):
            kind, *roles = rest.split()
            if len(roles) < 2 or not all(":" in role for role in roles[:2]):
                raise InputError(f"{path.with_suffix('.a2')}: expected a kind and two ROLE:MENTION, got {line!r}")
            first, second = (role.partition(":")[2] for role in roles[:2])
            labels[first, second] = labels[second, first] = kind
    for start, end in _sentences(text):
        words = [Word(w.text, w.start + start, w.end + start) for w in words_in(text[start:end])]
        inside = {name: m for name, m in mentions.items() if m.start >= start and m.end <= end}
        for first, subject in inside.items():
            for second, object_ in inside.items():
                if first != second and (subject.kind, object_.kind) in pairs:
                    label = labels.get((first, second), NEGATIVE) if known else None
                    yield _example(words, subject, object_, label)


def _ddi_document(path: Path) -> Iterator[RelationExample]:
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise InputError(f"{path}: is no XML: {error}") from None
    for sentence in root.iter("sentence"):
        words = words_in(sentence.get("text", ""))
        mentions = {}
        for entity in sentence.iter("entity"):
            numbers = [int(n) for n in re.findall(r"\d+", entity.get("charOffset", ""))]
            if len(numbers) < 2:
                raise InputError(f"{path}: entity {entity.get('id')} has no charOffset START-END")
            # the last character counts there
            mentions[entity.get("id", "")] = Mention(entity.get("type", ""), numbers[0], numbers[-1] + 1)
        for pair in sentence.iter("pair"):
            ends = [mentions.get(pair.get(end, "")) for end in ("e1", "e2")]
            if ends[0] is None or ends[1] is None:
                raise InputError(f"{path}: pair {pair.get('id')} names an entity that its sentence does not have")
            label = pair.get("type", "int") if pair.get("ddi") == "true" else NEGATIVE
            yield _example(words, ends[0], ends[1], label)


def _example(words: Sequence[Word], subject: Mention, object_: Mention, label: str | None) -> RelationExample:
    return RelationExample(
        tuple(word.text for word in words),
        aligned(words, subject.start, subject.end),
        aligned(words, object_.start, object_.end),
        label,
        (subject.kind, object_.kind),
    )


def _mention(annotation: str, line: str) -> Mention:
    kind, *numbers = re.split(r"[ ;]", annotation)
    if len(numbers) < 2 or not all(n.isdecimal() for n in numbers):
        raise InputError(f"annotation: expected a kind and the characters START END, got {line!r}")
    # a mention in pieces is taken from its first to its last character
    return Mention(kind, int(numbers[0]), int(numbers[-1]))


def _sentences(text: str) -> Iterator[tuple[int, int]]:
    start = 0
    for end in [*_SENTENCE_END.finditer(text), None]:
        stop = len(text) if end is None else end.start()
        if text[start:stop].strip():
            yield start, stop
        start = stop if end is None else end.end()


def _lines(path: Path) -> Iterable[str]:
    return (line for line in path.read_text("utf-8").splitlines() if line.strip()) if path.is_file() else ()
