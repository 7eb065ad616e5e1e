"""Architectures of the survey, their costs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from cenote.mix.attention_survey.alignments import ALIGNMENTS, KernelAlignment, alignment
from cenote.mix.attention_survey.architectures import (
    AttentionBlock,
    AttentiveEncoderDecoder,
    GraphAttention,
    MemoryNetwork,
    PointerNetwork,
)
from cenote.mix.attention_survey.attention import GeneralAttention
from cenote.mix.attention_survey.costs import alignment_cost, cost_table
from cenote.mix.attention_survey.hierarchical import HierarchicalAttentionNetwork


def learns(model: torch.nn.Module, loss: object, steps: int = 25, lr: float = 4e-2) -> bool:
    """Whether a loss falls to two thirds."""
    optimizer = torch.optim.Adam(model.parameters(), lr)
    seen = []
    for _ in range(steps):
        value: Tensor = loss()  # type: ignore[operator]
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        seen.append(float(value.detach()))
    return seen[-1] < seen[0] * 2 / 3


def test_padding_of_texts_may_stand_anywhere() -> None:
    torch.manual_seed(0)
    tokens, at = torch.randint(1, 9, (2, 4)), torch.tensor([1, 2, 5, 6])
    wide = torch.full((2, 8), 3).index_copy(1, at, tokens)
    mask = torch.zeros(2, 8, dtype=torch.bool).index_fill(1, at, True)
    translator, target = AttentiveEncoderDecoder(9, dim=8), torch.randint(1, 9, (2, 3))
    plain, found = translator(tokens, target), translator(wide, target, mask)
    torch.testing.assert_close(found.logits, plain.logits)
    torch.testing.assert_close(found.weights[..., at], plain.weights)
    assert not found.weights[..., ~mask[0]].any()
    network = HierarchicalAttentionNetwork(9, 2, dim=8, hidden=4).eval()
    document = torch.stack([torch.full_like(wide, 2), wide], 1)
    seen = torch.stack([torch.zeros_like(mask), mask], 1)
    whole, read = network(tokens[:, None]), network(document, seen)
    torch.testing.assert_close(read.logits, whole.logits)
    torch.testing.assert_close(read.words[:, 1:, at], whole.words)
    assert read.sentences.tolist() == [[0.0, 1.0]] * 2


def test_words_sentences_documents() -> None:
    torch.manual_seed(0)
    model = HierarchicalAttentionNetwork(20, 2, dim=8, hidden=4)
    tokens = torch.randint(1, 20, (6, 3, 5))
    mask = torch.ones(6, 3, 5, dtype=torch.bool)
    mask[0, 2] = False
    mask[1, :, 3:] = False
    model.eval()
    found = model(tokens, mask)
    torch.testing.assert_close(found.logits[:1], model(tokens[:1, :2]).logits)
    torch.testing.assert_close(found.logits[1:2], model(tokens[1:2, :, :3]).logits)
    torch.testing.assert_close(found.sentences.sum(-1), torch.ones(6))
    assert not found.words[0, 2].any()
    assert found.sentences[0, 2] == 0
    labels = (tokens == 7).any(-1).any(-1).long()
    labels[0] = 1 - labels[1]
    assert learns(model.train(), lambda: cross_entropy(model(tokens, mask).logits, labels))


def test_a_reader_and_a_writer_learn_to_copy_backwards() -> None:
    torch.manual_seed(0)
    model = AttentiveEncoderDecoder(9, dim=16)
    source = torch.randint(1, 9, (16, 4))
    target = torch.cat([torch.zeros(16, 1, dtype=torch.long), source.flip(1)[:, :-1]], 1)
    found = model(source, target)
    torch.testing.assert_close(found.weights.sum(-1), torch.ones(16, 4))
    assert learns(model, lambda: cross_entropy(model(source, target).logits.mT, source.flip(1)))
    longer = torch.cat([source, torch.zeros(16, 2, dtype=torch.long)], 1)
    mask = longer > 0
    torch.testing.assert_close(model(longer, target, mask).logits, model(source, target).logits)


def test_one_hop_is_attention() -> None:
    torch.manual_seed(0)
    question, memories = torch.randn(2, 4), torch.randn(2, 5, 4)
    answer, weights = MemoryNetwork(4, 1, maps=False)(question, memories)
    plain = GeneralAttention(4, "dot")(memories, question[:, None])
    torch.testing.assert_close(answer, question + plain.context[:, 0])
    torch.testing.assert_close(weights[:, 0], plain.weights[:, 0, 0])
    model = MemoryNetwork(4, 3)
    assert model(question, memories)[1].shape == (2, 3, 5)
    target = torch.randn(2, 4)
    assert learns(model, lambda: (model(question, memories)[0] - target).square().mean())


def test_weights_that_are_the_output() -> None:
    torch.manual_seed(0)
    model = PointerNetwork(1, 16)
    x = torch.rand(32, 5, 1)
    places = x[..., 0].argsort(1)[:, :2]
    assert model(x, places).shape == (32, 2, 5)
    assert model(x, steps=3).shape == (32, 3, 5)
    assert learns(model, lambda: cross_entropy(model(x, places).mT, places), steps=40)


def test_blocks_and_graphs() -> None:
    torch.manual_seed(0)
    x, mask = torch.randn(2, 4, 8), torch.tensor([[True] * 4, [True, True, False, False]])
    block = AttentionBlock(8, alignment="general", distribution="entmax15")
    torch.testing.assert_close(block(x, mask)[1:, :2], block(x[1:, :2]))
    target = torch.randn(2, 4, 8)
    assert learns(block, lambda: (block(x) - target).square().mean())
    graph = GraphAttention(8, 3)
    edges = torch.eye(4, dtype=torch.bool).expand(2, -1, -1).clone()
    torch.testing.assert_close(graph(x, edges), graph.map(x))
    edges[0, 1] = False
    assert not graph(x, edges)[0, 1].any()
    small = torch.randn(2, 4, 3)
    edges[:] = True
    assert learns(graph, lambda: (graph(x, edges).mean(1) - small.mean(1)).square().mean())


@pytest.mark.parametrize("name", ALIGNMENTS)
def test_costs_are_those_that_are_counted(name: str) -> None:
    q, k = torch.randn(1, 1, 6, 8), torch.randn(1, 1, 10, 8)
    made = alignment(name, 8)
    with FlopCounterMode(display=False) as counter:
        made(q, k)
    cost = alignment_cost(name, 8, 6, 10)
    assert counter.get_total_flops() == 2 * cost.products
    assert sum(p.numel() for p in made.parameters()) == cost.parameters
    assert f"{name}\t" in cost_table()


def test_kernels_are_linear_in_the_tokens() -> None:
    for tokens in (10, 100):
        x = torch.randn(1, 1, tokens, 8)
        with FlopCounterMode(display=False) as counter:
            KernelAlignment(8, 8).attend(x, x, x)
        assert counter.get_total_flops() == 2 * alignment_cost("kernel", 8, tokens, tokens, linear=True).products
