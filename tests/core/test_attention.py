"""Absorbed cross-attention against the projected one, a plain one per set, and PyTorch's own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cenote.core import Bags, InputError, PaddedTokens, Tokens, cross_attention
from cenote.core.attention import Latents, Plan, Projection
from tests.core.batches import make_batch

Map = nn.Linear | Projection | None


@dataclass(frozen=True)
class Setting:
    """One random configuration: the sets, the queries and everything that `cross_attention` takes."""

    lengths: tuple[int, ...]
    form: str
    query: Tensor
    key: Map
    value: Map
    heads: int
    scale: float | None
    key_norm: nn.LayerNorm | None
    value_norm: nn.LayerNorm | None
    head_norm: nn.LayerNorm | None
    beside: Tensor | None
    drop: Tensor | None
    dim: int
    seed: int

    def tokens(self) -> tuple[Tokens, Tensor]:
        """The sets and the tensor that gradients are asked of."""
        batch = make_batch(list(self.lengths), self.dim, self.seed, max(self.lengths) + 1)
        if self.form == "ragged":
            leaf = batch.bags().values.requires_grad_()
            return Bags(leaf, batch.bags().offsets), leaf
        if self.form == "masked":
            leaf = batch.x.requires_grad_()
            return PaddedTokens(leaf, batch.mask), leaf
        leaf = torch.stack(batch.sets).requires_grad_()
        return PaddedTokens(leaf), leaf

    def parameters(self) -> list[Tensor]:
        out = [self.query]
        for part in (self.key, self.value):
            out += [] if part is None else [t for t in (part.weight, part.bias) if t is not None]
        modules = [m for m in (self.key_norm, self.value_norm, self.head_norm) if m is not None]
        out += list(nn.ModuleList(dict.fromkeys(modules)).parameters())
        return out if self.beside is None else [*out, self.beside]

    def dropped(self, weights: Tensor) -> Tensor:
        assert self.drop is not None
        return weights * self.drop

    def run(self, tokens: Tokens, plan: Plan) -> Latents:
        return cross_attention(
            tokens,
            self.query,
            key=self.key,
            value=self.value,
            heads=self.heads,
            scale=self.scale,
            key_norm=self.key_norm,
            value_norm=self.value_norm,
            head_norm=self.head_norm,
            beside=self.beside,
            plan=plan,
            map_weights=None if self.drop is None else self.dropped,
        )


@st.composite
def settings_of_attention(draw: st.DrawFn) -> Setting:
    seed = draw(st.integers(0, 2**16))
    torch.manual_seed(seed)
    heads, queries = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    dim = heads * draw(st.integers(1, 3))
    form = draw(st.sampled_from(["padded", "masked", "ragged"]))
    if form == "padded":
        lengths = (draw(st.integers(1, 4)),) * draw(st.integers(1, 3))
    else:
        lengths = tuple(draw(st.lists(st.integers(0, 4), min_size=1, max_size=4)))

    def a_map() -> tuple[Map, int]:
        kind = draw(st.sampled_from(["none", "linear", "no bias", "tensors"]))
        if kind == "none":
            return None, 0
        width = heads * draw(st.integers(1, 3))
        if kind == "tensors":
            weight, bias = torch.randn(width, dim).double(), torch.randn(width).double()
            return Projection(weight.requires_grad_(), bias.requires_grad_()), width
        return nn.Linear(dim, width, bias=kind == "linear").double(), width

    def a_norm(width: int) -> nn.LayerNorm | None:
        kind = draw(st.sampled_from(["none", "affine", "scale", "plain"]))
        if kind == "none":
            return None
        eps = draw(st.sampled_from([1e-5, 1e-2]))
        norm = nn.LayerNorm(width, eps=eps, elementwise_affine=kind != "plain", bias=kind == "affine").double()
        for p in norm.parameters():
            nn.init.normal_(p)
        return norm

    key, key_width = a_map()
    value, _ = a_map()
    key_norm = a_norm(dim)
    value_norm = key_norm if draw(st.booleans()) else a_norm(dim)
    head_norm = a_norm(key_width // heads) if key is not None and draw(st.booleans()) else None
    query = torch.randn(queries, key_width or heads * dim).double()
    if draw(st.booleans()):
        query = torch.randn(len(lengths), *query.shape).double()
    beside = torch.randn(len(lengths), 2, dim).double().requires_grad_() if draw(st.booleans()) else None
    return Setting(
        lengths=lengths,
        form=form,
        query=query.requires_grad_(),
        key=key,
        value=value,
        heads=heads,
        scale=draw(st.sampled_from([None, 0.3, 2.0])),
        key_norm=key_norm,
        value_norm=value_norm,
        head_norm=head_norm,
        beside=beside,
        drop=torch.rand(heads * queries).double() if draw(st.booleans()) else None,
        dim=dim,
        seed=seed,
    )


def plainly(s: Setting, x: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """Attention over one set with every token projected, head by head: `output [queries, width]`, `weights [tokens, HQ]`."""
    query = s.query if s.query.dim() == 2 else s.query[b]
    seen = x if s.beside is None else torch.cat([x, s.beside[b]])

    def mapped(norm: nn.LayerNorm | None, map_: Map) -> Tensor:
        v = seen if norm is None else norm(seen)
        return v if map_ is None else F.linear(v, map_.weight, map_.bias)

    k, v = mapped(s.key_norm, s.key), mapped(s.value_norm, s.value)
    outputs, weights = [], []
    for h in range(s.heads):
        q_h = query.chunk(s.heads, -1)[h]
        k_h = k if s.key is None else k.chunk(s.heads, -1)[h]
        k_h = k_h if s.head_norm is None else s.head_norm(k_h)
        a = torch.softmax(q_h @ k_h.T * (q_h.shape[-1] ** -0.5 if s.scale is None else s.scale), -1)
        weights.append(a[:, : len(x)].T)
        used = a if s.drop is None else a * s.drop.view(s.heads, -1)[h].unsqueeze(1)
        outputs.append(used @ v.chunk(s.heads, -1)[h])
    return torch.cat(outputs, -1), torch.cat(weights, -1)


def assert_close(a: Tensor, b: Tensor, what: str) -> None:
    torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10, msg=lambda m: f"{what}: {m}")


@settings(max_examples=5 * settings.default.max_examples // 2)
@given(setting=settings_of_attention())
def test_absorbed_equals_projected_with_all_gradients(setting: Setting) -> None:
    found = []
    for plan in ("absorbed", "projected", "auto"):
        tokens, leaf = setting.tokens()
        output, weights = setting.run(tokens, plan)
        inputs = [leaf, *setting.parameters()]
        upstream = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output)
        loss = (output * upstream).sum() + weights.square().sum() + 0 * leaf.nan_to_num().sum()
        gradients = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
        found.append((output, weights, *gradients))
    for other in found[1:]:
        for i, (a, b) in enumerate(zip(found[0], other, strict=True)):
            assert_close(a, b, f"tensor {i}")


@given(setting=settings_of_attention())
def test_absorbed_equals_each_set_on_its_own(setting: Setting) -> None:
    tokens, _ = setting.tokens()
    output, weights = setting.run(tokens, "absorbed")
    sets = make_batch(list(setting.lengths), setting.dim, setting.seed).sets
    for b, x in enumerate(sets):
        expected, expected_weights = plainly(setting, x, b)
        if isinstance(tokens, Bags):
            of_set = weights[tokens.offsets[b] : tokens.offsets[b + 1]]
        else:
            assert isinstance(tokens, PaddedTokens)
            of_set = weights[b] if tokens.mask is None else weights[b][tokens.mask[b]]
        assert_close(of_set, expected_weights, f"weights of set {b}")
        if len(x) or setting.beside is not None:
            assert_close(output[b], expected, f"output of set {b}")
        else:
            assert not output[b].any()


def mha_with_same_weights(m: nn.MultiheadAttention, query: Tensor, tokens: Tokens, plan: Plan = "absorbed") -> Latents:
    q_weight, k_weight, v_weight = m.in_proj_weight.chunk(3)
    q_bias, k_bias, v_bias = m.in_proj_bias.chunk(3)
    return cross_attention(
        tokens,
        F.linear(query, q_weight, q_bias),
        key=Projection(k_weight, k_bias),
        value=Projection(v_weight, v_bias),
        heads=m.num_heads,
        plan=plan,
    )


@pytest.mark.parametrize("masked", [False, True])
def test_same_as_multihead_attention_of_torch(masked: bool) -> None:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(12, 3, batch_first=True, dtype=torch.float64)
    nn.init.normal_(theirs.in_proj_bias)
    x = torch.randn(4, 7, 12, dtype=torch.float64, requires_grad=True)
    query = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(4, 7) > 0.4 if masked else None
    expected, expected_weights = theirs(
        query.expand(4, 5, 12), x, x, key_padding_mask=None if mask is None else ~mask, average_attn_weights=False
    )
    output, weights = mha_with_same_weights(theirs, query, PaddedTokens(x, mask))
    output = theirs.out_proj(output)
    assert_close(output, expected, "output")
    assert_close(weights.transpose(1, 2).unflatten(1, (3, 5)), expected_weights, "weights")
    inputs = [x, query, *theirs.parameters()]
    for a, b in zip(
        torch.autograd.grad(output.sin().sum(), inputs), torch.autograd.grad(expected.sin().sum(), inputs), strict=True
    ):
        assert_close(a, b, "gradient")


def test_same_as_scaled_dot_product_attention_of_torch() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 7, 12, dtype=torch.float64)
    query = torch.randn(4, 5, 24, dtype=torch.float64)
    expected = F.scaled_dot_product_attention(
        query.unflatten(-1, (2, 12)).transpose(1, 2), x.unsqueeze(1), x.unsqueeze(1)
    )
    output, _ = cross_attention(PaddedTokens(x), query, heads=2, value=Projection(torch.eye(12).double().repeat(2, 1)))
    assert_close(output.unflatten(-1, (2, 12)).transpose(1, 2), expected, "output")


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, normalised: bool) -> None:
    torch.manual_seed(0)
    x, query, key, value = torch.randn(4, 50, 24), torch.randn(2, 24), torch.randn(24, 24) / 5, torch.randn(24, 24) / 5

    def run(dtype: torch.dtype) -> Latents:
        norm = nn.LayerNorm(24, dtype=dtype) if normalised else None
        return cross_attention(
            PaddedTokens(x.to(dtype)),
            query.to(dtype),
            key=Projection(key.to(dtype)),
            value=Projection(value.to(dtype)),
            heads=3,
            key_norm=norm,
            value_norm=norm,
        )

    output, weights = run(dtype)
    assert output.dtype == weights.dtype == dtype
    exact = run(torch.float64).output
    error = (output.double() - exact).abs().max() / exact.abs().max()
    assert error.item() < 4 * torch.finfo(dtype).eps


def rounding_error(plan: Plan, ratio: float, dtype: torch.dtype) -> float:
    """Error against float64 of attention over normalised tokens whose mean is `ratio` times their deviation."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = (randn(4, 100, 192) + ratio).to(dtype)
    query, weight = randn(2, 192).to(dtype), (randn(192, 192) / 192**0.5).to(dtype)

    def run(to: torch.dtype, plan: Plan) -> Tensor:
        norm = nn.LayerNorm(192, eps=1e-6, dtype=to)
        map_ = Projection(weight.to(to))
        return cross_attention(
            PaddedTokens(x.to(to)),
            query.to(to),
            key=map_,
            value=map_,
            heads=3,
            key_norm=norm,
            value_norm=norm,
            plan=plan,
        ).output

    return (run(dtype, plan).double() - run(torch.float64, "projected")).abs().max().item()


@pytest.mark.parametrize(
    ("dtype", "ratio", "allowed"),
    [
        (torch.float32, 0, 1e-6),
        (torch.float32, 1, 2e-6),
        (torch.float32, 10, 2e-5),
        (torch.float32, 1000, 2e-3),
        (torch.float16, 1, 3e-3),
        (torch.float16, 10, 2e-2),
        (torch.bfloat16, 1, 2e-2),
        (torch.bfloat16, 10, 2e-1),
    ],
)
def test_folded_norm_where_the_mean_dwarfs_the_deviation(dtype: torch.dtype, ratio: float, allowed: float) -> None:
    # outputs are of the order of 1; the docstring of cenote.core.attention promises these sizes
    absorbed, projected = rounding_error("absorbed", ratio, dtype), rounding_error("projected", ratio, dtype)
    assert absorbed < allowed
    assert absorbed < 40 * projected


@pytest.fixture(scope="module")
def peaks() -> dict[str, float]:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory is read from /proc")
    program = Path(__file__).with_name("peak_memory.py")
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_cost_no_copy_of_the_tokens_is_made(peaks: dict[str, float]) -> None:
    # 12 heads of 768 channels: one number per token and head is 1/64 of the tokens
    unmasked = {name: peak for name, peak in peaks.items() if not name.startswith("masked")}
    assert len(unmasked) == 18
    assert max(unmasked.values()) < 0.35, unmasked


def test_cost_of_a_mask_is_one_copy_of_the_tokens(peaks: dict[str, float]) -> None:
    assert peaks["masked, forward"] < 1.35
    assert peaks["masked, forward and backward"] < 1.35


def test_backward_without_token_gradients_forms_no_gradient_of_them() -> None:
    x, query = torch.randn(2, 3, 4), torch.randn(1, 4, requires_grad=True)
    layer = nn.Linear(4, 4)
    output, _ = cross_attention(PaddedTokens(x), query, key=layer, value=layer, heads=2)
    output.sum().backward()
    assert x.grad is None
    assert layer.weight.grad is not None
    # the value bias reaches the output with weight 1 for every set and query; the key's drops out of the softmax
    assert torch.allclose(layer.bias.grad, torch.full((4,), 2.0))


def test_auto_takes_the_plan_with_fewer_products() -> None:
    calls: list[tuple[int, ...]] = []

    class Counted(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(tuple(x.shape))
            return super().forward(x)

    x, layer, norm = torch.randn(2, 10, 8), nn.Linear(8, 8), Counted(8)
    cross_attention(PaddedTokens(x), torch.randn(1, 8), key=layer, value=layer, heads=2, key_norm=norm, value_norm=norm)
    assert calls == []  # no token was normalised or projected
    cross_attention(
        PaddedTokens(x), torch.randn(30, 8), key=layer, value=layer, heads=2, key_norm=norm, value_norm=norm
    )
    assert calls == [(2, 10, 8)]  # once, for keys and values


TOKENS = PaddedTokens(torch.randn(2, 3, 4))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: cross_attention(TOKENS, torch.randn(1, 4), plan="fast"), "plan: expected 'auto'.* got 'fast'"),
        (lambda: cross_attention(TOKENS, torch.randn(1, 5)), "query: expected width 4 to match the keys, got 5"),
        (lambda: cross_attention(TOKENS, torch.randn(1, 4), heads=2), "query: expected width 8"),
        (lambda: cross_attention(TOKENS, torch.randn(4)), r"query: expected \[queries, width\].* got shape \(4,\)"),
        (
            lambda: cross_attention(TOKENS, torch.randn(3, 1, 4)),
            r"\[2, queries, width\] for each, got shape \(3, 1, 4\)",
        ),
        (lambda: cross_attention(TOKENS, torch.randn(1, 0), heads=0), "heads: 0 does not divide"),
        (lambda: cross_attention(TOKENS, torch.randn(1, 12), heads=3), "heads: 3 does not divide the value width 4"),
        (
            lambda: cross_attention(TOKENS, torch.randn(1, 6), key=nn.Linear(4, 6), heads=4),
            "heads: 4 does not divide the key width 6",
        ),
        (
            lambda: cross_attention(TOKENS, torch.randn(1, 6), key=nn.Linear(5, 6)),
            "key: maps vectors of width 5",
        ),
        (lambda: cross_attention(TOKENS, torch.randn(1, 4), value=nn.Linear(5, 6)), "value: maps vectors of width 5"),
        (
            lambda: cross_attention(TOKENS, torch.randn(1, 4), key_norm=nn.LayerNorm(5)),
            "key_norm: .* width 4, got LayerNorm",
        ),
        (lambda: cross_attention(TOKENS, torch.randn(1, 4), value_norm=nn.RMSNorm(4)), "value_norm: .* got RMSNorm"),
        (lambda: cross_attention(TOKENS, torch.randn(1, 4), head_norm=nn.LayerNorm(4)), "head_norm: .* needs key"),
    ],
)
def test_errors_name_the_argument(call: Callable[[], object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        call()
