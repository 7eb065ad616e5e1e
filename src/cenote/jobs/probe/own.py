"""Pools of one's own in a comparison that no name builds: pools that are there already, and functions that build them."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import sys
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from cenote.catalog import Method, create, methods
from cenote.catalog.entries import entry_of
from cenote.core import InputError, files
from cenote.core.seeded import seeded
from cenote.features import TokenDataset

Choice = str | type | nn.Module | tuple[str, Any]
"""What is compared: a name, a class, a pool, or a name with a pool or with a function of the tokens' width."""

NOT_ITS_OWN = frozenset(vars(nn.Module()))
"""What every module keeps."""


@dataclass(frozen=True, eq=False)
class Given:
    """A pool of one's own before the data are known.

    Attributes:
        name: in the table.
        build: of the tokens' width: a pool.
        pool: the pool, where it is there already: every seed begins at its weights.
    """

    name: str
    build: Callable[[int], Any]
    pool: nn.Module | None = None

    @classmethod
    def read(cls, wanted: object) -> Given:
        """Out of a pool, or a name with a pool or a function.

        Raises:
            InputError: where it is something else.
        """
        name, made = wanted if isinstance(wanted, tuple) and len(wanted) == 2 else (type(wanted).__name__, wanted)
        if isinstance(name, str) and name and not set(name) & set(",@"):
            if isinstance(made, nn.Module):
                return cls(name, lambda _: copy.deepcopy(made), made)
            if callable(made) and isinstance(wanted, tuple):
                return cls(name, made)
        raise InputError(
            f'methods: expected names, classes, pools, or ("name", function of the width of a token), got {wanted!r}; a '
            f"name has neither comma nor @"
        )

    def entry(self, dim: int) -> OwnMethod:
        """What is tried on tokens of some width.

        Raises:
            InputError: where no pool comes out.
        """
        pool = self.pool if self.pool is not None else self._built(dim)
        plain = entry_of(type(pool), self.name)
        how = "a pool of your own" if self.pool is not None else "built by a function of your own"
        told = {field.name: getattr(plain, field.name) for field in dataclasses.fields(Method)}
        told["summary"] = f"{plain.summary} ({plain.path}, {how})"
        return OwnMethod(**told, given=self, built=type(pool))

    def _built(self, dim: int) -> nn.Module:
        try:
            with seeded(0):
                pool = self.build(dim)
        except Exception as error:  # whatever somebody's function raises
            raise InputError(
                f"{self.name}: its function raised {type(error).__name__} for tokens of width {dim}: {error}"
            ) from None
        if not isinstance(pool, nn.Module):
            raise InputError(f"{self.name}: its function returned {type(pool).__name__}, expected a pool")
        return pool


@dataclass(frozen=True)
class OwnMethod(Method):
    """A pool of one's own, as the catalog would list it.

    Attributes:
        given: what builds it.
        built: the class that comes out.
    """

    given: Given | None = None
    built: type[Any] = object

    def load(self) -> type[Any]:
        """The class, which is not looked up by its path."""
        return self.built

    def pool(self, data: TokenDataset) -> Any:
        """A pool for such tokens.

        Raises:
            InputError: where it was built for others.
        """
        assert self.given is not None
        pool = self.given.build(data.dim)
        self._require_fits(pool, data)
        return pool

    def _require_fits(self, pool: Any, data: TokenDataset) -> None:
        if getattr(pool, "dim", data.dim) != data.dim:
            raise InputError(f"{self.name}: takes tokens of width {pool.dim}, and these have {data.dim}")
        if getattr(pool, "reads_cls", False) and not data.prefix_tokens:
            raise InputError(f"{self.name}: reads [CLS], and these data have no prefix tokens")
        shown = None if data.tokens is None else data.tokens - data.prefix_tokens
        if getattr(pool, "fixed_tokens", False) and pool.tokens != shown:
            held = "items of different lengths" if shown is None else f"{shown}"
            raise InputError(f"{self.name}: was built for {pool.tokens} tokens, and these data have {held}")
        if self.kind == "layers" and getattr(pool, "layers", None) not in (None, len(data.layers)):
            raise InputError(f"{self.name}: was built for {pool.layers} layers, and these data have {len(data.layers)}")

    def key(self, data: TokenDataset) -> str:
        """Text that changes whenever the pool at its beginning could."""
        with seeded(0):
            return described(self.pool(data))

    def sources(self, data: TokenDataset) -> tuple[type | ModuleType, ...]:
        """The module of the function, and the classes of all that the pool consists of, but for torch's own."""
        assert self.given is not None
        with seeded(0):
            classes = dict.fromkeys(type(part) for part in self.pool(data).modules())
        own = [cls for cls in classes if not cls.__module__.startswith("torch.")]
        return (*own, *([] if self.given.pool is not None else [_module_of(self.given.build)]))


def _module_of(function: Any) -> ModuleType:
    """Where a function stands; a module without a file, whose source nobody can read, where that cannot be told."""
    while isinstance(function, partial):
        function = function.func
    return sys.modules.get(getattr(function, "__module__", None) or "") or ModuleType("unknown")


def described(pool: nn.Module) -> str:
    """Text that two pools share that are equal: of the same classes, with the same plain attributes, weights and buffers.

    Where an attribute cannot be compared, such as a function, the text is a new one each time.
    """
    parts, tensors = [], {**dict(pool.named_parameters()), **dict(pool.named_buffers())}
    for place, part in pool.named_modules():
        kept: dict[str, Any] = {}
        for name, value in vars(part).items():
            if name in NOT_ITS_OWN:
                continue
            if isinstance(value, Tensor):
                tensors[f"{place}.{name}"] = value
            else:
                kept[name] = _plain(value)
        parts.append([place, f"{type(part).__module__}.{type(part).__qualname__}", kept])
    return files.digest_of({"parts": parts}, {name: tensor.detach().cpu() for name, tensor in tensors.items()})


def _plain(value: Any) -> Any:
    """As JSON has it; something that is equal to nothing else where JSON has no word for it."""
    if isinstance(value, Mapping):
        return [[_plain(k), _plain(v)] for k, v in value.items()]
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, bool | int | float | str) else uuid.uuid4().hex


def rebuilding(pool: nn.Module, name: str, dim: int) -> tuple[str, dict[str, Any], str | None]:
    """How a pool of one's own is built again: the method, its arguments besides `dim`, and why that cannot be, where it cannot.

    The arguments are read off the attributes of the same names, and are tried: what is built from them must be the pool.
    """
    cls = type(pool)
    path = f"{cls.__module__}.{cls.__qualname__}"
    if "." in cls.__qualname__:
        return path, {}, f"{name} is of the class {path}, which stands inside of another one or of a function"
    listed = next((m.name for m in methods(room="pool") if m.path == path and not m.settings), path)
    arguments: dict[str, Any] = {}
    for argument, parameter in inspect.signature(cls).parameters.items():
        if argument == "dim" or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        value = getattr(pool, argument, None)
        if _is_plain(value) and (value is not None or hasattr(pool, argument)):
            arguments[argument] = value
        elif parameter.default is parameter.empty:
            return path, {}, f"{path} must be told {argument}, which its instances keep under no attribute of that name"
    try:
        arguments = json.loads(json.dumps(arguments))
        with seeded(0):
            twin = create(listed, **{**arguments, "dim": dim})
        twin.load_state_dict(pool.state_dict())
    except Exception as error:  # whatever somebody's class raises
        return path, {}, f"{path} cannot be built from {arguments} ({type(error).__name__}: {error})"
    if described(twin) != described(pool):
        return path, {}, f"{path} built from {arguments} is another pool than {name}"
    return listed, arguments, None


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, bool | int | float | str)
