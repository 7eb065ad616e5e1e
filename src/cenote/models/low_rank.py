"""Low-rank adaptation of a model's linear layers, which leaves the model itself as it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.requirements import require_at_least, require_positive, require_rate

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a block, as most decoders call them."""


class LowRank(nn.Module):
    """What is added to linear layers of a model while its block lasts: `y = W x + (alpha / r) B A dropout(x)`.

    Args:
        model: whose layers are adapted; its own parameters are frozen.
        targets: ends of the names of these layers.
        rank: `r`.
        alpha: as above.
        dropout: of what the low-rank part reads.

    Raises:
        InputError: where the model has no linear layer of such a name.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3))
        >>> adapted = LowRank(model, ["0"], rank=2)
        >>> with adapted.on(model):
        ...     model(torch.randn(2, 4)).shape
        torch.Size([2, 3])

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.
    """

    def __init__(
        self, model: nn.Module, targets: Sequence[str], rank: int = 16, alpha: float = 32.0, dropout: float = 0.1
    ) -> None:
        super().__init__()
        require_at_least(1, rank=rank)
        require_positive(alpha=alpha)
        require_rate(dropout=dropout)
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout)
        layers = {name: m for name, m in model.named_modules() if name.rpartition(".")[2] in targets}
        layers = {name: m for name, m in layers.items() if isinstance(m, nn.Linear)}
        if not layers:
            raise InputError(f"targets: the model has no linear layer whose name ends in {', '.join(targets)}")
        model.requires_grad_(False)
        self.names = list(layers)
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        for layer in layers.values():
            like = {"dtype": torch.float32, "device": layer.weight.device}
            down = torch.empty(rank, layer.in_features, **like)
            nn.init.kaiming_uniform_(down, a=5**0.5)
            self.down.append(nn.Parameter(down))
            self.up.append(nn.Parameter(torch.zeros(layer.out_features, rank, **like)))

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Within the block the layers of the model give what they give with the adaptation."""
        layers = dict(model.named_modules())
        hooks = [
            layers[name].register_forward_hook(self._added(down, up))
            for name, down, up in zip(self.names, self.down, self.up, strict=True)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _added(self, down: Tensor, up: Tensor) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Float[Tensor, "*rows out"]) -> Tensor:
            x = self.dropout(inputs[0].to(down.dtype))
            return output + (self.scale * (x @ down.T) @ up.T).to(output.dtype)

        return hook
