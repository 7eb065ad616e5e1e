"""The contract of mixers, as a check that anybody can run on their own."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.testing.contract import ContractError, difference, run_rules

CLOSE = 1e-9
EXPORTED = 1e-7
HALF = 0.1
SEEN = 1e-12
LENGTHS = (6, 4, 1, 0)
NO_NUMBER = float("nan")
UNLIKELY_SEED = 582_901_433


@runtime_checkable
class Mixing(Protocol):
    """What is checked: a mixer, of `cenote.mix` or your own."""

    causal: bool
    order_matters: bool

    def __call__(self, x: Tensor, mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """From tokens to as many tokens."""


class _Trial:
    """A copy of the mixer in float64 and eval mode, parameters off their zeros and ones, and what it is called with."""

    def __init__(self, mixer: Any, dim: int, seed: int) -> None:
        self.given = mixer
        self.generator = torch.Generator().manual_seed(seed)
        self.mixer: Any = copy.deepcopy(mixer)
        if isinstance(mixer, nn.Module):
            self.mixer = self.mixer.double().eval()
            with torch.no_grad():
                for p in self.mixer.parameters():
                    p.add_(0.3 * torch.randn(p.shape, generator=self.generator, dtype=torch.float64))
        self.dim = dim
        self.prefix = int(getattr(mixer, "prefix", 0))
        self.of_grid = hasattr(mixer, "mix_grid")
        self.fixed = getattr(mixer, "grid", None) if self.of_grid else None
        self.grid: tuple[int, int] = (3, 3) if self.fixed is None else self.fixed
        cells = self.grid[0] * self.grid[1]
        self.tokens = cells + self.prefix if self.of_grid else max(LENGTHS) + 1
        self.lengths = [min(n, self.tokens) for n in (self.tokens, *LENGTHS[1:])]
        self.x = self.randn(len(self.lengths), self.tokens)
        self.mask = torch.arange(self.tokens) < torch.tensor(self.lengths)[:, None]

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, self.dim, generator=self.generator, dtype=torch.float64)

    def mixed(self, x: Tensor | None = None, mask: Tensor | None = None, **more: Any) -> Tensor:
        return self.mixer(self.x if x is None else x, self.mask if mask is None else mask, **more)

    def whole(self, x: Tensor | None = None) -> Tensor:
        """The first set, which has no padding, alone and without a mask."""
        return self.mixer(self.x[:1] if x is None else x)


def check_mixer(mixer: Mixing, dim: int = 8, *, leave_out: Collection[str] = (), seed: int = 0) -> None:
    """Check that a mixer keeps what is promised of every mixer.

    As many tokens come out, as wide and of the type that went in, and tokens do mix. What stands in padding, NaN included,
    reaches nothing; padding comes out as zeros, on whichever side it stands; batch mates change nothing. Where it is causal no
    token is changed by a later one, by a change of that token and by the gradient; where it says that order does not matter,
    tokens in another order come out in that order. One token works, none gives none, a set without a real token gives zeros
    and finite gradients. A mixer of grids takes any grid, rectangles and those larger than it was built for, unless it was
    given one, and passes the prefix. Gradients agree with finite differences and reach every parameter and every token. The
    same call gives the same, and the global generator stays as it is. bfloat16 comes back as such, near the exact output.
    `weights_of` is zero where nothing may be read, its rows sum to 1, and where the mixer is linear in values they are what
    the output is made of. `torch.export` changes nothing.

    The mixer given is not changed: a copy is tried, in float64, its parameters shaken, because zeros at initialisation hide
    mistakes.

    Args:
        mixer: to check.
        dim: width of the tokens that it takes.
        leave_out: names of rules that are not checked.
        seed: of the trial tokens.

    Raises:
        ContractError: with one line per broken rule.
        InputError: where `leave_out` names a rule that there is not.

    Example:
        >>> check_mixer(cenote.mix.PoolMixer())
    """
    for name in ("causal", "order_matters"):
        if not isinstance(getattr(mixer, name, None), bool):
            raise ContractError(
                f"{type(mixer).__name__} breaks 1 rule of its contract:\n- attributes: {name}, True or False, is missing "
                f"[rule: attributes]",
                ("attributes",),
            )
    run_rules(mixer, _RULES, _Trial(mixer, dim, seed), leave_out=leave_out, first=(_rule_form,))


def _rule_form(t: _Trial) -> str | None:
    found = t.mixed()
    if not isinstance(found, Tensor):
        return f"form: gave {type(found).__name__}, expected the mixed tokens alone"
    if found.shape != t.x.shape:
        return f"form: {list(t.x.shape)} came out as {list(found.shape)}"
    if found.dtype != t.x.dtype:
        return f"form: {t.x.dtype} came out as {found.dtype}"
    if not bool(found.isfinite().all()):
        return "form: the output is NaN or infinite"
    return None


def _rule_mixes(t: _Trial) -> str | None:
    if getattr(t.given, "mixes", True) is False:
        return None
    if not bool((_influence(t).abs() > SEEN).fill_diagonal_(False).any()):
        return "mixes: no token is changed by another; say mixes = False where that is meant"
    return None


def _rule_padding(t: _Trial) -> str | None:
    found = t.mixed()
    if bool((found[~t.mask] != 0).any()):
        return "padding: does not come out as zeros"
    hidden = ~t.mask.unsqueeze(-1)
    for value, what in ((NO_NUMBER, "NaN"), (1e6, "large numbers")):
        other = t.mixed(t.x.masked_fill(hidden, value))
        if difference(found, other) > 0:
            return f"padding: {what} in it reach the output"
    # a mask of all is no mask
    if difference(t.whole(), t.mixer(t.x[:1], t.mask[:1])) > CLOSE:
        return "padding: a mask that is True everywhere changes the output"
    return None


def _rule_absent_tokens(t: _Trial) -> str | None:
    """A sequence is the same with padding and without; a grid keeps its cells."""
    if t.of_grid:
        return None
    right = t.mixed()
    left = t.mixed(t.x.flip(1), t.mask.flip(1))
    for item, n in enumerate(t.lengths):
        if not n:
            continue
        alone = t.mixer(t.x[item : item + 1, :n])
        if difference(alone[0], right[item, :n]) > CLOSE:
            return f"absent tokens: {n} tokens come out otherwise with padding behind them than without"
        turned = t.mixer(t.x[item : item + 1, :n].flip(1))
        if difference(turned[0], left[item, t.tokens - n :]) > CLOSE:
            return f"absent tokens: {n} tokens come out otherwise with padding before them than without"
    return None


def _rule_batch_mates(t: _Trial) -> str | None:
    together = t.mixed()
    for item in range(len(t.lengths)):
        alone = t.mixer(t.x[item : item + 1], t.mask[item : item + 1])
        if difference(together[item : item + 1], alone) > CLOSE:
            return "batch mates: a set comes out otherwise alone than in a batch"
    return None


def _rule_causal(t: _Trial) -> str | None:
    if not t.given.causal:
        return None
    before = t.whole()
    for place in range(1, t.tokens):
        x = t.x[:1].clone()
        x[:, place:] = 3 * t.randn(1, t.tokens - place)
        if difference(before[:, :place], t.whole(x)[:, :place]) > CLOSE:
            return f"causal: other tokens from number {place} on change those before it"
    if bool((_influence(t).abs() > SEEN).triu(1).any()):
        return "causal: a token has a gradient by a later one"
    shorter = t.mixer(t.x[:1, : t.tokens // 2]) if not t.of_grid else before[:, : t.tokens // 2]
    if difference(before[:, : t.tokens // 2], shorter) > CLOSE:
        return "causal: the beginning of a sequence comes out otherwise alone"
    return None


def _rule_order(t: _Trial) -> str | None:
    order = torch.randperm(t.tokens, generator=torch.Generator().manual_seed(1))
    apart = difference(t.whole(t.x[:1, order]), t.whole()[:, order])
    if not t.given.order_matters and apart > CLOSE:
        return "order: tokens in another order come out otherwise; say order_matters = True"
    return None


def _rule_few_tokens(t: _Trial) -> str | None:
    none = t.mixed(mask=torch.zeros_like(t.mask))
    if bool((none != 0).any()):
        return f"few tokens: sets without a real token give {'NaN' if none.isnan().any() else 'no zeros'}"
    x = t.x.clone().requires_grad_()
    found = t.mixed(x)
    if found.requires_grad:
        (gradient,) = torch.autograd.grad(found.square().sum(), x)
        if not bool(gradient.isfinite().all()):
            return "few tokens: a set without a real token makes gradients NaN or infinite"
        if bool((gradient[~t.mask] != 0).any()):
            return "few tokens: gradients reach padding"
    if t.fixed is not None:
        return None
    for n in (1,) if t.of_grid else (1, 0):
        n += t.prefix
        found = t.mixer(t.x[:2, :n])
        if found.shape != (2, n, t.dim) or not bool(found.isfinite().all()):
            return f"few tokens: sets of {n} give {list(found.shape)}, or what is not finite"
    return None


def _rule_grids(t: _Trial) -> str | None:
    if not t.of_grid:
        return None
    found = t.whole()
    if t.prefix and not torch.equal(found[:, : t.prefix], t.x[:1, : t.prefix]):
        return "grids: tokens before the grid are changed"
    if t.fixed is not None:
        return None
    every = torch.ones(1, 7, 4, dtype=torch.bool)
    large, real = t.randn(1, 7, 4).movedim(-1, 1), every
    try:
        mixed = t.mixer.mix_grid(large, real)
    except InputError as error:
        return f"grids: 7 x 4 cells are refused ({error}); give the mixer a grid where it is made for one"
    if mixed.shape != large.shape:
        return f"grids: 7 x 4 cells came out as {list(mixed.shape[2:])}"
    by_token = copy.copy(t.mixer)
    by_token.grid = (7, 4)
    tokens = large.flatten(2).mT
    before = t.x[:1, : t.prefix]
    if difference(by_token(torch.cat([before, tokens], 1))[:, t.prefix :], mixed.flatten(2).mT) > CLOSE:
        return "grids: a map and its cells as tokens, row by row, come out differently"
    return None


def _rule_gradients(t: _Trial) -> str | None:
    mixer = copy.deepcopy(t.mixer)
    trained = [p for p in mixer.parameters() if p.requires_grad] if isinstance(mixer, nn.Module) else []

    def run(x: Tensor, *_: Tensor) -> Tensor:
        return mixer(x, t.mask)

    x = t.x.clone().requires_grad_()
    try:
        torch.autograd.gradcheck(run, (x, *trained), fast_mode=True)
    except RuntimeError as error:
        return f"gradients: disagree with finite differences in float64: {str(error)[:300]}"
    reached = _influence(t).abs().sum(0) > SEEN
    if not bool(reached.all()):
        return f"gradients: none reach token {int((~reached).nonzero()[0])}"
    inert = tuple(getattr(t.given, "inert_parameters", ()))
    y = run(t.x)
    grads = torch.autograd.grad((y * t.randn(*y.shape[:2])).sum(), trained, allow_unused=True) if trained else ()
    for (name, _), gradient in zip(
        ((n, p) for n, p in mixer.named_parameters() if p.requires_grad) if trained else (), grads, strict=True
    ):
        if name not in inert and (gradient is None or not bool((gradient.abs() > SEEN).any())):
            return f"gradients: none reach {name}; if that is inherent, declare it in inert_parameters"
    return None


def _rule_determinism(t: _Trial) -> str | None:
    with torch.random.fork_rng():
        torch.manual_seed(UNLIKELY_SEED)
        before = torch.get_rng_state()
        first, second = t.mixed(), t.mixed()
        after = torch.get_rng_state()
    if not torch.equal(before, after):
        return "determinism: the global random generator was used in eval mode"
    return None if torch.equal(first, second) else "determinism: the same call gave something else"


def _rule_input_is_left_alone(t: _Trial) -> str | None:
    x, mask = t.randn(2, t.tokens), t.mask[:2].clone()
    given = x.clone(), mask.clone()
    t.mixer(*given)
    if not torch.equal(given[0], x) or not torch.equal(given[1], mask):
        return "input is left alone: the call writes over what it is given"
    return None


def _rule_half_precision(t: _Trial) -> str | None:
    if not isinstance(t.mixer, nn.Module):
        return None
    found = copy.deepcopy(t.mixer).bfloat16()(t.x.bfloat16(), t.mask)
    if found.dtype != torch.bfloat16:
        return f"half precision: bfloat16 comes out as {found.dtype}"
    if not bool(found.isfinite().all()):
        return "half precision: bfloat16 gives NaN or infinity"
    if (apart := difference(t.mixed(), found)) > HALF:
        return f"half precision: bfloat16 is off by {apart:.0%} of the largest value"
    return None


def _rule_weights(t: _Trial) -> str | None:
    weights_of = getattr(t.mixer, "weights_of", None)
    weights = weights_of(t.x, t.mask) if callable(weights_of) else None
    if weights_of is None or weights is None:
        return None
    batch, n = t.mask.shape
    if weights.dim() != 4 or (weights.shape[0], *weights.shape[2:]) != (batch, n, n):
        return f"weights: are {list(weights.shape)}, expected [{batch}, heads, {n}, {n}]"
    if not bool(weights.isfinite().all()):
        return "weights: are NaN or infinite"
    if bool((weights.masked_select(~t.mask[:, None, None, :]) != 0).any()):
        return "weights: are given to padding"
    if t.given.causal and bool((weights.triu(1) != 0).any()):
        return "weights: are given to later tokens"
    sums = weights.sum(-1) - t.mask.unsqueeze(1).double()
    if float(sums.abs().max()) > CLOSE:
        return "weights: rows do not sum to 1 over the real tokens, or those of padding not to 0"
    if difference(weights, weights_of(t.x.masked_fill(~t.mask.unsqueeze(-1), NO_NUMBER), t.mask)) > 0:
        return "weights: what stands in padding changes them"
    return None


def _rule_weights_make_the_output(t: _Trial) -> str | None:
    """Where the mixer has values_of, or no parameters and one head: the weights times values are the output."""
    weights_of = getattr(t.mixer, "weights_of", None)
    weights = None if weights_of is None else weights_of(t.x, t.mask)
    if weights is None:
        return None
    x = t.x.masked_fill(~t.mask.unsqueeze(-1), 0.0)
    values_of = getattr(t.mixer, "values_of", None)
    if values_of is not None:
        values, out = values_of(x)
        made = out((weights @ values).transpose(1, 2).flatten(2)) * t.mask.unsqueeze(-1)
    elif weights.shape[1] == 1 and not any(True for _ in t.mixer.parameters()):
        made = weights[:, 0] @ x
    else:
        return None
    if difference(made, t.mixed()) > CLOSE:
        return "weights make the output: they do not, with the values that they weigh"
    return None


def _rule_export(t: _Trial) -> str | None:
    if not isinstance(t.mixer, nn.Module):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(copy.deepcopy(t.mixer), (t.x, t.mask))
    if (apart := difference(t.mixed(), exported.module()(t.x, t.mask))) > EXPORTED:
        return f"export: torch.export changes the output by {apart:.3g}"
    return None


def _rule_state(t: _Trial) -> str | None:
    if not isinstance(t.mixer, nn.Module):
        return None
    other = copy.deepcopy(t.mixer)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(t.mixer.state_dict())
    found = other(t.x, t.mask)
    return (
        None if torch.equal(found, t.mixed()) else "state: the state_dict does not hold all that the output depends on"
    )


def _influence(t: _Trial) -> Tensor:
    """How much each output token depends on each token, `[tokens, tokens]`, of the set without padding."""

    def run(x: Tensor) -> Tensor:
        return t.whole(x)

    jacobian = torch.autograd.functional.jacobian(run, t.x[:1].clone())
    assert isinstance(jacobian, Tensor)
    return jacobian[0, :, :, 0].abs().amax((1, 3))


_RULES = (
    _rule_mixes,
    _rule_padding,
    _rule_absent_tokens,
    _rule_batch_mates,
    _rule_causal,
    _rule_order,
    _rule_few_tokens,
    _rule_grids,
    _rule_gradients,
    _rule_determinism,
    _rule_input_is_left_alone,
    _rule_half_precision,
    _rule_weights,
    _rule_weights_make_the_output,
    _rule_state,
    _rule_export,
)
