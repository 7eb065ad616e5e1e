from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cenote.core import InputError
from cenote.explain import HeadScores, head_atlas, repeated
from cenote.explain.repeated_tokens import KINDS
from cenote.models.live import recorded
from cenote.testing.as_found import AsFound
from tests.models.live import zoo

UNEVEN = {"initializer_range": 0.5, "max_position_embeddings": 64}


def test_sequences_begin_anew_after_their_own_periods() -> None:
    ids, periods = repeated(6, 10, (5, 40), spread=2, seed=1)
    assert ids.shape == (6, 24)
    assert len(set(periods.tolist())) > 3
    assert bool((periods != periods.roll(1)).all())
    for row, period in zip(ids, periods.tolist(), strict=True):
        assert torch.equal(row[period:], row[:-period])
    assert torch.equal(ids, repeated(6, 10, (5, 40), spread=2, seed=1).ids)


def by_hand(maps: Tensor, periods: Tensor, shift: int) -> Tensor:
    """From whole maps `[sequences, heads, tokens, tokens]`."""
    found = []
    for item, (own, other) in enumerate(zip(periods.tolist(), periods.roll(1).tolist(), strict=True)):
        at = range(max(own, other), maps.shape[-1])
        found.append(torch.stack([maps[item, :, i, i - own + shift] for i in at]).mean(0))
    return torch.stack(found).mean(0)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPTNeoXForCausalLM"])
def test_scores_are_those_of_the_whole_maps(name: str) -> None:
    model = zoo.text(name, **UNEVEN)("sdpa").model
    ids, periods = repeated(5, 12, (5, 40), spread=3, seed=3)
    with torch.no_grad(), recorded(model, "rows", rows="all") as rows:
        model(input_ids=ids)
    found = AsFound(model, lambda: model(input_ids=ids))
    atlas = head_atlas(model, (5, 40), sequences=5, period=12, seed=3, batch=2)
    assert not found.changed()
    assert tuple(atlas) == KINDS
    for layer, (maps, *_) in enumerate(rows["rows"].values()):
        for kind, shift in ("induction", 1), ("duplicate token", 0):
            assert torch.allclose(atlas[kind].scores[layer], by_hand(maps, periods, shift), atol=1e-6)


def test_random_models_have_no_such_heads() -> None:
    model = zoo.text("LlamaForCausalLM", max_position_embeddings=64)("sdpa").model
    assert not any(found.heads(0.15) for found in head_atlas(model, (5, 40), sequences=6, period=16).values())


def test_a_head_must_be_strong_and_sure() -> None:
    scores = torch.tensor([[0.9, 0.9, 0.01]])
    found = HeadScores(scores, torch.zeros(1, 3), torch.tensor([[9.0, 2.0, 9.0]]))
    assert [(one.layer, one.head) for one in found.heads()] == [(0, 0)]
    assert len(found.heads(least=0.0)) == 2


@pytest.mark.parametrize("settings", [{"sequences": 1}, {"spread": 9}, {"spread": -1}])
def test_sequences_are_checked(settings: dict[str, int]) -> None:
    with pytest.raises(InputError, match="sequences, spread"):
        repeated(**{"sequences": 4, "period": 10, "tokens": (0, 9), **settings})  # type: ignore[arg-type]
