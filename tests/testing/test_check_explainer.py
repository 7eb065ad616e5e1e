"""The contract of explainers fails on explainers that break it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from tests.models.live import zoo
from torch import Tensor, nn

from cenote.core import InputError
from cenote.explain import AttentionRollout
from cenote.explain.base import Attribution, Explainer
from cenote.testing import ContractError, check_explainer

MASK = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 6 + [0]])
INPUTS = {"input_ids": zoo.ids(3, 7) * MASK, "attention_mask": MASK}


class Occlusion(Explainer):
    """The fall of a logit with each token in turn replaced: an explainer that keeps the contract."""

    def scores(self, model: nn.Module, inputs: Mapping[str, Any], target: Tensor | None) -> Tensor:
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        with torch.no_grad():
            logits = model(**inputs).logits
            chosen = logits.argmax(-1) if target is None else target
            plain = logits.gather(1, chosen[:, None])
            without = []
            for token in range(ids.shape[1]):
                other = ids.clone()
                other[:, token] = 3
                without.append(plain - model(**{**inputs, "input_ids": other}).logits.gather(1, chosen[:, None]))
        return torch.cat(without, 1) * mask

    def explain(self, model: nn.Module, inputs: Mapping[str, Any], target: Tensor | None = None) -> Attribution:
        mask = inputs["attention_mask"].bool()
        return Attribution(self.scores(model, inputs, target), mask, target=target, signed=True)


class IgnoresTheTarget(Occlusion):
    def scores(self, model: nn.Module, inputs: Mapping[str, Any], target: Tensor | None) -> Tensor:
        return super().scores(model, inputs, None)


class SpreadsOverPadding(Occlusion):
    def scores(self, model: nn.Module, inputs: Mapping[str, Any], target: Tensor | None) -> Tensor:
        return super().scores(model, inputs, target) / inputs["input_ids"].shape[1]


class SeesBatchMates(Occlusion):
    def scores(self, model: nn.Module, inputs: Mapping[str, Any], target: Tensor | None) -> Tensor:
        found = super().scores(model, inputs, target)
        return found / found.abs().max()


class CountsFromTheLeft(Occlusion):
    def scores(self, model: nn.Module, inputs: Mapping[str, Any], target: Tensor | None) -> Tensor:
        found = super().scores(model, inputs, target)
        return found * torch.linspace(1, 2, 50)[: found.shape[1]]


class LeavesHooks(Occlusion):
    def scores(self, model: nn.Module, inputs: Mapping[str, Any], target: Tensor | None) -> Tensor:
        model.register_forward_hook(lambda *_: None)
        return super().scores(model, inputs, target)


class LeavesWeights(Occlusion):
    def scores(self, model: nn.Module, inputs: Mapping[str, Any], target: Tensor | None) -> Tensor:
        found = super().scores(model, inputs, target)
        with torch.no_grad():
            next(model.parameters())[0] += 1e-6
        return found


class SeedsTheGlobalGenerator(Occlusion):
    def scores(self, model: nn.Module, inputs: Mapping[str, Any], target: Tensor | None) -> Tensor:
        torch.manual_seed(0)
        return super().scores(model, inputs, target)


class IgnoresTheModel(Occlusion):
    class_agnostic = True

    def scores(self, model: nn.Module, inputs: Mapping[str, Any], target: Tensor | None) -> Tensor:
        return inputs["input_ids"] * inputs["attention_mask"].float()


class Constant(Occlusion):
    class_agnostic = True

    def scores(self, model: nn.Module, inputs: Mapping[str, Any], target: Tensor | None) -> Tensor:
        return inputs["attention_mask"].float()


BROKEN = {
    IgnoresTheTarget: "target",
    SpreadsOverPadding: "batch mates",
    SeesBatchMates: "batch mates",
    CountsFromTheLeft: "left padding",
    LeavesHooks: "model as found",
    LeavesWeights: "model as found",
    SeedsTheGlobalGenerator: "determinism",
    IgnoresTheModel: "reacts to the model",
    Constant: "reacts to the model",
}


def classifier() -> nn.Module:
    """It reads the last token, so that left padding does not change what it gives."""
    sizes = {"num_key_value_heads": 2, "num_labels": 3, "initializer_range": 0.3}
    return zoo.text("LlamaForSequenceClassification", **sizes)("sdpa").model


def test_an_explainer_that_keeps_it_passes() -> None:
    check_explainer(Occlusion(), classifier(), INPUTS)


@pytest.mark.parametrize("explainer", BROKEN, ids=lambda e: e.__name__)
def test_explainers_that_break_it_are_caught(explainer: type[Occlusion]) -> None:
    with pytest.raises(ContractError) as error:
        check_explainer(explainer(), classifier(), INPUTS)
    assert BROKEN[explainer] in error.value.broken


def test_inputs_that_can_show_nothing_are_named() -> None:
    whole = {"input_ids": zoo.ids(2, 5), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    with pytest.raises(InputError, match="items of different lengths"):
        check_explainer(AttentionRollout(), classifier(), whole)
    with pytest.raises(InputError, match="in eval mode"):
        check_explainer(AttentionRollout(), classifier().train(), INPUTS)


class Gradient(Explainer):
    """The gradient of a class at the pixels."""

    def scores(self, model: nn.Module, x: Tensor, target: Tensor | None) -> Tensor:
        found = []
        for n in range(len(x)):
            image = x[n : n + 1].detach().clone().requires_grad_()
            logits = model(image)
            chosen = int(logits.argmax()) if target is None else int(target[n])
            found.append(torch.autograd.grad(logits[0, chosen], image)[0].sum(1).flatten())
        return torch.stack(found)

    def explain(self, model: nn.Module, inputs: Mapping[str, Any], target: Tensor | None = None) -> Attribution:
        scores = self.scores(model, inputs["input"], target)
        return Attribution(scores, torch.ones_like(scores, dtype=torch.bool), "pixels", target, signed=True)


class GradientOfTheBatch(Gradient):
    def scores(self, model: nn.Module, x: Tensor, target: Tensor | None) -> Tensor:
        found = super().scores(model, x, target)
        return found / found.abs().max()


class GradientOfOneClass(Gradient):
    def scores(self, model: nn.Module, x: Tensor, target: Tensor | None) -> Tensor:
        return super().scores(model, x, None)


class Light(Gradient):
    class_agnostic = True

    def scores(self, model: nn.Module, x: Tensor, target: Tensor | None) -> Tensor:
        return x.sum(1).flatten(1)


def of_images() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 16, 3)).eval()
    return model, {"input": torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))}


def test_an_explainer_of_images_that_keeps_it_passes() -> None:
    check_explainer(Gradient(), *of_images())


@pytest.mark.parametrize(
    ("explainer", "rule"),
    [(GradientOfTheBatch, "batch mates"), (GradientOfOneClass, "target"), (Light, "reacts to the model")],
)
def test_explainers_of_images_that_break_it_are_caught(explainer: type[Gradient], rule: str) -> None:
    with pytest.raises(ContractError) as error:
        check_explainer(explainer(), *of_images())
    assert rule in error.value.broken


def test_one_image_can_show_nothing() -> None:
    model, inputs = of_images()
    with pytest.raises(InputError, match="or at least two images"):
        check_explainer(Gradient(), model, {"input": inputs["input"][:1]})
