import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from scipy.stats import wilcoxon
from tests.jobs.probe.conftest import make_dataset, make_ragged

import cenote
from cenote.compare import processes, verdict
from cenote.compare.cells import load_cell
from cenote.compare.statistics import holm
from cenote.core import InputError
from cenote.core.files import sealed
from cenote.features.dataset import TokenDataset
from cenote.jobs.probe import Comparison, Recipe, compare
from cenote.jobs.probe.arms import chosen_methods

QUICK = Recipe(learning_rates=(1e-2,), epochs=8)
METHODS = ["mean", "max", "simpool"]
ROWS = {*METHODS, "knn", "logistic-regression"}


def test_the_comparison_holds_what_it_says(toy: TokenDataset) -> None:
    c = compare(toy, METHODS, seeds=2, recipe=QUICK, references=False)
    assert {r.method for r in c.results} == set(METHODS)
    assert [r.metric for r in c.results] == sorted((r.metric for r in c.results), reverse=True)
    assert c.winner == c.results[0].method
    for r in c.results:
        assert r.interval[0] <= r.metric <= r.interval[1]
        assert r.metric == pytest.approx(np.mean(r.metric_per_seed))
        assert r.parameters > 0
        assert r.latency_ms > 0
        assert len(r.train_loss) == len(r.validation_curve) == 2
    assert {t.first for t in c.against_baseline} == {"max", "simpool"}
    assert {t.second for t in c.against_winner} == {c.winner}
    assert len(c.pairs) == 3
    assert c.complete
    assert c["mean"].parameters == 3 * 8 + 3
    assert c["mean"].multiply_adds == 3 * 8


def test_json_round_trip(toy: TokenDataset) -> None:
    c = compare(toy, METHODS, seeds=1, recipe=QUICK)
    assert Comparison.from_json(c.to_json()) == c


def test_tables_from_before_there_were_controls_still_load(toy: TokenDataset) -> None:
    c = compare(toy, METHODS, seeds=1, recipe=QUICK)
    stored = json.loads(c.to_json())
    for result in stored["results"]:
        del result["control"]
    assert Comparison.from_json(json.dumps(stored)) == c


def test_the_same_folder_resumes_and_gives_the_same(toy: TokenDataset, tmp_path: Path) -> None:
    first = compare(toy, ["mean", "max"], seeds=2, recipe=QUICK, out=tmp_path)
    stamps = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cells").iterdir()}
    second = compare(toy, METHODS, seeds=2, recipe=QUICK, out=tmp_path)
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cells").iterdir() if p.name in stamps} == stamps
    assert second["max"] == first["max"]
    assert Comparison.load(tmp_path) == second


@pytest.mark.parametrize("change", ["recipe", "seeds", "data"])
def test_a_cell_of_another_question_is_not_believed(change: str, toy: TokenDataset, tmp_path: Path) -> None:
    compare(toy, ["mean"], seeds=1, recipe=QUICK, out=tmp_path)
    before = (tmp_path / "cells" / "mean.safetensors").stat().st_mtime_ns
    data = make_dataset(seed=1) if change == "data" else toy
    recipe = dataclasses.replace(QUICK, epochs=3) if change == "recipe" else QUICK
    compare(data, ["mean"], seeds=2 if change == "seeds" else 1, recipe=recipe, out=tmp_path)
    assert (tmp_path / "cells" / "mean.safetensors").stat().st_mtime_ns != before


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "foreign"])
def test_a_damaged_cell_is_computed_again(damage: str, toy: TokenDataset, tmp_path: Path) -> None:
    first = compare(toy, ["mean"], seeds=1, recipe=QUICK, out=tmp_path)
    cell = tmp_path / "cells" / "mean.safetensors"
    raw = bytearray(cell.read_bytes())
    if damage == "flipped":
        raw[-3] ^= 0xFF
    cell.write_bytes(
        {"truncated": raw[: len(raw) // 2], "flipped": raw, "empty": b"", "foreign": b"PK\x03\x04 not"}[damage]
    )
    again = compare(toy, ["mean"], seeds=1, recipe=QUICK, out=tmp_path)
    assert again["mean"].metric_per_seed == first["mean"].metric_per_seed


def test_ctrl_c_keeps_what_is_done(toy: TokenDataset, tmp_path: Path) -> None:
    def interrupt(name: str, share: float) -> None:
        if name == "simpool":
            raise KeyboardInterrupt

    c = compare(toy, METHODS, seeds=1, recipe=QUICK, out=tmp_path, on_method=interrupt)
    assert not c.complete
    assert {r.method for r in c.results} == {"mean", "max"}
    assert not Comparison.load(tmp_path).complete
    assert compare(toy, METHODS, seeds=1, recipe=QUICK, out=tmp_path).complete


def test_ctrl_c_before_anything_is_done_goes_through(toy: TokenDataset) -> None:
    def interrupt(name: str, share: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(toy, METHODS, seeds=1, recipe=QUICK, on_method=interrupt)


KILLED = """
import sys
from tests.jobs.probe.conftest import make_dataset, make_ragged
from cenote.jobs.probe import Recipe, compare
compare(make_dataset(), ["mean", "max", "gem", "simpool"], seeds=1, out=sys.argv[1],
        recipe=Recipe(learning_rates=(1e-2,), epochs=30, patience=30))
"""


def test_a_killed_run_leaves_only_whole_cells(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    path = os.pathsep.join([str(root), str(root / "src")])
    run = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], cwd=root, env={**os.environ, "PYTHONPATH": path}
    )
    cells = tmp_path / "cells"
    deadline = time.monotonic() + 600
    while not list(cells.glob("*.safetensors")) and time.monotonic() < deadline and run.poll() is None:
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    left = list(cells.glob("*.safetensors"))
    assert left
    assert all(load_file(p) for p in left)
    assert not (tmp_path / "comparison.json").exists()
    recipe = Recipe(learning_rates=(1e-2,), epochs=30, patience=30)
    done = {p.name: p.stat().st_mtime_ns for p in left}
    compare(make_dataset(), ["mean", "max", "gem", "simpool"], seeds=1, out=tmp_path, recipe=recipe)
    assert {name: (cells / name).stat().st_mtime_ns for name in done} == done


@pytest.mark.slow("50 probes with workers are killed")
@pytest.mark.timeout(7200)
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
def test_probes_that_are_killed_leave_nothing_behind(tmp_path: Path) -> None:
    program, room = Path(__file__).with_name("killed.py"), tmp_path / "room"
    room.mkdir()
    kills = 50
    done = subprocess.run(
        [sys.executable, program, tmp_path / "killed", str(kills), "0"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(room)},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == kills
    assert {f["signal"] for f in found} == {"SIGKILL", "SIGTERM"}
    assert any(0 < f["cells"] < len(ROWS) for f in found)
    assert [f["living"] for f in found if f["living"]] == []
    # a folder that was there before any worker was is removed at the next start
    assert all(f["left"] == [] or f["signal"] == "SIGKILL" for f in found)
    assert list(room.iterdir()) == []
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    one, other = Comparison.load(killed), Comparison.load(undisturbed)
    timed: dict[str, Any] = {"latency_ms": None, "seconds": 0.0}
    assert {r.method: dataclasses.replace(r, **timed) for r in one.results} == {
        r.method: dataclasses.replace(r, **timed) for r in other.results
    }
    assert one.pairs == other.pairs
    names = [sorted(str(f.relative_to(folder)) for f in folder.rglob("*")) for folder in (killed, undisturbed)]
    assert names[0] == names[1]


def test_processes_give_the_same(tmp_path: Path) -> None:
    data = make_ragged()
    alone = compare(data, METHODS, seeds=2, recipe=QUICK, workers=1)
    together = compare(data, METHODS, seeds=2, recipe=QUICK, workers=2, out=tmp_path)
    assert {r.method for r in together.results} == ROWS
    for r in alone.results:
        other = together[r.method]
        assert other.metric_per_seed == r.metric_per_seed
        assert other.train_loss == r.train_loss
        assert r.reference or other.latency_ms > 0
    again = compare(data, METHODS, seeds=2, recipe=QUICK, workers=2, out=tmp_path)
    assert again.results == together.results


def test_ctrl_c_in_processes_keeps_what_is_done(toy: TokenDataset, tmp_path: Path) -> None:
    finished: list[str] = []

    def interrupt(name: str, share: float) -> None:
        finished.extend([name] if share >= 1 else [])
        if len(finished) == 2:
            raise KeyboardInterrupt

    c = compare(toy, METHODS, seeds=1, recipe=QUICK, out=tmp_path, workers=2, on_method=interrupt)
    assert not c.complete
    assert {r.method for r in c.results} == set(finished)
    assert compare(toy, METHODS, seeds=1, recipe=QUICK, out=tmp_path).complete


def test_threads_of_one_process_give_the_same_and_leave_the_generator_as_it_was() -> None:
    before, threads = torch.get_rng_state(), torch.get_num_threads()

    def run(_: int) -> list[tuple[float, ...]]:
        return [r.metric_per_seed for r in compare(make_dataset(), ["max", "simpool"], seeds=1, recipe=QUICK).results]

    alone = run(0)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, range(2))) == [alone, alone]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_a_saved_probe_leaves_the_generator_as_it_was(toy: TokenDataset, tmp_path: Path) -> None:
    compare(toy, ["simpool"], seeds=1, recipe=QUICK, out=tmp_path)
    before = torch.get_rng_state()
    cenote.load(tmp_path / "best")
    assert torch.equal(torch.get_rng_state(), before)


def test_two_do_not_write_to_one_folder(toy: TokenDataset, tmp_path: Path) -> None:
    def second(name: str, share: float) -> None:
        with pytest.raises(InputError, match="out: another comparison is writing to"):
            compare(toy, ["mean"], seeds=1, recipe=QUICK, out=tmp_path)

    compare(toy, ["mean"], seeds=1, recipe=QUICK, out=tmp_path, on_method=second)


def test_what_a_dead_process_left_is_trained_here(toy: TokenDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_run", lambda _number: os._exit(1))
    with pytest.warns(UserWarning, match="a process died"):
        c = compare(toy, METHODS, seeds=1, recipe=QUICK, workers=2)
    assert {r.method for r in c.results} == ROWS


def test_a_missing_cell_is_none(tmp_path: Path) -> None:
    assert load_cell(tmp_path / "no.safetensors", "key") is None


def test_skipped_methods_say_why(ragged: TokenDataset) -> None:
    c = compare(ragged, ["cls"], seeds=1, recipe=QUICK)
    assert c.skipped == {"cls": "reads [CLS], and these data have no prefix tokens"}
    assert [r.method for r in c.results if not r.reference] == ["mean"]
    assert c.sentence.startswith("Only mean was run")


def test_signed_ranks_judge_the_same_cells_anew(toy: TokenDataset, tmp_path: Path) -> None:
    first = compare(toy, METHODS, seeds=2, recipe=QUICK, references=False, out=tmp_path)
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "cells").iterdir()}
    second = compare(toy, METHODS, seeds=2, recipe=QUICK, references=False, out=tmp_path, significance="wilcoxon")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cells").iterdir()} == stamps
    assert first.results == second.results
    assert [c.provenance["significance"] for c in (first, second)] == ["permutation", "wilcoxon"]
    assert Comparison.load(tmp_path).provenance["significance"] == "wilcoxon"
    test, y = toy.indices("test"), toy.y[toy.indices("test")]
    right = {}
    for name in METHODS:
        with safe_open(tmp_path / "cells" / f"{name}.safetensors", "pt") as cell:
            right[name] = (cell.get_tensor("scores").argmax(-1) == y).sum(0).numpy()
    assert len(right["mean"]) == len(test)
    for t in second.pairs:
        d = right[t.first] - right[t.second]
        expected = wilcoxon(d[d != 0]).pvalue if d.any() else 1.0
        assert t.p_value == pytest.approx(expected)
    assert [t.interval for t in second.pairs] == [t.interval for t in first.pairs]
    least = min(t.p_adjusted for t in second.against_baseline)
    adjusted = [max(p, least) for p in holm([t.p_value for t in second.pairs])]
    assert adjusted == [t.p_adjusted for t in second.pairs]


def test_signed_ranks_are_those_of_whole_groups(toy: TokenDataset) -> None:
    four = dataclasses.replace(toy, groups=tuple(f"g{i // 3 % 4}" for i in range(len(toy))))
    c = compare(four, ["max"], seeds=1, recipe=QUICK, significance="wilcoxon")
    assert c.pairs[0].p_value >= 2 / 2**4, "four signs have no rarer pattern"


@pytest.mark.parametrize(
    ("wanted", "metric", "message"),
    [
        ("t-test", "accuracy", "significance: expected permutation or wilcoxon, got 't-test'"),
        (
            "wilcoxon",
            None,
            "AUROC ranks items against each other; use permutation, or metric 'accuracy', or metric 'balanced",
        ),
    ],
)
def test_a_test_that_does_not_fit_is_named(wanted: Any, metric: str | None, message: str, ragged: TokenDataset) -> None:
    with pytest.raises(InputError, match=message):
        compare(ragged, ["mean"], metric=metric, significance=wanted)


def test_signed_ranks_do_not_fit_average_precision(ragged: TokenDataset) -> None:
    labels = torch.stack([ragged.y, 1 - ragged.y], -1).to(torch.get_default_dtype())
    with pytest.raises(InputError, match=r"mean average precision ranks items against each other; use permutation$"):
        compare(dataclasses.replace(ragged, y=labels, task="multilabel"), ["mean"], significance="wilcoxon")


def test_groups_widen_the_interval(toy: TokenDataset) -> None:
    grouped = dataclasses.replace(toy, groups=tuple(f"g{i % 2}" for i in range(len(toy))))
    alone, together = (compare(d, ["mean"], seeds=1, recipe=QUICK)["mean"] for d in (toy, grouped))
    assert alone.metric == together.metric
    assert alone.interval != together.interval


@pytest.mark.parametrize(
    ("wanted", "message"),
    [("nonsense", "no method is called 'nonsense'"), ("mean,,max", "no name"), ("maen", "did you mean mean")],
)
def test_wrong_methods_are_named(wanted: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        chosen_methods(wanted)


def test_mean_is_always_among_the_methods() -> None:
    assert chosen_methods("max") == ("mean", "max")
    # a class that one name builds stands for it, once
    assert chosen_methods("SimPool,simpool") == ("mean", "simpool")
    assert set(chosen_methods("fast")) < set(chosen_methods("all"))


def test_wrong_input_is_named_before_training(toy: TokenDataset, tmp_path: Path) -> None:
    no_test = toy.with_split([0] * 45 + [1] * 45)
    with pytest.raises(InputError, match="no item is in the test split"):
        compare(no_test, ["mean"])
    with pytest.raises(InputError, match="seeds"):
        compare(toy, ["mean"], seeds=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        compare(toy, ["mean"], out=tmp_path / "file")


def test_looks_are_written_for_the_report(toy: TokenDataset, tmp_path: Path) -> None:
    labelled = dataclasses.replace(toy, token_labels=(toy.x[:, :, 0] > 0.5).long())
    c = compare(labelled, METHODS, seeds=1, recipe=QUICK, out=tmp_path)
    shown = json.loads((tmp_path / "attention.json").read_text())
    assert {i["label"] for i in shown["items"]} == {"a", "b", "c"}
    weights = load_file(tmp_path / "attention.safetensors")
    assert weights["simpool/0"].shape == (1, 6)
    assert set(c.localisation) == {"mean", "max", "simpool"}
    assert c.localisation["mean"] == 0.5


def test_labels_of_prefix_tokens_are_left_out(toy: TokenDataset, tmp_path: Path) -> None:
    labels = (toy.x[:, :, 0] > 0.5).long()
    plain = dataclasses.replace(toy, token_labels=labels)
    prefix, marked = torch.randn(len(toy), 2, toy.dim), torch.ones(len(toy), 2, dtype=torch.int64)
    longer = dataclasses.replace(
        toy, x=torch.cat([prefix, toy.x], 1), prefix_tokens=2, token_labels=torch.cat([marked, labels], 1)
    )
    found = [compare(d, METHODS, seeds=1, recipe=QUICK, out=tmp_path / d.name).localisation for d in (plain, longer)]
    assert found[0].keys() == found[1].keys()
    assert found[0]["simpool"] == pytest.approx(found[1]["simpool"], abs=1e-6)


def test_the_best_probe_comes_back(toy: TokenDataset, tmp_path: Path) -> None:
    c = compare(toy, METHODS, seeds=2, recipe=QUICK, out=tmp_path)
    saved = cenote.load(tmp_path / "best")
    assert saved.method == c.winner
    test = toy.indices("test")
    right = (saved.scores(toy.x[test]).argmax(1) == toy.y[test]).double().mean()
    assert float(right) in [pytest.approx(v) for v in c[c.winner].metric_per_seed]
    assert saved.word(torch.tensor([0.1, 0.8, 0.1])) == "b"


@pytest.mark.parametrize("same", [True, False])
def test_the_recommended_probe_lies_beside_the_best_one(
    same: bool, toy: TokenDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdict, "recommended", lambda c: c.winner if same else _another(c))
    c = compare(toy, ["mean", "max"], seeds=2, recipe=QUICK, out=tmp_path)
    saved = cenote.load(tmp_path / "recommended")
    assert saved.method == c.recommended
    assert (tmp_path / "recommended" / "probe.safetensors").exists() != same
    monkeypatch.chdir(tmp_path / "recommended")
    assert cenote.load(".").method == c.recommended
    test = toy.indices("test")
    right = (saved.scores(toy.x[test]).argmax(1) == toy.y[test]).double().mean()
    assert float(right) in [pytest.approx(v) for v in c[c.recommended].metric_per_seed]


def _another(c: Comparison) -> str:
    return next(r.method for r in c.results if r.method != c.winner and not r.reference)


def test_a_recommended_probe_that_is_the_best_one_takes_no_room(
    toy: TokenDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdict, "recommended", _another)
    compare(toy, ["mean", "max"], seeds=1, recipe=QUICK, out=tmp_path)
    monkeypatch.setattr(verdict, "recommended", lambda c: c.winner)
    c = compare(toy, ["mean", "max"], seeds=1, recipe=QUICK, out=tmp_path)
    assert [p.name for p in (tmp_path / "recommended").iterdir()] == ["probe.json"]
    assert cenote.load(tmp_path / "recommended").method == c.winner


def test_wrong_saved_probes_are_named(tmp_path: Path, toy: TokenDataset) -> None:
    with pytest.raises(InputError, match=r"holds no saved probe \(probe.json is missing\)"):
        cenote.load(tmp_path)
    compare(toy, ["mean"], seeds=1, recipe=QUICK, out=tmp_path)
    best = tmp_path / "best"
    card = json.loads((best / "probe.json").read_text("utf-8"))
    changes: list[tuple[dict[str, object], str]] = [
        ({"dim": None}, "dim: expected int, got None"),
        ({"dim": "8"}, "dim: expected int, got '8'"),
        ({"dim": toy.dim + 1}, "does not fit probe.json"),
        ({"outputs": -1}, "names 3 classes, expected -1"),
        ({"classes": "abc"}, "classes: expected list, got 'abc'"),
        ({"classes": ["a"]}, "names 1 classes, expected 3"),
        ({"arguments": []}, r"arguments: expected dict, got \[\]"),
        ({"arguments": {"name": 1}}, "mean: got an unexpected keyword argument 'name'"),
        ({"task": "ranking"}, "task: expected 'binary', 'multiclass', 'multilabel' or 'regression', got 'ranking'"),
        ({"method": "meen"}, "no method is called 'meen'; did you mean"),
        ({"format": 2}, "was saved in format 2; this cenote reads 1"),
        ({"layers": None}, "layers: expected list, got None"),
    ]
    for change, told in changes:
        (best / "probe.json").write_text(json.dumps(sealed({**card, **change})), "utf-8")
        with pytest.raises(InputError, match=told) as caught:
            cenote.load(best)
        assert "\n" not in str(caught.value)
    for text in (
        "",
        "[]",
        "null",
        json.dumps(sealed({})),
        json.dumps(sealed({k: v for k, v in card.items() if k != "task"})),
    ):
        (best / "probe.json").write_text(text, "utf-8")
        with pytest.raises(InputError, match=r"probe\.json: is damaged .*; run cenote probe again"):
            cenote.load(best)
    (best / "probe.json").write_text(json.dumps(sealed({k: v for k, v in card.items() if k != "layers"})), "utf-8")
    assert cenote.load(best).layers == ()
    (best / "probe.safetensors").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"probe\.safetensors: is damaged .*; run cenote probe again"):
        cenote.load(best)


def test_the_sentence_says_who_wins_and_by_how_much(toy: TokenDataset) -> None:
    c = compare(toy, METHODS, seeds=1, recipe=QUICK)
    won = dataclasses.replace(
        c,
        # what a clock said decides what to use
        results=tuple(dataclasses.replace(r, latency_ms=0.5 if r.method == "mean" else 1.0) for r in c.results),
        winner="max",
        recommended="max",
        metric_name="accuracy",
        against_baseline=tuple(
            dataclasses.replace(t, difference=0.061, interval=(0.042, 0.08), p_adjusted=0.001)
            for t in c.against_baseline
        ),
        against_winner=(dataclasses.replace(c.pairs[0], first="simpool", second="max", p_adjusted=0.6),),
    )
    text = verdict.sentence(won)
    assert text == (
        "max beats mean by 6.1 points (4.2 to 8.0) and costs 2.0 times the time; simpool is not distinguishable from it."
    )
    advised = verdict.sentence(dataclasses.replace(won, recommended="mean"))
    assert advised == f"{text} Use mean: it cannot be told from max, and takes 0.5 times the time."
    unsure = dataclasses.replace(
        won, against_baseline=tuple(dataclasses.replace(t, p_adjusted=0.3) for t in won.against_baseline)
    )
    assert "not significant (p = 0.3 after Holm's correction)" in verdict.sentence(unsure)
