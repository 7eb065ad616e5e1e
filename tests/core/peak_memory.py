"""Peak memory of cross-attention above the tokens, as a multiple of the tokens' bytes. Prints JSON; Linux only.

    python tests/core/peak_memory.py

A process of its own: the peak of the test process belongs to everything that ran in it.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from cenote.core import Bags, PaddedTokens, Tokens, cross_attention
from cenote.core.memory import return_freed_blocks

BATCH, TOKENS, DIM, HEADS = 64, 196, 768, 12
BYTES = BATCH * TOKENS * DIM * 4


def status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak_above_now(call: Callable[[], object]) -> float:
    call()  # what libraries allocate once
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    call()
    return round((status("VmHWM") - before) / BYTES, 3)


def main() -> None:
    torch.set_num_threads(1)
    return_freed_blocks()
    x = torch.randn(BATCH, TOKENS, DIM)
    with_cls = torch.randn(BATCH, TOKENS + 1, DIM)
    as_map = x.transpose(1, 2).contiguous().transpose(1, 2)
    mask = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    mask[:, -20:] = False
    bags = Bags(x.flatten(0, 1), torch.arange(0, BATCH * TOKENS + 1, TOKENS))
    query = torch.randn(1, DIM, requires_grad=True)
    per_set = torch.randn(BATCH, 1, DIM, requires_grad=True)
    key, value, norm = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM), nn.LayerNorm(DIM)

    def attention(tokens: Callable[[], Tokens], query: Tensor, norm: nn.LayerNorm | None = None) -> Tensor:
        return cross_attention(
            tokens(), query, key=key, value=value, heads=HEADS, key_norm=norm, value_norm=norm
        ).output

    def trained(*arguments: object) -> None:
        attention(*arguments).sum().backward()  # type: ignore[arg-type]

    def frozen(*arguments: object) -> None:
        with torch.no_grad():
            attention(*arguments)  # type: ignore[arg-type]

    print(
        json.dumps(
            {
                f"{name}, {mode}": peak_above_now(lambda call=call, arguments=arguments: call(*arguments))
                for name, arguments in {
                    "padded": (lambda: PaddedTokens(x), query),
                    "padded, a query per set": (lambda: PaddedTokens(x), per_set),
                    "padded, normalised": (lambda: PaddedTokens(x), query, norm),
                    "without the first token": (lambda: PaddedTokens(with_cls).drop_first(1), query),
                    "map": (lambda: PaddedTokens(as_map), query),
                    "map, a query per set": (lambda: PaddedTokens(as_map), per_set),
                    "masked": (lambda: PaddedTokens(x, mask), query),
                    "ragged": (lambda: bags, query),
                    "ragged, a query per set": (lambda: bags, per_set),
                    "ragged, normalised": (lambda: bags, query, norm),
                }.items()
                for mode, call in (("forward", frozen), ("forward and backward", trained))
            }
        )
    )


if __name__ == "__main__":
    main()
