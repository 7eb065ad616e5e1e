from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cenote.core import InputError
from cenote.pool.training import averaged, in_batches, inverse_root_schedule, linear_schedule, train


def line() -> tuple[nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(0)
    layer = nn.Linear(2, 1).double()
    return layer, torch.optim.SGD(layer.parameters(), lr=0.1)


def test_the_best_state_is_kept_and_patience_ends_training() -> None:
    layer, sgd = line()
    x = torch.randn(6, 2, dtype=torch.float64)
    states: list[Tensor] = []
    wanted = iter([0.1, 0.5, 0.4, 0.3, 0.9])

    def score() -> float:
        assert not layer.training
        assert not torch.is_grad_enabled()
        states.append(layer.weight.detach().clone())
        return next(wanted)

    history = train(layer, lambda: [x], lambda x: layer(x).square().mean(), sgd, passes=9, score=score, patience=2)
    assert history.best == 1
    assert history.scores == [0.1, 0.5, 0.4, 0.3]
    torch.testing.assert_close(layer.weight.detach(), states[1])


def test_scores_may_be_taken_every_few_passes() -> None:
    layer, sgd = line()
    x = torch.randn(6, 2, dtype=torch.float64)
    wanted = iter([0.1, 0.5, 0.5, 0.2])
    history = train(
        layer, lambda: [x], lambda x: layer(x).square().mean(), sgd, passes=7, score=lambda: next(wanted), score_every=2
    )
    assert (history.best, history.scores, len(history.losses)) == (3, [0.1, 0.5, 0.5, 0.2], 7)


def test_batches_that_are_accumulated_make_one_step_of_their_mean() -> None:
    x = torch.randn(6, 2, dtype=torch.float64)
    found = []
    for batches, accumulate in (([x], 1), ([x[:3], x[3:]], 2)):
        layer, sgd = line()
        train(layer, lambda b=batches: b, lambda x, m=layer: m(x).square().mean(), sgd, passes=2, accumulate=accumulate)
        found.append(layer.weight.detach().clone())
    torch.testing.assert_close(found[0], found[1])


def test_gradients_are_clipped() -> None:
    layer, sgd = line()
    before = torch.cat([p.detach().flatten() for p in layer.parameters()])
    x = torch.full((1, 2), 100.0, dtype=torch.float64)
    train(layer, lambda: [x], lambda x: layer(x).square().mean(), sgd, passes=1, clip=1.0)
    after = torch.cat([p.detach().flatten() for p in layer.parameters()])
    torch.testing.assert_close((after - before).norm().item(), 0.1, rtol=1e-4, atol=0)


def test_rates_by_hand() -> None:
    def rates(schedule: object, sgd: torch.optim.Optimizer, steps: int) -> list[float]:
        found = []
        for _ in range(steps):
            found.append(sgd.param_groups[0]["lr"])
            sgd.step()
            schedule.step()
        return found

    sgd = line()[1]
    assert rates(linear_schedule(sgd, 6, 2), sgd, 7) == pytest.approx([0.05, 0.1, 0.1, 0.075, 0.05, 0.025, 0.0])
    sgd = line()[1]
    assert rates(inverse_root_schedule(sgd, 2), sgd, 8)[::7] == pytest.approx([0.05, 0.05])


def test_states_are_averaged_and_orders_are_drawn() -> None:
    states = [
        {"w": torch.tensor([1.0, 5.0]), "n": torch.tensor(3)},
        {"w": torch.tensor([3.0, 5.0]), "n": torch.tensor(4)},
    ]
    mean = averaged(states)
    assert mean["w"].tolist() == [2.0, 5.0]
    assert int(mean["n"]) == 4
    assert sorted(torch.cat(list(in_batches(7, 3))).tolist()) == list(range(7))


def test_wrong_input_is_refused() -> None:
    layer, sgd = line()
    with pytest.raises(InputError, match="batches: gave nothing"):
        train(layer, list, lambda x: x, sgd, passes=1)
    with pytest.raises(InputError, match="patience: waits for a score"):
        train(layer, lambda: [1], lambda x: x, sgd, passes=1, patience=2)
    with pytest.raises(InputError, match="states: expected"):
        averaged([])
    with pytest.raises(InputError, match="warm_up: expected fewer"):
        linear_schedule(sgd, 3, 3)
