"""Every rule of the contract catches a pool that breaks it and names that rule; a sound pool passes."""

from __future__ import annotations

import pytest
import torch
from tests.pools import with_costly_rules
from torch import Tensor, nn

from cenote.core import Bags, InputError, PaddedTokens, Tokens, cross_attention
from cenote.pool import MeanPool, Pool, Pooled
from cenote.testing import PLAIN_MODULE, ContractError, check_pool


class Sound(Pool):
    """Attention of one learned query with mapped values: what the broken ones below are made from."""

    def __init__(self, dim: int = 4, out_dim: int = 4) -> None:
        super().__init__(dim, out_dim)
        torch.manual_seed(0)
        self.query = nn.Parameter(torch.randn(1, dim))
        self.value = nn.Linear(dim, 4)

    def pool(self, tokens: Tokens) -> Pooled:
        output, weights = cross_attention(tokens, self.query, value=self.value)
        return Pooled(output.squeeze(1), weights)


def test_a_sound_pool_passes_and_is_not_changed() -> None:
    pool = Sound()
    before = {k: v.clone() for k, v in pool.state_dict().items()}
    check_pool(pool)
    assert pool.training
    assert all(torch.equal(v, before[k]) for k, v in pool.state_dict().items())
    assert all(p.grad is None for p in pool.parameters())


class MultipliesByTheMask(Sound):
    def forward(self, x: Tensor | Tokens, mask: Tensor | None = None) -> Tensor:
        y = super().forward(x, mask)
        return y if mask is None or isinstance(x, Tokens) else y + 0 * (x * mask.unsqueeze(-1)).sum(1)


class CleansTooLate(Sound):
    """The value is clean, but the gradient passes through NaN times zero."""

    def forward(self, x: Tensor | Tokens, mask: Tensor | None = None) -> Tensor:
        y = super().forward(x, mask)
        if mask is None or isinstance(x, Tokens):
            return y
        return y + 0 * torch.where(mask.unsqueeze(-1), x * self.query.sum(), 0).sum(1)


class DividesBySlots(Sound):
    def pool(self, tokens: Tokens) -> Pooled:
        output, weights = super().pool(tokens)
        if isinstance(tokens, PaddedTokens):
            output = output * (tokens.lengths().to(output) / max(tokens.values.shape[1], 1)).unsqueeze(1)
        return Pooled(output, weights)


class MinimumOverSlots(Sound):
    """A mask that is all True is treated as if there were one more slot of zeros."""

    def pool(self, tokens: Tokens) -> Pooled:
        output, weights = super().pool(tokens)
        if isinstance(tokens, PaddedTokens) and tokens.mask is None:
            output = output + 1e-6
        return Pooled(output, weights)


class DiffersWhenRagged(Sound):
    def pool(self, tokens: Tokens) -> Pooled:
        output, weights = super().pool(tokens)
        return Pooled(output * 1.001 if isinstance(tokens, Bags) else output, weights)


class MixesTheBatch(Sound):
    def pool(self, tokens: Tokens) -> Pooled:
        output, weights = super().pool(tokens)
        return Pooled(output - 0.5 * output.mean(0), weights)


class MixesMaskedBatches(Sound):
    def pool(self, tokens: Tokens) -> Pooled:
        output, weights = super().pool(tokens)
        if isinstance(tokens, PaddedTokens) and tokens.mask is None:
            return Pooled(output, weights)
        return Pooled(output - tokens.lengths().clamp(min=1).amax() * 1e-3, weights)


class SeesTheOrder(Sound):
    def pool(self, tokens: Tokens) -> Pooled:
        output, weights = super().pool(tokens)
        return Pooled(output + tokens.token(0), weights)


class SaysThatItSeesTheOrder(SeesTheOrder):
    permutation_invariant = False


class NaNForOneToken(Sound):
    def pool(self, tokens: Tokens) -> Pooled:
        output, weights = super().pool(tokens)
        # as an unbiased deviation does, which divides by N - 1
        return Pooled(output + 0 / (tokens.lengths() - 1).to(output).unsqueeze(1), weights)


class NaNForNoToken(Sound):
    def forward(self, x: Tensor | Tokens, mask: Tensor | None = None) -> Tensor:
        y = super().forward(x, mask)
        if isinstance(x, Tokens) or x.shape[1] == 0 or mask is None:
            return y
        return y.masked_fill(~mask.any(1, keepdim=True), float("nan"))


class ValueForNoToken(Sound):
    def forward(self, x: Tensor | Tokens, mask: Tensor | None = None) -> Tensor:
        y = super().forward(x, mask)
        return y if mask is None or isinstance(x, Tokens) else y.masked_fill(~mask.any(1, keepdim=True), 0.1)


class HidesAParameter(Sound):
    def pool(self, tokens: Tokens) -> Pooled:
        output, weights = cross_attention(tokens, self.query.detach(), value=self.value)
        return Pooled(output.squeeze(1), weights)


class HasASpareParameter(Sound):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Parameter(torch.zeros(3))


class SaysThatItIsInert(HasASpareParameter):
    inert_parameters = ("spare",)


class IsNotInert(Sound):
    inert_parameters = ("query",)


class TwiceTheGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        return x.clone()

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        return 2 * g


class WrongGradient(Sound):
    def pool(self, tokens: Tokens) -> Pooled:
        output, weights = super().pool(tokens)
        return Pooled(TwiceTheGradient.apply(output), weights)


class DeadNow(Sound):
    """A ReLU that this draw of the parameters has switched off: no fault of the class."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.tensor(-0.1))

    def pool(self, tokens: Tokens) -> Pooled:
        output, weights = super().pool(tokens)
        return Pooled(output + self.gate.relu(), weights)


class TooNarrow(Sound):
    def __init__(self) -> None:
        super().__init__(out_dim=5)


class Random(Sound):
    def pool(self, tokens: Tokens) -> Pooled:
        output, weights = super().pool(tokens)
        return Pooled(output + torch.rand(()), weights)


class LooksAtTheNumbers(Sound):
    def pool(self, tokens: Tokens) -> Pooled:
        output, weights = super().pool(tokens)
        return Pooled(output if float(output.detach().sum()) < 1e9 else -output, weights)


class WidensHalf(Sound):
    def forward(self, x: Tensor | Tokens, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, mask).to(torch.promote_types(self.query.dtype, torch.float32))


class OverflowsInHalf(Sound):
    """A mean whose sum is kept in float16."""

    def pool(self, tokens: Tokens) -> Pooled:
        output, weights = super().pool(tokens)
        return Pooled(output + tokens.sum() / tokens.lengths().clamp(min=1).unsqueeze(1), weights)


class KeepsAPlainTensor(Sound):
    def __init__(self) -> None:
        super().__init__()
        self.offsets = [torch.randn(4, dtype=torch.float64)]

    def pool(self, tokens: Tokens) -> Pooled:
        output, weights = super().pool(tokens)
        return Pooled(output + self.offsets[0].to(output.dtype), weights)


class RegistersItsConstant(Sound):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.arange(4.0), persistent=False)

    def pool(self, tokens: Tokens) -> Pooled:
        output, weights = super().pool(tokens)
        return Pooled(output + self.offset, weights)


class ForgetsItsStatistics(Sound):
    def __init__(self, persistent: bool = False) -> None:
        super().__init__()
        self.register_buffer("running", torch.zeros(4), persistent=persistent)

    def pool(self, tokens: Tokens) -> Pooled:
        output, weights = super().pool(tokens)
        if self.training:
            self.running.copy_(0.9 * self.running + 0.1 * output.detach().mean(0))
        return Pooled(output - self.running, weights)


class StoresLess(Sound):
    def state_dict(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        return {k: v for k, v in super().state_dict(*args, **kwargs).items() if k != "query"}


class CannotBeCopied(Sound):
    def __deepcopy__(self, memo: dict) -> CannotBeCopied:
        raise TypeError("no copies")


class CopiesBadly(Sound):
    generation = 0

    def __deepcopy__(self, memo: dict) -> CopiesBadly:
        other = CopiesBadly().to(self.query.dtype).train(self.training)
        other.load_state_dict(self.state_dict())
        other.generation = self.generation + 1
        return other

    def pool(self, tokens: Tokens) -> Pooled:
        output, weights = super().pool(tokens)
        return Pooled(output + 1e-12 * self.generation, weights)


class ReadsMemory(Sound):
    def forward(self, x: Tensor | Tokens, mask: Tensor | None = None) -> Tensor:
        y = super().forward(x, mask)
        return y if isinstance(x, Tokens) or x.stride(-1) == 1 else 2 * y


class AttendsElsewhere(Sound):
    def attend(self, x: Tensor | Tokens, mask: Tensor | None = None) -> Pooled:
        output, weights = super().attend(x, mask)
        return Pooled(output + 1, weights)


class TransposedWeights(Sound):
    def attend(self, x: Tensor | Tokens, mask: Tensor | None = None) -> Pooled:
        output, weights = super().attend(x, mask)
        return Pooled(output, weights.transpose(1, 2))


class WeighsPadding(Sound):
    def attend(self, x: Tensor | Tokens, mask: Tensor | None = None) -> Pooled:
        output, weights = super().attend(x, mask)
        return Pooled(output, weights + 0.1)


class WeighsBagsOtherwise(Sound):
    def attend(self, x: Tensor | Tokens, mask: Tensor | None = None) -> Pooled:
        output, weights = super().attend(x, mask)
        return Pooled(output, weights * 2 if isinstance(x, Bags) else weights)


class WeighsNoBags(Sound):
    def attend(self, x: Tensor | Tokens, mask: Tensor | None = None) -> Pooled:
        output, weights = super().attend(x, mask)
        return Pooled(output, None if isinstance(x, Bags) else weights)


class TakesAnyMask(Sound):
    def forward(self, x: Tensor | Tokens, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, None if mask is None else mask.bool())


class AssertsWidths(Sound):
    def forward(self, x: Tensor | Tokens, mask: Tensor | None = None) -> Tensor:
        assert isinstance(x, Tokens) or x.shape[-1] == self.dim
        return super().forward(x, mask)


class TakesNoMask(Sound):
    def forward(self, x: Tensor | Tokens) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class ReturnsWeightsToo(Sound):
    def forward(self, x: Tensor | Tokens, mask: Tensor | None = None) -> Pooled:  # type: ignore[override]
        return self.attend(x, mask)


class HasNoWidth(Sound):
    def __init__(self) -> None:
        super().__init__()
        del self.out_dim


@pytest.mark.parametrize(
    ("pool", "rules", "says"),
    [
        (
            MultipliesByTheMask(),
            {"padded slots are not read", "padded slots leave gradients alone"},
            "NaN in padded slots",
        ),
        (CleansTooLate(), {"padded slots leave gradients alone"}, "NaN in padded slots reaches a gradient"),
        (DividesBySlots(), {"padding length is not seen", "ragged equals padded"}, "count tokens, not slots"),
        (MinimumOverSlots(), {"full mask is no mask"}, "mask that is all True"),
        (DiffersWhenRagged(), {"ragged equals padded"}, "same sets as Bags"),
        (MixesTheBatch(), {"batch mates"}, "when its mates are taken away"),
        (MixesMaskedBatches(), {"batch mates", "full mask is no mask"}, "mates of a masked batch"),
        (SeesTheOrder(), {"order of tokens"}, "permutation_invariant is declared True"),
        (
            NaNForOneToken(),
            {"one token", "empty set has finite gradients", "half precision"},
            "one token: the output is not finite",
        ),
        (NaNForNoToken(), {"no token gives zeros"}, "a mask without True gives NaN"),
        (ValueForNoToken(), {"no token gives zeros"}, "values that are not zero"),
        (HidesAParameter(), {"gradients are right", "gradient reaches every parameter"}, "does not reach query"),
        (HasASpareParameter(), {"gradient reaches every parameter"}, "does not reach spare"),
        (IsNotInert(), {"gradient reaches every parameter"}, "query is declared inert"),
        (WrongGradient(), {"gradients are right"}, "finite differences"),
        (TooNarrow(), {"output shape"}, r"got \(3, 4\) for 3 sets, expected \[3, 5\]"),
        (Random(), {"determinism"}, "two calls"),
        (LooksAtTheNumbers(), {"torch compile in one graph", "torch export"}, "raised"),
        (WidensHalf(), {"half precision"}, "torch.bfloat16 in, torch.float32 out"),
        (OverflowsInHalf(), {"half precision over many tokens"}, "overflow torch.float16, .* sum in float32"),
        (KeepsAPlainTensor(), {"state is registered"}, r"offsets holds a tensor .*register_buffer"),
        (ForgetsItsStatistics(), {"training is stored"}, "persistent buffer"),
        (StoresLess(), {"safetensors round trip", "training is stored"}, "safetensors"),
        (CannotBeCopied(), {"deepcopy"}, "raised TypeError: no copies"),
        (CopiesBadly(), {"deepcopy", "safetensors round trip"}, "the copy gives another output"),
        (ReadsMemory(), {"non contiguous input"}, "other strides"),
        (AttendsElsewhere(), {"attend agrees with calling"}, r"differs from the call's by 0\."),
        (TransposedWeights(), {"attend agrees with calling"}, r"\(3, 9, 1\), expected \[3, heads, 9\]"),
        (WeighsPadding(), {"attend agrees with calling"}, "padded slots have weights other than 0"),
        (WeighsBagsOtherwise(), {"attend agrees with calling"}, "as Bags give weights that differ by"),
        (WeighsNoBags(), {"attend agrees with calling"}, r"as Bags give no weights, expected \[heads, 16\]"),
        (TakesAnyMask(), {"wrong input is named"}, "an integer mask is accepted without a word"),
        (AssertsWidths(), {"wrong input is named"}, "another width raises AssertionError, expected cenote.InputError"),
        (TakesNoMask(), {"call"}, r"pool\(x, mask\) raised TypeError"),
        (ReturnsWeightsToo(), {"call"}, r"pool\(x\) returned Pooled, expected the output tensor alone"),
        (HasNoWidth(), {"attributes"}, "out_dim, the width of its output, is missing"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
@with_costly_rules
def test_a_broken_pool_is_caught_and_its_rule_named(
    pool: nn.Module, rules: set[str], says: str, left_out: set[str]
) -> None:
    with pytest.raises(ContractError, match=says) as caught:
        check_pool(pool, leave_out=left_out - rules)
    assert set(caught.value.broken) == rules
    first, *lines = str(caught.value).splitlines()
    assert first.startswith(f"{type(pool).__name__} breaks {len(rules)} rule")
    assert all(any(f"[rule: {rule}]" in line for line in lines) for rule in rules)


@pytest.mark.parametrize(
    "pool",
    [
        SaysThatItSeesTheOrder(),
        SaysThatItIsInert(),
        DeadNow(),
        RegistersItsConstant(),
        ForgetsItsStatistics(persistent=True),
    ],
    ids=lambda pool: type(pool).__name__,
)
def test_what_looks_broken_and_is_not(pool: nn.Module) -> None:
    check_pool(pool)


class Plain(nn.Module):
    """A module that knows nothing of cenote."""

    def __init__(self) -> None:
        super().__init__()
        self.dim, self.out_dim = 4, 6
        self.layer = nn.Linear(4, 6, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            mask = x.new_ones(x.shape[:2], dtype=torch.bool)
        x = x.masked_fill(~mask.unsqueeze(-1), 0).to(torch.promote_types(x.dtype, torch.float32))
        mean = x.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        return self.layer(mean.to(self.layer.weight.dtype))


class PlainWithLeak(Plain):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.layer(x.mean(1))


def test_a_plain_module_can_be_checked() -> None:
    check_pool(Plain(), leave_out=PLAIN_MODULE)
    with pytest.raises(ContractError) as caught:
        check_pool(Plain())
    assert caught.value.broken == PLAIN_MODULE
    with pytest.raises(ContractError) as caught:
        check_pool(PlainWithLeak(), leave_out=PLAIN_MODULE)
    assert caught.value.broken == (
        "padded slots are not read",
        "padded slots leave gradients alone",
        "padding length is not seen",
        "no token gives zeros",
    )


def test_rules_are_left_out_by_name() -> None:
    check_pool(WrongGradient(), leave_out=["gradients are right"])
    with pytest.raises(InputError, match="leave_out: there is no rule 'gradient'; the rules are 'call', 'determinism'"):
        check_pool(MeanPool(4), leave_out=["gradient"])


def test_trial_sets_are_drawn_from_the_seed() -> None:
    for seed in range(3):
        check_pool(Sound(), tokens=4 + seed, seed=seed)
