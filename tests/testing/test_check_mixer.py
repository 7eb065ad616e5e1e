import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cenote
from cenote.mix.attentive_convolution.convolution import ATConv
from cenote.mix.base import GridMixer, Mixer
from cenote.mix.basic.attention import AttentionMixer
from cenote.mix.context_broadcasting.broadcasting import ContextBroadcasting, SqueezeExcitation
from cenote.mix.metaformer.pooling import PoolMixer
from cenote.mix.ponet.mixer import PoNetMixer
from cenote.testing import ContractError, check_mixer

RIGHT: dict[str, Callable[[], nn.Module]] = {
    "causal attention": lambda: AttentionMixer(8, 2, causal=True),
    "attention with biases": lambda: AttentionMixer(8, 2, bias=True),
    "pooling behind a prefix": lambda: PoolMixer(prefix=1),
    "static kernels": lambda: ATConv(8, route=False),
    "a value map": lambda: PoNetMixer(8, segments=2, separate_value=True),
    "running broadcast": lambda: ContextBroadcasting(running=True),
    "squeeze": lambda: SqueezeExcitation(8),
}
KINDS = ("tokens", "grids", "fixed grids")
NAMES = [m.name for m in cenote.methods(room="mix") if m.kind in KINDS]


def built(name: str) -> Any:
    (method,) = (m for m in cenote.methods(room="mix") if m.name == name)
    takes = inspect.signature(method.load()).parameters
    settings: dict[str, Any] = {"dim": 8} if "dim" in takes else {}
    if method.kind == "fixed grids":
        settings["grid"] = (2, 3)
    return cenote.create(name, **settings)


# a Fourier transform at each length is found by its data
NO_GRAPH = ("fnet",)


@pytest.mark.parametrize("name", NAMES)
def test_a_mixer_keeps_its_contract(name: str) -> None:
    check_mixer(built(name), leave_out=["export"])


@pytest.mark.parametrize("build", RIGHT.values(), ids=list(RIGHT))
def test_a_mixer_with_other_settings_keeps_its_contract(build: Callable[[], Any]) -> None:
    check_mixer(build(), leave_out=["export"])


@pytest.mark.thorough("every export takes a second")
@pytest.mark.parametrize("name", [name for name in NAMES if name not in NO_GRAPH])
def test_a_mixer_can_be_exported(name: str) -> None:
    check_mixer(built(name))


class _Own:
    """A mixer that does all by itself: half of each token, half of the mean of all."""

    causal = False
    order_matters = False

    def __call__(self, x: Tensor, mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        real = (torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask).unsqueeze(-1)
        return self.of(x.masked_fill(~real, 0.0), real).masked_fill(~real, 0.0)

    def of(self, x: Tensor, real: Tensor) -> Tensor:
        return (x + x.sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)) / 2


def test_a_class_of_ones_own_can_be_checked() -> None:
    check_mixer(_Own())


class _PadsInTheMean(_Own):
    def of(self, x: Tensor, real: Tensor) -> Tensor:
        return (x + x.mean(1, keepdim=True)) / 2


class _WindowOffByOne(_Own):
    """The mean of a token, the one before it, and the next."""

    causal = True
    order_matters = True

    def of(self, x: Tensor, real: Tensor) -> Tensor:
        return x + F.pad(x[:, :-1], (0, 0, 1, 0)) + F.pad(x[:, 1:], (0, 0, 0, 1))


class _WrapsAround(_Own):
    """Groups are shifted, and what falls off the end comes in at the beginning."""

    causal = True
    order_matters = True

    def of(self, x: Tensor, real: Tensor) -> Tensor:
        return x + x.roll(1, 1)


class _PooledQuery(_Own):
    """Keys that came are weighed by a query that is the mean of all, later ones too."""

    causal = True
    order_matters = True

    def of(self, x: Tensor, real: Tensor) -> Tensor:
        query = x.sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)
        powers = (x * query).sum(-1, keepdim=True).exp() * real
        return (powers * x).cumsum(1) / powers.cumsum(1).clamp(min=1e-9)


class _TopOfAll(_Own):
    """The two keys with the largest scores, padding among them."""

    def of(self, x: Tensor, real: Tensor) -> Tensor:
        scores, chosen = (x @ x.mT).topk(min(2, x.shape[1]), -1)
        held = x.unsqueeze(1).expand(-1, x.shape[1], -1, -1)
        kept = held.gather(2, chosen.unsqueeze(-1).expand(-1, -1, -1, x.shape[2]))
        return (scores.softmax(-1).unsqueeze(-1) * kept).sum(2)


class _ReadsNaN(_Own):
    def __call__(self, x: Tensor, mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        real = torch.ones_like(x[..., :1]) if mask is None else mask.unsqueeze(-1).to(x)
        return self.of(x * real, real) * real


class _LeavesPadding(_Own):
    def __call__(self, x: Tensor, mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        real = (torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask).unsqueeze(-1)
        return self.of(x.masked_fill(~real, 0.0), real)


class _Centred(_Own):
    def of(self, x: Tensor, real: Tensor) -> Tensor:
        return super().of(x, real) - x.mean((0, 1))


class _Placed(_Own):
    """Says that order does not matter."""

    def of(self, x: Tensor, real: Tensor) -> Tensor:
        return super().of(x, real) * real.cumsum(1)


class _Detached(_Own):
    def of(self, x: Tensor, real: Tensor) -> Tensor:
        return super().of(x.detach(), real) + 0 * x


class _Shaken(_Own):
    def of(self, x: Tensor, real: Tensor) -> Tensor:
        return super().of(x, real) + 1e-9 * torch.randn_like(x)


class _Narrow(_Own):
    def of(self, x: Tensor, real: Tensor) -> Tensor:
        return super().of(x, real).float()


class _Alone(_Own):
    def of(self, x: Tensor, real: Tensor) -> Tensor:
        return x.square()


class _Unguarded(Mixer):
    """A softmax over no key is NaN; the forward pass is mended, the backward is not."""

    order_matters = False

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(8, 8)

    def mix(self, x: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        scores = self.query(x) @ x.mT + mask.unsqueeze(1).to(x).log()
        return x + (scores.softmax(-1) @ x).nan_to_num()


class _WritesOver(_Own):
    def __call__(self, x: Tensor, mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        if mask is not None and not x.requires_grad:
            x[~mask] = 0.0
        return super().__call__(x, mask, positions)


class _Pairs(_Own):
    """Fails on one token."""

    def of(self, x: Tensor, real: Tensor) -> Tensor:
        return super().of(x, real) * (1 + 0 / (x.shape[1] - 1))


class _Unnormal(ContextBroadcasting):
    def weights_of(self, x: Tensor, mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        return 2 * super().weights_of(x, mask, positions)


class _OtherWeights(ContextBroadcasting):
    def weights_of(self, x: Tensor, mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        mask = torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask
        return (torch.eye(x.shape[1]).to(x) * mask.unsqueeze(-1)).unsqueeze(1)


class _OtherWeightsOfHeads(AttentionMixer):
    def weights_of(self, x: Tensor, mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        return super().weights_of(x, mask, positions).flip(1)


class _Turned(GridMixer):
    """Takes rows for columns."""

    def mix_grid(self, x: Tensor, real: Tensor) -> Tensor:
        return x + x.mT.mean(-1, keepdim=True) if x.shape[2] == x.shape[3] else x.mT


class _Square(GridMixer):
    """Made for one size, and does not say so."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 3))

    def mix_grid(self, x: Tensor, real: Tensor) -> Tensor:
        return x @ self.weight


class _Unused(Mixer):
    order_matters = False

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def mix(self, x: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        return x + self.first(x).sum(1, keepdim=True) * 0 + x.sum(1, keepdim=True)


class _Widened(Mixer):
    order_matters = False

    def mix(self, x: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        return (x + x.sum(1, keepdim=True)).double()


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "takes padding into the mean": (_PadsInTheMean, "absent tokens"),
    "a window one too far": (_WindowOffByOne, "causal"),
    "wraps around": (_WrapsAround, "causal"),
    "pools a query of the future": (_PooledQuery, "causal"),
    "takes masked keys": (_TopOfAll, "absent tokens"),
    "multiplies NaN away": (_ReadsNaN, "padding"),
    "leaves something in padding": (_LeavesPadding, "padding"),
    "centres the batch": (_Centred, "batch mates"),
    "denies that order matters": (_Placed, "order"),
    "cuts the gradient": (_Detached, "gradients"),
    "draws from the global generator": (_Shaken, "determinism"),
    "gives another dtype": (_Narrow, "form"),
    "mixes nothing": (_Alone, "mixes"),
    "has no guard in the backward": (_Unguarded, "gradients"),
    "writes over its input": (_WritesOver, "input is left alone"),
    "fails on one token": (_Pairs, "few tokens"),
    "gives weights that do not sum to 1": (_Unnormal, "weights"),
    "gives weights that make another output": (_OtherWeights, "weights make the output"),
    "gives the weights of other heads": (lambda: _OtherWeightsOfHeads(8, 2), "weights make the output"),
    "takes rows for columns": (_Turned, "grids"),
    "is made for one grid": (_Square, "grids"),
    "has parameters without a gradient": (_Unused, "gradients"),
    "widens half precision": (_Widened, "half precision"),
}


@pytest.mark.parametrize(("build", "rule"), WRONG.values(), ids=list(WRONG))
def test_a_wrong_mixer_is_caught(build: Callable[[], object], rule: str) -> None:
    with pytest.raises(ContractError) as caught:
        check_mixer(build(), leave_out=["export"])  # type: ignore[arg-type]
    assert rule in caught.value.broken


def test_what_is_not_declared_is_said() -> None:
    with pytest.raises(ContractError, match="causal, True or False, is missing"):
        check_mixer(nn.Identity())  # type: ignore[arg-type]
