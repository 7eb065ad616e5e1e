"""Heads of real models: what is masked is what is really gone, and the model is what it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cenote.mix.sixteen_heads.live import Head, heads_of, importance_of_heads, masked_heads
from cenote.mix.sixteen_heads.pruning import prune_heads, pruning_order, seconds

pytestmark = pytest.mark.real("three models of up to 135 million parameters")


def squared(model: nn.Module, inputs: Any) -> Tensor:
    output = model(**inputs)
    return getattr(output, "logits", output[0]).float().square().sum()


def first(model: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


def close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max()) <= 1e-6 * float(b.abs().max())


def test_an_encoder_loses_its_least_important_heads(minilm: Any) -> None:
    model, tokenizer = minilm
    model = model.double()
    inputs = tokenizer(["Wings in a slipstream", "heat"], padding=True, return_tensors="pt")
    before = first(model, inputs)
    known = heads_of(model, lambda: model(**inputs))
    assert known.heads == (12,) * 6
    importance = importance_of_heads(model, squared, [inputs])
    gone = pruning_order(importance)[:29]
    with masked_heads(model, known, gone):
        expected = first(model, inputs)
    smaller = prune_heads(model, known, gone, inputs)
    assert close(first(smaller.model, inputs), expected)
    assert torch.equal(first(model, inputs), before)
    # measured, and not compared: another process may run
    assert all(seconds(lambda m=m: first(m, inputs), 1) > 0 for m in (model, smaller.model))
    model.float()


def test_a_decoder_loses_query_heads_with_their_groups(smollm2: Any) -> None:
    model, tokenizer = smollm2
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    before = first(model, inputs)
    known = heads_of(model, lambda: model(**inputs))
    assert (known.heads[0], known.kv_heads[0]) == (9, 3)
    importance = importance_of_heads(model, squared, [inputs], "example")
    assert all(bool((s > 0).all()) for s in importance.scores)
    path = known.places[20].path
    heads = [Head(path, n) for n in (3, 4, 5)] + [Head(known.places[5].path, n) for n in (0, 4, 8)]
    with masked_heads(model, known, heads):
        expected = first(model, inputs)
    smaller = prune_heads(model, known, heads, inputs)
    # rounding of float32 through thirty blocks
    assert float((first(smaller.model, inputs) - expected).abs().max()) < 1e-3
    assert smaller.model.get_submodule(path).k_proj.out_features == 128  # type: ignore[union-attr]
    assert torch.equal(first(model, inputs), before)


def test_an_encoder_decoder_has_three_kinds_of_attention(whisper: Any) -> None:
    model, _ = whisper
    inputs = {
        "input_features": torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(0)),
        "decoder_input_ids": torch.tensor([[50257, 50362, 314, 716]]),
    }
    before = first(model, inputs)
    known = heads_of(model, lambda: model(**inputs))
    assert {name: len(places) for name, places in known.types.items()} == {
        "encoder self": 4,
        "decoder self": 4,
        "encoder-decoder": 4,
    }
    importance = importance_of_heads(model, squared, [inputs])
    assert all(bool(s.isfinite().all()) for s in importance.scores)
    heads = [Head(places[1].path, 2) for places in known.types.values()]
    with masked_heads(model, known, heads):
        expected = first(model, inputs)
    smaller = prune_heads(model, known, heads, inputs)
    assert float((first(smaller.model, inputs) - expected).abs().max()) < 1e-3
    assert torch.equal(first(model, inputs), before)
