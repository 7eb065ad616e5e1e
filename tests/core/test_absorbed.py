"""Absorbed pooling: the plain form against closed forms, the Triton kernels against the plain form."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cenote.core import Bags, InputError, PaddedTokens
from cenote.core.absorbed import absorbed_pool, available, fused, layer_normed_pool, plain
from tests.core.batches import Batch, batches

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)
TOLERANCE = {"float32": 3e-6, "float16": 3e-3}


@given(batches())
def test_plain_is_the_softmax_of_each_set(batch: Batch) -> None:
    queries = torch.randn(3, batch.dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ragged, padded = (absorbed_pool(tokens, queries, scale=0.5) for tokens in (batch.bags(), batch.padded()))
    for b, x in enumerate(batch.sets):
        scores = 0.5 * queries @ x.T
        output = scores.softmax(1) @ x if len(x) else torch.zeros_like(queries)
        top = scores.logsumexp(1) if len(x) else torch.zeros(3, dtype=torch.float64)
        for sums in (ragged, padded):
            torch.testing.assert_close(sums.output[b], output)
            torch.testing.assert_close(sums.logsumexp[b], top)


@pytest.mark.parametrize("normalise", ["keys", "values", "both"])
def test_normalised_tokens_are_those_of_a_layer_norm(normalise: str) -> None:
    x, queries = torch.randn(2, 7, 6, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    normed = F.layer_norm(x, (6,), eps=1e-3)
    keys, values = normed if normalise != "values" else x, normed if normalise != "keys" else x
    right = (keys @ queries.T).softmax(1).transpose(1, 2) @ values
    ours = absorbed_pool(PaddedTokens(x), queries, normalise=normalise, eps=1e-3)  # type: ignore[arg-type]
    torch.testing.assert_close(ours.output, right)


@given(batches(max_dim=5), st.sampled_from(["key", "value", "both", "neither"]))
def test_layer_norms_fold_into_queries_and_sums(batch: Batch, which: str) -> None:
    torch.manual_seed(0)
    norms = [nn.LayerNorm(batch.dim, dtype=torch.float64) for _ in range(2)]
    for norm in norms:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    key_norm, value_norm = (
        norms[0] if which in ("key", "both") else None,
        norms[1] if which in ("value", "both") else None,
    )
    queries = torch.randn(3, batch.dim, dtype=torch.float64)
    for tokens in (batch.bags(), batch.padded()):
        ours = layer_normed_pool(tokens, queries, key_norm, value_norm, scale=0.5)
        for b, x in enumerate(batch.sets):
            keys, values = (x if norm is None else norm(x) for norm in (key_norm, value_norm))
            right = (0.5 * queries @ keys.T).softmax(1) @ values if len(x) else torch.zeros_like(queries)
            torch.testing.assert_close(ours[b], right)


def test_a_bias_moves_and_hides_tokens() -> None:
    x, queries = torch.randn(1, 4, 3), torch.randn(2, 3)
    bias = torch.tensor([[0.3, float("-inf"), 0.0, 1.0]])
    scores = x[0] @ queries.T + bias[0].unsqueeze(1)
    torch.testing.assert_close(absorbed_pool(PaddedTokens(x), queries, bias=bias).output[0], scores.softmax(0).T @ x[0])


def test_without_a_gpu_the_plain_form_runs() -> None:
    x = torch.randn(2, 5, 8)
    assert not available(x)
    ours, right = absorbed_pool(PaddedTokens(x), torch.ones(1, 8)), plain(PaddedTokens(x), torch.ones(1, 8))
    assert torch.equal(ours.output, right.output)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"queries": torch.ones(2, 5)}, "queries: expected"),
        ({"queries": torch.ones(3, 2, 8)}, "queries: expected"),
        ({"queries": torch.ones(2, 8), "bias": torch.ones(5)}, "bias: expected"),
        ({"queries": torch.ones(2, 8), "normalise": "all"}, "normalise: expected"),
    ],
)
def test_errors(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        absorbed_pool(PaddedTokens(torch.ones(2, 4, 8)), **arguments)  # type: ignore[arg-type]


def in_own_process(script: str, **environment: str) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, str(HERE / script)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "0", **environment},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, object] = json.loads(done.stdout)
    return found


@needs_triton
def test_kernels_agree_with_float64_under_the_interpreter() -> None:
    found = in_own_process("interpreted_kernels.py", TRITON_INTERPRET="1")
    assert len(found) >= 43
    wrong = {
        f"{case}: {name}": error
        for case, errors in found.items()
        for name, error in errors.items()  # type: ignore[attr-defined]
        if not error <= TOLERANCE[next(t for t in TOLERANCE if t in case)]
    }
    assert not wrong


@needs_triton
def test_kernels_compile_for_gpus() -> None:
    found = in_own_process("compiled_kernels.py")
    assert len(found) == 12
    # what the smallest of these chips give to one program
    assert all(0 <= bytes_ <= 99 * 1024 for bytes_ in found.values())  # type: ignore[operator]


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ragged", [False, True])
def test_kernels_agree_on_a_gpu(dtype: torch.dtype, ragged: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 700, 96, generator=generator).to("cuda", dtype)
    q = torch.randn(24, 96, generator=generator).to("cuda", dtype).requires_grad_()

    def tokens(v: torch.Tensor) -> PaddedTokens | Bags:
        return Bags.from_padded(v) if ragged else PaddedTokens(v)

    assert available(x)
    ours, right = fused(tokens(x), q, scale=0.1), plain(tokens(x.double()), q.double(), scale=0.1)
    rtol = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(ours.output.double(), right.output, rtol=rtol, atol=rtol)
    for sums in (ours, right):
        sums.output.sum().backward(retain_graph=True)
    assert q.grad is not None
    assert q.grad.isfinite().all()
