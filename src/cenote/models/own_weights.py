"""A second set of a model's weights, which stands in the model for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from cenote.core import InputError


class OwnWeights(nn.Module):
    """A copy of all parameters of a model, trained in their place; the model's own are frozen and come back.

    Args:
        model: whose parameters are copied; weights that it ties stay tied.

    Example:
        >>> model = nn.Linear(4, 3)
        >>> own, before = OwnWeights(model), model.weight
        >>> with own.on(model):
        ...     model(torch.randn(2, 4)).sum().backward()
        >>> model.weight is before, before.grad, own.weights[0].grad.shape
        (True, None, torch.Size([3, 4]))
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        model.requires_grad_(False)
        self.names = [name for name, _ in model.named_parameters()]
        self.weights = nn.ParameterList(nn.Parameter(p.detach().clone()) for p in model.parameters())

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Within the block the model has these weights.

        Raises:
            InputError: where it is another model.
        """
        if [name for name, _ in model.named_parameters()] != self.names:
            raise InputError("model: has other parameters than the one that was copied; give that one")
        copies = dict(zip(model.parameters(), self.weights, strict=True))
        seats: list[tuple[nn.Module, str, Tensor]] = [
            (module, name, p) for module in model.modules() for name, p in module._parameters.items() if p is not None
        ]
        try:
            for module, name, p in seats:
                module._parameters[name] = copies[p]  # type: ignore[index]
            yield
        finally:
            for module, name, p in seats:
                module._parameters[name] = p  # type: ignore[assignment]
