"""What studies draw: arms, curves, pictures."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Shaped
from torch import Tensor

from cenote.study.harness.checks import Arms, t_interval


def draw_arms(axes: Any, arms: Arms, xlabel: str, letters: int = 34) -> None:
    """One line per arm: a dot per seed, and the mean with its 95 % interval; names wrapped after so many letters."""
    for y, (_, values) in enumerate(arms.items()):
        low, high = t_interval(values)
        mean = float(np.mean(values))
        axes.plot(values, [y] * len(values), "o", color="#9aa0a6", markersize=4, zorder=1)
        axes.errorbar(mean, y, xerr=[[mean - low], [high - mean]], fmt="D", color="#0b57d0", markersize=5, capsize=3)
    axes.set_yticks(range(len(arms)), [textwrap.fill(name, letters) for name in arms])
    axes.invert_yaxis()
    axes.set_xlabel(xlabel)
    axes.spines[["top", "right"]].set_visible(False)


def draw_curves(axes: Any, by_x: Mapping[int, Arms], xlabel: str, ylabel: str) -> None:
    """One curve per arm over the numbers that `by_x` has arms for, in powers of 2: the mean and its 95 % interval."""
    at = list(by_x)
    for name in by_x[at[0]]:
        means = [float(np.mean(by_x[n][name])) for n in at]
        low, high = zip(*(t_interval(by_x[n][name]) for n in at), strict=True)
        (line,) = axes.plot(at, means, "o-", markersize=4, label=name)
        axes.fill_between(at, low, high, alpha=0.2, color=line.get_color())
    axes.set_xscale("log", base=2)
    axes.set_xticks(at, [str(n) for n in at])
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)


def draw_picture(axes: Any, picture: Shaped[Tensor, "height width *colours"], title: str, **settings: Any) -> None:
    """An image without axes; `settings` as of matplotlib's `imshow`."""
    axes.imshow(picture.numpy(), **settings)
    axes.set_title(title, fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])
