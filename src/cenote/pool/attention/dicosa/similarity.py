from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_positive
from cenote.core.sets import PaddedTokens, as_tokens
from cenote.core.widths import largest_divisor, require_divides

COSINE_EPS = 1e-8


class DiCoSALosses(NamedTuple):
    """One step's losses; `total` is their sum."""

    total: Float[Tensor, ""]
    contrastive: Float[Tensor, ""]
    decoupling: Float[Tensor, ""]


class DiCoSA(nn.Module):
    """Similarity of every text with every video, cut into concepts that count as much as each pair says.

    Adaptive pooling of the frames: `w_abv = softmax_v(t_a . f_bv / temp)`, `v_ab = sum_v w_abv f_bv`.
    Both vectors are cut into `K` blocks, the concepts; with a small network shared by all blocks,
    `sim_ab = sum_k MLP([t_a^k; v_ab^k]) cos(t_a^k, v_ab^k)`. The factors are neither bounded nor normalised.

    Training adds to the contrastive loss a decoupling of the concepts: with each block standardised over its `d` coordinates,
    `C_jk = mean over pairs of (t^j . v^k) / n`, `alpha sum_k (C_kk - 1)^2 + beta sum_{j != k} C_jk^2`.

    Args:
        dim: width of texts and frames.
        blocks: number `K` of concepts; divides `dim`. Default 8, or the largest divisor below it.
        temp: temperature of the frame weights.
        alpha, beta: weights of the decoupling loss.
        normaliser: `n`; default: the width of a block, so that `C` holds correlations.
        texts_at_once: texts that are compared in one piece, which bounds memory.
        renormalise: whether the weights of the real frames sum to 1. False, as the authors: padded frames are read and take
            their share, which is then blanked.

    Raises:
        InputError: where the blocks do not divide the width or a number makes no sense.

    Example:
        >>> head = DiCoSA(16, blocks=4)
        >>> head(torch.randn(5, 16), torch.randn(3, 7, 16)).shape  # 5 texts, 3 videos of 7 frames
        torch.Size([5, 3])

    Source: Jin et al., "Text-Video Retrieval with Disentangled Conceptualization and Set-to-Set Alignment", IJCAI 2023. The
    temperature is that of all their published commands.

    Note:
        Their code takes for `n` the number of word slots, 32, where blocks have 64 coordinates, so that the diagonal's
        target of 1 is a correlation near 0.5; `normaliser=32` does the same. It lets padded frames take a share of the
        weights, which shortens the vectors of short videos; `renormalise=False` does so too. Norms and standard deviations
        have an epsilon of 1e-8.
    """

    def __init__(
        self,
        dim: int,
        blocks: int | None = None,
        temp: float = 3.0,
        alpha: float = 0.01,
        beta: float = 0.005,
        normaliser: int | None = None,
        texts_at_once: int = 128,
        renormalise: bool = True,
    ) -> None:
        super().__init__()
        self.blocks = largest_divisor(dim, 8) if blocks is None else blocks
        require_divides("blocks", self.blocks, dim)
        require_positive(temp=temp)
        for name, count in (("normaliser", normaliser), ("texts_at_once", texts_at_once)):
            if count is not None and count < 1:
                raise InputError(f"{name}: expected at least 1, got {count}")
        self.dim = dim
        self.temp = temp
        self.alpha = alpha
        self.beta = beta
        self.texts_at_once = texts_at_once
        self.renormalise = renormalise
        width = dim // self.blocks
        self.normaliser = width if normaliser is None else normaliser
        self.weight_fc = nn.Sequential(nn.Linear(2 * width, 4 * width), nn.ReLU(), nn.Linear(4 * width, 1))
        for layer in (self.weight_fc[0], self.weight_fc[2]):
            assert isinstance(layer, nn.Linear)
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(
        self,
        text: Float[Tensor, "texts dim"],
        frames: Float[Tensor, "videos frames dim"],
        mask: Bool[Tensor, "videos frames"] | None = None,
    ) -> Float[Tensor, "texts videos"]:
        """The similarity of every text with every video.

        Args:
            text: one vector per text.
            frames: the frames of each video, after the temporal transformer.
            mask: True on real frames.
        """
        tokens = self._checked(text, frames, mask)
        parts = [self._similarity(part, self.pool(part, tokens)) for part in text.split(self.texts_at_once)]
        return torch.cat(parts) if parts else text.new_zeros(0, tokens.batch)

    def frame_weights(
        self,
        text: Float[Tensor, "texts dim"],
        frames: Float[Tensor, "videos frames dim"],
        mask: Bool[Tensor, "videos frames"] | None = None,
    ) -> Float[Tensor, "texts videos frames"]:
        """What each text takes from each frame."""
        return self._frame_weights(text, self._checked(text, frames, mask))

    def concept_scores(
        self,
        text: Float[Tensor, "texts dim"],
        frames: Float[Tensor, "videos frames dim"],
        mask: Bool[Tensor, "videos frames"] | None = None,
    ) -> tuple[Float[Tensor, "texts videos blocks"], Float[Tensor, "texts videos blocks"]]:
        """`(factors, cosines)` of each pair and concept: their products sum to the similarity."""
        video = self.pool(text, self._checked(text, frames, mask))
        return self._factors(text, video), self._cosines(text, video)

    def losses(
        self,
        text: Float[Tensor, "pairs dim"],
        frames: Float[Tensor, "pairs frames dim"],
        mask: Bool[Tensor, "pairs frames"] | None = None,
    ) -> DiCoSALosses:
        """Training losses of matched pairs: text `i` belongs to video `i`.

        Raises:
            InputError: where there are not as many texts as videos.
        """
        tokens = self._checked(text, frames, mask)
        if len(text) != tokens.batch:
            raise InputError(
                f"text: expected one text per video, pair by pair, got {len(text)} texts and {tokens.batch} videos"
            )
        logits = self(text, frames, mask) * self.logit_scale.exp().clamp(max=100)
        pairs = torch.arange(len(text), device=text.device)
        contrastive = (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2
        own = (self._own_weights(text, tokens).unsqueeze(1) @ tokens.values).squeeze(1)
        decoupling = self.decoupling(text, own)
        return DiCoSALosses(contrastive + decoupling, contrastive.detach(), decoupling.detach())

    def decoupling(self, text: Float[Tensor, "pairs dim"], video: Float[Tensor, "pairs dim"]) -> Float[Tensor, ""]:
        """The decoupling loss of matched text and pooled video vectors."""
        t, v = (_standardised(side.unflatten(-1, (self.blocks, -1))) for side in (text, video))
        c = torch.einsum("pjd,pkd->jk", t, v) / (self.normaliser * max(len(text), 1))
        diagonal = c.diagonal()
        apart = c.square().sum() - diagonal.square().sum()
        return self.alpha * (diagonal - 1).square().sum() + self.beta * apart

    def pool(self, text: Float[Tensor, "texts dim"], frames: PaddedTokens) -> Float[Tensor, "texts videos dim"]:
        """Every video as each text sees it."""
        return torch.einsum("abv,bvd->abd", self._frame_weights(text, frames), frames.values)

    def _frame_weights(
        self, text: Float[Tensor, "texts dim"], frames: PaddedTokens
    ) -> Float[Tensor, "texts videos frames"]:
        return self._normalised(torch.einsum("ad,bvd->abv", text, frames.values) / self.temp, frames.mask)

    def _own_weights(self, text: Float[Tensor, "pairs dim"], frames: PaddedTokens) -> Float[Tensor, "pairs frames"]:
        return self._normalised((frames.values @ text.unsqueeze(-1)).squeeze(-1) / self.temp, frames.mask)

    def _normalised(self, scores: Tensor, mask: Bool[Tensor, "videos frames"] | None) -> Tensor:
        if mask is None:
            return scores.softmax(-1)
        if not self.renormalise:
            return scores.softmax(-1).masked_fill(~mask, 0)
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~mask, 0)

    def _similarity(
        self, text: Float[Tensor, "texts dim"], video: Float[Tensor, "texts videos dim"]
    ) -> Float[Tensor, "texts videos"]:
        return (self._factors(text, video) * self._cosines(text, video)).sum(-1)

    def _cosines(
        self, text: Float[Tensor, "texts dim"], video: Float[Tensor, "texts videos dim"]
    ) -> Float[Tensor, "texts videos blocks"]:
        t, v = text.unflatten(-1, (self.blocks, -1)).unsqueeze(1), video.unflatten(-1, (self.blocks, -1))
        return (t * v).sum(-1) / ((t.norm(dim=-1) + COSINE_EPS) * (v.norm(dim=-1) + COSINE_EPS))

    def _factors(
        self, text: Float[Tensor, "texts dim"], video: Float[Tensor, "texts videos dim"]
    ) -> Float[Tensor, "texts videos blocks"]:
        first, relu, last = self.weight_fc
        assert isinstance(first, nn.Linear)
        # W [t; v] = W_t t + W_v v, and the text's part is the same for all videos
        for_text, for_video = first.weight.chunk(2, 1)
        from_text = F.linear(text.unflatten(-1, (self.blocks, -1)), for_text, first.bias).unsqueeze(1)
        hidden = relu(from_text + F.linear(video.unflatten(-1, (self.blocks, -1)), for_video))
        return last(hidden).squeeze(-1)

    def _checked(self, text: Tensor, frames: Tensor, mask: Tensor | None) -> PaddedTokens:
        if text.dim() != 2 or text.shape[-1] != self.dim:
            raise InputError(f"text: expected [texts, {self.dim}], got shape {tuple(text.shape)}")
        if frames.dim() != 3:
            raise InputError(f"frames: expected [videos, frames, {self.dim}], got shape {tuple(frames.shape)}")
        tokens = as_tokens(frames, mask, self.dim)
        assert isinstance(tokens, PaddedTokens)
        if not self.renormalise:
            tokens.values = frames  # padded frames with what stands in them
        return tokens


def _standardised(x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().sum(-1, keepdim=True) / max(x.shape[-1] - 1, 1)
    return centred / (variance + COSINE_EPS**2).sqrt()
