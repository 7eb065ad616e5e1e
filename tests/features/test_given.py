import numpy as np
import pytest
import torch

import cenote
from cenote.features.dataset import TokenDataset

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 5, 8))
Y = [("ham", "spam")[i % 2] for i in range(60)]


def test_an_array_and_texts() -> None:
    data = cenote.Dataset.from_arrays(X, Y)
    assert isinstance(data, TokenDataset)
    assert data.task == "binary"
    assert data.classes == ("ham", "spam")
    assert data.dtype == torch.float32
    assert data.ids[:2] == ("0", "1")
    assert torch.equal(data.item(3), torch.from_numpy(X[3]).float())
    assert sorted(set(data.split.tolist())) == [0, 1, 2]


def test_the_same_as_from_a_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    groups = [f"p{i // 4}" for i in range(60)]
    mask = np.arange(5) < RNG.integers(1, 6, size=(60, 1))
    np.savez(tmp_path / "arrays.npz", x=X, y=np.array(Y), groups=np.array(groups), mask=mask)
    file = cenote.features.read(tmp_path / "arrays.npz")
    given = cenote.Dataset.from_arrays(X, Y, groups=groups, mask=mask)
    assert given.fingerprint() == file.fingerprint()


def test_a_list_and_bags_and_tensors() -> None:
    ragged = [X[i, : 1 + i % 5] for i in range(60)]
    of_list = cenote.Dataset.from_arrays(ragged, Y)
    of_bags = cenote.Dataset.from_arrays(cenote.Bags.from_list(ragged), np.array(Y))
    of_tensors = cenote.Dataset.from_arrays([torch.from_numpy(r) for r in ragged], Y)
    assert of_list.fingerprint() == of_bags.fingerprint() == of_tensors.fingerprint()
    assert of_list.lengths().tolist()[:6] == [1, 2, 3, 4, 5, 1]


def test_several_layers() -> None:
    layered = RNG.normal(size=(60, 3, 5, 8)).astype("float16")
    data = cenote.Dataset.from_arrays(layered, Y, layers=(4, 8, 12))
    assert data.layers == (4, 8, 12)
    assert data.dtype == torch.float16
    assert torch.equal(data.at(8).item(7), torch.from_numpy(layered[7, 1]))


def test_several_labels_and_targets() -> None:
    several = RNG.integers(0, 2, size=(60, 3))
    assert cenote.Dataset.from_arrays(X, several).task == "multilabel"
    assert cenote.Dataset.from_arrays(X, torch.from_numpy(several)).y.shape == (60, 3)
    targets = RNG.normal(size=(60, 2))
    data = cenote.Dataset.from_arrays(X, targets)
    assert data.task == "regression"
    assert np.allclose(data.y.numpy(), targets, atol=1e-6)


def test_a_split_that_is_given() -> None:
    split = ["train"] * 30 + ["val"] * 10 + ["test"] * 20
    data = cenote.Dataset.from_arrays(X, Y, split=split)
    assert data.split.tolist() == [0] * 30 + [1] * 10 + [2] * 20
    assert data.split_seed is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"x": X[0]}, r"x: expected \[items, tokens, dim\].* got \[5, 8\]"),
        ({"x": np.full(X.shape, "a")}, "x: expected an array of numbers, got texts"),
        ({"y": Y[:50]}, "y: expected one for each of the 60 items of x, got 50"),
        ({"y": None}, "y: expected one for each item, got None"),
        ({"y": "spam"}, "y: expected one for each item, got the one text 'spam'"),
        ({"groups": ["a"]}, "groups: expected one for each of the 60 items"),
        ({"ids": [1, 2]}, "ids: expected one for each of the 60 items"),
        ({"ids": ["a"] * 60}, "id 'a' stands 60 times"),
        ({"mask": np.ones((60, 4))}, r"mask: expected \[60, 5\] to match x, got \[60, 4\]"),
        ({"mask": np.full((60, 5), 2)}, "mask: holds other numbers than 0 and 1"),
        ({"mask": np.zeros((60, 5))}, "has no tokens"),
        ({"x": np.where(np.arange(60)[:, None, None] == 4, np.nan, X)}, "item '4' holds NaN or infinite numbers"),
        ({"layers": (1, 2)}, "layers: x holds one layer"),
        ({"x": X[:, None], "layers": (1, 2)}, "layers: expected 1 rising numbers"),
        ({"x": [X[0]] * 60, "mask": np.ones((60, 5))}, "mask: items of different lengths have no padding"),
        ({"task": "ranking"}, "task: expected 'binary'"),
        ({"prefix_tokens": 5}, "all of them prefix"),
        ({"prefix_tokens": -1}, "prefix_tokens: expected 0 or more"),
    ],
)
def test_what_cannot_be_used_is_told(given: dict[str, object], message: str) -> None:
    with pytest.raises(cenote.InputError, match=message):
        cenote.Dataset.from_arrays(**{"x": X, "y": Y, **given})  # type: ignore[arg-type]


def test_data_that_are_no_data_set_are_told_what_makes_one() -> None:
    with pytest.raises(cenote.InputError, match=r"data: expected a TokenDataset, got str; .*cenote.features.read"):
        cenote.jobs.probe.compare("digits")  # type: ignore[arg-type]
    with pytest.raises(
        cenote.InputError, match=r"data: expected a TokenDataset, got ndarray; .*cenote.Dataset.from_arrays"
    ):
        cenote.jobs.probe.compare(X)  # type: ignore[arg-type]
