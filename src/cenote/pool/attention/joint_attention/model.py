from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_one_of
from cenote.pool.attention.joint_attention.field import Depth, FieldHead, mean_map
from cenote.pool.attention.joint_attention.heads import MapHead, equally_large
from cenote.pool.attention.joint_attention.pool import Embedding, Encoded, JointAttentionPool, Mixing

Aggregation = Literal["token_only", "ind_only", "ind_and_token_ind_based", "token_only_concat"]
Attribute = Literal["position", "gaze", "action"]
Head = Literal["field", "fc", "deconv"]


class JointMaps(NamedTuple):
    """What a group looks at.

    Attributes:
        joint: `[batch, 1, height, width]`, where all look together.
        people: `[batch, people, height, width]`, where each looks; zeros for padded people.
        attention: `[batch, layers, people + 1, people + 1]`, mean over the heads; the joint token is the last.
    """

    joint: Float[Tensor, "batch 1 height width"]
    people: Float[Tensor, "batch people height width"]
    attention: Float[Tensor, "batch layers people_and_joint people_and_joint"]


class JointAttention(nn.Module):
    """Where a group of people looks together, from who stands where, looks whither and does what.

    Each person is a token `[x, y, gaze x, gaze y, action scores]`; `JointAttentionPool` adds a joint token; `FieldHead`, one
    and the same for all tokens, paints its map, and one per person.

    Args:
        actions: number of action scores.
        width, layers, heads, embedding, mixing: see `JointAttentionPool`.
        depth: see `FieldHead`.
        aggregation: what becomes the joint map: `"token_only"`, that of the joint token; `"ind_only"`, the mean of the maps
            of the people; `"ind_and_token_ind_based"`, the same with the joint token added to each of theirs;
            `"token_only_concat"`, painted from all tokens side by side, which fixes the number of people.
        use: which attributes are read.
        people: number of people of `"token_only_concat"`.
        sigmoid: whether maps pass a sigmoid, for training with binary cross-entropy.
        mixing: see `JointAttentionPool`.
        head: `"field"`, or the small map at once that it is compared with: `"fc"`, `"deconv"`, see `MapHead`; of these the one
            that has as many parameters as the field.
        grid: of such a small map.

    Raises:
        InputError: where settings do not fit or inputs have another shape.

    Example:
        >>> model = JointAttention(actions=2)
        >>> position, gaze, action = torch.rand(3, 6, 2), torch.randn(3, 6, 2), torch.rand(3, 6, 2)
        >>> maps = model(position, gaze, action, size=(16, 32))
        >>> maps.joint.shape, maps.people.shape, maps.attention.shape
        (torch.Size([3, 1, 16, 32]), torch.Size([3, 6, 16, 32]), torch.Size([3, 3, 7, 7]))

    Source: Nakatani, Kawashima, Ukita, "Interaction-aware Joint Attention Estimation Using People Attributes", ICCV 2023.
    There: maps of 320 x 640, Adam at 1e-3, first this branch alone, then with images and `JointAttentionFusion`.

    Note:
        Their code takes a person whose numbers sum to zero for padding; here the mask says it. The head of
        `"token_only_concat"` reads zeros for padded people.
    """

    def __init__(
        self,
        actions: int = 9,
        width: int = 16,
        layers: int = 3,
        heads: int | None = None,
        embedding: Embedding = "mlp",
        depth: Depth = "middle",
        aggregation: Aggregation = "token_only",
        use: tuple[Attribute, ...] = ("position", "gaze", "action"),
        people: int = 12,
        sigmoid: bool = False,
        mixing: Mixing = "attention",
        head: Head = "field",
        grid: tuple[int, int] = (8, 16),
    ) -> None:
        super().__init__()
        require_one_of(get_args(Head), head=head)
        require_one_of(get_args(Aggregation), aggregation=aggregation)
        if not use or not set(use) <= set(get_args(Attribute)):
            raise InputError(f"use: expected some of {', '.join(get_args(Attribute))}, got {use}")
        if actions < 0 or (actions == 0 and use == ("action",)):
            raise InputError(f"actions: expected how many action scores a person has, got {actions}")
        self.actions = actions
        self.use = tuple(name for name in get_args(Attribute) if name in use)
        self.aggregation = aggregation
        self.count = people
        self.sigmoid = sigmoid
        sizes = {"position": 2, "gaze": 2, "action": actions}
        read = sum(sizes[name] for name in self.use)
        self.group = JointAttentionPool(read, width, layers, heads, embedding, mixing)
        joined = aggregation == "token_only_concat"
        self.field = _head(head, FieldHead(width, depth=depth), width, grid)
        whole = (people + 1) * width
        self.joined_field = _head(head, FieldHead(whole, width, depth), whole, grid) if joined else None

    def forward(
        self,
        position: Float[Tensor, "batch people 2"],
        gaze: Float[Tensor, "batch people 2"],
        action: Float[Tensor, "batch people actions"],
        mask: Bool[Tensor, "batch people"] | None = None,
        size: tuple[int, int] = (320, 640),
    ) -> JointMaps:
        """The maps of a batch of groups.

        Args:
            position: of each head, `(x / width, y / height)` in `[0, 1]`.
            gaze: unit vectors in the axes of the image.
            action: scores, one-hot or soft.
            mask: True on real people.
            size: height and width of the maps.
        """
        given = {"position": (position, 2), "gaze": (gaze, 2), "action": (action, self.actions)}
        for name, (value, wanted) in given.items():
            if value.shape != (*position.shape[:2], wanted):
                raise InputError(f"{name}: expected [batch, people, {wanted}], got shape {tuple(value.shape)}")
        x = torch.cat([given[name][0] for name in self.use], -1)
        encoded = self.group.encode(x, mask)
        return self.paint(encoded, mask, size)

    def paint(self, encoded: Encoded, mask: Bool[Tensor, "batch people"] | None, size: tuple[int, int]) -> JointMaps:
        """The maps of groups that are encoded already, at any resolution."""
        maps = self._painted(self.field, encoded.people, size)
        if mask is not None:
            maps = maps.masked_fill(~mask[..., None, None], 0)
        own = self.aggregation == "ind_only"
        joint = mean_map(maps, mask) if own else self.paint_joint(encoded, mask, size)
        return JointMaps(joint, maps, encoded.attention.mean(2))

    def paint_joint(
        self, encoded: Encoded, mask: Bool[Tensor, "batch people"] | None, size: tuple[int, int]
    ) -> Float[Tensor, "batch 1 height width"]:
        """The joint map alone: with `"token_only"`, one vector is painted instead of one per person."""
        joint, people, _ = encoded
        if self.aggregation == "token_only":
            return self._painted(self.field, joint.unsqueeze(1), size)
        if self.aggregation == "ind_only":
            return mean_map(self._painted(self.field, people, size), mask)
        if self.aggregation == "ind_and_token_ind_based":
            return mean_map(self._painted(self.field, people + joint.unsqueeze(1), size), mask)
        return self._painted_together(encoded, size)

    def _painted_together(self, encoded: Encoded, size: tuple[int, int]) -> Float[Tensor, "batch 1 height width"]:
        assert self.joined_field is not None
        if encoded.people.shape[1] != self.count:
            raise InputError(
                f"position: this model was built for {self.count} people, got {encoded.people.shape[1]}; "
                f"pad to that number or build it with people={encoded.people.shape[1]}"
            )
        tokens = torch.cat([encoded.people, encoded.joint.unsqueeze(1)], 1)
        return self._painted(self.joined_field, tokens.flatten(1).unsqueeze(1), size)

    def _painted(
        self, field: nn.Module, z: Float[Tensor, "batch vectors dim"], size: tuple[int, int]
    ) -> Float[Tensor, "batch vectors height width"]:
        maps = field(z, size)
        return maps.sigmoid() if self.sigmoid else maps


def _head(kind: Head, field: FieldHead, dim: int, grid: tuple[int, int]) -> nn.Module:
    if kind == "field":
        return field
    count = sum(p.numel() for p in field.parameters())
    return equally_large(lambda hidden: MapHead(dim, grid, kind, hidden), count)
