"""A segmenter that takes clicks: convolutions, then attention along rows and columns in which clicks are known values.

The layout follows what is known of the published one; its details were not published to us.

Source: Gabbur, Bilkhu and Movellan, "Probabilistic Attention for Interactive Segmentation" (2021), arXiv 2106.15338.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.requirements import require_at_least
from cenote.mix.probabilistic_attention.layer import ProbabilisticAttention
from cenote.mix.trained import trained


class Click(NamedTuple):
    """Where somebody said that a pixel belongs to the object, or does not."""

    row: int
    column: int
    positive: bool


class AxialProbabilisticAttention(nn.Module):
    """Probabilistic attention along one axis of a map, every row (or column) for itself, added to the map.

    Precisions of the likelihoods and of the priors are learned, one for each head; what a click says of a cell's value is a
    learned vector of each label.

    Args:
        dim: channels.
        heads: divides `dim`.
        columns: along columns in place of rows.
        key_steps, value_steps: how often keys adapt, and values.
    """

    def __init__(
        self, dim: int, heads: int = 4, columns: bool = False, key_steps: int = 1, value_steps: int = 1
    ) -> None:
        super().__init__()
        require_at_least(1, dim=dim, heads=heads)
        if dim % heads:
            raise InputError(f"heads: {heads} does not divide dim={dim}")
        self.heads, self.columns = heads, columns
        self.norm = nn.GroupNorm(1, dim)
        self.projections = nn.Conv2d(dim, 3 * dim, 1)
        self.output = nn.Conv2d(dim, dim, 1)
        self.attention = ProbabilisticAttention(key_steps=key_steps, value_steps=value_steps)
        self.log_alpha = nn.Parameter(torch.full((heads,), (dim // heads) ** -0.5).log())
        self.log_beta = nn.Parameter(torch.zeros(heads))
        self.log_key_prior = nn.Parameter(torch.zeros(heads))
        self.log_value_prior = nn.Parameter(torch.zeros(heads))
        self.labels = nn.Parameter(torch.randn(2, heads, dim // heads))

    def forward(
        self, x: Float[Tensor, "batch dim rows columns"], clicks: Float[Tensor, "batch 1 rows columns"]
    ) -> Float[Tensor, "batch dim rows columns"]:
        """The map, with clicks: 1 and -1 where a cell was said to be of the object or not, 0 elsewhere."""
        batch = len(x)
        lines, told = self._lines(self.projections(self.norm(x))), self._lines(clicks)
        q, keys, values = (t.unflatten(1, (self.heads, -1)) for t in lines.chunk(3, 1))
        length = q.shape[-1]
        is_told = (told != 0).to(x.dtype).unsqueeze(1).expand(-1, self.heads, -1, -1)
        of_label = torch.where((told > 0).unsqueeze(1), self.labels[1].unsqueeze(-1), self.labels[0].unsqueeze(-1))
        alpha, beta = (p.exp().view(1, -1, 1).expand(len(q), -1, length) for p in (self.log_alpha, self.log_beta))
        y = self.attention(
            q,
            keys,
            values,
            alpha,
            beta,
            v_fixed=torch.cat([of_label * is_told, is_told], 2),
            key_precision=self.log_key_prior.exp().view(1, -1, 1, 1),
            value_precision=self.log_value_prior.exp().view(1, -1, 1, 1),
        ).flatten(1, 2)
        found = y.unflatten(0, (batch, -1)).transpose(1, 2)
        return x + self.output(found.mT if self.columns else found)

    def _lines(self, x: Float[Tensor, "batch channels rows columns"]) -> Float[Tensor, "lines channels length"]:
        x = x.mT if self.columns else x
        return x.transpose(1, 2).flatten(0, 1)


class ClickSegmenter(nn.Module):
    """An image and clicks to the logits of a mask.

    A convolutional trunk shrinks the image four times; rounds of attention along rows, then columns, take the clicks; a decoder
    brings the map back to the image's size, with the trunk's first map beside it.

    Args:
        channels: of the images.
        dim: of the map that is attended to.
        heads, key_steps, value_steps: of the attention, see `AxialProbabilisticAttention`.
        rounds: of attention along rows and columns.

    Example:
        >>> model = ClickSegmenter(channels=1, dim=8, heads=2).eval()
        >>> model(torch.rand(1, 1, 16, 16)).shape
        torch.Size([1, 1, 16, 16])

    Source: Gabbur et al. (2021), arXiv 2106.15338.
    """

    def __init__(
        self,
        channels: int = 3,
        dim: int = 32,
        heads: int = 4,
        rounds: int = 1,
        key_steps: int = 1,
        value_steps: int = 1,
    ) -> None:
        super().__init__()
        require_at_least(1, channels=channels, dim=dim, rounds=rounds)
        self.first = nn.Sequential(nn.Conv2d(channels, dim, 3, 2, 1), nn.GroupNorm(1, dim), nn.ReLU())
        self.second = nn.Sequential(
            nn.Conv2d(dim, dim, 3, 2, 1), nn.GroupNorm(1, dim), nn.ReLU(), nn.Conv2d(dim, dim, 3, 1, 1), nn.ReLU()
        )
        self.attention = nn.ModuleList(
            AxialProbabilisticAttention(dim, heads, columns, key_steps, value_steps)
            for _ in range(rounds)
            for columns in (False, True)
        )
        self.decoder = nn.Sequential(nn.Conv2d(2 * dim, dim, 3, 1, 1), nn.ReLU(), nn.Conv2d(dim, 1, 1))

    def forward(
        self,
        images: Float[Tensor, "batch channels height width"],
        clicks: Float[Tensor, "batch 1 height width"] | None = None,
    ) -> Float[Tensor, "batch 1 height width"]:
        """Logits of the mask.

        Args:
            images: of sides that are multiples of 4.
            clicks: 1 where a pixel was said to be of the object, -1 where not, 0 elsewhere; None for no clicks.
        """
        return self.decode(*self.features(images), clicks)

    def features(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> tuple[Float[Tensor, "batch dim half_height half_width"], Float[Tensor, "batch dim rows columns"]]:
        """What does not hang on clicks: the trunk's two maps.

        Raises:
            InputError: for sides that are no multiples of 4.
        """
        if images.shape[-1] % 4 or images.shape[-2] % 4:
            raise InputError(f"images: expected sides that are multiples of 4, got {list(images.shape[-2:])}")
        half = self.first(images)
        return half, self.second(half)

    def decode(
        self,
        half: Float[Tensor, "batch dim half_height half_width"],
        deep: Float[Tensor, "batch dim rows columns"],
        clicks: Float[Tensor, "batch 1 height width"] | None = None,
    ) -> Float[Tensor, "batch 1 height width"]:
        """The last layers, with clicks."""
        told = deep.new_zeros(len(deep), 1, *deep.shape[-2:])
        if clicks is not None:
            # where both were said of a cell they cancel
            told = (F.max_pool2d(clicks, 4) - F.max_pool2d(-clicks, 4)).sign()
        for attention in self.attention:
            deep = attention(deep, told)
        wide = F.interpolate(deep, scale_factor=2, mode="bilinear", align_corners=False)
        logits = self.decoder(torch.cat([wide, half], 1))
        return F.interpolate(logits, scale_factor=2, mode="bilinear", align_corners=False)


class ClickSession:
    """One image, and clicks one after the other; only the last layers run again, without gradients.

    Args:
        model: in eval mode.
        image: one.

    Example:
        >>> session = ClickSession(ClickSegmenter(channels=1, dim=8, heads=2).eval(), torch.rand(1, 16, 16))
        >>> session.click(8, 8, positive=True).shape, len(session.clicks), session.undo().shape, len(session.clicks)
        (torch.Size([16, 16]), 1, torch.Size([16, 16]), 0)
    """

    def __init__(self, model: ClickSegmenter, image: Float[Tensor, "channels height width"]) -> None:
        self.model, self.clicks = model, []
        self._size = image.shape[-2:]
        with torch.no_grad():
            self._features = model.features(image.unsqueeze(0))
        self.mask = self._segmented()

    clicks: list[Click]

    def click(self, row: int, column: int, positive: bool) -> Bool[Tensor, "height width"]:
        """The mask with one click more.

        Raises:
            InputError: outside of the image.
        """
        if not (0 <= row < self._size[0] and 0 <= column < self._size[1]):
            raise InputError(f"row, column: expected a pixel of {list(self._size)}, got {row}, {column}")
        self.clicks.append(Click(row, column, positive))
        self.mask = self._segmented()
        return self.mask

    def undo(self) -> Bool[Tensor, "height width"]:
        """The mask without the last click.

        Raises:
            InputError: where there is none.
        """
        if not self.clicks:
            raise InputError("undo: there is no click")
        self.clicks.pop()
        self.mask = self._segmented()
        return self.mask

    def simulate(self, truth: Bool[Tensor, "height width"], count: int) -> list[float]:
        """Intersection over union with the truth, before and after each of so many clicks, see `next_click`."""
        found = [iou(self.mask, truth)]
        for _ in range(count):
            wrong = next_click(self.mask, truth)
            if wrong is not None:
                self.click(*wrong)
            found.append(iou(self.mask, truth))
        return found

    def _segmented(self) -> Bool[Tensor, "height width"]:
        half, deep = self._features
        with torch.no_grad():
            return self.model.decode(half, deep, click_map([self.clicks], self._size).to(deep))[0, 0] > 0


def click_map(clicks: list[list[Click]], size: tuple[int, int] | torch.Size) -> Float[Tensor, "batch 1 height width"]:
    """1 and -1 where somebody clicked, of each image; later clicks of a pixel count."""
    found = torch.zeros(len(clicks), 1, *size)
    for i, of_image in enumerate(clicks):
        for row, column, positive in of_image:
            found[i, 0, row, column] = 1.0 if positive else -1.0
    return found


def next_click(mask: Bool[Tensor, "height width"], truth: Bool[Tensor, "height width"]) -> Click | None:
    """The pixel of the largest wrong region that is farthest from its border; None where nothing is wrong."""
    from scipy import ndimage

    wrong = (mask != truth).cpu().numpy()
    if not wrong.any():
        return None
    best: tuple[int, np.ndarray] | None = None
    for kind in (truth.cpu().numpy(), ~truth.cpu().numpy()):
        regions, count = ndimage.label(wrong & kind)
        for i in range(1, count + 1):
            region = regions == i
            if best is None or region.sum() > best[0]:
                best = int(region.sum()), region
    assert best is not None
    depth = ndimage.distance_transform_edt(np.pad(best[1], 1))[1:-1, 1:-1]
    row, column = np.unravel_index(int(depth.argmax()), depth.shape)
    return Click(int(row), int(column), bool(truth[row, column]))


def train_clicks(
    model: ClickSegmenter,
    images: Float[Tensor, "items channels height width"],
    masks: Bool[Tensor, "items height width"],
    steps: int,
    batch: int = 8,
    most: int = 4,
    lr: float = 1e-3,
    random_state: int = 0,
) -> list[float]:
    """Adam on the mask's cross-entropy behind 0 to `most` simulated clicks, each placed by what the model then says.

    Steps of EM are unrolled: gradients reach the precisions.

    Returns:
        The loss of every step.
    """
    require_at_least(1, steps=steps, batch=batch)
    generator = torch.Generator().manual_seed(random_state)

    def loss(_: int) -> Float[Tensor, ""]:
        chosen = torch.randint(0, len(images), (batch,), generator=generator)
        clicks: list[list[Click]] = [[] for _ in range(batch)]
        for _ in range(int(torch.randint(0, most + 1, (1,), generator=generator))):
            with torch.no_grad():
                said = model(images[chosen], click_map(clicks, images.shape[-2:]).to(images))[:, 0] > 0
            for held, mask, truth in zip(clicks, said, masks[chosen], strict=True):
                if (click := next_click(mask, truth)) is not None:
                    held.append(click)
        logits = model(images[chosen], click_map(clicks, images.shape[-2:]).to(images))
        return F.binary_cross_entropy_with_logits(logits[:, 0], masks[chosen].to(logits))

    return trained(model, loss, torch.optim.Adam(model.parameters(), lr), steps)


def iou(mask: Bool[Tensor, "height width"], truth: Bool[Tensor, "height width"]) -> float:
    """Intersection over union; 1 where both are empty."""
    union = int((mask | truth).sum())
    return int((mask & truth).sum()) / union if union else 1.0


def iou_by_click(
    model: ClickSegmenter,
    images: Float[Tensor, "items channels height width"],
    masks: Bool[Tensor, "items height width"],
    clicks: int = 5,
) -> Float[Tensor, "items clicks_and_none"]:
    """Of each image before and after each simulated click; the mean over images is the mIoU against the number of clicks."""
    found = [ClickSession(model, image).simulate(truth, clicks) for image, truth in zip(images, masks, strict=True)]
    return torch.tensor(found)


def clicks_needed(ious: Float[Tensor, "items clicks_and_none"], level: float = 0.85) -> Float[Tensor, "items"]:
    """How many clicks first reach an intersection over union; infinite where none does.

    >>> clicks_needed(torch.tensor([[0.2, 0.9, 0.8], [0.1, 0.2, 0.3]])).tolist()
    [1.0, inf]
    """
    reached = ious >= level
    first = reached.to(torch.uint8).argmax(1).to(ious.dtype)
    return first.masked_fill(~reached.any(1), torch.inf)


def unlabelled_accuracy(
    output: Float[Tensor, "items groups classes tokens"],
    labels: Tensor,
    known: Bool[Tensor, "items tokens"],
) -> Float[Tensor, "items"]:
    """Share of right classes among the tokens that nobody labelled; NaN where all are.

    Args:
        output: of attention whose values are classes; groups are summed.
        labels: the truth, `[items, tokens]`.
        known: the tokens that were told.
    """
    right = (output.sum(1).argmax(1) == labels) & ~known
    return right.sum(-1) / (~known).sum(-1)


def pasted(
    values: Float[Tensor, "items groups value_width tokens"], v_fixed: Float[Tensor, "items groups told tokens"]
) -> Float[Tensor, "items groups value_width tokens"]:
    """Known values in place of those that were given: the control of propagation, attended to once."""
    return torch.where(v_fixed[:, :, -1:] > 0, v_fixed[:, :, :-1], values)
