"""Branches of real models: one is `generate`, several are each as alone, and a contrast makes a model heed its context."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cenote.models.live import Branch, Branches, DecodingStep, RowRecorder

pytestmark = pytest.mark.real("a language model of 135 million parameters, a speech model of 38 million")

SAYINGS = {
    "In this story, grass is purple.": ("In this story, the colour of grass is", "purple"),
    "The author of Hamlet is Dickens.": ("The author of Hamlet is", "Dickens"),
}
"""What a context says against what the model knows, how an answer begins, and the answer."""
START, NO_TIMES, END = 50257, 50362, 50256
"""Of a transcript, as Whisper writes it."""
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}


@pytest.fixture
def sayings(smollm2: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """With and without the context."""
    _, tokenizer = smollm2
    begun = [question for question, _ in SAYINGS.values()]
    texts = [f"{context} {question}" for context, question in zip(SAYINGS, begun, strict=True)], begun
    told, untold = (tokenizer(t, padding=True, padding_side="left", return_tensors="pt") for t in texts)
    return dict(told), dict(untold)


@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True, "top_p": 0.9, "repetition_penalty": 1.3, "num_return_sequences": 2}]
)
@pytest.mark.parametrize("parts", [1, 3])
def test_equal_branches_are_generate(
    parts: int, options: dict[str, Any], smollm2: Any, sayings: tuple[dict[str, Tensor], ...]
) -> None:
    model, _ = smollm2
    options = {**GREEDY, "max_new_tokens": 12, **options}
    torch.manual_seed(0)
    plain = model.generate(**sayings[0], **options)
    torch.manual_seed(0)
    assert torch.equal(Branches([Branch(sayings[0], 1 / parts)] * parts).generate(model, **options), plain)


def test_each_branch_is_as_alone(smollm2: Any, sayings: tuple[dict[str, Tensor], ...]) -> None:
    model, _ = smollm2
    recorder = RowRecorder()
    branches = Branches([Branch(sayings[0], 1.5), Branch(sayings[1], -0.5, [recorder])])
    steps: list[DecodingStep] = list(branches.steps(model, **GREEDY))
    drawn = steps[-1].sequences[:, -4:]
    for number, inputs in enumerate(sayings):
        ids = torch.cat([inputs["input_ids"], drawn], 1)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 4), value=1)
        with torch.no_grad():
            once = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, -5:-1]
        for step in steps:
            torch.testing.assert_close(step.logits[number], once[:, step.number], rtol=0, atol=2e-3)
    assert recorder.found.stack(0).shape[:3] == (30, 2, 9)


def test_a_contrast_with_and_without_the_context_heeds_it(smollm2: Any, sayings: tuple[dict[str, Tensor], ...]) -> None:
    """Context-aware decoding: what the model alone doesn't say, with the context or without, it says with 1.5 and -0.5."""
    model, tokenizer = smollm2
    contrast = Branches([Branch(sayings[0], 1.5), Branch(sayings[1], -0.5)])

    def heeds(made: Tensor) -> list[bool]:
        return [answer in tokenizer.decode(row[-4:]) for row, (_, answer) in zip(made, SAYINGS.values(), strict=True)]

    assert heeds(model.generate(**sayings[0], **GREEDY)) == [False, False]
    assert heeds(model.generate(**sayings[1], **GREEDY)) == [False, False]
    assert heeds(contrast.generate(model, **GREEDY)) == [True, True]


def test_whisper(whisper: Any) -> None:
    """Its own generate() puts the start of a transcript in front; with that as the prompt one branch says the same."""
    model, _ = whisper
    noise = torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(0))
    inputs = {"input_features": noise, "decoder_input_ids": torch.tensor([[START, NO_TIMES]])}
    made = Branches([Branch(inputs)]).generate(model, **GREEDY)[0, 2:]
    assert made[made != END].tolist() == model.generate(noise, **GREEDY)[0].tolist()
    silence = {**inputs, "input_features": torch.zeros_like(noise)}
    guided = next(iter(Branches([Branch(inputs, 2.0), Branch(silence, -1.0)]).steps(model, **GREEDY)))
    for logits, one in zip(guided.logits, (inputs, silence), strict=True):
        with torch.no_grad():
            torch.testing.assert_close(logits, model(**one).logits[:, -1], rtol=0, atol=2e-3)
