import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

import cenote.report
from cenote.core import InputError
from cenote.jobs.probe import Comparison
from cenote.report.attention import Attention
from cenote.report.leaderboard import leaderboard
from cenote.report.matrix import matrix
from tests.report.factory import CLASSES, make_comparison, method_names, write_run

NASTY = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;"
VOID = {"meta", "link", "img", "br", "input"}


class Page(HTMLParser):
    """What a browser would build: elements with their attributes, and the text a person reads."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        names = {k.rstrip("_"): v for k, v in attributes.items()}
        return [a for t, a in self.elements if t == tag and all(a.get(k) == v for k, v in names.items())]


def page(comparison: Comparison, attention: Attention | None = None) -> Page:
    built = Page(cenote.report.render(comparison, attention))
    assert built.open == []
    return built


def test_the_page_says_what_was_found_in_the_promised_order(tmp_path: Path) -> None:
    c = write_run(tmp_path)
    text = Page(cenote.report.write(tmp_path).read_text("utf-8")).text
    parts = (
        c.sentence,
        "Leaderboard Accuracy",
        "What the metric costs",
        "Who differs from whom",
        "Training Validation",
        "Where it looked What",
        "Localisation How",
        "Skipped These",
        "Data Name",
        "Provenance when",
    )
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    for r in c.results:
        assert r.method in text
        assert r.summary in text
        assert f"{100 * r.metric:.1f}" in text
        assert f"{r.parameters:,}" in text
    for t in c.against_baseline:
        assert f"{100 * t.interval[0]:.1f} to {100 * t.interval[1]:.1f}".replace("-", "−") in text
    for name, why in c.skipped.items():
        assert name in text
        assert why in text
    for value in ("9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08", "cenote probe birds", "2.9.0"):
        assert value in text
    assert "0.001, 0.005, 0.02" in text
    assert "1.09 GB" in text


def test_rows_carry_what_the_browser_sorts_by() -> None:
    c = make_comparison()
    rows = {a["data-method"]: a for a in page(c).all("tbody", role="rowgroup")}
    assert set(rows) == {r.method for r in c.results}
    for rank, r in enumerate(c.results, start=1):
        assert rows[r.method]["data-rank"] == str(rank)
        assert float(rows[r.method]["data-latency"] or "") == pytest.approx(r.latency_ms)
        assert rows[r.method]["data-pareto"] == str(int(r.method in c.pareto))
    assert rows["mean"]["data-p"] == ""
    assert float(rows["mean"]["data-difference"] or "") == 0
    headers = page(c).all("th", role="columnheader")
    assert [h.get("aria-sort") for h in headers if "aria-sort" in h] == ["ascending"]


def test_ties_with_the_winner_follow_the_tests_against_the_winner() -> None:
    c = make_comparison()
    tied = {row.result.method for row in leaderboard(c).rows if row.tied}
    assert tied == {t.first for t in c.against_winner if t.p_adjusted > 0.05}


def test_the_matrix_is_antisymmetric_and_colours_only_what_differs() -> None:
    c = make_comparison()
    m = matrix(c)
    assert m is not None
    for i in range(len(m.names)):
        assert m.cells[i][i] is None
        for j in range(i):
            above, below = m.cells[j][i], m.cells[i][j]
            assert above is not None
            assert below is not None
            assert above.test.difference == -below.test.difference
            assert above.test.interval == tuple(-v for v in reversed(below.test.interval))
            assert above.significant == (above.test.p_adjusted <= 0.05) == (above.strength > 0)
    coloured = [a for a in page(c).all("td", role="gridcell") if a.get("class") in ("up", "down")]
    assert len(coloured) == 2 * m.significant > 0


def test_a_matrix_that_cannot_tell_says_so() -> None:
    assert "the matrix cannot tell" in page(make_comparison(30)).text
    assert "the matrix cannot tell" not in page(make_comparison(30, resamples=999_999)).text
    assert "the matrix cannot tell" not in page(make_comparison(9)).text
    by_rank = make_comparison(30).provenance | {"significance": "wilcoxon"}
    assert "the matrix cannot tell" not in page(make_comparison(30, provenance=by_rank)).text


def test_the_page_says_where_its_p_values_come_from() -> None:
    c = make_comparison()
    assert "Wilcoxon" not in page(c).text
    text = page(dataclasses.replace(c, provenance=c.provenance | {"significance": "wilcoxon"})).text
    assert "p-values are those of Wilcoxon's signed-rank test over test groups, corrected by Holm" in text


def test_nothing_that_a_user_named_becomes_markup(tmp_path: Path) -> None:
    plain = make_comparison()
    clean = write_run(tmp_path / "clean", plain)
    c = dataclasses.replace(
        make_comparison(["mean", "max", NASTY], classes=(NASTY, "b"), sentence=f"{NASTY} wins."),
        skipped={NASTY: NASTY},
        localisation={NASTY: 0.7},
    )
    c.dataset.update(name=NASTY, source=NASTY)
    c.provenance.update(command=NASTY, machine=NASTY)
    write_run(tmp_path / "nasty", c, ids=[f"{NASTY}{i}" for i in range(6)])
    built = Page(cenote.report.write(tmp_path / "nasty").read_text("utf-8"))
    good = Page(cenote.report.write(tmp_path / "clean").read_text("utf-8"))
    assert clean is plain
    assert len(built.all("script")) == len(good.all("script")) == 1
    assert {t for t, _ in built.elements} <= {t for t, _ in good.elements}
    for tag, attributes in built.elements:
        assert not [a for a in attributes if a.startswith("on")], tag
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes)
    for i in range(6):
        assert f"{NASTY}{i}" in built.text


def test_nothing_is_fetched_from_elsewhere(tmp_path: Path) -> None:
    write_run(tmp_path)
    html = cenote.report.write(tmp_path).read_text("utf-8")
    assert not re.findall(r"(?:https?:)?//[a-z0-9-]+\.[a-z]", re.sub(r"base64,[\w+/=]+", "", html))
    assert "@import" not in html
    policy = Page(html).all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"] or ""
    assert "default-src 'none'" in policy
    assert "script-src 'sha256-" in policy


def test_thirty_methods_and_twelve_items_stay_small(tmp_path: Path) -> None:
    c = make_comparison(30, classes=tuple(f"class {i}" for i in range(1000)), seeds=5, epochs=40)
    write_run(tmp_path, c, items=12)
    path = cenote.report.write(tmp_path)
    assert path.stat().st_size < 3_000_000
    built = Page(path.read_text("utf-8"))
    assert len(built.all("figure", class_="look")) == 12 * 29
    assert "class 999" in built.text


def test_a_page_that_would_be_too_large_draws_fewer_items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path)
    monkeypatch.setattr("cenote.report.page.MOST_BYTES", 150_000)
    path = cenote.report.write(tmp_path)
    assert path.stat().st_size <= 150_000
    assert "more items are left out to keep this file small" in Page(path.read_text("utf-8")).text


def test_an_incomplete_comparison_is_marked() -> None:
    assert "Incomplete: the run was interrupted." in page(make_comparison(complete=False)).text
    assert "Incomplete" not in page(make_comparison()).text


def test_one_single_method(tmp_path: Path) -> None:
    c = make_comparison(1)
    assert c.pairs == ()
    write_run(tmp_path, c)
    built = Page(cenote.report.write(tmp_path).read_text("utf-8"))
    assert "Only mean was run" in built.text
    assert not built.all("table", class_="pairs")
    assert len(built.all("figure", class_="look")) == 6


def test_without_looks_curves_seeds_localisation_or_skipped() -> None:
    c = make_comparison(3, seeds=1)
    bare = tuple(dataclasses.replace(r, train_loss=(), validation_curve=()) for r in c.results)
    built = page(dataclasses.replace(c, results=bare, skipped={}, localisation={}, provenance={}))
    shown = {a["id"] for a in built.all("section")}
    assert shown == {"leaderboard", "cost", "pairs", "data", "provenance"}
    assert {(a["href"] or "")[1:] for a in built.all("a")} == shown
    built = page(dataclasses.replace(c, results=(), pairs=(), against_baseline=(), against_winner=(), pareto=()))
    assert {a["id"] for a in built.all("section")} >= {"leaderboard", "data"}


def test_numbers_that_are_no_numbers() -> None:
    c = make_comparison(4)
    broken = dataclasses.replace(
        c.results[1],
        metric=math.nan,
        interval=(math.nan, math.nan),
        metric_per_seed=(math.nan,) * 3,
        latency_ms=0.0,
        validation_curve=((math.nan, math.inf),),
        epochs=(0, 7, 1),
    )
    pairs = tuple(dataclasses.replace(p, difference=math.nan, p_adjusted=math.nan) for p in c.pairs)
    results = (c.results[0], broken, *c.results[2:])
    c = Comparison.from_json(dataclasses.replace(c, results=results, pairs=pairs).to_json())
    html = cenote.report.render(c)
    assert not re.search(r"\bnan\b", re.sub(r"<(script|style)>.*?</\1>", "", html, flags=re.DOTALL).lower())
    assert "– to –" in html


@pytest.mark.parametrize(("metric_name", "shown"), [("R2", "0.9"), ("AUROC", "9")])
def test_percent_only_where_it_is_a_share(metric_name: str, shown: str) -> None:
    c = make_comparison(metric_name=metric_name)
    text = page(c).text
    assert ("points" in text) == (metric_name != "R2")
    best = c.results[0]
    assert (f"{best.metric:.3f}" if metric_name == "R2" else f"{100 * best.metric:.1f}") in text
    assert shown in text


def test_every_reference_inside_the_page_leads_somewhere(tmp_path: Path) -> None:
    write_run(tmp_path)
    built = Page(cenote.report.write(tmp_path).read_text("utf-8"))
    ids = [a["id"] for _, a in built.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for _, attributes in built.elements:
        for name in ("aria-controls", "aria-labelledby"):
            if attributes.get(name):
                assert attributes[name] in ids
        if (attributes.get("href") or "").startswith("#"):
            assert (attributes["href"] or "")[1:] in ids


def test_long_lists_of_classes_fold_and_short_ones_do_not() -> None:
    assert ", ".join(CLASSES) in page(make_comparison(2)).text
    built = page(make_comparison(2, classes=tuple(f"c{i}" for i in range(1200))))
    assert len(built.all("details")) == 1
    assert "and 200 more" in built.text


def test_no_comparison(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(f"no comparison.json in {tmp_path}; name the folder")):
        cenote.report.write(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore::cenote.core.files.UncheckedWarning")
@pytest.mark.parametrize("damage", ["", "{", "[]", "null", "{}", '{"results": 3}', "\x00\x01", "missing field"])
def test_a_damaged_comparison(damage: str, tmp_path: Path) -> None:
    text = damage
    if damage == "missing field":
        raw = json.loads(make_comparison(2).to_json())
        del raw["dataset"]["items"]
        text = json.dumps(raw)
    (tmp_path / "comparison.json").write_text(text, "utf-8")
    (tmp_path / "report.html").write_text("the page of yesterday")
    with pytest.raises(InputError, match=r"comparison\.json cannot be read .*run `cenote probe --out"):
        cenote.report.write(tmp_path)
    assert (tmp_path / "report.html").read_text() == "the page of yesterday"


def test_writing_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path, make_comparison(2), items=1)
    cenote.report.write(tmp_path)
    before = (tmp_path / "report.html").read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        cenote.report.write(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_invented_names_fill_up() -> None:
    names = method_names(200)
    assert len(set(names)) == 200
    assert names[0] == "mean"


def _with_references(c: Comparison) -> Comparison:
    unmeasured = {"learning_rate": None, "parameters": None, "multiply_adds": None, "latency_ms": None}
    second = dataclasses.replace(
        c.results[1],
        method="knn",
        summary="k nearest neighbours",
        settings={"k": 5},
        reference=True,
        epochs=(),
        validation_curve=(),
        train_loss=(),
        **unmeasured,
    )
    return dataclasses.replace(c, results=(c.results[0], second, *c.results[1:]))


def test_references_stand_in_the_table_with_dashes_and_nowhere_else() -> None:
    c = _with_references(make_comparison(4))
    built = page(c)
    assert built.all("span", class_="tag ref")
    assert "4 methods, 1 for reference" in built.text
    row = next(a for a in built.all("tbody", role="rowgroup") if a["data-method"] == "knn")
    assert [row[f"data-{k}"] for k in ("parameters", "multiply-adds", "latency")] == ["", "", ""]
    assert [a["title"] for a in built.all("td", role="cell") if a.get("title") == "–"] == ["–"] * 3
    assert len(built.all("figure", class_="panel")) == 4
    assert Comparison.from_json(c.to_json()) == c
    assert "for reference" not in page(make_comparison(4)).text


def test_cautions_stand_above_the_table() -> None:
    c = make_comparison(4, cautions=("only 12 test items", NASTY))
    built = page(c)
    assert built.all("div", id="cautions")
    assert built.text.index("only 12 test items") < built.text.index("Leaderboard Accuracy")
    assert NASTY in built.text
    assert not page(make_comparison(4)).all("div", id="cautions")


def test_what_to_use_is_told_with_the_lines_that_load_it(tmp_path: Path) -> None:
    c = make_comparison(9)
    assert c.recommended
    write_run(tmp_path / "an out", c)
    text = Page(cenote.report.write(tmp_path / "an out").read_text("utf-8")).text
    assert f"Use {c.recommended} : {c.reason}." in text
    assert "cenote predict" not in text, "nothing was saved"
    (tmp_path / "an out" / "recommended").mkdir()
    text = Page(cenote.report.write(tmp_path / "an out").read_text("utf-8")).text
    folder = str(tmp_path / "an out" / "recommended")
    assert f"cenote.load({folder!r})" in text
    assert f"cenote predict '{folder}' DATA" in text


def test_a_page_without_a_verdict_says_so_and_calls_nobody_best() -> None:
    c = make_comparison(4, no_verdict="2 test groups cannot carry one")
    built = page(c)
    assert built.all("p", id="no-verdict")
    assert "No verdict. 2 test groups cannot carry one." in built.text
    assert " best " not in built.text.split("Leaderboard Accuracy")[1].split("Parameters, multiply-adds")[0]
    sure = page(make_comparison(4))
    assert not sure.all("p", id="no-verdict")
    assert "ties with" not in sure.text
