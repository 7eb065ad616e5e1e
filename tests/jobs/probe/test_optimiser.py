import subprocess
import sys

import torch
from torch import Tensor

from cenote.jobs.probe.optimiser import CosineAdamW

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
