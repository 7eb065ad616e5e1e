"""Every function of cenote checks its annotations, shapes included, whenever a test calls it.

- **What a test sees of wrong input is our own error.** Annotations are checked when a function returns, its arguments with what
  it gives back: one that raises `InputError` has said already what is wrong; one that swallows wrong shapes is found out.
- **Off while PyTorch traces** (`torch.compile`, `torch.export`): what is traced is what users run, without the checks.
- **Off in functions inside functions**: each call makes them anew, and would compile their checks anew.
- **Off in generators**, context managers among them: these are returned before they have looked at what they were given.
- **Off in Triton's kernels**: Triton reads their source, and runs it elsewhere. Off in the processes that tests start.
- **Off altogether** with `JAXTYPING_DISABLE=1` in the environment, to see what the checks cost.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

import jaxtyping
import torch
from beartype import BeartypeConf, FrozenDict, beartype

KERNELS = "cenote.core.triton_kernels"
# an int is a float, as for type checkers; columns of data are not looked into, because that reads them from the disk
COLUMNS = Mapping[str, Sequence[Any]]
CONF = BeartypeConf(is_pep484_tower=True, hint_overrides=FrozenDict({COLUMNS: Mapping}))

_jaxtyped = jaxtyping.jaxtyped


def typechecker(function: Callable[..., Any]) -> Callable[..., Any]:
    """Of the two empty functions that jaxtyping has checked, the one that also takes what was returned."""
    # beartype knows `Self` only inside of classes that it decorates
    function.__annotations__ = {n: Any if "typing.Self" in repr(a) else a for n, a in function.__annotations__.items()}
    if any(name.startswith("ret") and name[3:].isdigit() for name in inspect.signature(function).parameters):
        return beartype(conf=CONF)(function)
    return function


def jaxtyped(*, typechecker: Callable[..., Any]) -> Callable[..., Any]:
    """In the place of jaxtyping's decorator, which cannot be traced."""

    def checked_function(function: FunctionType) -> Callable[..., Any]:
        # made when it is first called: a third of all functions never are by one process of tests
        checked: Callable[..., Any] | None = None

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal checked
            if torch.compiler.is_compiling():
                return function(*args, **kwargs)
            if checked is None:
                checked = _jaxtyped(function, typechecker=typechecker)
            return checked(*args, **kwargs)

        # a code of its own: Dynamo counts by code how often it had to compile again
        call.__code__ = call.__code__.replace(co_name=function.__name__)
        return call

    def decorate(made: Any) -> Any:
        if isinstance(made, FunctionType):
            if "<locals>" in made.__qualname__ or inspect.isgeneratorfunction(made):
                return made
            return checked_function(made)
        if dataclasses.is_dataclass(made) and "__init__" in vars(made):
            made.__init__ = checked_function(made.__init__)
        return made

    return decorate


def install() -> None:
    """From here on, for what is imported later."""
    jaxtyping.jaxtyped = jaxtyped
    finder: Any = jaxtyping.install_import_hook("cenote", "tests.checked.typechecker").hook
    instruments = finder.should_instrument
    finder.should_instrument = lambda name: name != KERNELS and instruments(name)
