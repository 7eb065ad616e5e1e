"""captum's methods as explainers: the contract, closed forms, and where they act."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cenote.core import InputError
from cenote.explain import Captum, LastLayerAttention, MeanAttention
from cenote.explain.embedded import embedded, output_of
from cenote.models.live import attentions, recorded
from cenote.models.live.edits import Where
from cenote.testing import check_explainer
from tests.testing.test_check_explainer import INPUTS, classifier

captum = pytest.importorskip("captum", reason="cenote[explain] is not installed")

METHODS: Mapping[str, dict[str, Any]] = {
    "Saliency": {},
    "InputXGradient": {},
    "IntegratedGradients": {"n_steps": 8},
    "GradientShap": {"n_samples": 4},
    "FeatureAblation": {},
    "Lime": {"n_samples": 24},
    "KernelShap": {"n_samples": 24},
    "ShapleyValueSampling": {"n_samples": 3},
}


class Linear(nn.Module):
    """Words have a value each, and the logits are its sums."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(40, 4)
        self.head = nn.Linear(4, 3, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head((self.words(input_ids) * attention_mask[..., None]).sum(1))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_the_contract(method: str) -> None:
    check_explainer(Captum(method, **METHODS[method]), classifier(), INPUTS)  # type: ignore[arg-type]


@pytest.mark.parametrize("explainer", [LastLayerAttention("last"), MeanAttention("last")])
def test_raw_attention_keeps_the_contract(explainer: LastLayerAttention) -> None:
    check_explainer(explainer, classifier(), INPUTS)


def test_raw_attention_is_the_row_of_the_maps() -> None:
    model = classifier()
    with recorded(model, "inputs", at=Where(kinds=["self"])) as found:
        model(**INPUTS)
    maps = [steps[0].weights().mean(1) for steps in found["inputs"].values()]
    assert len(maps) == len(attentions(model))
    last = INPUTS["attention_mask"].sum(1) - 1
    rows = torch.stack([m[torch.arange(3), last] for m in maps])
    torch.testing.assert_close(LastLayerAttention("last").explain(model, INPUTS).scores, rows[-1])
    torch.testing.assert_close(MeanAttention("last").explain(model, INPUTS).scores, rows.mean(0))


@pytest.mark.parametrize("method", ["InputXGradient", "IntegratedGradients", "FeatureAblation", "ShapleyValueSampling"])
def test_of_a_linear_model_all_say_what_each_word_adds(method: str) -> None:
    torch.manual_seed(0)
    model = Linear().eval()
    target = torch.tensor([2, 0, 1])
    found = Captum(method, baseline="zero", **METHODS[method]).explain(model, INPUTS, target)  # type: ignore[arg-type]
    adds = (model.words(INPUTS["input_ids"]) * model.head.weight[target][:, None]).sum(2) * INPUTS["attention_mask"]
    torch.testing.assert_close(found.scores, adds.detach(), atol=1e-5, rtol=1e-4)
    assert found.target is not None
    assert found.target.tolist() == target.tolist()
    if found.completeness_error is not None:
        assert float(found.completeness_error.max()) < 1e-4


def test_patches_of_an_image_are_taken_away_whole() -> None:
    class Bright(nn.Module):
        def forward(self, pixel_values: Tensor) -> Tensor:
            total = pixel_values.sum((1, 2, 3))
            return torch.stack([total, -total], 1)

    images = torch.rand(2, 3, 4, 6)
    inputs = {"pixel_values": images}
    patches = Captum("FeatureAblation", patch=2).explain(Bright(), inputs)
    assert patches.units == "patches"
    expected = images.sum(1).unflatten(2, (3, 2)).unflatten(1, (2, 2)).sum((2, 4)).flatten(1)
    torch.testing.assert_close(patches.scores, expected)
    pixels = Captum("InputXGradient").explain(Bright(), inputs)
    assert pixels.units == "pixels"
    torch.testing.assert_close(pixels.scores, images.sum(1).flatten(1))


def test_seeds_change_what_draws_and_nothing_else() -> None:
    model = classifier()

    def scores(method: str, seed: int) -> Tensor:
        return Captum(method, random_state=seed, **METHODS[method]).explain(model, INPUTS).scores  # type: ignore[arg-type]

    assert not torch.equal(scores("KernelShap", 0), scores("KernelShap", 1))
    assert torch.equal(scores("FeatureAblation", 0), scores("FeatureAblation", 1))
    assert Captum("KernelShap").draws
    assert not Captum("FeatureAblation").draws


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(InputError, match="method: expected 'Saliency'"):
        Captum("Magic")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="settings: captum's Saliency takes no 'n_steps'"):
        Captum("Saliency", n_steps=4)
    with pytest.raises(InputError, match="target: expected 0 to 2, got 5"):
        Captum("Saliency").explain(classifier(), INPUTS, torch.tensor([5, 0, 0]))
    with pytest.raises(InputError, match=r"expected logits \[batch, outputs\]"):
        output_of(torch.zeros(2, 3, 4))
    with pytest.raises(InputError, match="inputs: expected numbers of tokens or pixels"):
        embedded(classifier(), {"name": "x"})
    with pytest.raises(InputError, match="no embedding of"):
        embedded(_Hashed(), {"input_ids": torch.ones(1, 3, dtype=torch.long)})


class _Hashed(nn.Module):
    def forward(self, input_ids: Tensor) -> Tensor:
        return input_ids[:, :2].float()
