"""A column that looks like a patient or speaker is named, whatever it lies in."""

from pathlib import Path

import numpy as np
import pytest

from cenote.features import read

TOLD = "column 'PatientID' holds 10 values for 40 items and looks like what they come from"


def _folder(path: Path, header: str, cell: str) -> Path:
    rows = []
    for i in range(40):
        np.save(path / f"i{i}.npy", np.random.default_rng(i).normal(size=(3, 4)).astype(np.float32))
        rows.append(f"i{i},{'ab'[i % 2]},{cell.format(i=i, quarter=i // 4)}")
    (path / "labels.csv").write_text("\n".join([f"id,label,{header}", *rows]))
    return path


def test_a_column_that_repeats_and_is_called_after_someone(tmp_path: Path) -> None:
    folder = _folder(tmp_path, "PatientID", "p{quarter}")
    (told,) = read(folder).cautions
    assert told.startswith(TOLD)
    assert told.endswith("give --group PatientID")
    assert read(folder, group_column="PatientID").cautions == ()
    assert read(folder, labelled=False).cautions == ()
    assert read(folder, label_column="PatientID", task="multiclass").cautions == (), "what is told apart is no group"


@pytest.mark.parametrize(
    ("header", "cell"),
    [("PatientID", "p{i}"), ("stain", "s{quarter}"), ("case", "yes"), ("group", "g{quarter}")],
    ids=["no repeats", "another name", "one value", "known already"],
)
def test_other_columns_are_not_named(tmp_path: Path, header: str, cell: str) -> None:
    assert read(_folder(tmp_path, header, cell)).cautions == ()


def test_columns_of_a_csv_file_beside_other_data(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(40, 3, 4)).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=x, ids=np.array([f"i{i}" for i in range(40)]))
    rows = [f"i{i},{'ab'[i % 2]},p{i // 4}" for i in range(40)]
    (tmp_path / "l.csv").write_text("\n".join(["id,label,PatientID", *rows]))
    assert read(tmp_path / "d.npz", labels=tmp_path / "l.csv").cautions[0].startswith(TOLD)
