"""Sentences about the words that matter, by templates, and the prompt with which a language model would write them.

Source: Feldhus et al., "Saliency Map Verbalization" (2023), arXiv 2210.07222.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from cenote.core import InputError
from cenote.core.requirements import require_at_least, require_one_of
from cenote.explain.saliency_verbalization.searches import (
    Metric,
    Sign,
    Snippet,
    compare_searches,
    convolution_search,
    normalised,
    span_search,
    summary_search,
    threshold,
    total_order,
)

Question = Literal["why", "words"]
NOTHING_FOR = "No word speaks for the prediction."
NOTHING_STANDS_OUT = "No words stand out."
MARKS = re.compile(r"Ġ|▁|##|</?s>|<pad>|\[(?:CLS|SEP|PAD)\]")
QUESTIONS = {
    "why": "Based on the importance scores, briefly explain why the classifier predicted this.",
    "words": "In a nutshell, based on the importance scores, what are the most important words?",
}


@dataclass(frozen=True)
class Verbalized:
    """What is said of one text.

    Attributes:
        words: of the text, cleaned of the marks of tokenizers.
        scores: of the words.
        snippets: what each search found: `"convolution"`, `"span"`, `"total"`, `"compare"`, `"summary"`.
        sentences: of each search; of `"summary"` one for each span.
        summary: the sentences of `"summary"`, or that there is nothing to say, with the labels where they were given.
        coverage: share of all positive scores that the words of the summary have.
    """

    words: tuple[str, ...]
    scores: tuple[float, ...]
    snippets: dict[str, tuple[Snippet, ...]]
    sentences: dict[str, tuple[str, ...]]
    summary: str
    coverage: float

    @property
    def indices(self) -> tuple[int, ...]:
        """Places of the words that the summary names, in the order of the text."""
        return tuple(sorted({i for s in self.snippets["summary"] for i in s.indices}))

    def coloured(self, top: int = 5) -> str:
        """The text for a terminal: the `top` words red and bold, other words with a positive score bold."""
        return " ".join(self._dressed(top, "\033[1;31m{}\033[0m", "\033[1m{}\033[0m", str))

    def html(self, top: int = 5) -> str:
        """The text for a page, likewise."""
        red = '<b style="color:#c5221f">{}</b>'
        return " ".join(self._dressed(top, red, "<b>{}</b>", html.escape))

    def _dressed(self, top: int, red: str, bold: str, safe: Callable[[str], str]) -> list[str]:
        order = sorted((i for i, a in enumerate(self.scores) if a > 0), key=lambda i: -self.scores[i])
        first = set(order[:top])
        return [
            red.format(safe(w)) if i in first else bold.format(safe(w)) if a > 0 else safe(w)
            for i, (w, a) in enumerate(zip(self.words, self.scores, strict=True))
        ]


@dataclass(frozen=True)
class SaliencyVerbalizer:
    """Scores of the words of a text, as sentences: the spans that carry most of the explanation, by templates.

    No model is asked, so that nothing is said that the scores do not say.

    Args:
        length: of the window that is searched, see `convolution_search`.
        metric, value: of the threshold, see `threshold`.
        sign: `"+"` or `"-"`: words of one sign only.
        best: how many snippets of each search make the summary.
        maxwords: the summary names at most so many words; spans that do not fit are left out, the first is cut.
        mincoverage: least coverage of a span that is named.
        legacy: the searches and the summary as in the authors' code, whose windows and slices miss words; without the two
            limits.

    Example:
        >>> found = SaliencyVerbalizer().verbalize("a plot so thin it tears".split(), [0.0, 0.1, 0.3, 0.9, 0.0, 0.1])
        >>> found.summary
        'The word » thin « is most important for the prediction.'

    Source: Feldhus et al. (2023), arXiv 2210.07222.
    """

    length: int = 5
    metric: Metric = "mean"
    value: float = 0.4
    sign: Sign | None = None
    best: int = 5
    maxwords: int = 100
    mincoverage: float = 0.1
    legacy: bool = False

    def __post_init__(self) -> None:
        require_at_least(1, best=self.best, maxwords=self.maxwords)
        require_at_least(0, mincoverage=self.mincoverage)
        threshold([], self.metric, self.value)
        convolution_search([], self.length, sign=self.sign)

    def verbalize(
        self, words: Sequence[str], scores: Sequence[float], predicted: str | None = None, true: str | None = None
    ) -> Verbalized:
        """Say it.

        Args:
            words: of the text; marks of tokenizers are taken away.
            scores: one for each word.
            predicted, true: names of classes, to be named too.

        Raises:
            InputError: where there are not as many words as scores.
        """
        _require_alike(words, scores)
        cleaned = tuple(_clean(w) for w in words)
        settings = (self.length, self.metric, self.value, self.sign, self.legacy)
        searches = {"convolution": convolution_search(scores, *settings), "span": span_search(scores, *settings)}
        snippets = {name: tuple(found) for name, found in searches.items()}
        snippets["total"] = tuple(total_order(scores))
        snippets["compare"] = tuple(compare_searches(*searches.values()))
        # what speaks against the prediction is summed up as what speaks for it is
        summed = [-a for a in scores] if self.sign == "-" and not self.legacy else list(scores)
        least = threshold(normalised(summed), self.metric, self.value)
        spans = summary_search(searches["convolution"], searches["span"], summed, self.best, least, self.legacy)
        if not self.legacy:
            spans = self._limited(spans)
        snippets["summary"] = tuple(spans)
        sentences = {name: _snippets_said(found, cleaned) for name, found in searches.items()}
        sentences["total"] = tuple(
            f"Token '{cleaned[s.indices[0]]}' with {_percent(s)}% of prediction score" for s in snippets["total"]
        )
        sentences["compare"] = tuple(
            f"snippet: '{_joined(s, cleaned)}' occurs in all searches and accounts for {_percent(s)}% of prediction score."
            for s in snippets["compare"]
        )
        sentences["summary"] = tuple(_span_said(s, cleaned, first=not n) for n, s in enumerate(spans))
        summary = self._summary(sentences["summary"], summed, predicted, true)
        return Verbalized(
            cleaned, tuple(scores), snippets, sentences, summary, sum(max(s.coverage, 0.0) for s in spans)
        )

    def _limited(self, spans: Sequence[Snippet]) -> list[Snippet]:
        found: list[Snippet] = []
        left = self.maxwords
        for s in spans:
            if s.coverage < self.mincoverage or not left:
                continue
            if len(s.indices) > left:
                if found:
                    continue
                s = Snippet(s.indices[:left], s.value, s.coverage)
            found.append(s)
            left -= len(s.indices)
        return found

    def _summary(self, said: Sequence[str], scores: Sequence[float], predicted: str | None, true: str | None) -> str:
        if self.legacy:
            return " ".join(said)
        if not any(a > 0 for a in scores):
            parts = [NOTHING_FOR if self.sign != "-" else "No word speaks against the prediction."]
        elif not said:
            parts = [NOTHING_STANDS_OUT]
        else:
            parts = [f"{s}." for s in said]
        if predicted is not None:
            parts.append(f"The prediction is {predicted}" + ("." if true is None else f", the true label {true}."))
        return " ".join(parts)


def instruction_prompt(
    words: Sequence[str], scores: Sequence[float], predicted: str, question: Question = "why"
) -> str:
    """The prompt that has a language model verbalize scores; nothing is sent anywhere.

    Args:
        words, scores: of the text.
        predicted: name of the class.
        question: `"why"`, or `"words"`: which are the most important.

    >>> print(instruction_prompt(["so", "thin"], [0.1, 0.876], "negative").splitlines()[0])
    so (0.10) thin (0.88)
    """
    require_one_of(get_args(Question), question=question)
    _require_alike(words, scores)
    pairs = " ".join(f"{_clean(w)} ({a:.2f})" for w, a in zip(words, scores, strict=True))
    return (
        f"{pairs}\n\n"
        f"A classifier predicted that this text is {predicted}. The score behind each word says how important it was for the "
        f"prediction. The scores were computed after the prediction. The classifier has only seen the text, and no scores.\n\n"
        f"{QUESTIONS[question]}\n"
    )


def ask(
    words: Sequence[str],
    scores: Sequence[float],
    predicted: str,
    generate: Callable[[str], str],
    question: Question = "why",
) -> str:
    """What a language model of yours makes of the prompt; compare it with `named_share`, as it may say what the scores do not.

    Args:
        words, scores, predicted, question: see `instruction_prompt`.
        generate: from the prompt to an answer; the paper took temperature 0.5 and 300 tokens.
    """
    return generate(instruction_prompt(words, scores, predicted, question)).strip()


def _snippets_said(found: Sequence[Snippet], words: Sequence[str]) -> tuple[str, ...]:
    order = sorted(found, key=lambda s: -s.value)
    return tuple(f"snippet: '{_joined(s, words)}' contains {_percent(s)}% of prediction score." for s in order)


def _span_said(s: Snippet, words: Sequence[str], first: bool) -> str:
    text = " ".join(words[i] for i in s.indices)
    kind = "word" if len(s.indices) == 1 else "span" if "." in text else "phrase"
    return f"The {kind} » {text} « " + ("is most important for the prediction" if first else "is also salient")


def _joined(s: Snippet, words: Sequence[str]) -> str:
    return "".join(f"{words[i]} " for i in s.indices)


def _percent(s: Snippet) -> float:
    return round(100 * s.coverage, 2)


def _clean(word: str) -> str:
    return MARKS.sub("", word).strip() or word.strip()


def _require_alike(words: Sequence[str], scores: Sequence[float]) -> None:
    if len(words) != len(scores):
        raise InputError(f"scores: expected one for each of {len(words)} words, got {len(scores)}")
