import torch
from tests.pools import features

from cenote.core import Bags
from cenote.pool import ClsMeanPool, ClsPool
from cenote.testing import check_pool


def test_cls_is_the_first_real_token() -> None:
    x = features(2, 4)
    mask = torch.tensor([[False, True, True, False], [True, True, True, True]])
    expected = torch.stack([x[0, 1], x[1, 0]])
    torch.testing.assert_close(ClsPool(16)(x), x[:, 0])
    torch.testing.assert_close(ClsPool(16)(x, mask), expected)
    torch.testing.assert_close(ClsPool(16)(Bags.from_padded(x, mask)), expected)


def test_cls_mean_keeps_registers_out_of_the_mean() -> None:
    x = features(2, 7)
    pool = ClsMeanPool(16, prefix_tokens=3)
    assert pool.out_dim == 32
    torch.testing.assert_close(pool(x), torch.cat([x[:, 0], x[:, 3:].mean(1)], -1))
    torch.testing.assert_close(pool(Bags.from_padded(x)), pool(x))
    check_pool(pool)


def test_cls_mean_without_patches_has_a_mean_of_zeros() -> None:
    x = features(1, 1)
    torch.testing.assert_close(ClsMeanPool(16)(x), torch.cat([x[:, 0], torch.zeros(1, 16)], -1))


def test_prefix_tokens_are_read() -> None:
    assert ClsPool.prefix == ClsMeanPool.prefix == "keep"
    assert ClsPool.reads_cls
    assert ClsMeanPool.reads_cls
