"""The whole estimator: the branch of the people, the branch of the image, and what joins their maps."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core import files
from cenote.core.errors import InputError
from cenote.pool.attention.joint_attention.field import Depth, mean_map
from cenote.pool.attention.joint_attention.fusion import FusionKind, JointAttentionFusion
from cenote.pool.attention.joint_attention.model import Aggregation, Attribute, Head, JointAttention
from cenote.pool.attention.joint_attention.pool import Mixing
from cenote.pool.attention.joint_attention.targets import best_point

FORMAT = 1
CARD, STATE = "joint-attention.json", "joint-attention.safetensors"


@dataclass(frozen=True)
class JointAttentionConfig:
    """What an estimator is built from; the defaults are the authors' for volleyball.

    Attributes:
        actions: number of action scores of a person.
        width, layers, heads, mixing: of the transformer, see `JointAttentionPool`.
        depth, aggregation, use, head, grid: see `JointAttention`.
        size: height and width of the maps.
        patches: width of a patch of the image's encoder; `None`: no image branch of its own, its map is given.
        crops: width of what the encoder of head crops gives for each person; `None`: the image branch sees the scene alone.
        fusion: how both maps are joined; see `JointAttentionFusion`.
        sigmoid: whether maps pass a sigmoid.
    """

    actions: int = 9
    width: int = 16
    layers: int = 3
    heads: int = 2
    mixing: Mixing = "attention"
    depth: Depth = "middle"
    aggregation: Aggregation = "token_only"
    use: tuple[Attribute, ...] = ("position", "gaze", "action")
    head: Head = "field"
    grid: tuple[int, int] = (8, 16)
    size: tuple[int, int] = (320, 640)
    patches: int | None = None
    crops: int | None = None
    fusion: FusionKind = "mid"
    sigmoid: bool = False


class Group(NamedTuple):
    """People in scenes, and what is seen of the scenes.

    Attributes:
        position: of each head, `(x / width, y / height)` in `[0, 1]`.
        gaze: unit vectors in the axes of the image.
        action: scores.
        mask: True on real people, `None`: all.
        scene: `[batch, channels, rows, columns]`, the patch map of any encoder of the image; where the estimator has no image
            branch, the map of another one, `[batch, 1, height, width]`; `None`: people alone.
        crops: `[batch, people, features]`, of each head by any encoder, for an image branch that reads them.
        target: `[batch, 2]`, the point that they look at together.
        targets: `[batch, people, 2]`, the point that each looks at.
    """

    position: Float[Tensor, "batch people 2"]
    gaze: Float[Tensor, "batch people 2"]
    action: Float[Tensor, "batch people actions"]
    mask: Bool[Tensor, "batch people"] | None = None
    scene: Float[Tensor, "batch channels rows columns"] | None = None
    crops: Float[Tensor, "batch people features"] | None = None
    target: Float[Tensor, "batch 2"] | None = None
    targets: Float[Tensor, "batch people 2"] | None = None

    def select(self, chosen: Tensor) -> Group:
        """These scenes."""
        return Group._make(None if t is None else t[chosen] for t in self)


class JointEstimate(NamedTuple):
    """What both branches say.

    Attributes:
        fused: `[batch, 1, height, width]`, of both; the people's map where there is no image.
        joint: `[batch, 1, height, width]`, of the people's branch.
        people: `[batch, people, height, width]`, where each looks.
        attention: `[batch, layers, people + 1, people + 1]`, mean over the heads; the joint token is the last.
        scene: `[batch, 1, height, width]`, of the image branch, or `None`.
    """

    fused: Float[Tensor, "batch 1 height width"]
    joint: Float[Tensor, "batch 1 height width"]
    people: Float[Tensor, "batch people height width"]
    attention: Float[Tensor, "batch layers people_and_joint people_and_joint"]
    scene: Float[Tensor, "batch 1 height width"] | None

    def point(self) -> Float[Tensor, "batch 2"]:
        """The best pixel `(x, y)` of each scene, in pixels."""
        height, width = self.fused.shape[-2:]
        found = best_point(self.fused[:, 0])
        return found * torch.tensor([width, height], dtype=found.dtype, device=found.device)

    def weights(self) -> Float[Tensor, "batch people"]:
        """What the joint token took from each person, the mean over the layers."""
        return self.attention[:, :, -1, :-1].mean(1)


class SceneBranch(nn.Module):
    """A map of what is looked at, from the patches of an image and, where they are given, the heads of the people.

    `m_p(r) = W_2 ReLU(W_1 [x_r ; c_p] + b_1) + b_2` at each patch `x_r`, for the head `c_p` of each person; the scene's map is
    their mean over the real people. Without heads there is one map.

    Args:
        patches: width of a patch.
        crops: width of what is known of a head; `None`: nothing.
        hidden: width inside.

    Example:
        >>> SceneBranch(32, 8)(torch.randn(2, 32, 4, 8), (16, 32), torch.randn(2, 5, 8)).shape
        torch.Size([2, 1, 16, 32])

    Note:
        The authors' branch is a gaze-following network (DAVT), trained before; this one stands in its place, with any encoders
        of patches and heads. The map of another network is fused as well.
    """

    def __init__(self, patches: int, crops: int | None = None, hidden: int = 32) -> None:
        super().__init__()
        self.patches = patches
        self.of_patch = nn.Conv2d(patches, hidden, 1)
        self.of_head = None if crops is None else nn.Linear(crops, hidden, bias=False)
        self.last = nn.Conv2d(hidden, 1, 1)

    def forward(
        self,
        scene: Float[Tensor, "batch channels rows columns"],
        size: tuple[int, int],
        crops: Float[Tensor, "batch people features"] | None = None,
        mask: Bool[Tensor, "batch people"] | None = None,
    ) -> Float[Tensor, "batch 1 height width"]:
        """The map of the scene at `size = (height, width)`."""
        if scene.shape[1] != self.patches:
            raise InputError(f"scene: expected patches of width {self.patches}, got {scene.shape[1]}")
        if (crops is None) != (self.of_head is None):
            wanted = "the heads of the people" if self.of_head is not None else "no heads"
            raise InputError(f"crops: this image branch was built for {wanted}")
        h = self.of_patch(scene)
        if self.of_head is None:
            small = self.last(torch.relu(h))
        else:
            by_person = h.unsqueeze(1) + self.of_head(crops)[..., None, None]
            maps = self.last(torch.relu(by_person).flatten(0, 1)).squeeze(1).unflatten(0, by_person.shape[:2])
            small = mean_map(maps, mask)
        return F.interpolate(small, size=size, mode="bilinear")


class JointAttentionEstimator(nn.Module):
    """Where a group looks together, from its people and from the image.

    Args:
        config: of both branches and of the fusion.

    Example:
        >>> estimator = JointAttentionEstimator(JointAttentionConfig(actions=2, size=(16, 32), patches=6))
        >>> group = Group(torch.rand(3, 5, 2), torch.randn(3, 5, 2), torch.rand(3, 5, 2), scene=torch.randn(3, 6, 4, 8))
        >>> found = estimator(group)
        >>> found.fused.shape, found.point().shape, found.weights().shape
        (torch.Size([3, 1, 16, 32]), torch.Size([3, 2]), torch.Size([3, 5]))

    Source: Nakatani, Kawashima, Ukita, "Interaction-aware Joint Attention Estimation Using People Attributes", ICCV 2023.
    """

    def __init__(self, config: JointAttentionConfig) -> None:
        super().__init__()
        self.config = config
        self.people = JointAttention(
            config.actions,
            config.width,
            config.layers,
            config.heads,
            depth=config.depth,
            aggregation=config.aggregation,
            use=config.use,
            sigmoid=config.sigmoid,
            mixing=config.mixing,
            head=config.head,
            grid=config.grid,
        )
        self.scene = None if config.patches is None else SceneBranch(config.patches, config.crops)
        self.fusion = JointAttentionFusion(config.fusion, config.sigmoid)

    def forward(self, group: Group) -> JointEstimate:
        """The maps of a batch of scenes.

        Raises:
            InputError: where the image's map is of another size, or heads are missing.
        """
        size = self.config.size
        maps = self.people(group.position, group.gaze, group.action, group.mask, size)
        scene = group.scene
        if scene is not None and self.scene is not None:
            scene = self.scene(scene, size, group.crops, group.mask)
            scene = scene.sigmoid() if self.config.sigmoid else scene
        fused = maps.joint if scene is None else self.fusion(maps.joint, scene)
        return JointEstimate(fused, maps.joint, maps.people, maps.attention, scene)

    def save(self, folder: str | Path) -> None:
        """Write config and parameters; `load` reads them."""
        folder = Path(folder)
        card = {"format": FORMAT, "config": asdict(self.config)}
        files.write_saved(folder / CARD, folder / STATE, card, self.state_dict())

    @classmethod
    def load(cls, folder: str | Path) -> JointAttentionEstimator:
        """Read what `save` wrote, in eval mode.

        Raises:
            InputError: naming the folder and what is wrong with it.
        """
        folder = Path(folder)
        try:
            remedy = "save the estimator again"
            card, state = files.read_saved(folder / CARD, folder / STATE, remedy, format=int, config=dict)
        except OSError as error:
            raise InputError(f"{folder}: holds no estimator of JointAttentionEstimator.save ({error})") from error
        files.require_format(folder, card, FORMAT)
        known = {field.name for field in fields(JointAttentionConfig)}
        if card["config"].keys() != known:
            raise InputError(f"{folder}: {CARD} is damaged; save the estimator again")
        config: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in card["config"].items()}
        estimator = cls(JointAttentionConfig(**config))
        try:
            estimator.load_state_dict(state)
        except RuntimeError as error:
            raise InputError(f"{folder}: {STATE} does not fit {CARD} ({error}); save the estimator again") from error
        return estimator.eval()


def drawn(
    image: Float[Tensor, "3 height width"],
    position: Float[Tensor, "people 2"],
    weights: Float[Tensor, "people"],
    point: Float[Tensor, "2"],
    mask: Bool[Tensor, "people"] | None = None,
) -> Float[Tensor, "3 height width"]:
    """The scene, on each person a red disc as large as what the joint token took from them, and a green cross at the point.

    Args:
        image: from 0 to 1.
        position: of each head, in `[0, 1]`.
        weights: of each person; the largest has a disc of a tenth of the height.
        point: in pixels, see `JointEstimate.point`.
        mask: True on real people.

    Example:
        >>> drawn(torch.zeros(3, 20, 40), torch.tensor([[0.5, 0.5]]), torch.tensor([0.4]), torch.tensor([4.0, 4.0]))[:, 10, 20]
        tensor([1., 0., 0.])
    """
    _, height, width = image.shape
    down, across = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    picture = image.clone()
    real = torch.ones_like(weights, dtype=torch.bool) if mask is None else mask
    largest = weights[real].max().clamp(min=1e-12) if bool(real.any()) else weights.new_ones(())
    for (x, y), weight in zip(position[real].tolist(), (weights[real] / largest).tolist(), strict=True):
        far = ((across - x * width) ** 2 + (down - y * height) ** 2).sqrt()
        picture[:, far <= weight * height / 10] = torch.tensor([[1.0], [0.0], [0.0]], dtype=image.dtype)
    x, y = point.tolist()
    arm = max(2, height // 20)
    upright = ((across - x).abs() <= 0.5) & ((down - y).abs() <= arm)
    level = ((down - y).abs() <= 0.5) & ((across - x).abs() <= arm)
    picture[:, upright | level] = torch.tensor([[0.0], [1.0], [0.0]], dtype=image.dtype)
    return picture
