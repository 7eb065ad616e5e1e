"""Training in which context broadcasting is the only change.

The DeiT recipe of the paper was not at hand; `train_images` takes any.

Source: Nam et al., "Scratching Visual Transformer's Back with Uniform Attention", ICCV 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from jaxtyping import Float, Int
from torch import Tensor

from cenote.core.requirements import require_at_least
from cenote.core.seeded import seeded
from cenote.mix.base import Mixer
from cenote.mix.context_broadcasting.broadcasting import ContextBroadcasting, ScaledContextBroadcasting
from cenote.mix.image_training import PLAIN, Recipe, train_images
from cenote.mix.vision import MixedViT, Spot

Spots = Mapping[Spot, Callable[[int], Mixer]]
ARMS: Mapping[str, Spots] = {
    "plain": {},
    "CB": {"mlp end": lambda _dim: ContextBroadcasting()},
    "CB_S": {"mlp end": lambda dim: ScaledContextBroadcasting(dim)},
}


def train_arms(
    build: Callable[[Spots], MixedViT],
    images: Float[Tensor, "items channels height width"],
    labels: Int[Tensor, "items"],
    arms: Mapping[str, Spots] = ARMS,
    recipe: Recipe = PLAIN,
    *,
    batch: int = 64,
    seed: int = 0,
) -> dict[str, MixedViT]:
    """Train one network per arm, all from the same numbers, in the same steps, on the same images changed in the same way.

    Args:
        build: makes the network with mixers at these places; it may load trained weights, for fine-tuning.
        images, labels: of the training.
        arms: what stands where, by name; default: nothing, and both forms of broadcasting at the end of the MLP.
        recipe: how all are trained.
        batch: images of a step.
        seed: of first values, orders and augmentation.
    """
    require_at_least(1, arms=len(arms))
    nets = {}
    for name, spots in arms.items():
        with seeded(seed):
            nets[name] = build(spots)
        train_images(nets[name], images, labels, recipe, batch=batch, seed=seed)
    return nets
