"""Mixers in less than the square of the tokens, that others are compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least, require_heads
from cenote.mix.base import Mixer

SMALL = 1e-6


class FourierMixer(Mixer):
    """`y = Re(F_tokens(F_channels(x)))`: two discrete Fourier transforms, no parameters: FNet.

    Source:
        Lee-Thorp et al. 2022, arXiv 2105.03824.

    Note:
        A set is transformed at its own length, so that padding changes nothing; items of one length go together.
    """

    def mix(
        self,
        x: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"],
        positions: Int[Tensor, "batch tokens"],  # noqa: ARG002
    ) -> Float[Tensor, "batch tokens dim"]:
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)
        lengths, out = mask.sum(1), torch.zeros_like(wide)
        for n in lengths.unique().tolist():
            if not n:
                continue
            items = (lengths == n).nonzero().squeeze(1)
            places = order[items, :n]
            held = wide[items.unsqueeze(1), places]
            out = out.index_put((items.unsqueeze(1), places), torch.fft.fft2(held).real)
        return out.to(x.dtype)


class _Headed(Mixer):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        require_heads(dim, heads)
        self.dim, self.heads = dim, heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def projected(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values by head; values are 0 at padding."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v.masked_fill(~mask[:, None, :, None], 0.0)

    def joined(self, y: Tensor) -> Tensor:
        return self.proj(y.transpose(1, 2).flatten(2))


class LinearAttention(_Headed):
    """`y_i = f(q_i) sum_j f(k_j) v_j / f(q_i) sum_j f(k_j)`, `f = elu + 1`.

    Args:
        dim: width of a token.
        heads: number of heads.

    Source:
        Katharopoulos et al. 2020, arXiv 2006.16236.
    """

    order_matters = False

    def __init__(self, dim: int, heads: int = 1) -> None:
        super().__init__(dim, heads)

    def mix(
        self,
        x: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"],
        positions: Int[Tensor, "batch tokens"],  # noqa: ARG002
    ) -> Float[Tensor, "batch tokens dim"]:
        q, k, v = self.projected(x, mask)
        q, k = F.elu(q) + 1, (F.elu(k) + 1) * mask[:, None, :, None]
        mass = (q @ k.sum(2).unsqueeze(-1)).clamp(min=SMALL)
        return self.joined(q @ (k.mT @ v) / mass)


class Linformer(_Headed):
    """Attention over `slots` sums of keys and of values, weighed by the places of the tokens.

    Args:
        dim: width of a token.
        heads: number of heads.
        longest: number of places.
        slots: number of sums.

    Source:
        Wang et al. 2020, arXiv 2006.04768.
    """

    def __init__(self, dim: int, heads: int = 1, longest: int = 512, slots: int = 64) -> None:
        super().__init__(dim, heads)
        require_at_least(1, longest=longest, slots=slots)
        self.of_keys = nn.Parameter(torch.randn(longest, slots) * longest**-0.5)
        self.of_values = nn.Parameter(torch.randn(longest, slots) * longest**-0.5)

    def mix(
        self,
        x: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"],
        positions: Int[Tensor, "batch tokens"],
    ) -> Float[Tensor, "batch tokens dim"]:
        if x.shape[1] > len(self.of_keys):
            raise InputError(f"x: expected at most longest = {len(self.of_keys)} tokens, got {x.shape[1]}")
        q, k, v = self.projected(x, mask)
        at, of = (
            table[positions].masked_fill(~mask.unsqueeze(-1), 0.0).unsqueeze(1)
            for table in (self.of_keys, self.of_values)
        )
        weights = ((q @ (at.mT @ k).mT) * q.shape[-1] ** -0.5).softmax(-1)
        return self.joined(weights @ (of.mT @ v))


class NystromAttention(_Headed):
    """Attention through landmarks, which are means of segments: `softmax(q l') softmax(l l')^+ softmax(l k') v`.

    Args:
        dim: width of a token.
        heads: number of heads.
        landmarks: their number; as many as tokens where these are fewer.

    Source:
        Xiong et al. 2021, arXiv 2102.03902; with the exact pseudo-inverse in place of its iteration.
    """

    def __init__(self, dim: int, heads: int = 1, landmarks: int = 32) -> None:
        super().__init__(dim, heads)
        require_at_least(1, landmarks=landmarks)
        self.landmarks = landmarks

    def mix(
        self,
        x: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"],
        positions: Int[Tensor, "batch tokens"],  # noqa: ARG002
    ) -> Float[Tensor, "batch tokens dim"]:
        q, k, v = self.projected(x, mask)
        q = q * q.shape[-1] ** -0.5
        count = mask.sum(1, keepdim=True)
        landmark = (mask.cumsum(1) - 1).clamp(min=0) * self.landmarks // count.clamp(min=self.landmarks)
        member = F.one_hot(landmark, self.landmarks).to(x.dtype) * mask.unsqueeze(-1)
        sizes = member.sum(1)
        there = (sizes > 0)[:, None, None, :]
        mean = (member / sizes.clamp(min=1).unsqueeze(1)).mT.unsqueeze(1)
        lq, lk = mean @ q, mean @ k
        low = torch.finfo(x.dtype).min
        first = (q @ lk.mT).masked_fill(~there, low).softmax(-1)
        middle = (lq @ lk.mT).masked_fill(~there, low).softmax(-1)
        # a landmark that there is not stands for itself alone
        own = torch.eye(self.landmarks, dtype=x.dtype, device=x.device)
        middle = torch.where(there.mT, middle, own)
        last = (lq @ k.mT).masked_fill(~mask[:, None, None, :], low).softmax(-1) * there.mT
        wide = middle.float() if x.dtype in (torch.float16, torch.bfloat16) else middle
        inverse = torch.linalg.pinv(wide).to(x.dtype)
        return self.joined(first.masked_fill(~there, 0.0) @ inverse @ (last @ v))
