from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_positive
from cenote.pool.attention.slotcon.grouping import Grouped, SemanticGrouping
from cenote.pool.attention.slotcon.views import View, inverse_augment


class SlotConLosses(NamedTuple):
    """One step's losses, and how many prototypes were the best of some place of some image."""

    total: Float[Tensor, ""]
    group: Float[Tensor, ""]
    slot: Float[Tensor, ""]
    active: Int[Tensor, ""]


class SlotCon(nn.Module):
    """Learn to group the pixels of unlabelled images: alike in two crops, and into slots that tell images apart.

    Group loss, at each place that both crops show, with the student's cosines `s` in one view, the teacher's `t` in the other:
    `- sum_k softmax((t - center) / teacher_temp)_k log softmax(s / student_temp)_k`.
    Slot loss, over the slots that are active in both views of an image, against all that are active in the teacher's view:
    `2 tau CE(cos(predictor(slot), slot') / tau)`, the slot of the same image and prototype being the right one. A prototype is
    active where it is the best of some place. Both are symmetrised over the views:
    `L = w (g_12 + g_21) + (1 - w) (l_12 + l_21)`.

    Args:
        encoder: images to feature maps, without pooling.
        features: channels of its maps.
        slots: number of prototypes.
        dim: width of a slot.
        hidden: width inside projector and predictor.
        student_temp, teacher_temp: temperatures of the group loss; the teacher's also of the grouping, for both.
        momentum: of the teacher at the start; rises to 1 along a cosine.
        center_momentum: of the mean teacher cosine that is subtracted, so that no prototype takes all.
        group_loss_weight: `w`.
        tau: temperature of the slot loss.

    Raises:
        InputError: where a share does not lie between 0 and 1.

    Example:
        >>> from cenote.pool.attention.slotcon.views import TwoCrops
        >>> encoder = torch.nn.Conv2d(3, 16, 3, stride=2, padding=1)
        >>> model = SlotCon(encoder, features=16, slots=5, dim=8, hidden=16)
        >>> losses = model(*TwoCrops(16)(torch.rand(4, 3, 24, 24)))
        >>> losses.total.backward()
        >>> model.segment(torch.rand(2, 3, 24, 24)).shape  # which group each place belongs to
        torch.Size([2, 12, 12])

    Source: Wen et al., "Self-Supervised Visual Representation Learning with Semantic Grouping", NeurIPS 2022. There: ResNet-50,
    LARS at 1.0 per 256 images, batch 512, weight decay 1e-5, 800 epochs on COCO.

    Note:
        Where no slot is active in both views the slot loss is 0 (their code gives NaN), and likewise with a single one, of
        which the predictor's BatchNorm has no variance.
    """

    center: Float[Tensor, "1 slots"]

    def __init__(
        self,
        encoder: nn.Module,
        features: int,
        slots: int = 256,
        dim: int = 256,
        hidden: int = 4096,
        student_temp: float = 0.1,
        teacher_temp: float = 0.07,
        momentum: float = 0.99,
        center_momentum: float = 0.9,
        group_loss_weight: float = 0.5,
        tau: float = 0.2,
    ) -> None:
        super().__init__()
        shares = {"momentum": momentum, "center_momentum": center_momentum, "group_loss_weight": group_loss_weight}
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise InputError(f"{name}: expected a number between 0 and 1, got {share}")
        require_positive(student_temp=student_temp, tau=tau)
        self.student_temp = student_temp
        self.teacher_temp = teacher_temp
        self.momentum = momentum
        self.center_momentum = center_momentum
        self.group_loss_weight = group_loss_weight
        self.tau = tau
        self.encoder = encoder
        self.projector = _head(features, hidden, dim, maps=True)
        self.grouping = SemanticGrouping(dim, slots, teacher_temp)
        self.predictor = _head(dim, hidden, dim, maps=False)
        self.teacher = nn.ModuleList(copy.deepcopy(m) for m in (self.encoder, self.projector, self.grouping))
        self.teacher.requires_grad_(False)
        self.register_buffer("center", torch.zeros(1, slots))

    def forward(self, first: View, second: View) -> SlotConLosses:
        """The losses of two views of each image; while training, the center follows the teacher."""
        views = (first, second)
        students = [self.grouping.group(self.projector(self.encoder(v.x))) for v in views]
        with torch.no_grad():
            teachers = [self.teach(v.x) for v in views]
        aligned = [inverse_augment(s.dots, v.box, v.flip) for s, v in zip(students, views, strict=True)]
        taught = [inverse_augment(t.dots, v.box, v.flip) for t, v in zip(teachers, views, strict=True)]
        group = self.group_loss(aligned[0], taught[1]) + self.group_loss(aligned[1], taught[0])
        if self.training:
            self.update_center(torch.cat([t.dots for t in teachers]))
        slot = self.slot_loss(students[0], teachers[1]) + self.slot_loss(students[1], teachers[0])
        w = self.group_loss_weight
        active = torch.cat([active_slots(t.dots) for t in teachers]).any(0).sum()
        return SlotConLosses(w * group + (1 - w) * slot, group.detach(), slot.detach(), active)

    @torch.no_grad()
    def update_teacher(self, share: float) -> None:
        """Let the teacher follow the student, `share` of the training being done; before each step's forward."""
        m = 1 - (1 - self.momentum) * (math.cos(math.pi * share) + 1) / 2
        for ours, theirs in self._pairs():
            theirs.lerp_(ours, 1 - m)

    @torch.no_grad()
    def update_center(self, dots: Float[Tensor, "batch slots height width"]) -> None:
        """`center <- 0.9 center + 0.1 mean`, over batch, places and processes."""
        mean = dots.mean((0, 2, 3)).unsqueeze(0)
        if _processes() > 1:
            dist.all_reduce(mean)
            mean = mean / _processes()
        self.center.lerp_(mean.to(self.center.dtype), 1 - self.center_momentum)

    def group_loss(
        self,
        student: Float[Tensor, "batch slots height width"],
        teacher: Float[Tensor, "batch slots height width"],
    ) -> Float[Tensor, ""]:
        """Cross-entropy of the student's assignment against the teacher's, mean over the places."""
        target = ((teacher - self.center[..., None, None].to(teacher.dtype)) / self.teacher_temp).softmax(1)
        return -(target * (student / self.student_temp).log_softmax(1)).sum(1).mean()

    def slot_loss(self, student: Grouped, teacher: Grouped) -> Float[Tensor, ""]:
        """Contrast the student's slots of one view with the teacher's of the other."""
        keys = F.normalize(teacher.slots.flatten(0, 1), dim=-1)
        shown = active_slots(teacher.dots).flatten()
        own = (active_slots(student.dots).flatten() & shown).nonzero().squeeze(1)
        keys, shown, offset = _gathered(keys), _gathered(shown), len(shown) * _rank()
        if len(own) < (2 if self.predictor.training else 1):
            return student.slots.sum() * 0
        queries = F.normalize(self.predictor(student.slots.flatten(0, 1)[own]), dim=-1)
        right = shown.long().cumsum(0)[own + offset] - 1
        return 2 * self.tau * F.cross_entropy(queries @ keys[shown].T / self.tau, right)

    @torch.no_grad()
    def segment(self, images: Float[Tensor, "batch channels height width"]) -> Int[Tensor, "batch rows columns"]:
        """The teacher's group of each place of the feature maps."""
        return self.teach(images).dots.argmax(1)

    def teach(self, x: Float[Tensor, "batch channels height width"]) -> Grouped:
        """The teacher's slots and cosines, what one uses after training."""
        encoder, projector, grouping = self.teacher
        assert isinstance(grouping, SemanticGrouping)
        return grouping.group(projector(encoder(x)))

    def _pairs(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        for ours, theirs in zip((self.encoder, self.projector, self.grouping), self.teacher, strict=True):
            yield from zip(ours.parameters(), theirs.parameters(), strict=True)


def active_slots(dots: Float[Tensor, "batch slots height width"]) -> Bool[Tensor, "batch slots"]:
    """Which prototypes are the best of at least one place.

    >>> active_slots(torch.tensor([[0.1, 0.9], [0.5, 0.2], [0.3, 0.3]]).view(1, 3, 1, 2)).tolist()
    [[True, True, False]]
    """
    best = dots.flatten(2).argmax(1)
    return torch.zeros(dots.shape[:2], dtype=torch.bool, device=dots.device).scatter(1, best, True)


def _head(dim: int, hidden: int, out_dim: int, maps: bool) -> nn.Sequential:
    """Three layers with BatchNorm and GELU between them, on vectors or at every place of maps."""

    def layer(width: int, to: int) -> nn.Module:
        linear = nn.Conv2d(width, to, 1) if maps else nn.Linear(width, to)
        nn.init.trunc_normal_(linear.weight, std=0.02)
        assert linear.bias is not None
        nn.init.zeros_(linear.bias)
        return linear

    norm = nn.BatchNorm2d if maps else nn.BatchNorm1d
    return nn.Sequential(
        layer(dim, hidden),
        norm(hidden),
        nn.GELU(),
        layer(hidden, hidden),
        norm(hidden),
        nn.GELU(),
        layer(hidden, out_dim),
    )


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if _processes() > 1 else 0


def _gathered(rows: Tensor) -> Tensor:
    """The rows of all processes, in the order of their ranks; without gradients."""
    if _processes() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(_processes())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)
