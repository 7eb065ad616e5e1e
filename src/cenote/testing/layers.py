"""The contract of a pool of layer stacks, as a check that anybody can run on their own class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cenote.testing import pools, rules
from cenote.testing.contract import difference as _difference
from cenote.testing.contract import run_rules
from cenote.testing.pools import _Trial


def check_layer_pool(pool: nn.Module, *, layers: int | None = None, tokens: int = 7, seed: int = 0) -> None:
    """Check everything that cenote promises of a pool of layer stacks `[batch, layers, tokens, dim]`.

    Masks: what stands in padded slots of any layer, NaN included, and how many such slots there are, never changes a result.
    A stack's result does not depend on its batch mates, nor, where declared, on the order of its tokens or of its layers. One
    token works; no token gives zeros. Gradients agree with finite differences in float64 and reach every parameter. Half
    precision is finite and close. The module compiles in one graph, exports, deep-copies, survives safetensors, repeats
    itself, and takes non-contiguous input. A wrong input is named.

    The pool given is not changed. Parameters are shaken in a copy, because zeros at initialisation hide mistakes.

    Args:
        pool: with `dim`, `out_dim` and the attributes of `cenote.pool.LayerPool`.
        layers: of the trial stacks; default what the pool says, else one more than it needs.
        tokens: number of tokens in the trial stacks.
        seed: of the trial inputs.

    Raises:
        ContractError: with one line per broken rule.

    Example:
        >>> check_layer_pool(cenote.pool.WeightedLayerSum(8, layers=3))
    """
    run_rules(pool, _RULES, _LayerTrial(pool, layers, tokens, seed))


class _LayerTrial(_Trial):
    """As the trial of a pool of sets, with stacks for inputs."""

    def __init__(self, pool: nn.Module, layers: int | None, tokens: int, seed: int) -> None:
        super().__init__(pool, tokens, seed)
        own = getattr(pool, "layers", None)
        needed = int(getattr(pool, "min_layers", 1))
        self.layers: int = layers if layers is not None else own if isinstance(own, int) else needed + 1
        self.counts_layers = isinstance(own, int)
        self.layer_invariant = bool(getattr(pool, "layer_invariant", False))
        self.x = self.randn(3, self.layers, tokens, self.dim)

    def filled(self, content: float) -> Tensor:
        return self.x.masked_fill(~self.mask[:, None, :, None], content)


def _rule_output_shape(t: _LayerTrial) -> str | None:
    y = t.pool(t.x)
    if y.shape != (3, t.out_dim):
        return f"output shape: got {tuple(y.shape)} for 3 stacks, expected [3, {t.out_dim}] from out_dim"
    return None


def _rule_padded_slots_are_not_read(t: _LayerTrial) -> str | None:
    reference = t.pool(t.filled(0), t.mask)
    for content, name in ((float("nan"), "NaN"), (1e3, "1000")):
        if (difference := _difference(reference, t.pool(t.filled(content), t.mask))) > 1e-10:
            return f"padding leaks: {name} in padded slots changes the output by {difference:.3g}; clean values by the mask"
    return None


def _rule_padding_length_is_not_seen(t: _LayerTrial) -> str | None:
    x = torch.cat([t.x, t.randn(3, t.layers, 4, t.dim)], 2)
    mask = torch.cat([t.mask, torch.zeros(3, 4, dtype=torch.bool)], 1)
    if (difference := _difference(t.pool(t.x, t.mask), t.pool(x, mask))) > 1e-10:
        return f"padding leaks: four more padded slots change the output by {difference:.3g}; count tokens, not slots"
    return None


def _rule_order_of_tokens(t: _LayerTrial) -> str | None:
    order = torch.randperm(t.tokens, generator=t.generator)
    if t.permutation_invariant and (difference := _difference(t.pool(t.x), t.pool(t.x[:, :, order]))) > 1e-10:
        return (
            f"order: permuting the tokens changes the output by {difference:.3g}, "
            f"but permutation_invariant is declared True"
        )
    return None


def _rule_order_of_layers(t: _LayerTrial) -> str | None:
    if t.layer_invariant and (difference := _difference(t.pool(t.x), t.pool(t.x.flip(1)))) > 1e-10:
        return (
            f"order: reversing the layers changes the output by {difference:.3g}, but layer_invariant is declared True"
        )
    return None


def _rule_one_token(t: _LayerTrial) -> str | None:
    return None if bool(t.pool(t.x[:, :, :1]).isfinite().all()) else "one token: the output is not finite"


def _rule_no_token_gives_zeros(t: _LayerTrial) -> str | None:
    mask = t.mask.clone()
    mask[1] = False
    for name, y in (("a mask without True", t.pool(t.x, mask)[1]), ("zero token slots", t.pool(t.x[:, :, :0]))):
        if not torch.equal(y, torch.zeros_like(y)):
            return f"no token: {name} gives {'NaN' if y.isnan().any() else 'values that are not zero'}, expected zeros"
    return None


def _rule_non_contiguous_input(t: _LayerTrial) -> str | None:
    x = t.x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    if (difference := _difference(t.pool(t.x), t.pool(x))) > 1e-10:
        return f"memory layout: the same numbers with other strides change the output by {difference:.3g}"
    return None


def _rule_attend_agrees_with_calling(t: _LayerTrial) -> str | None:
    attend = getattr(t.pool, "attend", None)
    if attend is None:
        return "attend: the pool has no attend(x, mask) method"
    output, weights = attend(t.x, t.mask)
    if (difference := _difference(output, t.pool(t.x, t.mask))) > 1e-10:
        return f"attend: its output differs from the call's by {difference:.3g}"
    if weights is None:
        return None
    if weights.dim() != 4 or weights.shape[0] != 3 or weights.shape[2:] != (t.layers, t.tokens):
        return f"attend: weights have shape {tuple(weights.shape)}, expected [3, heads, {t.layers}, {t.tokens}]"
    if bool((weights.permute(0, 3, 1, 2)[~t.mask] != 0).any()):
        return "attend: padded slots have weights other than 0"
    return None


def _rule_wrong_input_is_named(t: _LayerTrial) -> str | None:
    wrong: list[tuple[str, Callable[[], Tensor]]] = [
        ("a stack without layers axis", lambda: t.pool(t.x[:, 0])),
        ("tokens of another width", lambda: t.pool(t.randn(2, t.layers, t.tokens, t.dim + 1))),
        ("a mask of another shape", lambda: t.pool(t.x, t.mask[:, 1:])),
        ("an integer mask", lambda: t.pool(t.x, t.mask.long())),
        ("integers", lambda: t.pool(t.x.long())),
        ("a stack of no layers", lambda: t.pool(t.x[:, :0])),
    ]
    if t.counts_layers:
        wrong.append(("another number of layers", lambda: t.pool(torch.cat([t.x, t.x], 1))))
    return rules.unnamed_input(dict(wrong))


_RULES: tuple[Callable[[Any], str | None], ...] = (
    _rule_output_shape,
    pools._rule_determinism,
    _rule_padded_slots_are_not_read,
    _rule_padding_length_is_not_seen,
    pools._rule_full_mask_is_no_mask,
    _rule_order_of_tokens,
    _rule_order_of_layers,
    pools._rule_batch_mates,
    _rule_one_token,
    _rule_no_token_gives_zeros,
    pools._rule_empty_set_has_finite_gradients,
    pools._rule_gradients_are_right,
    rules._rule_gradient_reaches_every_parameter,
    pools._rule_half_precision,
    pools._rule_torch_compile_in_one_graph,
    pools._rule_torch_export,
    rules._rule_deepcopy,
    rules._rule_safetensors_round_trip,
    _rule_non_contiguous_input,
    _rule_attend_agrees_with_calling,
    _rule_wrong_input_is_named,
)
