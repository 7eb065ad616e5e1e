"""Attention maps of a model as it is loaded are those of eager."""

from __future__ import annotations

import pytest
import torch
from tests.models.live import zoo
from torch import nn

from cenote.core import InputError
from cenote.models.maps import maps


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_maps_are_those_of_eager(name: str) -> None:
    loaded, eager = zoo.MODELS[name]("sdpa"), zoo.MODELS[name]("eager")
    with maps(loaded.model, name) as found:
        loaded.model(**loaded.inputs)
    expected = eager.model(**eager.inputs, output_attentions=True).attentions
    assert len(found) == len(expected) == 3
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_what_cannot_be_reached_is_refused() -> None:
    bloom = zoo.MODELS["bloom"]("eager").model
    with (
        pytest.raises(InputError, match=r"attentions: Bloom gives .*writes it out.*hidden states"),
        maps(bloom, "Bloom"),
    ):
        pytest.fail("entered")
    with pytest.raises(InputError, match="it has no attention"), maps(nn.Linear(2, 2), "Linear"):
        pytest.fail("entered")
