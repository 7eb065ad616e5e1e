"""The contract of a pool, as a check that anybody can run on their own class."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.sets import Bags


class ContractError(AssertionError):
    """A pool breaks its contract; the message has one line per broken rule."""


def check_pool(pool: nn.Module, *, tokens: int = 9, seed: int = 0) -> None:
    """Check everything that cenote promises of a pool.

    Masks: what stands in padded slots, NaN included, and how many such slots there are, never changes a result. Ragged
    equals padded. A set's result does not depend on its batch mates, nor, where declared, on the order of its tokens. One
    token works; no token gives zeros. Gradients agree with finite differences in float64 and reach every parameter. Half
    precision is finite and close. The module compiles in one graph, exports, deep-copies, survives safetensors, repeats
    itself, and takes non-contiguous input.

    The pool given is not changed. Parameters are drawn anew in a copy, because zeros at initialisation hide mistakes.

    Args:
        pool: a pool with `dim`, `out_dim` and the class attributes of `cenote.pool.Pool`.
        tokens: number of tokens in the trial sets; of a pool with `fixed_tokens` the number that it was built for.
        seed: of the trial inputs.

    Raises:
        ContractError: with one line per broken rule.

    Example:
        >>> check_pool(cenote.pool.MeanPool(8))
    """
    trial = _Trial(pool, tokens, seed)
    broken = []
    for rule in _RULES:
        try:
            message = rule(trial)
        except Exception as error:  # a rule that crashes is a rule that is broken
            message = f"{_title(rule)}: raised {type(error).__name__}: {str(error)[:500]}"
        if message:
            broken.append(message)
    if broken:
        name = type(pool).__name__
        raise ContractError(
            f"{name} breaks {len(broken)} rule(s) of its contract:\n" + "\n".join(f"- {b}" for b in broken)
        )


class _Trial:
    """Inputs and copies that the rules share."""

    def __init__(self, pool: nn.Module, tokens: int, seed: int) -> None:
        self.tokens = tokens
        self.dim: int = pool.dim  # type: ignore[assignment]
        self.out_dim: int = pool.out_dim  # type: ignore[assignment]
        self.permutation_invariant = bool(getattr(pool, "permutation_invariant", True))
        self.fixed_tokens = bool(getattr(pool, "fixed_tokens", False))
        self.inert = tuple(getattr(pool, "inert_parameters", ()))
        self.generator = torch.Generator().manual_seed(seed)
        self.pool = copy.deepcopy(pool).double().eval()
        with torch.no_grad():
            for p in self.pool.parameters():
                p.add_(0.2 * torch.randn(p.shape, generator=self.generator, dtype=torch.float64))
        self.x = self.randn(3, tokens, self.dim)
        self.mask = torch.ones(3, tokens, dtype=torch.bool)
        self.mask[0, tokens - tokens // 3 :] = False
        self.mask[2, 1:] = False

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)


def _difference(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    difference = (a.detach().double() - b.detach().double()).abs()
    return float("inf") if difference.isnan().any() else float(difference.max()) if difference.numel() else 0.0


def _title(rule: Callable[[_Trial], str | None]) -> str:
    return rule.__name__.removeprefix("_rule_").replace("_", " ")


def _rule_output_shape(t: _Trial) -> str | None:
    y = t.pool(t.x)
    if y.shape[0] != 3 or y.shape[-1] != t.out_dim or y.dim() not in (2, 3):
        return f"output shape: got {tuple(y.shape)} for 3 sets, expected [3, {t.out_dim}] or [3, k, {t.out_dim}] from out_dim"
    return None


def _rule_determinism(t: _Trial) -> str | None:
    if not torch.equal(t.pool(t.x), t.pool(t.x)):
        return "determinism: two calls in eval mode on the same input differ"
    return None


def _rule_padded_slots_are_not_read(t: _Trial) -> str | None:
    reference = t.pool(t.x.masked_fill(~t.mask.unsqueeze(-1), 0), t.mask)
    for content, name in ((float("nan"), "NaN"), (1e3, "1000")):
        filled = t.x.masked_fill(~t.mask.unsqueeze(-1), content)
        if (difference := _difference(reference, t.pool(filled, t.mask))) > 1e-10:
            return f"padding leaks: {name} in padded slots changes the output by {difference:.3g}; clean values by the mask"
    return None


def _rule_padding_length_is_not_seen(t: _Trial) -> str | None:
    if t.fixed_tokens:
        return None
    x = torch.cat([t.x, t.randn(3, 4, t.dim)], 1)
    mask = torch.cat([t.mask, torch.zeros(3, 4, dtype=torch.bool)], 1)
    if (difference := _difference(t.pool(t.x, t.mask), t.pool(x, mask))) > 1e-10:
        return f"padding leaks: four more padded slots change the output by {difference:.3g}; count tokens, not slots"
    return None


def _rule_full_mask_is_no_mask(t: _Trial) -> str | None:
    if (difference := _difference(t.pool(t.x), t.pool(t.x, torch.ones_like(t.mask)))) > 1e-10:
        return f"mask: a mask that is all True changes the output by {difference:.3g}"
    return None


def _rule_ragged_equals_padded(t: _Trial) -> str | None:
    if t.fixed_tokens:
        return None
    bags = Bags.from_padded(t.x, t.mask)
    if (difference := _difference(t.pool(t.x, t.mask), t.pool(bags))) > 1e-10:
        return f"ragged: the same sets as Bags give an output that differs by {difference:.3g}"
    return None


def _rule_order_of_tokens(t: _Trial) -> str | None:
    if not t.permutation_invariant:
        return None
    order = torch.randperm(t.tokens, generator=t.generator)
    if (difference := _difference(t.pool(t.x), t.pool(t.x[:, order]))) > 1e-10:
        return (
            f"order: permuting the tokens changes the output by {difference:.3g}, "
            f"but permutation_invariant is declared True"
        )
    return None


def _rule_batch_mates(t: _Trial) -> str | None:
    alone = torch.cat([t.pool(t.x[i : i + 1]) for i in range(3)])
    if (difference := _difference(t.pool(t.x), alone)) > 1e-10:
        return f"batch: a set's output changes by {difference:.3g} when its batch mates are taken away"
    return None


def _rule_one_token(t: _Trial) -> str | None:
    if t.fixed_tokens:
        return None
    y = t.pool(t.x[:, :1])
    return None if bool(y.isfinite().all()) else "one token: the output is not finite"


def _rule_no_token_gives_zeros(t: _Trial) -> str | None:
    mask = t.mask.clone()
    mask[1] = False
    inputs: list[tuple[str, Callable[[], Tensor]]] = [("a mask without True", lambda: t.pool(t.x, mask)[1])]
    if not t.fixed_tokens:
        inputs.append(("an empty bag", lambda: t.pool(Bags.from_padded(t.x, mask))[1]))
        inputs.append(("zero token slots", lambda: t.pool(t.x[:, :0])))
    for name, call in inputs:
        y = call()
        if not torch.equal(y, torch.zeros_like(y)):
            return f"no token: {name} gives {'NaN' if y.isnan().any() else 'values that are not zero'}, expected zeros"
    return None


def _rule_empty_set_has_finite_gradients(t: _Trial) -> str | None:
    mask = t.mask.clone()
    mask[1] = False
    x = t.x.clone().requires_grad_()
    inputs = [x, *(p for p in t.pool.parameters() if p.requires_grad)]
    for g in torch.autograd.grad(t.pool(x, mask).square().sum(), inputs, allow_unused=True):
        if g is not None and not bool(g.isfinite().all()):
            return "no token: a set without tokens makes gradients NaN or infinite"
    return None


def _rule_gradients_are_right(t: _Trial) -> str | None:
    pool = copy.deepcopy(t.pool)
    x = t.x[:2].clone().requires_grad_()
    parameters = [p for p in pool.parameters() if p.requires_grad]

    def run(x: Tensor, *_: Tensor) -> Tensor:
        return pool(x, t.mask[:2])

    try:
        torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True)
    except RuntimeError as error:
        return f"gradient: disagrees with finite differences in float64: {str(error)[:300]}"
    return None


def _rule_gradient_reaches_every_parameter(t: _Trial) -> str | None:
    pool = copy.deepcopy(t.pool).train()
    if not any(p.requires_grad for p in pool.parameters()):
        return None
    y = pool(t.x)
    y.backward(t.randn(*y.shape))
    hidden, alive = [], []
    for name, p in pool.named_parameters():
        if not p.requires_grad:
            continue
        size = 0.0 if p.grad is None else float(p.grad.abs().max())
        if size < 1e-12 and name not in t.inert:
            hidden.append(name)
        if size > 1e-9 and name in t.inert:
            alive.append(name)
    if hidden:
        return f"gradient: does not reach {', '.join(hidden)}; if that is inherent, declare it in inert_parameters"
    if alive:
        return f"gradient: {', '.join(alive)} is declared inert but receives a gradient"
    return None


def _rule_half_precision(t: _Trial) -> str | None:
    reference = t.pool(t.x, t.mask)
    size = float(reference.abs().max()) + 1e-6
    for dtype, allowed in ((torch.bfloat16, 0.12), (torch.float16, 0.03)):
        y = copy.deepcopy(t.pool).to(dtype)(t.x.to(dtype), t.mask)
        if y.dtype != dtype:
            return f"half precision: {dtype} in, {y.dtype} out"
        if not bool(y.isfinite().all()):
            return f"half precision: the output in {dtype} is not finite"
        if (difference := _difference(reference, y) / size) > allowed:
            return f"half precision: the output in {dtype} is off by {difference:.1%} of its largest value"
    return None


def _rule_torch_compile_in_one_graph(t: _Trial) -> str | None:
    torch.compiler.reset()
    # the graph is what can break; code generation is PyTorch's own business
    compiled = torch.compile(copy.deepcopy(t.pool), fullgraph=True, backend="aot_eager")
    if (difference := _difference(t.pool(t.x, t.mask), compiled(t.x, t.mask))) > 1e-10:
        return f"compile: torch.compile(fullgraph=True) changes the output by {difference:.3g}"
    return None


def _rule_torch_export(t: _Trial) -> str | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(copy.deepcopy(t.pool), (t.x, t.mask))
    if (difference := _difference(t.pool(t.x, t.mask), exported.module()(t.x, t.mask))) > 1e-10:
        return f"export: torch.export changes the output by {difference:.3g}"
    return None


def _rule_deepcopy(t: _Trial) -> str | None:
    if not torch.equal(t.pool(t.x), copy.deepcopy(t.pool)(t.x)):
        return "deepcopy: the copy gives another output"
    return None


def _rule_safetensors_round_trip(t: _Trial) -> str | None:
    stored = load(save({k: v.contiguous() for k, v in t.pool.state_dict().items()}))
    other = copy.deepcopy(t.pool)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(stored)
    if not torch.equal(t.pool(t.x), other(t.x)):
        return "safetensors: the state_dict does not hold all that the output depends on"
    return None


def _rule_non_contiguous_input(t: _Trial) -> str | None:
    x = t.x.transpose(1, 2).contiguous().transpose(1, 2)
    if (difference := _difference(t.pool(t.x), t.pool(x))) > 1e-10:
        return f"memory layout: the same numbers with other strides change the output by {difference:.3g}"
    return None


def _rule_attend_agrees_with_calling(t: _Trial) -> str | None:
    attend = getattr(t.pool, "attend", None)
    if attend is None:
        return "attend: the pool has no attend(x, mask) method"
    output, weights = attend(t.x, t.mask)
    if (difference := _difference(output, t.pool(t.x, t.mask))) > 1e-10:
        return f"attend: its output differs from the call's by {difference:.3g}"
    if weights is None:
        return None
    if weights.dim() != 3 or weights.shape[0] != 3 or weights.shape[2] != t.tokens:
        return f"attend: weights have shape {tuple(weights.shape)}, expected [3, heads, {t.tokens}]"
    if bool((weights.transpose(1, 2)[~t.mask] != 0).any()):
        return "attend: padded slots have weights other than 0"
    return None


def _rule_wrong_input_is_named(t: _Trial) -> str | None:
    wrong: list[tuple[str, Callable[[], Tensor]]] = [
        ("tokens of another width", lambda: t.pool(t.randn(2, t.tokens, t.dim + 1))),
        ("a mask of another shape", lambda: t.pool(t.x, t.mask[:, 1:])),
        ("an integer mask", lambda: t.pool(t.x, t.mask.long())),
    ]
    for name, call in wrong:
        try:
            call()
        except InputError:
            continue
        except Exception as error:
            return f"errors: {name} raises {type(error).__name__}, expected cenote.InputError"
        return f"errors: {name} is accepted without a word"
    return None


_RULES: tuple[Callable[[_Trial], str | None], ...] = (
    _rule_output_shape,
    _rule_determinism,
    _rule_padded_slots_are_not_read,
    _rule_padding_length_is_not_seen,
    _rule_full_mask_is_no_mask,
    _rule_ragged_equals_padded,
    _rule_order_of_tokens,
    _rule_batch_mates,
    _rule_one_token,
    _rule_no_token_gives_zeros,
    _rule_empty_set_has_finite_gradients,
    _rule_gradients_are_right,
    _rule_gradient_reaches_every_parameter,
    _rule_half_precision,
    _rule_torch_compile_in_one_graph,
    _rule_torch_export,
    _rule_deepcopy,
    _rule_safetensors_round_trip,
    _rule_non_contiguous_input,
    _rule_attend_agrees_with_calling,
    _rule_wrong_input_is_named,
)
