from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from cenote.core import InputError
from cenote.pool import DeepLab, DeepLabV3
from cenote.pool.spatial.crops import random_crop
from cenote.pool.spatial.deeplab.training import train_deeplab
from cenote.pool.spatial.deeplabv3 import Phase, train_deeplabv3


def numbered(height: int = 9, width: int = 12) -> tuple[Tensor, Tensor]:
    """An image whose pixels are its labels."""
    labels = torch.arange(height * width).view(height, width)
    return labels[None].double(), labels


def test_image_and_labels_are_cut_and_mirrored_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    mirrored = 0
    for _ in range(40):
        x, y = random_crop(*numbered(), crop=6, scale=(1.0, 1.0), generator=generator)
        assert torch.equal(x[0].long(), y)
        steps = y.diff(dim=1).unique().tolist()
        assert steps in ([1], [-1])
        mirrored += steps == [-1]
        assert y.diff(dim=0).unique().tolist() == [12]
    assert 10 < mirrored < 30
    assert all((random_crop(*numbered(), 6, (1.0, 1.0), flip=False)[1].diff(dim=1) == 1).all() for _ in range(5))


def test_what_lies_beyond_the_image_is_ignored() -> None:
    image, labels = torch.ones(2, 4, 6), torch.ones(4, 6, dtype=torch.long)
    x, y = random_crop(image, labels, crop=8, scale=(0.5, 0.5), flip=False, ignore=9)
    assert x[:, :2, :3].eq(1).all()
    assert y[:2, :3].eq(1).all()
    assert int(x.sum()) == 12
    assert int((y == 9).sum()) == 64 - 6


def test_scales_are_drawn_between_both_ends() -> None:
    image, labels = torch.ones(1, 20, 20), torch.zeros(20, 20, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    sides = [
        int((random_crop(image, labels, 40, (0.5, 1.5), generator=generator)[1] == 0).sum()) ** 0.5 for _ in range(60)
    ]
    assert min(sides) >= 10
    assert max(sides) <= 30
    assert min(sides) < 13
    assert max(sides) > 27


def test_crops_of_nothing_are_refused() -> None:
    with pytest.raises(InputError, match="labels: expected the size of the image"):
        random_crop(torch.ones(1, 4, 4), torch.ones(4, 5, dtype=torch.long), 3)
    with pytest.raises(InputError, match="scale: expected the smaller factor first"):
        random_crop(*numbered(), crop=3, scale=(2.0, 1.0))
    with pytest.raises(InputError, match="images"):
        train_deeplab(DeepLab(nn.Conv2d(3, 4, 3, 8, 1), 4, 2), [])


def halves(seed: int) -> tuple[Tensor, Tensor]:
    """Two classes, one bright and one dark."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(6, 6, generator=generator) > 0.5).long().repeat_interleave(8, 0).repeat_interleave(8, 1)
    return (labels * 2.0 - 1 + 0.1 * torch.randn(3, 48, 48, generator=generator)), labels


def test_deeplab_learns_by_its_recipe() -> None:
    torch.manual_seed(0)
    net = DeepLab(nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.ReLU()), 8, classes=2, rates=(1, 2))
    images = [halves(s) for s in range(4)]
    history = train_deeplab(net, images, steps=150, batch=4, crop=48, scale=(1.0, 1.0), lr=0.02)
    assert history.losses[-1] < 0.8 * history.losses[0]
    assert not net.training


def test_both_phases_and_frozen_norms() -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1))
    net = DeepLabV3(backbone, 8, classes=2, width=8, rates=(1, 2))
    images = [halves(s) for s in range(2)]
    first = Phase(16, 3, 0.01)
    before = copy.deepcopy(net.state_dict())
    sparse = train_deeplabv3(copy.deepcopy(net), images, phases=[first], batch=2, crop=33).net
    dense, histories = train_deeplabv3(
        net, images, phases=[first, Phase(8, 2, 0.01, frozen_norms=True)], batch=2, crop=33
    )
    assert [len(h.losses) for h in histories] == [1, 1]
    assert dense.output_stride == 8
    assert dense.head.aspp.rates == ((2, 2), (4, 4))
    after = dense.state_dict()
    for name, value in sparse.state_dict().items():
        kept = torch.equal(after[name], value)
        assert kept == _of_a_norm(dense, name), name
    moved = [n for n, v in before.items() if "running_mean" in n and not torch.equal(v, sparse.state_dict()[n])]
    assert moved
    assert {m.momentum for m in dense.modules() if isinstance(m, nn.BatchNorm2d)} == {3e-4}
    with pytest.raises(InputError, match="phases: expected the first at the net's output stride 8"):
        train_deeplabv3(dense, images, phases=[first])


def _of_a_norm(net: nn.Module, name: str) -> bool:
    return isinstance(net.get_submodule(name.rpartition(".")[0]), nn.BatchNorm2d)
