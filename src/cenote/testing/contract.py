"""What the contract checks share: rules that are functions, run one by one, and the error that lists the broken ones."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from cenote.core.errors import InputError
from cenote.core.requirements import require_several

Rule = Callable[[Any], str | None]


class ContractError(AssertionError):
    """A class breaks its contract; the message has one line per broken rule.

    Attributes:
        broken: the names of the broken rules.
    """

    def __init__(self, message: str, broken: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.broken = tuple(broken)


def require_attributes(subject: object, what: Mapping[str, str]) -> None:
    """Before any rule: the integers that a class must have to be tried at all.

    Raises:
        ContractError: naming the first that is missing; `what` says what each of them is.
    """
    for name, meaning in what.items():
        if not isinstance(getattr(subject, name, None), int):
            raise ContractError(
                f"{type(subject).__name__} breaks 1 rule of its contract:\n- attributes: {name}, {meaning}, is missing or "
                f"is no int; set self.{name} in the constructor [rule: attributes]",
                ("attributes",),
            )


def title(rule: Rule) -> str:
    """The name of a rule, as people read and write it."""
    return rule.__name__.removeprefix("_rule_").replace("_", " ")


def run_rules(
    subject: object,
    rules: Sequence[Rule],
    trial: object,
    *,
    leave_out: Collection[str] = (),
    first: Sequence[Rule] = (),
) -> None:
    """Run every rule on the trial and raise `ContractError` with a line for each that is broken.

    Args:
        subject: what is checked; its class names it.
        rules: each returns `None`, or what is wrong.
        trial: what the rules are given.
        leave_out: names of rules that are not run.
        first: rules that the others rest on: where one of them is broken, it is reported alone.

    Raises:
        ContractError: with one line per broken rule.
        InputError: where `leave_out` names a rule that there is not.
    """
    require_several(leave_out=leave_out)
    names = [title(rule) for rule in (*first, *rules)]
    if unknown := sorted(set(leave_out) - set(names)):
        raise InputError(f"leave_out: there is no rule {unknown[0]!r}; the rules are {', '.join(map(repr, names))}")
    broken: dict[str, str] = {}
    for i, rule in enumerate((*first, *rules)):
        name = names[i]
        if name in leave_out:
            continue
        try:
            message = rule(trial)
        except Exception as error:  # a rule that crashes is a rule that is broken
            message = f"{name}: raised {type(error).__name__}: {str(error)[:500]}"
        if message:
            broken[name] = message
            if i < len(first):
                break
    if broken:
        count = "1 rule" if len(broken) == 1 else f"{len(broken)} rules"
        lines = (f"- {message} [rule: {name}]" for name, message in broken.items())
        raise ContractError(
            f"{type(subject).__name__} breaks {count} of its contract:\n" + "\n".join(lines), tuple(broken)
        )


def difference(a: Tensor, b: Tensor) -> float:
    """The largest difference between two tensors, relative to their largest number where that is above 1.

    Infinite where shapes differ, or where one is NaN and the other is not.
    """
    if a.shape != b.shape:
        return float("inf")
    a, b = a.detach().double(), b.detach().double()
    apart = (a - b).abs()[(a != b) & ~(a.isnan() & b.isnan())]
    if not apart.numel():
        return 0.0
    if bool(apart.isnan().any()):
        return float("inf")
    finite = a[a.isfinite()].abs()
    return float(apart.max()) / max(1.0, float(finite.max()) if finite.numel() else 0.0)
