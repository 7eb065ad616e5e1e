"""The set algebra: padded and ragged sets do the same as each set on its own, gradients included."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cenote.core import Bags, InputError, PaddedTokens, Tokens, as_tokens
from tests.core.batches import Batch, batches, make_batch

HALF = [torch.float16, torch.bfloat16]
DTYPES = [*HALF, torch.float32, torch.float64]

# the operation on a whole batch, and on one set that has tokens
PerSet = tuple[Callable[[Tokens], Tensor], Callable[[Tensor], Tensor]]
TO_SETS: dict[str, PerSet] = {
    "sum": (lambda t: t.sum(), lambda v: v.sum(0)),
    "mean": (lambda t: t.mean(), lambda v: v.mean(0)),
    "max": (lambda t: t.max(), lambda v: v.amax(0)),
    "min": (lambda t: t.min(), lambda v: v.amin(0)),
    "std": (lambda t: t.std(eps=0.1), lambda v: (v.var(0, correction=0) + 0.1).sqrt()),
    "logsumexp": (lambda t: t.logsumexp(t.values), lambda v: v.logsumexp(0)),
    "token 0": (lambda t: t.token(0), lambda v: v[0]),
    "token -1": (lambda t: t.token(-1), lambda v: v[-1]),
    "token 2": (lambda t: t.token(2), lambda v: v[2] if len(v) > 2 else torch.zeros_like(v[0])),
    "token -3": (lambda t: t.token(-3), lambda v: v[-3] if len(v) > 2 else torch.zeros_like(v[0])),
    "weighted_sum": (
        lambda t: t.weighted_sum(t.values.square()).flatten(1),
        lambda v: (v.square().T @ v).flatten(),
    ),
    "weighted_sum of others": (
        lambda t: t.weighted_sum(t.values[..., :1], t.values.exp()).flatten(1),
        lambda v: v[:, 0] @ v.exp(),
    ),
    "sum of others": (lambda t: t.sum(t.values.exp()), lambda v: v.exp().sum(0)),
    "mean of others": (lambda t: t.mean(t.values.exp()), lambda v: v.exp().mean(0)),
    "max of others": (lambda t: t.max(t.values.exp()), lambda v: v.exp().amax(0)),
    "drop_first": (lambda t: t.drop_first(1).mean(), lambda v: v[1:].mean(0) if len(v) > 1 else torch.zeros_like(v[0])),
    "replace": (lambda t: t.replace(t.values.exp()).sum(), lambda v: v.exp().sum(0)),
    "spread": (lambda t: t.sum(t.spread(t.mean())), lambda v: v.sum(0)),
    "softmax": (
        lambda t: t.weighted_sum(t.softmax(t.values)).flatten(1),
        lambda v: (v.softmax(0).T @ v).flatten(),
    ),
    "scores": (
        lambda t: t.sum(t.scores(torch.arange(2.0 * t.dim, dtype=t.values.dtype).view(2, -1)) ** 2),
        lambda v: (v @ torch.arange(2.0 * v.shape[1], dtype=v.dtype).view(2, -1).T).square().sum(0),
    ),
    "scores per set": (
        lambda t: t.sum(t.scores(t.mean().unsqueeze(1)) ** 2),
        lambda v: (v @ v.mean(0, keepdim=True).T).square().sum(0),
    ),
}


def forms(batch: Batch) -> list[tuple[Tokens, Tensor]]:
    """The batch in every form, with the tensor that gradients are asked of."""
    padded, ragged = batch.x.clone().requires_grad_(), torch.cat(batch.sets).requires_grad_()
    out: list[tuple[Tokens, Tensor]] = [
        (PaddedTokens(padded, batch.mask), padded),
        (Bags(ragged, batch.bags().offsets), ragged),
    ]
    if len({len(s) for s in batch.sets}) == 1:
        dense = torch.stack(batch.sets).requires_grad_()
        out.append((PaddedTokens(dense), dense))
    return out


@pytest.mark.parametrize("name", TO_SETS)
@given(batch=batches())
def test_every_form_does_the_same_as_each_set_on_its_own(name: str, batch: Batch) -> None:
    operation, of_one = TO_SETS[name]
    values = torch.cat(batch.sets).requires_grad_()
    width = operation(batch.bags()).shape[1]
    expected = torch.stack(
        [of_one(s) if len(s) else s.new_zeros(width) for s in values.split([len(s) for s in batch.sets])]
    )
    expected = expected + 0 * values.sum()  # connected, also where every set is empty
    upstream = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view_as(expected)
    (gradient,) = torch.autograd.grad((expected * upstream).sum(), values)
    for tokens, leaf in forms(batch):
        y = operation(tokens)
        torch.testing.assert_close(y, expected, atol=1e-11, rtol=1e-11)
        (g,) = torch.autograd.grad((y * upstream).sum() + 0 * tokens.values.sum(), leaf)
        if isinstance(tokens, PaddedTokens) and tokens.mask is not None:
            assert torch.equal(g[~batch.mask], torch.zeros_like(g[~batch.mask])), "a padded slot gets a gradient"
            g = g[batch.mask]
        torch.testing.assert_close(g.reshape(gradient.shape), gradient, atol=1e-10, rtol=1e-10)


@given(batch=batches())
def test_per_token_results_stand_in_the_slots_of_their_tokens(batch: Batch) -> None:
    padded, bags = batch.padded(), batch.bags()
    queries = torch.linspace(-1, 1, 3 * batch.dim, dtype=torch.float64).view(3, -1)
    per_set = queries * torch.arange(len(batch.sets), dtype=torch.float64).view(-1, 1, 1)
    for name, call in {
        "softmax": lambda t: t.softmax(t.values),
        "scores": lambda t: t.scores(queries),
        "scores per set": lambda t: t.scores(per_set),
        "uniform": lambda t: t.uniform(),
        "replace": lambda t: t.replace(t.values + 1).values,
        "spread": lambda t: t.replace(t.spread(t.mean())).values,
        "values": lambda t: t.values,
    }.items():
        of_padded, of_bags = call(padded), call(bags)
        torch.testing.assert_close(of_padded[batch.mask], of_bags, atol=1e-12, rtol=1e-12, msg=name)
        assert not of_padded[~batch.mask].any(), f"{name}: padded slots are not zero"
    assert torch.equal(padded.heads_first(padded.values), padded.values.transpose(1, 2))
    assert torch.equal(bags.heads_first(bags.values), bags.values.T)
    assert torch.equal(padded.lengths(), bags.lengths())
    assert padded.batch == bags.batch == len(batch.sets)
    assert padded.dim == bags.dim == batch.dim


def test_what_others_wrote_into_padded_slots_counts_for_nothing() -> None:
    batch = make_batch([2, 0, 3], 2, 0)
    tokens = batch.padded()
    dirty = torch.where(batch.mask.unsqueeze(-1), tokens.values, float("nan"))
    for name, of_tokens in {
        "sum": lambda v: tokens.sum(v),
        "mean": lambda v: tokens.mean(v),
        "std": lambda v: tokens.std(v),
        "max": lambda v: tokens.max(v),
        "min": lambda v: tokens.min(v),
        "logsumexp": lambda v: tokens.logsumexp(v),
        "softmax": lambda v: tokens.softmax(v),
        "weights": lambda v: tokens.weighted_sum(v),
        "values": lambda v: tokens.weighted_sum(tokens.values, v),
        "replace": lambda v: tokens.replace(v).values,
    }.items():
        torch.testing.assert_close(of_tokens(dirty), of_tokens(tokens.values), msg=name)


def test_gradient_at_a_maximum_held_by_two_tokens_is_shared() -> None:
    x = torch.tensor([[[1.0], [1.0], [0.0]]], requires_grad=True)
    for tokens in (
        PaddedTokens(x),
        PaddedTokens(x, torch.ones(1, 3, dtype=torch.bool)),
        Bags(x[0], torch.tensor([0, 3])),
    ):
        (g,) = torch.autograd.grad(tokens.max().sum(), x)
        assert g.flatten().tolist() == [0.5, 0.5, 0.0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TO_SETS)
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    batch = make_batch([4, 0, 6, 1], 3, 0)
    operation = TO_SETS[name][0]
    exact = operation(Bags(batch.bags().values.to(dtype).double(), batch.bags().offsets))
    for tokens in (PaddedTokens(batch.x.to(dtype), batch.mask), batch.bags().to(dtype)):
        y = operation(tokens)
        assert y.dtype == dtype
        tolerance = 16 * torch.finfo(dtype).eps
        torch.testing.assert_close(y.double(), exact, atol=tolerance * float(exact.abs().max()), rtol=tolerance)


@pytest.mark.parametrize("form", ["padded", "masked", "ragged"])
def test_float16_means_and_softmax_are_computed_in_float32(form: str) -> None:
    x = torch.full((1, 4096, 1), 50.0, dtype=torch.float16)
    mask = torch.ones(1, 4096, dtype=torch.bool)
    tokens = {"padded": PaddedTokens(x), "masked": PaddedTokens(x, mask), "ragged": Bags.from_padded(x)}[form]
    assert tokens.mean().item() == 50.0  # the sum, 204800, is above the largest float16
    assert tokens.std(eps=0.0).item() == 0.0
    assert tokens.softmax(tokens.values).sum().item() == pytest.approx(1.0)  # their sum in float16 would stop at 0.5
    assert tokens.logsumexp(tokens.values).item() == pytest.approx(50 + torch.tensor(4096.0).log().item(), abs=0.05)


@pytest.mark.parametrize("form", ["padded", "masked", "ragged"])
def test_weights_too_small_for_a_normal_number_are_zero(form: str) -> None:
    x = torch.tensor([[[0.0], [-60.0], [-95.0]]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    tokens = {"padded": PaddedTokens(x), "masked": PaddedTokens(x, mask), "ragged": Bags.from_padded(x)}[form]
    weights = tokens.softmax(tokens.values).flatten()
    assert weights[1] > 0
    assert weights[2] == 0


def test_a_score_of_minus_infinity_is_a_weight_of_zero() -> None:
    x = torch.tensor([[[0.0], [float("-inf")], [0.0]]])
    mask = torch.tensor([[True, True, False]])
    for tokens, expected in (
        (PaddedTokens(x), [0.5, 0, 0.5]),
        (PaddedTokens(x, mask), [1, 0, 0]),
        (Bags.from_padded(x), [0.5, 0, 0.5]),
    ):
        assert tokens.softmax(x.reshape(tokens.values.shape)).flatten().tolist() == expected


def test_no_token_slots_and_no_sets() -> None:
    for tokens in (
        PaddedTokens(torch.zeros(2, 0, 3)),
        PaddedTokens(torch.zeros(2, 0, 3), torch.zeros(2, 0, dtype=torch.bool)),
        Bags(torch.zeros(0, 3), torch.tensor([0, 0, 0])),
        PaddedTokens(torch.zeros(0, 4, 3)),
        Bags(torch.zeros(0, 3), torch.tensor([0])),
    ):
        for name, (operation, _) in TO_SETS.items():
            y = operation(tokens)
            assert y.shape[0] == tokens.batch, name
            assert not y.any(), name
        assert tokens.uniform().numel() == tokens.values.numel() // 3
        assert tokens.drop_first(1).batch == tokens.batch


def test_without_a_mask_nothing_is_copied() -> None:
    x = torch.randn(2, 3, 4)
    assert PaddedTokens(x).values is x
    assert PaddedTokens(x).drop_first(1).values.data_ptr() == x[:, 1:].data_ptr()
    assert PaddedTokens(x).drop_first(0).values is x


@given(batch=batches(), count=st.integers(0, 7))
def test_drop_first(batch: Batch, count: int) -> None:
    expected = [s[count:] for s in batch.sets]
    bags = batch.bags().drop_first(count)
    assert all(torch.equal(a, b) for a, b in zip(bags, expected, strict=True))
    padded = batch.padded().drop_first(count)
    assert torch.equal(padded.lengths(), bags.lengths())
    assert torch.equal(padded.values[padded.mask], bags.values)


@given(batch=batches())
def test_positions(batch: Batch) -> None:
    expected = [i for s in batch.sets for i in range(len(s))]
    assert batch.bags().positions().tolist() == expected
    positions = batch.padded().positions()
    assert positions[batch.mask].tolist() == expected
    assert (positions[~batch.mask] == -1).all()


@given(batch=batches())
def test_round_trips(batch: Batch) -> None:
    bags = batch.bags()
    from_padded = Bags.from_padded(batch.x, batch.mask)
    assert torch.equal(from_padded.values, bags.values)
    assert torch.equal(from_padded.offsets, bags.offsets)
    x, mask = bags.to_padded()
    again = Bags.from_padded(x, mask)
    assert torch.equal(again.values, bags.values)
    assert torch.equal(again.offsets, bags.offsets)
    assert not x[~mask].any()
    from_list = Bags.from_list(list(bags))
    assert torch.equal(from_list.values, bags.values)
    assert torch.equal(from_list.offsets, bags.offsets)
    assert len(bags) == len(batch.sets)
    assert all(torch.equal(bags[i - len(bags)], s) for i, s in enumerate(batch.sets))


def test_round_trip_gradients() -> None:
    values = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    bags = Bags(values, torch.tensor([0, 2, 2, 5]))
    x, mask = bags.to_padded()
    (g,) = torch.autograd.grad(Bags.from_padded(x, mask).values.sum(), values)
    assert torch.equal(g, torch.ones_like(values))


@given(batch=batches(), data=st.data())
def test_select(batch: Batch, data: st.DataObject) -> None:
    n = len(batch.sets)
    chosen = data.draw(st.lists(st.integers(-n, n - 1), max_size=6))
    selected = batch.bags().select(torch.tensor(chosen, dtype=torch.int64))
    assert len(selected) == len(chosen)
    assert all(torch.equal(s, batch.sets[i]) for s, i in zip(selected, chosen, strict=True))


def test_select_by_a_bool_mask_and_its_gradient() -> None:
    values = torch.randn(5, 2, requires_grad=True)
    bags = Bags(values, torch.tensor([0, 2, 2, 5]))
    selected = bags.select(torch.tensor([True, True, False]))
    assert torch.equal(selected.values, values[:2])
    assert selected.lengths().tolist() == [2, 0]
    (g,) = torch.autograd.grad(bags.select(torch.tensor([2, 2])).values.sum(), values)
    assert torch.equal(g, torch.tensor([0.0, 0, 2, 2, 2]).unsqueeze(1).expand(5, 2))


def test_bags_to_another_dtype_keeps_the_offsets() -> None:
    bags = Bags(torch.ones(2, 3), torch.tensor([0, 2])).to(torch.float64)
    assert bags.values.dtype == torch.float64
    assert bags.offsets.dtype == torch.int64
    assert repr(bags) == "Bags(batch=1, total=2, dim=3, dtype=torch.float64)"
    with pytest.raises(IndexError):
        bags[1]


def test_tokens_per_set_counts_slots() -> None:
    assert PaddedTokens(torch.zeros(2, 5, 1)).tokens_per_set == 5
    assert Bags(torch.zeros(5, 1), torch.tensor([0, 5, 5])).tokens_per_set == 2.5
    assert Bags(torch.zeros(0, 1), torch.tensor([0])).tokens_per_set == 0


VALUES, X, MASK = torch.zeros(5, 2), torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: Bags(torch.zeros(5), torch.tensor([0, 5])), r"values must be \[total, dim\], got shape \(5,\)"),
        (lambda: Bags(VALUES, torch.tensor([0, 5], dtype=torch.int32)), "int64 .* got torch.int32"),
        (lambda: Bags(VALUES, torch.tensor([[0, 5]])), r"one-dimensional .* shape \(1, 2\)"),
        (lambda: Bags(VALUES, torch.zeros(0, dtype=torch.int64)), "batch"),
        (lambda: Bags(VALUES, torch.tensor([1, 5])), r"rise from 0 to the number of rows 5, got \[1, 5\]"),
        (lambda: Bags(VALUES, torch.tensor([0, 4])), "rise from 0 to the number of rows 5"),
        (lambda: Bags(VALUES, torch.tensor([0, 4, 3, 5])), r"rise from 0 .* got \[0, 4, 3\]...5"),
        (lambda: Bags(VALUES, torch.tensor([0, 5], device="meta")), "values are on cpu and offsets on meta"),
        (lambda: Bags(VALUES, torch.tensor([0, 5])).replace(VALUES[1:]), "number of rows 4"),
        (lambda: Bags.from_list([]), "empty list"),
        (lambda: Bags.from_list([torch.zeros(2, 3), torch.zeros(2, 4)]), r"widths \[3, 4\]"),
        (
            lambda: Bags.from_list([torch.zeros(2, 3), torch.zeros(3)]),
            r"set 1 must be \[tokens, dim\], got shape \(3,\)",
        ),
        (lambda: Bags.from_padded(X[0]), r"\[batch, tokens, dim\]"),
        (lambda: Bags.from_padded(X, MASK.long()), "mask: expected bool"),
        (lambda: Bags.from_padded(X, MASK[:, 1:]), r"mask: expected shape \(2, 3\)"),
        (lambda: Bags(VALUES, torch.tensor([0, 5])).drop_first(-1), "count"),
        (lambda: PaddedTokens(X).drop_first(-1), "count"),
        (lambda: as_tokens([X]), r"list; join a list of sets with cenote.Bags.from_list"),
        (lambda: as_tokens(X[0]), r"shape \(3, 4\); a single set is x.unsqueeze\(0\)"),
        (lambda: as_tokens(X, MASK.long()), r"mask: expected bool .* got torch.int64; use mask.bool\(\)"),
        (lambda: as_tokens(X, MASK.tolist()), "mask: expected a bool tensor, got list"),
        (lambda: as_tokens(X, MASK[:, 1:]), r"mask: expected shape \(2, 3\) to match x, got \(2, 2\)"),
        (lambda: as_tokens(X.unflatten(1, (1, 3)), MASK), r"mask: expected shape \(2, 12\)"),
        (lambda: as_tokens(Bags(VALUES, torch.tensor([0, 5])), MASK), "mask: a ragged batch"),
        (lambda: as_tokens(X.long()), r"floating point features, got torch.int64; use x.float\(\)"),
        (lambda: as_tokens(X, dim=5), "tokens of width 5, got 4; build the pool with dim=4"),
        (lambda: as_tokens(Bags(VALUES, torch.tensor([0, 5])), dim=5), "tokens of width 5, got 2"),
    ],
)
def test_errors_name_what_came_and_what_to_do(call: Callable[[], object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        call()


def test_a_map_is_read_row_by_row() -> None:
    x = torch.arange(12.0).view(1, 2, 2, 3)
    tokens = as_tokens(x, torch.tensor([[[True, True, True], [False, True, True]]]))
    assert isinstance(tokens, PaddedTokens)
    assert tokens.values.tolist() == [[[0, 6], [1, 7], [2, 8], [0, 0], [4, 10], [5, 11]]]
    assert as_tokens(x).values.data_ptr() == x.data_ptr()
    assert torch.equal(as_tokens(x, torch.ones(1, 6, dtype=torch.bool)).values, x.flatten(2).transpose(1, 2))


def test_tokens_pass_through() -> None:
    bags = Bags(VALUES, torch.tensor([0, 5]))
    assert as_tokens(bags) is bags


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_empty_sets_make_no_nan_anywhere_in_the_backward_pass() -> None:
    batch = make_batch([2, 0], 2, 0, 3, fill=1.0)
    for name, (operation, _) in TO_SETS.items():
        for tokens, leaf in forms(batch):
            with torch.autograd.set_detect_anomaly(True):
                gradient = torch.autograd.grad(operation(tokens).sum(), leaf, create_graph=True)[0]
                if gradient.requires_grad:
                    gradient.square().sum().backward()
            assert gradient.isfinite().all(), name
