from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cenote.core import InputError
from cenote.models.live.passing import passing


class Pair(nn.Module):
    """Gives a tuple, as many layers do."""

    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return 2 * x, "more"


def test_what_is_first_in_a_tuple_is_changed_and_the_rest_stays() -> None:
    model, x = nn.Sequential(Pair()), torch.ones(2)
    with passing(model, {"0": lambda y: y + 1}) as seen:
        found, more = model(x)
    assert found.tolist() == [3.0, 3.0]
    assert more == "more"
    assert torch.equal(seen["0"].given, x)
    assert torch.equal(seen["0"].gave, found)


def test_what_is_given_by_name_is_seen_too() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Pair()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x=x)[0]

    model, x = Outer(), torch.ones(2)
    with passing(model, {"inner": torch.zeros_like}) as seen:
        assert model(x).tolist() == [0.0, 0.0]
    assert torch.equal(seen["inner"].given, x)


def test_gradients_flow_through_what_is_changed() -> None:
    model, factor = nn.Sequential(nn.Linear(2, 2), nn.ReLU()), torch.ones(2, requires_grad=True)
    with passing(model, {"1": lambda y: factor * y}):
        value = model(torch.ones(1, 2)).sum()
    (gradient,) = torch.autograd.grad(value, factor)
    assert torch.allclose(gradient, model(torch.ones(1, 2))[0])


def test_hooks_are_gone_also_after_an_exception() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="mat1 and mat2"), passing(model, {"0": None}):
        model(torch.ones(1, 3))
    assert not model[0]._forward_hooks


def test_a_path_that_is_not_there_is_named_with_those_that_are() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with (
        pytest.raises(InputError, match=r"at: the model has no module 'layer4'; it has '0'"),
        passing(model, {"layer4": None}),
    ):
        pass
