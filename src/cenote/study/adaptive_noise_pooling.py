"""Whatever share of the vectors is signal, adaptive pooling is close to the best of mean, max, class token and itself: its
largest regret over `k` is the smallest, and it has the lowest error where at most half of the vectors are signal.

Refuted if another pooling has a smaller largest regret, or if the mean or the class token has an error more than 5 % below
that of adaptive pooling at 8 or fewer signal vectors.

The task is KNN-Centroid: a transformer reads 32 vectors and must return the mean of the `k` nearest to the first one
(`k` = 1, 8, 31). The regret of a method at `k` is its mean squared error minus that of the best method there. Without any
training: the same pooling with identity maps, its query a signal vector, against mean and max over the share of signal.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cenote.pool import AdaptiveNoisePool, MaxPool, MeanPool
from cenote.pool.attention.adaptive_noise_pooling.attenuator import Attenuator, Pooling
from cenote.pool.attention.adaptive_noise_pooling.knn_centroid import knn_centroid_targets, knn_centroid_vectors
from cenote.study.harness import Arms, Findings, Size, above, draw_curves, seeds_of, study
from cenote.study.harness.training import Together, constant, epochs, fit, steps_of

VECTORS, DIM = 32, 8
NEAREST = (1, 8, 31)
TRAIN: dict[Size, int] = {"smoke": 250, "small": 5000, "full": 5000}
TEST: dict[Size, int] = {"smoke": 100, "small": 1000, "full": 1000}
EPOCHS: dict[Size, int] = {"smoke": 1, "small": 14, "full": 30}
BATCH = 250
LEARNING_RATE = 3e-3
POOLINGS: dict[str, Pooling] = {"mean": "mean", "max": "max", "class token": "cls", "adaptive": "adaptive"}
OTHERS = [name for name in POOLINGS if name != "adaptive"]

SIGNAL = (1, 2, 4, 8, 16, 24, 32)
SIGNAL_DIM = 16
SETS = 500
TEMPERATURE = 2.0


@study
def run(seed: int, size: Size) -> Findings:
    """Train a transformer per pooling, `k` and seed; then pool synthetic signal and noise without training."""
    seeds = seeds_of(seed, size, small=3, full=5)
    errors = _trained(seeds, size, NEAREST)
    restarted = _trained(seeds, size, (8,), restart=True)[8]
    regret = _largest_regret(errors)
    untrained = {k: _untrained(k, seeds) for k in SIGNAL}
    lead = [min(regret[other][s] for other in OTHERS) - regret["adaptive"][s] for s in range(len(seeds))]
    few, all_signal = SIGNAL[2], SIGNAL[-1]
    return Findings(
        seeds=seeds,
        checks=(
            above("largest regret, the smallest of the others minus adaptive's", lead, expected=0.0),
            above(
                "smallest error of mean and class token over adaptive's, k of 1 and 8",
                _smallest_ratio(errors, ("mean", "class token")),
                expected=1.0,
                refuted=0.95,
            ),
            above(
                "smallest error of max over adaptive's, k of 1 and 8",
                _smallest_ratio(errors, ("max",)),
                expected=1.0,
                refuted=-math.inf,
            ),
            above(
                "smallest error of mean and class token over adaptive's, k of 8, PyTorch's initialisation",
                _smallest_ratio({8: restarted}, ("mean", "class token")),
                expected=1.0,
                refuted=0.95,
                in_rule=False,
            ),
            above("error at k of 31, adaptive minus mean", errors[31].minus("adaptive", "mean"), 0.0, in_rule=False),
            above(
                f"untrained, {few} of {VECTORS} signal: error of mean minus adaptive",
                untrained[few].minus("mean", "adaptive"),
                0.0,
                in_rule=False,
            ),
            above(
                f"untrained, {few} of {VECTORS} signal: error of max minus adaptive",
                untrained[few].minus("max", "adaptive"),
                0.0,
                in_rule=False,
            ),
            above(
                f"untrained, {all_signal} of {VECTORS} signal: error of adaptive minus mean",
                untrained[all_signal].minus("adaptive", "mean"),
                0.0,
                in_rule=False,
            ),
        ),
        table=[
            *(row for k, arms in errors.items() for row in arms.table(f"mean squared error, k of {k}")),
            *regret.table("largest regret"),
            *restarted.table("mean squared error, k of 8, PyTorch's initialisation"),
            *(row for k, arms in untrained.items() for row in arms.table(f"untrained, {k} of {VECTORS} signal")),
        ],
        figure=partial(_draw, errors=errors, untrained=untrained),
        notes=(
            f"Sets of {VECTORS} vectors of width {DIM}, {TRAIN[size]:,} for training, two layers of width 16, "
            f"{EPOCHS[size]} epochs; the paper trains 12 layers on a million sets of 128 vectors for 100 epochs.",
            "The model starts as the author's does (normal weights, standard deviation 0.02). After so few steps mean and "
            "class token are then far from converged. From PyTorch's own initialisation, at k of 8, the mean comes close to "
            "adaptive pooling and the class token does not: most of the lead over the mean is speed of training.",
            "The largest ratio to the best method is not part of the claim: where all vectors are signal, the mean is optimal.",
            f"Untrained: signal = a random centre in [1, 2]^{SIGNAL_DIM} plus normal noise of 0.3, distractors normal with "
            f"0.5; identity maps, queries scaled by {TEMPERATURE:g}; error = squared distance to the mean of the signal.",
        ),
        tried=(
            "8 epochs instead of 14, the first run: further from converged, and not decidable either.",
            "PyTorch's initialisation, to see why mean and class token fell so far behind: reported above, outside the rule.",
        ),
    )


def _trained(seeds: tuple[int, ...], size: Size, nearest: tuple[int, ...], restart: bool = False) -> dict[int, Arms]:
    """Test error by `k` and pooling; with `restart` from PyTorch's own initialisation."""
    train = [knn_centroid_vectors(TRAIN[size], VECTORS, DIM, seed=s) for s in seeds]
    test = [knn_centroid_vectors(TEST[size], VECTORS, DIM, seed=s + 1000) for s in seeds]
    x, test_x = _stacked(train), _stacked(test)
    steps = steps_of(TRAIN[size], BATCH, EPOCHS[size])
    errors: dict[int, Arms] = {}
    for k in nearest:
        y, test_y = (_stacked([knn_centroid_targets(v, f"knn{k}") for v in sets]) for sets in (train, test))
        errors[k] = Arms()
        for name, pooling in POOLINGS.items():
            model = Together(partial(_attenuator, pooling, restart), seeds, in_turn=True)
            batches = epochs(x, y, BATCH, seeds)
            fit(model, batches, F.mse_loss, steps, LEARNING_RATE, optimiser=torch.optim.Adam, decay=constant)
            with torch.no_grad():
                errors[k][name] = tuple((model(test_x) - test_y).square().flatten(1).mean(1).tolist())
    return errors


def _attenuator(pooling: Pooling, restart: bool) -> Attenuator:
    model = Attenuator(DIM, out_dim=DIM, hidden=16, pooling=pooling, layers=2, heads=4)
    for module in model.modules():
        if restart and isinstance(module, nn.Linear | nn.Embedding):
            module.reset_parameters()
    return model


def _stacked(sets: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(sets)).float()


def _largest_regret(errors: dict[int, Arms]) -> Arms:
    by_k = np.array([[arms[name] for name in POOLINGS] for arms in errors.values()])
    largest = (by_k - by_k.min(1, keepdims=True)).max(0)
    return Arms({name: tuple(of_seeds.tolist()) for name, of_seeds in zip(POOLINGS, largest, strict=True)})


def _smallest_ratio(errors: dict[int, Arms], others: tuple[str, ...]) -> list[float]:
    few = [arms for k, arms in errors.items() if k <= 8]
    ratios = [np.array(arms[other]) / np.array(arms["adaptive"]) for arms in few for other in others]
    return np.min(ratios, 0).tolist()


def _untrained(signal: int, seeds: tuple[int, ...]) -> Arms:
    adaptive = AdaptiveNoisePool(SIGNAL_DIM, heads=1, query=[0])
    identity = torch.eye(SIGNAL_DIM)
    with torch.no_grad():
        adaptive.q.weight.copy_(TEMPERATURE * identity)
        adaptive.kv.weight.copy_(torch.cat([identity, identity]))
        adaptive.out.weight.copy_(identity)
    pools = {"mean": MeanPool(SIGNAL_DIM), "max": MaxPool(SIGNAL_DIM), "adaptive": adaptive}
    sets = [_signal_and_noise(signal, torch.Generator().manual_seed(s)) for s in seeds]
    with torch.no_grad():
        return Arms(
            {
                name: tuple((pool(x) - x[:, :signal].mean(1)).square().mean().item() for x in sets)
                for name, pool in pools.items()
            }
        )


def _signal_and_noise(signal: int, generator: torch.Generator) -> Float[Tensor, "sets vectors dim"]:
    centre = 1 + torch.rand(SETS, 1, SIGNAL_DIM, generator=generator)
    noise = torch.randn(SETS, VECTORS, SIGNAL_DIM, generator=generator)
    is_signal = (torch.arange(VECTORS) < signal).view(1, -1, 1)
    return torch.where(is_signal, centre + 0.3 * noise, 0.5 * noise)


def _draw(figure: Any, errors: dict[int, Arms], untrained: dict[int, Arms]) -> None:
    left, right = figure.subplots(1, 2)
    for axes, by_share, title in (
        (left, errors, "KNN-Centroid, trained"),
        (right, untrained, "signal and noise, untrained"),
    ):
        draw_curves(axes, by_share, f"signal vectors of {VECTORS}", "mean squared error")
        axes.set_yscale("symlog", linthresh=1e-3)
        axes.set_ylim(bottom=0)
        axes.set_title(title, fontsize=9)
        axes.legend(frameon=False, fontsize=8)
