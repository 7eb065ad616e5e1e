from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_one_of, require_positive
from cenote.core.segments import accumulation_dtype
from cenote.core.sets import PaddedTokens, Tokens, as_tokens
from cenote.core.tokenwise import tokenwise
from cenote.pool.base import Pool, Pooled
from cenote.pool.basic.positions import all_of


class TemporalState(NamedTuple):
    """All that a stream remembers: sums over its past frames, whatever its length.

    Attributes:
        sum_w: sum of the weights.
        sum_x: sum of the weighted frames.
        sum_xx: sum of the weighted squared frames; `None` where only the mean is wanted.
    """

    sum_w: Float[Tensor, "batch 1"]
    sum_x: Float[Tensor, "batch dim"]
    sum_xx: Float[Tensor, "batch dim"] | None


class AttentiveTemporalPool(Pool):
    """Running mean and standard deviation of all frames so far, each frame weighted by how useful it looks on its own.

    `w_t = sigmoid(f(x_t)) + eps`, `c_t = c_{t-1} + w_t`, `m_t = m_{t-1} + w_t x_t`, `q_t = q_{t-1} + w_t x_t^2`;
    `mean_t = m_t / c_t`, `std_t = sqrt(q_t / c_t - mean_t^2 + eps)`.

    The weight is a sigmoid and not a softmax, so the past is never rescaled, and three sums are the whole state. Called as
    a pool it gives the statistics after the last frame; `step` takes a stream piece by piece; `running` gives the
    statistics after every frame of a whole batch.

    Args:
        dim: width of a frame.
        statistics: `"mean_std"`: mean and standard deviation side by side; `"mean"`: the mean alone; `"pass_through"`: every
            frame passes as it is, and the last one stands for the set.
        weighted: whether frames are weighted; without, every real frame weighs one.
        hidden: width of the hidden layer (ReLU) of `f`; `None`: one linear map.
        eps: least weight of a frame, and added to the variance.
        forget: what is left of each sum when the next real frame comes, above 0 and up to 1; 1 forgets nothing.

    Example:
        >>> pool = AttentiveTemporalPool(8)
        >>> stream = torch.randn(2, 100, 8)
        >>> state = None
        >>> for packet in stream.split(30, dim=1):
        ...     output, state = pool.step(packet, state)
        >>> output.shape, torch.allclose(output[:, -1], pool(stream), atol=1e-5)
        (torch.Size([2, 10, 16]), True)

    Source: Wang et al., "Attentive Temporal Pooling for Conformer-based Streaming Language Identification in Long-form
    Speech", Odyssey 2022.

    Note:
        In the authors' code a padded frame still counts with the weight `eps`; here it counts for nothing, and the
        statistics stay those of the frame before (zeros, where there was none). `count_padding` of `step` and `running` does
        as they do. Forgetting is ours.
        The sums are kept in float64 where the device has it, because `q / c - mean^2` cancels in float32; the whole-set
        form takes the variance around the mean instead.
    """

    # of earlier pickles
    forget: float = 1.0

    def __init__(
        self,
        dim: int,
        statistics: Literal["mean", "mean_std", "pass_through"] = "mean_std",
        weighted: bool = True,
        hidden: int | None = None,
        eps: float = 1e-4,
        forget: float = 1.0,
    ) -> None:
        require_one_of(("mean", "mean_std", "pass_through"), statistics=statistics)
        require_positive(eps=eps)
        if not 0 < forget <= 1:
            raise InputError(f"forget: expected a share above 0 and up to 1, which forgets nothing, got {forget}")
        super().__init__(dim, 2 * dim if statistics == "mean_std" else dim)
        self.statistics = statistics
        self.eps = eps
        self.forget = forget
        self.permutation_invariant = forget == 1 and statistics != "pass_through"
        self.scorer: nn.Module | None = None
        if weighted and statistics != "pass_through":
            inner = [] if hidden is None else [nn.Linear(dim, hidden), nn.ReLU()]
            self.scorer = nn.Sequential(*inner, nn.Linear(dim if hidden is None else hidden, 1))

    def pool(self, tokens: Tokens) -> Pooled:
        if self.statistics == "pass_through":
            return Pooled(tokens.token(-1), all_of(tokens, tokens.lengths() - 1))
        dtype = tokens.values.dtype
        wide = accumulation_dtype(dtype)
        weights = self.frame_weights(tokens).to(wide)
        if self.forget < 1:
            later = tokens.spread(tokens.lengths()) - 1 - tokens.positions()
            weights = weights * self.forget ** later.to(wide).unsqueeze(-1)
        # an empty set has no weight at all
        weights = weights / tokens.spread(tokens.sum(weights).clamp(min=torch.finfo(wide).tiny))
        x = tokens.values.to(wide)
        output = tokens.weighted_sum(weights, x).squeeze(1)
        if self.statistics == "mean_std":
            variance = tokens.weighted_sum(weights, (x - tokens.spread(output)).square()).squeeze(1)
            output = torch.cat([output, (variance + self.eps).sqrt()], -1)
        return Pooled(output.to(dtype), weights.to(dtype))

    def running(
        self,
        x: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
        count_padding: bool = False,
    ) -> Float[Tensor, "batch tokens out_dim"]:
        """The statistics after every frame of a whole batch; see `step`."""
        return self.step(x, None, mask, count_padding)[0]

    def step(
        self,
        x: Float[Tensor, "batch tokens dim"],
        state: TemporalState | None = None,
        mask: Bool[Tensor, "batch tokens"] | None = None,
        count_padding: bool = False,
    ) -> tuple[Float[Tensor, "batch tokens out_dim"], TemporalState]:
        """Take the next frames of each stream.

        Outside of training, call it under `torch.inference_mode()`: otherwise the state remembers how to differentiate
        all frames so far.

        Args:
            x: the frames, any number of them, none included.
            state: what the last call returned; `None` at the start of the streams.
            mask: True on real frames.
            count_padding: whether a padded frame is read, and weighs `eps` where frames are weighted, as in the authors' code.

        Returns:
            The statistics after each of these frames, and the state to go on with.

        Raises:
            InputError: where the frames do not fit the pool or the state does not fit the frames.
        """
        tokens = as_tokens(x, mask, self.dim)
        if not isinstance(tokens, PaddedTokens):
            raise InputError("x: a stream comes as [batch, tokens, dim] with a mask, not as Bags")
        start = self.initial_state(x) if state is None else state
        if start.sum_x.shape != (tokens.batch, self.dim):
            raise InputError(
                f"state: belongs to {start.sum_x.shape[0]} streams of width {start.sum_x.shape[1]}, "
                f"got frames of {tokens.batch} streams of width {self.dim}"
            )
        if (start.sum_xx is not None) != (self.statistics == "mean_std"):
            raise InputError(f"state: comes from a pool with other statistics than {self.statistics!r}")
        if self.statistics == "pass_through":
            return x if count_padding else tokens.values, start
        wide = start.sum_x.dtype
        weights = self.frame_weights(tokens).to(wide)
        if count_padding and mask is not None and self.scorer is not None:
            tokens = PaddedTokens(x)
            weights = weights.masked_fill(~mask.unsqueeze(-1), self.eps)
        values = tokens.values.to(wide)
        keep = None
        if self.forget < 1:
            keep = torch.full_like(weights, self.forget)
            keep = keep if tokens.mask is None else keep.masked_fill(~tokens.mask.unsqueeze(-1), 1)
        count = _running_sum(start.sum_w, weights, keep)
        sum_x = _running_sum(start.sum_x, weights * values, keep)
        # a stream without any real frame so far has neither weight nor sums
        divisor = count.clamp(min=torch.finfo(wide).tiny)
        mean = sum_x / divisor
        if start.sum_xx is None:
            return mean[:, 1:].to(x.dtype), TemporalState(_last(count), _last(sum_x), None)
        sum_xx = _running_sum(start.sum_xx, weights * values.square(), keep)
        std = ((sum_xx / divisor - mean.square()).clamp(min=0) + self.eps).sqrt().masked_fill(count == 0, 0)
        output = torch.cat([mean, std], -1)[:, 1:].to(x.dtype)
        return output, TemporalState(_last(count), _last(sum_x), _last(sum_xx))

    def initial_state(self, x: Float[Tensor, "batch tokens dim"]) -> TemporalState:
        """The state before the first frame, for as many streams as `x` has."""
        # mps has no float64
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        zeros = x.new_zeros((x.shape[0], self.dim), dtype=wide)
        return TemporalState(zeros[:, :1], zeros, zeros if self.statistics == "mean_std" else None)

    def frame_weights(self, tokens: Tokens) -> Float[Tensor, "*rows one"]:
        """Unnormalised weight of each frame; 0 in padded slots."""
        if self.scorer is None:
            weights = torch.ones_like(tokens.values[..., :1])
        else:
            weights = torch.sigmoid(tokenwise(self.scorer, tokens.values)) + self.eps
        return tokens.replace(weights).values


def _running_sum(
    start: Float[Tensor, "batch channels"],
    v: Float[Tensor, "batch tokens channels"],
    keep: Float[Tensor, "batch tokens 1"] | None = None,
) -> Float[Tensor, "batch tokens_plus_1 channels"]:
    """`start`, then `s_t = keep_t s_{t-1} + v_t` row by row; without `keep` nothing is forgotten."""
    sums = torch.cat([start.unsqueeze(1), v], 1)
    if keep is None:
        return sums.cumsum(1)
    kept = torch.cat([keep.new_ones(len(keep), 1, 1), keep], 1)
    reach = 1
    # stretches of doubling length: dividing a plain sum by powers of `keep` would overflow
    while reach < sums.shape[1]:
        sums = torch.cat([sums[:, :reach], sums[:, reach:] + kept[:, reach:] * sums[:, :-reach]], 1)
        kept = torch.cat([kept[:, :reach], kept[:, reach:] * kept[:, :-reach]], 1)
        reach *= 2
    return sums


def _last(v: Float[Tensor, "batch tokens channels"]) -> Float[Tensor, "batch channels"]:
    # a view would keep the sums of all frames alive
    return v[:, -1].clone()
