from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cenote
from cenote.core.reduced import Reduced, merged, selected
from cenote.reduce import BudgetReducer, SequentialPooling
from cenote.testing import ContractError, check_reducer

SETTINGS = {"factor": 3}


@pytest.mark.parametrize("name", [m.name for m in cenote.methods(room="reduce") if "tokens" in m.kind])
def test_every_reducer_keeps_its_contract(name: str) -> None:
    reducer = cenote.create(name, **SETTINGS)
    check_reducer(reducer)


class _Own:
    """A reducer that does all by itself: pairs of neighbours, each the mean of two."""

    needs = frozenset[str]()
    keeps = "means"
    counts = "free"
    order_matters = True

    def __call__(
        self,
        x: Tensor,
        sizes: Tensor | None = None,
        mask: Tensor | None = None,
        protect: Tensor | int | None = None,
        **signals: Tensor,
    ) -> Reduced:
        return SequentialPooling(factor=2, unit_norm=False)(x, sizes, mask, protect)


def test_a_class_of_ones_own_can_be_checked() -> None:
    check_reducer(_Own())


class _Reads(_Own):
    """What stands in padding goes in."""

    def __call__(self, x: Tensor, sizes=None, mask=None, protect=None, **signals: Tensor) -> Reduced:  # type: ignore[no-untyped-def]
        return super().__call__(x + x.nan_to_num().sum(1, keepdim=True) * 1e-3, sizes, mask, protect)


class _Centred(_Own):
    """The batch is centred first."""

    def __call__(self, x: Tensor, sizes=None, mask=None, protect=None, **signals: Tensor) -> Reduced:  # type: ignore[no-untyped-def]
        found = super().__call__(x, sizes, mask, protect)
        return found._replace(tokens=found.tokens - found.real.unsqueeze(-1) * found.tokens.mean((0, 1)))


class _Unprotected(_Own):
    def __call__(self, x: Tensor, sizes=None, mask=None, protect=None, **signals: Tensor) -> Reduced:  # type: ignore[no-untyped-def]
        return super().__call__(x, sizes, mask, None)


class _Unsized(_Own):
    """Sizes count members, whatever these stand for already."""

    def __call__(self, x: Tensor, sizes=None, mask=None, protect=None, **signals: Tensor) -> Reduced:  # type: ignore[no-untyped-def]
        return super().__call__(x, None, mask, protect)


class _Shaken(_Own):
    def __call__(self, x: Tensor, sizes=None, mask=None, protect=None, **signals: Tensor) -> Reduced:  # type: ignore[no-untyped-def]
        found = super().__call__(x, sizes, mask, protect)
        return found._replace(tokens=found.tokens + found.real.unsqueeze(-1) * torch.randn(found.tokens.shape) * 1e-9)


class _Lazy(_Own):
    def __call__(self, x: Tensor, sizes=None, mask=None, protect=None, **signals: Tensor) -> Reduced:  # type: ignore[no-untyped-def]
        return SequentialPooling(factor=1, unit_norm=False)(x, sizes, mask, protect)


class _Members(_Own):
    """Says that it keeps rows, and gives means."""

    keeps = "members"


class _Sums(_Own):
    def __call__(self, x: Tensor, sizes=None, mask=None, protect=None, **signals: Tensor) -> Reduced:  # type: ignore[no-untyped-def]
        found = super().__call__(x, sizes, mask, protect)
        return found._replace(tokens=found.tokens * found.sizes.clamp(min=1).unsqueeze(-1))


class _Unordered(_Own):
    """Says that the order of tokens does not matter."""

    order_matters = False


class _Detached(_Own):
    def __call__(self, x: Tensor, sizes=None, mask=None, protect=None, **signals: Tensor) -> Reduced:  # type: ignore[no-untyped-def]
        return super().__call__(x.detach(), sizes, mask, protect)


class _Adrift(_Own):
    """The assignment is that of another token."""

    def __call__(self, x: Tensor, sizes=None, mask=None, protect=None, **signals: Tensor) -> Reduced:  # type: ignore[no-untyped-def]
        found = super().__call__(x, sizes, mask, protect)
        turned = found.counts[:, None] - 1 - found.assignment
        return found._replace(assignment=torch.where(found.assignment < 0, -1, turned))


class _Greedy(BudgetReducer):
    """Leaves one token more than it may."""

    keeps = "members"
    order_matters = True

    def reduce(self, x: Tensor, sizes: Tensor, mask: Tensor) -> Reduced:
        return selected(x, mask & (mask.cumsum(1) <= self.budget.of(mask.sum(1))[:, None] + 1), sizes)


class _Halves(BudgetReducer):
    """Computes in the precision that it is given, and gives back another."""

    order_matters = True

    def forward(self, x: Tensor, *given: Tensor, **more: Tensor) -> Reduced:
        found = super().forward(x, *given, **more)
        return found._replace(tokens=found.tokens.float())

    def reduce(self, x: Tensor, sizes: Tensor, mask: Tensor) -> Reduced:
        own = (mask.cumsum(1) - 1).clamp(min=0)
        counts = self.budget.of(mask.sum(1))[:, None]
        return merged(x, torch.where(mask, own.minimum(counts - 1), -1), int(counts.max()), sizes)


class _Largest(_Own):
    """The largest value of each channel, for the mean."""

    def __call__(self, x: Tensor, sizes=None, mask=None, protect=None, **signals: Tensor) -> Reduced:  # type: ignore[no-untyped-def]
        found = super().__call__(x, sizes, mask, protect)
        slot = found.assignment.remainder(found.sizes.shape[1] + 1)[..., None].expand_as(x)
        low = x.new_full((len(x), found.sizes.shape[1] + 1, x.shape[2]), -torch.inf)
        top = low.scatter_reduce(1, slot, x, "amax")[:, :-1]
        return found._replace(tokens=torch.where(found.real.unsqueeze(-1), top.to(x.dtype), 0.0))


class _Even(_Own):
    """Sizes are summed, and do not weigh."""

    def __call__(self, x: Tensor, sizes=None, mask=None, protect=None, **signals: Tensor) -> Reduced:  # type: ignore[no-untyped-def]
        even, sized = super().__call__(x, None, mask, protect), super().__call__(x, sizes, mask, protect)
        return sized._replace(tokens=even.tokens)


class _Swapped(BudgetReducer):
    """The first two rows that stay stand in each other's place."""

    keeps = "members"
    order_matters = True

    def reduce(self, x: Tensor, sizes: Tensor, mask: Tensor) -> Reduced:
        found = selected(x, mask & (mask.cumsum(1) <= self.budget.of(mask.sum(1))[:, None]), sizes)
        if found.tokens.shape[1] < 2:
            return found
        both = found.real[:, :2].all(1)[:, None, None]
        first = torch.where(both, found.tokens[:, :2].flip(1), found.tokens[:, :2])
        return found._replace(tokens=torch.cat([first, found.tokens[:, 2:]], 1))


class _Deaf(BudgetReducer):
    """Asks for attention, and looks away."""

    keeps = "members"
    order_matters = True
    needs = frozenset({"attention"})

    def reduce(self, x: Tensor, sizes: Tensor, mask: Tensor, *, attention: Tensor) -> Reduced:
        return selected(x, mask & (mask.cumsum(1) <= self.budget.of(mask.sum(1))[:, None]), sizes)


class _Dicing(_Own):
    """Draws from the global generator of numpy."""

    def __call__(self, x: Tensor, sizes=None, mask=None, protect=None, **signals: Tensor) -> Reduced:  # type: ignore[no-untyped-def]
        np.random.rand()
        return super().__call__(x, sizes, mask, protect)


class _HalfDetached(_Own):
    """The gradient goes through the first original of each alone."""

    def __call__(self, x: Tensor, sizes=None, mask=None, protect=None, **signals: Tensor) -> Reduced:  # type: ignore[no-untyped-def]
        odd = torch.arange(x.shape[1])[:, None] % 2 == 1
        return super().__call__(torch.where(odd, x.detach(), x), sizes, mask, protect)


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "reads padding": (_Reads, "padding"),
    "centres the batch": (_Centred, "batch mates"),
    "touches protected tokens": (_Unprotected, "protected"),
    "forgets sizes": (_Unsized, "sizes"),
    "draws from the global generator": (_Shaken, "determinism"),
    "leaves all tokens": (_Lazy, "reduces"),
    "gives means for members": (_Members, "members"),
    "gives sums for means": (_Sums, "means"),
    "denies that order matters": (_Unordered, "order"),
    "cuts the gradient": (_Detached, "gradients"),
    "gives the assignment of others": (_Adrift, "sizes"),
    "breaks its budget": (lambda: _Greedy(factor=3), "budget"),
    "takes the largest for the mean": (_Largest, "means"),
    "lets sizes weigh nothing": (_Even, "means"),
    "exchanges rows": (lambda: _Swapped(factor=3), "members"),
    "ignores what it asks for": (lambda: _Deaf(factor=3), "signals"),
    "draws from numpy's generator": (_Dicing, "determinism"),
    "cuts half of the gradient": (_HalfDetached, "gradients"),
    "gives another dtype back": (lambda: _Halves(factor=3), "half precision"),
}


@pytest.mark.parametrize(("build", "rule"), WRONG.values(), ids=list(WRONG))
def test_a_wrong_reducer_is_caught(build: Callable[[], nn.Module], rule: str) -> None:
    with pytest.raises(ContractError) as caught:
        check_reducer(build())
    assert rule in caught.value.broken
