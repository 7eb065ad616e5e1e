"""The contract of a pool, as a check that anybody can run on their own class."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from cenote.core.sets import Bags
from cenote.testing import rules
from cenote.testing.contract import ContractError, require_attributes, run_rules
from cenote.testing.contract import difference as _difference

__all__ = ["LONG", "PLAIN_MODULE", "ContractError", "check_pool"]

PLAIN_MODULE = ("ragged equals padded", "attend agrees with calling", "wrong input is named")
"""The rules that only a class written with cenote keeps; `check_pool(module, leave_out=PLAIN_MODULE)` checks any module."""

LONG = frozenset({
    "gradients are right",
    "half precision over many tokens",
    "torch compile in one graph",
    "torch export",
})  # fmt: skip
"""Names of the rules that take seconds."""


def check_pool(pool: nn.Module, *, tokens: int = 9, seed: int = 0, leave_out: Collection[str] = ()) -> None:
    """Check everything that cenote promises of a pool.

    Masks: what stands in padded slots, NaN included, and how many such slots there are, never changes a result or a gradient.
    Ragged equals padded. A set's result does not depend on its batch mates, nor, where declared, on the order of its tokens.
    One token works; no token gives zeros. Gradients agree with finite differences in float64 and reach every parameter. Half
    precision is finite and close, also over thousands of tokens. The module compiles in one graph, exports, deep-copies,
    survives safetensors after training, repeats itself, and takes non-contiguous input.

    Any `torch.nn.Module` can be checked that has `dim` (width of a token) and `out_dim` (width of its output) and is called
    as `module(x, mask)`, with `x` `[batch, tokens, dim]` and `mask` `[batch, tokens]`, True on real tokens, or `None`. Leave
    the rules out that only classes of cenote keep: `check_pool(module, leave_out=PLAIN_MODULE)`. What else it declares is read
    from class attributes named as those of `cenote.pool.Pool`.

    The pool given is not changed. Parameters are drawn anew in a copy, because zeros at initialisation hide mistakes.

    Args:
        pool: a pool with `dim`, `out_dim` and the class attributes of `cenote.pool.Pool`.
        tokens: number of tokens in the trial sets; of a pool with `fixed_tokens` the number that it was built for.
        seed: of the trial inputs.
        leave_out: names of rules that are not checked; a broken rule's name stands at the end of its line.

    Raises:
        ContractError: with one line per broken rule; where the pool cannot be called or does not repeat itself, about that
            alone.
        InputError: where `leave_out` names a rule that there is not.

    Example:
        >>> check_pool(cenote.pool.MeanPool(8))
        >>> class Largest(torch.nn.Module):
        ...     dim = out_dim = 8
        ...     def forward(self, x, mask=None):
        ...         return x.amax(1)
        >>> check_pool(Largest(), leave_out=PLAIN_MODULE)
        Traceback (most recent call last):
        ...
        cenote.testing.contract.ContractError: Largest breaks 4 rules of its contract:
        ...
    """
    require_attributes(pool, {"dim": "the width of a token", "out_dim": "the width of its output"})
    try:
        trial = _Trial(pool, tokens, seed)
    except Exception as error:
        raise ContractError(
            f"{type(pool).__name__} breaks 1 rule of its contract:\n- deepcopy: raised {type(error).__name__}: "
            f"{str(error)[:500]} [rule: deepcopy]",
            ("deepcopy",),
        ) from error
    trial.ragged &= "ragged equals padded" not in leave_out
    run_rules(pool, _RULES, trial, leave_out=leave_out, first=(_rule_call, rules._rule_determinism))


class _Trial(rules.Trial):
    """Inputs and copies that the rules share."""

    padding = "~mask.unsqueeze(-1)"

    def __init__(self, pool: nn.Module, tokens: int, seed: int) -> None:
        super().__init__(pool, seed)
        self.tokens = tokens
        self.dim: int = pool.dim  # type: ignore[assignment]
        self.out_dim: int = pool.out_dim  # type: ignore[assignment]
        self.permutation_invariant = bool(getattr(pool, "permutation_invariant", True))
        self.fixed_tokens = bool(getattr(pool, "fixed_tokens", False))
        self.ragged = not self.fixed_tokens
        self.x = self.randn(3, tokens, self.dim)
        self.mask = torch.ones(3, tokens, dtype=torch.bool)
        self.mask[0, tokens - tokens // 3 :] = False
        self.mask[2, 1:] = False

    def masked(self, pool: nn.Module, x: Tensor) -> Tensor:
        """What `pool` gives for the first sets `x` with their masks."""
        return pool(x, self.mask[: len(x)])

    def filled(self, content: float) -> Tensor:
        """`x` with this in its padded slots."""
        return self.x.masked_fill(~self.mask.unsqueeze(-1), content)


def _rule_call(t: _Trial) -> str | None:
    for name, mask in (("pool(x)", None), ("pool(x, mask)", t.mask)):
        try:
            y = t.pool(t.x) if mask is None else t.pool(t.x, mask)
        except Exception as error:
            return (
                f"call: {name} raised {type(error).__name__}: {str(error)[:500]}; "
                f"a pool is called with x [batch, tokens, dim] and an optional mask [batch, tokens], True on real tokens"
            )
        if not isinstance(y, Tensor):
            return f"call: {name} returned {type(y).__name__}, expected the output tensor alone"
    return None


def _rule_output_shape(t: _Trial) -> str | None:
    y = t.pool(t.x)
    if y.shape[0] != 3 or y.shape[-1] != t.out_dim or y.dim() not in (2, 3):
        return f"output shape: got {tuple(y.shape)} for 3 sets, expected [3, {t.out_dim}] or [3, k, {t.out_dim}] from out_dim"
    return None


def _rule_padded_slots_are_not_read(t: _Trial) -> str | None:
    reference = t.pool(t.filled(0), t.mask)
    for content, name in ((float("nan"), "NaN"), (1e3, "1000")):
        if (difference := _difference(reference, t.pool(t.filled(content), t.mask))) > 1e-10:
            return (
                f"padding leaks: {name} in padded slots changes the output by {difference:.3g}; "
                f"clean values with x.masked_fill({t.padding}, 0), since 0 * NaN is NaN"
            )
    return None


def _rule_padded_slots_leave_gradients_alone(t: _Trial) -> str | None:
    def gradients(content: float) -> list[Tensor]:
        x = t.filled(content).requires_grad_()
        inputs = [x, *(p for p in t.pool.parameters() if p.requires_grad)]
        y = t.pool(x, t.mask)
        if not y.requires_grad:
            return []
        return list(torch.autograd.grad(y.square().sum(), inputs, allow_unused=True, materialize_grads=True))

    reference, dirty = gradients(0.0), gradients(float("nan"))
    if reference and bool((dirty[0][~t.mask] != 0).any()):
        return "padding leaks: padded slots receive a gradient"
    if any(_difference(a, b) > 1e-10 for a, b in zip(reference, dirty, strict=True)):
        return (
            "padding leaks: NaN in padded slots reaches a gradient; clean values by the mask before any other operation"
        )
    return None


def _rule_padding_length_is_not_seen(t: _Trial) -> str | None:
    if t.fixed_tokens:
        return None
    x = torch.cat([t.x, t.randn(*t.x.shape[:-2], 4, t.dim)], -2)
    mask = torch.cat([t.mask, torch.zeros(3, 4, dtype=torch.bool)], 1)
    if (difference := _difference(t.pool(t.x, t.mask), t.pool(x, mask))) > 1e-10:
        return f"padding leaks: four more padded slots change the output by {difference:.3g}; count tokens, not slots"
    return None


def _rule_full_mask_is_no_mask(t: _Trial) -> str | None:
    if (difference := _difference(t.pool(t.x), t.pool(t.x, torch.ones_like(t.mask)))) > 1e-10:
        return f"mask: a mask that is all True changes the output by {difference:.3g}"
    return None


def _rule_ragged_equals_padded(t: _Trial) -> str | None:
    if not t.ragged:
        return None
    try:
        y = t.pool(Bags.from_padded(t.x, t.mask))
    except Exception as error:
        t.ragged = False  # said once
        return f"ragged: pool(bags) raised {type(error).__name__}: {str(error)[:500]}; a pool also takes cenote.Bags"
    if (difference := _difference(t.pool(t.x, t.mask), y)) > 1e-10:
        return f"ragged: the same sets as Bags give an output that differs by {difference:.3g}"
    return None


def _rule_order_of_tokens(t: _Trial) -> str | None:
    if not t.permutation_invariant:
        return None
    order = torch.randperm(t.tokens, generator=t.generator)
    if (difference := _difference(t.pool(t.x), t.pool(t.x[..., order, :]))) > 1e-10:
        return (
            f"order: permuting the tokens changes the output by {difference:.3g}, "
            f"but permutation_invariant is declared True"
        )
    return None


def _rule_batch_mates(t: _Trial) -> str | None:
    for masked, mask in (("", None), (" of a masked batch", t.mask)):
        alone = torch.cat([t.pool(t.x[i : i + 1], None if mask is None else mask[i : i + 1]) for i in range(3)])
        if (difference := _difference(t.pool(t.x, mask), alone)) > 1e-10:
            return f"batch: a set's output changes by {difference:.3g} when its mates{masked} are taken away"
    return None


def _rule_one_token(t: _Trial) -> str | None:
    if t.fixed_tokens:
        return None
    y = t.pool(t.x[..., :1, :])
    return None if bool(y.isfinite().all()) else "one token: the output is not finite"


def _rule_no_token_gives_zeros(t: _Trial) -> str | None:
    mask = t.mask.clone()
    mask[1] = False
    inputs: list[tuple[str, Callable[[], Tensor]]] = [("a mask without True", lambda: t.pool(t.x, mask)[1])]
    if t.ragged:
        inputs.append(("an empty bag", lambda: t.pool(Bags.from_padded(t.x, mask))[1]))
    if not t.fixed_tokens:
        inputs.append(("zero token slots", lambda: t.pool(t.x[..., :0, :])))
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
    return rules.gradient_error(t.pool, t.masked, t.x[:2])


def _rule_half_precision(t: _Trial) -> str | None:
    return rules.half_precision_error(t.pool, t.masked, t.x, 0.12, 0.03)


def _rule_half_precision_over_many_tokens(t: _Trial) -> str | None:
    if t.fixed_tokens:
        return None
    # the sums over these tokens are above the largest float16, the values far below it
    x = t.randn(1, 2048, t.dim) + 40 * t.randn(t.dim).sign()
    for dtype in (torch.float16, torch.bfloat16):
        pool, narrow = copy.deepcopy(t.pool).to(dtype), x.to(dtype)
        with torch.no_grad():
            reference = copy.deepcopy(pool).double()(narrow.double())
            size = float(reference.abs().max())
            if not 1e-3 < size < torch.finfo(torch.float16).max / 2:
                continue
            y = pool(narrow)
        if not bool(y.isfinite().all()):
            return (
                f"half precision: 2048 tokens of size 40 overflow {dtype}, though the result, at most {size:.3g}, does not; "
                f"sum in float32"
            )
        if (difference := _difference(reference, y) / size) > 0.25:
            return (
                f"half precision: over 2048 tokens of size 40 the output in {dtype} is off by {difference:.0%} of its largest "
                f"value; sum in float32"
            )
    return None


def _rule_torch_compile_in_one_graph(t: _Trial) -> str | None:
    if (difference := _difference(t.pool(t.x, t.mask), rules.compiled(t.pool)(t.x, t.mask))) > 1e-10:
        return f"compile: torch.compile(fullgraph=True) changes the output by {difference:.3g}"
    return None


def _rule_torch_export(t: _Trial) -> str | None:
    return rules.export_error(t.pool, t.x, t.mask)


def _rule_training_is_stored(t: _Trial) -> str | None:
    trained = copy.deepcopy(t.pool).train()
    for _ in range(2):
        y = trained(t.x)
        if y.requires_grad:
            trained.zero_grad()
            y.square().mean().backward()
            with torch.no_grad():
                for p in trained.parameters():
                    p.sub_(0.0 if p.grad is None else 0.01 * p.grad)
    other = copy.deepcopy(t.pool)
    other.load_state_dict(load(save({k: v.contiguous() for k, v in trained.state_dict().items()})))
    if (difference := _difference(trained.eval()(t.x), other(t.x))) > 1e-10:
        return (
            f"state: after two steps of training, a fresh copy with the trained state_dict differs by {difference:.3g}; "
            f"what training changes must be a parameter or a persistent buffer"
        )
    return None


def _rule_non_contiguous_input(t: _Trial) -> str | None:
    backwards = tuple(reversed(range(t.x.dim())))
    x = t.x.permute(backwards).contiguous().permute(backwards)
    if (difference := _difference(t.pool(t.x), t.pool(x))) > 1e-10:
        return f"memory layout: the same numbers with other strides change the output by {difference:.3g}"
    return None


def _rule_attend_agrees_with_calling(t: _Trial) -> str | None:
    attend = getattr(t.pool, "attend", None)
    if attend is None:
        return "attend: the pool has no attend(x, mask) that returns (output, weights or None)"
    output, weights = attend(t.x, t.mask)
    if (difference := _difference(output, t.pool(t.x, t.mask))) > 1e-10:
        return f"attend: its output differs from the call's by {difference:.3g}"
    if weights is None:
        return None
    read = t.x.shape[1:-1]
    if weights.dim() != 2 + len(read) or weights.shape[0] != 3 or weights.shape[2:] != read:
        return f"attend: weights have shape {tuple(weights.shape)}, expected [3, heads, {', '.join(map(str, read))}]"
    if bool((weights.movedim(-1, 1)[~t.mask] != 0).any()):
        return "attend: padded slots have weights other than 0"
    if not t.ragged:
        return None
    ragged = attend(Bags.from_padded(t.x, t.mask))[1]
    if ragged is None or (difference := _difference(weights.movedim(1, -1)[t.mask].T, ragged)) > 1e-10:
        came = "no weights" if ragged is None else f"weights that differ by {difference:.3g}"
        return f"attend: the same sets as Bags give {came}, expected [heads, {int(t.mask.sum())}], set after set"
    return None


def _rule_wrong_input_is_named(t: _Trial) -> str | None:
    wrong: list[tuple[str, Callable[[], Tensor]]] = [
        ("tokens of another width", lambda: t.pool(t.randn(2, t.tokens, t.dim + 1))),
        ("a mask of another shape", lambda: t.pool(t.x, t.mask[:, 1:])),
        ("an integer mask", lambda: t.pool(t.x, t.mask.long())),
    ]
    return rules.unnamed_input(dict(wrong))


_RULES: tuple[Callable[[_Trial], str | None], ...] = (
    _rule_output_shape,
    _rule_padded_slots_are_not_read,
    _rule_padded_slots_leave_gradients_alone,
    _rule_padding_length_is_not_seen,
    _rule_full_mask_is_no_mask,
    _rule_ragged_equals_padded,
    _rule_order_of_tokens,
    _rule_batch_mates,
    _rule_one_token,
    _rule_no_token_gives_zeros,
    _rule_empty_set_has_finite_gradients,
    _rule_gradients_are_right,
    rules._rule_gradient_reaches_every_parameter,
    _rule_half_precision,
    _rule_half_precision_over_many_tokens,
    _rule_torch_compile_in_one_graph,
    _rule_torch_export,
    rules._rule_deepcopy,
    rules._rule_safetensors_round_trip,
    rules._rule_state_is_registered,
    _rule_training_is_stored,
    _rule_non_contiguous_input,
    _rule_attend_agrees_with_calling,
    _rule_wrong_input_is_named,
)
