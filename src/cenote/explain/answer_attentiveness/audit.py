"""The whole audit: is a language model looking at the listed answers, and does it matter?

Source: Wiegreffe et al. (2023), arXiv 2305.14596.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from cenote.core import InputError
from cenote.core.language import Scored, encoded, log_probabilities, longest
from cenote.explain.answer_attentiveness.formats import (
    Format,
    Put,
    Question,
    examples_of,
    fitting,
    prefixes,
    unconditional,
)
from cenote.explain.answer_attentiveness.mass import Mass, Rule, chosen, mass_on_choices

Scorer = Callable[[str, Sequence[str]], Scored]
"""From a prompt and continuations to their log-probabilities."""


@dataclass(frozen=True, eq=False)
class Attentiveness:
    """What an audit found of each question.

    Attributes:
        log_probabilities: of whole choices, `[items, choices]`; -inf where a question has fewer.
        first: of their first tokens.
        tokens: how many each has.
        prior: log-probabilities without the question; the first in the style without choices, the second in the own style.
        mask: True = a real choice.
        gold: the right one.
    """

    log_probabilities: Float[Tensor, "items choices"]
    first: Float[Tensor, "items choices"]
    tokens: Int[Tensor, "items choices"]
    prior: tuple[Float[Tensor, "items choices"], Float[Tensor, "items choices"]]
    mask: Bool[Tensor, "items choices"]
    gold: Int[Tensor, "items"]

    @property
    def mass(self) -> Mass:
        return mass_on_choices(self.log_probabilities, self.mask)

    def predictions(self) -> dict[str, Int[Tensor, "items"]]:
        """Under every rule."""
        return {
            "raw": chosen(self.log_probabilities, "raw", mask=self.mask),
            "prior without choices": self._by("prior", prior=self.prior[0]),
            "prior with choices": self._by("prior", prior=self.prior[1]),
            "per token": self._by("per token", tokens=self.tokens),
        }

    def summary(self, rule: str = "raw") -> Summary:
        """Of all questions, under one rule."""
        known = self.predictions()
        if rule not in known:
            raise InputError(f"rule: expected one of {', '.join(known)}, got {rule!r}")
        mass = self.mass
        right = (known[rule] == self.gold).double()
        by_answer = [float(right[self.gold == answer].mean()) for answer in self.gold.unique()]
        return Summary(
            float(right.mean()),
            sum(by_answer) / len(by_answer),
            float(mass.mass.double().mean()),
            mass.percent_unaffectable,
            float(mass.leftover.double().mean()),
        )

    def sentence(self) -> str:
        """The finding in words."""
        found = self.summary()
        return (
            f"Of the model's probability {found.attentiveness:.2f} goes to the listed choices; for "
            f"{found.percent_unaffectable:.0f} % of {len(self.gold)} questions no other wording of the answers can change "
            f"what it picks. It is right on {found.accuracy:.2f} of them."
        )

    def _by(self, rule: Rule, **given: Any) -> Int[Tensor, "items"]:
        return chosen(self.log_probabilities, rule, mask=self.mask, **given)


class Summary(NamedTuple):
    """Of one setting; `attentiveness` is the mean mass on the choices, `leftover` what the rest has above the margin."""

    accuracy: float
    balanced_accuracy: float
    attentiveness: float
    percent_unaffectable: float
    leftover: float


class Correlation(NamedTuple):
    """Of attentiveness with accuracy over settings, with intervals of 95 % from resampled questions."""

    spearman: float
    spearman_interval: tuple[float, float]
    pearson: float
    pearson_interval: tuple[float, float]


class ChoiceAudit:
    """Scores the choices of questions in one style, and says how much of the probability they get.

    Args:
        model: a causal language model in eval mode; or any function from a prompt and continuations to `Scored`.
        tokenizer: of the model; None with a function.
        style: how questions are put.
        shots: how many examples stand before each.
        seed: of the examples.
        header: a first line of the prompts.

    Example:
        >>> def even(prompt, continuations):
        ...     count = len(continuations)
        ...     return Scored(torch.full((count,), -1.0), torch.full((count,), -1.0), torch.ones(count, dtype=torch.long))
        >>> audit = ChoiceAudit(even).run([Question("What is wet?", ["sand", "water"], 1)])
        >>> round(audit.summary().attentiveness, 3)
        0.736

    Source: Wiegreffe et al. (2023), arXiv 2305.14596.
    """

    def __init__(
        self,
        model: nn.Module | Scorer,
        tokenizer: Any = None,
        *,
        style: Format = "no_answer_choices",
        shots: int = 0,
        seed: int = 0,
        header: str = "",
    ) -> None:
        if isinstance(model, nn.Module) and tokenizer is None:
            raise InputError("tokenizer: give that of the model")
        self.model, self.tokenizer, self.style = model, tokenizer, style
        self.shots, self.seed, self.header = shots, seed, header

    def run(self, questions: Sequence[Question], pool: Sequence[Question] = ()) -> Attentiveness:
        """Score all questions.

        Args:
            questions: what is asked.
            pool: from which examples are taken, others than the questions.

        Raises:
            InputError: naming the question, where its prompt and a choice merge into one token, a choice is empty, or both are
                too long.
        """
        if not questions:
            raise InputError("questions: give at least one")
        examples = examples_of(pool, self.shots, self.seed)
        found: list[Scored] = []
        priors: tuple[list[Tensor], list[Tensor]] = ([], [])
        for number, question in enumerate(questions):
            name = f"question {number} ({question.text[:40]!r})"
            if overlapping := prefixes(question.choices):
                first, second = overlapping[0]
                warnings.warn(
                    f"{name}: {first!r} begins {second!r}; the mass on the choices may count twice", stacklevel=2
                )
            asked = fitting(question, self.style, examples, self._fits, self.header, name)
            found.append(self._scored(asked, name))
            for prior, style in zip(priors, ("no_answer_choices", self.style), strict=True):
                # letters are what is scored, in either
                without = Put(unconditional(question, style).prompt, asked.continuations)
                prior.append(self._scored(without, name).total)
        counts = torch.tensor([len(one.total) for one in found])
        mask = torch.arange(int(counts.max())) < counts[:, None]
        return Attentiveness(
            _padded([one.total for one in found]),
            _padded([one.first for one in found]),
            pad_sequence([one.tokens.cpu() for one in found], batch_first=True, padding_value=1),
            (_padded(priors[0]), _padded(priors[1])),
            mask,
            torch.tensor([question.gold for question in questions]),
        )

    def _scored(self, asked: Put, name: str) -> Scored:
        if isinstance(self.model, nn.Module):
            return log_probabilities(self.model, self.tokenizer, asked.prompt, asked.continuations, item=name)
        return self.model(asked.prompt, asked.continuations)

    def _fits(self, asked: Put) -> bool:
        limit = longest(self.model) if isinstance(self.model, nn.Module) else None
        if limit is None:
            return True
        ids = encoded(self.tokenizer, asked.prompt, asked.continuations)
        return len(ids.prompt) + max(map(len, ids.continuations)) <= limit


def over_settings(
    settings: Mapping[str, Attentiveness], rule: str = "raw", *, draws: int = 1000, seed: int = 0
) -> Correlation:
    """Does accuracy follow attentiveness? Over settings of the same questions, which are resampled for the interval.

    Args:
        settings: at least three, of the same questions.
        rule: by which an answer is taken.
        draws: how often questions are resampled.
        seed: of the draws.
    """
    import scipy.stats

    sizes = {len(found.gold) for found in settings.values()}
    if len(settings) < 3 or len(sizes) > 1:
        raise InputError(
            f"settings: expected at least three of the same questions, got {len(settings)} of {sorted(sizes)}"
        )
    mass = np.stack([found.mass.mass.double().numpy() for found in settings.values()])
    right = np.stack([(found.predictions()[rule] == found.gold).double().numpy() for found in settings.values()])
    items = sizes.pop()
    numbers = np.random.default_rng(seed).integers(items, size=(draws, items))

    def both(chosen: Any) -> tuple[float, float]:
        x, y = mass[:, chosen].mean(1), right[:, chosen].mean(1)
        if np.ptp(x) == 0 or np.ptp(y) == 0:
            return 0.0, 0.0
        return float(scipy.stats.spearmanr(x, y).statistic), float(scipy.stats.pearsonr(x, y).statistic)

    spearman, pearson = both(np.arange(items))
    low, high = np.quantile([both(drawn) for drawn in numbers], [0.025, 0.975], axis=0)
    return Correlation(spearman, (float(low[0]), float(high[0])), pearson, (float(low[1]), float(high[1])))


def _padded(rows: Sequence[Tensor]) -> Float[Tensor, "items choices"]:
    return pad_sequence([row.cpu() for row in rows], batch_first=True, padding_value=-torch.inf)
