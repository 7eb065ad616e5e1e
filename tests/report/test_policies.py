"""The page of policies: what reads and what forgets stand apart, and losers are called so."""

from __future__ import annotations

import dataclasses

import pytest

from cenote.jobs.mix import PolicyFrontier
from cenote.report.policies import render_policies
from tests.jobs.mix.planted import Made, compared, first

FACTS = 160


@pytest.fixture(scope="module")
def found() -> PolicyFrontier:
    made = {
        "dense": Made(first(130, FACTS)),
        "sink-window 32": Made(first(20, FACTS), 0.1),
        "quest-small-pages 32": Made(first(130, FACTS), 0.0, 1.3),
        "h2o 32": Made(first(0, FACTS), 0.05, forgets=True),
    }
    return compared(made, ["quest-small-pages", "h2o"], (32,), FACTS)


def section(page: str, name: str) -> str:
    return page.partition(f'<section id="{name}"')[2].partition("</section>")[0]


def test_what_reads_and_what_forgets_stand_apart(found: PolicyFrontier) -> None:
    page = render_policies(found)
    reads, forgets = section(page, "keep"), section(page, "forget")
    assert all(name in reads for name in ("dense", "sink-window 32", "random-keys 32", "oracle-top-k 32"))
    assert "h2o 32" in forgets
    assert "h2o 32" not in reads
    assert "quest-small-pages 32" not in forgets
    assert reads.count("take this") == 1
    assert reads.count('ref">control') == 2
    assert "best choice" in reads
    assert "loses to the window" in forgets
    assert "130 of 160" in reads
    assert "standard error of a share is up to 4.0 points" in page
    assert "is missed more often than one time in five" in page
    assert "points (logarithmic)" not in page


def test_the_page_stands_alone_and_escapes(found: PolicyFrontier) -> None:
    odd = dataclasses.replace(
        found, dataset={**found.dataset, "name": "<b>model</b>"}, skipped={"<i>": "needs <layers>"}, complete=False
    )
    page = render_policies(odd)
    assert "<b>model" not in page
    assert "needs &lt;layers&gt;" in page
    assert "Incomplete: the run was interrupted." in page
    for forbidden in ("http://", "https://", "<script"):
        assert forbidden not in page


def test_without_policies_that_forget_there_is_one_table() -> None:
    made = {name: Made(first(130, FACTS)) for name in ("dense", "quest-small-pages 32")}
    page = render_policies(compared(made, ["quest-small-pages"], (32,), FACTS))
    assert "Policies that forget keys" not in page
