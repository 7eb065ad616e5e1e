"""Spans: offsets, tokens, numbers, runs; padding on either side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny

from cenote.core import InputError
from cenote.models.live import spans


@pytest.fixture(params=["left", "right"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    tiny.words(tmp_path)
    return tiny.transformers().AutoTokenizer.from_pretrained(tmp_path, padding_side=request.param)


def test_parts_of_texts_on_either_side(tokenizer: Any) -> None:
    inputs, found = spans.of_texts(
        tokenizer, ["a b c d", "x y", "q c r"], {"one": ["b c", "y", "c r"], "two": ["a", "x", "q"]}
    )
    words = [
        tokenizer.convert_ids_to_tokens(ids[mask].tolist())
        for ids, mask in zip(inputs["input_ids"], found["one"], strict=True)
    ]
    assert words == [["b", "c"], ["y"], ["c", "r"]]
    assert found["two"].sum(1).tolist() == [1, 1, 1]
    assert found["one"].shape == inputs["input_ids"].shape


def test_what_cannot_be_found(tokenizer: Any) -> None:
    with pytest.raises(InputError, match="does not occur"):
        spans.of_texts(tokenizer, ["a b"], {"one": ["c"]})
    with pytest.raises(InputError, match="more than once"):
        spans.of_texts(tokenizer, ["a b a"], {"one": ["a"]})
    with pytest.raises(InputError, match="was the text cut"):
        spans.of_texts(tokenizer, ["a b c d"], {"one": ["d"]}, truncation=True, max_length=4)
    with pytest.raises(InputError, match="of 1 items"):
        spans.of_texts(tokenizer, ["a", "b"], {"one": ["a"]})
    with pytest.raises(InputError, match="gives no offsets"):
        spans.of_texts(object(), ["a"], {"one": ["a"]})


def test_tokens_runs_and_numbers() -> None:
    words = torch.tensor([[9, 9, 1, 9, 2], [0, 3, 9, 9, 4]])
    images = spans.of_token(words, 9)
    first, second = spans.of_runs(images)
    assert first.int().tolist() == [[1, 1, 0, 0, 0], [0, 0, 1, 1, 0]]
    assert second.int().tolist() == [[0, 0, 0, 1, 0], [0, 0, 0, 0, 0]]
    with pytest.raises(InputError, match="nowhere"):
        spans.of_token(words, 8)
    left, right = torch.tensor([[0, 0, 1, 1, 1]]), torch.tensor([[1, 1, 1, 0, 0]])
    assert spans.of_ranges(5, [[(1, 3)]], left).int().tolist() == [[0, 0, 0, 1, 1]]
    assert spans.of_ranges(5, [[(1, 3)]], right).int().tolist() == [[0, 1, 1, 0, 0]]
    with pytest.raises(InputError, match="which has 3 tokens"):
        spans.of_ranges(5, [[(1, 4)]], left)
    with pytest.raises(InputError, match="attention_mask"):
        spans.of_ranges(4, [[(1, 3)]], left)
