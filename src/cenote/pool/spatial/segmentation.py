"""Segmentation nets: how well label maps agree with the truth, and the rates that such nets are trained at."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least, require_positive

Labels = Int[Tensor, "batch height width"]


def label_counts(guess: Labels, labels: Labels, classes: int, ignore: int = 255) -> Int[Tensor, "classes classes"]:
    """How many pixels of each true class (rows) were given each class (columns); counts of several batches add up.

    Args:
        guess: classes of the pixels, as a net gives them.
        labels: the truth.
        classes: their number.
        ignore: the label whose pixels do not count.

    Raises:
        InputError: where the maps differ in size, or hold another class.

    >>> label_counts(torch.tensor([[[0, 1, 1]]]), torch.tensor([[[0, 0, 255]]]), 2).tolist()
    [[1, 1], [0, 0]]
    """
    counted = _counted(guess, labels, ignore)
    found, true = guess[counted].long(), labels[counted].long()
    both = torch.cat([found, true])
    if len(both) and not 0 <= int(both.min()) <= int(both.max()) < classes:
        raise InputError(
            f"guess, labels: expected classes 0 to {classes - 1}, got {int(both.min())} to {int(both.max())}"
        )
    return (true * classes + found).bincount(minlength=classes**2).view(classes, classes)


def mean_iou(counts: Int[Tensor, "classes classes"]) -> float:
    """Mean over classes of intersection over union, `n_cc / (sum_j n_cj + sum_i n_ic - n_cc)`.

    Args:
        counts: of all images together, see `label_counts`. A class that is neither there nor guessed is left out.

    Raises:
        InputError: where nothing was counted.

    >>> mean_iou(torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]]))
    0.775
    """
    own = counts.diagonal()
    union = counts.sum(0) + counts.sum(1) - own
    if not bool(union.any()):
        raise InputError("counts: no pixel was counted; every label is the one to ignore")
    return float((own[union > 0].double() / union[union > 0]).mean())


def pixel_accuracy(counts: Int[Tensor, "classes classes"]) -> float:
    """Share of the counted pixels that were given their class.

    >>> pixel_accuracy(torch.tensor([[3, 1], [0, 4]]))
    0.875
    """
    if not bool(counts.any()):
        raise InputError("counts: no pixel was counted; every label is the one to ignore")
    return float(counts.diagonal().sum().double() / counts.sum())


def near_borders(labels: Labels, width: int) -> Bool[Tensor, "batch height width"]:
    """The pixels within `width` pixels of a border: on either side of it, as many in each direction.

    A border lies between neighbours, left and right or above and below, whose labels differ; the label to ignore is one too.

    >>> near_borders(torch.tensor([[[0, 0, 0, 1, 1, 1]]]), 2).int().tolist()
    [[[0, 1, 1, 1, 1, 0]]]
    """
    require_at_least(1, width=width)
    beside = torch.zeros_like(labels, dtype=torch.bool)
    across, down = labels[..., 1:] != labels[..., :-1], labels[:, 1:] != labels[:, :-1]
    for differs, ends in ((across, (beside[..., 1:], beside[..., :-1])), (down, (beside[:, 1:], beside[:, :-1]))):
        for end in ends:
            end |= differs
    return F.max_pool2d(beside[:, None].float(), 2 * width - 1, 1, width - 1).squeeze(1) > 0


def border_accuracy(guess: Labels, labels: Labels, width: int, ignore: int = 255) -> float:
    """Share of the pixels within `width` pixels of a border of the truth that were given their class.

    Args:
        guess: classes of the pixels.
        labels: the truth.
        width: of the band, on either side.
        ignore: the label whose pixels do not count.

    Raises:
        InputError: where the maps differ in size, or no pixel lies in the band.

    >>> border_accuracy(torch.tensor([[[0, 0, 1, 1, 1, 0]]]), torch.tensor([[[0, 0, 0, 1, 1, 1]]]), 1)
    0.5
    """
    band = _counted(guess, labels, ignore) & near_borders(labels, width)
    if not bool(band.any()):
        raise InputError("labels: hold no border; the accuracy beside borders needs two classes in an image")
    return float((guess == labels)[band].double().mean())


def border_f1(guess: Labels, labels: Labels, width: int = 1, ignore: int = 255) -> float:
    """F1 of borders: how many borders of the guess lie near true ones (precision), and the other way round (recall).

    Args:
        guess: classes of the pixels.
        labels: the truth.
        width: how many pixels off a border may lie, in each direction.
        ignore: the label whose pixels do not count, nor do those beside them.

    Raises:
        InputError: where the maps differ in size, or neither has a border.

    >>> border_f1(torch.tensor([[[0, 0, 1, 1, 1, 1]]]), torch.tensor([[[0, 0, 0, 1, 1, 1]]]))
    1.0
    """
    require_at_least(0, width=width)
    counted = _counted(guess, labels, ignore)
    counted = counted & ~near_borders(counted.long(), 1)
    own, true = (near_borders(maps, 1) & counted for maps in (guess, labels))
    if not bool((own | true).any()):
        raise InputError("guess, labels: neither holds a border; F1 of borders needs two classes in an image")
    near = [F.max_pool2d(b[:, None].float(), 2 * width + 1, 1, width).squeeze(1) > 0 for b in (true, own)]
    hits = [int((a & b).sum()) for a, b in ((own, near[0]), (true, near[1]))]
    return 2 * hits[0] * hits[1] / max(hits[0] * int(true.sum()) + hits[1] * int(own.sum()), 1)


def poly_schedule(optimizer: Optimizer, steps: int, power: float = 0.9, warm_up: int = 0) -> LambdaLR:
    """The rate `lr (1 - t / steps)^power` at step `t`, for each group of parameters; 0 from the last step on.

    Args:
        optimizer: with the rates of the first step.
        steps: of the whole training.
        power: 0.9 in the papers.
        warm_up: of the first steps, `t` takes the share `(t + 1) / warm_up` of its rate.

    >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    >>> schedule = poly_schedule(optimizer, steps=4, power=1.0)
    >>> optimizer.step(); schedule.step(); schedule.get_last_lr()
    [0.75]
    """
    require_at_least(1, steps=steps)
    require_positive(power=power)
    require_at_least(0, warm_up=warm_up)
    return LambdaLR(optimizer, lambda t: min(1.0, (t + 1) / max(warm_up, 1)) * max(0.0, 1 - t / steps) ** power)


def head_rates(net: nn.Module, heads: Iterable[nn.Module], lr: float, times: float = 10.0) -> list[dict[str, Any]]:
    """Two groups of parameters for an optimiser: those of `heads` at `times` the rate of all others.

    Args:
        net: that is trained.
        heads: parts of it that start from nothing: the layers that give class scores.
        lr: of the others.
        times: how much faster the heads go.

    Raises:
        InputError: where the heads have no parameter of the net.

    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    >>> [(len(group["params"]), group["lr"]) for group in head_rates(net, [net[1]], 0.01)]
    [(2, 0.01), (2, 0.1)]
    """
    require_positive(lr=lr, times=times)
    fast = {id(p) for head in heads for p in head.parameters()}
    groups: list[list[nn.Parameter]] = [[], []]
    for p in net.parameters():
        groups[id(p) in fast].append(p)
    if not groups[1]:
        raise InputError("heads: expected parts of the net with parameters of their own, got none")
    return [{"params": groups[0], "lr": lr}, {"params": groups[1], "lr": times * lr}]


@contextmanager
def evaluated(net: nn.Module) -> Iterator[None]:
    """The net in eval mode for as long as the block lasts; then every module has its own mode again."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _counted(guess: Labels, labels: Labels, ignore: int) -> Bool[Tensor, "batch height width"]:
    if guess.dim() != 3 or guess.shape != labels.shape:
        raise InputError(
            f"guess, labels: expected [batch, height, width] of one size, got {tuple(guess.shape)} and {tuple(labels.shape)}"
        )
    return labels != ignore
