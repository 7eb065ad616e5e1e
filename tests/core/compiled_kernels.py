"""The Triton kernels compiled for GPUs that need not be there. Prints JSON: bytes of shared memory of each.

    python tests/core/compiled_kernels.py

A process of its own: what the interpreter runs, the compiler may still refuse.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cenote.core import triton_kernels

TYPES = {
    "mask": "*i1",
    "offsets": "*i64",
    "first_chunk": "*i64",
    "chunk_set": "*i32",
    **dict.fromkeys(("bias", "lse", "part", "part_top", "part_mass", "delta", "gq", "gbias"), "*fp32"),
    **dict.fromkeys(("scale", "eps"), "fp32"),
}
KERNELS = ("forward", "join_chunks", "backward_queries", "backward_tokens")


def variants() -> Iterator[tuple[str, str, dict[str, object]]]:
    plain = dict.fromkeys(("RAGGED", "SEVERAL", "MASK", "BIAS", "NORM_KEYS", "NORM_VALUES", "PER_SET"), False)
    for kernel, (name, more) in itertools.product(
        KERNELS,
        {
            "plain": {},
            "masked": {"MASK": True, "BIAS": True, "PER_SET": True, "NORM_KEYS": True, "SEVERAL": True},
            "ragged": {"RAGGED": True, "SEVERAL": True, "NORM_KEYS": True, "NORM_VALUES": True},
        }.items(),
    ):
        yield kernel, name, {**plain, **more, "PRECISION": "ieee", "BLOCK_Q": 16, "BLOCK_N": 16, "BLOCK_D": 64}


def shared_memory(kernel: str, dtype: str, constants: dict[str, object], capability: int) -> int:
    function = getattr(triton_kernels, kernel)
    left_out = {"mask"} if not constants["MASK"] else set()
    left_out |= {"bias", "gbias"} if not constants["BIAS"] else set()
    left_out |= {"offsets", "first_chunk", "chunk_set"} if not constants["RAGGED"] else set()
    if kernel == "forward" and not constants["SEVERAL"]:
        left_out |= {"part", "part_top", "part_mass"}
    signature, values, hints = {}, {}, {}
    for i, name in enumerate(function.arg_names):
        if name in constants or name in left_out:
            signature[name], values[(i,)] = "constexpr", constants.get(name)
            continue
        signature[name] = TYPES.get(name, dtype if name in ("x", "q", "y", "gy", "gx") else "i32")
        if signature[name].startswith("*"):
            hints[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, values, hints)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4, "num_stages": 2}
    )
    return int(compiled.metadata.shared)


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET", "0") != "1", "unset TRITON_INTERPRET"
    found = {f"{kernel}, {name}, sm_90": shared_memory(kernel, "*bf16", c, 90) for kernel, name, c in variants()}
    print(json.dumps(found))
