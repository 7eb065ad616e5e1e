from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core.requirements import require_at_least, require_one_of
from cenote.core.segments import accumulation_dtype
from cenote.core.sets import PaddedTokens, as_tokens
from cenote.core.widths import largest_divisor, require_divides
from cenote.pool.base import PaddedPool, Pooled

Embedding = Literal["mlp", "linear"]
Mixing = Literal["attention", "uniform", "none"]


class Encoded(NamedTuple):
    """A group after the transformer.

    Attributes:
        joint: `[batch, width]`, the joint token.
        people: `[batch, people, width]`.
        attention: `[batch, layers, heads, people + 1, people + 1]`, who looked at whom; the joint token is the last.
    """

    joint: Float[Tensor, "batch width"]
    people: Float[Tensor, "batch people width"]
    attention: Float[Tensor, "batch layers heads people_and_joint people_and_joint"]


class JointAttentionPool(PaddedPool):
    """A small transformer over the members of a group and one learned token more, which becomes the output.

    `z = [MLP(x_1); ...; MLP(x_P); j]`; each layer `y = MHA(z) + z`, `z = LN(y + W_2 ReLU(W_1 y + b_1) + b_2)`, with one
    LayerNorm shared by all layers; the output is the last token. The weights are those of the joint token in the last layer,
    which sum to less than 1: it also attends to itself.

    Args:
        dim: numbers that describe one member.
        width: inside, and of the output.
        layers: of the transformer.
        heads: divides `width`. Default 2, or 1.
        embedding: `"mlp"`: three linear layers with ReLU between them; `"linear"`: one.
        mixing: `"attention"`, or what it is compared with: `"uniform"`, the same layers in which everyone attends alike to all;
            `"none"`, no layers: the joint token becomes the mean of the embedded members.

    Raises:
        InputError: where sizes do not fit.

    Example:
        >>> pool = JointAttentionPool(13)
        >>> output, weights = pool.attend(torch.randn(2, 6, 13))
        >>> output.shape, weights.shape
        (torch.Size([2, 16]), torch.Size([2, 2, 6]))

    Source: Nakatani, Kawashima, Ukita, "Interaction-aware Joint Attention Estimation Using People Attributes", ICCV 2023.
    """

    pairwise = True

    def __init__(
        self,
        dim: int,
        width: int = 16,
        layers: int = 3,
        heads: int | None = None,
        embedding: Embedding = "mlp",
        mixing: Mixing = "attention",
    ) -> None:
        super().__init__(dim, width)
        require_one_of(get_args(Mixing), mixing=mixing)
        require_at_least(1, layers=layers)
        require_one_of(("mlp", "linear"), embedding=embedding)
        heads = largest_divisor(width, 2) if heads is None else heads
        further = [nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)] if embedding == "mlp" else []
        self.embedding = nn.Sequential(nn.Linear(dim, width), *further)
        self.joint_token = nn.Parameter(torch.zeros(width))
        self.mixing: Mixing = mixing
        self.layers = nn.ModuleList(
            _Layer(width, heads, mixing == "uniform") for _ in range(layers if mixing != "none" else 0)
        )
        self.norm = nn.LayerNorm(width)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # pickled by a version with attention alone
        state.setdefault("mixing", "attention")
        super().__setstate__(state)  # type: ignore[no-untyped-call]

    def pool_padded(self, tokens: PaddedTokens) -> Pooled:
        encoded = self._encoded(tokens.values, tokens.mask)
        return Pooled(encoded.joint, encoded.attention[:, -1, :, -1, :-1].transpose(1, 2))

    def encode(self, x: Float[Tensor, "batch people dim"], mask: Bool[Tensor, "batch people"] | None = None) -> Encoded:
        """The joint token, the members, and who looked at whom; `mask` is True on real members."""
        tokens = as_tokens(x, mask, self.dim)
        assert isinstance(tokens, PaddedTokens)
        joint, people, attention = self._encoded(tokens.values, mask)
        return Encoded(joint, tokens.replace(people).values, attention)

    def _encoded(self, x: Float[Tensor, "batch people dim"], mask: Bool[Tensor, "batch people"] | None) -> Encoded:
        if self.mixing == "none":
            return self._averaged(PaddedTokens(self.embedding(x), mask))
        joint = self.joint_token.expand(len(x), 1, -1)
        z = torch.cat([self.embedding(x), joint], 1)
        seen = None if mask is None else F.pad(mask, (0, 1), value=True)
        attentions = []
        for layer in self.layers:
            z, attention = layer(z, self.norm, seen)
            attentions.append(attention)
        return Encoded(z[:, -1], z[:, :-1], torch.stack(attentions, 1))

    def _averaged(self, people: PaddedTokens) -> Encoded:
        weights = people.uniform().squeeze(-1)
        batch, count = weights.shape
        attention = torch.eye(count + 1, dtype=weights.dtype, device=weights.device).repeat(batch, 1, 1, 1, 1)
        attention[..., -1, :] = F.pad(weights, (0, 1))[:, None, None]
        return Encoded(self.norm(people.mean() + self.joint_token), people.values, attention)


class _Layer(nn.Module):
    """Attention and a feed-forward part, each with a residual, normalised once at the end."""

    def __init__(self, width: int, heads: int, uniform: bool = False) -> None:
        super().__init__()
        require_divides("heads", heads, width)
        self.uniform = uniform
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj.weight)
        for bias in (self.in_proj.bias, self.out_proj.bias):
            nn.init.zeros_(bias)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # likewise
        state.setdefault("uniform", False)
        super().__setstate__(state)  # type: ignore[no-untyped-call]

    def forward(
        self, z: Float[Tensor, "batch tokens width"], norm: nn.LayerNorm, seen: Bool[Tensor, "batch tokens"] | None
    ) -> tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "batch heads tokens tokens"]]:
        q, k, v = self.in_proj(z).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).to(accumulation_dtype(q.dtype))
        if self.uniform:
            scores = torch.zeros_like(scores)
        if seen is not None:
            scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
        attention = scores.softmax(-1).to(v.dtype)
        y = self.out_proj((attention @ v).transpose(1, 2).flatten(2)) + z
        return norm(y + self.fc2(torch.relu(self.fc1(y)))), attention
