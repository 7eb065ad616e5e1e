import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from cenote.core import Bags, InputError
from cenote.core.maxsim import maxsim
from cenote.features import vectors
from cenote.features.vectors import CARD, ExactStore, Meta, VectorStore

META = Meta("mine", 8, "hierarchical", 2.0)
IDS = [f"d{n}" for n in range(12)]


def drawn(count: int, seed: int = 0) -> Bags:
    generator = torch.Generator().manual_seed(seed)
    return Bags.from_list([normalize(torch.randn(1 + n % 5, 8, generator=generator), dim=1) for n in range(count)])


QUERIES, DOCUMENTS = drawn(3, seed=1), drawn(12)


def best(queries: Bags, documents: Bags, ids: list[str], k: int) -> list[list[str]]:
    order = maxsim(queries, documents.to(torch.float16)).sort(dim=1, descending=True, stable=True).indices
    return [[ids[n] for n in row[:k]] for row in order.tolist()]


def test_search_is_exact_over_several_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "PART_BYTES", 2 * 8 * 6)
    store = ExactStore(tmp_path / "index", META)
    assert isinstance(store, VectorStore)
    assert store.add(IDS, DOCUMENTS) == 12
    assert len(list(store.folder.glob("part-*"))) > 3
    for opened in (store, ExactStore(store.folder), ExactStore(store.folder, META)):
        hits = opened.search(QUERIES, 5)
        assert hits.ids == best(QUERIES, DOCUMENTS, IDS, 5)
        assert hits.exact
        torch.testing.assert_close(
            hits.scores, maxsim(QUERIES, DOCUMENTS).sort(dim=1, descending=True).values[:, :5], atol=4e-3, rtol=0
        )
        assert len(opened.search(QUERIES, 50).ids[0]) == len(opened) == 12
        assert opened.vectors == DOCUMENTS.values.shape[0]
    assert store.nbytes >= 2 * DOCUMENTS.values.numel()


def test_candidates_of_another_search_are_ordered_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "PART_BYTES", 2 * 8 * 6)
    store = ExactStore(tmp_path, META)
    store.add(IDS, DOCUMENTS)
    store.delete(IDS[:1])
    whole = store.search(QUERIES, 11)
    among = [sorted(row[1:8]) for row in whole.ids]
    found = store.rerank(QUERIES, among, 4)
    assert found.ids == [row[1:5] for row in whole.ids]
    torch.testing.assert_close(found.scores, whole.scores[:, 1:5])
    for candidates, told in (
        ([["d1"]] * 2, "expected as many for each of 3 queries, got 1, 1"),
        ([["d1"], ["d1"], ["d0"]], r"1 are not in the store \(d0\)"),
        ([["d1"], ["d1", "d2"], ["d1"]], "got 1, 2, 1"),
    ):
        with pytest.raises(InputError, match=told):
            store.rerank(QUERIES, candidates)


def test_adding_deleting_and_adding_again_changes_nothing(tmp_path: Path) -> None:
    store = ExactStore(tmp_path, META)
    store.add(IDS, DOCUMENTS)
    expected = [sorted(row) for row in store.search(QUERIES, 6).ids]
    for turn in range(20):
        gone = [IDS[turn % 12], IDS[(5 * turn + 3) % 12]]
        assert store.delete([*gone, "unknown"]) == len(set(gone))
        assert store.missing(IDS) == sorted(set(gone), key=IDS.index)
        left = [n for n, name in enumerate(IDS) if name not in gone]
        assert [set(r) for r in store.search(QUERIES, 4).ids] == [
            set(r) for r in best(QUERIES, DOCUMENTS.select(torch.tensor(left)), [IDS[n] for n in left], 4)
        ]
        assert store.add(IDS, DOCUMENTS) == len(set(gone))
        assert [sorted(row) for row in store.search(QUERIES, 6).ids] == expected
    assert len(store) == 12
    assert store.delete(IDS) == 12
    assert store.search(QUERIES, 3).ids == [[], [], []]
    assert not list(store.folder.glob("part-*"))


def test_a_killed_add_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "PART_BYTES", 2 * 8 * 6)
    store, keep = ExactStore(tmp_path, META), ExactStore._keep
    calls = []

    def killed(self: ExactStore) -> None:
        # the second part is on disk, and the card does not know it
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        keep(self)

    monkeypatch.setattr(ExactStore, "_keep", killed)
    with pytest.raises(KeyboardInterrupt):
        store.add(IDS, DOCUMENTS)
    again = ExactStore(tmp_path, META)
    before = len(again)
    assert 0 < before < 12
    assert again.add(IDS, DOCUMENTS) == 12 - before
    assert again.search(QUERIES, 5).ids == best(QUERIES, DOCUMENTS, IDS, 5)
    assert sorted(again.ids) == sorted(IDS)


def test_another_content_is_refused_by_name(tmp_path: Path) -> None:
    ExactStore(tmp_path, META)
    with pytest.raises(InputError, match=r"holds model mine, not other; width 8, not 4; name another place"):
        ExactStore(tmp_path, Meta("other", 4, "hierarchical", 2.0))
    with pytest.raises(
        InputError, match=r"holds method hierarchical, not sequential; factor 2.0, not 3.0; unit norm True"
    ):
        ExactStore(tmp_path, Meta("mine", 8, "sequential", 3.0, unit_norm=False))
    # the same weights in another folder are the same model
    Meta("a", 8, weights="x").require(Meta("b", 8, weights="x"), "here")
    with pytest.raises(InputError, match="there is no index in"):
        ExactStore(tmp_path / "nowhere")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="holds other files and no index"):
        ExactStore(tmp_path / "full", META)


def test_documents_that_cannot_be_added(tmp_path: Path) -> None:
    store = ExactStore(tmp_path, META)
    one = Bags.from_list([torch.ones(2, 8)])
    for ids, bags, told in (
        (["a"], Bags.from_list([torch.ones(2, 4)]), "vectors are 4 wide, and those of the index 8; are they of mine"),
        (["a", "b"], one, "expected one for each of 1 documents, got 2"),
        (["a", "a"], Bags.from_list([torch.ones(1, 8)] * 2), "expected each once, got a again"),
        (["a"], Bags.from_list([torch.zeros(0, 8)]), r"1 of 1 documents have no vector \(a\)"),
        (["a"], Bags.from_list([torch.full((1, 8), torch.nan)]), r"1 documents hold NaN or infinite numbers \(a\)"),
    ):
        with pytest.raises(InputError, match=told):
            store.add(ids, bags)
    with pytest.raises(InputError, match=r"norm is not 1 \(a\), and this store compares by cosine"):
        vectors.require_vectors(["a"], one, META, unit=True)
    with pytest.raises(InputError, match="vectors are 4 wide"):
        store.search(Bags.from_list([torch.ones(2, 4)]))


def test_damage_is_found(tmp_path: Path) -> None:
    store = ExactStore(tmp_path, META)
    store.add(IDS, DOCUMENTS)
    part = next(tmp_path.glob("part-*"))
    whole = part.read_bytes()
    part.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(InputError, match=r"is damaged .*its digest is another one"):
        ExactStore(tmp_path)
    part.unlink()
    with pytest.raises(InputError, match=r"part-000000.safetensors is damaged"):
        ExactStore(tmp_path)
    card = json.loads((tmp_path / CARD).read_text())
    (tmp_path / CARD).write_text(json.dumps({**card, "format": 2}))
    with pytest.raises(InputError, match=r"index.json: is damaged"):
        ExactStore(tmp_path)
