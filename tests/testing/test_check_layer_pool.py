"""Every rule of the contract catches a pool that breaks it, and says which rule that is."""

import pytest
import torch
from tests.pools import with_costly_rules
from torch import Tensor, nn

from cenote.pool import LayersPooled, WeightedLayerSum
from cenote.testing import ContractError, check_layer_pool


def test_a_sound_pool_passes_and_is_not_changed() -> None:
    pool = WeightedLayerSum(8, layers=3)
    check_layer_pool(pool)
    assert pool.scores.eq(0).all()
    assert pool.scores.dtype == torch.float32
    assert pool.training


class Pool(WeightedLayerSum):
    def __init__(self) -> None:
        super().__init__(8, layers=3)


class TwoVectors(Pool):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, mask).unsqueeze(1).expand(-1, 2, -1)


class Random(Pool):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, mask) + torch.rand(())


class ReadsPadding(Pool):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, mask) + x[:, 0].mean(1)


class CountsSlots(Pool):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, mask) * x.shape[2]


class SeesMates(Pool):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = super().forward(x, mask)
        return y - y.mean(0)


class CaresForOrder(Pool):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x * (1 + torch.arange(x.shape[2]).to(x)).view(1, 1, -1, 1), mask)


class SaysLayersAreASet(Pool):
    layer_invariant = True


class NaNWhenEmpty(Pool):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        mask = torch.ones(x.shape[0], x.shape[2], dtype=torch.bool) if mask is None else mask
        self._checked(x, mask)
        mixed = self.mix(x.masked_fill(~mask[:, None, :, None], 0)).sum(1)
        return mixed / mask.sum(1, keepdim=True)


class HiddenParameter(Pool):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Parameter(torch.zeros(3))


class FalselyInert(Pool):
    inert_parameters = ("gamma",)


class WrongGradient(Pool):
    def pool_only(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return super().pool_only(x.detach() * 0.5 + x * 0.5, mask)


class WideOutput(Pool):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, mask).double()


class Branches(Pool):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = super().forward(x, mask)
        return y if float(y.detach().sum()) > 1e9 else y * 1.0


class CopiesBadly(Pool):
    scale = 1.0

    def __deepcopy__(self, memo: dict) -> "CopiesBadly":
        other = CopiesBadly().to(self.gamma.dtype).train(self.training)
        other.load_state_dict(self.state_dict())
        other.scale = self.scale + 1
        return other

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, mask) * self.scale


class StoresLess(Pool):
    def state_dict(self, *args, **kwargs) -> dict:
        return {k: v for k, v in super().state_dict(*args, **kwargs).items() if k != "gamma"}


class DependsOnStrides(Pool):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, mask) * (1.0 if x.is_contiguous() else 2.0)


class AttendsElsewhere(Pool):
    def attend(self, x: Tensor, mask: Tensor | None = None) -> LayersPooled:
        output, weights = super().attend(x, mask)
        return LayersPooled(output + 1, weights)


class FlatWeights(Pool):
    def attend(self, x: Tensor, mask: Tensor | None = None) -> LayersPooled:
        output, weights = super().attend(x, mask)
        return LayersPooled(output, weights.sum(2))


class WeighsPadding(Pool):
    def attend(self, x: Tensor, mask: Tensor | None = None) -> LayersPooled:
        output, weights = super().attend(x, mask)
        return LayersPooled(output, weights + 0.1)


class TakesAnything(Pool):
    def _checked(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return x if mask is None else x.masked_fill(~mask.bool()[:, None, :, None], 0)


@pytest.mark.parametrize(
    ("broken", "rule"),
    [
        (TwoVectors, "output shape"),
        (Random, "determinism"),
        (ReadsPadding, "padding leaks: NaN"),
        (CountsSlots, "padding leaks: four more"),
        (SeesMates, "batch: "),
        (CaresForOrder, "order: permuting the tokens"),
        (SaysLayersAreASet, "order: reversing the layers"),
        (NaNWhenEmpty, "no token: a mask without True gives NaN"),
        (HiddenParameter, "gradient: does not reach spare"),
        (FalselyInert, "gradient: gamma is declared inert"),
        (WrongGradient, "gradient: disagrees"),
        (WideOutput, "half precision"),
        (Branches, "torch compile"),
        (CopiesBadly, "deepcopy: "),
        (StoresLess, "safetensors"),
        (DependsOnStrides, "memory layout"),
        (AttendsElsewhere, "attend: its output differs"),
        (FlatWeights, "attend: weights have shape"),
        (WeighsPadding, "attend: padded slots"),
        (TakesAnything, "errors: "),
    ],
)
@with_costly_rules
def test_a_broken_pool_is_caught(broken: type[Pool], rule: str, left_out: set[str]) -> None:
    left_out = {name for name in left_out if not name.startswith(rule.partition(":")[0])}
    with pytest.raises(ContractError, match=rule):
        check_layer_pool(broken(), leave_out=left_out)
