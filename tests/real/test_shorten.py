"""Fewer tokens in real models: what is dropped is as if nothing could read it, decoding goes on, decoders follow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from cenote.core.reduced import Reduced
from cenote.models.live import AttentionCall, AttentionEdit, RowRecorder, Shorten, Where, edited, shortened

pytestmark = pytest.mark.real("models of 22 to 135 million parameters")


@pytest.fixture(autouse=True)
def _no_graph() -> Iterator[None]:
    with torch.no_grad():
        yield


class Hiding(AttentionEdit):
    """Keys that nothing may read in these places, `[tokens]`."""

    def __init__(self, keep: Tensor, at: Where) -> None:
        self.keep, self.at = keep, at

    def inputs(self, call: AttentionCall) -> AttentionCall:
        before, keep = call.readable(), self.keep.view(1, 1, 1, -1)
        return call.replace(allowed=lambda rows: keep if before is None else before & keep)


def dropping(x: Tensor, sizes: Tensor, mask: Tensor, keep: Tensor) -> Reduced:
    real = keep & mask
    return Reduced(x, sizes * real, torch.arange(x.shape[1]).expand(len(x), -1).masked_fill(~real, -1), real)


def most_attended(x: Tensor, sizes: Tensor, mask: Tensor, attention: Tensor) -> Reduced:
    """Half of the tokens, those that get most."""
    scores = attention.mean(1).masked_fill(~mask, -1.0)
    real = torch.zeros_like(mask).scatter(1, scores.topk(x.shape[1] // 2, 1).indices, True) & mask
    return dropping(x, sizes, mask, real)


def test_half_of_the_patches_by_what_cls_reads(dinov2: Any) -> None:
    model, _ = dinov2
    pixels = torch.randn(2, 3, 98, 98, generator=torch.Generator().manual_seed(0))
    shorten = Shorten(most_attended, 5, protect=1, rows="first")
    with edited(model, shorten, RowRecorder("last", Where(blocks=[6]))) as run:
        short = model(pixel_values=pixels)
    found = shorten.found
    assert found is not None
    assert found.counts == {5: (2 * 50, 2 * 26)}
    assert [number for (place, _), number in run.effect.items() if place.kind == "block"] == [2 * 24]
    assert found.origin is not None
    for item in range(2):
        keep = torch.zeros(50, dtype=torch.bool)
        keep[found.origin[item]] = True
        with edited(model, Hiding(keep, Where(blocks=range(6, 12)))):
            whole = model(pixel_values=pixels[item : item + 1])
        torch.testing.assert_close(short.last_hidden_state[item], whole.last_hidden_state[0, keep], rtol=0, atol=2e-3)
        torch.testing.assert_close(short.pooler_output[item], whole.pooler_output[0], rtol=0, atol=2e-3)


def test_decoding_behind_a_shortened_span_equals_recomputation(smollm2: Any) -> None:
    model, _ = smollm2
    words = torch.randint(1000, 20_000, (1, 24), generator=torch.Generator().manual_seed(0))
    context = torch.zeros(1, 24, dtype=torch.bool)
    context[:, 2:16] = True
    keep = ~context | (torch.arange(24) % 3 == 0)
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    plain = model(words).logits
    with edited(model, Shorten(dropping, 4, span="context", signals={"keep": keep}), spans={"context": context}):
        made = model.generate(words, **options)
    for step, logits in enumerate(made.logits):
        seen = torch.nn.functional.pad(keep[0], (0, step), value=True)
        with edited(model, Hiding(seen, Where(blocks=range(5, 30)))):
            again = model(made.sequences[:, : 24 + step], use_cache=False).logits[:, -1]
        torch.testing.assert_close(logits, again, rtol=0, atol=2e-3)
    assert torch.equal(model(words).logits, plain)


@pytest.mark.parametrize("proportional", [False, True])
def test_a_decoder_follows_a_shortened_encoder(whisper: Any, proportional: bool) -> None:
    model, _ = whisper
    inputs = {
        "input_features": torch.randn(2, 80, 3000, generator=torch.Generator().manual_seed(0)),
        "decoder_input_ids": torch.tensor([[50257, 50362, 400, 370]]).expand(2, -1),
    }
    keep = torch.arange(1500) < 400
    with edited(
        model,
        Hiding(keep, Where(blocks=range(2, 4), stack="model.encoder.layers")),
        Hiding(keep, Where(kinds=["cross"])),
    ):
        whole = model(**inputs).logits
    options = {"stack": "model.encoder.layers", "proportional": proportional}
    with shortened(model, {1: dropping}, signals={"keep": keep[None]}, **options) as run:
        short = model(**inputs).logits
    assert run.counts == {1: (3000, 800)}
    torch.testing.assert_close(short, whole, rtol=0, atol=2e-3)
