from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least
from cenote.core.sets import PaddedTokens, as_tokens
from cenote.core.widths import largest_divisor
from cenote.pool.attention.blocks import MLP, SelfAttention, TransformerBlock, quick_gelu

CLIP_PARTS = {
    "norm1": ("layer_norm1",),
    "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.proj": ("self_attn.out_proj",),
    "norm2": ("layer_norm2",),
    "mlp.fc1": ("mlp.fc1",),
    "mlp.fc2": ("mlp.fc2",),
}


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
        self.layers = nn.ModuleList(
            TransformerBlock(dim, SelfAttention(dim, heads, qkv_bias=True), MLP(dim, 4 * dim, activation=quick_gelu))
            for _ in range(layers)
        )

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
        for ours, parts in self._names().items():
            size = self.get_parameter(ours).shape
            of_part = torch.Size((size[0] // len(parts), *size[1:]))
            values = []
            for part in parts:
                name = f"{prefix}{part}"
                if name not in state:
                    raise InputError(
                        f"state: has no {name!r}; give the state_dict of a CLIP text model, or another prefix"
                    )
                value = state[name][: size[0]] if ours == "position_embedding" else state[name]
                if value.shape != of_part:
                    raise InputError(f"state: {name} has shape {tuple(value.shape)}, expected {tuple(of_part)}")
                values.append(value)
            with torch.no_grad():
                self.get_parameter(ours).copy_(torch.cat(values))

    def _names(self) -> dict[str, list[str]]:
        """Of each parameter, what CLIP's text encoder in the transformers library calls its parts."""
        names = {"position_embedding": ["embeddings.position_embedding.weight"]}
        for i in range(len(self.layers)):
            for kind in ("weight", "bias"):
                for ours, parts in CLIP_PARTS.items():
                    names[f"layers.{i}.{ours}.{kind}"] = [f"encoder.layers.{i}.{part}.{kind}" for part in parts]
        return names
