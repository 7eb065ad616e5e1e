import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import cenote
from cenote.reduce import ResidualCodec


def unit(n: int, seed: int = 0) -> Tensor:
    return normalize(torch.randn(n, 16, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_error_is_within_a_vectors_own_buckets(bits: int) -> None:
    x = unit(600)
    codec = ResidualCodec(32, bits=bits, unit_norm=False).fit(x)
    codes = codec.encode(x)
    assert codec.centroids is not None
    residual = x - codec.centroids[codes.centroids.long()]
    edges = torch.cat([residual.min()[None], codec.cuts, residual.max()[None]])
    width = edges.diff()[torch.bucketize(residual, codec.cuts)]
    assert bool(((codec.decode(codes) - x).abs() <= width + 1e-6).all())
    assert codes.nbytes == 600 * (4 + 2 * bits)


def test_more_bits_are_nearer() -> None:
    x = unit(600)
    off = [
        float((c.decode(c.encode(x)) - x).norm(dim=1).mean())
        for b in (1, 2, 4, 8)
        for c in [ResidualCodec(32, bits=b).fit(x)]
    ]
    assert off == sorted(off, reverse=True)
    assert off[-1] < 0.02


def test_decoded_vectors_are_of_unit_length() -> None:
    codec = ResidualCodec(bits=2).fit(unit(200))
    decoded = codec.decode(codec.encode(unit(5, seed=1)))
    assert torch.allclose(decoded.norm(dim=1), torch.ones(5))
    assert codec.decode(codec.encode(unit(5)[:0])).shape == (0, 16)


def test_the_same_seed_gives_the_same_codes() -> None:
    first, second = (ResidualCodec(seed=3).fit(unit(300)).encode(unit(300)) for _ in range(2))
    assert torch.equal(first.residuals, second.residuals)


def test_wrong_use_is_told() -> None:
    with pytest.raises(cenote.InputError, match="codec: has no centroids yet"):
        ResidualCodec().encode(unit(2))
    with pytest.raises(cenote.InputError, match="bits: expected 1, 2, 4 or 8, got 3"):
        ResidualCodec(bits=3)
    with pytest.raises(cenote.InputError, match="bits: 3 dimensions of 2 bits do not fill whole bytes"):
        ResidualCodec().fit(torch.rand(9, 3))
    with pytest.raises(cenote.InputError, match="centroids: expected at most the 9 vectors, got 10"):
        ResidualCodec(10).fit(unit(9))
    with pytest.raises(cenote.InputError, match="x: holds NaN or infinity"):
        ResidualCodec().fit(unit(9) / 0)
    with pytest.raises(cenote.InputError, match=r"x: expected floating point \[n, 16\], got torch.float32 \[2, 3\]"):
        ResidualCodec().fit(unit(99)).encode(torch.rand(2, 3))
