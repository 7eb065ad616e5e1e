import subprocess
import sys

import pytest
import torch
from tests.jobs.probe.conftest import make_dataset
from torch import Tensor

from cenote.compare.metrics import METRICS
from cenote.core import InputError
from cenote.jobs.probe.module import build_probe
from cenote.jobs.probe.optimiser import CosineAdamW, CosineLARS, share_of_rate
from cenote.jobs.probe.recipe import Recipe
from cenote.jobs.probe.training import train
from cenote.pool.attention.slotcon.lars import LARS

STEPS = 20


def parameters() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 3), (4,), (2,), (3,))]


def loss(p: list[Tensor], step: int) -> Tensor:
    # the last has a gradient in every other step only
    return p[0].square().sum() + p[1].sin().sum() + (p[2] ** 4).sum() + (p[3].sum() if step % 2 else 0)


def test_moves_as_torchs_adamw_on_a_cosine() -> None:
    ours, theirs = parameters(), parameters()
    optimiser = CosineAdamW([ours[:2], ours[2:]], (1e-2, 1e-1), 0.05, STEPS)
    groups = [{"params": theirs[:2], "lr": 1e-2}, {"params": theirs[2:], "lr": 1e-1}]
    reference = torch.optim.AdamW(groups, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(reference, STEPS)
    for step in range(STEPS):
        loss(ours, step).backward()
        optimiser.step()
        reference.zero_grad()
        loss(theirs, step).backward()
        reference.step()
        schedule.step()
    assert all(p.grad is None for p in ours)
    for a, b, start in zip(ours, theirs, parameters(), strict=True):
        torch.testing.assert_close(a, b)
        assert not torch.equal(a, start)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_every_member_moves_as_lars_moves_it_alone(decay: float) -> None:
    torch.manual_seed(0)
    # a matrix, a vector, a matrix of zeros, of two members each
    stacked = [torch.randn(2, 5, 3), torch.randn(2, 4), torch.zeros(2, 3, 3)]
    stacked = [p.double().requires_grad_() for p in stacked]
    alone = [[p[m].detach().clone().requires_grad_() for p in stacked] for m in range(2)]
    ours = CosineLARS([stacked], [0.5], decay, STEPS, warmup=4)
    theirs = [LARS(own, lr=0.0, weight_decay=decay) for own in alone]

    def loss_of(p: list[Tensor]) -> Tensor:
        return (p[0] ** 4).sum() + p[1].sin().sum() + (p[2] - 1).square().sum()

    for step in range(STEPS):
        loss_of(stacked).backward()
        ours.step()
        for own, optimiser in zip(alone, theirs, strict=True):
            optimiser.param_groups[0]["lr"] = 0.5 * share_of_rate(step, STEPS, 4)
            optimiser.zero_grad()
            loss_of(own).backward()
            optimiser.step()
        if step == 0:
            torch.testing.assert_close(stacked[1][0], alone[0][1], rtol=0, atol=0)
    for i, p in enumerate(stacked):
        torch.testing.assert_close(p, torch.stack([own[i] for own in alone]))


def test_warm_up_rises_in_a_line_and_then_falls_along_a_cosine() -> None:
    shares = [share_of_rate(n, 30, 10) for n in range(31)]
    assert shares[:11] == [pytest.approx(n / 10) for n in range(11)]
    assert shares[10:] == [pytest.approx(share_of_rate(n, 20)) for n in range(21)]


def test_the_published_recipe() -> None:
    recipe = Recipe.lars(1000)
    assert (recipe.optimiser, recipe.epochs, recipe.warmup_epochs, recipe.weight_decay) == ("lars", 90, 10, 0.0)
    assert recipe.learning_rates == (0.1 * 125 / 256,)
    data = make_dataset(items=240)
    metric = METRICS["accuracy"]
    trained = train(lambda: build_probe("mean", data), data, metric, (0, 1), Recipe.lars(80, base_rate=5.0))
    assert len(trained.validation_curve[0]) == 90
    assert trained.validation == tuple(max(curve) for curve in trained.validation_curve)
    assert min(trained.validation) > 0.6
    for settings, named in (({"optimiser": "sgd"}, "optimiser"), ({"epochs": 3, "warmup_epochs": 3}, "warmup_epochs")):
        with pytest.raises(InputError, match=named):
            Recipe(**settings)


def test_a_probe_is_trained_and_counted_without_torchs_compiler() -> None:
    code = """
import sys
from cenote.features import digits
from cenote.jobs.probe import compare
from cenote.jobs.probe.recipe import Recipe

compare(digits(), ["simpool"], seeds=1, recipe=Recipe(epochs=1), workers=1)
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
