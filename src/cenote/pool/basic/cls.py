import torch
from jaxtyping import Float
from torch import Tensor

from cenote.core.sets import Tokens
from cenote.pool.base import Pool, Pooled
from cenote.pool.basic.positions import all_of


class ClsPool(Pool):
    """The first token: [CLS] where the backbone has one.

    `y = x_0`

    Args:
        dim: width of a token.

    Example:
        >>> ClsPool(1)(torch.tensor([[[7.0], [3.0]]])).tolist()
        [[7.0]]
    """

    permutation_invariant = False
    prefix = "keep"
    reads_cls = True

    def __init__(self, dim: int) -> None:
        super().__init__(dim)

    def pool(self, tokens: Tokens) -> Pooled:
        return Pooled(self.pool_only(tokens), all_of(tokens, torch.zeros_like(tokens.lengths())))

    def pool_only(self, tokens: Tokens) -> Float[Tensor, "batch dim"]:
        return tokens.token(0)


class ClsMeanPool(Pool):
    """[CLS] joined with the mean of the patch tokens, as DINOv2's own linear probe reads its backbone.

    `y = [x_0 ; mean_{n >= P} x_n]`, with `P` prefix tokens ([CLS] and registers) that stay out of the mean. The weights have a
    head for each half.

    Args:
        dim: width of a token; the output is twice as wide.
        prefix_tokens: `P`, at least 1.

    Example:
        >>> ClsMeanPool(1)(torch.tensor([[[7.0], [3.0], [5.0]]])).tolist()
        [[7.0, 4.0]]

    Source: Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", 2023.
    """

    permutation_invariant = False
    prefix = "keep"
    reads_cls = True

    def __init__(self, dim: int, prefix_tokens: int = 1) -> None:
        super().__init__(dim, 2 * dim)
        self.prefix_tokens = prefix_tokens

    def pool(self, tokens: Tokens) -> Pooled:
        count = (tokens.lengths() - self.prefix_tokens).clamp(min=1).to(tokens.values.dtype)
        in_mean = (tokens.positions() >= self.prefix_tokens) / tokens.spread(count)
        weights = torch.cat([all_of(tokens, torch.zeros_like(tokens.lengths())), in_mean.unsqueeze(-1)], -1)
        return Pooled(self.pool_only(tokens), weights)

    def pool_only(self, tokens: Tokens) -> Float[Tensor, "batch out_dim"]:
        return torch.cat([tokens.token(0), tokens.drop_first(self.prefix_tokens).mean()], -1)
