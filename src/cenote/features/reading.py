"""`read`: whatever people have on disk -> `TokenDataset`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from cenote.core import Bags, InputError
from cenote.core.graphs import Graphs
from cenote.core.memory import MAX_ITEM_SIZE
from cenote.core.requirements import require_positive
from cenote.features import arrays, splits, targets
from cenote.features.arrow import open_arrow, shards_of
from cenote.features.dataset import SPLITS, Task, TokenDataset
from cenote.features.dgcnn import dgcnn_file, open_dgcnn
from cenote.features.embedded import digit_bags, digits
from cenote.features.folder import LABELS, open_folder, token_files
from cenote.features.geometric import geometric_file, open_geometric
from cenote.features.grouping import ungrouped
from cenote.features.labelling import FRACTIONS, Labelling
from cenote.features.npz import open_npz
from cenote.features.raw import RawItems
from cenote.features.source import Filled, Source
from cenote.features.store import StoredLayers, StoredPictures, StoredTokens, is_store, read_listing
from cenote.features.store.words import StoredWords
from cenote.features.table import (
    GROUP_NAME,
    ID_NAMES,
    SPLIT_NAME,
    Column,
    find,
    is_missing,
    label_columns,
    read_csv,
)
from cenote.features.targets import Target
from cenote.features.token_labels import TOKEN_LABELS, TokenLabels, add_column, add_folder
from cenote.features.tokens import stacked
from cenote.features.validate import Problems, check_grid, check_groups, check_ids, check_lengths, some
from cenote.models.base import layer_numbers

EMBEDDED = {"digits": digits, "digit-bags": digit_bags}


def read(
    path: str | Path,
    *,
    labels: str | Path | None = None,
    task: str | None = None,
    label_column: str | Sequence[str] | None = None,
    vector_column: str | None = None,
    id_column: str | None = None,
    group_column: str | None = None,
    split_column: str | None = None,
    prefix_tokens: int = 0,
    grid: tuple[int, int] | None = None,
    fractions: Sequence[float] = FRACTIONS,
    seed: int = 0,
    labelled: bool = True,
    layers: str | int | Sequence[int] | None = None,
    max_item_size: int = MAX_ITEM_SIZE,
) -> TokenDataset:
    """Read labelled token features, and check all of it before anything is trained.

    Args:
        path: one of

            - `"digits"`, `"digit-bags"`: the embedded data (a folder of that name is `"./digits"`);
            - a folder with one `.npy`, `.npz`, `.safetensors`, `.h5` or `.pt` file `[tokens, dim]` per item, in subfolders or
              not, and `labels.csv` with columns `id`, `label` and, if there are, `split` and `group`;
            - an Arrow, Feather or Parquet file with a column of lists of vectors, a folder of such files, or one saved by
              `datasets.save_to_disk`;
            - an `.npz` with `x [items, tokens, dim]`, `y`, and, if there are, `mask` (True = real), `ids`, `groups`, `split`;
              with `x [items, layers, tokens, dim]` and, if there are, the `layers`' numbers; or with `x [total, dim]` and
              `offsets [items + 1]`;
            - a feature store, as `cenote extract` writes it: its tokens stay on disk;
            - graphs, whose nodes are the tokens: a `.txt` file in DGCNN's format or a folder with one, see
              `cenote.features.dgcnn`; or the root folder or `.pt` file of a dataset of PyTorch Geometric.

            Each of them may say which tokens matter, see `cenote.features.token_labels`.
        labels: CSV file with the labels, instead of those that lie with the data; matched by id.
        task: `"binary"`, `"multiclass"`, `"multilabel"` or `"regression"`; default by the rules of `cenote.features.targets`.
        label_column: the column with the label, or several columns, as a sequence or separated by commas; default `label`,
            `labels`, `y`, `target` or `class`, else the only column left, else all that are left if they hold numbers. Several
            names in one cell are separated by `;`.
        vector_column: the column with the vectors; in a folder, the array where files hold several.
        id_column: default `id`, `item`, `name`, `file`, `filename` or `path` (`ids` in an `.npz`).
        group_column: column with the patient, speaker, ... whose items stay on one side of a split; default `group`, if there.
        split_column: column with train, val or test; default `split`, if there. Without val items, val is taken from train.
        prefix_tokens: how many leading tokens are [CLS] and registers.
        grid: `(height, width)` of the patch tokens.
        fractions: shares of train, val, test where no split is given.
        seed: of the split that is made.
        labelled: False for data to predict: labels, groups and splits are not looked for, every item is in test, `y` is zeros
            and `classes` empty.
        layers: of a feature store, or an `.npz` with several layers: which of them, `"last"`, `"all"`, a number, several, or a
            text such as `"0,3"`, `"4-6"`, `"-4:"`; default: the last.
        max_item_size: bytes that what a file holds may take in memory, by its header, where that is far more than the file
            has on disk.

    Returns:
        The data, float32 or as stored in half precision: `[items, tokens, dim]` where all items have equally many tokens, else
        `Bags`. The tokens are held once; files are read in blocks.

    Raises:
        InputError: that lists everything that is wrong, each problem with its item and remedy.

    Example:
        >>> read("digits").x.shape
        torch.Size([1797, 17, 64])
    """
    labelling = Labelling(task, label_column, group_column, split_column, fractions, seed)
    _check_layout(prefix_tokens, grid)
    if str(path) in EMBEDDED:
        return _embedded(
            str(path),
            labelling,
            prefix_tokens,
            labels=labels,
            vector_column=vector_column,
            id_column=id_column,
            grid=grid,
        )
    require_positive(max_item_size=max_item_size)
    with arrays.limited(max_item_size):
        return read_labelled(
            path, labelling if labelled else None, labels=labels, vector_column=vector_column, id_column=id_column,
            prefix_tokens=prefix_tokens, grid=grid, layers=layers,
        )  # fmt: skip


def read_labelled(
    path: str | Path,
    labelling: Labelling | None,
    *,
    labels: str | Path | None = None,
    vector_column: str | None = None,
    id_column: str | None = None,
    prefix_tokens: int = 0,
    grid: tuple[int, int] | None = None,
    layers: str | int | Sequence[int] | None = None,
) -> TokenDataset:
    """`read`, of what lies on disk: without a labelling, as data to predict."""
    path, csv = Path(path), None if labels is None else Path(labels)
    if is_store(path):
        return _from_store(path, layers, prefix_tokens, grid, csv, id_column, labelling)
    problems = Problems(str(path))
    source = _open(path, csv, vector_column, id_column, labelling is not None, problems)
    if not source.layers and layers not in (None, "all", "last"):
        raise InputError(f"layers: {path} holds one layer; leave layers out")
    data = assembled(
        path.stem,
        source,
        labelling,
        problems,
        prefix_tokens=prefix_tokens,
        grid=grid,
        source_words=f"{path} ({source.format})",
    )
    return data if not source.layers else _chosen(data, source.layers, layers)


def assembled(
    name: str,
    source: Source,
    labelling: Labelling | None,
    problems: Problems,
    *,
    prefix_tokens: int,
    grid: tuple[int, int] | None,
    source_words: str,
) -> TokenDataset:
    """What a reader found, checked and read.

    Args:
        name: for people.
        source: the reader's.
        labelling: of its columns, None for data to predict.
        problems: so far.
        prefix_tokens, grid: as of `read`.
        source_words: where it comes from.

    Returns:
        Of several layers `x` has them side by side.

    Raises:
        InputError: that lists everything that is wrong.
    """
    check_ids(source.ids, problems)
    if not source.ids:
        raise InputError(f"{problems.where}: holds no item")

    made, split = None, torch.full((len(source.ids),), SPLITS.index("test"))
    groups, split_seed = None, None
    if labelling is not None:
        made, split, groups, split_seed = _judged(source, labelling, problems)
    filled = source.load(problems)
    marked = None
    if filled is not None and not filled.values.shape[1]:
        problems.add("width", "tokens are of width 0; save the model's numbers in them")
    if filled is not None and not len(problems):
        marks = TokenLabels(source.ids, filled.lengths, problems, filled.token_labels)
        add_column(marks, source.columns.get(TOKEN_LABELS, ()))
        marked = marks.flat()
        check_lengths(source.ids, filled.lengths, prefix_tokens, problems)
        check_grid(grid, prefix_tokens, filled.lengths, problems)
    problems.raise_any()
    assert filled is not None
    assert made is not None or labelling is None
    made = made or _unlabelled(len(source.ids))
    x = _shaped(filled)
    return TokenDataset(
        name=name,
        x=x,
        y=made.y,
        task=made.task,
        classes=made.classes,
        ids=tuple(source.ids),
        split=split,
        groups=None if groups is None else tuple(groups),
        prefix_tokens=prefix_tokens,
        grid=grid,
        token_labels=marked if marked is None or isinstance(x, Bags) else marked.view(x.shape[:2]),
        source=source_words,
        cautions=_cautions(source, labelling),
        split_seed=split_seed,
    )


def layered(data: TokenDataset, held: tuple[int, ...]) -> TokenDataset:
    """The same with stacks of layers, which lie side by side in each token of `data`."""
    x = data.x
    assert isinstance(x, Tensor | Bags)
    if isinstance(x, Tensor):
        x = x.unflatten(-1, (len(held), -1)).transpose(1, 2)
    return replace(data, x=stacked(x, held))


def _chosen(data: TokenDataset, held: tuple[int, ...], layers: str | int | Sequence[int] | None) -> TokenDataset:
    """Some of the layers, which lie side by side in each token."""
    every = layered(data, held)
    numbers = layer_numbers(layers, held)
    return every.at(numbers[0]) if len(numbers) == 1 else every.only(numbers)


def require_labels(items: RawItems, labelling: Labelling, folds: int | None = None) -> Task:
    """The task of raw items, whose labels, groups and splits `read` will accept: told before hours are spent on tokens.

    Args:
        items: raw.
        labelling: of them.
        folds: that will be asked for.

    Raises:
        InputError: as `read` would.
    """
    problems = Problems("data")
    ids = [item.id for item in items.items]
    source = Source(items.format, ids, items.columns, lambda _: None, items.class_names, items.used)
    made, _, _, split_seed = _judged(source, labelling, problems)
    problems.raise_any()
    assert made is not None
    if folds is not None and folds > 1:
        splits.require_made(split_seed)
    return made.task


def _from_store(
    path: Path,
    layers: str | int | Sequence[int] | None,
    prefix_tokens: int,
    grid: tuple[int, int] | None,
    labels: Path | None,
    id_column: str | None,
    labelling: Labelling | None,
) -> TokenDataset:
    """A feature store, with the labels that lie in it or those of a CSV file."""
    stored = StoredTokens(path)
    manifest = stored.manifest
    for name, given, held in (
        ("prefix_tokens", prefix_tokens or None, manifest.prefix_tokens),
        ("grid", grid, manifest.grid),
    ):
        if given not in (None, held):
            raise InputError(f"{name}: {given}, but the store was made with {held}; leave it out")
    problems = Problems(str(path))
    listing = read_listing(path)
    row_of = {name: row for row, name in enumerate(listing.ids)}
    lost = [name for name in stored.ids if name not in row_of]
    if lost:
        raise InputError(
            f"{path}: items {some(lost)} are in the shards but not in the listing; run cenote extract again"
        )
    rows = [row_of[name] for name in stored.ids]
    columns: dict[str, Column] = {name: [cells[row] for row in rows] for name, cells in listing.columns.items()}
    marks = TokenLabels(stored.ids, stored.lengths.tolist(), problems)
    add_folder(marks, [(name, Path(name).with_suffix("").as_posix()) for name in stored.ids], path, problems)
    source = Source(
        f"feature store, {manifest.kind} through {manifest.model['name']}, {manifest.dtype}",
        stored.ids, columns, lambda _: None, listing.class_names, listing.used,
    )  # fmt: skip
    if labels is not None and labelling is not None:
        source = _joined(source, labels, id_column, problems)
    made, split = _unlabelled(len(stored)), torch.full((len(stored),), SPLITS.index("test"))
    groups, split_seed = None, None
    if labelling is not None:
        target, split, groups, split_seed = _judged(source, labelling, problems)
        made = target or made
    add_column(marks, source.columns.get(TOKEN_LABELS, ()))
    check_lengths(source.ids, stored.lengths.tolist(), manifest.prefix_tokens, problems)
    problems.raise_any()
    marked = marks.flat()
    fixed = len(set(stored.lengths.tolist())) == 1
    pictures: Any = None
    words: Any = None
    if manifest.kind == "text" and manifest.pooled is None:
        files = None if listing.files is None else [listing.files[row] for row in rows]
        words = StoredWords(manifest, files, [listing.stamps[row] for row in rows], stored.lengths.tolist())
    if manifest.kind == "image" and listing.files is not None:
        stamps = [listing.stamps[row] for row in rows]
        sizes = [int(stamp) if stamp.isdecimal() else None for stamp in stamps]
        pictures = StoredPictures([listing.files[row] for row in rows], stored.inputs, sizes, manifest.preprocessing)
    return TokenDataset(
        name=path.stem,
        x=StoredLayers(stored, layer_numbers(layers, manifest.layers)),
        y=made.y,
        task=made.task,
        classes=made.classes,
        ids=tuple(stored.ids),
        split=split,
        groups=None if groups is None else tuple(groups),
        prefix_tokens=manifest.prefix_tokens,
        grid=manifest.grid,
        images=pictures,
        words=words,
        token_labels=marked.view(len(stored), -1) if fixed and marked is not None else marked,
        source=f"{path} ({source.format})",
        cautions=_cautions(source, labelling),
        split_seed=split_seed,
    )


def _unlabelled(items: int) -> Target:
    return Target(torch.zeros(items, dtype=torch.int64), "multiclass", ())


def _open(
    path: Path, labels: Path | None, vectors: str | None, id_column: str | None, labelled: bool, problems: Problems
) -> Source:
    if not path.exists():
        raise InputError(f"data: there is no file or folder {path}; give one, or one of {', '.join(EMBEDDED)}")
    shards = shards_of(path)
    graphs = None if shards else _open_graphs(path)
    if path.is_dir() and not shards and graphs is None:
        return open_folder(path, labels, vectors, id_column, labelled, problems)
    if graphs is not None:
        source = graphs
    elif shards:
        source = open_arrow(shards, vectors, None if labels else id_column, path)
    elif path.suffix.lower() == ".npz":
        source = open_npz(path, vectors, None if labels else id_column, problems)
    else:
        raise InputError(
            f"data: {path} is none of .npz, .arrow, .feather, .parquet, graphs (.txt, .pt) or a folder; "
            f"put .npy, .safetensors, .h5 and .pt files, one per item, into a folder with labels.csv; or, to begin with raw "
            f"images, sounds or texts, name a model with --backbone"
        )
    return source if labels is None or not labelled else _joined(source, labels, id_column, problems)


def _open_graphs(path: Path) -> Source | None:
    """Graphs, if these are graphs: a file of either kind, a dataset's root, or a folder that holds nothing but a text."""
    if (file := geometric_file(path)) is not None:
        return open_geometric(file)
    if path.is_dir() and ((path / LABELS).is_file() or token_files(path)):
        return None
    return None if (file := dgcnn_file(path)) is None else open_dgcnn(file)


def _embedded(name: str, labelling: Labelling, prefix_tokens: int, **given: object) -> TokenDataset:
    data = EMBEDDED[name]()
    given |= {
        "task": labelling.task,
        "label_column": labelling.label,
        "group_column": labelling.group,
        "split_column": labelling.split,
    }
    for argument, value in given.items():
        if value is not None:
            raise InputError(f"{argument}: {name} comes with its own labels, split and layout; leave {argument} out")
    if prefix_tokens not in (0, data.prefix_tokens):
        raise InputError(f"prefix_tokens: {name} has {data.prefix_tokens}, got {prefix_tokens}; leave it out")
    return data


def _joined(source: Source, labels: Path, id_column: str | None, problems: Problems) -> Source:
    """The same items with the columns of a CSV file."""
    columns = read_csv(labels)
    id_name = find(columns, id_column, ID_NAMES, "id_column")
    if id_name is None:
        raise InputError(
            f"id_column: {labels} has no column called {', '.join(ID_NAMES)}; its columns are {', '.join(columns)}"
        )
    check_ids(columns[id_name], problems)
    row_of = {name: row for row, name in enumerate(columns[id_name])}
    for name in source.ids:
        if name not in row_of:
            problems.add("no row", f"item {name!r} has no row in {labels.name}; add one or leave the item out")
    for name in row_of.keys() - set(source.ids):
        problems.add("no item", f"id {name!r} in {labels.name} is no item of the data; take the row out or correct it")
    # an item without a row is told above; any row in its place keeps the other checks from telling it again
    rows = [row_of.get(name, 0) for name in source.ids]
    ordered: dict[str, Column] = {name: [cells[row] for row in rows] for name, cells in columns.items()}
    if TOKEN_LABELS in source.columns and TOKEN_LABELS not in ordered:
        ordered[TOKEN_LABELS] = source.columns[TOKEN_LABELS]
    return replace(source, columns=ordered, class_names={}, used=frozenset({id_name}))


def _judged(
    source: Source, labelling: Labelling, problems: Problems
) -> tuple[Target | None, Int[Tensor, "items"], list[str] | None, int | None]:
    """Target, split, groups and the seed of a split that was made; every problem with them is told."""
    ids, columns = source.ids, source.columns
    names, group_name, split_name = _named(source, labelling)
    made = targets.target(ids, {n: columns[n] for n in names}, labelling, source.class_names, problems)

    groups = None
    if group_name is not None:
        for name, cell in zip(ids, columns[group_name], strict=True):
            if is_missing(cell):
                problems.add(
                    "no group", f"item {name!r} has no {group_name}; give it one of its own if it belongs to none"
                )
        groups = [str(cell) for cell in columns[group_name]]

    split = torch.zeros(len(ids), dtype=torch.int64)
    if split_name is None:
        if made is not None:
            before = len(problems)
            targets.check_enough(made, groups, problems)
            if len(problems) == before:
                split = splits.make_split(made, groups, labelling, problems)
        return made, split, groups, labelling.seed
    given = splits.given_split(ids, columns[split_name], problems)
    if given is None:
        return made, split, groups, None
    if groups is not None:
        check_groups(ids, groups, given, problems)
    split = torch.tensor(given)
    if made is not None:
        if SPLITS.index("val") not in given:
            split = splits.val_from_train(split, made, groups, labelling, problems)
        splits.check_given(split, made, problems)
    return made, split, groups, None


def _named(source: Source, labelling: Labelling) -> tuple[list[str], str | None, str | None]:
    """The columns of labels, groups and split."""
    group = find(source.columns, labelling.group, (GROUP_NAME,), "group_column")
    split = find(source.columns, labelling.split, (SPLIT_NAME,), "split_column")
    others = {*source.used, TOKEN_LABELS, *(name for name in (group, split) if name is not None)}
    return label_columns(source.columns, labelling.label, others), group, split


def _cautions(source: Source, labelling: Labelling | None) -> tuple[str, ...]:
    """What a person should know of the columns."""
    if labelling is None:
        return ()
    labels, group, split = _named(source, labelling)
    return () if group is not None else ungrouped(source.columns, {*source.used, *labels, *([split] if split else [])})


def _shaped(filled: Filled) -> Tensor | Bags:
    """The same memory as `[items, tokens, dim]` where that fits, else as `Bags`."""
    values, lengths, edges, _ = filled
    if edges is not None:
        return Graphs(values, torch.tensor([0, *lengths]).cumsum(0), edges.edge_index, edges.edge_attr)
    if len(set(lengths)) == 1:
        return values.view(len(lengths), lengths[0], values.shape[1])
    return Bags(values, torch.tensor([0, *lengths]).cumsum(0))


def _check_layout(prefix_tokens: int, grid: tuple[int, int] | None) -> None:
    if prefix_tokens < 0:
        raise InputError(f"prefix_tokens: expected 0 or more leading tokens, got {prefix_tokens}")
    if grid is not None and (len(grid) != 2 or min(grid) < 1):
        raise InputError(f"grid: expected (height, width) of the patch tokens, got {grid}")
