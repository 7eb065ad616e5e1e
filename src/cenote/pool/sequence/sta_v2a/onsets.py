"""The local view: when something happens in a video, learned from the onsets of its sound.

Source: "STA-V2A: Video-to-Audio Generation with Semantic and Temporal Alignment", ICASSP 2025.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least
from cenote.core.segments import accumulation_dtype
from cenote.core.sets import PaddedTokens, as_tokens

LATENT_RATE = 25


class Onsets(NamedTuple):
    """What `StaV2aOnsets` says of each moment of the sound.

    Attributes:
        features: `[batch, latent_frames, condition]`, what a ControlNet is given.
        logits: `[batch, latent_frames, 2]` of no onset and onset.
    """

    features: Float[Tensor, "batch latent_frames condition"]
    logits: Float[Tensor, "batch latent_frames 2"]


class StaV2aOnsets(nn.Module):
    """Frames at several time scales, stretched to the grid of the sound, from which its onsets are to be named.

    `z_t = MLP(x_t)`; for each half width `w`: `z^w_t = mean(z_{t-w}, ..., z_{t+w-1})`, cut at the ends;
    `f_j = [z ; z^1 ; z^2 ; z^4 ; z^8]` of frame `floor(j fps / latent_rate)`, the last frame after the end;
    `h_j = silu(A f_j + a)`, `logits_j = B h_j + b`.

    Trained with `onset_loss` against `onset_targets` of the sound, then frozen; `h` is the condition of the generator.

    Args:
        dim: width of a frame.
        hidden: width of the two hidden layers.
        out_dim: width of `z`.
        windows: half widths, in frames; with none, `z` stands alone.
        condition: width of `h`.
        fps: frames of the video per second.
        latent_rate: latent frames of the sound per second.
        latent_frames: length of the grid of the sound.

    Raises:
        InputError: where a number is not positive.

    Example:
        >>> features, logits = StaV2aOnsets()(torch.randn(2, 40, 512))
        >>> features.shape, logits.shape
        (torch.Size([2, 256, 128]), torch.Size([2, 256, 2]))

    Source: "STA-V2A: Video-to-Audio Generation with Semantic and Temporal Alignment", ICASSP 2025.

    Note:
        The windows are half open, as in the authors' code: that of half width 1 sees a frame and the one before.
        The authors' code takes no mask and 40 frames of 256 alone; here a clip may end earlier, and its last real frame then
        stands for the rest.
    """

    def __init__(
        self,
        dim: int = 512,
        hidden: int = 256,
        out_dim: int = 128,
        windows: Sequence[int] = (1, 2, 4, 8),
        condition: int = 128,
        fps: int = 4,
        latent_rate: int = LATENT_RATE,
        latent_frames: int = 256,
    ) -> None:
        super().__init__()
        require_at_least(1, dim=dim, hidden=hidden, out_dim=out_dim, condition=condition)
        require_at_least(1, fps=fps, latent_rate=latent_rate, latent_frames=latent_frames)
        for window in windows:
            require_at_least(1, windows=window)
        self.dim = dim
        self.windows = tuple(windows)
        self.fps = fps
        self.latent_rate = latent_rate
        self.latent_frames = latent_frames
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, out_dim),
            nn.GELU(),
            nn.Linear(out_dim, out_dim),
        )
        self.feature = nn.Linear((1 + len(self.windows)) * out_dim, condition)
        self.onset = nn.Linear(condition, 2)

    def forward(self, x: Float[Tensor, "batch frames dim"], mask: Bool[Tensor, "batch frames"] | None = None) -> Onsets:
        """Features and logits of each latent frame; zeros for a clip without frames.

        Args:
            x: frames of the video.
            mask: True on real frames, which stand first in each clip.

        Raises:
            InputError: where the frames have another width, or a real frame stands after one that is not.
        """
        tokens = as_tokens(x, mask, self.dim)
        if not isinstance(tokens, PaddedTokens):
            raise InputError("x: frames come as [batch, frames, dim] with a mask, not as Bags")
        if mask is not None and not torch.compiler.is_compiling() and bool((mask[:, 1:] & ~mask[:, :-1]).any()):
            raise InputError("mask: expected the real frames of each clip to stand first; move them to the front")
        lengths = tokens.lengths()
        if tokens.values.shape[1] == 0:
            zeros = x.new_zeros((x.shape[0], self.latent_frames, self.onset.in_features))
            return Onsets(zeros, zeros[..., :2])
        moments = torch.arange(self.latent_frames, device=x.device) * self.fps // self.latent_rate
        at = torch.minimum(moments, (lengths - 1).clamp(min=0).unsqueeze(1))
        scales = self.scales(tokens)
        stretched = scales.gather(1, at.unsqueeze(-1).expand(-1, -1, scales.shape[-1]))
        features = F.silu(self.feature(stretched))
        empty = (lengths == 0).view(-1, 1, 1)
        return Onsets(features.masked_fill(empty, 0), self.onset(features).masked_fill(empty, 0))

    def scales(self, tokens: PaddedTokens) -> Float[Tensor, "batch frames scales"]:
        """`[z ; z^1 ; z^2 ; ...]` of each frame."""
        z = self.mlp(tokens.values)
        return torch.cat([z, *(window_mean(z, w, tokens.mask) for w in self.windows)], -1)


def window_mean(
    x: Float[Tensor, "batch frames dim"], half_width: int, mask: Bool[Tensor, "batch frames"] | None = None
) -> Float[Tensor, "batch frames dim"]:
    """`mean(x[max(t - w, 0) : min(t + w, T)])` at each frame `t`, over real frames; zeros where a window has none.

    Args:
        x: frames.
        half_width: `w`; the frame itself is the first of the second half.
        mask: True on real frames.

    Raises:
        InputError: where `half_width` is below 1.

    Example:
        >>> window_mean(torch.tensor([[[1.0], [3.0], [8.0]]]), 1).flatten().tolist()
        [1.0, 2.0, 5.5]
    """
    require_at_least(1, half_width=half_width)
    tokens = PaddedTokens(x, mask)
    real = torch.ones_like(x[..., :1]) if mask is None else mask.unsqueeze(-1).to(x.dtype)
    wide = accumulation_dtype(x.dtype)
    sums, counts = (_window_sum(v.to(wide), half_width) for v in (tokens.values, real))
    return (sums / counts.clamp(min=1)).to(x.dtype)


def _window_sum(x: Float[Tensor, "batch frames dim"], half_width: int) -> Float[Tensor, "batch frames dim"]:
    padded = F.pad(x.transpose(1, 2), (half_width, half_width - 1))
    return F.avg_pool1d(padded, 2 * half_width, 1).transpose(1, 2) * (2 * half_width)


def onset_loss(
    logits: Float[Tensor, "batch latent_frames 2"], targets: Int[Tensor, "batch latent_frames"]
) -> Float[Tensor, ""]:
    """Mean cross-entropy over all latent frames of the batch.

    Args:
        logits: of `StaV2aOnsets`.
        targets: 1 where an onset falls, else 0.

    Raises:
        InputError: where the shapes do not fit each other.

    Example:
        >>> onset_loss(torch.zeros(1, 4, 2), torch.tensor([[0, 1, 0, 0]]))
        tensor(0.6931)
    """
    if logits.shape[-1] != 2 or logits.shape[:-1] != targets.shape:
        raise InputError(
            f"logits, targets: expected [batch, latent_frames, 2] and [batch, latent_frames], "
            f"got {tuple(logits.shape)} and {tuple(targets.shape)}"
        )
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def onset_targets(
    times: Sequence[float], latent_frames: int = 256, latent_rate: float = LATENT_RATE
) -> Int[Tensor, "latent_frames"]:
    """1 in each latent frame in which an onset falls; onsets after the last latent frame are left out.

    Args:
        times: of the onsets in seconds, as `onset_times` finds them.
        latent_frames: length of the grid.
        latent_rate: latent frames per second.

    Raises:
        InputError: where a time is negative.

    Example:
        >>> onset_targets([0.05, 0.13], latent_frames=5).tolist()
        [0, 1, 0, 1, 0]
    """
    targets = torch.zeros(latent_frames, dtype=torch.int64)
    for time in times:
        # 1e-9: a time that stands on the border of two latent frames belongs to the second, whatever its rounding
        frame = int(time * latent_rate + 1e-9)
        if time < 0:
            raise InputError(f"times: expected seconds from the start, got {time}")
        if frame < latent_frames:
            targets[frame] = 1
    return targets
