"""The loops with which models of the room are trained."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cenote.mix.fitting import fit, in_training
from cenote.mix.image_training import train_images


def test_a_model_is_in_eval_mode_behind_its_training_whatever_happened() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    with in_training(model):
        assert all(m.training for m in model.modules())
    assert not any(m.training for m in model.modules())
    with pytest.raises(RuntimeError, match="on the way"), in_training(model):
        raise RuntimeError("on the way")
    assert not any(m.training for m in model.modules())


def failing(*_: object) -> Tensor:
    raise RuntimeError("on the way")


def test_loops_that_fail_leave_the_model_in_eval_mode() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="on the way"):
        fit(model, 4, failing, [torch.optim.SGD(model.parameters(), 0.1)], epochs=1, batch=2)
    assert not model.training
    model.train()
    with pytest.raises(RuntimeError, match="on the way"):
        train_images(model, torch.rand(2, 3, 4, 4), torch.tensor([0, 1]), batch=2, loss=failing)
    assert not model.training
