"""The ruling on toys whose outcome is known, named the doubling of numbers.

Refuted if doubling gives no more.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest

from cenote import InputError
from cenote.study import Arms, Check, Findings, Gate, Part, Size, Verdict, above, gate, study
from cenote.study.harness import HOLDS, REFUTED, UNREGISTERED, UNTRAINED, WITHOUT, registry, seeds_of
from cenote.study.harness.pages import gates, knock_outs, page, registered, scoreboard
from cenote.study.harness.rules import last_fifth
from cenote.study.harness.verdict import BY_OLD_RULE, seeds_by_size

SLUG = "test-rules"
LEVEL = 0.2
FALLING = [1.0 - 0.01 * n for n in range(100)]
STOPPED = [1.0] * 20 + [0.1] * 80


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(registry, "FOLDER", tmp_path)
    return tmp_path


def _study(
    method: float = 0.9,
    without: float = 0.5,
    rival: float = 0.5,
    losses: Sequence[float] = STOPPED,
    expected: float = 0.1,
    count: int = 5,
    gated: Sequence[str] = ("method", "without", "rival"),
):
    def run(seed: int, size: Size) -> Findings:
        seeds = seeds_of(seed, size, small=count)
        named = {"method": method, "without": without, "rival": rival}
        arms = Arms({arm: tuple(value + 0.001 * (s - seed) for s in seeds) for arm, value in named.items()})

        def rule(arm: str) -> tuple[Check, ...]:
            return (above(f"{arm} minus rival", arms.minus(arm, "rival"), expected),)

        return Findings(
            seeds=seeds,
            parts=(Part(rule, "method", knocked_out=("without",), against=("rival",)),),
            gates=tuple(gate(arm, above("accuracy", arms[arm], LEVEL), losses) for arm in gated),
            checks=(above("method", arms["method"], 0.0, in_rule=False),),
            table=arms.table("accuracy"),
            figure=lambda figure: figure.subplots(),
        )

    run.__module__ = __name__
    return study(run)


def _register(reason: str = "first", seen: Sequence[str] = (), **settings: float) -> Path:
    import sys

    v = _study(**settings)(0, "smoke")  # type: ignore[arg-type]
    module = sys.modules[__name__]
    now = registry.entry_of(module, v.claim, v.rule, seeds_by_size(module), v.checks, v.knocked_out, v.gates)
    return registry.add(SLUG, now, "2026-01-02", reason, seen)


def test_a_rule_that_its_knock_out_breaks_holds() -> None:
    _register()
    verdict = _study()(0, "small")
    assert (verdict.holds, verdict.said) == (HOLDS, HOLDS)
    assert [(k.arm, k.holds) for k in verdict.knocked_out] == [("without", REFUTED)]
    assert [c.what for c in verdict.knocked_out[0].checks] == ["without minus rival"]
    # the part comes before what is reported only, and gives the effect
    assert [c.what for c in verdict.checks] == ["method minus rival", "method"]
    assert verdict.effect == pytest.approx(0.4)


def test_a_rule_that_holds_without_its_mechanism_decides_nothing() -> None:
    _register()
    verdict = _study(without=0.85)(0, "small")
    assert verdict.holds == WITHOUT
    assert verdict.said == f"{WITHOUT} (without)"
    # a rule that the method breaks is refuted, whatever the knock-out does
    assert _study(method=0.5, without=0.85)(0, "small").holds == REFUTED


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"rival": 0.1}, "rival"), ({"losses": FALLING}, "method; without; rival"), ({"method": 0.1}, "method")],
)
def test_an_arm_that_was_not_trained_decides_nothing(settings: dict[str, object], named: str) -> None:
    """Not even against the method, whose own training may have been too short."""
    _register()
    verdict = _study(**settings)(0, "small")  # type: ignore[arg-type]
    assert verdict.holds == UNTRAINED
    assert verdict.said == f"{UNTRAINED} ({named})"
    assert gates(verdict) == f"not trained: {named.replace(';', ',')}"


def test_a_changed_rule_is_refused_until_it_is_registered() -> None:
    assert _study()(0, "small").unregistered == ("no entry",)
    _register()
    changed = _study(expected=0.05)(0, "small")
    assert (changed.holds, changed.unregistered) == (UNREGISTERED, ("bounds",))
    assert changed.said == "not registered (bounds)"
    more = _study(count=6)(0, "small")
    assert (more.holds, more.unregistered) == (UNREGISTERED, ("6 seeds",))
    with pytest.raises(InputError, match="reason: say why"):
        _register(" ", expected=0.05)
    seen = registry.seen_in(_study()(0, "small").holds, _study()(0, "small").checks)
    _register("half as much is enough", seen, expected=0.05)
    assert _study(expected=0.05)(0, "small").holds == HOLDS
    first, second = registry.history(SLUG)
    assert first.bounds == ("method minus rival: above 0.1; refuted at or below 0.1",)
    assert second.bounds == ("method minus rival: above 0.05; refuted at or below 0.05",)
    assert second.seen == ("holds", "method minus rival: 0.4 (0.4 to 0.4): holds")
    assert registered(SLUG) == "of 2026-01-02, changed once"
    with pytest.raises(InputError, match="nothing to add"):
        _register("again", expected=0.05)


def test_sizes_are_part_of_what_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    _register()
    assert registry.history(SLUG)[0].settings["LEVEL"] == LEVEL
    monkeypatch.setitem(globals(), "LEVEL", 0.3)
    assert _study()(0, "small").unregistered == ("gates", "LEVEL")


def test_a_smoke_run_needs_no_entry() -> None:
    assert _study()(0, "smoke").unregistered == ()


def test_a_study_that_cannot_fail_is_an_error() -> None:
    with pytest.raises(InputError, match="the rule compares 'rival', which has no gate"):
        _study(gated=("method", "without"))(0, "smoke")

    def run(seed: int, size: Size) -> Findings:
        found = Arms(method=(1.0, 1.1))
        parts = (Part(lambda arm: (above(arm, found[arm], 0.0),), "method", knocked_out=()),)
        return Findings((0, 1), (), [], lambda figure: None, parts=parts)

    run.__module__ = __name__
    with pytest.raises(InputError, match="a rule needs a knock-out"):
        study(run)(0, "smoke")


def test_only_a_knock_out_may_lie_at_the_trivial_level() -> None:
    from cenote.study.harness.rules import require_able_to_fail

    part = Part(lambda arm: (), "method", knocked_out=("without",))
    level = above("accuracy", [0.9, 0.91], LEVEL)
    require_able_to_fail([part], [gate("method", level, None), gate("without", None, STOPPED)])
    with pytest.raises(InputError, match="'method' is no knock-out"):
        require_able_to_fail([part], [gate("method", None, None), gate("without", None, STOPPED)])


def test_parts_are_broken_each_by_its_own_knock_outs() -> None:
    """A knock-out of one part says nothing of the other."""
    arms = Arms(a=(0.9, 0.91), b=(0.8, 0.81), a0=(0.1, 0.11), b0=(0.7, 0.71))

    def run(seed: int, size: Size) -> Findings:
        def high(arm: str) -> tuple[Check, ...]:
            return (above(arm, arms[arm], 0.5),)

        return Findings(
            seeds=(0, 1, 2, 3, 4),
            parts=(Part(high, "a", knocked_out=("a0",)), Part(high, "b", knocked_out=("b0",))),
            gates=tuple(gate(arm, None if arm == "a0" else above("n", arms[arm], LEVEL), None) for arm in arms),
            checks=(),
            table=[],
            figure=lambda figure: None,
        )

    run.__module__ = __name__
    verdict = study(run)(0, "smoke")
    assert knock_outs(verdict).startswith("a0: ")
    assert [[c.what for c in k.checks] for k in verdict.knocked_out] == [["a0"], ["b0"]]


def test_the_last_fifth_is_a_share_of_the_gain() -> None:
    assert last_fifth(STOPPED) == 0.0
    assert last_fifth(FALLING) == pytest.approx(0.2 / 0.93, abs=0.01)
    # one row per seed: their mean
    assert last_fifth([STOPPED, FALLING]) == pytest.approx(0.1 / (0.9 / 2 + 0.93 / 2), abs=0.02)
    # a loss that never fell has nothing to stop, and one that rises is not improving
    assert last_fifth([1.0, 0.99, 0.98, 0.97]) == last_fifth(FALLING[::-1]) == 0.0
    assert last_fifth([3.0, 1.0]) == 1.0
    with pytest.raises(InputError, match="losses: expected finite"):
        last_fifth([])


def test_what_was_measured_survives_json_and_is_shown(folder: Path) -> None:
    _register()
    _register("half as much is enough", ["does not hold", "method minus rival: 0.008"], expected=0.05)
    verdict = dataclasses.replace(_study(expected=0.05, without=0.85)(0, "small"), slug="simpool")
    back = Verdict.from_json(verdict.to_json())
    assert (back.knocked_out, back.gates, back.holds) == (verdict.knocked_out, verdict.gates, verdict.holds)
    assert isinstance(back.gates[0], Gate)
    (folder / f"{SLUG}.toml").rename(folder / "simpool.toml")
    text = page(back)
    for shown in (
        f"**Verdict: {WITHOUT} (without).**",
        "**Knock-outs: without: holds.** **Gate: passed.** **Rule: of 2026-01-02, changed once.**",
        "| without | without minus rival | 0.35 (0.35 to 0.35) | above 0.05; refuted at or below 0.05 | holds |",
        "**2026-01-02.** half as much is enough",
        "- known then: method minus rival: 0.008",
        "- bound: method minus rival: above 0.05; refuted at or below 0.05",
        "- bound dropped: method minus rival: above 0.1; refuted at or below 0.1",
    ):
        assert shown in text, shown
    board = scoreboard({"simpool": back}, "studies")
    assert "| without: holds | passed | of 2026-01-02, changed once |" in board
    assert "1 hold without the mechanism of the claim too" in board


def test_an_old_result_holds_by_its_old_rule() -> None:
    _register()
    old = dataclasses.replace(_study()(0, "small"), slug="simpool", knocked_out=(), gates=())
    assert "knocked_out" not in old.to_json()
    back = Verdict.from_json(old.to_json())
    assert (back.holds, back.said, knock_outs(back), gates(back)) == (HOLDS, BY_OLD_RULE, "none", "none")
    board = scoreboard({"simpool": back}, "studies")
    assert "Of 1 studies, 0 hold," in board
    assert "1 more hold by an old rule, not yet tried with a knock-out." in board


def test_a_broken_lock_file_is_named(folder: Path) -> None:
    (folder / f"{SLUG}.toml").write_text("[[entry]]\ndate = 1\nbound = []\n")
    with pytest.raises(InputError, match=r"test-rules\.toml: is not a list of entries"):
        registry.history(SLUG)


def test_the_constants_of_an_earlier_study_are_read_from_its_text() -> None:
    from scripts.register_study import constants

    text = 'LAYERS, WIDTH = 6, 24\nFRAMES: int = 2 * LAYERS\nPOOLS = {"mean": partial(MeanPool, WIDTH)}\nARM = "mean"\n'
    assert constants(text) == {"LAYERS": 6, "WIDTH": 24, "FRAMES": 12}


def test_every_registered_entry_is_read_as_it_was_written(folder: Path) -> None:
    slugs = [file.stem for file in sorted((Path(registry.__file__).parents[1] / "registered").glob("*.toml"))]
    entries = [entry for slug in slugs for entry in _entries(slug)]
    assert len(entries) >= len(slugs) > 30
    (folder / "all.toml").write_text("\n".join(map(registry.to_toml, entries)), "utf-8")
    assert registry.history("all") == tuple(entries)


def _entries(slug: str) -> tuple[registry.Entry, ...]:
    """As they stand in the package, whatever folder the test has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "FOLDER", Path(registry.__file__).parents[1] / "registered")
        return registry.history(slug)
