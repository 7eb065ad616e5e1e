from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from cenote.core import InputError
from cenote.core.language import Scored
from cenote.explain import (
    ChoiceAudit,
    Question,
    chosen,
    examples_of,
    mass_on_choices,
    over_settings,
    put,
    unconditional,
)
from cenote.explain.answer_attentiveness.formats import fitting
from tests.core.test_language import bytes_of  # noqa: F401
from tests.models.live import zoo


def tables(number: int, choices: int = 4) -> Tensor:
    """Probabilities of choices, and what is left over in the last column."""
    generator = torch.Generator().manual_seed(0)
    sharp = 4 * torch.rand(number, 1, dtype=torch.float64, generator=generator)
    return (sharp * torch.randn(number, choices + 1, dtype=torch.float64, generator=generator)).softmax(1)


def test_the_bound_is_never_violated() -> None:
    table = tables(2000)
    p, left = table[:, :-1], table[:, -1]
    found = mass_on_choices(p.log())
    assert torch.allclose(found.mass, 1 - left)
    generator = torch.Generator().manual_seed(1)
    shares = torch.rand(20, 2000, 4, dtype=torch.float64, generator=generator)
    # all that is left to each choice alone, and shares of it at random
    given = [*torch.eye(4, dtype=torch.float64)[:, None].expand(4, 2000, 4), *(shares / shares.sum(-1, keepdim=True))]
    flips = torch.stack([(p + left[:, None] * share).argmax(1) != p.argmax(1) for share in given]).any(0)
    assert not (flips & found.unaffectable).any()
    assert flips.sum() > 500
    assert found.unaffectable.sum() > 500
    # and it is tight: all of what is left to the second changes every other
    assert bool((flips == ~found.unaffectable).all())


def test_limits() -> None:
    whole = mass_on_choices(torch.tensor([[0.7, 0.3], [0.5, 0.5]]).log())
    assert whole.unaffectable.tolist() == [True, False]
    tie = mass_on_choices(torch.tensor([[0.4, 0.4, 0.1]]).log())
    assert not tie.unaffectable.any()
    one = mass_on_choices(torch.tensor([[0.3]]).log())
    assert one.mass.tolist() == pytest.approx([0.3])
    everything = torch.randn(3, 40)
    assert torch.allclose(mass_on_choices(everything.log_softmax(1)).mass, torch.ones(3))
    assert torch.allclose(mass_on_choices((everything + 5).log_softmax(1)).mass, torch.ones(3))


def test_ragged_choices() -> None:
    logs = torch.tensor([[0.5, 0.2, 0.1], [0.5, 0.2, 0.9]]).log()
    mask = torch.tensor([[True, True, True], [True, True, False]])
    found = mass_on_choices(logs, mask)
    assert found.mass.tolist() == pytest.approx([0.8, 0.7])
    assert chosen(logs, mask=mask).tolist() == [0, 0]
    assert found.leftover.tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
    assert found.percent_unaffectable in (0.0, 50.0, 100.0)


def test_rules() -> None:
    logs = torch.tensor([[0.4, 0.2, 0.0]]).log()
    assert chosen(logs).tolist() == [0]
    assert chosen(logs, "prior", prior=torch.full((1, 3), 0.2).log()).tolist() == [0]
    assert chosen(logs, "prior", prior=torch.tensor([[0.8, 0.1, 0.0]]).log()).tolist() == [1]
    assert chosen(logs, "per token", tokens=torch.tensor([[1, 8, 1]])).tolist() == [1]
    assert chosen(torch.zeros(1, 5)).tolist() == [0]


BIRDS = Question("Which one flies?", ["a dog", "a bird", "a car"], 1)
SHOT = Question("What is wet?", ["sand", "water"], 1)


def test_prompts_to_the_letter() -> None:
    assert put(BIRDS, "no_answer_choices") == ("Which one flies?", [" a dog", " a bird", " a car"])
    assert put(BIRDS, "string_answer_choices", [SHOT], "Let's answer science questions.") == (
        "Let's answer science questions.\n\n"
        "question: What is wet?\nanswer choices: sand or water\nThe correct answer is: water\n\n"
        "question: Which one flies?\nanswer choices: a dog, a bird, or a car\nThe correct answer is:",
        [" a dog", " a bird", " a car"],
    )
    assert put(BIRDS, "enumerated_answer_choices", [SHOT]) == (
        "Question: What is wet?\nChoices:\n A: sand\n B: water\nAnswer: B\n\n"
        "Question: Which one flies?\nChoices:\n A: a dog\n B: a bird\n C: a car\nAnswer:",
        [" A", " B", " C"],
    )
    assert put(BIRDS, "no_answer_choices", [SHOT]).prompt == "What is wet? water\n\nWhich one flies?"
    assert unconditional(BIRDS, "string_answer_choices").prompt == (
        "answer choices: a dog, a bird, or a car\nThe correct answer is:"
    )
    assert unconditional(BIRDS, "no_answer_choices").prompt == "?"


def test_examples_are_the_same_for_all_and_dropped_until_they_fit() -> None:
    pool = [Question(str(i), ["a", "b"], 0) for i in range(9)]
    assert examples_of(pool, 4, 1) == examples_of(pool, 8, 1)[:4]
    assert examples_of(pool, 4, 1) != examples_of(pool, 4, 2)
    found = fitting(BIRDS, "no_answer_choices", pool[:3], lambda p: p.prompt.count("\n\n") <= 1)
    assert found.prompt == "0 a\n\nWhich one flies?"
    with pytest.raises(InputError, match="question 5: is longer than the model takes"):
        fitting(BIRDS, "no_answer_choices", pool, lambda _: False, item="question 5")
    with pytest.raises(InputError, match="shots: expected 0 to 9"):
        examples_of(pool, 10)


def by_length(prompt: str, continuations: Sequence[str]) -> Scored:
    """Likelier the shorter, and the likelier with a longer prompt."""
    logs = torch.tensor([-float(len(c)) for c in continuations]) * 4 / (1 + math.log(1 + len(prompt)))
    return Scored(logs, logs / 2, torch.tensor([len(c.split()) for c in continuations]))


def test_audit_with_any_scorer() -> None:
    found = ChoiceAudit(by_length, style="string_answer_choices", shots=1).run([BIRDS, SHOT], [SHOT])
    assert found.log_probabilities.shape == (2, 3)
    assert found.mask.tolist() == [[True] * 3, [True, True, False]]
    summary = found.summary()
    assert summary.accuracy == 0.0
    assert 0 < summary.attentiveness < 1
    assert set(found.predictions()) == {"raw", "prior without choices", "prior with choices", "per token"}
    assert "of 2 questions" in found.sentence()
    with pytest.raises(InputError, match="rule: expected one of raw"):
        found.summary("best")


def test_audit_of_a_model(bytes_of: Any) -> None:  # noqa: F811
    model = zoo.MODELS["gpt_neox"]("sdpa").model
    question = Question("ab ade", ["c", "ed", "b"], 0)
    found = ChoiceAudit(model, bytes_of).run([question, question._replace(choices=["c", "e"])])
    assert bool((found.mass.mass <= 1).all())
    assert bool((found.first >= found.log_probabilities).all())
    assert torch.allclose(found.log_probabilities[0, :1], found.log_probabilities[1, :1], atol=1e-5)


def test_choices_that_begin_others_are_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"question 0 .*'a' begins 'a cat'; the mass on the choices may count twice"):
        ChoiceAudit(by_length).run([Question("q", ["a", "a cat"], 0)])


def test_merged_tokens_name_the_question(bytes_of: Any) -> None:  # noqa: F811
    model = zoo.MODELS["llama"]("sdpa").model

    class Glued(ChoiceAudit):
        def _scored(self, asked: Any, name: str) -> Scored:
            return super()._scored(asked._replace(continuations=[c.strip() for c in asked.continuations]), name)

    with pytest.raises(InputError, match=r"question 0 \('ea'\): .* merge into the token 'ab'"):
        Glued(model, bytes_of).run([Question("ea", ["b", "c"], 0)])


def test_correlation_over_settings_has_an_interval() -> None:
    questions = [Question("x" * i, ["a" * (1 + i % 3), "b" * (1 + i % 2)], i % 2) for i in range(1, 30)]
    settings = {
        s: ChoiceAudit(by_length, style=s).run(questions) for s in ("no_answer_choices", "string_answer_choices")
    }
    with pytest.raises(InputError, match="at least three"):
        over_settings(settings)
    settings["letters"] = ChoiceAudit(by_length, style="enumerated_answer_choices").run(questions)
    found = over_settings(settings, draws=50)
    assert -1 <= found.spearman_interval[0] <= found.spearman_interval[1] <= 1
    assert found == over_settings(settings, draws=50)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mass_on_choices(torch.tensor([[0.5, 0.2]])), "expected at most 0"),
        (
            lambda: mass_on_choices(torch.zeros(1, 2) - 1, torch.zeros(1, 2, dtype=torch.bool)),
            "a question has no choice",
        ),
        (lambda: chosen(torch.zeros(1, 2), "prior"), "prior: give the log-probabilities"),
        (lambda: chosen(torch.zeros(1, 2), "per token"), "tokens: give how many"),
        (lambda: chosen(torch.zeros(1, 2), "loud"), "rule: expected 'raw', 'prior' or 'per token'"),
        (lambda: put(BIRDS, "shouted"), "style: expected 'no_answer_choices'"),
        (lambda: put(Question("q", [], 0), "no_answer_choices"), "choices: expected 1 to 26"),
        (lambda: put(Question("q", ["a"], 1), "no_answer_choices"), "gold: expected a number below 1"),
        (lambda: ChoiceAudit(by_length).run([]), "questions: give at least one"),
        (lambda: ChoiceAudit(torch.nn.Linear(2, 2)), "tokenizer: give that of the model"),
    ],
)
def test_what_cannot_be_used_is_named(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=message):
        call()
