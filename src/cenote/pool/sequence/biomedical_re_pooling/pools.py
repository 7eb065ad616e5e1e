"""Poolings for relation extraction: over the mentions, over the pieces between them, along the dependency tree.

Source: "On the Effectiveness of the Pooling Methods for Biomedical Relation Extraction with Deep Learning", LOUHI 2019.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.masks import real_tokens
from cenote.core.requirements import require_at_least, require_one_of
from cenote.core.sets import PaddedTokens, as_tokens
from cenote.pool.attention.abmil import ABMIL
from cenote.pool.base import Pool
from cenote.pool.basic.last import LastPool
from cenote.pool.basic.max import MaxPool
from cenote.pool.basic.mean import MeanPool
from cenote.pool.sequence.dependency_trees import Trees, span_mask

Reduce = Literal["max", "mean", "attention", "last"]


class RelationPooled(NamedTuple):
    """What a pool of index sets returns.

    Attributes:
        output: `[batch, parts * dim]`; a part whose set is empty is zero.
        weights: `[batch, parts, tokens]`, what each part took from each word.
        sets: `[batch, parts, tokens]`, the words of each part.
        fallback: `[batch]`, True where the tree could not be used and the whole sentence stood in for it.
    """

    output: Float[Tensor, "batch out_dim"]
    weights: Float[Tensor, "batch parts tokens"]
    sets: Bool[Tensor, "batch parts tokens"]
    fallback: Bool[Tensor, "batch"]

    @property
    def empty(self) -> Bool[Tensor, "batch parts"]:
        """Which parts have no word and so are zero."""
        return ~self.sets.any(-1)


class RelationSentences(NamedTuple):
    """What chooses the sets.

    Attributes:
        subject, object_: `[batch, 2]`, the spans `[start, end)` of the mentions.
        heads: `[batch, tokens]`, of each word the index of its head, or `None`.
        real: `[batch, tokens]`, True on real words.
    """

    subject: Int[Tensor, "batch 2"]
    object_: Int[Tensor, "batch 2"]
    heads: Int[Tensor, "batch tokens"] | None
    real: Bool[Tensor, "batch tokens"]

    def mentions(self) -> list[Bool[Tensor, "batch tokens"]]:
        """The words of the subject, and those of the object."""
        return [span_mask(self.subject, self.real), span_mask(self.object_, self.real)]

    def trees(self) -> Trees:
        """Those of the sentences.

        Raises:
            InputError: where no heads were given.
        """
        if self.heads is None:
            raise InputError("heads: this pooling needs the head of each word; read_conllu reads them from a file")
        return Trees(self.heads, self.real & (self.heads >= -1))


IndexSets = tuple[list[Bool[Tensor, "batch tokens"]], Bool[Tensor, "batch"]]


class IndexSetPool(nn.Module, ABC):
    """Base of the pools `y = [P(S_1) ; ... ; P(S_k)]` over sets of words that two mentions and a tree choose.

    `P(S)_c = max_{n in S} x_nc`, or the mean, or additive attention, or the last word; 0 where `S` is empty.

    Args:
        dim: width of a word.
        parts: number of sets.
        reduce: `"max"`, `"mean"`, `"last"` or `"attention"` (`softmax_n(w . tanh(V x_n + b))`, shared by the parts).
        hidden: width of the attention.

    Attributes:
        out_dim: `parts * dim`.

    Note:
        The paper's body was not available to us: names and forms of the sets are a reconstruction from its abstract and from
        the literature around it.
    """

    def __init__(self, dim: int, parts: int, reduce: Reduce = "max", hidden: int = 64) -> None:
        super().__init__()
        require_at_least(1, dim=dim)
        reductions: dict[str, type[Pool]] = {"max": MaxPool, "mean": MeanPool, "last": LastPool}
        require_one_of((*reductions, "attention"), reduce=reduce)
        self.dim = dim
        self.parts = parts
        self.out_dim = parts * dim
        self.reduce: Pool = ABMIL(dim, hidden, gated=False) if reduce == "attention" else reductions[reduce](dim)

    @abstractmethod
    def index_sets(self, sentences: RelationSentences) -> IndexSets:
        """`(the words of each part, where the whole sentence stood in)`."""

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        subject: Int[Tensor, "batch 2"],
        object_: Int[Tensor, "batch 2"],
        heads: Int[Tensor, "batch tokens"] | None = None,
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch out_dim"]:
        """Pool the words `x`.

        `subject` and `object_` are the spans `[start, end)` of the mentions; `heads` of each word the index of its head (-1:
        root, -2: padding), which the poolings without a tree ignore; `mask` is True on real words.
        """
        each, sets, _ = self._sets(x, subject, object_, heads, mask)
        return self.reduce(each).unflatten(0, sets.shape[:2]).flatten(1)

    def attend(
        self,
        x: Float[Tensor, "batch tokens dim"],
        subject: Int[Tensor, "batch 2"],
        object_: Int[Tensor, "batch 2"],
        heads: Int[Tensor, "batch tokens"] | None = None,
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> RelationPooled:
        """As calling the pool, and also the sets, the weights and where a tree was unusable."""
        each, sets, fallback = self._sets(x, subject, object_, heads, mask)
        if x.shape[1] == 0:
            return RelationPooled(x.new_zeros((x.shape[0], self.out_dim)), x.new_zeros(sets.shape), sets, fallback)
        output, weights = self.reduce.attend(each)
        assert weights is not None
        output, by_part = output.unflatten(0, sets.shape[:2]), weights.squeeze(1).unflatten(0, sets.shape[:2])
        return RelationPooled(output.flatten(1), by_part, sets, fallback)

    def _sets(
        self,
        x: Float[Tensor, "batch tokens dim"],
        subject: Int[Tensor, "batch 2"],
        object_: Int[Tensor, "batch 2"],
        heads: Int[Tensor, "batch tokens"] | None,
        mask: Bool[Tensor, "batch tokens"] | None,
    ) -> tuple[PaddedTokens, Bool[Tensor, "batch parts tokens"], Bool[Tensor, "batch"]]:
        """Every part as a set of its own, `batch * parts` of them; the words of each; where the whole sentence stood in."""
        tokens = as_tokens(x, mask, self.dim)
        if not isinstance(tokens, PaddedTokens) or x.dim() != 3:
            raise InputError("x: expected [batch, tokens, dim]; mentions are positions in a padded batch")
        for name, span in (("subject", subject), ("object_", object_)):
            _require_span(name, span, x)
        if heads is not None and heads.shape != x.shape[:2]:
            raise InputError(f"heads: expected shape {tuple(x.shape[:2])} to match x, got {tuple(heads.shape)}")
        real = real_tokens(x, mask)
        if x.shape[1] == 0:
            sets, fallback = real.unsqueeze(1).expand(-1, self.parts, -1), real.new_ones(x.shape[0])
        else:
            parts, fallback = self.index_sets(RelationSentences(subject, object_, heads, real))
            sets = torch.stack(parts, 1)
        return PaddedTokens(tokens.values.repeat_interleave(self.parts, 0), sets.flatten(0, 1)), sets, fallback


class SentencePool(IndexSetPool):
    """The whole sentence: SENT-MAX, SENT-MEAN, SENT-ATT or LAST, called as the poolings that look at the mentions.

    `P(all)`

    Args:
        dim: width of a word.
        reduce: `"max"`, `"mean"`, `"attention"`, or `"last"` for the state of the last word.
        hidden: width of the attention.

    Example:
        >>> subject, object_ = torch.tensor([[0, 2]]), torch.tensor([[4, 5]])
        >>> SentencePool(8, "mean")(torch.randn(1, 6, 8), subject, object_).shape
        torch.Size([1, 8])

    Source: "On the Effectiveness of the Pooling Methods for Biomedical Relation Extraction with Deep Learning", LOUHI 2019.
    """

    def __init__(self, dim: int, reduce: Reduce = "max", hidden: int = 64) -> None:
        super().__init__(dim, 1, reduce, hidden)

    def index_sets(self, sentences: RelationSentences) -> IndexSets:
        return [sentences.real], torch.zeros_like(sentences.real[:, 0])


class EntityPool(IndexSetPool):
    """The mentions, and with them the whole sentence.

    ENT-SENT: `[P(subject) ; P(object) ; P(all)]`; ENT-ONLY: without the last.

    Args:
        dim: width of a word.
        sentence: whether the whole sentence is the third part.
        head_word: whether of each mention only its head word counts, for which trees must be given.
        reduce: `"max"`, `"mean"`, `"last"` or `"attention"`.
        hidden: width of the attention.

    Example:
        >>> subject, object_ = torch.tensor([[0, 2]]), torch.tensor([[4, 5]])
        >>> EntityPool(8)(torch.randn(1, 6, 8), subject, object_).shape
        torch.Size([1, 24])

    Source: "On the Effectiveness of the Pooling Methods for Biomedical Relation Extraction with Deep Learning", LOUHI 2019.
    """

    def __init__(
        self, dim: int, sentence: bool = True, reduce: Reduce = "max", hidden: int = 64, head_word: bool = False
    ) -> None:
        super().__init__(dim, 3 if sentence else 2, reduce, hidden)
        self.sentence = sentence
        self.head_word = head_word

    def index_sets(self, sentences: RelationSentences) -> IndexSets:
        mentions, real = sentences.mentions(), sentences.real
        if self.head_word:
            trees, slots = sentences.trees(), torch.arange(real.shape[1], device=real.device)
            heads = [trees.head_word(span).unsqueeze(1) for span in (sentences.subject, sentences.object_)]
            mentions = [mention & (slots == head) for mention, head in zip(mentions, heads, strict=True)]
        return [*mentions, real] if self.sentence else mentions, torch.zeros_like(real[:, 0])


class DynamicPool(IndexSetPool):
    """The sentence cut by the two mentions, whichever comes first (ENT-DYM).

    Three pieces: `[P(up to the first mention's end) ; P(from the first mention to the second, both included) ; P(from the
    second mention on)]`; five: `[P(before) ; P(first) ; P(between) ; P(second) ; P(after)]`.

    Args:
        dim: width of a word.
        pieces: 3, or 5 with the mentions apart.
        reduce: `"max"`, `"mean"`, `"last"` or `"attention"`.
        hidden: width of the attention.

    Example:
        >>> subject, object_ = torch.tensor([[0, 2]]), torch.tensor([[4, 5]])
        >>> DynamicPool(8)(torch.randn(1, 6, 8), subject, object_).shape
        torch.Size([1, 24])

    Source: "On the Effectiveness of the Pooling Methods for Biomedical Relation Extraction with Deep Learning", LOUHI 2019.
    """

    def __init__(self, dim: int, pieces: Literal[3, 5] = 3, reduce: Reduce = "max", hidden: int = 64) -> None:
        require_one_of((3, 5), pieces=pieces)
        super().__init__(dim, pieces, reduce, hidden)

    def index_sets(self, sentences: RelationSentences) -> IndexSets:
        subject, object_, _, real = sentences
        subject_first = (subject[:, :1] < object_[:, :1]) | (
            (subject[:, :1] == object_[:, :1]) & (subject[:, 1:] <= object_[:, 1:])
        )
        first, second = torch.where(subject_first, subject, object_), torch.where(subject_first, object_, subject)
        start, end = torch.zeros_like(first[:, 0]), torch.full_like(first[:, 0], real.shape[1])
        if self.parts == 3:
            cuts = [(start, first[:, 1]), (first[:, 0], second[:, 1]), (second[:, 0], end)]
        else:
            after = torch.maximum(first[:, 1], second[:, 1])
            cuts = [
                (start, first[:, 0]),
                (first[:, 0], first[:, 1]),
                (first[:, 1], second[:, 0]),
                (second[:, 0], second[:, 1]),
                (after, end),
            ]
        return [span_mask(torch.stack(cut, 1), real) for cut in cuts], torch.zeros_like(real[:, 0])


class DependencyPool(IndexSetPool):
    """The mentions and the words around the way between them in the dependency tree (ENT-DEPk, DEPk).

    `[P(subject) ; P(object) ; P(D_k)]`, with `D_k` the words at most `k` steps from the shortest path between the head words of
    the two mentions, or all words below the lowest word that is above both.

    Args:
        dim: width of a word.
        k: steps from the path; `None`: the subtree below the meeting point of the mentions.
        entities: whether the mentions are parts of their own.
        reduce: `"max"`, `"mean"`, `"last"` or `"attention"`.
        hidden: width of the attention.

    Example:
        >>> chain = torch.tensor([[-1, 0, 1, 2, 3, 4]])
        >>> subject, object_ = torch.tensor([[1, 2]]), torch.tensor([[4, 5]])
        >>> pooled = DependencyPool(8).attend(torch.randn(1, 6, 8), subject, object_, chain)
        >>> pooled.sets[0, 2].tolist()
        [False, True, True, True, True, False]

    Source: "On the Effectiveness of the Pooling Methods for Biomedical Relation Extraction with Deep Learning", LOUHI 2019.

    Note:
        Roots after the first hang on the first. Where a mention is empty or its head word lies on a cycle, the whole sentence
        stands in for `D_k`, and `attend(...).fallback` says so.
    """

    def __init__(
        self, dim: int, k: int | None = 0, entities: bool = True, reduce: Reduce = "max", hidden: int = 64
    ) -> None:
        if k is not None and k < 0:
            raise InputError(f"k: expected a number of steps or None, got {k}")
        super().__init__(dim, 3 if entities else 1, reduce, hidden)
        self.k = k
        self.entities = entities

    def index_sets(self, sentences: RelationSentences) -> IndexSets:
        subject, object_, _, real = sentences
        trees = sentences.trees()
        mentions = sentences.mentions()
        a, b = trees.head_word(subject), trees.head_word(object_)
        chosen = trees.below(trees.meeting(a, b)) if self.k is None else trees.near(trees.path(a, b), self.k)
        fallback = ~(trees.connected(a, b) & mentions[0].any(1) & mentions[1].any(1))
        chosen = torch.where(fallback.unsqueeze(1), real, chosen)
        return [*mentions, chosen] if self.entities else [chosen], fallback


def _require_span(name: str, span: Tensor, x: Tensor) -> None:
    if span.shape != (x.shape[0], 2) or span.is_floating_point() or span.dtype == torch.bool:
        raise InputError(
            f"{name}: expected integer spans [start, end) of shape {(x.shape[0], 2)}, "
            f"got {span.dtype} of shape {tuple(span.shape)}"
        )
    if torch.compiler.is_compiling() or not span.numel():
        return
    low, high = int(span.min()), int(span.max())
    if low < 0 or high > x.shape[1] or bool((span[:, 0] > span[:, 1]).any()):
        raise InputError(f"{name}: expected 0 <= start <= end <= {x.shape[1]}, got numbers from {low} to {high}")
