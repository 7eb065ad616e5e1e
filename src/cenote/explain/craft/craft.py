"""CRAFT of a model that is split in two: concepts of its crops, their importance, where they are.

Source: Fel et al., "CRAFT: Concept Recursive Activation FacTorization for Explainability" (2023), arXiv 2211.10154.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cenote.core import InputError, files
from cenote.core.requirements import require_at_least, require_one_of
from cenote.explain.craft.dictionary import (
    Factoring,
    coefficient_gradient,
    coefficients,
    dictionary,
    high,
)
from cenote.explain.craft.sobol import Estimator, Sampler, sobol_masks, total_indices
from cenote.models.live.passing import passing

Half = Callable[[Tensor], Tensor]
Given = Literal["images", "activations", "coefficients"]

FORMAT = 1
OVERLAP = 0.8
"""Share of a patch between the corners of neighbours."""


def crops_of(images: Float[Tensor, "images channels size size"], patch: int) -> Float[Tensor, "crops channels p p"]:
    """Square crops of each image, row by row, at `int(0.8 patch)` pixels from each other.

    >>> crops_of(torch.rand(2, 3, 20, 20), 10).shape
    torch.Size([8, 3, 10, 10])
    """
    if images.shape[2] != images.shape[3]:
        raise InputError(f"images: expected square ones, got {list(images.shape[2:])}; crop or resize them before")
    if not 1 <= patch <= images.shape[2]:
        raise InputError(f"patch: expected 1 to {images.shape[2]} pixels, the side of the images, got {patch}")
    cut = F.unfold(images, patch, stride=max(1, int(OVERLAP * patch)))
    return cut.mT.reshape(-1, images.shape[1], patch, patch)


def split_at(model: nn.Module, layer: str, example: Float[Tensor, "items channels height width"]) -> tuple[Half, Half]:
    """A model as two functions: images to what a layer gives, and that to what the model gives.

    The second runs the whole model and puts the given activations in the layer's place; of a model that is a chain of modules
    (`torch.nn.Sequential`) only what stands behind the layer runs.

    Args:
        model: of one input, in eval mode.
        layer: path of the module.
        example: images of the right size; their values do not matter.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 2)).eval()
        >>> images = torch.rand(2, 3, 8, 8)
        >>> g, h = split_at(model, "1", images)
        >>> torch.allclose(h(g(images)), model(images))
        True
    """
    if model.training:
        raise InputError("model: expected one in eval mode; call model.eval() before")
    names = [name for name, _ in model.named_children()] if isinstance(model, nn.Sequential) else []
    if layer in names:
        at = names.index(layer) + 1
        return model[:at], model[at:]  # type: ignore[index]

    def first(images: Tensor) -> Tensor:
        with passing(model, {layer: None}) as seen:
            model(images)
        return seen[layer].gave

    def second(activations: Tensor) -> Tensor:
        with passing(model, {layer: lambda _own: activations}):
            found = model(example[:1].expand(len(activations), *example.shape[1:]))
        return found if isinstance(found, Tensor) else getattr(found, "logits", found)

    with torch.no_grad():
        first(example[:1])
    return first, second


@dataclass(frozen=True, eq=False)
class Concepts:
    """Concepts of a model's images.

    Attributes:
        crops: of the images.
        u: how much of each concept is in each crop.
        w: the direction of each concept among the layer's channels.
        side: pixels of the images, to which crops are made large for the model.
        g, h: the two halves of the model; `None` of concepts that were loaded without them.
        batch_size: images or activations at a time.
        under: concepts of crops that were split again, by the number of the concept.
    """

    crops: Float[Tensor, "crops channels p p"]
    u: Float[Tensor, "crops concepts"]
    w: Float[Tensor, "concepts width"]
    side: int
    g: Half | None = None
    h: Half | None = None
    batch_size: int = 64
    under: dict[int, Concepts] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many concepts there are."""
        return len(self.w)

    @torch.no_grad()
    def transform(self, images: Float[Tensor, "images ..."], given: Given = "images") -> Float[Tensor, "images ..."]:
        """How much of each concept is at each place: `[images, height, width, concepts]`, or `[images, concepts]`.

        Args:
            images: of any size that the model takes, or what `given` says.
            given: `"images"`, `"activations"`: what `g` gave of them, or `"coefficients"`: what this gave.
        """
        require_one_of(get_args(Given), given=given)
        if given == "coefficients":
            return images
        return coefficients(self._activations(images, given).movedim(1, -1), self.w)

    def maps(
        self, images: Float[Tensor, "images channels height width"]
    ) -> Float[Tensor, "images concepts height width"]:
        """The coefficients at each pixel: a heat map of each concept."""
        found = self.transform(images)
        if found.dim() != 4:
            raise InputError("g: gives one vector per image, which has no places; split the model before its pooling")
        return F.interpolate(found.movedim(-1, 1), images.shape[2:], mode="bilinear", align_corners=False)

    @torch.no_grad()
    def importance(
        self,
        images: Float[Tensor, "images ..."],
        target: int,
        points: int = 32,
        *,
        estimator: Estimator = "jansen",
        sampler: Sampler = "halton",
        given: Given = "images",
        seed: int = 0,
        shuffled: bool = False,
    ) -> Float[Tensor, "images concepts"]:
        """How much of the variance of a class's score each concept has a share in, when concepts are masked; per image.

        `y = h((U o m) W)[target]` for `points (r + 2)` masks of a Sobol design, and its total index. Only `h` runs:
        its input is the reconstruction, never the activations themselves. The mean over images is the importance of the paper.

        Args:
            images, given: as of `transform`.
            target: class.
            points: rows of the design, see `sobol_masks`.
            estimator, sampler, seed: see `sobol_masks` and `total_indices`.
            shuffled: permute the scores over the masks: an index that does not see the model, as a control.
        """
        u = self.transform(images, given)
        masks = sobol_masks(self.count, points, sampler, seed).to(u)
        found = []
        for own in u:
            y = torch.cat([self._scores(own * _over(m, own), target) for m in masks.split(self.batch_size)])
            if shuffled:
                y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(seed)).to(y.device)]
            found.append(total_indices(y, self.count, estimator))
        return torch.stack(found)

    def best_crops(self, concept: int, k: int = 10) -> Int[Tensor, "k"]:
        """The numbers of the crops with most of a concept, in order."""
        return self.u[:, concept].topk(min(k, len(self.u))).indices

    def attribution_map(
        self, images: Float[Tensor, "images channels height width"], concept: int, early: Half, late: Half
    ) -> Float[Tensor, "images height width"]:
        """Grad-CAM of a concept's coefficient at an earlier layer, by implicit differentiation of the least squares.

        `ReLU(sum_c A_c mean(d U_i / d A_c))`, made as large as the images.

        Args:
            images: to explain.
            concept: i.
            early: images to maps `[images, channels, h, w]` of the earlier layer.
            late: those to the activations of this one, so that `g(x) = late(early(x))`.
        """
        with torch.no_grad():
            maps = early(images)
        maps = maps.detach().requires_grad_()
        with torch.enable_grad():
            a = late(maps).movedim(1, -1)
            flat = a.reshape(-1, a.shape[-1])
            own = coefficient_gradient(coefficients(flat.detach(), self.w), self.w, concept)
            (gradient,) = torch.autograd.grad(flat, maps, own.to(flat))
        found = (maps.detach() * gradient.mean((2, 3), keepdim=True)).sum(1, keepdim=True).relu()
        return F.interpolate(found, images.shape[2:], mode="bicubic", align_corners=False)[:, 0]

    def split(self, concept: int, g: Half, concepts: int, percentile: float = 90.0, seed: int = 0) -> Concepts:
        """Concepts within a concept: its crops once more, by an earlier layer. They are kept in `under` as well.

        Args:
            concept: to split.
            g: images to the activations of the earlier layer.
            concepts: how many.
            percentile: crops with a coefficient above it are taken.
            seed: of the factoring.

        Note:
            The percentile is from memory of the paper; the authors' code does not have this step.
        """
        chosen = self.crops[high(self.u, concept, percentile)]
        found = _fitted(chosen, self.side, Craft(g, None, concepts, batch_size=self.batch_size, seed=seed))
        self.under[concept] = found
        return found

    def deletion(
        self,
        images: Float[Tensor, "images ..."],
        target: int,
        order: Sequence[int],
        *,
        insertion: bool = False,
        given: Given = "images",
    ) -> Float[Tensor, "images steps"]:
        """The score of a class as concepts are zeroed one after the other, or added to nothing; `r + 1` steps.

        Args:
            images, given: as of `transform`.
            target: class.
            order: of the concepts, the first to go or to come.
            insertion: add them to an empty reconstruction instead.
        """
        if sorted(order) != list(range(self.count)):
            raise InputError(f"order: expected each of {self.count} concepts once, got {list(order)}")
        u = self.transform(images, given)
        rank = torch.empty(self.count, device=u.device, dtype=torch.long)
        rank[torch.tensor(list(order), device=u.device)] = torch.arange(self.count, device=u.device)
        steps = torch.arange(self.count + 1, device=u.device)
        gone = rank[None, :] < steps[:, None]
        kept = (gone if insertion else ~gone).to(u)
        return torch.stack([self._scores(own * _over(kept, own), target) for own in u])

    @torch.no_grad()
    def error(self, images: Float[Tensor, "images ..."], given: Given = "images") -> float:
        """Share of the activations' squares that the concepts do not give back; of images or activations."""
        a = self._activations(images, given).movedim(1, -1)
        return float(((a - coefficients(a, self.w) @ self.w) ** 2).sum() / (a**2).sum())

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, without the model."""
        tensors = {"crops": self.crops, "u": self.u, "w": self.w}
        card = {"format": FORMAT, "batch_size": self.batch_size, "side": self.side}
        files.write_tensors(Path(path), tensors, {"concepts": json.dumps(card)})

    @classmethod
    def load(cls, path: str | Path, g: Half | None = None, h: Half | None = None) -> Concepts:
        """Read what `save` wrote; give the halves of the model for all that runs it."""
        try:
            stored = files.read_tensors(Path(path))
            card: dict[str, Any] = json.loads(stored.metadata["concepts"])
            tensors: dict[str, Any] = {name: stored.tensors[name] for name in ("crops", "u", "w")}
        except FileNotFoundError:
            raise InputError(f"{path}: is not there") from None
        except Exception as error:
            raise InputError(f"{path}: holds no concepts ({error})") from None
        files.require_format(Path(path), card, FORMAT)
        return cls(**tensors, g=g, h=h, batch_size=card["batch_size"], side=card["side"])

    def _activations(self, images: Tensor, given: Given) -> Tensor:
        return images if given == "activations" else self._run(self.g, images, "g")

    def _run(self, half: Half | None, x: Tensor, name: str) -> Tensor:
        if half is None:
            raise InputError(f"{name}: these concepts were loaded without their model; load them with g and h")
        return torch.cat([half(part) for part in x.split(self.batch_size)])

    def _scores(self, u: Tensor, target: int) -> Float[Tensor, "items"]:
        """Of reconstructions, `[items, ..., concepts]`."""
        with torch.no_grad():
            scores = self._run(self.h, (u @ self.w).movedim(-1, 1), "h")
        if scores.dim() != 2 or not 0 <= target < scores.shape[1]:
            raise InputError(f"target: expected a class of {list(scores.shape)} scores [items, classes], got {target}")
        return scores[:, target]


class Craft:
    """Concepts that a model's own activations are made of, learned from crops of images that it gives one class.

    Crops are made as large as the images (bilinear), go through `g`, are averaged over places, and factored:
    `A = U W`, both at 0 or above, so that concepts only add up. Nothing of the model is trained.

    Args:
        g: images to activations at 0 or above, `[items, width, h, w]` or `[items, width]`.
        h: activations to scores of classes; see `split_at`.
        concepts: r.
        patch: side of the crops in pixels.
        batch_size: images or activations at a time.
        factoring: see `dictionary`.
        seed: of the factoring.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)).eval()
        >>> images = torch.rand(6, 3, 12, 12)
        >>> concepts = Craft(*split_at(model, "1", images), concepts=3, patch=6).fit(images)
        >>> concepts.importance(images, target=1, points=8).mean(0).shape, concepts.maps(images).shape
        (torch.Size([3]), torch.Size([6, 3, 12, 12]))

    Source: Fel et al. (2023), arXiv 2211.10154.
    """

    def __init__(
        self,
        g: Half,
        h: Half | None,
        concepts: int = 20,
        patch: int = 64,
        batch_size: int = 64,
        factoring: Factoring = "nmf",
        seed: int = 0,
    ) -> None:
        require_at_least(1, concepts=concepts, patch=patch, batch_size=batch_size)
        require_one_of(get_args(Factoring), factoring=factoring)
        self.g, self.h, self.concepts, self.patch = g, h, concepts, patch
        self.batch_size, self.factoring, self.seed = batch_size, factoring, seed

    def fit(self, images: Float[Tensor, "images channels height width"]) -> Concepts:
        """Learn the concepts of some hundred images that the model gives one class.

        Raises:
            InputError: before the factoring, for images that are not square or smaller than a patch, negative activations, or
                fewer crops than concepts.
        """
        return _fitted(crops_of(images, self.patch), int(images.shape[-1]), self)


@torch.no_grad()
def _fitted(crops: Float[Tensor, "crops channels p p"], side: int, how: Craft) -> Concepts:
    found = []
    for part in crops.split(how.batch_size):
        a = how.g(F.interpolate(part, (side, side), mode="bilinear", align_corners=False))
        found.append(a.mean((2, 3)) if a.dim() == 4 else a)
    u, w = dictionary(torch.cat(found), how.concepts, how.factoring, how.seed)
    return Concepts(crops, u, w, side, how.g, how.h, how.batch_size)


def _over(masks: Float[Tensor, "masks concepts"], own: Tensor) -> Tensor:
    return masks.view(len(masks), *(1,) * (own.dim() - 1), masks.shape[1])
