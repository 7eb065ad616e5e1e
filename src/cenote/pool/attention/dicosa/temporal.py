from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least
from cenote.core.sets import PaddedTokens, as_tokens
from cenote.core.widths import largest_divisor, require_divides


class TemporalTransformer(nn.Module):
    """Frames see each other before they are pooled: a few transformer layers with positions, added to what came in.

    `y = x + Layers(x + positions)`, each layer `z + W_o attention(LN(z))`, then `z + fc2(quick_gelu(fc1(LN(z))))`.

    Args:
        dim: width of a frame.
        layers: number of layers.
        heads: divides `dim`; default: 64 channels to a head, or the nearest divisor.
        frames: the largest number of frames.

    Raises:
        InputError: where sizes do not fit, or a video has more frames than that.

    Example:
        >>> TemporalTransformer(16, layers=2, frames=12)(torch.randn(3, 7, 16)).shape
        torch.Size([3, 7, 16])

    Source: Jin et al., IJCAI 2023: four layers that start as those of CLIP's text encoder, see `load_clip_text`. The layers'
    form is that of Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021.
    """

    def __init__(self, dim: int, layers: int = 4, heads: int | None = None, frames: int = 77) -> None:
        super().__init__()
        require_at_least(1, layers=layers, frames=frames)
        heads = largest_divisor(dim, max(1, dim // 64)) if heads is None else heads
        self.position_embedding = nn.Parameter(0.01 * torch.randn(frames, dim))
        self.layers = nn.ModuleList(_Layer(dim, heads) for _ in range(layers))

    def forward(
        self, x: Float[Tensor, "videos frames dim"], mask: Bool[Tensor, "videos frames"] | None = None
    ) -> Float[Tensor, "videos frames dim"]:
        """The frames, each aware of its video; `mask` is True on real frames, padded ones hold zeros."""
        tokens = as_tokens(x, mask, self.position_embedding.shape[1])
        assert isinstance(tokens, PaddedTokens)
        count, most = tokens.values.shape[1], len(self.position_embedding)
        if count > most:
            raise InputError(
                f"x: has {count} frames, this transformer has positions for {most}; build it with frames={count}"
            )
        z = tokens.values + self.position_embedding[:count]
        for layer in self.layers:
            z = layer(z, mask)
        return tokens.replace(tokens.values + z).values

    def load_clip_text(self, state: Mapping[str, Tensor], prefix: str = "text_model.") -> None:
        """Start from the first layers and positions of a CLIP text encoder.

        Args:
            state: the `state_dict` of a `CLIPModel` or `CLIPTextModel` of the transformers library.
            prefix: of the names of its text encoder.

        Raises:
            InputError: where a layer is missing or has another width.
        """
        wanted = {
            f"layers.{name}": f"{prefix}encoder.layers.{name}" for name in dict(self.layers.named_parameters())
        } | {"position_embedding": f"{prefix}embeddings.position_embedding.weight"}
        own = dict(self.named_parameters())
        for ours, theirs in wanted.items():
            if theirs not in state:
                raise InputError(
                    f"state: has no {theirs!r}; give the state_dict of a CLIP text model, or another prefix"
                )
            value, size = state[theirs], own[ours].shape
            if ours == "position_embedding":
                value = value[: size[0]]
            if value.shape != size:
                raise InputError(f"state: {theirs} has shape {tuple(value.shape)}, expected {tuple(size)}")
            with torch.no_grad():
                own[ours].copy_(value)


class _Layer(nn.Module):
    """A layer of CLIP, its parts named as in the transformers library."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.self_attn = _Attention(dim, heads)
        self.layer_norm1 = nn.LayerNorm(dim)
        self.mlp = _MLP(dim)
        self.layer_norm2 = nn.LayerNorm(dim)

    def forward(
        self, z: Float[Tensor, "videos frames dim"], mask: Bool[Tensor, "videos frames"] | None
    ) -> Float[Tensor, "videos frames dim"]:
        z = z + self.self_attn(self.layer_norm1(z), mask)
        return z + self.mlp(self.layer_norm2(z))


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        require_divides("heads", heads, dim)
        self.heads = heads
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.q_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(
        self, x: Float[Tensor, "videos frames dim"], mask: Bool[Tensor, "videos frames"] | None
    ) -> Float[Tensor, "videos frames dim"]:
        q, k, v = (
            proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        # a video without frames attends to its zeroed slots: all False would make NaN
        seen = None if mask is None else (mask | ~mask.any(1, keepdim=True))[:, None, None]
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
        hidden = self.fc1(x)
        return self.fc2(hidden * torch.sigmoid(1.702 * hidden))
