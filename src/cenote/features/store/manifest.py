"""What decides the bytes of a feature store, and how two of them differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import cenote.core.files as files
from cenote.core import InputError
from cenote.core.json_text import json_text
from cenote.features.origin import Origin, told_apart

FORMAT, VERSION = "cenote feature store", 1
MANIFEST = "manifest.json"
Dtype = Literal["float16", "bfloat16", "float32"]


@dataclass(frozen=True)
class ShardEntry:
    """One finished shard: its file, what the file's bytes hash to, and what it holds."""

    file: str
    sha256: str
    rows: int
    tokens: int
    bytes: int
    skipped: int = 0
    shortened: int = 0


@dataclass(frozen=True)
class Manifest:
    """The head of a feature store.

    Attributes:
        kind: image, audio or text.
        model: `name` (for people), `revision`, `library`, `model_class`, `weights_sha256`, `config_sha256`, and
            `code_sha256` where code of its own was run.
        preprocessing: the settings of the preprocessing as the model's own files give them.
        layers: which hidden states: 0 = the embeddings, then one per block; the last one is the model's output.
        dim: width of a token.
        dtype: how numbers are stored.
        prefix_tokens: leading tokens that are [CLS], registers or the like.
        grid: of the patch tokens, where they form one.
        pooled: name of the pooling that was done while extracting; `None`: all tokens are kept.
        items: how many the input holds, unreadable ones included.
        items_sha256: over the names and sizes (of texts: the texts) of the items, in their order.
        items_per_shard: shard `n` holds items `n * items_per_shard` and following.
        batch: items in one call of the model; it can change the last bit of a number.
        versions: of the libraries that computed the numbers.
        shards: the finished shards, once all are.
    """

    kind: str
    model: Mapping[str, Any]
    preprocessing: Mapping[str, Any]
    layers: tuple[int, ...]
    dim: int
    dtype: Dtype
    prefix_tokens: int
    grid: tuple[int, int] | None
    pooled: str | None
    items: int
    items_sha256: str
    items_per_shard: int
    batch: int
    versions: Mapping[str, str]
    shards: tuple[ShardEntry, ...] | None = None

    @property
    def shard_count(self) -> int:
        """Into how many shards the items are cut."""
        return -(-self.items // self.items_per_shard)

    @property
    def origin(self) -> Origin:
        """What made its tokens."""
        return Origin(self.kind, self.model, self.preprocessing, self.pooled, self.dtype)

    def key(self) -> str:
        """SHA-256 over everything that decides the numbers: shards of one key belong together."""
        return hashlib.sha256(json.dumps(self._deciding(), sort_keys=True).encode()).hexdigest()

    def _deciding(self) -> dict[str, Any]:
        parts = asdict(self)
        del parts["shards"]
        # a model keeps its numbers when its folder is moved
        parts["model"] = {k: v for k, v in self.model.items() if k != "name"}
        return parts

    def differences(self, other: Manifest) -> list[str]:
        """In words, what another manifest has that this one has not."""
        return told_apart(self._deciding(), other._deciding(), "in the store", "now")

    def finished(self, shards: tuple[ShardEntry, ...]) -> Manifest:
        """The same, with all its shards."""
        return replace(self, shards=shards)

    def write(self, folder: Path) -> None:
        """Write `manifest.json` in one step."""
        content = files.sealed({"format": FORMAT, "version": VERSION, "key": self.key(), **asdict(self)})
        files.write_whole(folder / MANIFEST, json_text(content, indent=1, sort_keys=True) + "\n")


class DamagedManifest(InputError):
    """A manifest that is not as it was written. What it said can be found out again from the shards, by the same extraction."""


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a store.

    Raises:
        InputError: where there is none, it is damaged (`DamagedManifest`), or a later version of cenote wrote it.
    """
    path = folder / MANIFEST
    try:
        content = files.read_json(path)
        if content["format"] != FORMAT:
            raise KeyError("format")
        if content["version"] != VERSION:
            raise InputError(
                f"{path}: version {content['version']} of the format; this cenote reads version {VERSION}; update it"
            )
        content = files.opened(content, path)
        key = content["key"]
        fields = {k: v for k, v in content.items() if k not in ("format", "version", "key")}
        shards = fields.pop("shards")
        fields["layers"] = tuple(fields["layers"])
        fields["grid"] = None if fields["grid"] is None else tuple(fields["grid"])
        found = Manifest(**fields, shards=None if shards is None else tuple(ShardEntry(**s) for s in shards))
        _check(found, key)
    except FileNotFoundError as error:
        raise InputError(
            f"{folder}: is no feature store, for it has no {MANIFEST}; run cenote extract, again if it was one: "
            f"finished shards are kept"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, OSError) as error:
        if isinstance(error, InputError):
            raise
        raise DamagedManifest(
            f"{path}: is damaged ({error}); run the same cenote extract again: it writes it again, finished shards are kept"
        ) from error
    return found


def _check(found: Manifest, key: object) -> None:
    """That a manifest says nothing that no extraction writes.

    Raises:
        ValueError, TypeError: where it does.
    """
    if found.dtype not in get_args(Dtype) or found.key() != key:
        raise ValueError("it was changed after it was written: its key is another one")
    if found.shards is None:
        return
    if len(found.shards) != found.shard_count:
        raise ValueError(f"it names {len(found.shards)} of {found.shard_count} shards")
    for number, shard in enumerate(found.shards):
        if not str(shard.file).startswith(f"part-{number:06d}-{shard.sha256[:16]}."):
            raise ValueError(f"it calls {shard.file} shard {number}")
        items = min(found.items_per_shard, found.items - number * found.items_per_shard)
        if shard.rows + shard.skipped != items:
            raise ValueError(f"shard {number} has {shard.rows} + {shard.skipped} items, expected {items}")


def is_store(folder: Path) -> bool:
    """Whether a folder is a feature store, be its manifest whole or not."""
    if next((folder / "shards").glob("part-*.arrow"), None) is not None:
        return True
    try:
        return bool(files.read_json(folder / MANIFEST).get("format") == FORMAT)
    except (OSError, ValueError, AttributeError):
        return False
