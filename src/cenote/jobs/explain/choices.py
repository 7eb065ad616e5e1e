"""Is a language model even looking at the listed answers? Its probability on them, and what other wordings could change."""

from __future__ import annotations

import dataclasses
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from cenote.compare.provenance import provenance
from cenote.core import InputError, files
from cenote.explain.answer_attentiveness.audit import ChoiceAudit, Summary
from cenote.explain.answer_attentiveness.formats import LETTERS, Format, Question
from cenote.jobs.explain.kept import Kept
from cenote.models.decoder import Decoder

JOB = "choices"
FILE = "choices.json"
STYLES: dict[str, Format] = {
    "not shown": "no_answer_choices",
    "in a sentence": "string_answer_choices",
    "with letters": "enumerated_answer_choices",
}
"""How the choices are shown, by a name for people."""


@dataclass(frozen=True)
class Asked:
    """One question in one style.

    Attributes:
        question, choices: as given.
        answer, picked: numbers of the right choice and of the model's.
        probabilities: of each choice.
        mass: of all together.
        margin: of the best over the second.
        unaffectable: whether nothing that the rest of the probability could be given to changes what is picked.
    """

    question: str
    choices: tuple[str, ...]
    answer: int
    picked: int
    probabilities: tuple[float, ...]
    mass: float
    margin: float
    unaffectable: bool


@dataclass(frozen=True)
class Style:
    """All questions in one style.

    Attributes:
        name: how the choices are shown.
        accuracies: rule by which an answer is taken -> share that is right.
        attentiveness: mean probability on the choices.
        percent_unaffectable: of the questions.
        sentence: in words.
        items: question by question.
    """

    name: str
    accuracies: dict[str, float]
    attentiveness: float
    percent_unaffectable: float
    sentence: str
    items: tuple[Asked, ...]


@dataclass(frozen=True)
class Choices(Kept):
    """Whether a model looks at the listed answers.

    Attributes:
        model: its name.
        styles: those that were tried.
        notes: what a reader should know of the questions.
        provenance: where it is from.
        job: tells the file from those of other jobs.
    """

    file: ClassVar[str] = FILE
    what: ClassVar[str] = "audit of choices"
    again: ClassVar[str] = "cenote explain --choices"

    model: str
    styles: tuple[Style, ...]
    notes: tuple[str, ...] = ()
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)
    job: str = JOB

    @property
    def best(self) -> Style:
        """The style with the most probability on the choices."""
        return max(self.styles, key=lambda s: s.attentiveness)

    @property
    def sentence(self) -> str:
        """The finding in words, of the style in which the model looks at the choices most."""
        return f"{self.model}, choices {self.best.name}: {self.best.sentence}"

    @classmethod
    def of_json(cls, raw: Any) -> Self:
        styles = []
        for style in raw["styles"]:
            items = [
                Asked(**{**i, "choices": tuple(i["choices"]), "probabilities": tuple(i["probabilities"])})
                for i in style["items"]
            ]
            styles.append(Style(**{**style, "items": tuple(items)}))
        return cls(raw["model"], tuple(styles), tuple(raw["notes"]), raw["provenance"])


def questions(path: str | Path, limit: int | None = None) -> list[Question]:
    """Questions of a file of JSON lines: `{"question": "...", "choices": ["...", "..."], "answer": 1}`.

    The answer is a number from 0, a letter, or the choice itself.

    Raises:
        InputError: naming the first line that is not so.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"choices: there is no file {file}; name one of JSON lines with question, choices and answer")
    try:
        lines = files.read_regular(file).decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"choices: {file} is no UTF-8 text ({error.reason})") from None
    found = [_question(line, f"{file.name}, line {n}") for n, line in enumerate(lines, 1) if line.strip()][:limit]
    if not found:
        raise InputError(f"choices: {file} holds no question")
    return found


def choices(decoder: Decoder, asked: list[Question]) -> Choices:
    """Put each question in three styles, and see how much of the model's probability the choices get.

    Args:
        decoder: from `cenote.models.decoder.load_decoder`.
        asked: the questions.

    Raises:
        InputError: naming the question that cannot be put.
    """
    styles = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for name, style in STYLES.items():
            styles.append(_style(name, style, decoder, asked))
    notes = tuple(dict.fromkeys(str(w.message) for w in warned if issubclass(w.category, UserWarning)))
    return Choices(
        Path(decoder.name).name,
        tuple(styles),
        notes,
        provenance("cenote.jobs.explain.choices.choices", model_sha256=decoder.digest, questions=len(asked)),
    )


def _style(name: str, style: Format, decoder: Decoder, asked: list[Question]) -> Style:
    found = ChoiceAudit(decoder.model, decoder.tokenizer, style=style).run(asked)
    mass, picked = found.mass, found.predictions()
    summary: Summary = found.summary()
    items = tuple(
        Asked(
            question.text,
            tuple(question.choices),
            question.gold,
            int(picked["raw"][i]),
            tuple(round(p, 6) for p in found.log_probabilities[i][found.mask[i]].exp().tolist()),
            round(float(mass.mass[i]), 6),
            round(float(mass.margin[i]), 6),
            bool(mass.unaffectable[i]),
        )
        for i, question in enumerate(asked)
    )
    accuracies = {rule: found.summary(rule).accuracy for rule in picked}
    return Style(name, accuracies, summary.attentiveness, summary.percent_unaffectable, found.sentence(), items)


def _question(line: str, where: str) -> Question:
    try:
        raw = json.loads(line)
    except ValueError as error:
        raise InputError(f"choices: {where}: is no JSON ({error})") from None
    if not isinstance(raw, dict):
        raise InputError(f"choices: {where}: expected question, choices and answer, got {type(raw).__name__}")
    text, listed, answer = (raw.get(name) for name in ("question", "choices", "answer"))
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"choices: {where}: has no question")
    if not isinstance(listed, list) or not 2 <= len(listed) <= len(LETTERS) or not all(map(_said, listed)):
        raise InputError(f"choices: {where}: expected 2 to {len(LETTERS)} choices that are texts, got {listed!r:.60}")
    if isinstance(answer, str):
        known = [*listed, *LETTERS[: len(listed)]]
        answer = known.index(answer) % len(listed) if answer in known else answer
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(listed):
        raise InputError(
            f"choices: {where}: expected as answer a number from 0 to {len(listed) - 1}, a letter or a choice, got {answer!r}"
        )
    return Question(text, listed, answer)


def _said(choice: object) -> bool:
    return isinstance(choice, str) and bool(choice.strip())
