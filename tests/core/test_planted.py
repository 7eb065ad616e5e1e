"""Facts planted in prose, and the answers that are counted."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cenote.core import InputError
from cenote.core.answers import UNASKED, answered
from cenote.core.planted import CITIES, planted, prompts, recalled

TEXTS = ["The flow separates. It joins again.", "Heat goes to the wall!"]


def tokenizer() -> PreTrainedTokenizerFast:
    """Words, and each digit by itself."""
    words = ["The", "special", "magic", "number", "for", "is", "flow", "separates", "It", "joins", "again"]
    words += ["Heat", "goes", "to", "the", "wall", ".", "!", *CITIES]
    names = ["<pad>", "<s>", *words, *"0123456789", "\n"]
    rules = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>"))
    rules.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=rules, pad_token="<pad>", padding_side="left")


def test_facts_stand_in_the_text_where_they_are_said_to() -> None:
    made = planted(TEXTS, facts=4, seed=1)
    sentences = made.text.replace("!", ".").split(". ")
    assert made.sentences == len(sentences) == 7
    for question, answer, place in zip(made.questions, made.answers, made.places, strict=True):
        assert sentences[place].rstrip(".") == question + answer
    assert made == planted(TEXTS, facts=4, seed=1)
    assert made != planted(TEXTS, facts=4, seed=2)
    assert len({q.split()[-2] for q in made.questions}) == 4
    rest = [s for n, s in enumerate(sentences) if n not in made.places]
    assert rest == ["The flow separates", "It joins again", "Heat goes to the wall"]


def test_what_cannot_be_planted_is_an_error() -> None:
    with pytest.raises(InputError, match="facts: expected at most"):
        planted(TEXTS, facts=100)
    with pytest.raises(InputError, match="texts: have no sentence"):
        planted(["  "], facts=1)


def test_a_number_counts_where_every_digit_is_the_likeliest() -> None:
    asked = prompts(tokenizer(), made := planted(TEXTS, facts=3))
    assert asked.labels.ne(UNASKED).sum(1).tolist() == [5, 5, 5]
    assert asked.mask.all()
    words = tokenizer().convert_ids_to_tokens(asked.prompt[0].tolist())
    assert "".join(words[-5:]) == made.answers[0].strip()
    assert tokenizer().decode(asked.context[0]).split()[:2] == made.text.split()[:2]

    def tell(context: torch.Tensor, prompt: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        logits = torch.nn.functional.one_hot(prompt.roll(-1, 1), 100).float() * 50
        logits[1, -2] = logits[1, -2].roll(1)  # its last digit is wrong
        return logits

    found = recalled(tell, asked)
    assert found.right.tolist() == [True, False, True]
    assert float(found.nll[0]) == pytest.approx(0.0, abs=1e-6)
    assert float(found.nll[1]) == pytest.approx(50.0, rel=1e-3)
    assert (found.said[0] == asked.labels[0]).all()
    other = answered(torch.zeros(3, asked.prompt.shape[1], 100), asked.labels)
    assert found.agrees(found).all()
    assert not found.agrees(other).any()
