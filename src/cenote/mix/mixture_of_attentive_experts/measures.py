"""Whether experts specialise: what gates know of a label, how sharp they are, which words go with which expert."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core import InputError
from cenote.mix.mixture_of_attentive_experts.experts import ExpertGate

TINY = 1e-12


@contextmanager
def gates_of(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Within the block, what each gate of a model gives, by its path, one tensor per run."""
    found: dict[str, list[Tensor]] = {}
    handles = []
    for path, module in model.named_modules():
        if isinstance(module, ExpertGate):

            def hook(_: nn.Module, __: object, logits: Tensor, path: str = path) -> None:
                found.setdefault(path, []).append(logits.detach().softmax(-1))

            handles.append(module.output.register_forward_hook(hook))
    if not handles:
        raise InputError("model: has no gate of experts")
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class Specialised(NamedTuple):
    """Of one layer's gates over many inputs.

    Attributes:
        information: mutual information of expert and label, in nats, an expert drawn by the gate.
        entropy: mean entropy of a gate, in nats.
        shares: of the inputs that each expert has, by the gates, `[experts]`.
        best: likewise, by the gates' largest.
    """

    information: float
    entropy: float
    shares: Float[Tensor, "experts"]
    best: Float[Tensor, "experts"]


def specialisation(gates: Float[Tensor, "items experts"], labels: Int[Tensor, "items"]) -> Specialised:
    """Whether a layer's gates tell labels apart.

    >>> found = specialisation(torch.eye(2), torch.tensor([0, 1]))
    >>> round(found.information, 4), found.entropy
    (0.6931, 0.0)
    """
    if not len(gates) or len(gates) != len(labels):
        raise InputError(f"labels: expected one for each of {len(gates)} gates, at least one, got {len(labels)}")
    g = gates.double()
    shares = g.mean(0)
    within = torch.zeros((), dtype=torch.float64)
    for label in labels.unique():
        own = g[labels == label]
        within = within + len(own) / len(g) * entropy(own.mean(0))
    information = max(float(entropy(shares) - within), 0.0)
    best = torch.bincount(g.argmax(1), minlength=g.shape[1]).double() / len(g)
    return Specialised(information, float(entropy(g).mean()), shares, best)


def entropy(p: Float[Tensor, "*batch experts"]) -> Float[Tensor, "*batch"]:
    """In nats; `0 log 0 = 0`.

    >>> entropy(torch.tensor([0.0, 1.0])).item()
    0.0
    """
    return -torch.special.xlogy(p, p).sum(-1) + 0.0


def word_information(
    gates: Float[Tensor, "items experts"],
    tokens: Int[Tensor, "items tokens"],
    vocabulary: int,
    mask: Bool[Tensor, "items tokens"] | None = None,
    least: int = 1,
) -> Float[Tensor, "vocabulary experts"]:
    """Pointwise mutual information of words and experts, in nats: `log p(word, expert) / (p(word) p(expert))`.

    Args:
        gates: of each item.
        tokens: its words; an item's words go with its experts by its gates.
        vocabulary: how many words there are.
        mask: True on real words.
        least: words that are rarer give NaN.
    """
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    together = torch.zeros(vocabulary, gates.shape[1], dtype=torch.float64)
    each = gates.double()[:, None].expand(-1, tokens.shape[1], -1)[real]
    together.index_add_(0, tokens[real], each)
    counts = together.sum(1, keepdim=True)
    total = counts.sum().clamp(min=TINY)
    found = torch.log((together * total).clamp(min=TINY) / (counts * together.sum(0)).clamp(min=TINY))
    return found.masked_fill(counts < max(least, 1) - 1e-9, float("nan"))


def strongest(
    information: Float[Tensor, "vocabulary experts"], words: Sequence[str], count: int = 5
) -> list[list[str]]:
    """Of each expert the words that go with it most.

    >>> strongest(torch.tensor([[0.5, -1.0], [-1.0, 0.5]]), ["wing", "heat"], 1)
    [['wing'], ['heat']]
    """
    order = information.nan_to_num(-torch.inf).argsort(dim=0, descending=True, stable=True)[:count]
    return [[words[i] for i in column.tolist()] for column in order.T]
