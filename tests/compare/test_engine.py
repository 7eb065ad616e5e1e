"""A job of three arms and a control, which has nothing to do with probes."""

import ast
import dataclasses
import errno
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from cenote.compare import (
    Arm,
    ArmResult,
    Cell,
    Comparison,
    Measure,
    OnShare,
    Units,
    Words,
    engine,
    judge,
    measure,
    processes,
)
from cenote.compare.arms import unheard
from cenote.compare.cells import Cells, load_cell, save_cell
from cenote.compare.engine import Measured
from cenote.core import InputError

UNITS = Units(tuple(f"text {i}" for i in range(60)))
runs: list[str] = []


@dataclass(frozen=True)
class Guess(Arm):
    name: str
    level: float
    control: bool = False
    reference: bool = False

    def key(self) -> Mapping[str, Any]:
        return {"level": self.level}

    def run(self, on_share: OnShare = unheard) -> Cell:
        runs.append(self.name)
        on_share(self.name, 0.5)
        noise = torch.randn(2, len(UNITS), generator=torch.Generator().manual_seed(len(self.name)))
        return Cell(self.name, {"tokens": 7}, {"scores": self.level + 0.1 * noise})


ARMS = [Guess("mean", 0.5), Guess("better", 0.9), Guess("worse", 0.2), Guess("random", 0.0, control=True)]


@pytest.fixture(autouse=True)
def _forget() -> None:
    runs.clear()


def table(arms: list[Guess] = ARMS, **options: Any) -> Comparison[ArmResult]:
    return judge(Comparison, measure(arms, "mean", **options), UNITS, Measure("faithfulness"), baseline="mean")


def test_the_table_of_a_job_with_scores_per_unit() -> None:
    c = table()
    assert [r.method for r in c.results] == ["better", "mean", "worse", "random"]
    assert (c.winner, c.baseline, c.controls, c.pareto) == ("better", "mean", ("random",), ("better",))
    assert c.sentence.startswith("better beats mean by 0.396 (")
    assert all(r.seconds >= 0 and len(r.metric_per_seed) == 2 for r in c.results)
    assert Comparison.from_json(c.to_json()) == c


@pytest.mark.parametrize("level", [float("nan"), float("inf")])
def test_an_arm_whose_scores_are_not_finite_is_left_out_and_named(level: float) -> None:
    c = table([*ARMS, Guess("broken", level)])
    assert c.winner == "better"
    assert c.skipped["broken"].startswith(f"gives NaN or infinity on {len(UNITS)} of {len(UNITS)} units, ")
    assert "broken" not in {r.method for r in c.results}
    with pytest.raises(InputError, match="mean: gives NaN or infinity"):
        table([Guess("mean", level), *ARMS[1:]])


def test_an_arm_whose_metric_is_no_number_is_left_out_and_named() -> None:
    def undefined(scores: Any, _truth: Any, weights: Any) -> Any:
        return np.where(scores.mean() > limit, np.nan, weights @ scores / weights.sum(1))

    limit, measured = 0.8, measure(ARMS, "mean")
    c = judge(Comparison, measured, UNITS, Measure("odd", undefined), baseline="mean")
    assert c.skipped == {"better": "its odd is no number"}
    assert [r.method for r in c.results] == ["mean", "worse", "random"]
    limit = 0.4
    with pytest.raises(
        InputError, match="odd: is no number for mean, with which the others are compared; do the 60 units"
    ):
        judge(Comparison, measured, UNITS, Measure("odd", undefined), baseline="mean")


def test_numbers_that_are_none_come_back_from_a_cell_whose_text_any_reader_takes(tmp_path: Path) -> None:
    record = {"loss": [[0.5, float("nan")], (float("-inf"),)], "told": "nan", "seconds": 1.0}
    save_cell(tmp_path / "a.safetensors", "key", Cell("a", record, {"scores": torch.zeros(1, 2)}))
    raw = (tmp_path / "a.safetensors").read_bytes()
    assert b"NaN" not in raw
    assert b"Infinity" not in raw
    found = load_cell(tmp_path / "a.safetensors", "key")
    assert found is not None
    assert str(found.record) == str({"loss": [[0.5, float("nan")], [float("-inf")]], "told": "nan", "seconds": 1.0})


def test_signed_ranks_need_what_each_unit_adds() -> None:
    ranked = Measure("AUROC of logits", lambda scores, truth, weights: scores.max(-1) + 0 * weights[:, 0])
    arms = measure(ARMS, "mean")
    with pytest.raises(InputError, match="AUROC of logits has no such shares"):
        judge(Comparison, arms, UNITS, ranked, baseline="mean", significance="wilcoxon")
    with pytest.raises(InputError, match="significance: expected 'permutation' or 'wilcoxon', got 'wilcoxn'"):
        judge(Comparison, arms, UNITS, Measure("m"), baseline="mean", significance="wilcoxn")
    assert judge(Comparison, arms, UNITS, Measure("m"), baseline="mean", significance="wilcoxon").winner == "better"


def test_a_control_that_does_not_lose_is_told() -> None:
    c = table([*ARMS[:3], dataclasses.replace(ARMS[3], level=1.5)])
    assert c.results[0].method == "random"
    assert c.winner == "better"
    assert c.sentence.endswith("; random, a control, does not lose to it: this table decides nothing.")


def test_a_reference_stands_in_the_table_and_never_wins() -> None:
    c = table([*ARMS, Guess("usual", 1.5, reference=True)])
    assert [r.method for r in c.results] == ["usual", "better", "mean", "worse", "random"]
    assert (c.winner, c.recommended, c.references, c.pareto) == ("better", "better", ("usual",), ("better",))
    assert "; usual is ahead of it: look at how the others are run" in c.sentence
    alone = table()
    assert [t for t in c.pairs if "usual" not in (t.first, t.second)] == list(alone.pairs)
    assert [t for t in c.against_baseline if t.first != "usual"] == list(alone.against_baseline)
    with pytest.raises(InputError, match="baseline: mean is a reference; name an arm that may be recommended"):
        table([dataclasses.replace(ARMS[0], reference=True), *ARMS[1:]])


@dataclass(frozen=True, kw_only=True)
class Timed(ArmResult):
    milliseconds: float

    @property
    def cost(self) -> float:
        return self.milliseconds


class TimedComparison(Comparison[Timed]):
    result_type: ClassVar[type[Any]] = Timed


@pytest.mark.parametrize(("milliseconds", "recommended"), [((1.0, 0.95, 3.0), "b"), ((1.0, 0.8, 3.0), "mean")])
def test_what_costs_the_same_but_for_noise_is_chosen_by_its_metric(
    milliseconds: tuple[float, ...], recommended: str
) -> None:
    @dataclass(frozen=True)
    class Slow(Guess):
        milliseconds: float = 0.0

        def run(self, on_share: OnShare = unheard) -> Cell:
            return super().run(on_share).with_record(milliseconds=self.milliseconds)

    times = dict(zip(("b", "mean", "winner"), milliseconds, strict=True))
    levels = {"b": 0.501, "mean": 0.5, "winner": 0.502}
    measured = measure([Slow(name, levels[name], milliseconds=t) for name, t in times.items()], "mean")
    even = {n: Cell(n, c.record, {"scores": c.scores * 0 + levels[n] + _noise(n)}) for n, c in measured.cells.items()}
    c = judge(TimedComparison, dataclasses.replace(measured, cells=even), UNITS, Measure("m"), baseline="mean")
    assert (c.winner, c.recommended) == ("winner", recommended)
    share = f"{times[recommended] / 3:.2g}"
    assert c.reason == f"it cannot be told from winner, which comes first, and takes {share} times the time"
    assert c.sentence.endswith(f" Use {recommended}: it cannot be told from winner, and takes {share} times the time.")
    assert TimedComparison.from_json(c.to_json()).reason == c.reason


def _noise(name: str) -> torch.Tensor:
    noise = torch.randn(len(UNITS), generator=torch.Generator().manual_seed(ord(name[0])))
    return noise - noise.mean()


def test_the_reason_says_of_no_arm_that_it_is_better() -> None:
    assert table().reason == "it comes first, and all others can be told from it"
    assert table(ARMS[:1]).reason == "nothing else was run"
    two = Units(("a", "b"))
    cells = {n: Cell(n, {"seconds": 0.0}, {"scores": torch.full((1, 2), v)}) for n, v in (("mean", 0.2), ("max", 0.9))}
    arms = tuple(Guess(name, 0.0) for name in cells)
    c = judge(Comparison, Measured(arms, cells, {}), two, Measure("m"), baseline="mean")
    assert c.recommended == "mean"
    assert c.reason == "it cannot be told from max, which comes first; these data cannot tell more"


def test_ctrl_c_keeps_what_is_done_and_the_next_run_goes_on(tmp_path: Path) -> None:
    def interrupt(name: str, share: float) -> None:
        if name == "worse":
            raise KeyboardInterrupt

    c = table(folder=tmp_path, on_share=interrupt)
    assert not c.complete
    assert {r.method for r in c.results} == {"mean", "better"}
    runs.clear()
    assert table(folder=tmp_path).complete
    assert runs == ["worse", "random"]


def test_changed_source_is_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table(folder=tmp_path)
    runs.clear()
    table(folder=tmp_path)
    assert runs == []
    monkeypatch.setattr(engine, "source_digest", lambda *_: "edited")
    table(folder=tmp_path)
    assert runs == [arm.name for arm in ARMS]


def test_a_changed_number_of_the_record_is_damage(tmp_path: Path) -> None:
    table(folder=tmp_path)
    file = tmp_path / "better.safetensors"
    raw = file.read_bytes()
    assert raw.count(b'tokens\\": 7') == 1
    file.write_bytes(raw.replace(b'tokens\\": 7', b'tokens\\": 8'))
    runs.clear()
    table(folder=tmp_path)
    assert runs == ["better"]


def test_a_changed_tensor_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_cell(path, "key", Cell("a", {}, {"scores": torch.arange(6.0).view(2, 3).T}))
    loaded = load_cell(path, "key")
    assert loaded is not None
    assert loaded.scores.tolist() == [[0, 3], [1, 4], [2, 5]]
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert load_cell(path, "key") is None


def test_two_jobs_share_nothing(tmp_path: Path) -> None:
    class Other(Guess):
        """The same names and keys, of another job."""

    table(folder=tmp_path)
    runs.clear()
    table([Other(a.name, a.level, a.control) for a in ARMS], folder=tmp_path)
    assert runs == [arm.name for arm in ARMS]


def test_names_of_arms_stay_in_the_folder(tmp_path: Path) -> None:
    assert Cells(tmp_path).path("../a/b").parent == tmp_path
    assert Cells(tmp_path).path("simpool@4").name == "simpool@4.safetensors"


def test_what_does_not_fit_is_skipped_with_its_reason() -> None:
    class Unfit(Guess):
        def unfit(self) -> str | None:
            return "reads colours, and these are texts"

    c = table([*ARMS, Unfit("hue", 1.0)])
    assert c.skipped == {"hue": "reads colours, and these are texts"}
    with pytest.raises(InputError, match="mean: reads colours"):
        measure([Unfit("mean", 1.0)], "mean")


def test_wrong_arms_are_named() -> None:
    with pytest.raises(InputError, match="arms: expected different names, got mean more than once"):
        measure([ARMS[0], ARMS[0]], "mean")
    with pytest.raises(InputError, match="baseline: median is not among the arms mean"):
        measure(ARMS[:1], "median")
    with pytest.raises(InputError, match=r"mean: expected scores of \[seeds, 1 units, ...\], got \[2, 60\]"):
        judge(Comparison, measure(ARMS[:1], "mean"), Units(("one",)), Measure("m"), baseline="mean")


def test_a_key_that_is_no_json_is_told() -> None:
    class Odd(Guess):
        def key(self) -> Mapping[str, Any]:
            return {"of": {1, 2}}

    with pytest.raises(InputError, match=r"odd: its key\(\) cannot be written as JSON \(Object of type set"):
        engine.key_of(Odd("odd", 0.1))


@pytest.mark.parametrize(
    "found",
    [
        Cell("mean", {"seconds": 1.0}, {}),
        Cell("mean", {"seconds": 1.0}, {"scores": torch.zeros(3)}),
        Cell("mean", {}, {"scores": torch.zeros(2, len(UNITS))}),
        Cell("mean", {"seconds": None}, {"scores": torch.zeros(2, len(UNITS))}),
        Cell("better", {"seconds": 1.0}, {"scores": torch.zeros(2, len(UNITS))}),
        None,
    ],
)
def test_a_stored_cell_that_is_no_measurement_is_measured_again(found: Cell | None, tmp_path: Path) -> None:
    cells = Cells(tmp_path)
    if found is None:
        cells.path("mean").write_bytes(b"{" * 100)
    else:
        save_cell(cells.path("mean"), engine.key_of(ARMS[0]), found)
    assert table(folder=tmp_path)["mean"].metric == table()["mean"].metric
    assert runs.count("mean") == 2
    runs.clear()
    table(folder=tmp_path)
    assert runs == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"results": None}, "not iterable"),
        ({"metric_name": 3}, "metric_name: expected str, got 3"),
        ({"skipped": []}, r"skipped: expected dict, got \(\)"),
        ({"sentence": None}, "sentence: expected str, got None"),
        ({"bones": 1}, "unexpected keyword argument 'bones'"),
    ],
)
def test_a_comparison_that_is_none_is_not_read(change: dict[str, Any], told: str) -> None:
    text = table().to_json()
    with pytest.raises(TypeError, match=told):
        Comparison.from_json(json.dumps({**json.loads(text), **change}))
    changed = json.loads(text)
    changed["results"][0]["metric"] = "0.9"
    with pytest.raises(TypeError, match=r"metric: expected float, got .0\.9."):
        Comparison.from_json(json.dumps(changed))
    for other in ("[]", "null", "3"):
        with pytest.raises(TypeError, match="expected an object"):
            Comparison.from_json(other)


def test_processes_give_the_same() -> None:
    alone, together = table(workers=1), table(workers=2)
    assert [r.metric_per_seed for r in alone.results] == [r.metric_per_seed for r in together.results]


class Waits(Guess):
    """An arm that says half, and goes on when that has been heard."""

    def run(self, on_share: OnShare = unheard) -> Cell:
        on_share(self.name, 0.5)
        heard, deadline = Path(os.environ["HEARD"]), time.monotonic() + 60
        while not heard.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        return super().run(unheard)


def test_processes_tell_how_far_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "LOOK_SECONDS", 0.01)
    monkeypatch.setenv("HEARD", str(tmp_path / "heard"))
    told: dict[str, list[float]] = {}

    def on_share(name: str, share: float) -> None:
        told.setdefault(name, []).append(share)
        if name == "b" and share == 0.5:
            (tmp_path / "heard").touch()

    measure([Guess("mean", 0.5), Waits("a", 0.5), Waits("b", 0.6)], "mean", workers=2, on_share=on_share)
    assert told == {"mean": [0.5, 1.0], "a": [0.5, 1.0], "b": [0.5, 1.0]}


@pytest.mark.parametrize(("seconds", "asked"), [(0.9, []), (1.1, [2])])
def test_processes_are_started_where_there_is_enough_to_do(
    seconds: float, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gains(Guess):
        def run(self, on_share: OnShare = unheard) -> Cell:
            return super().run(on_share).with_record(seconds=seconds)

        def gains_by_processes(self) -> bool:
            return True

    started: list[int] = []

    def run_in_processes(arms: Sequence[Arm], workers: int, on_share: OnShare) -> Iterator[tuple[Arm, Cell]]:
        started.append(workers)
        return processes.run_in_turn(arms, on_share)

    monkeypatch.setattr(engine, "run_in_processes", run_in_processes)
    monkeypatch.setattr(engine, "processors", lambda: 4)
    arms = [Gains(name, 0.5) for name in ("mean", "a", "b")]
    assert measure(arms, "mean").complete
    # two others that take as long as the baseline did, against two seconds
    assert started == asked


SCRIPT = """
import torch
from cenote.compare import Arm, Cell, measure
from cenote.compare.arms import unheard

class Guess(Arm):
    def __init__(self, name, at):
        self.name, self.at = name, at

    def key(self):
        return {}

    def run(self, on_share=unheard):
        return Cell(self.name, {}, {"scores": torch.full((1, 3), float(self.at()))})

found = measure([Guess(n, lambda n=n: len(n)) for n in ("mean", "better", "best")], "mean", workers=2)
print({name: cell.scores.sum().item() for name, cell in found.cells.items()})
"""
"""Without `if __name__ == "__main__"`, and with functions that pickle does not take."""


def test_arms_of_a_plain_script_are_measured_in_processes(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, "-W", "error", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert ast.literal_eval(done.stdout) == {"mean": 12.0, "better": 18.0, "best": 12.0}


class Held(Guess):
    """An arm with something that cannot go to another process."""

    def __reduce__(self) -> Any:
        raise TypeError("cannot pickle 'lock' object")


class Lost(Guess):
    """An arm that cannot be made again from what was written."""

    def __reduce__(self) -> Any:
        return int, ("no number",)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (Held, "the arms cannot be pickled (TypeError: cannot pickle 'lock' object); let Arm.travelling() leave out"),
        (
            Lost,
            "processes cannot read the arms (ValueError: invalid literal for int() with base 10: 'no number'); let ",
        ),
    ],
)
def test_arms_that_cannot_travel_are_told_as_that_and_measured_here(kind: type[Guess], told: str) -> None:
    arms = [ARMS[0], *(kind(a.name, a.level) for a in ARMS[1:])]
    with pytest.warns(UserWarning, match=re.escape(f"measuring one at a time: {told}")):
        together = table(arms, workers=2)
    assert [r.metric_per_seed for r in table(arms, workers=1).results] == [r.metric_per_seed for r in together.results]


def test_a_job_has_its_own_words_and_fields() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Row(ArmResult):
        tokens: int

        @property
        def cost(self) -> float:
            return self.tokens

    @dataclass(frozen=True, kw_only=True)
    class Mine(Comparison[Row]):
        result_type: ClassVar[type[Any]] = Row

        @property
        def words(self) -> Words:
            return Words(percent=True, cost="tokens")

    c = judge(Mine, measure(ARMS, "mean"), UNITS, Measure("nDCG"), baseline="mean")
    assert c["better"].tokens == 7
    assert c.sentence.endswith("and costs 1.0 times the tokens.")
    assert Mine.from_json(c.to_json()) == c


@pytest.mark.parametrize("how", ["plain", "behind torch's own"])
def test_without_room_for_the_data_arms_are_measured_in_turn(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if how == "plain":
            raise error
        try:
            raise error
        except OSError:
            # as torch does where it closes the file
            raise RuntimeError("unexpected pos 576 vs 534")  # noqa: B904

    monkeypatch.setattr(torch, "save", full)
    told = r"measuring one at a time: there is no room for the data or for processes \(No space left on device\)"
    with pytest.warns(UserWarning, match=told):
        assert table(workers=2).complete


def test_without_a_temporary_folder_arms_are_measured_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr("tempfile.gettempdir", none)
    with pytest.warns(UserWarning, match="No usable temporary directory found"):
        assert table(workers=2).complete


def test_a_process_follows_the_first_one_and_takes_the_data_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []
    parents = iter([7, 7, 1])
    monkeypatch.setattr(processes, "LOOK_SECONDS", 0)
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    monkeypatch.setattr(os, "_exit", ended.append)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "arms.pt").touch()
    processes._follow(7, tmp_path / "data")
    assert ended == [1]
    assert list(tmp_path.iterdir()) == []
