from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cenote.compare.ranking import ndcg, reciprocal_ranks
from cenote.core import InputError
from cenote.features.corpora import read_corpus
from cenote.mix.local_attention_tkl.chunks import MixedRepresentation, chunked
from cenote.mix.local_attention_tkl.model import TKL
from cenote.mix.local_attention_tkl.ranking import (
    Reranker,
    TKLRanker,
    Triples,
    cost_by_length,
    pair_loss,
    regions_covered,
    train_ranker,
    triples_of,
)
from cenote.mix.local_attention_tkl.rivals import KNRM, TK, ConvKNRM, MatchPyramid, passage_scores, passages_of
from cenote.mix.local_attention_tkl.terms import BM25, TermVocabulary, idf_of, terms_of
from cenote.mix.local_attention_tkl.windows import SaturatedWindows, TopRegions, Windows, windowed

DOUBLE = torch.float64
SMALL = {"heads": 2, "layers": 1, "hidden": 8}


def model(**settings: Any) -> TKL:
    torch.manual_seed(0)
    made = TKL(8, **{**SMALL, **settings}).double().eval()
    with torch.no_grad():
        # scores that differ, and windows that saturate at once
        made.saturated.dense.weight.normal_()
        if made.saturated.saturation == "embedding":
            for part, bias in ((made.saturated.factor, 1.0), (made.saturated.root, 2.0), (made.saturated.offset, 0.1)):
                part.bias.fill_(bias)
    return made


def pair(terms: int = 130, queries: int = 4, batch: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = [torch.randn(batch, n, 8, dtype=DOUBLE, generator=generator) for n in (queries, terms)]
    masks = [torch.ones(batch, n, dtype=torch.bool) for n in (queries, terms)]
    return x[0], x[1], masks[0], masks[1]


@pytest.mark.parametrize("terms", [1, 6, 29, 41, 44, 130, 163])
def test_masked_terms_behind_never_change_the_score(terms: int) -> None:
    made, (q, d, q_mask, d_mask) = model(), pair(terms)
    found = made.scored(q, d, q_mask, d_mask)
    for more in (1, 7, 40, 95):
        padded = F.pad(d, (0, 0, 0, more), value=5.0), q_mask, F.pad(d_mask, (0, more))
        longer = made.scored(q, *padded)
        assert torch.allclose(longer.score, found.score, atol=1e-12)
        assert torch.equal(longer.regions.tops, found.regions.tops)
        assert longer.packed == found.packed
    wider = made(F.pad(q, (0, 0, 0, 3), value=2.0), d, F.pad(q_mask, (0, 3)), d_mask)
    assert torch.allclose(wider, found.score, atol=1e-12)


def test_a_document_does_not_depend_on_its_batch_mates() -> None:
    made, (q, d, q_mask, d_mask) = model(), pair()
    d_mask[1, 60:] = False
    whole = made(q, d, q_mask, d_mask)
    alone = torch.cat([made(q[i : i + 1], d[i : i + 1], q_mask[i : i + 1], d_mask[i : i + 1]) for i in range(2)])
    assert torch.allclose(whole, alone)
    turned = made(q.flip(0), d.flip(0), q_mask.flip(0), d_mask.flip(0))
    assert torch.allclose(turned.flip(0), whole)


def test_a_document_of_padding_alone_scores_zero() -> None:
    for published in (False, True):
        made, (q, d, q_mask, d_mask) = model(published=published), pair()
        assert made(q, d, q_mask, d_mask & False).tolist() == [0.0, 0.0]
        d_mask[1] = False
        mixed = made.scored(q, d * float("nan"), q_mask, d_mask & False)
        assert mixed.packed == 0
        one = made(q, d, q_mask, d_mask)
        assert one[0] != 0
        assert one[1] == 0
        made(q, d.requires_grad_(), q_mask, d_mask & False).sum().backward()
        assert d.grad is None or bool(d.grad.isfinite().all())


def test_packing_changes_nothing_but_what_is_run() -> None:
    made, (q, d, q_mask, d_mask) = model(), pair(200)
    d_mask[0, 40:120] = False
    d_mask[1, 30:] = False
    packed = made.scored(q, d, q_mask, d_mask)
    made.pack = False
    whole = made.scored(q, d, q_mask, d_mask)
    assert torch.allclose(packed.score, whole.score, atol=1e-12)
    assert (packed.chunks, packed.packed, whole.packed) == (10, 4, 10)


def test_chunks_overlap_and_every_term_is_in_one_core() -> None:
    x = torch.arange(1, 101, dtype=torch.float32).view(1, 100, 1)
    mask = torch.ones(1, 100, dtype=torch.bool)
    parts = chunked(x, mask)
    assert parts.x.shape == (1, 3, 50, 1)
    assert parts.x[0, 1, :, 0].tolist() == [float(i) for i in range(36, 86)]
    for terms in (1, 5, 6, 40, 44, 45, 81):
        own = chunked(x[:, :terms], mask[:, :terms])
        core = own.x[:, :, 5:45].flatten(1)[own.mask[:, :, 5:45].flatten(1)]
        assert core.tolist() == x[0, :terms, 0].tolist()
    # theirs loses those that stand in the last overlap alone
    theirs = chunked(x[:, :44], mask[:, :44], published=True)
    assert int(theirs.mask[:, :, 5:45].sum()) == 40


def test_one_chunk_of_everything_is_full_attention() -> None:
    made, (_, d, _, d_mask) = model(chunk=130, overlap=0), pair()
    read = made.reader(d, d_mask, document=True)
    parts = chunked(d, d_mask, 130, 0)
    found, _ = made._read(parts)
    assert parts.kept.numel() == 2
    assert torch.allclose(found, read)


def test_the_windows_of_one_chunk_are_those_of_its_terms() -> None:
    made, (q, d, q_mask, d_mask) = model(), pair(35)
    q, d = made.reader(q, q_mask), made.reader(d, d_mask, document=True)
    from cenote.mix.local_attention_tkl.windows import cosine, kernels

    a = kernels(cosine(q, d), made.saturated.means, made.saturated.deviations)
    by_hand = torch.stack([a[:, :, i : i + 30].sum(2) for i in range(0, 35, 2)], 2)
    found = windowed(a, d_mask)
    assert torch.allclose(found.sums[:, :, :18], by_hand)
    assert found.lengths[0].tolist() == [
        float(max(min(30, 35 - i), 0)) for i in range(0, 2 * found.lengths.shape[1], 2)
    ]
    short = windowed(a[:, :, :10], d_mask[:, :10], published=True)
    assert short.lengths.tolist() == [[10.0], [10.0]]


def test_an_equal_term_fires_the_first_kernel_fully() -> None:
    from cenote.mix.local_attention_tkl.windows import MEANS, cosine, kernels

    x = torch.randn(1, 1, 8, dtype=DOUBLE)
    fired = kernels(cosine(x, 3 * x), torch.tensor(MEANS, dtype=DOUBLE), torch.full((11,), 0.1, dtype=DOUBLE))
    assert float(fired[..., 0]) == pytest.approx(1.0)


def test_tops_are_apart_and_the_score_is_their_weighted_sum() -> None:
    top = TopRegions()
    with torch.no_grad():
        top.weights.copy_(torch.arange(1.0, 16.0))
    z = torch.randn(2, 80, generator=torch.Generator().manual_seed(0))
    found = top(z)
    gaps = (found.tops[:, :, None] - found.tops[:, None]).abs() + 100 * torch.eye(3, dtype=torch.long)
    assert int(gaps.min()) >= 15
    assert torch.equal(found.tops[:, 0], z.argmax(1))
    steps = [0, -1, 1, -2, 2]
    by_hand = [
        sum(
            (3 * s + c + 1) * (float(row[t + step]) if 0 <= t + step < 80 else 0.0)
            for s, step in enumerate(steps)
            for c, t in enumerate(tops)
        )
        for row, tops in zip(z, found.tops.tolist(), strict=True)
    ]
    assert found.score.tolist() == pytest.approx(by_hand, rel=1e-5)
    few = top(torch.tensor([[0.0, 2.0]]))
    assert few.tops.tolist() == [[1, -1, -1]]
    assert float(few.score) == 2.0
    theirs = TopRegions(published=True)(torch.tensor([[0.0, 2.0]]))
    assert theirs.tops[0, 0] == 1
    # neighbours over the edge are those at the edge, and a banned window is chosen again
    assert float(theirs.score) > 2.0


def test_saturations() -> None:
    sums = Windows(torch.full((1, 2, 3, 11), 4.0), torch.tensor([[30.0, 12.0, 0.0]]))
    q, mask = torch.randn(1, 2, 8), torch.tensor([[True, False]])
    linear = SaturatedWindows(8, saturation="linear")
    assert torch.allclose(linear(sums, q, mask)[0, :2], linear.dense(torch.full((11,), 4.0)))
    assert linear(sums, q, mask)[0, 2] == 0
    log = SaturatedWindows(8, saturation="log")
    assert torch.allclose(log.values(sums, q), torch.tensor(4.0).log().expand(1, 2, 3, 11))
    plain, robust = SaturatedWindows(8), SaturatedWindows(8, robust=True)
    # of two numbers a norm leaves which is larger
    longer = sums._replace(lengths=torch.tensor([[25.0, 11.0, 0.0]]))
    assert torch.allclose(plain.values(sums, q)[:, :, :2], plain.values(longer, q)[:, :, :2], atol=1e-3)
    robust.load_state_dict({n: v for n, v in plain.state_dict().items() if "norm" not in n})
    nn.init.constant_(robust.factor.weight, 1.0)
    assert not torch.allclose(robust.values(sums, q), robust.values(longer, q))
    for saturation in ("linear", "log", "embedding"):
        made, (a, b, c, d) = model(saturation=saturation), pair(50)
        assert made(a, b, c, d).isfinite().all()
    with pytest.raises(InputError, match="saturation: expected 'embedding'"):
        SaturatedWindows(8, saturation="idf")  # type: ignore[arg-type]


def test_representations_mix_the_term_and_its_context() -> None:
    torch.manual_seed(0)
    reader = MixedRepresentation(8, 2, 1, 8, queries=6, documents=6).double().eval()
    x, mask = torch.randn(2, 5, 8, dtype=DOUBLE), torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    with torch.no_grad():
        reader.mixer.fill_(1.0)
        assert torch.equal(reader(x, mask), x * mask[..., None])
        reader.mixer.fill_(0.0)
        context = reader(x, mask)
        assert not torch.allclose(context, reader(x, mask, document=True))
        assert torch.allclose(reader(x[1:, :2], mask[1:, :2]), context[1:, :2])
    with pytest.raises(InputError, match="queries: 7 positions are needed, and there are 6"):
        reader(torch.zeros(1, 7, 8, dtype=DOUBLE), torch.ones(1, 7, dtype=torch.bool))
    with pytest.raises(InputError, match="heads: expected to share the width 8"):
        MixedRepresentation(8, 3)
    none = MixedRepresentation(8, 2, 1, 8, positions=False).double().eval()
    turned = none(x[:1].flip(1), mask[:1])
    assert torch.allclose(turned.flip(1), none(x[:1], mask[:1]))


def test_positions_begin_anew_in_each_chunk_unless_they_go_on() -> None:
    (q, d, q_mask, d_mask) = pair(100, batch=1)
    same = torch.cat([d[:, :40]] * 2, 1)[:, :80]
    anew, on = model(overlap=0), model(overlap=0, reuse=False, documents=120)
    mask = d_mask[:, :80]
    first, second = anew._read(chunked(same, mask, 40, 0))[0].split(40, 1)
    assert torch.allclose(first, second)
    first, second = on._read(chunked(same, mask, 40, 0))[0].split(40, 1)
    assert not torch.allclose(first, second)
    with pytest.raises(InputError, match="documents: 160 positions are needed"):
        on(q, torch.cat([d, d[:, :40]], 1), q_mask, torch.ones(1, 140, dtype=torch.bool))


def test_wrong_input_is_refused() -> None:
    made, (q, d, q_mask, d_mask) = model(), pair(20)
    with pytest.raises(InputError, match=r"document: expected \[batch, terms, 8\]"):
        made(q, d[..., :4], q_mask, d_mask)
    with pytest.raises(InputError, match="query_mask: expected bool"):
        made(q, d, q_mask.long(), d_mask)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="document: expected one for each of 2 queries"):
        made(q, d[:1], q_mask, d_mask[:1])


def test_time_and_memory_grow_with_the_length() -> None:
    found = cost_by_length(model().float(), (500, 1000, 2000), batch=1, repeats=1)
    kept = [cost.kept for cost in found]
    assert (kept[2] - kept[1]) / (kept[1] - kept[0]) == pytest.approx(2.0, rel=0.1)
    assert all(cost.seconds >= 0 for cost in found)


def test_gradients_reach_every_parameter() -> None:
    made, (q, d, q_mask, d_mask) = model(), pair(100)
    made(q, d, q_mask, d_mask).sum().backward()
    assert not [name for name, p in made.named_parameters() if p.grad is None]


@pytest.mark.parametrize("rival", [KNRM(), ConvKNRM(8, width=4), TK(8, **SMALL, first=60), MatchPyramid(hidden=4)])
def test_rivals_do_not_read_padding(rival: nn.Module) -> None:
    rival = rival.double().eval()
    q, d, q_mask, d_mask = pair(50)
    before = rival(q, d, q_mask, d_mask)
    after = rival(F.pad(q, (0, 0, 0, 2)), F.pad(d, (0, 0, 0, 9)), F.pad(q_mask, (0, 2)), F.pad(d_mask, (0, 9)))
    assert torch.allclose(after, before, atol=1e-9)
    assert rival(q, d, q_mask, d_mask & False).isfinite().all()
    before.sum().backward()
    lost = [name for name, p in rival.named_parameters() if p.grad is None]
    assert not lost


def test_knrm_is_its_equation_and_reads_the_first_terms_alone() -> None:
    q, d, q_mask, d_mask = pair(30)
    rival = KNRM(means=(1.0, 0.5)).double()
    unit = [F.normalize(x, dim=-1) for x in (q, d)]
    k = torch.exp(-((unit[0] @ unit[1].mT)[..., None] - torch.tensor([1.0, 0.5])).square() / 0.02)
    by_hand = 0.01 * k.sum(2).clamp(min=1e-10).log().sum(1) @ rival.dense.weight[0]
    assert torch.allclose(rival(q, d, q_mask, d_mask), by_hand)
    rival.first = 10
    changed = d.clone()
    changed[:, 10:] = 0.0
    assert torch.equal(rival(q, d, q_mask, d_mask), rival(q, changed, q_mask, d_mask))


TEXTS = ["Heat transfer in wings.", "Wings of birds, wings of aircraft", "boundary layer heat", "birds in spring"]


def test_terms_vocabularies_and_bm25() -> None:
    vocabulary = TermVocabulary.of(TEXTS)
    assert vocabulary.words[0] == "wings"
    assert vocabulary.encode(["wings and HEAT", ""], most=2).tolist() == [[2, 1], [0, 0]]
    assert len(TermVocabulary.of(TEXTS, min_count=2)) == 2 + 5
    first = terms_of(TEXTS[0])[0]
    assert TEXTS[0][first.start : first.end] == "Heat"
    found = BM25(TEXTS)
    scores = found.scores(["heat wings", "nothing"])
    df, n, mean = 2, 4, sum(len(terms_of(t)) for t in TEXTS) / 4
    idf = np.log(1 + (n - df + 0.5) / (df + 0.5))
    tf = 1 * 2.2 / (1 + 1.2 * (0.25 + 0.75 * 3 / mean))
    assert scores[0, 2] == pytest.approx(idf * tf)
    assert found.first(["heat wings", "nothing"], 3) == [[0, 1, 2], []] or found.first(["heat wings"], 3)[0][0] == 0
    assert idf_of(TEXTS, vocabulary)[2] == pytest.approx(np.log(5 / 3))
    with pytest.raises(InputError, match="texts: hold no term"):
        TermVocabulary.of(["..."])
    with pytest.raises(InputError, match="words: some stand there twice"):
        TermVocabulary(["a", "a"])
    with pytest.raises(InputError, match="texts: give at least one"):
        BM25([])


def test_training_on_pairs_learns_and_stops() -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    ranker = TKLRanker(40, 8, **SMALL)
    query = torch.randint(2, 40, (32, 3), generator=generator)
    other = torch.randint(2, 40, (32, 40), generator=generator)
    relevant = other.clone()
    relevant[:, 5:8] = query
    before = ranker.embedding.weight.detach().clone()
    seen: list[float] = []

    def validate() -> float:
        seen.append(float((ranker(query, relevant) > ranker(query, other)).float().mean()))
        return seen[-1]

    fitted = train_ranker(
        ranker, Triples(query, relevant, other), validate, loss="ranknet", epochs=6, batch=16, lr=1e-3, kernel_lr=2e-2,
        embedding_lr=1e-3, patience=6,
    )  # fmt: skip
    assert max(seen) > 0.8
    assert fitted.scores[fitted.best] == max(seen)
    assert not torch.equal(ranker.embedding.weight, before)
    frozen = ranker.embedding.weight.detach().clone()
    train_ranker(ranker, Triples(query, relevant, other), epochs=1, embedding_lr=0.0)
    assert torch.equal(ranker.embedding.weight, frozen)
    assert pair_loss(torch.tensor([0.0]), torch.tensor([0.0])).item() == 1.0
    assert pair_loss(torch.tensor([0.0]), torch.tensor([0.0]), "ranknet").item() == pytest.approx(np.log(2))
    with pytest.raises(InputError, match="triples: expected as many"):
        train_ranker(ranker, Triples(query, relevant[:3], other))


def test_regions_are_told_where_they_lie() -> None:
    assert regions_covered([[(0, 30)], [(60, 90)], []], [(20, 40), (80, 90), (0, 5)]) == pytest.approx(2 / 3)
    made, (q, d, q_mask, d_mask) = model(), pair(50, batch=1)
    spans = made.spans(made.scored(q, d, q_mask, d_mask).regions.tops, 50)
    assert all(0 <= a < b <= 50 and b - a <= 30 for a, b in spans[0])
    with pytest.raises(InputError, match="planted: give at least one"):
        regions_covered([], [])


def test_a_collection_is_reranked_with_its_reasons() -> None:
    texts = [*TEXTS, "word " * 90 + "heat of the wings in flight " + "word " * 60]
    vocabulary = TermVocabulary.of(texts)
    torch.manual_seed(0)
    ranker = TKLRanker(len(vocabulary), 8, **SMALL).eval()
    reranker = Reranker(ranker, vocabulary, texts, candidates=3, batch=2)
    (found,) = reranker.rank(["heat of wings"])
    scores = reranker.scores(["heat of wings"])[0]
    assert len(found) == 3
    assert [f.score for f in found] == sorted(np.float32(scores[scores > -np.inf]).tolist(), reverse=True)
    assert {f.document for f in found} == set(BM25(texts).first(["heat of wings"], 3)[0])
    for one in found:
        assert one.regions
        assert all(texts[one.document][r.start : r.end] == r.text for r in one.regions)
    assert reranker.rank(["qqq"]) == [[]]
    alone = ranker(vocabulary.encode(["heat of wings"]), vocabulary.encode([texts[found[0].document]]))
    assert float(alone.detach()) == pytest.approx(found[0].score, abs=1e-5)
    with pytest.raises(InputError, match="vocabulary: has"):
        Reranker(TKLRanker(5, 8, **SMALL), vocabulary, texts)
    other = Reranker(TKLRanker(len(vocabulary), 8, scorer=KNRM()), vocabulary, texts)
    assert other.rank(["heat"])[0][0].regions == ()
    with pytest.raises(InputError, match="KNRM finds no regions"):
        other.ranker.scored(torch.tensor([[2]]), torch.tensor([[2]]))
    with pytest.raises(InputError, match="settings: layers are of TKL"):
        TKLRanker(5, 8, scorer=KNRM(), layers=1)
    with pytest.raises(InputError, match="table: expected 5 rows"):
        TKLRanker(5, table=torch.zeros(4, 8))


def test_triples_are_of_candidates_that_do_not_answer() -> None:
    vocabulary = TermVocabulary.of(TEXTS)
    found = triples_of(["heat of wings", "qqq"], TEXTS, [{0: 1.0}, {1: 1.0}], vocabulary, each=4)
    assert len(found.query) == 4
    rows = vocabulary.encode(TEXTS).tolist()
    assert all(row == rows[0] for row in found.relevant.tolist())
    assert all(row in rows[1:3] for row in found.other.tolist())
    with pytest.raises(InputError, match="gains: no query has both"):
        triples_of(["qqq"], TEXTS, [{1: 1.0}], vocabulary)


def test_passages_of_other_encoders() -> None:
    text = " ".join(str(i) for i in range(20))
    assert passages_of(text, 8, 4)[:2] == ["0 1 2 3 4 5 6 7", "4 5 6 7 8 9 10 11"]
    assert passages_of(text, 8, 4)[-1].endswith("19")
    assert passages_of("...") == ["..."]

    def encode(texts: Any) -> Tensor:
        return torch.tensor([[1.0, float(t.count("19"))] for t in texts])

    first, best = (passage_scores(encode, "19", [text, "1"], w, size=8, step=4) for w in ("first", "max"))  # type: ignore
    assert best[0] == pytest.approx(1.0)
    assert first[0] < 0.9
    assert best[1] == first[1]


def test_cranfield_is_ranked_from_its_files(data_dir: Path) -> None:
    corpus = read_corpus(
        data_dir / "cranfield" / "cran.all.1400.xml",
        data_dir / "cranfield" / "cran.qry.xml",
        data_dir / "cranfield" / "cranqrel.trec.txt",
        by_position=True,
        skip_bad=True,
    )
    texts = corpus.documents.texts
    queries, gains = corpus.queries.texts[:12], corpus.gains[:12]
    relevance = np.array([[own.get(i, 0.0) for i in range(len(texts))] for own in gains])
    vocabulary = TermVocabulary.of(texts, min_count=2)
    torch.manual_seed(0)
    ranker = TKLRanker(len(vocabulary), 8, **SMALL).eval()
    reranker = Reranker(ranker, vocabulary, texts, candidates=5)
    assert float(ndcg(reranker.bm25.scores(queries), relevance).mean()) > 0.3
    scores = reranker.scores(queries[:2])
    assert (scores > -np.inf).sum(1).tolist() == [5, 5]
    assert reciprocal_ranks(scores, relevance[:2]).shape == (2,)
    (best, *_), _ = reranker.rank(queries[:2], k=2)
    assert best.regions[0].text in texts[best.document]
