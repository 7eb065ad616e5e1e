from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least
from cenote.core.widths import require_divides


class AamSoftmax(nn.Module):
    """Softmax over scaled cosines, the angle to the right class widened by a margin.

    Per head, `cos_c = x/|x| . w_c/|w_c|`; for the right class `cos(theta + m)` where `cos > cos(pi - m)`, else
    `cos - m sin(pi - m)`; the loss is the cross-entropy of `scale` times these, averaged over heads.

    Args:
        dim: width of the embedding.
        classes: number of speakers.
        heads: each owns a slice of the embedding; divides `dim`.
        margin: `m`, an angle.
        scale: of the cosines.

    Raises:
        InputError: where an argument is out of range, or a label is none of the classes.

    Example:
        >>> loss = AamSoftmax(8, classes=3)
        >>> loss(torch.randn(4, 8), torch.tensor([0, 1, 2, 0])).shape
        torch.Size([])

    Source: Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", CVPR 2019; with heads, as in the
    code of "Layer-aware TDNN", ICAIIC 2026.

    Note:
        The angle's sine is kept above 1e-6, so that an embedding right on its class has a finite gradient.
    """

    def __init__(self, dim: int, classes: int, heads: int = 1, margin: float = 0.2, scale: float = 30.0) -> None:
        super().__init__()
        require_divides("heads", heads, dim)
        require_at_least(1, classes=classes)
        if not 0 <= margin < math.pi:
            raise InputError(f"margin: expected an angle from 0 to pi, got {margin}")
        self.margin = margin
        self.scale = scale
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(heads, dim // heads, classes)))

    def forward(self, x: Float[Tensor, "batch dim"], labels: Int[Tensor, "batch"]) -> Float[Tensor, ""]:
        """The loss of the batch."""
        heads, _, classes = self.weight.shape
        if labels.shape != x.shape[:1]:
            raise InputError(f"labels: expected one for each of {len(x)} embeddings, got shape {tuple(labels.shape)}")
        if bool((labels < 0).any()) or bool((labels >= classes).any()):
            raise InputError(f"labels: expected numbers from 0 to {classes - 1}, got {labels.tolist()[:10]}")
        logits = self.scale * self.with_margin(self.cosines(x), labels)
        return F.cross_entropy(logits.flatten(0, 1), labels.repeat_interleave(heads))

    def cosines(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch heads classes"]:
        """Cosine of each head's slice to each class."""
        heads = F.normalize(x.unflatten(-1, (self.weight.shape[0], -1)), dim=-1)
        return torch.einsum("bhd,hdc->bhc", heads, F.normalize(self.weight, dim=1))

    def with_margin(
        self, cosines: Float[Tensor, "batch heads classes"], labels: Int[Tensor, "batch"]
    ) -> Float[Tensor, "batch heads classes"]:
        """The cosines, those of the right class lowered by the margin."""
        right = F.one_hot(labels, cosines.shape[-1]).bool().unsqueeze(1)
        m = self.margin
        sines = (1 - cosines.square()).clamp(min=1e-12).sqrt()
        widened = cosines * math.cos(m) - sines * math.sin(m)
        lowered = cosines - math.sin(math.pi - m) * m
        return torch.where(right, torch.where(cosines > math.cos(math.pi - m), widened, lowered), cosines)

    def probabilities(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch classes"]:
        """Posteriors without a margin, averaged over heads."""
        return (self.scale * self.cosines(x)).softmax(-1).mean(1)
