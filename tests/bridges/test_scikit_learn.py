import joblib
import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.metrics import r2_score
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_val_score

from cenote import Bags, InputError, ProbeClassifier, ProbeRegressor

RNG = np.random.default_rng(0)
Y = np.array(["cat", "dog", "owl"])[np.arange(90) % 3]
X = RNG.normal(size=(90, 5, 8)).astype(np.float32)
X[np.arange(90), :, np.arange(90) % 3] += 2
BAGS = [x[: 1 + i % 5] for i, x in enumerate(X)]
QUICK = {"epochs": 30, "learning_rates": (1e-2,)}


@pytest.mark.parametrize("data", [X, BAGS], ids=["array", "list"])
def test_cross_validation(data: object) -> None:
    assert cross_val_score(ProbeClassifier("mean", **QUICK), data, Y, cv=3).mean() > 0.8


def test_classes_and_probabilities() -> None:
    model = ProbeClassifier("simpool", **QUICK).fit(X, Y)
    assert model.classes_.tolist() == ["cat", "dog", "owl"]
    p = model.predict_proba(X)
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-5)
    assert (model.classes_[p.argmax(1)] == model.predict(X)).all()
    assert model.transform(X).shape == (90, 8)


def test_binary() -> None:
    y = Y == "cat"
    model = ProbeClassifier("mean", **QUICK).fit(X, y)
    assert model.predict(X).dtype == bool
    assert model.score(X, y) > 0.9


def test_grid_search_and_clone() -> None:
    search = GridSearchCV(ProbeClassifier(**QUICK), {"method": ["mean", "max"]}, cv=2).fit(X, Y)
    assert search.best_params_["method"] in ("mean", "max")
    model = ProbeClassifier("max", weight_decay=0.5)
    assert clone(model).get_params() == model.get_params()


def test_pickles_through_joblib(tmp_path: object) -> None:
    model = ProbeClassifier("abmil", **QUICK).fit(BAGS, Y)
    joblib.dump(model, f"{tmp_path}/m.joblib")
    np.testing.assert_array_equal(joblib.load(f"{tmp_path}/m.joblib").predict_proba(BAGS), model.predict_proba(BAGS))


def test_the_same_seed_gives_the_same_probe() -> None:
    a, b = (ProbeClassifier("simpool", **QUICK).fit(X, Y).predict_proba(X) for _ in range(2))
    np.testing.assert_array_equal(a, b)


def test_regression_in_the_units_of_the_targets() -> None:
    y = 1000 + 50 * X[:, :, 0].mean(1)
    model = ProbeRegressor("mean", epochs=60, patience=60).fit(X, y)
    assert model.score(X, y) > 0.9
    assert model.predict(X).shape == (90,)
    assert ProbeRegressor("mean", **QUICK).fit(X, np.stack([y, -y], 1)).predict(X).shape == (90, 2)


def test_groups_stay_on_one_side() -> None:
    groups = np.arange(90) // 9
    split = ProbeClassifier("mean")._split(__import__("torch").arange(90) % 3, "multiclass", groups.tolist()).numpy()
    assert all(len(set(split[groups == g])) == 1 for g in range(10))
    ProbeClassifier("mean", **QUICK).fit(X, Y, groups=groups)
    scores = cross_val_score(ProbeClassifier("mean", **QUICK), X, Y, cv=GroupKFold(2), groups=groups)
    assert len(scores) == 2


@pytest.mark.parametrize(
    ("fit", "message"),
    [
        (lambda: ProbeClassifier().fit(X[0], Y), r"X: expected \[items, tokens, dim\]"),
        (lambda: ProbeClassifier().fit(X, Y[:5]), "y: has 5 targets for 90 items"),
        (lambda: ProbeClassifier().fit(X, ["cat"] * 90), "holds the one class"),
        (lambda: ProbeClassifier().fit(np.full_like(X, np.nan), Y), "NaN or infinite features"),
        (lambda: ProbeClassifier().fit([x[:0] for x in X], Y), "item 0 has shape"),
        (lambda: ProbeClassifier("simpol").fit(X, Y), "did you mean simpool"),
        (lambda: ProbeClassifier("mean", **QUICK).fit(X, Y).predict(X[:, :, :3]), "tokens have width 3"),
        (lambda: ProbeRegressor().fit(X, [np.nan] * 90), "NaN or infinite targets"),
        (lambda: ProbeClassifier(validation_fraction=2).fit(X, Y), "validation_fraction"),
    ],
)
def test_wrong_input_is_named(fit: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fit()


def test_large_targets_are_scored_in_64_bits() -> None:
    y = X[:, :, 0].mean(1)
    plain, large = (ProbeRegressor("mean", **QUICK).fit(X, t).score(X, t) for t in (y, np.float32(1e30) * y))
    assert plain == pytest.approx(r2_score(y, ProbeRegressor("mean", **QUICK).fit(X, y).predict(X)), abs=1e-6)
    assert large == pytest.approx(plain, abs=1e-3)
    both = np.stack([y, -3 * y], 1)
    model = ProbeRegressor("mean", **QUICK).fit(X, both)
    weights = np.linspace(0, 1, len(y))
    assert model.score(X, both, weights) == pytest.approx(
        r2_score(both, model.predict(X), sample_weight=weights), abs=1e-6
    )


def test_training_that_gives_no_numbers_is_told() -> None:
    for model, y in ((ProbeRegressor("mean", **QUICK), X[:, 0, 0]), (ProbeClassifier("mean", **QUICK), Y)):
        with pytest.raises(InputError, match="mean: its training gave no finite numbers; are X or y very large"):
            model.fit(X * np.float32(1e30), y)


@pytest.mark.parametrize("form", ["reversed", "big-endian", "float64", "tensor", "bags", "list"])
def test_arrays_of_any_form_give_the_same(form: str) -> None:
    rng = np.random.default_rng(1)
    X = rng.normal(size=(40, 5, 8)).astype("float32")
    y = (X[:, :, 0].max(1) > 1).astype(int)
    given = {
        "reversed": X[:, ::-1].copy()[:, ::-1],
        "big-endian": X.astype(">f4"),
        "float64": X.astype("float64"),
        "tensor": torch.from_numpy(X),
        "bags": Bags.from_list(list(X)),
        "list": list(X),
    }[form]
    expected = ProbeClassifier("mean", epochs=2).fit(X, y).predict_proba(X)
    assert np.allclose(ProbeClassifier("mean", epochs=2).fit(given, y).predict_proba(given), expected, atol=1e-5)


def test_several_labels_at_once() -> None:
    rng = np.random.default_rng(1)
    X = rng.normal(size=(60, 5, 8)).astype("float32")
    y = (X[:, :, :3].mean(1) > 0).astype(int)
    probe = ProbeClassifier("mean", epochs=60, learning_rates=(0.1,)).fit(X, y)
    assert probe.predict(X).shape == (60, 3)
    assert (probe.predict(X) == y).mean() > 0.8
    assert probe.predict_proba(X).shape == (60, 3)


def test_targets_of_another_kind_are_told() -> None:
    X = np.zeros((6, 2, 3), "float32")
    with pytest.raises(InputError, match="y: holds float64 targets with fractions; ProbeRegressor fits those"):
        ProbeClassifier("mean").fit(X, np.linspace(0, 1, 6))
    with pytest.raises(InputError, match="y: "):
        ProbeClassifier("mean").fit(X, np.arange(12).reshape(6, 2))
    with pytest.raises(InputError, match="X: expected an array of numbers, got texts"):
        ProbeClassifier("mean").fit(np.full((6, 2, 3), "a"), [0, 1] * 3)


def test_predicting_before_fitting_is_told_as_scikit_learn_tells_it() -> None:
    from sklearn.exceptions import NotFittedError

    for probe in (ProbeClassifier("mean"), ProbeRegressor("mean")):
        with pytest.raises(NotFittedError):
            probe.predict(np.zeros((1, 2, 3)))
        with pytest.raises(NotFittedError):
            probe.transform(np.zeros((1, 2, 3)))
