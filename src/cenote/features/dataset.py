"""Labelled token features in memory: what `cenote probe` trains on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from cenote.core import Bags, InputError
from cenote.core.graphs import Graphs

Task = Literal["binary", "multiclass", "multilabel", "regression"]
Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


@dataclass(frozen=True)
class TokenDataset:
    """Items with token features and a target.

    Attributes:
        name: for people.
        x: `[items, tokens, dim]`, or `Bags` where the items have different numbers of tokens. Never both padded and ragged:
            readers turn padding into `Bags`. `Graphs` where edges join the tokens. float32, float16 or bfloat16.
        y: binary and multiclass: int64 `[items]`, numbers of `classes`; multilabel: float32 `[items, labels]` of 0 and 1;
            regression: float32 `[items, targets]`.
        task: what kind of target `y` is.
        classes: names of the classes, labels or regression targets.
        ids: a unique name per item, used in messages, predictions and pictures.
        split: per item 0 = train, 1 = validation, 2 = test (the order of `SPLITS`).
        groups: per item the patient, speaker, ... that must not stand on two sides of a split; `None`: every item is its own.
        prefix_tokens: how many leading tokens are [CLS] and registers rather than patches.
        grid: `(height, width)` of the patch tokens where they form one, row by row.
        images: `[items, height, width]` or `[items, height, width, 3]` uint8, what the tokens came from, for pictures.
        words: per item what its tokens stand for, where they are texts (see `cenote.features.store.words`).
        token_labels: one label per token of `x` (`[items, tokens]` or `[total]`), where known (instance labels of bags).
        source: where it was read from, for provenance.
        pads: whether a batch of ragged items is padded.
    """

    pads: ClassVar[bool] = True

    name: str
    x: Float[Tensor, "items tokens dim"] | Bags
    y: Tensor
    task: Task
    classes: tuple[str, ...]
    ids: tuple[str, ...]
    split: Int[Tensor, "items"]
    groups: tuple[str, ...] | None = None
    prefix_tokens: int = 0
    grid: tuple[int, int] | None = None
    images: NDArray[np.uint8] | None = None
    words: Any = None
    token_labels: Tensor | None = None
    source: str = ""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def dim(self) -> int:
        """Width of a token."""
        return self.x.dim if isinstance(self.x, Bags) else self.x.shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the token features."""
        return self.x.values.dtype if isinstance(self.x, Bags) else self.x.dtype

    @property
    def tokens(self) -> int | None:
        """Tokens per item, prefix included; `None` where items differ."""
        return None if isinstance(self.x, Bags) else self.x.shape[1]

    @property
    def has_edges(self) -> bool:
        """Whether items are graphs."""
        return isinstance(self.x, Graphs)

    @property
    def outputs(self) -> int:
        """Width of a classifier for this task: 1 logit for binary, one number per class, label or target otherwise."""
        return 1 if self.task == "binary" else len(self.classes)

    def lengths(self) -> Int[Tensor, "items"]:
        """Number of tokens of each item."""
        if isinstance(self.x, Bags):
            return self.x.lengths()
        return torch.full((len(self),), self.x.shape[1])

    def indices(self, split: Split) -> Int[Tensor, "chosen"]:
        """Numbers of the items of one split."""
        return (self.split == SPLITS.index(split)).nonzero().squeeze(1)

    def item(self, index: int) -> Float[Tensor, "tokens dim"]:
        """Tokens of one item, without a copy."""
        return self.x[index]

    def copies(self, index: int, count: int = 1) -> Tensor | Bags:
        """One item, so many times, in float32: what a probe takes."""
        item = self.item(index).float()
        return item.expand(count, *item.shape).contiguous()

    def batch(
        self, items: Int[Tensor, "chosen"]
    ) -> tuple[Float[Tensor, "chosen tokens dim"], Bool[Tensor, "chosen tokens"] | None]:
        """`(x, mask)` of some items; the mask is `None` where nothing is padded, and a single item is not copied."""
        if not isinstance(self.x, Bags):
            return self.x[items], None
        if len(items) == 1:
            return self.x[int(items[0])].unsqueeze(0), None
        # the edges of graphs stay behind: what takes padded sets ignores them
        x, mask = Bags.select(self.x, items).to_padded()
        return x, None if bool(mask.all()) else mask

    def graphs(self, items: Int[Tensor, "chosen"]) -> Graphs:
        """Some items with the edges between their tokens.

        Raises:
            InputError: where there are no edges.
        """
        if not isinstance(self.x, Graphs):
            raise InputError(f"{self.name}: has no edges between tokens")
        return self.x.select(items)

    def nbytes(self) -> int:
        """Bytes of the token features."""
        values = self.x.values if isinstance(self.x, Bags) else self.x
        return values.numel() * values.element_size()

    def fingerprint(self) -> str:
        """SHA-256 over features, targets, ids, groups and split: the same data give the same text."""
        digest = hashlib.sha256()
        edges = (self.x.edge_index, self.x.edge_attr) if isinstance(self.x, Graphs) else ()
        values, lengths = (self.x.values, self.x.offsets) if isinstance(self.x, Bags) else (self.x, self.lengths())
        for tensor in (values, lengths, self.y, self.split, *edges):
            if tensor is not None:
                digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        text = "\n".join((*self.ids, *self.classes, *(self.groups or ()), self.task, str(self.prefix_tokens)))
        digest.update(text.encode())
        return digest.hexdigest()

    def with_split(self, split: Sequence[int] | Tensor) -> TokenDataset:
        """The same items under another split."""
        return replace(self, split=torch.as_tensor(split, dtype=torch.int64))
