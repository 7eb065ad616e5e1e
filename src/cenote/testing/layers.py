"""The contract of a pool of layer stacks, as a check that anybody can run on their own class."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from cenote.testing import pools, rules
from cenote.testing.contract import difference as _difference
from cenote.testing.contract import run_rules
from cenote.testing.pools import _Trial


def check_layer_pool(
    pool: nn.Module, *, layers: int | None = None, tokens: int = 7, seed: int = 0, leave_out: Collection[str] = ()
) -> None:
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
        leave_out: names of rules that are not checked; a broken rule's name stands at the end of its line.

    Raises:
        ContractError: with one line per broken rule.
        InputError: where `leave_out` names a rule that there is not.

    Example:
        >>> check_layer_pool(cenote.pool.WeightedLayerSum(8, layers=3))
    """
    run_rules(pool, _RULES, _LayerTrial(pool, layers, tokens, seed), leave_out=leave_out)


class _LayerTrial(_Trial):
    """As the trial of a pool of sets, with stacks for inputs."""

    padding = "~mask[:, None, :, None]"

    def __init__(self, pool: nn.Module, layers: int | None, tokens: int, seed: int) -> None:
        super().__init__(pool, tokens, seed)
        self.ragged = False
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


def _rule_order_of_layers(t: _LayerTrial) -> str | None:
    if t.layer_invariant and (difference := _difference(t.pool(t.x), t.pool(t.x.flip(1)))) > 1e-10:
        return (
            f"order: reversing the layers changes the output by {difference:.3g}, but layer_invariant is declared True"
        )
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
    rules._rule_determinism,
    pools._rule_padded_slots_are_not_read,
    pools._rule_padding_length_is_not_seen,
    pools._rule_full_mask_is_no_mask,
    pools._rule_order_of_tokens,
    _rule_order_of_layers,
    pools._rule_batch_mates,
    pools._rule_one_token,
    pools._rule_no_token_gives_zeros,
    pools._rule_empty_set_has_finite_gradients,
    pools._rule_gradients_are_right,
    rules._rule_gradient_reaches_every_parameter,
    pools._rule_half_precision,
    pools._rule_torch_compile_in_one_graph,
    pools._rule_torch_export,
    rules._rule_deepcopy,
    rules._rule_safetensors_round_trip,
    pools._rule_non_contiguous_input,
    pools._rule_attend_agrees_with_calling,
    _rule_wrong_input_is_named,
)
