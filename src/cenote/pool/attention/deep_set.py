from collections.abc import Callable
from functools import partial
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from cenote.core.requirements import require_one_of
from cenote.core.sets import Tokens
from cenote.core.tokenwise import tokenwise
from cenote.pool.attention.efficient_probing import EfficientProbing
from cenote.pool.attention.pma import PMA
from cenote.pool.base import Pool, Pooled
from cenote.pool.basic.max import MaxPool
from cenote.pool.basic.mean import MeanPool
from cenote.pool.basic.sum import SumPool


class DeepSet(Pool):
    """Deep Sets, the baseline without attention: a network on each token, a mean, a network on the mean.

    `y = g((1/N) sum_n f(x_n))` with `f`, `g` of four linear layers each and ReLUs between them.

    Args:
        dim: width of a token.
        out_dim: width of an output vector; default `dim`.
        seeds: number of output vectors.
        hidden: width inside.
        reduce: `"mean"`, `"sum"` or `"max"` over the tokens; or, between the two networks, attention: `"attention"` from one
            learned query, `"pma"` from one seed. The weights that `attend` shows are those of this pooling inside.

    Example:
        >>> DeepSet(2, out_dim=5, seeds=4)(torch.randn(3, 50, 2)).shape
        torch.Size([3, 4, 5])

    Source: Zaheer et al., "Deep Sets", NeurIPS 2017, in the form of the baseline of Lee et al., ICML 2019.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int | None = None,
        seeds: int = 1,
        hidden: int = 128,
        reduce: Literal["mean", "sum", "max", "attention", "pma"] = "mean",
    ) -> None:
        super().__init__(dim, out_dim)
        kinds: dict[str, Callable[[int], Pool]] = {
            "mean": MeanPool,
            "sum": SumPool,
            "max": MaxPool,
            "attention": partial(EfficientProbing, queries=1),
            "pma": PMA,
        }
        require_one_of(kinds, reduce=reduce)
        self.vectors = seeds
        self.inside = kinds[reduce](hidden)
        self.inert_parameters = tuple(f"inside.{name}" for name in self.inside.inert_parameters)
        self.enc = _four_layers(dim, hidden, hidden)
        self.dec = _four_layers(hidden, hidden, seeds * self.out_dim)

    def pool(self, tokens: Tokens) -> Pooled:
        encoded = tokens.replace(tokenwise(self.enc, tokens.values))
        # of the pool inside: what the code of a set took from the code of each token
        code, weights = self.inside.pool(encoded)
        return Pooled(self._decoded(code), weights)

    def pool_only(self, tokens: Tokens) -> Float[Tensor, "batch *vectors out_dim"]:
        return self._decoded(self.inside.pool_only(tokens.replace(tokenwise(self.enc, tokens.values))))

    def _decoded(self, code: Float[Tensor, "batch hidden"]) -> Float[Tensor, "batch *vectors out_dim"]:
        y = self.dec(code)
        return y if self.vectors == 1 else y.unflatten(-1, (self.vectors, self.out_dim))


def _four_layers(width_in: int, hidden: int, width_out: int) -> nn.Sequential:
    widths = [width_in, hidden, hidden, hidden, width_out]
    layers: list[nn.Module] = []
    for i in range(4):
        layers += [nn.Linear(widths[i], widths[i + 1]), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
