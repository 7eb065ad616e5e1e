"""How good translations are: BLEU, a METEOR-like score, and whether an ambiguous word was given its sense.

Source: the measures of Helcl, Libovicky, Varis, "CUNI System for the WMT18 Multimodal Translation Task", WMT 2018.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

from cenote.core.errors import InputError

_STEPS = (
    (re.compile(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])"), r" \1 "),
    (re.compile(r"([^0-9])([\.,])"), r"\1 \2 "),
    (re.compile(r"([\.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)


def words_of(line: str) -> list[str]:
    """Words and punctuation apart, as the evaluation script of NIST (mteval-v13a) has them.

    >>> words_of("A man, 1.5 m tall.")
    ['A', 'man', ',', '1.5', 'm', 'tall', '.']
    """
    for name, letter in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        line = line.replace(name, letter)
    line = f" {line} "
    for pattern, apart in _STEPS:
        line = pattern.sub(apart, line)
    return line.split()


def bleu(translations: Sequence[str], references: Sequence[str]) -> float:
    """BLEU of a corpus, from 0 to 100, as sacrebleu counts it: up to 4 words, cased, `words_of`, exponential smoothing.

    `100 min(1, exp(1 - r/c)) (p_1 p_2 p_3 p_4)^(1/4)`, `p_n` the share of the n-grams that are in the reference; where none is,
    `1 / (2^k t_n)` for the `k`-th such `n`, with `t_n` the number of n-grams.

    Args:
        translations: one text each.
        references: one for each translation.

    Raises:
        InputError: where there are not as many of both, or none.

    Example:
        >>> bleu(["the cat sat on the mat"], ["the cat sat on the mat"])
        100.0

    Source: Papineni et al., "BLEU: a Method for Automatic Evaluation of Machine Translation", ACL 2002; Post, "A Call for
    Clarity in Reporting BLEU Scores", WMT 2018.
    """
    found, given = _pairs(translations, references)
    matches, totals = [0] * 4, [0] * 4
    for ours, theirs in zip(found, given, strict=True):
        for n in range(1, 5):
            mine, wanted = _ngrams(ours, n), _ngrams(theirs, n)
            matches[n - 1] += sum((mine & wanted).values())
            totals[n - 1] += sum(mine.values())
    if not matches[0]:
        return 0.0
    shares, smooth = [], 1.0
    for match, total in zip(matches, totals, strict=True):
        if total == 0:
            return 0.0
        if match == 0:
            smooth *= 2
        shares.append(match / total if match else 1 / (smooth * total))
    length, wanted_length = sum(map(len, found)), sum(map(len, given))
    brevity = 1.0 if length >= wanted_length else math.exp(1 - wanted_length / length)
    return 100 * brevity * math.exp(sum(map(math.log, shares)) / 4)


def meteor_like(
    translations: Sequence[str], references: Sequence[str], stem: Callable[[str], str] = str.lower
) -> float:
    """The score of METEOR without its tables of synonyms and paraphrases, from 0 to 100: mean over the sentences.

    `F = 10 P R / (R + 9 P)` of the words that match, times `1 - 0.5 (chunks / matches)^3` where `chunks` are the runs of
    matches that are in the same order on both sides.

    Args:
        translations: one text each.
        references: one for each translation.
        stem: what words must share to match; default that they are equal in lower case.

    Raises:
        InputError: where there are not as many of both, or none.

    Example:
        >>> round(meteor_like(["a man sits"], ["a man sleeps"]), 2)
        62.5

    Source: Banerjee, Lavie, "METEOR: An Automatic Metric for MT Evaluation with Improved Correlation with Human Judgments", ACL
    workshop 2005.

    Note:
        Words are matched from the left, each with the free one that follows the last match where there is one; the published
        search for the fewest chunks is not done.
    """
    found, given = _pairs(translations, references)
    scores = [_meteor([stem(w) for w in a], [stem(w) for w in b]) for a, b in zip(found, given, strict=True)]
    return 100 * math.fsum(scores) / len(scores)


def sense_accuracy(translations: Sequence[str], right: Sequence[str], senses: Sequence[str]) -> float:
    """Share of the texts that hold the word of the right sense, and that of no other sense.

    Args:
        translations: of texts with an ambiguous word; those with the pictures of other texts are scored in the same way.
        right: the word of each text.
        senses: all words that the ambiguous one may become.

    Raises:
        InputError: where there are not as many of both, or none.

    Example:
        >>> sense_accuracy(["ein Schläger", "eine Fledermaus"], ["Schläger", "Schläger"], ["Schläger", "Fledermaus"])
        0.5
    """
    found, _ = _pairs(translations, right)
    among = set(senses)
    return sum(among & set(words) == {word} for words, word in zip(found, right, strict=True)) / len(right)


def _pairs(translations: Sequence[str], references: Sequence[str]) -> tuple[list[list[str]], list[list[str]]]:
    if len(translations) != len(references) or not references:
        raise InputError(
            f"translations: expected one for each of {len(references)} references, at least one, got {len(translations)}"
        )
    return [words_of(line) for line in translations], [words_of(line) for line in references]


def _ngrams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _meteor(ours: Sequence[str], theirs: Sequence[str]) -> float:
    free = set(range(len(theirs)))
    places: list[int | None] = []
    for word in ours:
        fits = [j for j in sorted(free) if theirs[j] == word]
        if not fits:
            places.append(None)
            continue
        follows = next((p for p in reversed(places) if p is not None), -1) + 1
        place = follows if follows in fits else fits[0]
        places.append(place)
        free.discard(place)
    matches = sum(p is not None for p in places)
    if not matches:
        return 0.0
    before = [None, *places[:-1]]
    chunks = sum(p is not None and (b is None or p != b + 1) for p, b in zip(places, before, strict=True))
    precision, recall = matches / len(ours), matches / len(theirs)
    return 10 * precision * recall / (recall + 9 * precision) * (1 - 0.5 * (chunks / matches) ** 3)
