"""`cenote reduce` of an image encoder: how few tokens will do, from which block on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cenote.cli.console import say, signed
from cenote.cli.leaderboard import leaderboard
from cenote.cli.progress import arms_bar
from cenote.core import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from cenote.features.raw import RawItems
    from cenote.jobs.reduce import EncoderFrontier
    from cenote.models.base import Backbone

AT_ONCE = 32


@dataclasses.dataclass(frozen=True)
class Photographs:
    """Images as a model takes them, and their classes.

    Attributes:
        images: `[images, channels, height, width]`.
        labels: a class of each.
        left_out: names of what could not be read, each with the reason.
    """

    images: Tensor
    labels: list[str]
    left_out: tuple[tuple[str, str], ...]


def is_images(data: str) -> bool:
    """Whether a folder holds images and no collection of texts."""
    from cenote.features.raw.files import SUFFIXES

    folder = Path(data)
    if not folder.is_dir() or any(folder.glob("*.jsonl")):
        return False
    return any(path.suffix.lower() in SUFFIXES["image"] for path in folder.rglob("*"))


def photographs(raw: RawItems, backbone: Backbone, label: str | None, skip_bad: bool) -> Photographs:
    """Read images and their classes.

    Raises:
        InputError: naming what cannot be read, images of several sizes, a missing label.
    """
    import torch

    from cenote.features.raw import UnreadableError
    from cenote.features.table import label_columns

    if backbone.layout.kind != "image":
        raise InputError(f"model: {backbone.identity.name} takes {backbone.layout.kind}; name an encoder of images")
    columns = label_columns(raw.columns, label, set(raw.used))
    if len(columns) != 1:
        raise InputError(f"--label: expected one column with the class, got {', '.join(columns)}")
    labels, made, left_out = [], [], []
    contents: list[Any] = []
    for item, cell in zip(raw.items, raw.columns[columns[0]], strict=True):
        try:
            contents.append(item.read().content)
        except UnreadableError as error:
            if not skip_bad:
                raise InputError(f"{item.id}: {error}; leave it out, or give --skip-bad") from error
            left_out.append((item.id, str(error)))
            continue
        labels.append(str(cell))
        if len(contents) == AT_ONCE:
            made.append(_prepared(backbone, contents))
            contents = []
    if contents:
        made.append(_prepared(backbone, contents))
    if not made:
        raise InputError(f"data: none of {len(raw)} images can be read ({left_out[0][0]}: {left_out[0][1]})")
    if len({x.shape[1:] for x in made}) > 1:
        raise InputError("images: the model's preprocessing makes images of several sizes; cut them to one")
    return Photographs(torch.cat(made), labels, tuple(left_out))


def _prepared(backbone: Backbone, contents: list[Any]) -> Tensor:
    inputs = backbone.prepare(contents).inputs
    if "pixel_values" not in inputs:
        raise InputError(f"model: {backbone.identity.name} is not called with images alone ({', '.join(inputs)})")
    pixels: Tensor = inputs["pixel_values"]
    return pixels


def reduce_images(
    data: str,
    model: str | None,
    methods: str,
    blocks: tuple[int, ...] | None,
    label: str | None,
    limit: int | None,
    layer: int | None,
    skip_bad: bool,
    console: Console,
    loading: dict[str, Any],
    **asked: Any,
) -> EncoderFrontier:
    """Parse, call, print."""
    from cenote.features.raw import open_raw
    from cenote.jobs.reduce import compare_encoder
    from cenote.jobs.reduce.encoder import DEFAULT_BLOCKS, counted
    from cenote.models.load import load_whole

    if model is None:
        raise InputError("--model: name the image encoder whose tokens are reduced, a folder or a name on the hub")
    with console.status(Text(f"listing {data}")):
        raw = open_raw(data, kind="image", limit=limit)
    say(console, f"{len(raw):,} images: {raw.format}")
    with console.status(Text(f"loading {model}")):
        backbone, whole = load_whole(model, "image", **loading)
    found = photographs(raw, backbone, label, skip_bad)
    for name, why in found.left_out:
        say(console, f"left out {name}: {why}")
    prefix = backbone.layout.prefix_tokens
    arms = counted(methods, asked.get("factors"), len(blocks) if blocks else DEFAULT_BLOCKS) + 1
    with arms_bar(console, arms) as on_method:
        return compare_encoder(
            whole.eval(),
            found.images,
            found.labels,
            methods,
            blocks=blocks,
            read="cls" if prefix else "mean",
            prefix=prefix,
            state=layer,
            name=Path(data).name,
            on_method=on_method,
            **asked,
        )


def table_of(found: EncoderFrontier, width: int) -> Table:
    """The results for a terminal of so many columns, best first."""
    tests = {t.first: t for t in found.against_baseline}
    results = found.results
    columns = {
        "tokens": [r.method for r in results],
        found.metric_name: [f"{r.metric:.3f}" for r in results],
        "vs all": [signed(tests[r.method].difference, 3) if r.method in tests else "" for r in results],
        "p adj.": [f"{tests[r.method].p_adjusted:.2g}" if r.method in tests else "" for r in results],
        "agree": [f"{r.agreement:.2f}" for r in results],
        "left": [f"{r.tokens[-1]}" for r in results],
        "G mult.": [f"{r.multiply_adds / 1e9:.2f}" for r in results],
        "images/s": [_known(r.images_per_s) for r in results],
        "times": [_known(r.speedup) for r in results],
        "reducer ms": [_known(r.reducer_ms) for r in results],
    }
    return leaderboard(
        columns,
        width,
        title=f"{found.dataset['name']}: {found.metric_name} of {found.dataset['images']:,} images",
        caption="p adjusted by Holm's method; images/s on one thread; times: of all tokens, run in turn",
        luxuries=("reducer ms", "agree"),
        spared=("G mult.", "p adj.", "left"),
    )


def _known(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
