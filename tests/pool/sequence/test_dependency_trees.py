from __future__ import annotations

from pathlib import Path

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cenote.core import InputError
from cenote.pool.sequence.dependency_trees import Trees, pad_heads, parse_conllu, read_conllu


@st.composite
def sentences(draw: st.DrawFn) -> tuple[list[int], int, int]:
    """The heads of a random tree, its words in random order, and two of them."""
    n = draw(st.integers(1, 12))
    order = draw(st.permutations(range(n)))
    heads = [0] * n
    for i, word in enumerate(order):
        heads[word] = -1 if i == 0 else order[draw(st.integers(0, i - 1))]
    return heads, draw(st.integers(0, n - 1)), draw(st.integers(0, n - 1))


def directed(heads: list[int]) -> nx.DiGraph:
    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(heads)))
    graph.add_edges_from((h, i) for i, h in enumerate(heads) if h >= 0)
    return graph


def chosen(mask: torch.Tensor) -> set[int]:
    return set(mask[0].nonzero().flatten().tolist())


@settings(deadline=None, max_examples=60)
@given(sentences(), st.integers(0, 3))
def test_sets_are_those_of_networkx(sentence: tuple[list[int], int, int], k: int) -> None:
    heads, a, b = sentence
    graph = directed(heads)
    undirected = graph.to_undirected()
    trees = Trees(torch.tensor([[*heads, -2, -2]]))
    first, second = torch.tensor([a]), torch.tensor([b])
    path = trees.path(first, second)
    assert chosen(path) == set(nx.shortest_path(undirected, a, b))
    distance = nx.multi_source_dijkstra_path_length(undirected, chosen(path))
    assert chosen(trees.near(path, k)) == {n for n, d in distance.items() if d <= k}
    meeting = nx.lowest_common_ancestor(graph, a, b)
    assert chosen(trees.meeting(first, second)) == {meeting}
    assert chosen(trees.below(trees.meeting(first, second))) == {meeting} | nx.descendants(graph, meeting)


def test_a_batch_is_its_sentences() -> None:
    heads, mask = pad_heads([[1, -1, 1, 2], [-1, 0], [2, 0, -1]])
    trees = Trees(heads)
    assert torch.equal(trees.real, mask)
    a, b = torch.tensor([0, 1, 1]), torch.tensor([3, 0, 2])
    for i, length in enumerate((4, 2, 3)):
        alone = Trees(heads[i : i + 1, :length]).path(a[i : i + 1], b[i : i + 1])
        assert torch.equal(trees.path(a, b)[i : i + 1, :length], alone)


def test_head_word_of_a_span() -> None:
    trees = Trees(torch.tensor([[2, 2, 5, 2, 2, -1, 5]]))
    for span, word in (((0, 3), 2), ((3, 5), 3), ((4, 6), 4), ((5, 7), 5), ((6, 7), 6)):
        assert trees.head_word(torch.tensor([span])).item() == word
    # words that hang on each other: none leaves the span
    cycle = Trees(torch.tensor([[1, 0, -1]]))
    assert cycle.head_word(torch.tensor([[0, 2]])).item() == 1


def test_further_roots_hang_on_the_first() -> None:
    trees = Trees(torch.tensor([[1, -1, -1, 2]]))
    assert chosen(trees.path(torch.tensor([0]), torch.tensor([3]))) == {0, 1, 2, 3}
    # a head that is padding makes a root too
    trees = Trees(torch.tensor([[-1, 3, 1, -2]]))
    assert chosen(trees.path(torch.tensor([0]), torch.tensor([2]))) == {0, 1, 2}


def test_words_on_a_cycle_and_below_it_do_not_reach_the_root() -> None:
    trees = Trees(torch.tensor([[-1, 0, 3, 2, 3, 5]]))
    assert trees.reaches[0].tolist() == [True, True, False, False, False, False]
    assert not trees.path(torch.tensor([0]), torch.tensor([4])).any()
    assert not Trees(torch.tensor([[1, 0]])).reaches.any()
    assert not Trees(torch.tensor([[-2, -2]])).reaches.any()


@pytest.mark.parametrize(
    "heads", [torch.tensor([[0, 2]]), torch.tensor([[-3, 0]]), torch.tensor([0]), torch.zeros(1, 2)]
)
def test_wrong_heads_are_named(heads: torch.Tensor) -> None:
    with pytest.raises(InputError, match="heads"):
        Trees(heads)


CONLLU = """\
# text = Don't panic now
1-2\tDon't\t_\t_\t_\t_\t_\t_\t_\t_
1\tDo\tdo\tAUX\t_\t_\t3\taux\t_\t_
2\tn't\tnot\tPART\t_\t_\t3\tadvmod\t_\t_
3\tpanic\tpanic\tVERB\t_\t_\t0\troot\t_\t_
3.1\tghost\t_\t_\t_\t_\t_\t_\t_\t_
4\tnow\tnow\tADV\t_\t_\t3\tadvmod\t_\t_

# text = Yes
1\tYes\tyes\tINTJ\t_\t_\t_\troot\t_\t_
"""


def test_conllu_is_read(tmp_path: Path) -> None:
    path = tmp_path / "trees.conllu"
    path.write_text(CONLLU, "utf-8")
    first, second = read_conllu(path)
    assert first.words == ("Do", "n't", "panic", "now")
    assert first.heads == (2, 2, -1, 2)
    assert first.relations == ("aux", "advmod", "root", "advmod")
    assert first.tags == ("AUX", "PART", "VERB", "ADV")
    assert second.heads == (-1,)
    heads, mask = pad_heads([s.heads for s in (first, second)])
    assert heads.tolist() == [[2, 2, -1, 2], [-1, -2, -2, -2]]
    assert mask.sum(1).tolist() == [4, 1]
    assert parse_conllu("") == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1\tA\t_\t_\t_\t_\t0\troot\t_", "line 1: expected 10 columns"),
        ("# c\n2\tA\t_\t_\t_\t_\t0\troot\t_\t_", "line 2: expected word number 1"),
        ("1\tA\t_\t_\t_\t_\tx\troot\t_\t_", "line 1: expected word number 1 with a head"),
        ("\n1\tA\t_\t_\t_\t_\t2\troot\t_\t_", "line 2: the sentence that begins here has 1 words"),
    ],
)
def test_what_is_not_conllu_is_named(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse_conllu(text)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file"):
        read_conllu(tmp_path / "none.conllu")
