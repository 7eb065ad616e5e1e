"""Reducers in a real vision transformer: where all tokens stay nothing changes, and half of them are half."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cenote
from cenote.models.live import Shorten, edited
from cenote.reduce import ppt, set_thresholds, watched

pytestmark = pytest.mark.real("a vision transformer of 22 million parameters")

ROWS = {"token-pooling": "all", "token-pooling-means": "all"}
NAMES = (
    "token-pooling",
    "token-pooling-means",
    "ppt",
    "bat",
    "tome",
    "dpc-knn",
    "evit",
    "top-attention",
    "random-drop",
)
PIXELS = torch.randn(2, 3, 84, 84, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_factor_of_one_changes_no_bit(dinov2: Any, name: str) -> None:
    model, _ = dinov2
    plain = model(pixel_values=PIXELS).last_hidden_state
    shorten = Shorten(cenote.create(name, factor=1), 6, protect=1, rows=ROWS.get(name, "first"))
    with pytest.raises(cenote.InputError, match="Shorten did nothing"), edited(model, shorten):
        found = model(pixel_values=PIXELS).last_hidden_state
    assert torch.equal(found, plain)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_half_of_the_patches_are_left(dinov2: Any, name: str) -> None:
    model, _ = dinov2
    reducer = cenote.create(name, fraction=0.5)
    shorten = Shorten(reducer, 6, protect=1, rows=ROWS.get(name, "first"), proportional=True)
    with edited(model, shorten):
        found = model(pixel_values=PIXELS).last_hidden_state
    assert found.shape == (2, 19, 384)
    assert bool(found.isfinite().all())
    assert shorten.found is not None
    assert shorten.found.counts == {6: (2 * 37, 2 * 19)}


@torch.no_grad()
def test_three_cuts_with_thresholds_of_given_images(dinov2: Any) -> None:
    model, _ = dinov2
    at = ppt(36, r=6)

    def run() -> None:
        cuts = [Shorten(reducer, block, protect=1, rows="first", proportional=True) for block, reducer in at.items()]
        with edited(model, *cuts):
            assert model(pixel_values=PIXELS).last_hidden_state.shape == (2, 19, 384)

    thresholds = set_thresholds(at, run)
    with watched(at) as seen:
        run()
    assert all(float(seen[block].pool.float().mean()) == 0.5 for block in thresholds)
