"""Options that several commands share."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from cenote.core import InputError
from cenote.core.memory import MAX_ITEM_SIZE

# what is compared, and how it is judged
Methods = Annotated[
    str, typer.Option(help="fast, all, or names separated by commas (see cenote list); your own: mypackage.MyPool.")
]
Own = Annotated[
    str | None, typer.Option("--own", help="A module of yours to import first, whose pool was saved: mypackage.pools.")
]
Seeds = Annotated[int, typer.Option(min=1, help="How many initialisations of each probe.")]
Out = Annotated[Path, typer.Option(help="Folder for results; the same folder again resumes.")]
Metric = Annotated[str | None, typer.Option(help="Default by task: AUROC, accuracy, mean average precision, R2.")]
Significance = Annotated[
    str,
    typer.Option(
        help="Where p-values come from: permutation (methods exchanged in items or groups), or wilcoxon (signed ranks)."
    ),
]
SeedEffects = Annotated[
    str,
    typer.Option(
        help="What the verdict speaks of: fixed, these trained probes; random, the methods trained with any seeds."
    ),
]
References = Annotated[
    bool,
    typer.Option(
        "--references/--no-references",
        help="Whether k-NN and logistic (ridge) regression on the mean stand in the table too; they never win.",
    ),
]
Folds = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="How many splits, each testing another part of the items; 1: one split decides. Default: 5 where the split is "
        "made here and tests fewer than 200 items, else 1.",
    ),
]
Repeats = Annotated[int, typer.Option(min=1, help="Rounds of --folds, each with another assignment of items to folds.")]
Workers = Annotated[
    int | None,
    typer.Option(min=1, help="How many methods are trained at once; default: one per core where that is faster."),
]

Epochs = Annotated[int | None, typer.Option(min=1, help="At most so many passes over the training items.")]
Patience = Annotated[int | None, typer.Option(min=1, help="Stop after so many epochs without a better validation.")]

# labelled items
Labelled = Annotated[
    str,
    typer.Argument(
        help="Folder of bags with labels.csv, feature store, Arrow/Parquet file, .npz, graphs (DGCNN text, PyTorch "
        "Geometric dataset), or one of: digits, digit-bags; with --backbone, raw images, sounds or texts."
    ),
]
Task = Annotated[
    str | None, typer.Option(help="binary, multiclass, multilabel or regression; default: found from the labels.")
]
Labels = Annotated[Path | None, typer.Option(help="CSV with the labels, if not labels.csv in the folder.")]
Label = Annotated[str | None, typer.Option(help="Name of the label column.")]
Vectors = Annotated[str | None, typer.Option(help="Name of the column with lists of vectors.")]
Group = Annotated[
    str | None, typer.Option(help="Column with patient, speaker, ...: its items stay on one side of a split.")
]
Id = Annotated[str | None, typer.Option("--id", help="Column with the items' names.")]
Split = Annotated[str | None, typer.Option(help="Column with train, val or test.")]
SplitSeed = Annotated[int, typer.Option(help="Seed of the split, where none is given.")]
Grid = Annotated[str | None, typer.Option(help="HEIGHTxWIDTH of the patch tokens, for pictures: 14x14.")]
ProbedLayers = Annotated[
    str | None,
    typer.Option(
        "--layers",
        help="Of features with several layers: where token pools are tried, last, all, or numbers such as 0,4-6 or -4:; "
        "pools of layers join the table.",
    ),
]
PrefixTokens = Annotated[int, typer.Option(min=0, help="Leading tokens that are [CLS] or registers.")]

# raw items
Kind = Annotated[str | None, typer.Option(help="image, audio or text, where folder or model hold several.")]
Column = Annotated[str | None, typer.Option(help="Of a table: the column with the text, image or sound.")]
Names = Annotated[
    str | None, typer.Option(help="Names of the columns, of CSV files without a header line: text,label.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Only so many items, the first ones.")]

MaxItemSize = Annotated[
    str,
    typer.Option("--max-item-size", help="What one item may take in memory, as its file's header says: 500MB, 4GB."),
]

DEFAULT_SIZE = f"{MAX_ITEM_SIZE // 10**6}MB"

# a model, and what is kept of its tokens
Backbone = Annotated[
    str | None,
    typer.Option(
        help="Model that turns raw data into tokens first, kept in OUT/features: a folder, or a name on the hub."
    ),
]
Dtype = Annotated[str, typer.Option(help="Stored numbers: float16, bfloat16 or float32.")]
Batch = Annotated[int, typer.Option(min=1, help="Items in one call of the model.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave unreadable items out, and list them.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")]
Precision = Annotated[str, typer.Option(help="The model computes in float32, bfloat16 or float16.")]
MaxLength = Annotated[int | None, typer.Option(min=1, help="Cut texts at so many tokens.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that lies with the model.")]
Pickle = Annotated[bool, typer.Option("--allow-pickle", help="Also take weights that are not safetensors.")]

# a saved probe, and new data
SavedProbe = Annotated[Path, typer.Argument(help="Folder of a saved probe: OUT/best or OUT/recommended.")]
Unseen = Annotated[
    str,
    typer.Argument(
        help="As for cenote probe, labels are not needed; images, sounds or texts go through the model that the probe was "
        "trained with."
    ),
]
Force = Annotated[
    bool, typer.Option("--force", help="Go on where the tokens are told to be others than those of the training.")
]
ModelNow = Annotated[
    str | None,
    typer.Option("--backbone", help="Of raw data: where the probe's model lies now, if no longer where it lay."),
]
KeptTokens = Annotated[
    Path | None,
    typer.Option("--features", help="Of raw data: keep the tokens in this folder; the same command again goes on."),
]

# for machines
Json = Annotated[
    bool, typer.Option("--json", help="Print JSON to standard output, and everything else to standard error.")
]

# where results go besides
Track = Annotated[
    list[str] | None,
    typer.Option("--track", help="Also log to wandb, mlflow or tensorboard, by their own clients; may be repeated."),
]
JsonLines = Annotated[
    Path | None, typer.Option("--json-lines", help="Also write the table to this file, a JSON object a method.")
]

# where it is computed
Engine = Annotated[str, typer.Option(help="local, or ray: on an existing cluster.")]
Address = Annotated[str, typer.Option(help="Of the Ray cluster; auto: the one that this machine belongs to.")]


def parsed_grid(text: str | None) -> tuple[int, int] | None:
    """`"14x14"` as numbers."""
    if text is None:
        return None
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise InputError(f"--grid: expected HEIGHTxWIDTH such as 14x14, got {text!r}")
    return int(height), int(width)


def parsed_size(text: str, option: str = "--max-item-size") -> int:
    """`"500MB"` in bytes.

    >>> parsed_size("500MB"), parsed_size("1.5 gb")
    (500000000, 1500000000)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)b?", text.strip().lower())
    if found is None:
        raise InputError(f"{option}: expected a size such as 500MB or 4GB, got {text!r}")
    return round(float(found[1]) * 1000.0 ** ("", "k", "m", "g", "t").index(found[2]))


def split_names(text: str | None) -> list[str] | None:
    """`"text,label"` as a list."""
    return None if text is None else [name.strip() for name in text.split(",")]


def import_from_here(*names: str) -> None:
    """Import the modules of what is named by a dotted path, from the present folder too."""
    from cenote.catalog import import_own

    here = str(Path.cwd())
    if any("." in name for name in names) and here not in sys.path:
        sys.path.insert(0, here)
    for name in names:
        import_own(name)
