"""Selector, predictor and detector as one classifier, and the explanation that it is.

Source: Zhang, Lee and Wang, "Comprehensive Attribution" (2024), arXiv 2407.19308.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cenote.core import InputError, files
from cenote.core.requirements import require_at_least, require_one_of
from cenote.explain.base import Attribution, Explainer

Fill = Literal["mean", "black", "blur"]
FORMAT = 1


class MaskedPair(NamedTuple):
    """An image as the mask shows it, and what the mask leaves."""

    selected: Float[Tensor, "batch channels height width"]
    left: Float[Tensor, "batch channels height width"]


class Judged(NamedTuple):
    """What a `Comet` gives: `logits` of the masked image, `left_logits` of the rest, `mask [batch, 1, height, width]`."""

    logits: Float[Tensor, "batch classes"]
    left_logits: Float[Tensor, "batch classes"] | None
    mask: Float[Tensor, "batch 1 height width"]


class Explained(NamedTuple):
    """A prediction and its map."""

    logits: Float[Tensor, "batch classes"]
    mask: Float[Tensor, "batch height width"]


def filling(
    x: Float[Tensor, "batch channels height width"],
    fill: Fill = "mean",
    mean: Float[Tensor, "channels"] | None = None,
    std: Float[Tensor, "channels"] | None = None,
) -> Float[Tensor, "batch channels height width"]:
    """What stands where a mask hides.

    Args:
        x: normalised images.
        fill: `"mean"`: zeros, the mean of the data; `"black"`: `(0 - mean) / std`; `"blur"`: the image, blurred over a
            quarter of its size.
        mean, std: by which `x` was normalised, of `"black"`.
    """
    require_one_of(get_args(Fill), fill=fill)
    if fill == "mean":
        return torch.zeros_like(x)
    if fill == "black":
        if mean is None or std is None:
            raise InputError("mean, std: expected those of the normalisation with fill='black'")
        return (-mean / std).to(x).view(1, -1, 1, 1).expand_as(x)
    side = max(1, min(x.shape[-2:]) // 8)
    padded = F.pad(x, (side, side, side, side), mode="replicate")
    return F.avg_pool2d(padded, 2 * side + 1, stride=1)


def masked_pair(
    x: Float[Tensor, "batch channels height width"],
    mask: Float[Tensor, "batch 1 height width"],
    fill: Float[Tensor, "batch channels height width"],
) -> MaskedPair:
    """`x_s = s x + (1 - s) q` and `x_1-s = (1 - s) x + s q`; together they are `x + q`.

    >>> x, q = torch.ones(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)
    >>> float(masked_pair(x, torch.ones(1, 1, 2, 2), q).left.abs().sum())
    0.0
    """
    return MaskedPair(mask * x + (1 - mask) * fill, (1 - mask) * x + mask * fill)


class SmallSelector(nn.Module):
    """From an image to a logit per pixel: a few convolutions, the middle ones with holes.

    Args:
        channels: of the image.
        width: inside.

    Example:
        >>> SmallSelector(1, 4)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(self, channels: int = 3, width: int = 16) -> None:
        super().__init__()
        require_at_least(1, channels=channels, width=width)
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.LeakyReLU(0.1),
            nn.Conv2d(width, width, 3, padding=2, dilation=2),
            nn.LeakyReLU(0.1),
            nn.Conv2d(width, width, 3, padding=4, dilation=4),
            nn.LeakyReLU(0.1),
            nn.Conv2d(width, 1, 1),
        )

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch 1 height width"]:
        return self.layers(x)


class SmallClassifier(nn.Module):
    """From an image of any size to logits: three convolutions, two of them halving the image, and the largest of each channel.

    Args:
        channels: of the image.
        classes: of the output.
        width: inside.
    """

    def __init__(self, channels: int, classes: int, width: int = 16) -> None:
        super().__init__()
        require_at_least(1, channels=channels, classes=classes, width=width)
        self.features = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.output = nn.Linear(2 * width, classes)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        return self.output(self.features(x).amax((2, 3)))


class Comet(nn.Module):
    """A selector draws a soft mask, a predictor sees the masked image, a detector sees what is left.

    Trained by `train_comet`, the mask holds all that speaks for the class: else the detector would know it from the rest.

    Args:
        selector: from images to logits of a mask, `[batch, 1, height, width]`, alone or under `"out"`.
        predictor: from images to logits.
        detector: likewise; trained before on whole images. `None`: no detector, the plain pair; the predictor itself: one
            player.
        fill: what stands where the mask hides, see `filling`.
        mean, std: of the normalisation, of `"black"`.

    Example:
        >>> comet = Comet(SmallSelector(1, 4), SmallClassifier(1, 3, 4), SmallClassifier(1, 3, 4)).eval()
        >>> found = comet(torch.zeros(2, 1, 8, 8))
        >>> found.logits.shape, found.mask.shape
        (torch.Size([2, 3]), torch.Size([2, 1, 8, 8]))

    Source: Zhang, Lee and Wang (2024), arXiv 2407.19308.
    """

    def __init__(
        self,
        selector: nn.Module,
        predictor: nn.Module,
        detector: nn.Module | None = None,
        fill: Fill = "mean",
        mean: Float[Tensor, "channels"] | None = None,
        std: Float[Tensor, "channels"] | None = None,
    ) -> None:
        super().__init__()
        require_one_of(get_args(Fill), fill=fill)
        if (fill == "black") != (mean is not None and std is not None):
            raise InputError("mean, std: expected those of the normalisation with fill='black', and with it alone")
        self.selector, self.predictor, self.detector, self.fill = selector, predictor, detector, fill
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def mask_of(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch 1 height width"]:
        """The mask, from 0 to 1."""
        logits = self.selector(x)
        # as segmentation networks of torchvision give it
        logits = logits["out"] if isinstance(logits, Mapping) else logits
        if logits.shape != (x.shape[0], 1, *x.shape[2:]):
            raise InputError(
                f"selector: expected {[len(x), 1, *x.shape[2:]]} for {list(x.shape)}, got {list(logits.shape)}"
            )
        return logits.sigmoid()

    def masked(self, x: Tensor, mask: Float[Tensor, "batch 1 height width"]) -> MaskedPair:
        """The image as the mask shows it, and the rest."""
        return masked_pair(x, mask, filling(x, self.fill, self.mean, self.std))  # type: ignore[arg-type]

    def forward(self, pixel_values: Float[Tensor, "batch channels height width"]) -> Judged:
        """Prediction, what the detector makes of the rest, and the mask."""
        mask = self.mask_of(pixel_values)
        pair = self.masked(pixel_values, mask)
        left = None if self.detector is None else self.detector(pair.left)
        return Judged(self.predictor(pair.selected), left, mask)

    def explained(self, x: Float[Tensor, "batch channels height width"], quantile: float | None = None) -> Explained:
        """Prediction and map in one pass of selector and predictor; the detector is not needed.

        Args:
            x: images.
            quantile: of the map's pixels that are 0, the others 1; `None`: the soft map. The prediction is that of the soft
                one.
        """
        mask = self.mask_of(x)
        logits = self.predictor(self.masked(x, mask).selected)
        found = mask[:, 0]
        if quantile is not None:
            if not 0 <= quantile < 1:
                raise InputError(f"quantile: expected a share from 0, below 1, got {quantile}")
            found = top_pixels(found, round((1 - quantile) * found[0].numel())).to(found)
        return Explained(logits, found)

    def save(self, path: str | Path) -> None:
        """Write the parameters to one safetensors file."""
        # a detector that is the predictor is kept once
        shared = self.detector is self.predictor
        state = {k: v for k, v in self.state_dict().items() if not (shared and k.startswith("detector."))}
        card = {"format": FORMAT, "fill": self.fill}
        files.write_tensors(Path(path), state, {"comet": json.dumps(card)})

    def load(self, path: str | Path) -> Comet:
        """Read parameters that `save` wrote, of networks of the same sizes; gives itself.

        Raises:
            InputError: naming the file, where they do not fit.
        """
        try:
            state = files.read_tensors(Path(path)).tensors
            if self.detector is self.predictor:
                state |= {
                    f"detector.{k.removeprefix('predictor.')}": v
                    for k, v in state.items()
                    if k.startswith("predictor.")
                }
            self.load_state_dict(state)
        except FileNotFoundError:
            raise InputError(f"{path}: is not there") from None
        except (RuntimeError, ValueError) as error:
            raise InputError(f"{path}: does not hold the parameters of these networks ({str(error)[:200]})") from None
        return self


class CometExplainer(Explainer):
    """The mask of a `Comet`, as scores of pixels in rows; it is the model's own, so it speaks of its prediction alone.

    Example:
        >>> comet = Comet(SmallSelector(1, 4), SmallClassifier(1, 3, 4)).eval()
        >>> CometExplainer().explain(comet, {"pixel_values": torch.zeros(2, 1, 8, 8)}).scores.shape
        torch.Size([2, 64])

    Source: Zhang, Lee and Wang (2024), arXiv 2407.19308.
    """

    class_agnostic = True
    family = "perturbation"

    @torch.no_grad()
    def explain(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        target: Int[Tensor, "batch"] | None = None,  # noqa: ARG002
    ) -> Attribution:
        """Explain; it speaks of no target, see `Explainer.explain`."""
        if not isinstance(model, Comet):
            raise InputError(f"model: expected a Comet, which explains itself, got {type(model).__name__}")
        x = inputs.get("pixel_values")
        if not isinstance(x, Tensor) or x.dim() != 4:
            raise InputError("inputs: expected pixel_values [batch, channels, height, width]")
        scores = model.mask_of(x).flatten(1)
        return Attribution(scores, torch.ones_like(scores, dtype=torch.bool), units="pixels")


def top_pixels(maps: Float[Tensor, "batch height width"], count: int) -> Tensor:
    """The `count` pixels of each map with the largest values, first ones first among equals, as a bool map.

    >>> top_pixels(torch.tensor([[[0.1, 0.9], [0.5, 0.9]]]), 2).int().tolist()
    [[[0, 1], [0, 1]]]
    """
    flat = maps.flatten(1)
    order = flat.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return torch.zeros_like(flat, dtype=torch.bool).scatter(1, order, True).view_as(maps)
