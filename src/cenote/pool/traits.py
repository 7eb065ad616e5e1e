"""What pools of sets, of layer stacks and of graphs say of themselves before they are called."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import nn

from cenote.core.requirements import require_at_least


class Traits(nn.Module):
    """Widths of a pool, and what the probe and the contracts must know of it.

    Args:
        dim: width of a token.
        out_dim: width of an output vector; default `dim`.

    Attributes:
        dim: width of a token.
        out_dim: width of an output vector, known before the first call.
        vectors: number of output vectors per item, `k`; with one, the output is `[batch, out_dim]`.
        permutation_invariant: whether the order of the tokens leaves the output unchanged.
        prefix: what the pool does with prefix tokens ([CLS], registers): `"drop"`: it wants the patches alone;
            `"keep"`: it reads them as its input form says.
        reads_cls: whether it is meaningless on tokens without a [CLS].
        pairwise: whether tokens attend to each other, at a cost quadratic in their number.
        fixed_tokens: whether every set must have the number of tokens that the constructor was told (`tokens=`).
        inert_parameters: parameters that cannot change the output (a key bias drops out of a softmax), kept so that
            published weights load.
    """

    permutation_invariant: bool = True
    prefix: ClassVar[Literal["drop", "keep"]] = "drop"
    reads_cls: bool = False
    pairwise: bool = False
    fixed_tokens: ClassVar[bool] = False
    inert_parameters: tuple[str, ...] = ()

    dim: int
    out_dim: int
    vectors: int = 1

    def __init__(self, dim: int, out_dim: int | None = None) -> None:
        super().__init__()
        require_at_least(1, dim=dim)
        self.dim = dim
        self.out_dim = dim if out_dim is None else out_dim
