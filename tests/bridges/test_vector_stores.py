"""Stores of other libraries: they find what the exact one finds, and forget nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from cenote.core import Bags, InputError
from cenote.core.maxsim import maxsim
from cenote.features.vectors import ExactStore, Meta, VectorStore

META = Meta("mine", 16, "hierarchical", 2.0)
IDS = [f"it's d{n}" for n in range(30)]
Open = Callable[..., Any]


def drawn(count: int, seed: int = 0, dim: int = 16) -> Bags:
    generator = torch.Generator().manual_seed(seed)
    return Bags.from_list([normalize(torch.randn(1 + n % 5, dim, generator=generator), dim=1) for n in range(count)])


QUERIES, DOCUMENTS = drawn(4, seed=1), drawn(30)


@pytest.fixture(params=["lancedb", "qdrant"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Opens a store of the library in a folder."""
    if request.param == "lancedb":
        pytest.importorskip("lancedb", reason="cenote[index] is not installed")
        from cenote.bridges.lancedb import LanceStore

        yield lambda meta=META, folder=tmp_path / "index", **more: LanceStore(folder, meta, **more)
        return
    pytest.importorskip("qdrant_client", reason="cenote[index] is not installed")
    from cenote.bridges.qdrant import QdrantStore

    held: list[Any] = []

    def fresh(meta: Meta | None = META, folder: Path = tmp_path / "index") -> Any:
        # local mode lets one client at a time hold a folder
        while held:
            held.pop().close()
        held.append(QdrantStore(folder, meta))
        return held[-1]

    yield fresh
    while held:
        held.pop().close()


def test_it_finds_what_the_exact_store_finds(opened: Open, tmp_path: Path) -> None:
    store, exact = opened(), ExactStore(tmp_path / "exact", META)
    assert isinstance(store, VectorStore)
    assert store.search(QUERIES, 3).ids == [[], [], [], []]
    assert store.add(IDS, DOCUMENTS) == exact.add(IDS, DOCUMENTS) == 30
    for open_again in (lambda: store, opened, lambda: opened(None)):
        again = open_again()
        found, expected = again.search(QUERIES, 8), exact.search(QUERIES, 8)
        assert found.ids == expected.ids
        torch.testing.assert_close(found.scores, expected.scores, atol=2e-3, rtol=1e-3)
        assert found.exact
        assert len(again) == 30
        assert again.nbytes > 0
    assert len(opened().search(QUERIES, 50).ids[0]) == 30
    everything = {name: bags for ids, many in opened().batches() for name, bags in zip(ids, many, strict=True)}
    assert set(everything) == set(IDS)
    torch.testing.assert_close(everything[IDS[4]], DOCUMENTS[4], atol=1e-3, rtol=0)


def test_adding_deleting_and_adding_again_changes_nothing(opened: Open) -> None:
    store = opened()
    store.add(IDS[:20], DOCUMENTS.select(torch.arange(20)))
    # what a killed run left is gone on with, without duplicates
    assert store.missing(IDS) == IDS[20:]
    assert store.add(IDS, DOCUMENTS) == 10
    expected = store.search(QUERIES, 6).ids
    for turn in range(5):
        gone = [IDS[turn], IDS[2 * turn + 7], "unknown"]
        assert store.delete(gone) == 2
        assert not {*gone} & {name for row in store.search(QUERIES, 30).ids for name in row}
        assert store.add(IDS, DOCUMENTS) == 2
        assert store.search(QUERIES, 6).ids == expected
    assert len(store) == 30


def test_what_does_not_fit_is_refused(opened: Open, tmp_path: Path) -> None:
    store = opened()
    with pytest.raises(InputError, match="vectors are 4 wide, and those of the index 16"):
        store.add(["a"], drawn(1, dim=4))
    with pytest.raises(InputError, match="hold NaN or infinite"):
        store.add(["a"], Bags.from_list([torch.full((1, 16), torch.nan)]))
    with pytest.raises(InputError, match=r"holds method hierarchical, not sequential; factor 2.0, not 3.0"):
        opened(Meta("mine", 16, "sequential", 3.0))
    with pytest.raises(InputError, match="there is no index in"):
        opened(None, tmp_path / "nowhere")


def test_lance_takes_no_raw_means(tmp_path: Path) -> None:
    pytest.importorskip("lancedb", reason="cenote[index] is not installed")
    from cenote.bridges.lancedb import LanceStore

    with pytest.raises(InputError, match="compares by cosine, which would scale raw means"):
        LanceStore(tmp_path / "raw", Meta("mine", 16, unit_norm=False))
    with pytest.raises(InputError, match="norm is not 1"):
        LanceStore(tmp_path / "unit", META).add(["a"], Bags.from_list([torch.ones(1, 16)]))


def test_candidates_of_a_trained_index_are_scored_exactly(tmp_path: Path) -> None:
    pytest.importorskip("lancedb", reason="cenote[index] is not installed")
    from cenote.bridges.lancedb import LanceStore

    ids, documents = [f"d{n}" for n in range(300)], drawn(300, seed=3)
    store = LanceStore(tmp_path / "index", META, candidates=60)
    store.add(ids, documents)
    assert not store.train()
    assert store.train(least=1)
    found, scores = store.search(QUERIES, 10), maxsim(QUERIES, documents.to(torch.float16).to(torch.float32))
    assert not found.exact
    best = scores.sort(dim=1, descending=True).indices[:, :10]
    shared = [len(set(row) & {ids[n] for n in own.tolist()}) for row, own in zip(found.ids, best, strict=True)]
    assert sum(shared) >= 0.9 * 40
    own = torch.stack([scores[q, [ids.index(n) for n in row]] for q, row in enumerate(found.ids)])
    torch.testing.assert_close(found.scores, own, atol=2e-3, rtol=1e-3)
