import pytest
import torch
from torch import Tensor

import cenote
from cenote.core.reduced import Reduced, in_order, merged, selected
from cenote.reduce import Budget, BudgetReducer, FirstTokens, TopAttentionTokens


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ({"factor": 4}, [0, 1, 2, 25]),
        ({"factor": 4, "rounding": "ceil"}, [0, 1, 3, 25]),
        ({"factor": 1.5}, [0, 1, 6, 66]),
        ({"tokens": 4}, [0, 1, 4, 4]),
        ({"fraction": 0.29}, [0, 1, 2, 29]),
        ({"factor": 1}, [0, 1, 9, 100]),
    ],
)
def test_a_budget_is_known_beforehand(given: dict[str, float], left: list[int]) -> None:
    assert Budget(**given).of(torch.tensor([0, 1, 9, 100])).tolist() == left  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "budget: expected one of factor, tokens, fraction, got none"),
        ({"factor": 2, "tokens": 3}, "got factor, tokens"),
        ({"factor": 0.5}, "factor: expected a number from 1, got 0.5"),
        ({"factor": float("nan")}, "factor: expected a number from 1"),
        ({"tokens": 1.5}, "tokens: expected a whole number from 1, got 1.5"),
        ({"tokens": True}, "tokens: expected a whole number"),
        ({"fraction": 0.0}, "fraction: expected a share above 0"),
        ({"factor": 2, "rounding": "up"}, "rounding: expected 'floor' or 'ceil', got 'up'"),
    ],
)
def test_an_impossible_budget_is_told(given: dict[str, float], message: str) -> None:
    with pytest.raises(cenote.InputError, match=message):
        Budget(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"x": torch.zeros(3, 4)}, r"x: expected \[batch, tokens, dim\], got \[3, 4\]"),
        ({"x": torch.zeros(1, 3, 4, dtype=torch.long)}, "x: expected floating point"),
        ({"mask": torch.ones(1, 4, dtype=torch.bool)}, r"mask: expected \[1, 3\] as the tokens, got \[1, 4\]"),
        ({"mask": torch.ones(1, 3)}, "mask: expected bool"),
        ({"sizes": torch.ones(3)}, "sizes: expected"),
        ({"protect": -1}, "protect: expected at least 0"),
        ({"x": torch.full((1, 3, 4), float("inf"))}, "x: real tokens are NaN or infinite"),
        ({"attention": torch.ones(1, 2, 3)}, "attention: FirstTokens asks for nothing besides the tokens"),
    ],
)
def test_wrong_input_is_told(given: dict[str, Tensor], message: str) -> None:
    with pytest.raises(cenote.InputError, match=message):
        FirstTokens(factor=2)(**{"x": torch.zeros(1, 3, 4), **given})


def test_a_signal_that_lacks_or_does_not_fit_is_told() -> None:
    reducer = TopAttentionTokens(factor=2)
    with pytest.raises(cenote.InputError, match="attention: TopAttentionTokens needs it"):
        reducer(torch.zeros(1, 3, 4))
    with pytest.raises(cenote.InputError, match="attention: expected 1 items and 3 tokens on axis 2, got"):
        reducer(torch.zeros(1, 3, 4), attention=torch.zeros(1, 3, 2))


def test_protected_tokens_count_for_no_budget_and_stay_in_place() -> None:
    x = torch.arange(6.0).view(1, 6, 1)
    found = FirstTokens(tokens=2)(x, protect=torch.tensor([[False, False, True, False, False, True]]))
    assert found.tokens.flatten().tolist() == [0, 1, 2, 5]
    assert found.assignment.tolist() == [[0, 1, 2, -1, -1, 3]]
    assert found.dropped().tolist() == [2]


def test_protecting_all_changes_nothing() -> None:
    x = torch.rand(2, 4, 3)
    found = FirstTokens(tokens=1)(x, protect=4)
    assert torch.equal(found.tokens, x)


def test_two_reductions_are_one() -> None:
    x = torch.rand(2, 12, 3)
    first = cenote.create("sequential-raw", factor=2)(x)
    second = cenote.create("sequential-raw", factor=3)(first.tokens, first.sizes, first.mask)
    both = first.then(second)
    whole = cenote.create("sequential-raw", factor=6)(x)
    assert torch.equal(both.assignment, whole.assignment)
    assert torch.allclose(both.tokens, whole.tokens, atol=1e-6)
    assert both.sizes.tolist() == whole.sizes.tolist()
    with pytest.raises(cenote.InputError, match=r"after: expected what became of \[2, 6\] tokens"):
        first.then(whole)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("first", [[10.0, 30.0, 0.0]]), ("heaviest", [[20.0, 30.0, 0.0]]), ("mean", [[17.5, 35.0, 0.0]])],
)
def test_positions_of_what_is_left(rule: str, expected: list[list[float]]) -> None:
    reduced = Reduced(torch.zeros(1, 3, 1), torch.zeros(1, 3), torch.tensor([[0, 0, 1, 1, -1]]))
    at = torch.tensor([[10.0, 20.0, 30.0, 40.0, 50.0]])
    sizes = torch.tensor([[1.0, 3.0, 1.0, 1.0, 9.0]])
    assert reduced.positions(at, rule, sizes).tolist() == expected  # type: ignore[arg-type]


def test_what_went_alone_keeps_its_bits() -> None:
    x = torch.rand(1, 3, 64)
    found = merged(x, torch.tensor([[1, 0, 0]]), 2, torch.tensor([[7.0, 1.0, 2.0]]))
    assert torch.equal(found.tokens[0, 1], x[0, 0])
    assert torch.allclose(found.tokens[0, 0], (x[0, 1] + 2 * x[0, 2]) / 3)
    assert found.sizes.tolist() == [[3.0, 7.0]]


def test_weights_that_sum_to_zero_count_alike() -> None:
    x = torch.tensor([[[1.0], [3.0], [5.0]]])
    found = merged(x, torch.tensor([[0, 0, 1]]), 2, weights=torch.tensor([[0.0, 0.0, 4.0]]))
    assert found.tokens.flatten().tolist() == [2.0, 5.0]


def test_what_is_selected_keeps_its_order() -> None:
    found = selected(torch.arange(4.0).view(2, 2, 1), torch.tensor([[False, True], [True, True]]))
    assert found.tokens.flatten().tolist() == [1, 0, 2, 3]
    assert found.mask is not None
    assert found.mask.tolist() == [[True, False], [True, True]]


def test_tokens_come_in_the_order_of_their_first_originals() -> None:
    x = torch.tensor([[[5.0], [6.0], [7.0]]])
    found = in_order(merged(x, torch.tensor([[3, 0, 0]]), 5))
    assert found.tokens.flatten().tolist() == [5.0, 6.5]
    assert found.assignment.tolist() == [[0, 1, 1]]


def test_a_reducer_acts_in_a_running_model() -> None:
    from cenote.models.live import Shorten, edited

    torch.backends.mha.set_fastpath_enabled(False)
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    shorten = Shorten(cenote.create("hierarchical", factor=2), block=0, protect=1)
    with edited(model, shorten):
        assert model(torch.randn(2, 9, 8)).shape == (2, 5, 8)
    torch.backends.mha.set_fastpath_enabled(True)


class _Nothing(BudgetReducer):
    def reduce(self, x: Tensor, sizes: Tensor, mask: Tensor) -> Reduced:
        raise AssertionError("a set without tokens has nothing to reduce")


def test_no_tokens_need_no_reducer() -> None:
    assert _Nothing(factor=2)(torch.zeros(2, 0, 3)).tokens.shape == (2, 0, 3)


def test_random_tokens_are_drawn_for_each_set() -> None:
    x = torch.randn(8, 40, 3, generator=torch.Generator().manual_seed(0))
    kept = cenote.create("random-drop", factor=4)(x).assignment >= 0
    assert len({tuple(row) for row in kept.tolist()}) == 8
    assert torch.equal(kept[3:4], cenote.create("random-drop", factor=4)(x[3:4]).assignment >= 0)


@pytest.mark.parametrize("name", [m.name for m in cenote.methods(room="reduce", kind="tokens")])
def test_a_batch_of_no_set_comes_back(name: str) -> None:
    assert cenote.create(name, factor=2)(torch.zeros(0, 6, 4)).tokens.shape[0] == 0
