"""Another module in a place: it runs, it learns, and the old one comes back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.models.live import zoo
from torch import Tensor, nn

from cenote.core import InputError
from cenote.models.live import attentions, swapped
from cenote.models.live.swapped import as_mixer


class Means(nn.Module):
    """The mean of all real tokens, times a learned factor."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.masks: list[Tensor | None] = []

    def forward(self, x: Tensor, mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        self.masks.append(mask)
        real = torch.ones_like(x[..., :1]) if mask is None else mask[..., None].to(x)
        return (x * real).sum(1, keepdim=True).expand_as(x) / real.sum(1, keepdim=True) * self.factor


@pytest.mark.parametrize("name", ["llama", "vit", "own", "bert", "dinov2"])
def test_a_mixer_runs_learns_and_goes(name: str) -> None:
    case, mixer = zoo.MODELS[name]("sdpa"), Means()
    place = attentions(case.model)[0]
    plain = zoo.tensors(case.model(**case.inputs))
    with swapped(case.model, {place: as_mixer(mixer)}):
        ours = zoo.tensors(case.model(**case.inputs))
        assert mixer.factor.dtype == torch.float32
        ours[0].square().sum().backward()
    assert mixer.factor.grad is not None
    assert mixer.factor.grad.abs() > 0
    assert not torch.equal(ours[0], plain[0])
    assert case.model.get_submodule(place.path) is place.module
    assert all(map(torch.equal, zoo.tensors(case.model(**case.inputs)), plain))


def test_contexts_left_in_any_order_and_by_an_exception() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    old, first, second = model[1], nn.Tanh(), nn.Sigmoid()
    a, b = swapped(model, {"1": first}), swapped(model, {"1": second})
    a.__enter__()
    b.__enter__()
    a.__exit__(None, None, None)
    assert model[1] is second
    b.__exit__(None, None, None)
    assert model[1] is old
    with pytest.raises(RuntimeError, match="midst"), swapped(model, {"1": first}):
        raise RuntimeError("in the midst")
    assert model[1] is old


def test_what_cannot_be_is_said() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(InputError, match="no module of Sequential"), swapped(model, {"7": nn.ReLU()}):
        pass
    with pytest.raises(InputError, match=r"expected a torch.nn.Module, got int"), swapped(model, {"0": 3}):  # type: ignore[dict-item]
        pass
    wrong: Any = ["0"]
    with pytest.raises(InputError, match="expected a module for each place or path, got list"), swapped(model, wrong):
        pass
    wrong = {0: nn.ReLU()}
    with pytest.raises(InputError, match=r"expected places or paths as keys.* got 0"), swapped(model, wrong):
        pass


def test_a_place_inside_of_a_swapped_one_is_refused() -> None:
    model = nn.Sequential(zoo.OwnBlock(8, 2), zoo.OwnBlock(8, 2)).eval()
    (place, _), before = attentions(model), list(model.modules())
    for modules in ({"0": nn.Identity(), place: nn.Identity()}, {"0.attn.qkv": nn.Identity(), "0": nn.Identity()}):
        with pytest.raises(InputError, match=r"'0.attn.*' stands inside of '0'"), swapped(model, modules):
            pytest.fail("entered")
    with pytest.raises(InputError, match="given twice"), swapped(model, {place: nn.Identity(), place.path: nn.ReLU()}):
        pytest.fail("entered")
    assert list(model.modules()) == before
    with swapped(model, {place: nn.Identity(), "1": nn.Identity()}):
        pass
