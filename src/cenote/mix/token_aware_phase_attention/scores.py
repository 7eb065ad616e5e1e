"""Scores that are an amplitude times the cosine of a phase.

Source: Wang, Shen, Munos, Zhan and Tian, "Positional Encoding via Token-Aware Phase Attention" (2025), arXiv 2509.12635.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.requirements import require_at_least, require_one_of, require_positive
from cenote.mix.base import ScoreModifier
from cenote.mix.position_scores import Positions, distances, masked, positions_of

Phase = Literal["quadratic", "linear"]


class PhaseScores(ScoreModifier):
    """`a_mn cos(2 pi |m - n|^alpha phi_mn)`, for softmax without any further scale; on the diagonal the cosine is 1.

    The cosine is of float32 numbers at least, whatever q and k are. It cannot tell before from after: give a causal mask where
    that matters.
    """

    def __init__(self, alpha: float = 0.1) -> None:
        super().__init__()
        require_positive(alpha=alpha)
        self.alpha = alpha

    @abstractmethod
    def amplitude(self, q: Tensor, k: Tensor) -> Float[Tensor, "batch heads queries keys"]:
        """`a`."""

    @abstractmethod
    def phase(self, q: Tensor, k: Tensor) -> Float[Tensor, "batch heads queries keys"]:
        """`phi`, in float32 at least."""

    def forward(
        self,
        q: Float[Tensor, "batch heads queries width"],
        k: Float[Tensor, "batch heads keys width"],
        mask: Bool[Tensor, "#batch #heads queries keys"] | None = None,
        positions: Positions | None = None,
    ) -> Float[Tensor, "batch heads queries keys"]:
        phase = self.phase(q, k)
        stretched = distances(q, k, positions).abs().to(phase.dtype) ** self.alpha
        turned = (2 * math.pi * stretched * phase).cos()
        return masked((self.amplitude(q, k).to(phase.dtype) * turned).to(q.dtype), mask)


class TAPA(PhaseScores):
    """Scores without added positions: the first channels give an amplitude, the others a phase.

        s_mn = (q_A . k_A) / sqrt(d_A) cos(2 pi |m - n|^alpha (q_P . k_P) / sqrt(d_P)),   d_A = round(theta d)

    No parameters; q and k must come without any position. For softmax without any further scale.

    Args:
        theta: share of the channels that give the amplitude.
        alpha: how fast the phase turns with the distance.

    Example:
        >>> q = torch.randn(1, 2, 4, 8)
        >>> scores = TAPA()(q, q)
        >>> amplitude = (q[..., :4] @ q[..., :4].mT).diagonal(dim1=-2, dim2=-1) / 2
        >>> bool(torch.allclose(scores.diagonal(dim1=-2, dim2=-1), amplitude))
        True

    Source: Wang et al. (2025), arXiv 2509.12635, equation 12.
    """

    def __init__(self, theta: float = 0.5, alpha: float = 0.1) -> None:
        super().__init__(alpha)
        if not 0 < theta < 1:
            raise InputError(f"theta: expected a share above 0 and below 1, got {theta}")
        self.theta = theta

    def split(self, width: int) -> int:
        """How many channels give the amplitude.

        Raises:
            InputError: where none would be left for one of the two.
        """
        amplitude = round(self.theta * width)
        if not 0 < amplitude < width:
            raise InputError(
                f"theta: of {width} channels {amplitude} would give the amplitude and {width - amplitude} the phase; both "
                f"need one"
            )
        return amplitude

    def amplitude(self, q: Tensor, k: Tensor) -> Float[Tensor, "batch heads queries keys"]:
        at = self.split(q.shape[-1])
        return q[..., :at] @ k[..., :at].mT / math.sqrt(at)

    def phase(self, q: Tensor, k: Tensor) -> Float[Tensor, "batch heads queries keys"]:
        at = self.split(q.shape[-1])
        return _wide(q[..., at:]) @ _wide(k[..., at:]).mT / math.sqrt(q.shape[-1] - at)

    def extra_repr(self) -> str:
        return f"theta={self.theta:g}, alpha={self.alpha:g}"


class GeneralPhase(PhaseScores):
    """The general form, learned maps in place of the two parts.

        s_mn = q M k / sqrt(d) cos(2 pi |m - n|^alpha phi),   phi = q N k / sqrt(d), or w_q . q + w_k . k

    What the linear phase is exactly could not be found out; this form is inferred.

    Args:
        width: of a head.
        alpha: as in `TAPA`.
        phase: `"quadratic"` or `"linear"`, the paper's ablation.

    Source: Wang et al. (2025), arXiv 2509.12635, equation 9.
    """

    def __init__(self, width: int, alpha: float = 0.1, phase: Phase = "quadratic") -> None:
        super().__init__(alpha)
        require_at_least(1, width=width)
        require_one_of(get_args(Phase), phase=phase)
        self.width, self.kind = width, phase
        self.amplitude_map = nn.Parameter(nn.init.orthogonal_(torch.empty(width, width)))
        shape = (width, width) if phase == "quadratic" else (2, width)
        self.phase_map = nn.Parameter(torch.randn(shape) / math.sqrt(width))

    def amplitude(self, q: Tensor, k: Tensor) -> Float[Tensor, "batch heads queries keys"]:
        return q @ self.amplitude_map @ k.mT / math.sqrt(self.width)

    def phase(self, q: Tensor, k: Tensor) -> Float[Tensor, "batch heads queries keys"]:
        q, k, maps = _wide(q), _wide(k), _wide(self.phase_map)
        if self.kind == "linear":
            return (q @ maps[0]).unsqueeze(-1) + (k @ maps[1]).unsqueeze(-2)
        return q @ maps @ k.mT / math.sqrt(self.width)


def attended_in_blocks(
    scores: ScoreModifier,
    q: Float[Tensor, "batch heads queries width"],
    k: Float[Tensor, "batch heads keys width"],
    v: Float[Tensor, "batch heads keys value_width"],
    mask: Bool[Tensor, "#batch #heads queries keys"] | None = None,
    positions: Positions | None = None,
    block: int = 256,
) -> Float[Tensor, "batch heads queries value_width"]:
    """`softmax(scores) v` a block of keys at a time, with running maximum and sum: memory grows with the block alone.

    Args:
        scores: of which each entry depends on its own query and key alone.
        block: keys at a time.
    """
    require_at_least(1, block=block)
    of_queries, of_keys = positions_of(q, k, positions)
    dtype = torch.promote_types(q.dtype, torch.float32)
    most = q.new_full((*q.shape[:3], 1), -math.inf, dtype=dtype)
    total = torch.zeros_like(most)
    held = q.new_zeros((*q.shape[:3], v.shape[-1]), dtype=dtype)
    for start in range(0, k.shape[2], block):
        here = slice(start, start + block)
        seen = None if mask is None else mask[..., here]
        s = scores(q, k[:, :, here], seen, (of_queries, of_keys[:, here])).to(dtype)
        larger = torch.maximum(most, s.amax(-1, keepdim=True))
        base = larger.masked_fill(larger == -math.inf, 0.0)
        shrunk, weights = (most - base).exp(), (s - base).exp()
        total = total * shrunk + weights.sum(-1, keepdim=True)
        held = held * shrunk + weights @ v[:, :, here].to(dtype)
        most = larger
    return (held / total.masked_fill(total == 0, 1.0)).to(v.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
