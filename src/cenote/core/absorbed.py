"""Softmax pooling of raw tokens by absorbed queries: on a GPU one Triton kernel that reads the tokens once.

    s_nh = scale q_h . k_n + b_n,   y_h = sum_n softmax_n(s_nh) v_n,   L_h = log sum_n exp(s_nh)

with `k_n`, `v_n` the token itself or its normalised form `(x_n - mean(x_n)) / sqrt(var(x_n) + eps)`; the affine part of a
LayerNorm belongs to the queries and to the sums. This is the middle of `cenote.core.cross_attention`.

The kernel walks over whole tokens with an online softmax, so that memory holds no scores and no weights; the backward pass
makes them again from `L`, in one more read for the queries, and in another where the tokens need gradients.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_one_of
from cenote.core.segments import accumulation_dtype
from cenote.core.sets import Bags, PaddedTokens, Tokens

Normalise = Literal["none", "keys", "values", "both"]

LONGEST_ROW = 4096
"""Bytes of a token, above which a tile of whole tokens does not fit on the chip beside its queries."""

HALF = (torch.float16, torch.bfloat16)


class Sums(NamedTuple):
    """What absorbed pooling returns: `output [batch, queries, dim]`, `logsumexp [batch, queries]`; zeros for an empty set."""

    output: Float[Tensor, "batch queries dim"]
    logsumexp: Float[Tensor, "batch queries"]


def absorbed_pool(
    tokens: Tokens,
    queries: Float[Tensor, "queries dim"] | Float[Tensor, "batch queries dim"],
    *,
    scale: float = 1.0,
    bias: Float[Tensor, "*rows"] | None = None,
    normalise: Normalise = "none",
    eps: float = 1e-5,
) -> Sums:
    """Weighted sums of the tokens of each set, and the logsumexp of the scores.

    Args:
        tokens: the sets.
        queries: as wide as the tokens; shared by all sets, or one group per set.
        scale: factor on the scores.
        bias: added to the scores of a token; -inf hides it. One token of each set must stay.
        normalise: whether keys, values or both are the normalised tokens.
        eps: of the normalisation.

    Raises:
        InputError: where shapes do not fit together.

    Example:
        >>> from cenote.core import PaddedTokens
        >>> sums = absorbed_pool(PaddedTokens(torch.ones(2, 5, 8)), torch.zeros(3, 8))
        >>> sums.output.shape, round(sums.logsumexp[0, 0].exp().item(), 4)
        (torch.Size([2, 3, 8]), 5.0)
    """
    _require(tokens, queries, bias, normalise)
    run = fused if available(tokens.values) else plain
    return run(tokens, queries, scale=scale, bias=bias, normalise=normalise, eps=eps)


def layer_normed_pool(
    tokens: Tokens,
    queries: Float[Tensor, "queries dim"] | Float[Tensor, "batch queries dim"],
    key_norm: nn.LayerNorm | None = None,
    value_norm: nn.LayerNorm | None = None,
    *,
    scale: float = 1.0,
) -> Float[Tensor, "batch queries dim"]:
    """`absorbed_pool` with LayerNorms on the tokens before keys and values, their affine parts folded out of the kernel.

    Args:
        tokens, queries, scale: as in `absorbed_pool`.
        key_norm, value_norm: over the width of a token; with the same epsilon.

    Raises:
        InputError: where the epsilons differ.

    Example:
        >>> from cenote.core import PaddedTokens
        >>> norm = torch.nn.LayerNorm(8)
        >>> layer_normed_pool(PaddedTokens(torch.randn(2, 5, 8)), torch.ones(3, 8), norm, norm).shape
        torch.Size([2, 3, 8])
    """
    norms = [norm for norm in (key_norm, value_norm) if norm is not None]
    if len({norm.eps for norm in norms}) > 1:
        raise InputError(f"key_norm, value_norm: expected one eps, got {norms[0].eps} and {norms[1].eps}")
    normalise: Normalise = "none" if not norms else "both" if len(norms) == 2 else "keys" if key_norm else "values"
    if key_norm is not None and key_norm.weight is not None:
        # the bias adds the same number to the scores of all tokens
        queries = queries * key_norm.weight
    eps = norms[0].eps if norms else 0.0
    output, _ = absorbed_pool(tokens, queries, scale=scale, normalise=normalise, eps=eps)
    if value_norm is not None and value_norm.weight is not None:
        output = output * value_norm.weight
        if value_norm.bias is not None:
            output = output + (tokens.lengths() > 0).view(-1, 1, 1) * value_norm.bias
    return output.to(tokens.values.dtype)


def available(x: Float[Tensor, "*rows dim"]) -> bool:
    """Whether the kernel takes these tokens: on a CUDA GPU from Ampere on, in float32 or half precision, not too wide.

    Inside of `torch.compile` and of `torch.func` transforms the plain form runs.
    """
    return (
        x.is_cuda
        and x.dtype in (torch.float32, *HALF)
        and x.shape[-1] * x.element_size() <= LONGEST_ROW
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
        and installed()
    )


@functools.cache
def installed() -> bool:
    """Whether the package triton is there; it comes with the CUDA builds of torch."""
    return importlib.util.find_spec("triton") is not None


def plain(
    tokens: Tokens,
    queries: Float[Tensor, "queries dim"] | Float[Tensor, "batch queries dim"],
    *,
    scale: float = 1.0,
    bias: Float[Tensor, "*rows"] | None = None,
    normalise: Normalise = "none",
    eps: float = 1e-5,
) -> Sums:
    """`absorbed_pool` in plain torch."""
    x = tokens.values
    normalised = x if normalise == "none" else F.layer_norm(x, x.shape[-1:], eps=eps)
    keys = tokens.replace(normalised) if normalise in ("keys", "both") else tokens
    scores = keys.scores(queries.to(x.dtype)).to(accumulation_dtype(x.dtype)) * scale
    if bias is not None:
        scores = scores + bias.unsqueeze(-1).to(scores.dtype)
    values = normalised if normalise in ("values", "both") else None
    output = tokens.weighted_sum(tokens.softmax(scores).to(x.dtype), values)
    return Sums(output, tokens.logsumexp(scores))


def fused(
    tokens: Tokens,
    queries: Float[Tensor, "queries dim"] | Float[Tensor, "batch queries dim"],
    *,
    scale: float = 1.0,
    bias: Float[Tensor, "*rows"] | None = None,
    normalise: Normalise = "none",
    eps: float = 1e-5,
) -> Sums:
    """`absorbed_pool` by the Triton kernel; `logsumexp` is float32. Ask `available` first.

    Scores, weights and sums are float32. Products of float32 tokens are exact to their rounding unless
    `torch.backends.cuda.matmul.allow_tf32` is set. Gradients cannot be differentiated again.
    """
    x = tokens.values
    x = x if x.stride(-1) == 1 else x.contiguous()
    if isinstance(tokens, Bags):
        mask, offsets = None, tokens.offsets
    else:
        assert isinstance(tokens, PaddedTokens)
        mask, offsets = tokens.mask, None
    settings = _Settings(float(scale), float(eps), normalise in ("keys", "both"), normalise in ("values", "both"))
    output, logsumexp = _Fused.apply(  # type: ignore[no-untyped-call]
        x,
        queries.to(x.dtype).contiguous(),
        None if bias is None else bias.to(torch.float32).contiguous(),
        None if mask is None else mask.contiguous(),
        offsets,
        settings,
    )
    return Sums(output, logsumexp)


class _Settings(NamedTuple):
    scale: float
    eps: float
    norm_keys: bool
    norm_values: bool


class _Layout:
    """How sets are cut into chunks and tiles, and everything that the kernels are told about it."""

    def __init__(self, x: Tensor, queries: Tensor, offsets: Int[Tensor, "batch_plus_1"] | None) -> None:
        self.ragged = offsets is not None
        self.batch = x.shape[0] if offsets is None else offsets.numel() - 1
        self.tokens = x.shape[1] if offsets is None else 0
        self.queries, self.dim = queries.shape[-2:]
        self.per_set = queries.dim() == 3
        self.block_d = max(16, _power_of_2(self.dim))
        # the sums of all queries of a block stay in registers
        self.block_q = max(16, min(64, _power_of_2(self.queries), 16384 // self.block_d))
        self.q_blocks = -(-self.queries // self.block_q)
        self.block_n = min(64, max(16, 2**16 // (self.block_d * x.element_size())))
        self.warps = 8 if self.block_q * self.block_d >= 16384 else 4
        at_once = 2 * _processors(x.device)
        least = 4 * self.block_n
        if offsets is None:
            wanted = max(1, at_once // max(1, self.batch * self.q_blocks))
            self.chunk = max(least, _round_up(-(-self.tokens // wanted), self.block_n))
            self.chunks_per_set = max(1, -(-self.tokens // self.chunk))
            self.chunks = self.batch * self.chunks_per_set
            self.first_chunk = self.chunk_set = None
        else:
            total = x.shape[0]
            self.chunk = max(least, _round_up(total * self.q_blocks // (2 * at_once), self.block_n))
            self.chunks_per_set = 0
            # an upper bound, known without asking the device: programs beyond the last chunk have nothing to do
            self.chunks = total // self.chunk + self.batch
            counts = ((offsets.diff() + self.chunk - 1) // self.chunk).clamp(min=1)
            self.first_chunk = F.pad(counts.cumsum(0), (1, 0))
            places = torch.arange(self.chunks, device=x.device)
            owners = torch.searchsorted(self.first_chunk, places, right=True) - 1
            self.chunk_set = owners.clamp(max=self.batch - 1).to(torch.int32)
        self.set_stride = x.stride(0) if offsets is None else 0
        self.row_stride = x.stride(-2)
        self.programs = min(self.chunks, max(1, at_once // self.q_blocks))

    def numbers(self, settings: _Settings) -> dict[str, Any]:
        return {
            "set_stride": self.set_stride,
            "row_stride": self.row_stride,
            "q_set_stride": self.queries * self.dim if self.per_set else 0,
            "batch": self.batch,
            "queries": self.queries,
            "dim": self.dim,
            "tokens": self.tokens,
            "chunk": self.chunk,
            "chunks_per_set": self.chunks_per_set,
            "q_blocks": self.q_blocks,
            "scale": settings.scale,
            "eps": settings.eps,
        }

    def tiles(self) -> list[dict[str, int]]:
        """Sizes of tiles and numbers of pipeline stages to try, the best first: smaller chips have less shared memory."""
        sizes = [self.block_n]
        while sizes[-1] > 16:
            sizes.append(sizes[-1] // 2)
        return [{"BLOCK_N": n, "num_stages": stages} for stages in (2, 1) for n in sizes]


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        queries: Tensor,
        bias: Tensor | None,
        mask: Bool[Tensor, "batch tokens"] | None,
        offsets: Int[Tensor, "batch_plus_1"] | None,
        settings: _Settings,
    ) -> tuple[Tensor, Tensor]:
        from cenote.core import triton_kernels as kernels

        at = _Layout(x, queries, offsets)
        y = x.new_empty((at.batch, at.queries, at.dim))
        lse = x.new_empty((at.batch, at.queries), dtype=torch.float32)
        several = at.ragged or at.chunks_per_set > 1
        part = part_top = part_mass = None
        if several:
            part = x.new_empty((at.chunks, at.queries, at.dim), dtype=torch.float32)
            part_top, part_mass = x.new_empty((2, at.chunks, at.queries), dtype=torch.float32).unbind()
        _launch(
            kernels.forward,
            at.chunks * at.q_blocks,
            at,
            x=x,
            q=queries,
            bias=bias,
            mask=mask,
            offsets=offsets,
            first_chunk=at.first_chunk,
            chunk_set=at.chunk_set,
            y=y,
            lse=lse,
            part=part,
            part_top=part_top,
            part_mass=part_mass,
            SEVERAL=several,
            **at.numbers(settings),
            **_kinds(at, bias, mask, settings, x),
        )
        if several and at.batch:
            kernels.join_chunks[(at.batch * at.queries,)](
                y,
                lse,
                part,
                part_top,
                part_mass,
                at.first_chunk,
                at.queries,
                at.dim,
                at.chunks_per_set,
                BLOCK_D=at.block_d,
                RAGGED=at.ragged,
            )
        ctx.save_for_backward(x, queries, bias, mask, offsets, y, lse)
        ctx.at, ctx.settings = at, settings
        return y, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gy: Tensor, glse: Tensor) -> tuple[Tensor | None, ...]:
        from cenote.core import triton_kernels as kernels

        x, queries, bias, mask, offsets, y, lse = ctx.saved_tensors
        at, settings = ctx.at, ctx.settings
        gy = gy.to(x.dtype).contiguous()
        delta = (gy.float() * y.float()).sum(-1) - glse
        shared = {
            "x": x,
            "q": queries,
            "bias": bias,
            "mask": mask,
            "offsets": offsets,
            "first_chunk": at.first_chunk,
            "chunk_set": at.chunk_set,
            "lse": lse,
            "gy": gy,
            "delta": delta,
            **at.numbers(settings),
            **_kinds(at, bias, mask, settings, x),
        }
        gx = gq = gbias = None
        if ctx.needs_input_grad[1]:
            programs = at.chunks if at.per_set else at.programs
            parts = torch.empty((programs, at.queries, at.dim), dtype=torch.float32, device=x.device)
            _launch(
                kernels.backward_queries,
                programs * at.q_blocks,
                at,
                gq=parts,
                chunk_count=at.chunks,
                programs=programs,
                PER_SET=at.per_set,
                **shared,
            )
            if not at.per_set:
                gq = parts.sum(0)
            elif at.ragged:
                gq = parts.new_zeros(queries.shape).index_add(0, at.chunk_set, parts)
            else:
                gq = parts.view(at.batch, at.chunks_per_set, at.queries, at.dim).sum(1)
            gq = gq.to(queries.dtype)
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[2]:
            gx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            gbias = None if bias is None else torch.empty_like(bias)
            _launch(kernels.backward_tokens, at.chunks, at, gx=gx, gbias=gbias, **shared)
        return gx if ctx.needs_input_grad[0] else None, gq, gbias, None, None, None


def _kinds(
    at: _Layout, bias: Tensor | None, mask: Tensor | None, settings: _Settings, x: Tensor
) -> dict[str, bool | str]:
    exact = x.dtype != torch.float32 or not torch.backends.cuda.matmul.allow_tf32
    return {
        "RAGGED": at.ragged,
        "MASK": mask is not None,
        "BIAS": bias is not None,
        "NORM_KEYS": settings.norm_keys,
        "NORM_VALUES": settings.norm_values,
        "PRECISION": "ieee" if exact else "tf32",
    }


def _launch(kernel: Any, grid: int, at: _Layout, **arguments: Any) -> None:
    if not grid:
        return
    from triton.runtime.errors import OutOfResources

    tiles = at.tiles()
    for i, tile in enumerate(tiles):
        try:
            kernel[(grid,)](**arguments, BLOCK_Q=at.block_q, BLOCK_D=at.block_d, num_warps=at.warps, **tile)
        except OutOfResources:
            if i == len(tiles) - 1:
                raise
        else:
            return


def _require(tokens: Tokens, queries: Tensor, bias: Tensor | None, normalise: str) -> None:
    shared, per_set = queries.dim() == 2, queries.dim() == 3 and queries.shape[0] == tokens.batch
    if not (shared or per_set) or queries.shape[-1] != tokens.dim:
        raise InputError(
            f"queries: expected [queries, {tokens.dim}] for all sets or [{tokens.batch}, queries, {tokens.dim}] for each, "
            f"got shape {tuple(queries.shape)}"
        )
    if bias is not None and bias.shape != tokens.values.shape[:-1]:
        raise InputError(
            f"bias: expected one number per token, shape {tuple(tokens.values.shape[:-1])}, got {tuple(bias.shape)}"
        )
    require_one_of(("none", "keys", "values", "both"), normalise=normalise)


def _power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else INTERPRETED


INTERPRETED = 4
"""Processors that Triton's interpreter is taken to have."""
