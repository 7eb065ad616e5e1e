"""LAIT on all-MiniLM-L6-v2, without training: what it costs an encoder that segments are encoded apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from cenote.reduce import LAITEncoder, SegmentCache

pytestmark = pytest.mark.real("a sentence encoder of 23 million parameters")

PAIRS = (
    ("A cat sleeps on the sofa.", "Nobody has seen the animal that lives in this house since yesterday morning."),
    ("The tax return is due in May.", "You must file your taxes before summer, or pay a fine to the revenue office."),
    ("He repaired the bicycle.", "The chain had come off, and one of the brakes did not work any more."),
)


def segments(tokenizer: Any) -> tuple[Tensor, Tensor]:
    found = tokenizer([text for pair in PAIRS for text in pair], padding=True, return_tensors="pt")
    return found["input_ids"].view(3, 2, -1), found["attention_mask"].view(3, 2, -1).bool()


@torch.no_grad()
def test_the_later_segments_meet_the_further_states_are_from_those_of_the_whole(minilm: Any) -> None:
    model, tokenizer = minilm
    ids, mask = segments(tokenizer)
    whole = LAITEncoder(model, 0, "global")(ids, mask)
    for item in range(3):
        own = model(ids[item][mask[item]][None]).last_hidden_state[0]
        torch.testing.assert_close(whole.states[item][whole.mask[item]], own, rtol=1e-4, atol=1e-4)
    near = []
    for split in range(7):
        found = LAITEncoder(model, split, "global")(ids, mask).states
        near.append(float(cosine_similarity(found, whole.states, dim=-1)[whole.mask].mean()))
    assert near == sorted(near, reverse=True)
    assert near[0] > 0.999
    assert 0.5 < near[6] < 0.95


@torch.no_grad()
def test_segments_alone_are_those_of_the_library_and_are_kept(minilm: Any) -> None:
    model, tokenizer = minilm
    ids, mask = segments(tokenizer)
    found = LAITEncoder(model, 6)(ids, mask).states.view(6, -1, 384)
    alone = model(ids.flatten(0, 1), mask.flatten(0, 1).long()).last_hidden_state
    torch.testing.assert_close(found[mask.flatten(0, 1)], alone[mask.flatten(0, 1)], rtol=1e-4, atol=1e-4)
    cache, lait = SegmentCache(), LAITEncoder(model, 4).eval()
    first = lait(ids, mask, cache=cache).states
    torch.testing.assert_close(lait(ids, mask, cache=cache).states, first, rtol=1e-5, atol=1e-5)
    assert (cache.misses, cache.hits) == (6, 6)
