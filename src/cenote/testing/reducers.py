"""The contract of reducers, as a check that anybody can run on their own."""

from __future__ import annotations

import copy
import random
from collections.abc import Collection, Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from cenote.core.reduced import Reduced
from cenote.testing.contract import difference, run_rules

CLOSE = 1e-5
HALF = 2e-2
LENGTHS = (17, 9, 1, 0)
PROTECTED = 2
NO_NUMBER = float("nan")
UNLIKELY_SEED = 582_901_433


@runtime_checkable
class Reducing(Protocol):
    """What is checked: a reducer, of `cenote.reduce` or your own."""

    needs: frozenset[str]
    keeps: Literal["members", "means", "directions"]
    counts: Literal["exact", "at most", "free"]
    order_matters: bool

    def __call__(
        self,
        x: Tensor,
        sizes: Tensor | None = None,
        mask: Tensor | None = None,
        protect: Tensor | int | None = None,
        **signals: Tensor,
    ) -> Any:
        """From tokens to something with `tokens`, `sizes`, `assignment` and `mask`."""


_SHAPES: Mapping[str, tuple[str | int, ...]] = {
    "attention": ("batch", 2, "tokens"),
    "keys": ("batch", 2, "tokens", 4),
    "values": ("batch", 2, "tokens", 4),
}


class _Trial:
    def __init__(self, reducer: Reducing, dim: int) -> None:
        self.reducer = reducer
        generator = torch.Generator().manual_seed(0)
        batch, tokens = len(LENGTHS), max(LENGTHS)
        self.x = torch.randn(batch, tokens, dim, generator=generator)
        self.mask = torch.arange(tokens) < torch.tensor(LENGTHS)[:, None]
        sized = {"batch": batch, "tokens": tokens}
        self.signals = {}
        for name in sorted(reducer.needs):
            form = [sized[s] if isinstance(s, str) else s for s in _SHAPES.get(name, ("batch", "tokens"))]
            self.signals[name] = torch.rand(form, generator=generator)

    def reduced(self, x: Tensor | None = None, mask: Tensor | None = None, **more: Any) -> Reduced:
        return self._whole(
            self.reducer(
                self.x if x is None else x, mask=self.mask if mask is None else mask, **{**self.signals, **more}
            )
        )

    def alone(self, item: int) -> Reduced:
        """One set without its padding."""
        n = LENGTHS[item]
        given = {name: self.cut(name, s[item : item + 1], slice(0, n)) for name, s in self.signals.items()}
        return self._whole(self.reducer(self.x[item : item + 1, :n], **given))

    def whole_set(self, x: Tensor | None = None, **more: Any) -> Reduced:
        """The longest set, alone."""
        given = {name: s[:1] for name, s in self.signals.items()}
        return self._whole(self.reducer(self.x[:1] if x is None else x, **{**given, **more}))

    def cut(self, name: str, signal: Tensor, at: Any) -> Tensor:
        axis = _SHAPES.get(name, ("batch", "tokens")).index("tokens")
        return signal[(slice(None),) * axis + (at,)]

    @staticmethod
    def _whole(found: Any) -> Reduced:
        return Reduced(found.tokens, found.sizes, found.assignment, found.mask)


def check_reducer(reducer: Reducing, dim: int = 8, *, leave_out: Collection[str] = ()) -> None:
    """Check that a reducer keeps what is promised of every reducer.

    Padding, what stands in it and batch mates change nothing. Each original went to a token or was dropped, and sizes say how
    many went where. Members are rows that went to their token; means are those by sizes, or stand within what they are means
    of; signals that are asked for are read. Every set keeps a budget, the empty one and that of one token too; a factor of 1
    changes no bit. Protected tokens stay as they are, in place. Equal tokens that are merged are merged to themselves. Where
    the order of tokens does not matter it does not. Half precision gives the same tokens to rounding; the same call gives the
    same, and global random generators stay as they are. Gradients reach every original that is in what is left.

    Args:
        reducer: to check; built with a factor of 2 or more, or whatever makes it reduce.
        dim: width of the tokens that it takes.
        leave_out: names of rules that are not checked.

    Raises:
        ContractError: with one line per broken rule.
        InputError: where `leave_out` names a rule that there is not.
    """
    run_rules(reducer, _RULES, _Trial(reducer, dim), leave_out=leave_out, first=(_rule_form,))


def _rule_form(trial: _Trial) -> str | None:
    found = trial.reduced()
    batch, left = found.sizes.shape
    if found.tokens.shape != (batch, left, trial.x.shape[2]):
        return f"form: tokens are {list(found.tokens.shape)}, sizes {list(found.sizes.shape)}"
    if found.assignment.shape != trial.mask.shape:
        return f"form: the assignment is {list(found.assignment.shape)}, the tokens {list(trial.mask.shape)}"
    if not bool(found.tokens.isfinite().all()):
        return "form: tokens are NaN or infinite"
    if bool((found.assignment >= left).any()) or bool((found.assignment[~trial.mask] != -1).any()):
        return "form: the assignment names tokens that there are not, or says that padding went somewhere"
    if bool((found.sizes[~found.real] != 0).any()) or bool((found.tokens[~found.real] != 0).any()):
        return "form: padding among what is left is not zero"
    return None


def _rule_reduces(trial: _Trial) -> str | None:
    found = trial.whole_set()
    if int(found.counts[0]) >= max(LENGTHS):
        return f"reduces: {max(LENGTHS)} tokens are {int(found.counts[0])} still"
    return None


def _rule_sizes(trial: _Trial) -> str | None:
    given = torch.where(trial.mask, torch.arange(1.0, trial.mask.shape[1] + 1).expand_as(trial.mask), 0.0)
    found = trial.reduced(sizes=given)
    left = found.sizes.shape[1]
    went = torch.zeros(len(given), left + 1).scatter_add(1, found.assignment.remainder(left + 1), given)[:, :left]
    if trial.reducer.keeps == "members" and not bool((found.assignment == -1)[trial.mask].any()):
        return None if difference(found.sizes, went) <= CLOSE else "sizes: are not those of what went to each token"
    if difference(found.sizes, went) > CLOSE:
        return "sizes: are not the sums of the sizes of what went to each token"
    return None


def _rule_nobody_is_lost(trial: _Trial) -> str | None:
    """What is left stands for somebody, and knows for how many."""
    found = trial.reduced()
    left = found.sizes.shape[1]
    members = torch.zeros(len(found.sizes), left + 1).scatter_add(
        1, found.assignment.remainder(left + 1), torch.ones_like(found.assignment, dtype=torch.float32)
    )[:, :left]
    if bool((members[found.real] == 0).any()):
        return "nobody is lost: a token is left to which no original went"
    if bool((members[~found.real] > 0).any()):
        return "nobody is lost: an original went to what the mask says is padding"
    return None


def _rule_batch_mates(trial: _Trial) -> str | None:
    together = trial.reduced()
    for item, n in enumerate(LENGTHS):
        alone = trial.alone(item)
        left = int(alone.counts[0])
        if int(together.counts[item]) != left:
            return f"batch mates: of {n} tokens {left} are left alone and {int(together.counts[item])} in a batch"
        if not torch.equal(together.assignment[item, :n], alone.assignment[0]):
            return f"batch mates: a set of {n} tokens is put together otherwise alone than in a batch"
        if difference(together.tokens[item, :left], alone.tokens[0, :left]) > CLOSE:
            return f"batch mates: tokens of a set of {n} differ alone and in a batch"
    return None


def _rule_padding(trial: _Trial) -> str | None:
    found = trial.reduced()
    filled = trial.x.masked_fill(~trial.mask.unsqueeze(-1), NO_NUMBER)
    signals = {}
    for name, signal in trial.signals.items():
        form = [1] * signal.dim()
        form[0], form[_SHAPES.get(name, ("batch", "tokens")).index("tokens")] = trial.mask.shape
        signals[name] = signal.masked_fill(~trial.mask.view(form), NO_NUMBER)
    other = trial.reduced(filled, **signals)
    if not torch.equal(found.assignment, other.assignment) or difference(found.tokens, other.tokens) > 0:
        return "padding: what stands in it reaches the result"
    return None


def _rule_left_padding(trial: _Trial) -> str | None:
    left = trial.mask.flip(1)
    found = trial.reduced()
    order = left.to(torch.uint8).argsort(dim=1, stable=True).argsort(dim=1)
    real_last = (trial.mask.to(torch.uint8).argsort(dim=1, stable=True)).gather(1, order)
    x = trial.x.gather(1, real_last.unsqueeze(-1).expand_as(trial.x))
    signals = {}
    for name, signal in trial.signals.items():
        axis = _SHAPES.get(name, ("batch", "tokens")).index("tokens")
        form = [1] * signal.dim()
        form[0], form[axis] = real_last.shape
        signals[name] = signal.gather(axis, real_last.view(form).expand_as(signal))
    other = trial.reduced(x, left, **signals)
    for item, n in enumerate(LENGTHS):
        if not torch.equal(found.assignment[item, :n], other.assignment[item, trial.mask.shape[1] - n :]):
            return "left padding: tokens are put together otherwise than with padding on the right"
    return None


def _rule_members(trial: _Trial) -> str | None:
    if trial.reducer.keeps != "members":
        return None
    found = trial.reduced()
    for item, token in found.real.nonzero().tolist():
        rows = trial.x[item, found.assignment[item] == token]
        if not bool((rows == found.tokens[item, token]).all(-1).any()):
            return "members: a token that is left is none of the rows that went to it"
    return None


def _rule_means(trial: _Trial) -> str | None:
    """Of originals of uneven sizes."""
    if trial.reducer.keeps == "members":
        return None
    given = trial.mask * torch.arange(1.0, trial.mask.shape[1] + 1)
    found = trial.reduced(sizes=given)
    own = getattr(trial.reducer, "mean_weights", "sizes") == "own"
    for item, token in found.real.nonzero().tolist():
        members = found.assignment[item] == token
        rows, weights = trial.x[item, members], given[item, members]
        value, slack = found.tokens[item, token], CLOSE * float(rows.abs().max())
        if own and trial.reducer.keeps == "means":
            if bool((value < rows.amin(0) - slack).any()) or bool((value > rows.amax(0) + slack).any()):
                return "means: a token that is left lies outside of what it is the mean of"
            continue
        mean = (weights[:, None] * rows).sum(0) / weights.sum()
        if trial.reducer.keeps == "directions" and len(rows) > 1:
            mean = torch.nn.functional.normalize(mean, dim=0)
        if not own and difference(value, mean) > 10 * CLOSE:
            return "means: a token that is left is not the mean, by sizes, of what went to it; say mean_weights = 'own'"
        if own and len(rows) > 1 and abs(float(value.norm()) - 1) > CLOSE:
            return "means: a merged token is not of unit length"
    return None


def _rule_signals(trial: _Trial) -> str | None:
    """What is asked for is read: a policy may look at one of several at a time, so all are changed together."""
    if not trial.signals:
        return None
    flipped = {
        name: signal.flip(_SHAPES.get(name, ("batch", "tokens")).index("tokens"))
        for name, signal in trial.signals.items()
    }
    found, other = trial.whole_set(), trial.whole_set(**{name: s[:1] for name, s in flipped.items()})
    if torch.equal(found.assignment, other.assignment) and torch.equal(found.tokens, other.tokens):
        return f"signals: {', '.join(trial.signals)}: asked for, and others change nothing"
    return None


def _rule_budget(trial: _Trial) -> str | None:
    budget = getattr(trial.reducer, "budget", None)
    if trial.reducer.counts == "free" or budget is None:
        return None
    asked, found = budget.of(torch.tensor(LENGTHS)), trial.reduced().counts
    broken = found != asked if trial.reducer.counts == "exact" else (found > asked) | (found < asked.clamp(max=1))
    if bool(broken.any()):
        return f"budget: of {list(LENGTHS)} tokens {asked.tolist()} may be left, and {found.tolist()} are"
    return None


def _rule_identity(trial: _Trial) -> str | None:
    budget = getattr(trial.reducer, "budget", None)
    if budget is None:
        return None
    whole: Any = copy.copy(trial.reducer)
    whole.budget = type(budget)(factor=1)
    given = {name: s[:1] for name, s in trial.signals.items()}
    found = whole(trial.x[:1], **given)
    if not torch.equal(found.tokens, trial.x[:1]):
        return "identity: a factor of 1 changes the tokens"
    if not torch.equal(found.assignment[0], torch.arange(max(LENGTHS))):
        return "identity: a factor of 1 puts tokens in other places"
    return None


def _rule_few_tokens(trial: _Trial) -> str | None:
    for n in (0, 1):
        x = trial.x[:2, :n]
        given = {name: trial.cut(name, s[:2], slice(0, n)) for name, s in trial.signals.items()}
        found = trial.reducer(x, **given)
        if found.tokens.shape != x.shape or not torch.equal(found.tokens, x):
            return f"few tokens: sets of {n} come back changed"
    return None


def _rule_protected(trial: _Trial) -> str | None:
    protect = torch.zeros_like(trial.mask[:1])
    protect[0, [0, 5, 16]] = True
    for asked, chosen in ((protect, protect[0]), (PROTECTED, torch.arange(max(LENGTHS)) < PROTECTED)):
        found = trial.whole_set(protect=asked)
        to = found.assignment[0, chosen]
        if bool((to < 0).any()) or len(to.unique()) != len(to):
            return "protected: a protected token was dropped or merged"
        if not torch.equal(found.tokens[0, to], trial.x[0, chosen]):
            return "protected: a protected token came back changed"
        others = found.assignment[0, ~chosen]
        if bool(torch.isin(others[others >= 0], to).any()):
            return "protected: other tokens went to a protected one"
        if not torch.equal(to, to.sort().values):
            return "protected: protected tokens are not in their order"
    return None


def _rule_order(trial: _Trial) -> str | None:
    if trial.reducer.order_matters:
        return None
    order = torch.randperm(max(LENGTHS), generator=torch.Generator().manual_seed(1))
    found = trial.whole_set()
    given = {name: trial.cut(name, s[:1], order) for name, s in trial.signals.items()}
    other = trial.reducer(trial.x[:1, order], **given)
    before, after = found.assignment[0, order], other.assignment[0]
    same = (before[:, None] == before) & (before >= 0)[:, None]
    also = (after[:, None] == after) & (after >= 0)[:, None]
    if not torch.equal(same, also) or not torch.equal(before < 0, after < 0):
        return "order: other tokens are put together or dropped where tokens come in another order; say order_matters"
    return None


def _rule_duplicates(trial: _Trial) -> str | None:
    """A set of one vector many times has nothing to lose."""
    x = torch.nn.functional.normalize(trial.x[:1, :1], dim=-1).expand(-1, max(LENGTHS), -1)
    found = trial.whole_set(x)
    if difference(found.tokens, x[:, : found.tokens.shape[1]]) > CLOSE:
        return "duplicates: equal tokens were merged to something else"
    return None


def _rule_half_precision(trial: _Trial) -> str | None:
    for dtype in (torch.bfloat16, torch.float16):
        x = trial.x.to(dtype)
        found, exact = trial.reduced(x), trial.reduced(x.float())
        if found.tokens.dtype != dtype:
            return f"half precision: {dtype} tokens come back as {found.tokens.dtype}"
        if not bool(found.tokens.isfinite().all()):
            return f"half precision: {dtype} gives NaN or infinity"
        if not torch.equal(found.assignment, exact.assignment) or difference(found.tokens, exact.tokens) > HALF:
            return f"half precision: {dtype} tokens go elsewhere than the same numbers in float32"
    return None


def _rule_determinism(trial: _Trial) -> str | None:
    with torch.random.fork_rng():
        # a state that nobody seeds
        torch.manual_seed(UNLIKELY_SEED)
        before = _generators()
        first, second = trial.reduced(), trial.reduced()
        after = _generators()
    if before != after:
        return "determinism: the global random generator was used; take a seed"
    if not torch.equal(first.tokens, second.tokens) or not torch.equal(first.assignment, second.assignment):
        return "determinism: the same call gave something else"
    return None


def _rule_gradients(trial: _Trial) -> str | None:
    x = trial.x.clone().requires_grad_()
    found = trial.reduced(x)
    if not found.tokens.requires_grad:
        return "gradients: none reach the input"
    along = torch.randn(found.tokens.shape, generator=torch.Generator().manual_seed(2))
    (gradient,) = torch.autograd.grad((found.tokens * along).sum(), x)
    if not bool(gradient.isfinite().all()):
        return "gradients: are NaN or infinite"
    if not bool((gradient.abs().sum(-1) > 0)[_shown(trial, found)].all()):
        return "gradients: do not reach every original that is in what is left"
    if bool(gradient[~trial.mask].abs().sum() > 0):
        return "gradients: reach padding"
    return None


def _generators() -> tuple[Any, ...]:
    """States of the generators that everybody shares."""
    state: Any = np.random.get_state()
    _, key, place, *rest = state
    return torch.get_rng_state().numpy().tobytes(), key.tobytes(), place, *rest, random.getstate()


def _shown(trial: _Trial, found: Reduced) -> Tensor:
    """The originals that are in what is left: of members those that are the tokens themselves."""
    went = found.assignment >= 0
    if trial.reducer.keeps != "members":
        return went
    return went & (found.expand(found.tokens) == trial.x).all(-1)


def _rule_expand(trial: _Trial) -> str | None:
    found = trial.reduced()
    number = torch.arange(1.0, found.sizes.shape[1] + 1).expand_as(found.sizes)
    if not torch.equal(found.expand(number), (found.assignment + 1).float()):
        return "expand: the scores of what is left are not those of its originals"
    return None


_RULES = (
    _rule_reduces,
    _rule_sizes,
    _rule_nobody_is_lost,
    _rule_batch_mates,
    _rule_padding,
    _rule_left_padding,
    _rule_members,
    _rule_means,
    _rule_signals,
    _rule_budget,
    _rule_identity,
    _rule_few_tokens,
    _rule_protected,
    _rule_order,
    _rule_duplicates,
    _rule_half_precision,
    _rule_determinism,
    _rule_gradients,
    _rule_expand,
)
