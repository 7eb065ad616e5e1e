from pathlib import Path

import pytest
from tests.jobs.extract.conftest import Photos, photos, vit

from cenote.core import InputError
from cenote.features import Labelling, read
from cenote.features.raw import RawItems, open_raw
from cenote.jobs.extract import Extracted, ModelSpec, Options
from cenote.jobs.probe import Recipe
from cenote.jobs.probe.raw import compare_raw, tokens_of_raw

__all__ = ["photos", "vit"]


@pytest.fixture
def items(photos: Photos) -> RawItems:
    """30 images of two classes."""
    return open_raw(photos(30))


def test_one_call_compares_on_the_tokens_of_raw_files_and_resumes(
    items: RawItems, vit: ModelSpec, tmp_path: Path
) -> None:
    done: list[float] = []
    for _ in range(2):
        found = compare_raw(
            items, vit, "max", out=tmp_path / "out", name="pets", seeds=1, recipe=Recipe(epochs=2),
            on_progress=lambda now: done.append(now.done),
        )  # fmt: skip
        assert {r.method for r in found.results} == {"mean", "max"}
        assert found.dataset["name"] == "pets"
        assert done == [30]
    assert (tmp_path / "out" / "comparison.json").is_file()
    assert len(read(tmp_path / "out" / "features")) == 30


def test_chosen_layers_keep_all_in_the_store(items: RawItems, vit: ModelSpec, tmp_path: Path) -> None:
    told: list[Extracted] = []
    data = tokens_of_raw(items, vit, tmp_path / "features", layers="1,3", on_extracted=told.append)
    assert (data.name, data.layers) == ("features", (0, 1, 2, 3))
    assert told[0].manifest.layers == (0, 1, 2, 3)


def test_the_labelling_decides_the_split(items: RawItems, vit: ModelSpec, tmp_path: Path) -> None:
    options = Options(batch=16)
    even = tokens_of_raw(items, vit, tmp_path / "a", Labelling(fractions=(0.4, 0.2, 0.4)), options=options)
    assert even.split.bincount().tolist() == [12, 6, 12]
    again = tokens_of_raw(items, vit, tmp_path / "a", Labelling(seed=1), options=options)
    assert not again.split.equal(tokens_of_raw(items, vit, tmp_path / "a", options=options).split)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": "simpol"}, "did you mean simpool"),
        ({"metric": "smell"}, "metric: 'smell' does not fit a binary task"),
        ({"significance": "none"}, "significance: expected permutation or wilcoxon"),
        ({"layers": "9"}, "layers: there is no layer 9"),
        ({"labelling": Labelling(label="smell")}, "label_column: "),
        ({"labelling": Labelling(task="regression")}, "a regression target is a finite number"),
    ],
)
def test_what_cannot_be_compared_is_told_before_the_model_runs(
    items: RawItems, vit: ModelSpec, tmp_path: Path, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        compare_raw(items, vit, out=tmp_path / "out", **arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
