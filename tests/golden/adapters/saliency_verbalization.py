import json

import pytest
from torch import Tensor

from cenote.explain.saliency_verbalization.verbalizer import SaliencyVerbalizer
from tests.golden.cases import Case, adapter


@adapter("saliency-verbalization", "SMV src.search_methods.searches / post_searches / tools")
def verbalized(case: Case) -> dict[str, Tensor]:
    """What the authors' code says stands in a JSON file beside the scores: it is compared here."""
    config, metric = case.config, case.config["metric"]
    expected = json.loads((case.folder / config["expected"]).read_text("utf-8"))
    scores = case.inputs["attributions"].tolist()
    ours = SaliencyVerbalizer(
        length=config["len_filters"],
        metric=metric["name"],
        value=metric["value"],
        sign=config["sgn"],
        legacy=True,
    ).verbalize(expected["tokens"], scores)
    for name in ("convolution", "span"):
        found = ours.snippets[name]
        assert [list(s.indices) for s in found] == expected[name]["indices"]
        assert [s.value for s in found] == pytest.approx(expected[name]["values"], abs=1e-6)
        best = sorted(found, key=lambda s: -s.value)
        said = [[text, round(100 * s.coverage, 2)] for text, s in zip(ours.sentences[name], best, strict=True)]
        assert said == expected[name]["verbalised"]
    assert list(ours.sentences["total"]) == expected["total_order"]
    assert ours.summary == (expected["summary"] or "")
    return {}
