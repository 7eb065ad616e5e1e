"""Absorbed pooling on a GPU: bytes of tokens per second against a copy, and against attention that projects every token.

256 sets of 1,024 tokens of width 1,024 in bfloat16, 16 heads, one query. "Trained" is forward and backward with
frozen tokens. `MultiheadAttention` and "SDPA with projections" hold the same parameters as the pool; results are
compared in float32 first. Bytes are those of the tokens, once: what must be read. The copy reads and writes, so its
rate is twice its bytes over its time. Ends with exit code 2, and measures nothing, where there is no CUDA GPU or no
triton.

    python -m benchmarks.gpu [--json FILE] [--rounds N]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from benchmarks.timing import Pair, table, time_pair
from torch import Tensor, nn

from cenote.core import Bags, PaddedTokens, Tokens
from cenote.core.absorbed import absorbed_pool, available, installed

BATCH, TOKENS, DIM, HEADS = 256, 1024, 1024, 16
BANDWIDTH_WANTED, FASTER_WANTED = 0.7, 10


class LatentPool(nn.Module):
    """One learned query over the tokens: one set of weights, read by all ways of computing it."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, DIM))
        self.attention = nn.MultiheadAttention(DIM, HEADS, batch_first=True)

    def absorbed(self, tokens: Tokens, **more: str) -> Tensor:
        w_q, w_k, w_v = self.attention.in_proj_weight.chunk(3)
        b_q, _, b_v = self.attention.in_proj_bias.chunk(3)
        query = F.linear(self.query, w_q, b_q).unflatten(1, (HEADS, -1))[0]
        absorbed = torch.einsum("hw,hwd->hd", query, w_k.unflatten(0, (HEADS, -1)))
        sums = absorbed_pool(tokens, absorbed, scale=(DIM // HEADS) ** -0.5, **more).output  # type: ignore[arg-type]
        values = torch.einsum("bhd,hwd->bhw", sums, w_v.unflatten(0, (HEADS, -1))).flatten(1) + b_v
        return self.attention.out_proj(values)

    def multihead(self, x: Tensor) -> Tensor:
        return self.attention(self.query.expand(len(x), -1, -1), x, x, need_weights=False)[0].squeeze(1)

    def fused(self, x: Tensor) -> Tensor:
        w_q, w_k, w_v = self.attention.in_proj_weight.chunk(3)
        b_q, b_k, b_v = self.attention.in_proj_bias.chunk(3)
        query = F.linear(self.query, w_q, b_q).expand(len(x), -1, -1)
        q, k, v = (
            t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (query, F.linear(x, w_k, b_k), F.linear(x, w_v, b_v))
        )
        return self.attention.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)).squeeze(1)


def no_grad(call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return call()

    return run


def trained(pool: LatentPool, call: Callable[[], Tensor]) -> Callable[[], object]:
    upstream = torch.randn(BATCH, DIM, device="cuda", dtype=torch.bfloat16)
    return lambda: torch.autograd.grad(call(), list(pool.parameters()), upstream)


def require_close(pool: LatentPool, x: Tensor) -> None:
    few = x[:8].float()
    wide = LatentPool().cuda()
    wide.load_state_dict({name: value.float() for name, value in pool.state_dict().items()})
    right = wide.multihead(few)
    torch.testing.assert_close(wide.absorbed(PaddedTokens(few)), right, rtol=1e-4, atol=1e-4 * float(right.abs().max()))
    for ours in (pool.absorbed(PaddedTokens(x[:8])), pool.fused(x[:8])):
        torch.testing.assert_close(ours.float(), right, rtol=0.05, atol=0.05 * float(right.abs().max()))


def pairs() -> Iterator[tuple[Pair, int]]:
    """Each with the bytes of tokens that ours must read."""
    torch.manual_seed(0)
    x = torch.randn(BATCH, TOKENS, DIM, device="cuda", dtype=torch.bfloat16)
    assert available(x)
    pool = LatentPool().to("cuda", torch.bfloat16)
    require_close(pool, x)
    other = torch.empty_like(x)
    size = x.numel() * x.element_size()
    lengths = torch.randint(1, TOKENS + 1, (BATCH,), device="cuda")
    mask = torch.arange(TOKENS, device="cuda") < lengths.unsqueeze(1)
    bags, tokens = Bags.from_padded(x, mask), PaddedTokens(x)
    ragged_size = bags.values.numel() * x.element_size()

    forward, multihead, fused = (
        no_grad(lambda: pool.absorbed(tokens)),
        no_grad(lambda: pool.multihead(x)),
        no_grad(lambda: pool.fused(x)),
    )
    yield Pair("forward, against a copy", "absorbed", forward, "copy", lambda: other.copy_(x)), size
    yield Pair("forward, against a mean", "absorbed", forward, "x.mean(1)", lambda: x.mean(1)), size
    yield Pair("forward", "absorbed", forward, "MultiheadAttention", multihead, FASTER_WANTED), size
    yield Pair("forward", "absorbed", forward, "SDPA with projections", fused, FASTER_WANTED), size
    ours = trained(pool, lambda: pool.absorbed(tokens))
    for name, theirs in (("MultiheadAttention", pool.multihead), ("SDPA with projections", pool.fused)):
        theirs_trained = trained(pool, lambda theirs=theirs: theirs(x))  # type: ignore[misc]
        yield Pair("trained", "absorbed", ours, name, theirs_trained, FASTER_WANTED), 2 * size
    normed = no_grad(lambda: pool.absorbed(tokens, normalise="both"))
    layer_norm = no_grad(lambda: pool.fused(F.layer_norm(x, (DIM,))))
    yield Pair("forward, tokens normalised", "absorbed", normed, "LayerNorm and SDPA", layer_norm), size
    ragged = no_grad(lambda: pool.absorbed(bags))
    yield Pair("ragged, 1 to 1,024 tokens, forward", "absorbed", ragged, "SDPA, padded", fused), ragged_size
    one = PaddedTokens(x.view(1, -1, DIM))
    huge = no_grad(lambda: pool.absorbed(one))
    yield Pair("one set of 262,144 tokens, forward", "absorbed", huge, "copy", lambda: other.copy_(x)), size


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything measured to this file")
    parser.add_argument("--rounds", type=int, default=30, help="times that each is called (default %(default)s)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or not installed():
        missing = "no CUDA GPU" if not torch.cuda.is_available() else "no package triton"
        print(f"{missing} on this machine: nothing was measured", file=sys.stderr)
        return 2
    found = [(time_pair(pair, arguments.rounds, torch.cuda.synchronize), size) for pair, size in pairs()]
    device = torch.cuda.get_device_name()
    copy = found[0][0].theirs_ms.median / 1e3
    copy_rate = 2 * found[0][1] / copy
    print(f"{device}, torch {torch.__version__}; {arguments.rounds} rounds in turn\n")
    print(table(result for result, _ in found))
    print(f"\ncopy: {copy_rate / 1e9:.0f} GB/s read and written\n")
    rates = []
    for result, size in found:
        rate = size / (result.ours_ms.median / 1e3)
        rates.append({"name": result.name, "bytes": size, "bytes_per_second": rate, "of_copy": rate / copy_rate})
        print(f"{result.name:<36} {rate / 1e9:6.0f} GB/s of tokens, {rate / copy_rate:.0%} of the copy")
    print(f"\nwanted: forward at {BANDWIDTH_WANTED:.0%} of the copy")
    if arguments.json:
        content = {
            "command": "python -m benchmarks.gpu",
            "device": device,
            "torch": torch.__version__,
            "copy_bytes_per_second": copy_rate,
            "rates": rates,
            "pairs": [asdict(result) for result, _ in found],
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
