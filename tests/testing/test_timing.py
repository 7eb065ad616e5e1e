"""The benchmarks' clock."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.timing import Pair, Result, Spread, machine, run, table, time_pair


class Clock:
    """A clock that only sleeping moves on."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("benchmarks.timing.time", clock)
    return clock


def test_a_pair_is_called_in_turn_after_a_warm_up(clock: Clock) -> None:
    calls: list[str] = []

    def call(name: str) -> None:
        calls.append(name)
        clock.sleep(0.003)

    result = time_pair(Pair("both", "a", lambda: call("a"), "b", lambda: call("b")), rounds=4)
    assert calls == ["a"] * 3 + ["b"] * 3 + ["a", "b"] * 4
    assert result.rounds == 4


def test_the_ratio_is_that_of_the_times(clock: Clock) -> None:
    longer = iter([0.02] * 3 + [0.02, 0.024, 0.028, 0.02, 0.02])
    result = time_pair(
        Pair("sleep", "short", lambda: clock.sleep(0.004), "long", lambda: clock.sleep(next(longer))), rounds=5
    )
    assert result.ours_ms == Spread(4.0, 4.0, 4.0)
    assert result.theirs_ms.median == 20
    assert result.ratio == Spread(5.0, 5.0, 6.6)


def test_short_calls_are_timed_together(clock: Clock) -> None:
    count = 0

    def tick() -> None:
        nonlocal count
        count += 1
        clock.sleep(1e-5)

    result = time_pair(Pair("ticks", "one", tick, "other", tick), rounds=2)
    assert count == 2 * (3 + 2 * 200), "so many as take two milliseconds"
    assert result.ours_ms.median == 0.01


def test_what_runs_behind_the_callers_back_is_waited_for(clock: Clock) -> None:
    result = time_pair(
        Pair("launch", "a", lambda: None, "b", lambda: None), rounds=2, synchronise=lambda: clock.sleep(0.005)
    )
    assert result.ours_ms.median == 5


def test_spread_is_the_median_and_the_middle_of_the_samples() -> None:
    assert Spread.of([float(i) for i in range(11)]) == Spread(median=5.0, low=1.0, high=9.0)


def test_table_has_one_line_per_pair() -> None:
    spread = Spread(1.0, 0.5, 2.0)
    lines = table([Result("a pair", "x", "y", 3, spread, spread, Spread(12.34, 10, 15))]).splitlines()
    assert len(lines) == 2
    assert lines[1].split() == ["a", "pair", "x", "1", "y", "1", "12.3", "(10", "to", "15)"]


def test_run_prints_a_table_and_writes_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    target = tmp_path / "new" / "result.json"
    monkeypatch.setattr(sys, "argv", ["bench", "--json", str(target), "--threads", "1", "--rounds", "2"])
    threads = torch.get_num_threads()
    run(lambda: [Pair("sleep", "a", lambda: clock.sleep(0.002), "b", lambda: clock.sleep(0.002))], "doc", "bench")
    torch.set_num_threads(threads)
    assert "sleep" in capsys.readouterr().out
    written = json.loads(target.read_text())
    assert written["command"] == "bench"
    assert written["machine"]["threads"] == 1
    assert written["machine"]["torch"] == machine()["torch"]
    (pair,) = written["pairs"]
    assert pair["name"] == "sleep"
    assert pair["rounds"] == 2
    assert set(pair["ratio"]) == {"median", "low", "high"}
