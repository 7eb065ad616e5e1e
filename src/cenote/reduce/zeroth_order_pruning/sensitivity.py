"""How strongly a map's output moves with each token, and the greedy choice of sensitive tokens that differ."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.requirements import require_at_least, require_one_of, require_positive

Project = Callable[[Tensor], Tensor]
Rule = Literal["product", "sum", "sensitivity", "diversity"]
RULES = ("product", "sum", "sensitivity", "diversity")
SAME = 1e-6
"""Of cosines: what differs by less is the same direction."""


@torch.no_grad()
def sensitivity(
    project: Project,
    x: Float[Tensor, "batch tokens dim"],
    directions: int = 64,
    step: float = 0.01,
    *,
    relative: bool = False,
    mean: Literal["norms", "squares"] = "norms",
    seed: int = 0,
    mask: Bool[Tensor, "batch tokens"] | None = None,
    group: int = 1,
    rows: int = 8192,
) -> Float[Tensor, "batch groups"]:
    """How far a map's output moves when a token is pushed both ways, by forward passes alone.

    `S_i = mean_j |M(x_i + h u_j) - M(x_i - h u_j)| / (2 h)`, `u_j` from `N(0, I)`, the same directions for all tokens:
    `E |J(x_i) u|` up to the square of the step. Where the tokens of a set differ by less than rounding can make, as behind a
    linear map, all are equal.

    Args:
        project: the map, from `[any, dim]` to `[any, width]`, of each token by itself.
        x: the tokens; half precision is computed in float32.
        directions: `m`.
        step: `h`; as large as 1 and as small as 1e-4 are fine in float32.
        relative: of the root mean square of the set's features.
        mean: of the norms, or of their squares, which is near the squared Frobenius norm of the Jacobian.
        seed: of the directions.
        mask: True = a real token, None for all; 0 elsewhere.
        group: so many tokens in turn are one, as where a projector merges 2 x 2 patches: these are pushed together, and
            `project` is given them in turn, `[any * group, dim]`.
        rows: of the map's input in one pass.

    Source:
        Kim et al. 2025, "Training-Free Token Pruning via Zeroth-Order Gradient Estimation in Vision-Language Models", arXiv
        2509.24837.
    """
    require_at_least(1, directions=directions, group=group, rows=rows)
    require_positive(step=step)
    require_one_of(("norms", "squares"), mean=mean)
    flat, real = _grouped(x, mask, group)
    run = _of_groups(project, group, x.shape[2])
    batch, tokens, dim = flat.shape
    if not flat.numel():
        return flat.new_zeros(batch, tokens)
    u = torch.randn(directions, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    u = u.to(flat)
    h = flat.new_full((batch, 1, 1), step)
    if relative:
        power = flat.square().mean(-1).masked_fill(~real, 0.0).sum(1) / real.sum(1).clamp(min=1)
        h = h * torch.where(power > 0, power.sqrt(), torch.ones_like(power))[:, None, None]
    total = flat.new_zeros(batch, tokens)
    largest = flat.new_zeros(batch, tokens)
    at_once = max(1, rows // (2 * batch * tokens))
    for some in u.split(at_once):
        push = h[None] * some[:, None, None]
        there, back = run(torch.stack([flat + push, flat - push]))
        norms = ((there - back) / (2 * h)).norm(dim=-1)
        total = total + (norms if mean == "norms" else norms.square()).sum(0)
        largest = torch.maximum(largest, there.norm(dim=-1).amax(0))
    found = (total / directions).masked_fill(~real, 0.0)
    noise = torch.finfo(flat.dtype).eps * largest.masked_fill(~real, 0.0).amax(1) / h[:, 0, 0]
    if mean == "squares":
        noise = noise * 2 * found.amax(1).sqrt()
    return _levelled(found, real, noise)


def exact_sensitivity(
    project: Project,
    x: Float[Tensor, "batch tokens dim"],
    *,
    mask: Bool[Tensor, "batch tokens"] | None = None,
    group: int = 1,
) -> Float[Tensor, "batch groups"]:
    """The Frobenius norm of the map's Jacobian at each token, by automatic differentiation: to check `sensitivity` with.

    `E |J u|^2 = |J|_F^2`. Costs as many backward passes as the output is wide.

    Args:
        project, x, mask, group: as in `sensitivity`.
    """
    flat, real = _grouped(x, mask, group)
    run = _of_groups(project, group, x.shape[2])
    with torch.enable_grad():
        given = flat.detach().clone().requires_grad_()
        out = run(given)
        total = torch.zeros_like(flat[..., 0])
        for channel in range(out.shape[-1]):
            (gradient,) = torch.autograd.grad(out[..., channel].sum(), given, retain_graph=True)
            total = total + gradient.square().sum(-1)
    return total.sqrt().masked_fill(~real, 0.0)


def select(
    sensitivity: Float[Tensor, "batch tokens"],
    z: Float[Tensor, "batch tokens width"],
    counts: Int[Tensor, "batch"],
    mask: Bool[Tensor, "batch tokens"] | None = None,
    rule: Rule = "product",
) -> Int[Tensor, "batch most"]:
    """Tokens in the order in which they are chosen: first the most sensitive one, then always that of the largest
    `S_i (1 - max_{j chosen} cos(z_i, z_j))`, `S` scaled to [0, 1] over the set; -1 behind a set's last.

    Where all are equally sensitive, `S` is 1. Where all products are 0, tokens like none that is chosen come first, then
    the more sensitive ones, then those of lower number.

    Args:
        sensitivity: `S`, of any scale.
        z: what the tokens are compared by, the projector's output.
        counts: how many are chosen of each set, at most as many as there are.
        mask: True = a real token, None for all.
        rule: `"product"`; their `"sum"`; `"sensitivity"` alone; `"diversity"` alone, from the token that is least like its
            nearest neighbour on.

    Example:
        >>> z = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
        >>> select(torch.tensor([[3.0, 2.0, 1.5]]), z, torch.tensor([2])).tolist()
        [[0, 2]]

    Source:
        Kim et al. 2025, arXiv 2509.24837; diversity alone as in DivPrune, Alvar et al. 2025, arXiv 2503.02175.
    """
    require_one_of(RULES, rule=rule)
    if sensitivity.shape != z.shape[:2]:
        raise InputError(f"sensitivity: expected {list(z.shape[:2])} as the tokens, got {list(sensitivity.shape)}")
    mask = torch.ones_like(sensitivity, dtype=torch.bool) if mask is None else mask
    batch = len(sensitivity)
    lengths = mask.sum(1)
    counts = torch.minimum(counts, lengths)
    most = int(counts.max()) if counts.numel() else 0
    found = torch.full((batch, most), -1, dtype=torch.long, device=z.device)
    if not most:
        return found
    unit = torch.nn.functional.normalize(z.detach().float() if z.dtype.itemsize < 4 else z.detach(), dim=-1)
    scaled = torch.ones_like(unit[..., 0]) if rule == "diversity" else _scaled(sensitivity.detach().to(unit), mask)
    free = mask.clone()
    nearest = torch.full_like(scaled, -torch.inf)
    first = _apart(unit, mask) if rule == "diversity" else scaled
    item = torch.arange(batch, device=z.device)
    for turn in range(most):
        apart = 1 - nearest
        apart = torch.where(apart < SAME, torch.zeros_like(apart), apart)
        if not turn:
            score = first
        elif rule == "sensitivity":
            score = scaled
        else:
            score = scaled + apart if rule == "sum" else scaled * apart
            stuck = score.masked_fill(~free, -torch.inf).amax(1, keepdim=True) <= 0
            score = torch.where(stuck, scaled + 2.0 * (apart > 0), score)
        chosen = score.masked_fill(~free, -torch.inf).argmax(1)
        found[:, turn] = torch.where(turn < counts, chosen, -1)
        free[item, chosen] = False
        nearest = torch.maximum(nearest, (unit @ unit[item, chosen][..., None])[..., 0])
    return found


def losses_left_out(
    loss: Callable[[Bool[Tensor, "batch tokens"]], Float[Tensor, "batch"]], span: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, "batch tokens"]:
    """How much a loss rises when one token of a span is left out; 0 elsewhere.

    Args:
        loss: of a model that goes on with these tokens alone; run once with all, and once for each token of the longest span.
        span: the tokens that are left out in turn.
    """
    everything = torch.ones_like(span)
    whole = loss(everything)
    found = torch.zeros(span.shape, dtype=whole.dtype, device=whole.device)
    order = span.cumsum(1)
    for number in range(1, int(order.max()) + 1):
        one = span & (order == number)
        rise = loss(everything & ~one) - whole
        found = torch.where(one, rise[:, None], found)
    return found


def _scaled(sensitivity: Float[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"]) -> Tensor:
    """From 0 to 1 over the tokens of each set; 1 for all where they are equal."""
    low = sensitivity.masked_fill(~mask, torch.inf).amin(1, keepdim=True)
    high = sensitivity.masked_fill(~mask, -torch.inf).amax(1, keepdim=True)
    spread = high - low
    alike = ~(spread > 0)
    return torch.where(alike, torch.ones_like(sensitivity), (sensitivity - low) / spread.masked_fill(alike, 1.0))


def _apart(
    unit: Float[Tensor, "batch tokens width"], mask: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, "batch tokens"]:
    """How unlike each token is to its nearest neighbour."""
    tokens = unit.shape[1]
    nearest = torch.full_like(unit[..., 0], -torch.inf)
    for start in range(0, tokens, 256):
        cosines = unit[:, start : start + 256] @ unit.mT
        at = torch.arange(start, min(start + 256, tokens), device=unit.device)
        cosines[:, torch.arange(len(at)), at] = -torch.inf
        nearest[:, start : start + 256] = cosines.masked_fill(~mask[:, None], -torch.inf).amax(-1)
    return 1 - nearest


def _levelled(
    found: Float[Tensor, "batch tokens"], real: Bool[Tensor, "batch tokens"], noise: Float[Tensor, "batch"]
) -> Float[Tensor, "batch tokens"]:
    """The same, equal where a set's tokens differ by rounding alone."""
    low = found.masked_fill(~real, torch.inf).amin(1)
    high = found.masked_fill(~real, -torch.inf).amax(1)
    alike = (high - low <= noise)[:, None] & real
    return torch.where(alike, high[:, None], found)


def _grouped(x: Tensor, mask: Tensor | None, group: int) -> tuple[Tensor, Tensor]:
    if x.dim() != 3:
        raise InputError(f"x: expected [batch, tokens, dim], got {list(x.shape)}")
    batch, tokens, dim = x.shape
    if tokens % group:
        raise InputError(f"group: {tokens} tokens cannot be put together by {group}")
    real = torch.ones(batch, tokens, dtype=torch.bool, device=x.device) if mask is None else mask
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    wide = wide.masked_fill(~real[..., None], 0.0)
    return wide.reshape(batch, tokens // group, group * dim), real.view(batch, -1, group).any(-1)


def _of_groups(project: Project, group: int, dim: int) -> Project:
    wide = in_float32(project)

    def run(x: Tensor) -> Tensor:
        y = wide(x.reshape(-1, dim))
        if y.dim() != 2 or len(y) * group * dim != x.numel():
            raise InputError(
                f"project: gave {list(y.shape)} for {x.numel() // dim} tokens in groups of {group}; expected one row for each "
                f"group"
            )
        return y.view(*x.shape[:-1], -1)

    return run


def in_float32(project: Project) -> Project:
    """The same map, a copy in float32 where its parameters are of half precision."""
    if isinstance(project, nn.Module):
        halves = (torch.float16, torch.bfloat16)
        if any(p.dtype in halves for p in project.parameters()):
            return copy.deepcopy(project).float()
    return project
