import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cenote.core import InputError
from cenote.core.grouped import attend, gathered

GROUPS = [1, 3, 4, 8]


def drawn(group: int, queries: int = 1, keys: int = 11, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(group)
    q = torch.randn(batch, 2 * group, queries, 8, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, batch, 2, keys, 8, generator=generator, dtype=torch.float64)
    return q, k, v


def written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    readable: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    if readable is not None:
        scores = scores.masked_fill(~readable, -torch.inf)
    if sinks is not None:
        beside = sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return torch.cat([scores, beside], -1).softmax(-1)[..., :-1] @ v
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("queries", [1, 3])
def test_grouped_rows_are_attention_with_repeated_keys(group: int, queries: int) -> None:
    q, k, v = drawn(group, queries)
    torch.testing.assert_close(attend(q, k, v), written_out(q, k, v))


@pytest.mark.parametrize("heads", ["one", "key heads", "heads"])
@pytest.mark.parametrize("queries", [1, 3])
def test_masks_of_one_head_of_key_heads_and_of_heads(heads: str, queries: int) -> None:
    q, k, v = drawn(3, queries)
    own = {"one": 1, "key heads": 2, "heads": 6}[heads]
    readable = torch.rand(2, own, queries, 11, generator=torch.Generator().manual_seed(0)) < 0.6
    readable[..., 0] = True
    full = readable.repeat_interleave(6 // own, 1)
    torch.testing.assert_close(attend(q, k, v, readable=readable), written_out(q, k, v, full))
    bias = torch.randn(1, own, queries, 11, dtype=torch.float64)
    both = attend(q, k, v, readable=readable, bias=bias)
    torch.testing.assert_close(both, written_out(q, k, v, full, bias.repeat_interleave(6 // own, 1)))


@pytest.mark.parametrize("queries", [1, 2])
def test_soft_caps_and_sinks(queries: int) -> None:
    q, k, v = drawn(4, queries)
    readable = torch.ones(2, 1, 1, 11, dtype=torch.bool)
    readable[0, ..., :3] = False
    sinks = torch.linspace(-1.0, 2.0, 8, dtype=torch.float64)
    found = attend(q, k, v, readable=readable, softcap=2.0, sinks=sinks)
    torch.testing.assert_close(found, written_out(q, k, v, readable, softcap=2.0, sinks=sinks))


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_query_that_may_read_nothing_is_zero(softcap: float | None) -> None:
    q, k, v = drawn(2)
    readable = torch.zeros(2, 1, 1, 11, dtype=torch.bool)
    readable[1, ..., 4] = True
    found = attend(q, k, v, readable=readable, softcap=softcap)
    assert found[0].eq(0).all()
    torch.testing.assert_close(found[1, :2, 0], v[1, :1, 4].expand(2, -1))


@pytest.mark.parametrize("batch", [1, 40])
@pytest.mark.parametrize("heads", [2, 6])
def test_gathered_keys_are_those_of_their_head(batch: int, heads: int) -> None:
    _, k, _ = drawn(1, batch=batch)
    numbers = torch.randint(11, (batch, heads, 5), generator=torch.Generator().manual_seed(0))
    found = gathered(k, numbers)
    for item in range(batch):
        for head in range(heads):
            assert torch.equal(found[item, head], k[item, head // (heads // 2)][numbers[item, head]])


def test_half_precision_reads_the_same() -> None:
    q, k, v = (x.bfloat16() for x in drawn(3))
    expected = F.scaled_dot_product_attention(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1))
    torch.testing.assert_close(attend(q, k, v), expected)


def test_heads_that_are_no_groups() -> None:
    q, k, v = drawn(1)
    with pytest.raises(InputError, match="q: expected a multiple of the 2 heads of the keys, got 3 heads"):
        attend(torch.cat([q, q[:, :1]], 1), k, v)
    with pytest.raises(InputError, match="expected 1, 2 or 2 heads, got 5"):
        attend(q, k, v, readable=torch.ones(1, 5, 1, 11, dtype=torch.bool))
