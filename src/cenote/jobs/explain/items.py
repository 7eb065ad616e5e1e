"""Raw items on disk -> a subject."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

import torch

from cenote.core import InputError
from cenote.features.raw import RawItems, UnreadableError
from cenote.features.table import find
from cenote.jobs.explain.pictures import Pictures
from cenote.jobs.explain.subject import Subject
from cenote.jobs.explain.texts import Texts
from cenote.models.classifier import Classifier, ImageClassifier, TextClassifier

PATCHES = 14
"""Across an image, of models that have none of their own."""


@dataclass(frozen=True)
class Taken:
    """What can be audited.

    Attributes:
        subject: of the items that can be used.
        labels: their true classes, where a column tells them.
        left_out: names of the others, each with the reason.
    """

    subject: Subject
    labels: tuple[str, ...] | None
    left_out: tuple[tuple[str, str], ...] = ()


def taken(
    loaded: Classifier, raw: RawItems, label: str | None = None, skip_bad: bool = False, masks: Path | None = None
) -> Taken:
    """The items, read and made a subject.

    Args:
        loaded: the classifier.
        raw: of its kind.
        label: column with the true class.
        skip_bad: leave out what cannot be used, in place of an error.
        masks: folder with a mask for each image, under its name.

    Raises:
        InputError: naming the first item that cannot be used, or has no mask that fits;
            a column that is not there, or a class that the model lacks.
    """
    if raw.kind != loaded.kind:
        raise InputError(f"data: {loaded.name} takes {loaded.kind}, and these are {raw.kind}")
    column = find(raw.columns, label, (), "label_column")
    texts, images = (TextClassifier(loaded), None) if loaded.kind == "text" else (None, ImageClassifier(loaded))
    if masks is not None and (images is None or not masks.is_dir()):
        why = (
            f"are of images, and {loaded.name} takes {loaded.kind}" if images is None else f"there is no folder {masks}"
        )
        raise InputError(f"masks: {why}")
    contents: list[Any] = []
    marked: list[torch.Tensor] = []
    names, rows, left_out = [], [], []
    for row, item in enumerate(raw.items):
        try:
            content = item.read().content
            if texts is not None:
                texts.encode(content, item.id)
            elif images is not None:
                mask = None if masks is None else mask_of(masks, item.id, content.size)
                if mask is not None:
                    marked.append(_as_encoded(images, mask))
                content = images.encode(content)
        except (UnreadableError, InputError) as error:
            why = str(error).removeprefix(f"{item.id}: ")
            if not skip_bad:
                remedy = "" if isinstance(error, InputError) else "; leave it out"
                raise InputError(f"{item.id}: {why}{remedy}, or give --skip-bad") from error
            left_out.append((item.id, why))
            continue
        contents.append(content)
        names.append(item.id)
        rows.append(row)
    if not contents:
        raise InputError(f"data: none of {len(raw)} items can be used ({left_out[0][0]}: {left_out[0][1]})")
    labels = None if column is None else named([raw.columns[column][row] for row in rows], loaded.labels)
    subject: Subject = (
        Texts(texts, contents, names)
        if texts is not None
        else pictures(loaded, images, contents, names, torch.stack(marked) if marked else None)  # type: ignore[arg-type]
    )
    return Taken(subject, labels, tuple(left_out))


def pictures(
    loaded: Classifier,
    images: ImageClassifier,
    made: Sequence[torch.Tensor],
    names: Sequence[str] | None = None,
    masks: torch.Tensor | None = None,
) -> Pictures:
    """Images as a model takes them, in its own patches where it has some.

    Raises:
        InputError: where they are not of one size.
    """
    if len({tuple(m.shape) for m in made}) > 1:
        raise InputError("inputs: the model's preprocessing makes images of several sizes; cut them to one")
    patch = images.patch or max(made[0].shape[-1] // PATCHES, 1)
    return Pictures(loaded.model, torch.stack(list(made)).to(_device(loaded)), patch, loaded.labels, names, masks)


def mask_of(folder: Path, name: str, size: tuple[int, int]) -> Any:
    """The mask of an image, as an image of black and white: the file of its name, whatever the ending.

    Raises:
        InputError: where there is none, it is no image, or it is of another size or marks nothing.
    """
    from PIL import Image, UnidentifiedImageError

    wanted = folder / name
    found = wanted if wanted.is_file() else next(iter(sorted(wanted.parent.glob(f"{escape(wanted.stem)}.*"))), None)
    if found is None:
        raise InputError(f"masks: there is none of {name} in {folder}; its file has the image's name")
    try:
        with Image.open(found) as opened:
            mask = opened.convert("L").point(lambda level: 255 * (level > 0))
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"masks: {found.name} is no image ({error})") from None
    if mask.size != size:
        across, down = size
        raise InputError(f"masks: {found.name} is {mask.width} x {mask.height} pixels, and {name} {across} x {down}")
    if mask.getbbox() is None:
        raise InputError(f"masks: {found.name} marks nothing; leave the image out")
    return mask.convert("RGB")


def _as_encoded(images: ImageClassifier, mask: Any) -> torch.Tensor:
    """`[height, width]`: cut and scaled as the model's images are; True from half of the way between black and white."""
    from PIL import Image

    made = images.encode(mask)
    black, white = (images.encode(Image.new("RGB", mask.size, colour)) for colour in ("black", "white"))
    return made[0] > (black[0] + white[0]) / 2


def named(cells: Sequence[Any], labels: Sequence[str], argument: str = "label") -> tuple[str, ...]:
    """Classes by name, of cells that hold names or numbers.

    Raises:
        InputError: where a cell is neither.

    >>> named(["good", "1", 0], ["bad", "good"])
    ('good', 'good', 'bad')
    """
    found = []
    for cell in cells:
        text = str(cell).strip()
        if text not in labels and text.isdecimal() and int(text) < len(labels):
            text = labels[int(text)]
        if text not in labels:
            shown = ", ".join(labels[:10]) + (f" and {len(labels) - 10} more" if len(labels) > 10 else "")
            raise InputError(f"{argument}: the model has no class {text!r}; it has {shown}")
        found.append(text)
    return tuple(found)


def _device(loaded: Classifier) -> torch.device:
    return next(loaded.model.parameters()).device
