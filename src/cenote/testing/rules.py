"""Rules that every kind of pool keeps, whatever it takes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.testing.contract import difference

Call = Callable[[nn.Module, Tensor], Tensor]


class Trial:
    """A copy of the pool in float64 and eval mode, parameters moved off their zeros and ones, and what it is called with.

    Attributes:
        pool: the copy.
        x: its first argument.
        inert: names of parameters that no gradient reaches.
    """

    x: Tensor

    def __init__(self, pool: nn.Module, seed: int) -> None:
        self.inert = tuple(getattr(pool, "inert_parameters", ()))
        self.generator = torch.Generator().manual_seed(seed)
        self.pool = copy.deepcopy(pool).double().eval()
        with torch.no_grad():
            for p in self.pool.parameters():
                p.add_(0.2 * torch.randn(p.shape, generator=self.generator, dtype=torch.float64))

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def output(self, pool: nn.Module, x: Tensor) -> Tensor:
        """What `pool` gives for `x` and the trial's other arguments."""
        return pool(x)


def _rule_determinism(t: Trial) -> str | None:
    if not torch.equal(t.output(t.pool, t.x), t.output(t.pool, t.x)):
        return "determinism: two calls in eval mode on the same input differ"
    return None


def _rule_gradient_reaches_every_parameter(t: Trial) -> str | None:
    sizes: dict[str, float] = {}
    # a ReLU may be dead under one draw of the parameters, so that several count together
    for draw in range(4):
        pool = copy.deepcopy(t.pool).train()
        trained = {name: p for name, p in pool.named_parameters() if p.requires_grad}
        if draw:
            with torch.no_grad():
                for p in trained.values():
                    p.add_(0.5 * t.randn(*p.shape))
        y = t.output(pool, t.x if not draw else t.randn(*t.x.shape))
        if y.requires_grad:
            y.backward(t.randn(*y.shape))
        for name, p in trained.items():
            size = 0.0 if p.grad is None else float(p.grad.abs().max())
            sizes[name] = max(sizes.get(name, 0.0), size)
        if all(size >= 1e-12 for name, size in sizes.items() if name not in t.inert):
            break
    hidden = [name for name, size in sizes.items() if size < 1e-12 and name not in t.inert]
    alive = [name for name, size in sizes.items() if size > 1e-9 and name in t.inert]
    if hidden:
        return f"gradient: does not reach {', '.join(hidden)}; if that is inherent, declare it in inert_parameters"
    if alive:
        return f"gradient: {', '.join(alive)} is declared inert but receives a gradient"
    return None


def _rule_deepcopy(t: Trial) -> str | None:
    if not torch.equal(t.output(t.pool, t.x), t.output(copy.deepcopy(t.pool), t.x)):
        return "deepcopy: the copy gives another output"
    return None


def _rule_safetensors_round_trip(t: Trial) -> str | None:
    stored = load(save({k: v.contiguous() for k, v in t.pool.state_dict().items()}))
    other = copy.deepcopy(t.pool)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(stored)
    if not torch.equal(t.output(t.pool, t.x), t.output(other, t.x)):
        return "safetensors: the state_dict does not hold all that the output depends on"
    return None


def _rule_state_is_registered(t: Trial) -> str | None:
    known = {id(v) for v in (*t.pool.parameters(), *t.pool.buffers())}
    for prefix, module in t.pool.named_modules():
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers", "_modules"):
                continue
            if any(id(v) not in known for v in _tensors_in(value)):
                full = f"{prefix}.{name}" if prefix else name
                return (
                    f"state: {full} holds a tensor that is no parameter and no buffer, so that .to() and state_dict() miss it; "
                    f"use self.register_buffer(..., persistent=False) for a constant, nn.ParameterList for several parameters"
                )
    return None


def _tensors_in(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for v in value.values():
            yield from _tensors_in(v)
    elif isinstance(value, (list, tuple, set)):
        for v in value:
            yield from _tensors_in(v)


def gradient_error(pool: nn.Module, call: Call, x: Tensor) -> str | None:
    """What is wrong where the gradient of `call(pool, x)` by `x` and the parameters disagrees with finite differences."""
    pool = copy.deepcopy(pool)
    parameters = [p for p in pool.parameters() if p.requires_grad]

    def run(x: Tensor, *_: Tensor) -> Tensor:
        return call(pool, x)

    try:
        torch.autograd.gradcheck(run, (x.clone().requires_grad_(), *parameters), fast_mode=True)
    except RuntimeError as error:
        return f"gradient: disagrees with finite differences in float64: {str(error)[:300]}"
    return None


def half_precision_error(
    pool: nn.Module, call: Call, x: Tensor, bfloat16: float, float16: float, hint: str = ""
) -> str | None:
    """What is wrong with `call(pool, x)` in half precision.

    Args:
        pool: in float64.
        call: of the pool and its input.
        x: in float64.
        bfloat16, float16: how far the output may be off, as a share of its largest value.
        hint: what to do where it is further off.
    """
    reference = call(pool, x)
    size = float(reference.detach().abs().max()) + 1e-6
    for dtype, allowed in ((torch.bfloat16, bfloat16), (torch.float16, float16)):
        y = call(copy.deepcopy(pool).to(dtype), x.to(dtype))
        if y.dtype != dtype:
            return f"half precision: {dtype} in, {y.dtype} out"
        if not bool(y.isfinite().all()):
            return f"half precision: the output in {dtype} is not finite"
        if (apart := difference(reference, y) / size) > allowed:
            return f"half precision: the output in {dtype} is off by {apart:.1%} of its largest value{hint}"
    return None


def compiled(pool: nn.Module) -> Callable[..., Tensor]:
    """A copy of the pool as one graph."""
    torch.compiler.reset()
    # the graph is what can break; code generation is PyTorch's own business
    return torch.compile(copy.deepcopy(pool), fullgraph=True, backend="aot_eager")


def export_error(pool: nn.Module, *inputs: Tensor) -> str | None:
    """What is wrong where `torch.export` changes what the pool gives for these inputs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(copy.deepcopy(pool), inputs)
    if (apart := difference(pool(*inputs), exported.module()(*inputs))) > 1e-10:
        return f"export: torch.export changes the output by {apart:.3g}"
    return None


def unnamed_input(wrong: Mapping[str, Callable[[], object]]) -> str | None:
    """What is wrong where one of these calls does not raise `InputError`."""
    for name, call in wrong.items():
        try:
            call()
        except InputError:
            continue
        except Exception as error:
            return f"errors: {name} raises {type(error).__name__}, expected cenote.InputError"
        return f"errors: {name} is accepted without a word"
    return None
