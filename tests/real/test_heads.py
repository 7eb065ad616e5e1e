"""Heads of real models: how far their top tokens stand apart, and how wide they need to be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cenote.mix.normalization_limits.scan import HeadScan
from cenote.mix.rank_in_attention.probe import RankProbe

pytestmark = pytest.mark.real("a sentence encoder and a language model")

TEXT = (
    "The river begins in the mountains, where snow melts in spring and small streams run together. It flows through a wide "
    "valley with farms on both sides, passes under an old stone bridge, and reaches the sea near a fishing village. In summer "
    "children swim in it, and in winter the water is high and brown. People have lived on its banks for thousands of years. "
)


def loaded(folder: Path, kind: str) -> tuple[Any, dict[str, torch.Tensor]]:
    library = pytest.importorskip("transformers", reason="cenote[models] is not installed")
    model = getattr(library, kind).from_pretrained(folder, dtype=torch.float32).eval()
    ids = library.AutoTokenizer.from_pretrained(folder)(2 * TEXT, return_tensors="pt").input_ids[:, :128]
    return model, {"input_ids": ids}


@pytest.mark.parametrize(
    ("name", "kind", "heads"),
    [("minilm-l6-v2", "AutoModel", 72), ("smollm2-135m-instruct", "AutoModelForCausalLM", 270)],
)
def test_all_heads_are_scanned_and_nothing_exceeds_its_bound(
    name: str, kind: str, heads: int, model_folder: Callable[[str], Path]
) -> None:
    model, inputs = loaded(model_folder(name), kind)
    found = HeadScan(n=5, rows=8).scan(model, inputs, lengths=(32, 64, 128))
    assert len(found.heads) == 3 * heads
    assert all(h.distance <= h.bound * (1 + 1e-6) and h.jacobian <= 0.5 for h in found.heads)
    assert found.growth()[0] > 0
    assert f"of {heads} heads are flat at 128 tokens" in found.sentence()


def test_a_language_model_is_what_it_was_at_full_rank_and_worse_at_rank_one(
    model_folder: Callable[[str], Path],
) -> None:
    model, inputs = loaded(model_folder("smollm2-135m-instruct"), "AutoModelForCausalLM")
    probe = RankProbe(model, inputs)
    found = probe.needed((1, 64))
    assert found.losses[64] == pytest.approx(found.whole, rel=1e-3)
    assert found.losses[1] > found.whole * 1.05
    ranks = torch.stack(list(probe.effective_ranks().values()))
    assert ranks.shape == (30, 9)
    assert bool((ranks < 64).all())


def test_heads_of_an_encoder_are_probed_by_a_loss_of_ones_own(model_folder: Callable[[str], Path]) -> None:
    model, inputs = loaded(model_folder("minilm-l6-v2"), "AutoModel")
    whole = model(**inputs).last_hidden_state.detach()

    def loss() -> float:
        with torch.no_grad():
            return 1 + float((model(**inputs).last_hidden_state - whole).square().mean() / whole.square().mean())

    found = RankProbe(model, inputs).needed((1, 8, 32), loss=loss)
    assert found.losses[32] == pytest.approx(1.0, abs=1e-5)
    assert 1 < found.losses[8] < found.losses[1]
