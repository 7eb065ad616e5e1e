"""Another module in a place of a running model."""

from __future__ import annotations

import ast
import inspect
import textwrap
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from cenote.core import InputError
from cenote.models.live.calls import Place, may_read, real_tokens
from cenote.models.live.edited import require_module

_LOCK = threading.RLock()
_STANDING: dict[tuple[nn.Module, str], list[tuple[object, nn.Module]]] = {}
"""Of a parent and a name: what the model had there, then what each context put there, in the order of entering."""


class AsMixer(nn.Module):
    """A mixer `(x, mask=None, positions=None) -> x'` that is called, and answers, as the attention whose place it takes.

    Args:
        mixer: what mixes.
        old: the attention, for the names of its arguments and the form of its answer; it is not run, nor a submodule.
    """

    def __init__(self, mixer: nn.Module, old: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer
        self._names = list(inspect.signature(old.forward).parameters)
        self._gives = _length(old.forward)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        x = given.get("hidden_states", given.get(self._names[0]))
        if not isinstance(x, Tensor):
            raise InputError("module: its place is called without hidden states, first or by the name hidden_states")
        positions = given.get("position_ids")
        if isinstance(positions, Tensor) and positions.shape == (1, x.shape[1]):
            # a model that counts from 0 does so once for the whole batch
            positions = positions.expand(x.shape[:2])
        y = self.mixer(x, mask=told_mask(given.get("attention_mask"), x), positions=positions)
        if y.shape != x.shape:
            raise InputError(
                f"module: a mixer gave {tuple(y.shape)} for states {tuple(x.shape)}; expected the same shape"
            )
        return y if self._gives is None else (y, *[None] * (self._gives - 1))


def as_mixer(mixer: nn.Module) -> Callable[[nn.Module], nn.Module]:
    """For `swapped`: this mixer, dressed as what stands in the place."""
    return lambda old: AsMixer(mixer, old)


@contextmanager
def swapped(
    model: nn.Module, modules: Mapping[Place | str, nn.Module | Callable[[nn.Module], nn.Module]]
) -> Iterator[None]:
    """Run a model with other modules in some places; on leaving the old ones stand there, also after an exception.

    Contexts may be nested and left in any order. A new module is moved to the device and dtype of the one whose place it takes,
    and follows its training mode; gradients reach it.

    Args:
        model: any module; not compiled.
        modules: of a place or path, the module that is called as the old one was; or a function that makes it from the old
            one, as `as_mixer(mixer)`.

    Raises:
        InputError: for a place that is not in the model, one inside of another, or what is no module.
    """
    require_module(model)
    if not modules:
        raise InputError("modules: give at least one")
    if not isinstance(modules, Mapping):
        raise InputError(f"modules: expected a module for each place or path, got {type(modules).__name__}")
    seats = {_seat(model, place): place for place in modules}
    _check_apart(seats, len(modules))
    new: dict[tuple[nn.Module, str], nn.Module] = {}
    for ((parent, name), _), given in zip(seats.items(), modules.values(), strict=True):
        old = parent.get_submodule(name)
        module = given if isinstance(given, nn.Module) or not callable(given) else given(old)
        if not isinstance(module, nn.Module):
            raise InputError(f"modules: expected a torch.nn.Module, got {type(module).__name__}")
        like = next((p for p in old.parameters() if p.is_floating_point()), None)
        if like is not None:
            module.to(like.device, like.dtype)
        new[parent, name] = module.train(old.training)
    run = object()
    try:
        with _LOCK:
            for (parent, name), module in new.items():
                standing = _STANDING.setdefault((parent, name), [(None, parent._modules[name])])  # type: ignore[list-item]
                standing.append((run, module))
                parent._modules[name] = module
        yield
    finally:
        try:
            _leave(run, new)
        except BaseException:
            # interrupted: what was left already is left once more
            _leave(run, new)
            raise


def _leave(run: object, seats: Iterable[tuple[nn.Module, str]]) -> None:
    with _LOCK:
        for seat in seats:
            parent, name = seat
            left = [(who, module) for who, module in _STANDING.get(seat, []) if who is not run]
            if not left:
                continue
            parent._modules[name] = left[-1][1]
            _STANDING[seat] = left
            if len(left) == 1:
                del _STANDING[seat]


def _check_apart(seats: Mapping[tuple[nn.Module, str], Place | str], given: int) -> None:
    """What stands inside of a module that goes would go with it, and nobody would notice."""
    if len(seats) < given:
        raise InputError("modules: one place is given twice; name each once, by its place or by its path")
    paths = {seat: place.path if isinstance(place, Place) else place for seat, place in seats.items()}
    for (parent, name), path in paths.items():
        below = set(parent.get_submodule(name).modules())
        inside = next((other for (above, _), other in paths.items() if above in below), None)
        if inside is not None:
            raise InputError(
                f"modules: {inside!r} stands inside of {path!r}, which is swapped too; give one of them, or put the inner one "
                f"into what takes the place of the outer"
            )


def _seat(model: nn.Module, place: Place | str) -> tuple[nn.Module, str]:
    path = place.path if isinstance(place, Place) else place
    if not isinstance(path, str):
        raise InputError(f"modules: expected places or paths as keys, such as 'layers.0.attn', got {path!r}")
    above, _, name = path.rpartition(".")
    try:
        parent, module = model.get_submodule(above), model.get_submodule(path)
    except AttributeError:
        raise InputError(f"modules: {path!r} is no module of {type(model).__name__}") from None
    if not path:
        raise InputError("modules: the whole model cannot be swapped; give a path inside of it")
    if isinstance(place, Place) and module is not place.module and (parent, name) not in _STANDING:
        raise InputError(f"modules: {path!r} is of another model; take places of this one")
    return parent, name


def _length(forward: Callable[..., Any]) -> int | None:
    """How many values its answer has, by its source where that shows, else by what it says; None = no tuple."""
    # `-> tuple[Tensor]` is written where two values are returned
    written = _returned(inspect.unwrap(forward))
    if written:
        return written
    answer = inspect.signature(inspect.unwrap(forward), eval_str=False).return_annotation
    text = answer if isinstance(answer, str) else str(answer)
    if "tuple[" not in text.lower():
        return None
    inside = text[text.lower().index("tuple[") + 6 : text.rindex("]")]
    depth, commas = 0, 0
    for letter in inside:
        depth += (letter == "[") - (letter == "]")
        commas += letter == "," and depth == 0
    return commas + 1


def _returned(forward: Callable[..., Any]) -> int:
    """As many values as each of its `return` statements spells out; 0 where they differ or do not."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return 0
    lengths = set()
    left: list[ast.AST] = [*ast.iter_child_nodes(tree.body[0])]
    while left:
        node = left.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            continue
        if isinstance(node, ast.Return):
            spelt = isinstance(node.value, ast.Tuple) and not any(isinstance(e, ast.Starred) for e in node.value.elts)
            lengths.add(len(node.value.elts) if spelt and isinstance(node.value, ast.Tuple) else 0)
        left += ast.iter_child_nodes(node)
    return lengths.pop() if len(lengths) == 1 else 0


def told_mask(mask: Any, x: Tensor) -> Tensor | None:
    """Which tokens are real by a block's mask, `[batch, tokens]`: those that read themselves; None without a mask."""
    if not isinstance(mask, Tensor):
        return None
    seen = mask[..., -x.shape[1] :]
    return may_read(seen) if mask.dim() == 2 else real_tokens(seen, len(x))
