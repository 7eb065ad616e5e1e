from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from cenote.core import InputError
from cenote.features.dataset import TokenDataset
from cenote.jobs.probe.neighbours import nearest, neighbour_probe, votes


def test_votes_by_hand() -> None:
    cosines = torch.tensor([[0.9, 0.5, 0.4], [0.3, 0.2, 0.1]], dtype=torch.float64)
    labels = torch.tensor([[2, 0, 2], [1, 1, 0]])
    w = (cosines / 0.2).exp()
    of_all = torch.stack([torch.stack([w[i][labels[i] == c].sum() for c in range(3)]) for i in range(2)])
    torch.testing.assert_close(votes(cosines, labels, 3, 3, 0.2), of_all / w.sum(1, keepdim=True))
    assert votes(cosines, labels, 3, 1, 0.2).tolist() == [[0, 0, 1], [0, 1, 0]]


def test_the_search_is_exact_whatever_its_pieces() -> None:
    generator = torch.Generator().manual_seed(0)
    x, known = (F.normalize(torch.randn(n, 5, generator=generator), dim=1) for n in (17, 40))
    cosines, numbers = nearest(x, known, 6, at_once=4)
    expected = (x @ known.T).sort(1, descending=True)
    torch.testing.assert_close(cosines, expected.values[:, :6])
    assert torch.equal(numbers, expected.indices[:, :6])


@pytest.mark.parametrize("read", ["cls", "mean"])
def test_items_are_named_by_their_neighbours(read: str, toy: TokenDataset) -> None:
    data = dataclasses.replace(toy, prefix_tokens=1)
    probe = neighbour_probe(data, read, neighbours=(1, 7, 200), temperatures=(0.1, 0.2))
    train, test = data.indices("train"), data.indices("test")
    vector = data.x[:, 0] if read == "cls" else data.x[:, 1:].mean(1)
    vector = F.normalize(vector, dim=1)
    assert probe.neighbours in (1, 7, len(train))
    cosines = vector[test] @ vector[train].T
    chosen = cosines.topk(probe.neighbours, dim=1)
    weights = (chosen.values / probe.temperature).exp()
    expected = torch.stack([(weights * (data.y[train][chosen.indices] == c)).sum(1) for c in range(3)], 1)
    logits = probe.predict(data, test, at_once=7)
    torch.testing.assert_close(logits.exp(), expected / expected.sum(1, keepdim=True))


def test_validation_items_choose(toy: TokenDataset) -> None:
    grid = [(k, t) for k in (1, 5, 20) for t in (0.07, 0.2)]
    alone = [neighbour_probe(toy, neighbours=(k,), temperatures=(t,)).validation for k, t in grid]
    best = neighbour_probe(toy, neighbours=(1, 5, 20), temperatures=(0.07, 0.2))
    assert best.validation == max(alone)
    assert (best.neighbours, best.temperature) == grid[alone.index(max(alone))]
    items = toy.indices("val")
    assert best.validation == float((best.predict(toy, items).argmax(1) == toy.y[items]).double().mean())


def test_two_classes_have_one_logit(ragged: TokenDataset) -> None:
    probe = neighbour_probe(ragged)
    assert probe.metric == "AUROC"
    assert probe.validation > 0.8
    logits = probe.predict(ragged, ragged.indices("test"))
    assert logits.shape == (20, 1)
    assert logits.isfinite().all()


def test_wrong_arguments_are_named(toy: TokenDataset) -> None:
    numbers = dataclasses.replace(toy, task="regression", y=torch.randn(90, 3))
    for call, name in (
        (lambda: neighbour_probe(numbers), "data"),
        (lambda: neighbour_probe(toy.with_split([0] * 90)), "data"),
        (lambda: neighbour_probe(toy, "max"), "read"),
        (lambda: neighbour_probe(toy, neighbours=()), "neighbours"),
        (lambda: neighbour_probe(toy, temperatures=(0.0,)), "temperatures"),
        (lambda: neighbour_probe(toy, at_once=0), "at_once"),
        (lambda: neighbour_probe(toy, "cls"), "cls"),
    ):
        with pytest.raises(InputError, match=name):
            call()
