"""Lexicons as they are published: what each says of a word, as numbers for `Lexicon`."""

from __future__ import annotations

import importlib.util
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from cenote.core.errors import InputError

Annotations = Mapping[str, tuple[float, ...]]
"""From a word to its numbers, as many for each word."""

EMOTIONS = (
    "anger",
    "anticipation",
    "disgust",
    "fear",
    "joy",
    "negative",
    "positive",
    "sadness",
    "surprise",
    "trust",
)
_POLARITY = {"negative": (0.0, 1.0), "positive": (1.0, 0.0), "both": (1.0, 1.0), "neutral": (0.0, 0.0)}


class Prefixes(Mapping[str, tuple[float, ...]]):
    """Words, and beginnings of words that are written with a star; a word is found by itself, else by its longest beginning.

    Args:
        entries: by words and by beginnings.

    >>> Prefixes({"happ*": (1.0,)})["happily"], "hap" in Prefixes({"happ*": (1.0,)})
    ((1.0,), False)
    """

    def __init__(self, entries: Annotations) -> None:
        self.entries = entries

    def __getitem__(self, word: str) -> tuple[float, ...]:
        for key in (word, *(f"{word[:end]}*" for end in range(len(word), 0, -1))):
            if key in self.entries:
                return self.entries[key]
        raise KeyError(word)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def read_mpqa(path: str | Path) -> Annotations:
    """MPQA's subjectivity clues: `strong`, `positive`, `negative`, the mean over the parts of speech of a word.

    Args:
        path: of a file with lines as `type=weaksubj len=1 word1=abandoned pos1=adj stemmed1=n priorpolarity=negative`.

    Raises:
        InputError: where there is no such file, or a line has no word or polarity, naming it.
    """
    found: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    for number, line in _lines(path):
        facts = dict(part.partition("=")[::2] for part in line.split() if "=" in part)
        polarity = _POLARITY.get(facts.get("priorpolarity", "").removeprefix("weak").removeprefix("strong"))
        if "word1" not in facts or polarity is None:
            raise _malformed(path, number, line, "word1=... and priorpolarity=...")
        found[facts["word1"]].append((float(facts.get("type") == "strongsubj"), *polarity))
    return {word: tuple(sum(column) / len(rows) for column in zip(*rows, strict=True)) for word, rows in found.items()}


def read_bing_liu(positive: str | Path, negative: str | Path) -> Annotations:
    """Bing Liu's opinion lexicon: 1 of positive words, -1 of negative ones, 0 of those in both files.

    Args:
        positive, negative: files with a word per line; lines that begin with a semicolon are remarks.

    Raises:
        InputError: where a file is not there.
    """
    signs: dict[str, float] = defaultdict(float)
    for path, sign in ((positive, 1.0), (negative, -1.0)):
        for word in {line.strip() for _, line in _lines(path, ";")}:
            signs[word] += sign
    return {word: (sign,) for word, sign in signs.items()}


def read_afinn(path: str | Path) -> Annotations:
    """AFINN: a whole number from -5 to 5 per word, `word<TAB>number` per line.

    Raises:
        InputError: where there is no such file, or a line is malformed, naming it.
    """
    return {line.rpartition("\t")[0]: (_number(path, number, line, -1),) for number, line in _lines(path)}


def read_nrc(path: str | Path) -> Annotations:
    """NRC's emotions: for each of `EMOTIONS` whether the word goes with it, `word<TAB>emotion<TAB>0 or 1` per line.

    Raises:
        InputError: where there is no such file, or a line is malformed, naming it.
    """
    found: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(EMOTIONS))
    for number, line in _lines(path):
        parts = line.split("\t")
        if len(parts) != 3 or parts[1] not in EMOTIONS:
            raise _malformed(path, number, line, "word, emotion and 0 or 1 between tabs")
        found[parts[0]][EMOTIONS.index(parts[1])] = _number(path, number, line, -1)
    return {word: tuple(row) for word, row in found.items()}


def read_semeval(path: str | Path) -> Annotations:
    """SemEval-2015's Twitter lexicon: a number from -1 to 1 per term, `number<TAB>term` per line.

    Raises:
        InputError: where there is no such file, or a line is malformed, naming it.
    """
    return {line.partition("\t")[2]: (_number(path, number, line, 0),) for number, line in _lines(path)}


def read_vader(path: str | Path) -> Annotations:
    """VADER: the mean of ten people's ratings from -4 to 4, `token<TAB>mean<TAB>...` per line.

    Raises:
        InputError: where there is no such file, or a line is malformed, naming it.
    """
    return {line.partition("\t")[0]: (_number(path, number, line, 1),) for number, line in _lines(path)}


def read_liwc(path: str | Path) -> Annotations:
    """A dictionary in the format of LIWC, which must be bought: for each category whether the word belongs to it.

    Args:
        path: of a `.dic` file: categories `number<TAB>name` between two lines `%`, then `word<TAB>number<TAB>...`; `happ*`
            stands for all words that begin so.

    Raises:
        InputError: where there is no such file, or it is not in that format, naming the line.
    """
    lines = list(_lines(path))
    bars = [i for i, (_, line) in enumerate(lines) if line.strip() == "%"]
    if len(bars) != 2:
        raise InputError(f"path: expected categories between two lines % in {path}, got {len(bars)} such lines")
    categories = [line.split()[0] for _, line in lines[bars[0] + 1 : bars[1]]]
    found: dict[str, tuple[float, ...]] = {}
    for number, line in lines[bars[1] + 1 :]:
        word, *named = line.split()
        if not named or not set(named) <= set(categories):
            raise _malformed(path, number, line, "a word and numbers of categories")
        found[word] = tuple(float(category in named) for category in categories)
    return Prefixes(found)


def installed_lexicon() -> Annotations:
    """The lexicon of an installed package, VADER's (`vaderSentiment`) or AFINN's (`afinn`).

    Raises:
        InputError: where neither is installed.
    """
    for package, name, read in (
        ("vaderSentiment", "vader_lexicon.txt", read_vader),
        ("afinn", "AFINN-en-165.txt", read_afinn),
    ):
        spec = importlib.util.find_spec(package)
        for place in () if spec is None else spec.submodule_search_locations or ():
            for file in sorted(Path(place).rglob(name)):
                return read(file)
    raise InputError("lexicon: neither vaderSentiment nor afinn is installed; pip install vaderSentiment")


def _lines(path: str | Path, remark: str | None = None) -> Iterator[tuple[int, str]]:
    if not Path(path).is_file():
        raise InputError(f"path: there is no file {path}")
    # what is published is not always UTF-8; no word is lost by reading a byte as a letter
    data = Path(path).read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    lines: Iterable[tuple[int, str]] = enumerate(re.split(r"\r?\n", text), 1)
    return ((n, line) for n, line in lines if line.strip() and not (remark and line.startswith(remark)))


def _number(path: str | Path, number: int, line: str, column: int) -> float:
    parts = line.split("\t")
    try:
        return float(parts[column]) if len(parts) > 1 else float("x")
    except ValueError:
        raise _malformed(path, number, line, "a word and a number between tabs") from None


def _malformed(path: str | Path, number: int, line: str, expected: str) -> InputError:
    return InputError(f"path: expected {expected}, got {line[:60]!r} in line {number} of {path}")
