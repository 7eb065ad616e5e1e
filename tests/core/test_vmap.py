"""Many copies of one pool run side by side under torch.func.vmap, over parameters that differ and tokens that do not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cenote.core import PaddedTokens, Tokens, cross_attention, power_mean
from cenote.core.attention import Projection
from tests.core.batches import make_batch

COPIES, DIM, HEADS = 3, 4, 2
BATCH = make_batch([3, 0, 4], DIM, 0, 5)
DENSE = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

FORMS: dict[str, Callable[[], Tokens]] = {
    "padded": lambda: PaddedTokens(torch.stack([BATCH.sets[2]] * 2)),
    "masked": lambda: PaddedTokens(BATCH.x, BATCH.mask),
    "map": lambda: PaddedTokens(DENSE.transpose(1, 2)),
    "ragged": BATCH.bags,
}


def drawn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(COPIES, *shape, dtype=torch.float64, generator=generator)


def attention(tokens: Tokens, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    norm = nn.LayerNorm(DIM, dtype=torch.float64)
    return cross_attention(
        tokens,
        query,
        key=Projection(key),
        value=Projection(value, bias),
        heads=HEADS,
        key_norm=norm,
        value_norm=norm,
        plan="absorbed",
    ).output


def query_per_set(tokens: Tokens, weight: Tensor) -> Tensor:
    query = (tokens.mean() @ weight).unsqueeze(1)
    return cross_attention(tokens, query, plan="projected").output


def statistics(tokens: Tokens, weight: Tensor) -> Tensor:
    mapped = tokens.replace(tokens.values @ weight)
    return torch.cat(
        [mapped.mean(), mapped.std(), mapped.max(), mapped.logsumexp(mapped.values), mapped.token(-1)],
        -1,
    )


def powers(tokens: Tokens, p: Tensor) -> Tensor:
    return power_mean(tokens, tokens.values.exp(), p)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (attention, (drawn(1, 6), drawn(6, DIM), drawn(8, DIM), drawn(8))),
        (query_per_set, (drawn(DIM, DIM),)),
        (statistics, (drawn(DIM, 3),)),
        (powers, (drawn(DIM),)),
    ],
    ids=["attention", "query per set", "statistics", "power mean"],
)
def test_side_by_side_as_one_by_one(form: str, function: Callable[..., Tensor], parameters: tuple[Tensor, ...]) -> None:
    tokens = FORMS[form]()

    def gradients_and_value(*parameters: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        def loss(*parameters: Tensor) -> tuple[Tensor, Tensor]:
            y = function(tokens, *parameters)
            return y.sin().sum(), y

        return torch.func.grad(loss, argnums=tuple(range(len(parameters))), has_aux=True)(*parameters)

    gradients, y = torch.func.vmap(gradients_and_value)(*parameters)
    for i in range(COPIES):
        alone_gradients, alone = gradients_and_value(*(p[i] for p in parameters))
        torch.testing.assert_close(y[i], alone, atol=1e-12, rtol=1e-12)
        for a, b in zip(gradients, alone_gradients, strict=True):
            torch.testing.assert_close(a[i], b, atol=1e-12, rtol=1e-12)
