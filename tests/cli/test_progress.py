import io

from rich.console import Console

from cenote.cli.leaderboard import leaderboard
from cenote.cli.progress import arms_bar, items_bar


def test_bars_are_drawn_where_somebody_looks_and_nowhere_else() -> None:
    for is_terminal in (True, False):
        text = io.StringIO()
        console = Console(file=text, force_terminal=is_terminal, width=100)
        with arms_bar(console, 2) as on_arm:
            on_arm("mean", 1.0)
            on_arm("abmil", 0.5)
        with items_bar(console, 20) as on_items:
            on_items("extracting", 7, "7 of 20")
        for words in ("abmil", "1 of 2", "extracting", "7 of 20"):
            assert (words in text.getvalue()) == is_terminal


def test_columns_are_spared_in_their_order() -> None:
    columns = {"arm": ["a"], "score": ["0.5"], "cost": ["1,000,000"], "time": ["1.5"]}
    for width, expected in ((120, "arm score cost time"), (30, "arm score cost"), (18, "arm score"), (1, "arm score")):
        table = leaderboard(columns, width, title="t", caption="c", luxuries=["time"], spared=["cost"])
        assert " ".join(str(c.header) for c in table.columns) == expected
    assert [c.justify for c in table.columns] == ["left", "right"]
