"""Every rule of the contract catches a pool that breaks it, and says which rule that is."""

import pytest
import torch
import torch.nn.functional as F
from tests.pools import with_costly_rules
from torch import Tensor, nn

from cenote.pool import GatedPool2d, MixedPool2d, Pooled, SoftPool2d
from cenote.testing import ContractError, check_spatial_pool


def test_sound_pools_pass() -> None:
    check_spatial_pool(SoftPool2d(2))
    check_spatial_pool(GatedPool2d(3, 2, padding=1, ceil_mode=True, channels=2))


def test_the_pool_is_not_changed() -> None:
    pool = GatedPool2d(2)
    before = pool.gate.detach().clone()
    check_spatial_pool(pool)
    assert torch.equal(pool.gate, before)
    assert pool.gate.dtype == torch.float32
    assert pool.training


class FloorsTheSize(SoftPool2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., :-1]


class NeedsABatch(SoftPool2d):
    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 3:
            return super().forward(x.flip(0))
        return super().forward(x)


class SeesTheWholeMap(SoftPool2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1e-3 * (x - x.mean()).mean((-1, -2), keepdim=True).abs() + 1e-3 * x[..., :1, :1]


class SeesItsMates(SoftPool2d):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y - y.mean(0, keepdim=True) if x.dim() == 4 else y


class Throws(SoftPool2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1e-3 * torch.rand(())


class CountsPadding(MixedPool2d):
    def __init__(self) -> None:
        super().__init__(2, padding=1, count_include_pad=True)
        self.keeps_constants = True


class Overflows(SoftPool2d):
    def pool(self, x: Tensor) -> Tensor:
        e = x.exp()
        return F.avg_pool2d(x * e, self.kernel_size) / F.avg_pool2d(e, self.kernel_size)


class HoldsWeights(SoftPool2d):
    def __init__(self) -> None:
        super().__init__(2, grad="weights")


class HasADeadParameter(SoftPool2d):
    def __init__(self) -> None:
        super().__init__(2)
        self.dead = nn.Parameter(torch.ones(1))


class Widens(SoftPool2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).double()


class Looks(SoftPool2d):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if float(y.detach().sum()) > 0 else y + 0


class Forgets(GatedPool2d):
    def __init__(self) -> None:
        super().__init__(2)
        self.register_state_dict_post_hook(lambda module, state, prefix, local: state.pop(prefix + "gate"))

    def load_state_dict(self, state: dict[str, Tensor], *args: object, **kwargs: object) -> object:  # type: ignore[override]
        return super().load_state_dict(state, strict=False)


class ReadsMemory(SoftPool2d):
    def forward(self, x: Tensor) -> Tensor:
        strides = [1]
        for n in reversed(x.shape[1:]):
            strides.insert(0, strides[0] * n)
        return super().forward(x.as_strided(x.shape, strides))


class AttendsWrongly(SoftPool2d):
    def attend(self, x: Tensor) -> Pooled:
        output, weights = super().attend(x)
        return Pooled(output, weights.flip(-1))


class AttendsToMore(SoftPool2d):
    def attend(self, x: Tensor) -> Pooled:
        output, weights = super().attend(x)
        return Pooled(output, 2 * weights)


class TakesIntegers(SoftPool2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.is_floating_point() else x.float())


class Copies(SoftPool2d):
    def __deepcopy__(self, memo: object) -> "Copies":
        return Copies(2, temperature=self.temperature * 2)


@pytest.mark.parametrize(
    ("pool", "rule"),
    [
        (FloorsTheSize(2), "output shape"),
        (NeedsABatch(2), "single map"),
        (SeesTheWholeMap(2), "window"),
        (SeesItsMates(2), "batch"),
        (Throws(2), "determinism"),
        (CountsPadding(), "constant map"),
        (Overflows(2), "magnitude"),
        (HoldsWeights(), "gradient: disagrees"),
        (HasADeadParameter(), "gradient: does not reach dead"),
        (Widens(2), "half precision"),
        (Looks(2), "torch compile in one graph: raised"),
        (Looks(2), "torch export: raised"),
        (Forgets(), "safetensors"),
        (ReadsMemory(2), "memory layout"),
        (AttendsWrongly(2), "attend: the weighted sum"),
        (AttendsToMore(2), "attend: the weights"),
        (TakesIntegers(2), "errors: integers is accepted"),
        (Copies(2), "deepcopy"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
@with_costly_rules
def test_a_broken_pool_is_caught(pool: nn.Module, rule: str, left_out: set[str]) -> None:
    left_out = {name for name in left_out if not name.startswith(rule.partition(":")[0])}
    with pytest.raises(ContractError) as caught:
        check_spatial_pool(pool, leave_out=left_out)
    lines = str(caught.value).splitlines()
    assert type(pool).__name__ in lines[0]
    assert any(line.startswith(f"- {rule}") for line in lines), str(caught.value)
