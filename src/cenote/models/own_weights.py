"""A second set of a model's weights, which stands in the model for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from cenote.core import InputError


class OwnWeights(nn.Module):
    """A copy of parameters of a model, trained in their place; the model's own are frozen and come back.

    Args:
        model: whose parameters are copied; weights that it ties stay tied.
        only: by its name, whether a parameter is copied; None for all.

    Raises:
        InputError: where none is.

    Example:
        >>> model = nn.Linear(4, 3)
        >>> own, before = OwnWeights(model), model.weight
        >>> with own.on(model):
        ...     model(torch.randn(2, 4)).sum().backward()
        >>> model.weight is before, before.grad, own.weights[0].grad.shape
        (True, None, torch.Size([3, 4]))
    """

    def __init__(self, model: nn.Module, only: Callable[[str], bool] | None = None) -> None:
        super().__init__()
        model.requires_grad_(False)
        copied = {name: p for name, p in model.named_parameters() if only is None or only(name)}
        if not copied:
            raise InputError("only: none of the model's parameters is copied; choose some by their names")
        self.names = list(copied)
        self.weights = nn.ParameterList(nn.Parameter(p.detach().clone()) for p in copied.values())

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Within the block the model has these weights.

        Raises:
            InputError: where it is another model.
        """
        own = dict(model.named_parameters())
        if any(name not in own or own[name].shape != w.shape for name, w in zip(self.names, self.weights, strict=True)):
            raise InputError("model: has other parameters than the one that was copied; give that one")
        copies = {own[name]: weight for name, weight in zip(self.names, self.weights, strict=True)}
        seats: list[tuple[nn.Module, str, Tensor]] = [
            (module, name, p) for module in model.modules() for name, p in module._parameters.items() if p in copies
        ]
        try:
            for module, name, p in seats:
                module._parameters[name] = copies[p]  # type: ignore[index]
            yield
        finally:
            for module, name, p in seats:
                module._parameters[name] = p  # type: ignore[assignment]
