"""Pools of text that take more than tokens."""

import torch

from cenote import Bags
from cenote.pool import (
    AgreementPool,
    AttentionalAffine,
    AttentionalConcat,
    AttentionalGate,
    AttentiveMimicking,
    DependencyPool,
    DynamicPool,
    EntityPool,
    FlatMemories,
    HierarchicalMemories,
    ImageMemory,
    Imagination,
    IMLPAttention,
    InteractiveAttention,
    Lexicon,
    MLPAttention,
    ParallelMemories,
    PiecewiseMaxPool,
    SerialMemories,
    imagination_loss,
    mass_by_type,
    pad_heads,
)

x, mask, c = torch.randn(3, 9, 16), torch.rand(3, 9) > 0.3, torch.randn(3, 9, 4)
for pool in (AttentionalConcat(16, 4, tanh=True), AttentionalGate(16, 4), AttentionalAffine(16, 4)):
    pool(x, c), pool.attend(x, c, mask), pool.attend(Bags.from_padded(x, mask), c[mask])
Lexicon({"a": {"x": [1.0]}}).lookup_batch([["x"], ["y", "z"]])
keys = torch.tensor([[0, 1]] * 3)
MLPAttention(16).attend(x, keys, mask), IMLPAttention(16).attend(x, keys, mask), PiecewiseMaxPool(16)(x, keys, mask)
InteractiveAttention(16, tokens=9).attend(x, x[:, :3], mask)
mass_by_type(torch.rand(3, 2, 9), torch.zeros(3, 9, dtype=torch.long), 2, mask)
for layer in (SerialMemories, ParallelMemories, FlatMemories, HierarchicalMemories):
    layer(16, heads=4)(x[:, :4], [x, x[:, :5]]), layer(16, heads=4).attend(x[:, :4], [x, x[:, :5]], [mask, None])
ImageMemory(6, 16)(torch.randn(2, 6, 3, 3)), Imagination(16, 8)(x, mask)
imagination_loss(torch.randn(3, 8), torch.randn(3, 8))
subject, object_ = torch.tensor([[0, 2]] * 3), torch.tensor([[4, 5]] * 3)
chain = torch.arange(-1, 8).expand(3, 9)
for pool in (EntityPool(16), DynamicPool(16, 5), DependencyPool(16, 1), DependencyPool(16, None, reduce="attention")):
    pool(x, subject, object_, chain), pool.attend(x, subject, object_, chain, mask)
pad_heads([[1, -1]])
model = AttentiveMimicking(16, ngrams=9, distances=True)
model.attend(
    torch.tensor([[1, 2]] * 3), torch.randn(3, 2, 5, 16), None, torch.ones(3, 2, 5).bool(), torch.ones(3, 2, 5).long()
)
AgreementPool(16)(x, mask), AgreementPool(16).attend(Bags.from_padded(x, mask))
