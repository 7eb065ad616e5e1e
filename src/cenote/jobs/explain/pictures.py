"""Images and a classifier: patches are taken away. The embedded digits are such."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from cenote.core import InputError
from cenote.explain.base import Attribution
from cenote.explain.embedded import output_of
from cenote.features.digits_mae import GRID, IMAGE, PATCH, DigitsEncoder
from cenote.features.embedded import classified
from cenote.jobs.explain.subject import Subject, from_the_first

ITEMS = 200


class Pictures(Subject):
    """Images of one size, cut into square patches that become black, or the image's own mean colour.

    Args:
        model: `model(pixel_values=[batch, channels, height, width])` gives logits.
        images: as the model takes them.
        patch: side of a patch in pixels; divides both sides.
        labels: of the classes.
        names: of the images; default: their numbers.
        masks: where what each image shows is, to score whether explanations point there.

    Raises:
        InputError: where patches or masks do not fit, or a mask marks nothing.
    """

    fills = ("black", "mean colour")
    kind = "images"

    def __init__(
        self,
        model: nn.Module,
        images: Float[Tensor, "items channels height width"],
        patch: int,
        labels: Sequence[str],
        names: Sequence[str] | None = None,
        masks: Bool[Tensor, "items mask_height mask_width"] | None = None,
    ) -> None:
        height, width = images.shape[-2:]
        if patch < 1 or height % patch or width % patch:
            raise InputError(f"patch: {patch} does not divide the sides of images of {height} x {width} pixels")
        self.model, self.images, self.patch, self.labels = model, images, patch, tuple(labels)
        self.names = tuple(names) if names is not None else tuple(f"image {i}" for i in range(len(images)))
        self.grid = height // patch, width // patch
        rows, columns = (torch.arange(n) for n in self.grid)
        number = (rows[:, None] * self.grid[1] + columns).flatten()
        square = ((rows // 2)[:, None] * -(-self.grid[1] // 2) + columns // 2).flatten()
        self.sizes = {
            "patches": number.expand(len(images), -1),
            "2 x 2 patches": square.expand(len(images), -1),
        }
        self.settings = {"patch": patch}
        self.masks = masks
        if masks is not None:
            self.inside = self._covered(masks)

    def _covered(self, masks: Bool[Tensor, "items h w"]) -> Float[Tensor, "items patches"]:
        """Which share of each patch a mask covers."""
        wanted = (len(self.images), *self.images.shape[-2:])
        if tuple(masks.shape) != wanted:
            raise InputError(f"masks: expected {list(wanted)} as the images, got {list(masks.shape)}")
        empty = (~masks.flatten(1).any(1)).nonzero()
        if len(empty):
            raise InputError(f"masks: that of {self.names[int(empty[0])]} marks nothing; leave the image out")
        return nn.functional.avg_pool2d(masks[:, None].float().cpu(), self.patch).flatten(1)

    def inputs(self, item: int) -> dict[str, Any]:
        return {"pixel_values": self.images[item : item + 1]}

    def outputs(
        self, items: Int[Tensor, "rows"], keep: Bool[Tensor, "rows tokens"], fill: str
    ) -> Float[Tensor, "rows classes"]:
        images = self.images[items]
        stays = keep.unflatten(1, self.grid).repeat_interleave(self.patch, 1).repeat_interleave(self.patch, 2)
        other = torch.zeros_like(images) if fill == "black" else images.mean((2, 3), keepdim=True).expand_as(images)
        return output_of(self.model(pixel_values=torch.where(stays[:, None], images, other))).float().cpu()

    def scores(self, item: int, found: Attribution) -> Float[Tensor, "tokens"]:  # noqa: ARG002 - all are alike
        """Of patches, also where [CLS] and registers stand before them; pixels are summed."""
        own, patches = found.scores[0], self.grid[0] * self.grid[1]
        if found.units == "pixels" and len(own) == patches * self.patch**2:
            whole = own.view(1, 1, self.grid[0] * self.patch, self.grid[1] * self.patch)
            return nn.functional.avg_pool2d(whole, self.patch).flatten() * self.patch**2
        if len(own) < patches:
            raise InputError(f"expected scores of {patches} patches, got {len(own)} {found.units}")
        return own[len(own) - patches :]

    def hints(self) -> dict[str, Float[Tensor, "items tokens"]]:
        cells = self.images.unfold(2, self.patch, self.patch).unfold(3, self.patch, self.patch).flatten(2, 3)
        cells = cells.transpose(1, 2).flatten(2)
        return {
            "position": from_the_first(self.sizes["patches"] >= 0),
            "contrast": cells.std(2),
            "pixel-norm": cells.norm(dim=2),
        }

    def words(self, item: int) -> list[str]:  # noqa: ARG002 - all have the same
        return [f"row {r + 1}, column {c + 1}" for r in range(self.grid[0]) for c in range(self.grid[1])]

    def content(self) -> list[Shaped[Tensor, "..."]]:
        return [self.images] if self.masks is None else [self.images, self.masks]

    def picture(self, item: int) -> bytes | None:
        """A PNG file."""
        from PIL import Image

        image = self.images[item]
        low, high = image.amin(), image.amax()
        grey = ((image - low) / (high - low).clamp(min=1e-9) * 255).round().byte()
        plane = grey[0] if len(grey) != 3 else grey.permute(1, 2, 0)
        buffer = io.BytesIO()
        Image.fromarray(plane.cpu().numpy()).save(buffer, "PNG", optimize=True)
        return buffer.getvalue()


class DigitsClassifier(nn.Module):
    """The embedded encoder of digits and a linear classifier on its [CLS] token.

    Args:
        encoder: frozen.
        weight, bias: of the classifier.
    """

    def __init__(
        self, encoder: DigitsEncoder, weight: Float[Tensor, "classes dim"], bias: Float[Tensor, "classes"]
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(weight.shape[1], weight.shape[0])
        with torch.no_grad():
            self.head.weight.copy_(weight)
            self.head.bias.copy_(bias)

    def forward(self, pixel_values: Float[Tensor, "batch 1 8 8"]) -> Float[Tensor, "batch classes"]:
        """Logits of images with pixels from 0 to 1."""
        return self.head(self.encoder(pixel_values[:, 0])[:, 0])


def digits(items: int = ITEMS) -> Pictures:
    """The first test images of the embedded digits, and a logistic regression on the [CLS] token of their encoder.

    Nothing is downloaded, and no library but cenote's own is needed.
    """
    found = classified()
    model = DigitsClassifier(found.encoder, found.weight, found.bias).eval()
    images = found.images[:items, None].float() / 16
    return Pictures(model, images, PATCH, [str(n) for n in range(10)], found.ids[:items])


assert GRID * PATCH == IMAGE
