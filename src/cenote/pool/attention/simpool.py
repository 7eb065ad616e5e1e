import torch
from jaxtyping import Float
from torch import Tensor, nn

from cenote.core.attention import Plan, cross_attention
from cenote.core.errors import InputError
from cenote.core.sets import Tokens
from cenote.core.widths import require_divides
from cenote.pool.attention.blocks import shifted_power_mean
from cenote.pool.base import Pooled, QueryPool


class SimPool(QueryPool):
    """Attention from the mean of the tokens, over normalised keys, with the normalised tokens themselves as values.

    `q = W_q mean_n x_n`, `k_n = W_k LN(x_n)`, `v_n = LN(x_n)`, `a = softmax_n(q . k_n / sqrt(dim/heads))` per head;
    `y = sum_n a_n v_n`, or with `gamma` the power mean of shifted values `v+ = v - min(v) + 1e-6`:
    `y = (sum_n a_n (v+_n)^gamma)^(1/gamma) + beta`.

    Args:
        dim: width of a token.
        heads: attention heads, each owning a slice of the channels; divides `dim`.
        gamma: exponent of the power mean; the authors recommend 1.25 for ViTs, 2 for CNNs. `None`: a weighted mean.
        beta: whether a learned scalar is added to the power mean.
        qkv_bias: whether `W_q`, `W_k` have biases.
        plan: see `cenote.core.cross_attention`.

    Example:
        >>> pool = SimPool(16, gamma=1.25)
        >>> output, weights = pool.attend(torch.randn(2, 9, 16))
        >>> output.shape, weights.shape
        (torch.Size([2, 16]), torch.Size([2, 1, 9]))

    Source: Psomas et al., "Keep It SimPool: Who Said Supervised Transformers Suffer from Attention Deficit?", ICCV 2023.

    Note:
        The minimum that shifts the values is taken over each set; the authors' code takes it over the whole batch, so that
        an item's result depends on its batch mates. With several heads and `gamma` their code leaves the heads unmerged;
        here they stand side by side.
    """

    inert_parameters = ("wk.bias",)

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        gamma: float | None = None,
        beta: bool = False,
        qkv_bias: bool = False,
        plan: Plan = "auto",
    ) -> None:
        super().__init__(dim)
        require_divides("heads", heads, dim)
        if gamma is not None and gamma <= 0:
            raise InputError(f"gamma: expected a positive exponent or None, got {gamma}")
        if beta and gamma is None:
            raise InputError("beta: is added to the power mean, so it needs gamma; give gamma or leave beta out")
        self.heads = heads
        self.gamma = gamma
        self.plan = plan
        self.norm_patches = nn.LayerNorm(dim, eps=1e-6)
        self.wq = nn.Linear(dim, dim, bias=qkv_bias)
        self.wk = nn.Linear(dim, dim, bias=qkv_bias)
        self.beta = nn.Parameter(torch.zeros(1)) if beta else None

    def attended(self, tokens: Tokens, need_weights: bool) -> Pooled:
        query = self.wq(tokens.mean()).unsqueeze(1)
        output, weights = cross_attention(
            tokens,
            query,
            key=self.wk,
            heads=self.heads,
            key_norm=self.norm_patches,
            value_norm=self.norm_patches,
            plan=self.plan,
            need_weights=need_weights or self.gamma is not None,
        )
        if self.gamma is None:
            return Pooled(output.squeeze(1), weights)
        values = self.norm_patches(tokens.values)
        y = shifted_power_mean(tokens, values, self.value_minimum(tokens, values), self.gamma, weights)
        return Pooled(y if self.beta is None else y + self.beta, weights)

    def value_minimum(self, tokens: Tokens, values: Float[Tensor, "*rows dim"]) -> Float[Tensor, "batch 1"]:
        """The number that shifts each set's values to be positive."""
        return tokens.min(values).amin(-1, keepdim=True)
