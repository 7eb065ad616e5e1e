from torch import nn

from cenote.core.attention import Plan, cross_attention
from cenote.core.sets import Tokens
from cenote.pool.attention.shifted_power import ShiftedPowerPool
from cenote.pool.base import Pooled


class SimPool(ShiftedPowerPool):
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
        super().__init__(dim, heads, gamma, beta, plan)
        self.wq = nn.Linear(dim, dim, bias=qkv_bias)
        self.wk = nn.Linear(dim, dim, bias=qkv_bias)

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
        return self.power_mean(tokens, self.norm_patches(tokens.values), weights)
