import csv
import io
import sys

import pytest

import cenote
from cenote.compare.result import ArmResult, Comparison, PairTest


def arm(name: str, metric: float, **more: object) -> ArmResult:
    return ArmResult(
        method=name, summary="a <b> way", metric=metric, interval=(metric - 0.1, metric + 0.1), metric_per_seed=(metric,),
        seconds=1.0, **more,
    )  # fmt: skip


TESTS = (
    PairTest("mean", "sim_pool", -0.2, (-0.3, -0.1), 0.004, 0.008),
    PairTest("noise", "mean", -0.1, (-0.2, 0.0), 0.06, 0.06),
)
COMPARISON: Comparison[ArmResult] = Comparison(
    metric_name="accuracy",
    results=(arm("sim_pool", 0.9), arm("mean", 0.7), arm("noise", 0.6, control=True)),
    skipped={},
    baseline="mean",
    winner="sim_pool",
    against_baseline=TESTS,
    against_winner=(),
    pairs=TESTS,
    pareto=("sim_pool",),
    sentence="sim_pool beats mean by 20 points <really>.",
    recommended="sim_pool",
)


def test_rows_say_what_was_measured_and_how_each_compares_with_the_baseline() -> None:
    best, mean, noise = COMPARISON.to_rows()
    assert (best["rank"], best["method"], best["metric"], best["low"]) == (1, "sim_pool", 0.9, 0.8)
    assert (best["difference"], best["difference_low"], best["difference_high"]) == (0.2, 0.1, 0.3)
    assert (best["winner"], best["recommended"], best["pareto"]) == (True, True, True)
    assert mean["difference"] is None
    assert (noise["p_adjusted"], noise["control"]) == (0.06, True)


def test_csv(tmp_path) -> None:  # type: ignore[no-untyped-def]
    text = COMPARISON.to_csv(tmp_path / "rows.csv")
    assert (tmp_path / "rows.csv").read_text() == text
    read = list(csv.DictReader(io.StringIO(text)))
    assert [row["method"] for row in read] == ["sim_pool", "mean", "noise"]
    assert float(read[0]["p_adjusted"]) == 0.008
    assert read[1]["difference"] == ""
    with pytest.raises(cenote.InputError, match="path: "):
        COMPARISON.to_csv("/proc/nowhere/rows.csv")


def test_latex() -> None:
    lines = COMPARISON.to_latex().splitlines()
    assert lines[0] == r"\begin{tabular}{lrrrrr}"
    assert lines[2] == r"method & accuracy & low & high & minus mean & adjusted p \\"
    assert lines[4].startswith(r"\textbf{sim\_pool} & \textbf{0.900}")
    assert lines[5] == r"mean & 0.700 & 0.600 & 0.800 &  &  \\"
    assert COMPARISON.to_latex(["method", "seconds"]).splitlines()[2] == r"method & seconds \\"
    with pytest.raises(cenote.InputError, match="columns: expected 'rank', 'method'"):
        COMPARISON.to_latex(["speed"])


def test_a_frame() -> None:
    pandas = pytest.importorskip("pandas")
    frame = COMPARISON.to_frame()
    assert isinstance(frame, pandas.DataFrame)
    assert frame.loc["sim_pool", "metric"] == 0.9
    assert list(frame.index) == ["sim_pool", "mean", "noise"]


def test_a_frame_without_pandas_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(cenote.InputError, match="to_frame: needs pandas; install it, or take to_rows or to_csv"):
        COMPARISON.to_frame()


def test_in_a_notebook_texts_stay_texts() -> None:
    page = COMPARISON._repr_html_()
    assert "&lt;really&gt;" in page
    assert "<strong>sim_pool</strong>" in page


def test_short_words() -> None:
    assert repr(COMPARISON) == "<Comparison by accuracy: sim_pool 0.900, mean 0.700, noise 0.600>"
    assert str(COMPARISON) == COMPARISON.sentence
