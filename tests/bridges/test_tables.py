from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas
import pytest
from sklearn.base import clone

from cenote.bridges.tables import AutoIntClassifier
from cenote.core import InputError

QUICK = {"dim": 4, "blocks": (8,), "epochs": 12, "batch_size": 32, "learning_rate": 0.02}


def crossed(rows: int = 200) -> tuple[pandas.DataFrame, np.ndarray]:
    """Whether a number is high matters the other way round for one colour; a third column does not matter."""
    rng = np.random.default_rng(0)
    frame = pandas.DataFrame(
        {
            "colour": rng.choice(["red", "blue"], rows),
            "size": rng.normal(size=rows),
            "noise": rng.choice(list("abc"), rows),
        }
    )
    return frame, ((frame["colour"] == "red") ^ (frame["size"] > 0)).to_numpy()


def test_a_cross_of_a_number_and_a_category_is_learned_and_saved(tmp_path: Path) -> None:
    frame, y = crossed()
    model = AutoIntClassifier(**QUICK).fit(frame, y)
    assert model.score(frame, y) > 0.9
    assert list(model.feature_names_in_) == ["colour", "size", "noise"]
    assert model.classes_.tolist() == [False, True]
    map_ = model.interactions(frame)
    assert map_.shape == (3, 3)
    assert np.allclose(map_.sum(1), 1, atol=1e-6)
    assert model.explain(frame[:2]).shape == (2, 1, 3, 3)
    model.save(tmp_path / "m")
    again = AutoIntClassifier.load(tmp_path / "m")
    assert np.array_equal(again.predict_proba(frame), model.predict_proba(frame))
    assert again.predict(frame[:3]).dtype == bool
    assert AutoIntClassifier(**QUICK).fit(frame, y).predict_proba(frame) == pytest.approx(model.predict_proba(frame))


def test_columns_may_change_places_and_hold_what_was_never_seen() -> None:
    frame, y = crossed()
    frame.loc[:5, "colour"] = None
    model = AutoIntClassifier(**{**QUICK, "epochs": 1}).fit(frame, y)
    turned = frame[["noise", "size", "colour"]].assign(beside=1)
    assert np.array_equal(model.predict_proba(turned), model.predict_proba(frame))
    unseen = pandas.DataFrame({"colour": ["green", None], "size": [np.nan, np.nan], "noise": ["zzz", pandas.NA]})
    first, second = model.predict_proba(unseen)
    assert np.isfinite(first).all()
    assert np.array_equal(first, second)


def test_several_classes() -> None:
    x = np.random.default_rng(0).normal(size=(150, 2)).astype("float32")
    y = np.array(["low", "middle", "high"])[(x[:, 0] > -0.4).astype(int) + (x[:, 0] > 0.4)]
    model = clone(AutoIntClassifier(**QUICK)).fit(x, y)
    assert model.predict_proba(x).sum(1) == pytest.approx(1.0)
    assert model.score(x, y) > 0.8


def test_targets_that_cannot_be_learned_are_refused() -> None:
    frame, y = crossed(20)
    model = AutoIntClassifier(**QUICK)
    with pytest.raises(InputError, match="y: is True in every row; a classifier needs two classes"):
        model.fit(frame, np.ones(20, dtype=bool))
    with pytest.raises(InputError, match="y: has 19 targets for 20 rows"):
        model.fit(frame, y[:19])
    with pytest.raises(InputError, match="y: holds fractions"):
        model.fit(frame, np.linspace(0, 1, 20))
    with pytest.raises(InputError, match="y: is missing"):
        model.fit(frame, [None, *y[1:]])
    with pytest.raises(InputError, match="y: is missing"):
        model.fit(frame, pandas.array([None, *[0, 1] * 9, 1], dtype="Int64"))
    with pytest.raises(InputError, match="categorical: expected names"):
        AutoIntClassifier(categorical="colour").fit(frame, y)
    with pytest.raises(InputError, match="y: is missing or infinite"):
        model.fit(frame, np.array([np.nan, *y[1:].astype(float)]))
    with pytest.raises(InputError, match="expected \\[rows\\] labels"):
        model.fit(frame, y[:, None])
    with pytest.raises(InputError, match="validation_fraction"):
        AutoIntClassifier(validation_fraction=1.0).fit(frame, y)


def test_few_rows_leave_none_to_hold_out() -> None:
    model = AutoIntClassifier(**{**QUICK, "epochs": 1, "blocks": ()}).fit({"a": [1, 2, 3]}, [0, 1, 1])
    assert model.validation_score_ is None
    with pytest.raises(InputError, match="no interacting layer"):
        model.explain({"a": [1]})


def test_a_folder_that_save_did_not_write_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="name a folder that save wrote"):
        AutoIntClassifier.load(tmp_path)
