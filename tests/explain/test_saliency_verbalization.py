from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from cenote.core import InputError
from cenote.explain import (
    SaliencyVerbalizer,
    convolution_search,
    instruction_prompt,
    named_share,
    simulatability,
    span_search,
)
from cenote.explain.base import Attribution
from cenote.explain.saliency_verbalization.readers import contiguity, first_words, random_span, top_words
from cenote.explain.saliency_verbalization.searches import (
    compare_searches,
    coverage,
    normalised,
    summary_search,
    threshold,
    total_order,
)
from cenote.explain.saliency_verbalization.verbalizer import NOTHING_FOR, NOTHING_STANDS_OUT, ask


def scores(n: int, seed: int = 0) -> list[float]:
    return np.random.default_rng(seed).normal(size=n).tolist()


def words(n: int) -> list[str]:
    return [f"w{i}" for i in range(n)]


@pytest.mark.parametrize("n", [4, 5, 6, 17])
@pytest.mark.parametrize("sign", [None, "+", "-"])
@pytest.mark.parametrize("seed", [0, 1])
def test_convolution_finds_what_trying_every_set_finds(n: int, sign, seed: int) -> None:  # type: ignore[no-untyped-def]
    a = normalised(scores(n, seed))
    judged = normalised([-x for x in a]) if sign == "-" else a
    least = threshold(judged)
    expected = {}
    for size in (2, 3):
        for indices in combinations(range(n), size):
            picked = [judged[i] for i in indices]
            if indices[-1] - indices[0] >= 5 or n < 5 or np.mean(picked) <= least:
                continue
            if (sign == "+" and min(picked) < 0) or (sign == "-" and max(a[i] for i in indices) >= 0):
                continue
            expected[indices] = np.mean(picked)
    found = convolution_search(scores(n, seed), sign=sign)
    assert {s.indices: s.value for s in found} == pytest.approx(expected)
    assert [s.value for s in found] == sorted((s.value for s in found), reverse=True)


@pytest.mark.parametrize("n", [4, 5, 6, 17])
@pytest.mark.parametrize("seed", [0, 1])
def test_spans_are_what_trying_every_run_finds(n: int, seed: int) -> None:
    a = normalised(scores(n, seed))
    least = threshold(a, value=0.6)
    runs = [range(start, start + size) for size in (3, 5) for start in range(n - size + 1) if n >= 5]
    expected = {tuple(r): np.mean([a[i] for i in r]) for r in runs if np.mean([a[i] for i in r]) > least}
    found = span_search(scores(n, seed), value=0.6)
    assert {s.indices: s.value for s in found} == pytest.approx(expected)


def test_thresholds_are_those_of_the_closed_forms() -> None:
    a = [3.0, -1.0, 2.0, 0.0, 1.0]
    assert threshold(a, "mean", 0.4) == 2.5
    assert threshold(a, "quantile", 2.0) == pytest.approx(2 * np.std(a))
    assert threshold(a, "variance", 2.0) == pytest.approx(2 * np.var(a))
    assert normalised([0.0, -2.0]) == [0.0, -2.0]
    assert normalised([-1.0, -2.0]) == [-1.0, -2.0]


def test_one_dominant_word_is_named_and_no_other() -> None:
    for at in (0, 4, 9):
        a = [0.01] * 10
        a[at] = 1.0
        found = SaliencyVerbalizer().verbalize(words(10), a)
        assert found.summary == f"The word » w{at} « is most important for the prediction."
        assert found.indices == (at,)
        assert found.coverage == pytest.approx(1 / 1.09)


def test_of_equal_scores_k_words_cover_their_share() -> None:
    a = [0.7] * 8
    assert coverage(range(3), a) == pytest.approx(3 / 8)
    assert all(s.coverage == pytest.approx(1 / 8) for s in total_order(a))
    assert SaliencyVerbalizer().verbalize(words(8), a).summary


def test_coverage_of_disjoint_sets_adds() -> None:
    a = scores(9)
    assert coverage([0, 1], a) + coverage([5], a) == pytest.approx(coverage([0, 1, 5], a))


def test_scaling_changes_no_sentence_and_places_lie_in_the_text() -> None:
    for seed in range(5):
        a = scores(20, seed)
        one, two = (SaliencyVerbalizer().verbalize(words(20), [c * x for x in a]) for c in (1.0, 7.5))
        assert one.sentences == two.sentences
        assert one.summary == two.summary
        assert all(set(s.indices) <= set(range(20)) for found in one.snippets.values() for s in found)


def test_nothing_that_speaks_for_it_is_said_plainly() -> None:
    found = SaliencyVerbalizer().verbalize(words(6), [-0.1, 0.0, -3.0, -1.0, -1.0, -1.0])
    assert found.summary == NOTHING_FOR
    assert found.coverage == 0
    assert found.indices == ()
    assert all(s.coverage == 0 for s in found.snippets["total"])


def test_what_all_searches_found_is_said_of_both() -> None:
    a = [0.0, 0.0, 1.0, 0.9, 0.8, 0.0, 0.0, 0.0, 0.0, 0.0]
    found = SaliencyVerbalizer().verbalize(words(10), a)
    assert found.sentences["compare"] == (
        "snippet: 'w2 w3 w4 ' occurs in all searches and accounts for 100.0% of prediction score.",
    )
    assert [s.indices for s in compare_searches(found.snippets["span"], [])] == []


def test_nothing_above_the_threshold_is_an_empty_list() -> None:
    a = [1.0, -1.0, 1.0, -1.0, 1.0, -1.0]
    assert convolution_search(a, metric="quantile", value=5.0) == []
    assert span_search(a, metric="quantile", value=5.0) == []
    found = SaliencyVerbalizer(metric="quantile", value=5.0).verbalize(words(6), a)
    assert found.summary == NOTHING_STANDS_OUT


def test_texts_shorter_than_the_window_have_a_total_order_only() -> None:
    found = SaliencyVerbalizer().verbalize(["so", "thin"], [0.1, 0.9])
    assert not found.snippets["convolution"]
    assert not found.snippets["span"]
    assert found.sentences["total"][0] == "Token 'thin' with 90.0% of prediction score"
    assert found.summary == "The word » thin « is most important for the prediction."
    assert SaliencyVerbalizer().verbalize(["so"], [0.1]).indices == (0,)
    assert SaliencyVerbalizer().verbalize([], []).summary == NOTHING_FOR


def test_spans_of_equal_coverage_are_ordered_by_place_and_none_is_lost() -> None:
    a = [0.0] * 15
    for at in (2, 8, 13):
        a[at] = 1.0
    found = summary_search([], [], a)
    assert [s.indices for s in found] == [(2,), (8,), (13,)]
    assert len(summary_search([], [], a, legacy=True)) == 1


def test_words_that_speak_against_it_are_found_by_their_sign() -> None:
    a = [0.9, 0.1, -0.1, -0.9, -0.8, 0.0, 0.1, 0.0, 0.0, 0.0]
    found = SaliencyVerbalizer(sign="-").verbalize(words(10), a)
    assert found.indices == (3, 4)
    assert all(a[i] < 0 for s in found.snippets["convolution"] for i in s.indices)
    nothing = SaliencyVerbalizer(sign="-").verbalize(words(3), [1.0, 1.0, 1.0])
    assert nothing.summary == "No word speaks against the prediction."


def test_legacy_misses_the_last_window_and_the_last_word() -> None:
    a = [0.0] * 8 + [1.0, 1.0]
    assert (8, 9) in {s.indices for s in convolution_search(a)}
    assert (8, 9) not in {s.indices for s in convolution_search(a, legacy=True)}
    assert summary_search([], [], [0.0, 1.0], legacy=True)[0].coverage == 0
    assert not convolution_search([-x for x in scores(9)], sign="-", legacy=True)


def test_the_summary_keeps_to_its_limits() -> None:
    a = [1.0] * 6 + [0.0] * 6 + [0.9]
    assert len(SaliencyVerbalizer(maxwords=4).verbalize(words(13), a).indices) == 4
    assert SaliencyVerbalizer(mincoverage=1.0).verbalize(words(13), a).summary == NOTHING_STANDS_OUT


def test_words_are_cleaned_and_labels_named() -> None:
    found = SaliencyVerbalizer().verbalize(["Ġso", "##thin", "▁it"], [0.0, 1.0, 0.0], "bad", "good")
    assert found.summary == (
        "The word » thin « is most important for the prediction. The prediction is bad, the true label good."
    )
    assert found.coloured(1) == "so \033[1;31mthin\033[0m it"
    assert (
        SaliencyVerbalizer()
        .verbalize(["<b>", "c"], [1.0, 0.1])
        .html(1)
        .startswith('<b style="color:#c5221f">&lt;b&gt;')
    )


def test_a_prompt_shows_every_score_and_the_callback_is_all_that_is_asked() -> None:
    prompt = instruction_prompt(["so", "thin"], [0.123, -0.456], "bad", "words")
    assert "so (0.12) thin (-0.46)" in prompt
    for part in ("is bad", "computed after the prediction", "only seen the text", "most important words"):
        assert part in prompt
    assert ask(["so"], [1.0], "bad", lambda p: f" {len(p)} ") == str(len(instruction_prompt(["so"], [1.0], "bad")))


def test_readers_are_scored_on_the_words_that_they_see() -> None:
    texts = [["a", "b", "c"], ["c", "b", "a"]]
    assert simulatability(lambda seen: int("a" in seen), texts, [(0,), (0,)], [1, 1]) == 0.5
    assert top_words([0.1, 0.9, 0.5], 2) == (1, 2)
    assert first_words(2, 5) == (0, 1)
    assert len(random_span(10, 3, 0)) == 3
    assert contiguity(random_span(10, 3, 0)) == 1.0
    assert contiguity([]) == 0.0
    assert named_share("The word thin.", ["So", "Thin,"], [0.1, 0.9], 1) == 1.0


def attribution() -> Attribution:
    scores = torch.tensor([[0.0, 0.1, 0.5, 0.3], [0.0, -0.2, 0.0, 0.0]])
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    texts = [[" [CLS]", " so", " th", "in"], [" [CLS]", " it"]]
    return Attribution(scores, mask, target=torch.tensor([1, 0]), signed=True).named(texts)


def test_tokens_become_words_and_words_a_sentence(tmp_path: Path) -> None:
    found = attribution().words()
    assert found.units == "words"
    assert found.texts == (("[CLS]", "so", "thin"), ("[CLS]", "it"))
    assert torch.allclose(found.scores, torch.tensor([[0.0, 0.1, 0.8], [0.0, -0.2, 0.0]]))
    assert found.mask.tolist() == [[True] * 3, [True, True, False]]
    assert found.sentence(labels=["good", "bad"]) == (
        "The word » thin « is most important for the prediction. The prediction is bad."
    )
    assert found.sentence(1) == NOTHING_FOR
    assert found.verbalized(0).indices == (2,)
    found.save(tmp_path / "it.safetensors")
    assert Attribution.load(tmp_path / "it.safetensors").texts == found.texts
    assert found.normalised().texts == found.texts


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SaliencyVerbalizer().verbalize(["a"], [1.0, 2.0]), "scores: expected one for each of 1 words, got 2"),
        (lambda: SaliencyVerbalizer(length=4), "length: expected an odd number of words from 3, got 4"),
        (lambda: SaliencyVerbalizer(metric="median"), "metric: expected 'mean', 'quantile' or 'variance'"),
        (lambda: SaliencyVerbalizer(sign="*"), "sign: expected"),
        (lambda: SaliencyVerbalizer(best=0), "best: expected at least 1"),
        (lambda: instruction_prompt(["a"], [1.0], "x", "how"), "question: expected"),
        (lambda: simulatability(lambda w: 0, [["a"]], [], [1]), "texts, chosen, labels: expected as many"),
        (lambda: Attribution(torch.zeros(1, 2), torch.ones(1, 2).bool()).sentence(), "texts: sentences are made of"),
        (lambda: Attribution(torch.zeros(1, 2), torch.ones(1, 2).bool()).words(), "texts: words are made of"),
        (lambda: attribution().named([["a"], ["b"]]), r"texts: expected as many as there are real units, \[4, 2\]"),
        (lambda: attribution().sentence(2), "item: expected below 2, got 2"),
        (lambda: attribution().words().words(), "units: words are made of tokens, and these are words"),
    ],
)
def test_what_cannot_be_used_is_named(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=message):
        call()
