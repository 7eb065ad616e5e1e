"""The worked plan of `docs/scale.md`: what a billion images, or 10^12 tokens, take, by arithmetic from stated assumptions.

    python scripts/scale_plan.py [--items 1e9] [--tokens 261] [--dim 768] [--parameters 86e6] [--layers 1]
        [--tflops 100] [--write-gbit 10] [--raw-kb 100]

Prints a Markdown table. Nothing in it is measured: put in what `cenote extract --dry-run` prints on your own machines.
"""

from __future__ import annotations

import argparse

SHARD = 2**26
NUMBER = 2


def plan(
    items: float,
    tokens: float,
    dim: int,
    parameters: float,
    layers: int,
    tflops: float,
    write_gbit: float,
    raw_kb: float,
) -> list[tuple[str, str, str]]:
    """Rows: what, with all tokens kept, with one pooled vector kept."""
    compute = 2 * parameters * tokens * items + 4 * tokens**2 * dim * 12 * items
    hours = compute / (tflops * 1e12) / 3600
    rows = [("model's arithmetic", f"{compute:.1e} operations", "the same")]
    rows += [(f"GPU hours at {tflops:g} TFLOP/s sustained", f"{hours:,.0f}", "the same")]
    stored = [items * kept * dim * NUMBER * layers for kept in (tokens, 1)]
    rows += [("bytes per item, float16", *(f"{s / items:,.0f}" for s in stored))]
    rows += [("store", *(_sized(s) for s in stored))]
    rows += [("shards of 64 MB", *(f"{max(s / SHARD, 1):,.0f}" for s in stored))]
    rows += [("raw input to be read", _sized(items * raw_kb * 1e3), "the same")]
    rows += [
        (
            f"hours to write it all at {write_gbit:g} Gbit/s",
            *(f"{s * 8 / write_gbit / 1e9 / 3600:,.1f}" for s in stored),
        )
    ]
    wanted = [s / (hours * 3600) * 8 / 1e9 for s in stored]
    rows += [("network out of each GPU's machine while it computes", *(f"{w:.3g} Gbit/s" for w in wanted))]
    read = items * raw_kb * 1e3 / (hours * 3600) * 8 / 1e9
    rows += [("network into it", f"{read:.3g} Gbit/s", "the same")]
    return rows


def _sized(count: float) -> str:
    for unit, scale in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9)):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{count:,.0f} bytes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=float, default=1e9)
    parser.add_argument("--tokens", type=float, default=261, help="per item")
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--parameters", type=float, default=86e6)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--tflops", type=float, default=100, help="that a GPU sustains")
    parser.add_argument("--write-gbit", type=float, default=10, help="into the storage, all machines together")
    parser.add_argument("--raw-kb", type=float, default=100, help="kB of a raw item")
    print("| | all tokens | `--pool-at-extract mean` |\n| --- | --- | --- |")
    for row in plan(**vars(parser.parse_args())):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
