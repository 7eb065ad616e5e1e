"""The page of an audit of explanations."""

from __future__ import annotations

import dataclasses
import html
import json
import re
from pathlib import Path

import pytest

from cenote.core import InputError, files
from cenote.jobs.explain import Audit, audit, digits
from cenote.report import write
from cenote.report.audit import render_audit
from tests.jobs.explain.subjects import Additive, ByChance, IgnoresTheModel, Truth, vectors


@pytest.fixture(scope="module")
def found() -> Audit:
    given = {"truth": Truth(), "chance": ByChance(), "ignores": IgnoresTheModel(0)}
    return audit(vectors(Additive()), methods=(), explainers=given, name="<b>sets</b>")


def text_of(page: str) -> str:
    return html.unescape(re.sub(r"<[^>]+>", " ", page))


def test_the_page_tells_everything_and_needs_nothing_else(found: Audit) -> None:
    page = render_audit(found)
    assert page.startswith("<!doctype html>")
    assert found.sentence in html.unescape(page)
    assert found.order[1:] in html.unescape(page)
    for result in found.results:
        assert page.count(result.method) > 3
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    assert "&lt;b&gt;sets&lt;/b&gt;" in page
    assert len(page) < 3_000_000


def test_controls_and_what_was_struck_out_are_marked(found: Audit) -> None:
    page = render_audit(found)
    assert page.count('<span class="tag ref">control</span>') == 3
    assert "<s>ignores</s>" in page
    assert page.count(">struck out</span>") == 1


def test_units_are_coloured_by_their_scores(found: Audit) -> None:
    page = render_audit(found)
    first = found.gallery["items"][0]
    strengths = [round(0.8 * round(100 * abs(s))) for s in first["scores"]["truth"]]
    assert max(strengths) == 80
    shown = [int(float(v)) for v in re.findall(r"var\(--(?:better|worse)\) ([\d.]+)%, transparent\)\">token", page)]
    assert all(abs(a - b) <= 1 for a, b in zip(shown, strengths, strict=False))


def test_images_are_drawn_over(tmp_path: Path) -> None:
    found = audit(digits(items=10), methods=["mean-attention"], out=tmp_path)
    page = write(tmp_path).read_text()
    assert page.count('<span class="photo crisp item') == 5 * len(found.results)
    assert 'alt="mean-attention: scores over the patches"' in page


def test_an_interrupted_audit_says_so(found: Audit) -> None:
    assert "Incomplete: the run was interrupted." in render_audit(dataclasses.replace(found, complete=False))


def test_a_damaged_file_is_named(found: Audit, tmp_path: Path) -> None:
    content = json.loads(found.to_json())
    content["other"] = content.pop("metric_name")
    (tmp_path / "comparison.json").write_text(json.dumps(files.sealed(content)))
    with pytest.raises(InputError, match="run `cenote explain --out"):
        write(tmp_path)
    (tmp_path / "comparison.json").write_text("no JSON")
    with pytest.raises(InputError, match="cannot be read"):
        write(tmp_path)
