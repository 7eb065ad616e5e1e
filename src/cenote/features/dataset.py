"""Labelled token features: what `cenote probe` trains on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from cenote.core import Bags, InputError
from cenote.core.graphs import Graphs
from cenote.features.origin import Origin
from cenote.features.tokens import Features, TokenSource, as_source, stacked

Task = Literal["binary", "multiclass", "multilabel", "regression"]
Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


@runtime_checkable
class Pictures(Protocol):
    """A picture per item, `[height, width]` or `[height, width, 3]`, read when asked for; `None` where there is none."""

    def __len__(self) -> int: ...

    def __getitem__(self, item: int, /) -> NDArray[np.uint8] | None: ...


@dataclass(frozen=True)
class TokenDataset:
    """Items with token features and a target.

    It holds what is known of the items. Everything about their tokens is asked of one `TokenSource`; the same items with one
    of several layers, with some of them or with edges are the same data with another source.

    Attributes:
        name: for people.
        x: the tokens: `[items, tokens, dim]`, or `Bags` where the items have different numbers of tokens. Never both padded and
            ragged: readers turn padding into `Bags`. `Graphs` where edges join the tokens. float32, float16 or bfloat16.
            Or any `cenote.features.tokens.TokenSource`: several layers, a feature store.
        y: binary and multiclass: int64 `[items]`, numbers of `classes`; multilabel: float32 `[items, labels]` of 0 and 1;
            regression: float32 `[items, targets]`.
        task: what kind of target `y` is.
        classes: names of the classes, labels or regression targets.
        ids: a unique name per item, used in messages, predictions and pictures.
        split: per item 0 = train, 1 = validation, 2 = test (the order of `SPLITS`).
        groups: per item the patient, speaker, ... that must not stand on two sides of a split; `None`: every item is its own.
        prefix_tokens: how many leading tokens are [CLS] and registers rather than patches.
        grid: `(height, width)` of the patch tokens where they form one, row by row.
        images: `[items, height, width]` or `[items, height, width, 3]` uint8, what the tokens came from, for pictures; of a
            feature store, `StoredPictures`.
        words: per item what its tokens stand for, where they are texts (see `cenote.features.store.words`).
        token_labels: one label per token (`[items, tokens]` or `[total]`), where known (instance labels of bags).
        source: where it was read from, for provenance.
        cautions: what the reader noticed that a person should know.
        split_seed: of a split that was made here, so that others may be made as well; `None`: it was given.
        origin: which model made the tokens, where that is known.

    Raises:
        InputError: where tokens, targets, ids and split are not of equally many items.
    """

    name: str
    x: Features
    y: Tensor
    task: Task
    classes: tuple[str, ...]
    ids: tuple[str, ...]
    split: Int[Tensor, "items"]
    groups: tuple[str, ...] | None = None
    prefix_tokens: int = 0
    grid: tuple[int, int] | None = None
    images: NDArray[np.uint8] | Pictures | None = None
    words: Any = None
    token_labels: Tensor | None = None
    source: str = ""
    cautions: tuple[str, ...] = ()
    split_seed: int | None = None
    origin: Origin | None = None

    def __post_init__(self) -> None:
        items = len(self.token_source)
        for argument, held in (("ids", self.ids), ("y", self.y), ("split", self.split)):
            if len(held) != items:
                raise InputError(f"{argument}: expected one for each of the {items} items of x, got {len(held)}")

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def token_source(self) -> TokenSource:
        """Where the tokens are."""
        return as_source(self.x)

    @property
    def dim(self) -> int:
        """Width of a token, in one layer."""
        return self.token_source.dim

    @property
    def dtype(self) -> torch.dtype:
        """Type of the token features."""
        return self.token_source.dtype

    @property
    def tokens(self) -> int | None:
        """Tokens per item, prefix included; `None` where items differ."""
        return self.token_source.tokens

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers that an item holds; empty where the data do not say."""
        return self.token_source.layers

    @property
    def has_edges(self) -> bool:
        """Whether items are graphs."""
        return self.token_source.edges() is not None

    @property
    def pads(self) -> bool:
        """Whether a batch of ragged items is padded."""
        return self.token_source.pads

    @property
    def outputs(self) -> int:
        """Width of a classifier for this task: 1 logit for binary, one number per class, label or target otherwise."""
        return 1 if self.task == "binary" else len(self.classes)

    def lengths(self) -> Int[Tensor, "items"]:
        """Number of tokens of each item."""
        return self.token_source.lengths()

    def indices(self, split: Split) -> Int[Tensor, "chosen"]:
        """Numbers of the items of one split."""
        return (self.split == SPLITS.index(split)).nonzero().squeeze(1)

    def item(self, index: int) -> Float[Tensor, "*layers tokens dim"]:
        """Tokens of one item, without a copy where they lie in one piece."""
        return self.token_source.item(index)

    def labels_of(self, index: int) -> Int[Tensor, "tokens"]:
        """Labels of the tokens of one item.

        Raises:
            InputError: where tokens have no labels.
        """
        if self.token_labels is None:
            raise InputError(f"{self.name}: its tokens have no labels")
        if self.token_labels.dim() == 2:
            return self.token_labels[index]
        start = int(self.lengths()[:index].sum())
        return self.token_labels[start : start + int(self.lengths()[index])]

    def copies(self, index: int, count: int = 1) -> Any:
        """One item, so many times, in float32: what a probe takes."""
        return self.token_source.copies(index, count)

    def batch(self, items: Int[Tensor, "chosen"]) -> tuple[Any, Bool[Tensor, "chosen tokens"] | None]:
        """`(x, mask)` of some items; the mask is `None` where nothing is padded.

        `x` is `[chosen, tokens, dim]`, with several layers `[chosen, layers, tokens, dim]`, with edges `Graphs`.
        """
        return self.token_source.batch(items)

    def graphs(self, items: Int[Tensor, "chosen"]) -> Graphs:
        """Some items with the edges between their tokens.

        Raises:
            InputError: where there are no edges.
        """
        graphs: Graphs = self.with_edges().batch(items)[0]
        return graphs

    def nbytes(self) -> int:
        """Bytes of the token features, in memory or on disk."""
        return self.token_source.nbytes()

    def fingerprint(self) -> str:
        """SHA-256 over features, targets, ids, groups and split: the same data give the same text."""
        words = (*self.ids, *self.classes, *(self.groups or ()), self.task, str(self.prefix_tokens))
        return self.token_source.fingerprint((self.y, self.split), words)

    def with_split(self, split: Sequence[int] | Tensor) -> TokenDataset:
        """The same items under another split, which is given."""
        return replace(self, split=torch.as_tensor(split, dtype=torch.int64), split_seed=None)

    def at(self, layer: int) -> TokenDataset:
        """The same items at one of the layers; negative numbers count from the last one.

        Raises:
            InputError: where there is no such layer.
        """
        return replace(self, x=self.token_source.at(layer))

    def only(self, layers: Sequence[int]) -> TokenDataset:
        """The same items with stacks of some of the layers.

        Raises:
            InputError: where one of them is not there.
        """
        if self.layers and tuple(layers) == self.layers:
            return self
        return replace(self, x=self.token_source.only(layers))

    def with_edges(self) -> TokenDataset:
        """The same items as graph pools read them: batches are `Graphs`.

        Raises:
            InputError: where there are no edges.
        """
        return replace(self, x=self.token_source.with_edges())

    def in_memory(self) -> TokenDataset:
        """The same items with all tokens in memory.

        Raises:
            InputError: where they are on disk, in several layers.
        """
        return replace(self, x=self.token_source.in_memory())


def require_data(data: object) -> None:
    """Raise `InputError` unless these are labelled token features.

    >>> require_data("digits")
    Traceback (most recent call last):
    cenote.core.errors.InputError: data: expected a TokenDataset, got str; cenote.features.read makes one of a file or folder
    """
    if isinstance(data, TokenDataset):
        return
    how = "cenote.features.read makes one of a file or folder"
    if not isinstance(data, str):
        how = f"cenote.Dataset.from_arrays(x, y) makes one of arrays, {how}"
    raise InputError(f"data: expected a TokenDataset, got {type(data).__name__}; {how}")


def LayeredDataset(name: str, x: Tensor | Bags, *known: Any, layers: Sequence[int] = (), **more: Any) -> TokenDataset:
    """A `TokenDataset` with several layers in memory.

    Args:
        name: for people.
        x: `[items, layers, tokens, dim]`, or `Bags` of width `layers * dim`, the layers of a token side by side, where items
            have different numbers of tokens.
        known: the other arguments of `TokenDataset`, in its order.
        layers: numbers of the layers, rising; 0 stands for the embeddings.
        more: the other arguments of `TokenDataset`, by name.

    Raises:
        InputError: where the numbers do not fit `x`.

    Example:
        >>> from cenote.features import digits
        >>> d = digits()
        >>> stack = torch.stack([d.x, d.x + 1], 1)
        >>> both = LayeredDataset("two", stack, d.y, d.task, d.classes, d.ids, d.split, layers=(5, 6))
        >>> both.batch(torch.tensor([0, 3]))[0].shape, both.at(6).x.shape
        (torch.Size([2, 2, 17, 64]), torch.Size([1797, 17, 64]))
    """
    return TokenDataset(name, stacked(x, layers), *known, **more)
