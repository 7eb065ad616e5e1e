"""Cross-attention over several memories, a text and an image for instance, and the imagination that needs no second one.

Source: Helcl, Libovicky, Varis, "CUNI System for the WMT18 Multimodal Translation Task", WMT 2018.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core.attention import cross_attention
from cenote.core.errors import InputError
from cenote.core.masks import real_tokens
from cenote.core.requirements import require_at_least, require_one_of, require_rate
from cenote.core.sets import PaddedTokens
from cenote.core.widths import require_divides

Masks = Sequence[Bool[Tensor, "batch tokens"] | None]


class Kept(NamedTuple):
    """A memory whose keys and values one attention has made, for as many queries as will come.

    Attributes:
        keys: with the mask of the memory.
        values: `[batch, tokens, dim]`.
    """

    keys: PaddedTokens
    values: Float[Tensor, "batch tokens dim"]

    @property
    def mask(self) -> Bool[Tensor, "batch tokens"] | None:
        """True on real slots; `None` where all are."""
        return self.keys.mask

    def repeated(self, times: int) -> Kept:
        """Each item of the batch so many times, one after the other."""
        keys, values = (t.repeat_interleave(times, 0) for t in (self.keys.values, self.values))
        mask = None if self.mask is None else self.mask.repeat_interleave(times, 0)
        return Kept(PaddedTokens(keys, mask), values)


Seen = PaddedTokens | Kept


class KeptMemories(NamedTuple):
    """What a layer keeps of its memories while words come one after the other; see `Memories.keep`.

    Attributes:
        kept: one for each attention of the layer that reads memories.
        sizes: slots of each memory.
    """

    kept: tuple[Kept, ...]
    sizes: tuple[int, ...]

    def repeated(self, times: int) -> KeptMemories:
        """Each item of the batch so many times, one after the other: for the hypotheses of a beam."""
        return self._replace(kept=tuple(kept.repeated(times) for kept in self.kept))


class MemoriesAttended(NamedTuple):
    """What attention over several memories returns.

    Attributes:
        output: `[batch, queries, dim]`.
        weights: per memory `[batch, heads, queries, tokens]`. Those of `FlatMemories` sum to 1 over all memories together,
            those of the others over each.
        shares: `[batch, heads, queries, memories]`, what `HierarchicalMemories` takes from each memory; else `None`.
    """

    output: Float[Tensor, "batch queries dim"]
    weights: tuple[Float[Tensor, "batch heads queries tokens"], ...]
    shares: Float[Tensor, "batch heads queries memories"] | None = None


class MemoryAttention(nn.Module):
    """Multi-head attention of queries over one memory; with one head there are no projections at all.

    `y = W_o [softmax_n(W_q q . W_k m_n / sqrt(dim/heads)) W_v m_n]` per head.

    Args:
        dim: width of queries and memory.
        heads: number of heads; divides `dim`.
        bias: whether the four maps have biases.
        dropout: of the weights.

    Note:
        A memory without real slots gives zeros; the authors' code gives the mean of its padding.
    """

    def __init__(self, dim: int, heads: int = 16, bias: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        require_divides("heads", heads, dim)
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.to_out = (
            nn.Linear(dim, dim, bias=bias) if heads > 1 else None for _ in range(4)
        )
        for map_ in (self.to_q, self.to_k, self.to_v, self.to_out):
            if map_ is not None:
                nn.init.xavier_uniform_(map_.weight)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        query: Float[Tensor, "batch queries dim"],
        memory: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> tuple[Float[Tensor, "batch queries dim"], Float[Tensor, "batch heads queries tokens"]]:
        """`(y, weights)`; `mask` is True on real slots."""
        return self.read(query, PaddedTokens(memory, mask))

    def keep(self, tokens: PaddedTokens) -> Kept:
        """Keys and values of a memory, made once."""
        keys, values = (tokens.values if m is None else m(tokens.values) for m in (self.to_k, self.to_v))
        return Kept(PaddedTokens(keys, tokens.mask), values)

    def read(
        self, query: Float[Tensor, "batch queries dim"], memory: Seen
    ) -> tuple[Float[Tensor, "batch queries dim"], Float[Tensor, "batch heads queries tokens"]]:
        """`(y, weights)` of a memory as it is, or as it was kept."""
        q = query if self.to_q is None else self.to_q(query)
        output, weights = self._by_head(q, memory) if isinstance(memory, Kept) else self._absorbed(q, memory)
        if self.to_out is not None:
            # the bias too belongs to a memory that is there
            lengths = (memory.keys if isinstance(memory, Kept) else memory).lengths()
            output = self.to_out(output).masked_fill((lengths == 0).view(-1, 1, 1), 0)
        return output, weights

    def _absorbed(self, q: Float[Tensor, "batch queries dim"], tokens: PaddedTokens) -> tuple[Tensor, Tensor]:
        output, weights = cross_attention(
            tokens,
            q,
            key=self.to_k,
            value=self.to_v,
            heads=self.heads,
            map_weights=self.dropout,
        )
        return output, weights.transpose(1, 2).unflatten(1, (self.heads, q.shape[1]))

    def _by_head(self, q: Float[Tensor, "batch queries dim"], kept: Kept) -> tuple[Tensor, Tensor]:
        q, keys, values = (split_heads(t, self.heads) for t in (q, kept.keys.values, kept.values))
        scores = (q * q.shape[-1] ** -0.5) @ keys.mT
        weights = kept.keys.softmax(scores.flatten(1, 2).transpose(1, 2))
        weights = weights.transpose(1, 2).unflatten(1, scores.shape[1:3])
        return (self.dropout(weights) @ values).transpose(1, 2).flatten(2), weights


def split_heads(t: Float[Tensor, "batch tokens dim"], heads: int) -> Float[Tensor, "batch heads tokens head_dim"]:
    """What each head owns."""
    return t.unflatten(-1, (heads, -1)).transpose(1, 2)


class Memories(nn.Module, ABC):
    """Base of the sub-layers that attend to several memories: pre-norm, residual, dropout on what is added.

    Args:
        dim: width of queries and of every memory.
        memories: number of memories.
        heads: attention heads, one number for all memories or one for each.
        bias: whether the maps of the attention have biases.
        dropout: of the weights and of what is added.
        eps: of the layer norms.

    Attributes:
        out_dim: `dim`.
    """

    def __init__(
        self,
        dim: int,
        memories: int = 2,
        heads: int | Sequence[int] = 16,
        bias: bool = False,
        dropout: float = 0.0,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        require_at_least(1, memories=memories)
        self.head_counts = [heads] * memories if isinstance(heads, int) else list(heads)
        if len(self.head_counts) != memories:
            raise InputError(f"heads: expected one number or {memories}, one per memory, got {len(self.head_counts)}")
        require_rate(dropout=dropout)
        self.dim = self.out_dim = dim
        self.memories = memories
        self.bias = bias
        self.eps = eps
        self.dropout = nn.Dropout(dropout)
        self.build()

    @abstractmethod
    def build(self) -> None:
        """Make the parts of the layer, once its settings are known."""

    def attention(self, heads: int) -> MemoryAttention:
        """A new attention with the settings of this layer."""
        return MemoryAttention(self.dim, heads, self.bias, self.dropout.p)

    def norm_layer(self) -> nn.LayerNorm:
        """A new layer norm with the settings of this layer."""
        return nn.LayerNorm(self.dim, eps=self.eps)

    def forward(
        self,
        queries: Float[Tensor, "batch queries dim"],
        memories: Sequence[Float[Tensor, "batch _ dim"]],
        masks: Masks | None = None,
    ) -> Float[Tensor, "batch queries dim"]:
        """Attend from `queries` to each of `memories`; `masks`, one per memory or `None`, are True on real slots."""
        return self.attend(queries, memories, masks).output

    def attend(
        self,
        queries: Float[Tensor, "batch queries dim"],
        memories: Sequence[Float[Tensor, "batch _ dim"]] | KeptMemories,
        masks: Masks | None = None,
    ) -> MemoriesAttended:
        """As calling the layer, and also the weights on each memory; memories may be kept ones."""
        if queries.dim() != 3 or queries.shape[-1] != self.dim:
            raise InputError(f"queries: expected [batch, queries, {self.dim}], got shape {tuple(queries.shape)}")
        if isinstance(memories, KeptMemories):
            return self.combine(queries, memories.kept, memories.sizes)
        given = self._checked(queries.shape[0], memories, masks)
        return self.combine(queries, self.seen(given), [tokens.values.shape[1] for tokens in given])

    def keep(self, memories: Sequence[Float[Tensor, "batch _ dim"]], masks: Masks | None = None) -> KeptMemories:
        """What all later queries need of the memories: keys and values, made once. `attend` takes them in their place."""
        batch = 0 if isinstance(memories, Tensor) or not len(memories) else memories[0].shape[0]
        given = self._checked(batch, memories, masks)
        pairs = zip(self.readers(), self.seen(given), strict=True)
        return KeptMemories(tuple(r.keep(t) for r, t in pairs), tuple(t.values.shape[1] for t in given))

    def seen(self, memories: Sequence[PaddedTokens]) -> Sequence[PaddedTokens]:
        """What each of `readers` reads."""
        return memories

    @abstractmethod
    def readers(self) -> Sequence[MemoryAttention]:
        """The attentions that read memories."""

    def _checked(self, batch: int, memories: Sequence[Tensor], masks: Masks | None) -> list[PaddedTokens]:
        if isinstance(memories, Tensor) or len(memories) != self.memories:
            got = "one tensor" if isinstance(memories, Tensor) else f"{len(memories)} memories"
            raise InputError(f"memories: expected a list of {self.memories}, got {got}")
        given: list[Tensor | None] = [None] * self.memories if masks is None else list(masks)
        if len(given) != self.memories:
            raise InputError(
                f"masks: expected {self.memories}, one per memory, None where all is real, got {len(given)}"
            )
        for i, (memory, mask) in enumerate(zip(memories, given, strict=True)):
            if memory.dim() != 3 or memory.shape[0] != batch or memory.shape[-1] != self.dim:
                raise InputError(
                    f"memories: expected [{batch}, tokens, {self.dim}], got shape {tuple(memory.shape)} in "
                    f"memory {i}; ImageMemory brings another width to dim"
                )
            if mask is not None and (mask.dtype != torch.bool or mask.shape != memory.shape[:2]):
                raise InputError(
                    f"masks: expected bool of shape {tuple(memory.shape[:2])} for memory {i}, "
                    f"got {mask.dtype} of shape {tuple(mask.shape)}"
                )
        return [PaddedTokens(memory, mask) for memory, mask in zip(memories, given, strict=True)]

    @abstractmethod
    def combine(
        self, queries: Float[Tensor, "batch queries dim"], memories: Sequence[Seen], sizes: Sequence[int]
    ) -> MemoriesAttended:
        """`attend` on checked input: what each of `readers` reads, and the slots of each memory."""


class SerialMemories(Memories):
    """One memory after the other, each asked by what the queries have become: the rule of the submission.

    `c_0 = q`, `c_i = c_{i-1} + dropout(attention_i(LN_i(c_{i-1}), M_i))`, the output is the last `c`.

    Args:
        dim: width of queries and of every memory.
        memories: number of memories.
        heads: attention heads, one number for all memories or one for each.
        bias: whether the maps of the attention have biases.
        dropout: of the weights and of what is added.
        eps: of the layer norms.

    Example:
        >>> text, image = torch.randn(2, 7, 8), torch.randn(2, 64, 8)
        >>> SerialMemories(8, heads=2)(torch.randn(2, 3, 8), [text, image]).shape
        torch.Size([2, 3, 8])

    Source: Helcl, Libovicky, Varis, "CUNI System for the WMT18 Multimodal Translation Task", WMT 2018.
    """

    def build(self) -> None:
        self.norms = nn.ModuleList(self.norm_layer() for _ in self.head_counts)
        self.attentions = nn.ModuleList(self.attention(h) for h in self.head_counts)

    def readers(self) -> Sequence[MemoryAttention]:
        return cast(list[MemoryAttention], list(self.attentions))

    def combine(
        self,
        queries: Float[Tensor, "batch queries dim"],
        memories: Sequence[Seen],
        sizes: Sequence[int],  # noqa: ARG002
    ) -> MemoriesAttended:
        c, weights = queries, []
        for norm, attention, memory in zip(self.norms, self.readers(), memories, strict=True):
            found, w = attention.read(norm(c), memory)
            c = c + self.dropout(found)
            weights.append(w)
        return MemoriesAttended(c, tuple(weights))


class ParallelMemories(Memories):
    """All memories asked by the same queries, and what is found added up.

    `y = q + sum_i dropout(attention_i(LN(q), M_i))`

    Args:
        dim, memories, heads, bias, dropout, eps: as of `SerialMemories`.

    Example:
        >>> text, image = torch.randn(2, 7, 8), torch.randn(2, 64, 8)
        >>> ParallelMemories(8, heads=2)(torch.randn(2, 3, 8), [text, image]).shape
        torch.Size([2, 3, 8])

    Source: Helcl, Libovicky, Varis, "CUNI System for the WMT18 Multimodal Translation Task", WMT 2018.
    """

    def build(self) -> None:
        self.norm = self.norm_layer()
        self.attentions = nn.ModuleList(self.attention(h) for h in self.head_counts)

    def readers(self) -> Sequence[MemoryAttention]:
        return cast(list[MemoryAttention], list(self.attentions))

    def combine(
        self,
        queries: Float[Tensor, "batch queries dim"],
        memories: Sequence[Seen],
        sizes: Sequence[int],  # noqa: ARG002
    ) -> MemoriesAttended:
        y, n, weights = queries, self.norm(queries), []
        for attention, memory in zip(self.readers(), memories, strict=True):
            found, w = attention.read(n, memory)
            y = y + self.dropout(found)
            weights.append(w)
        return MemoriesAttended(y, tuple(weights))


class FlatMemories(Memories):
    """One attention over all memories joined, with shared maps.

    `y = q + dropout(attention(LN(q), [M_1; M_2; ...]))`

    Args:
        dim, memories, bias, dropout, eps: as of `SerialMemories`.
        heads: number of attention heads.

    Example:
        >>> text, image = torch.randn(2, 7, 8), torch.randn(2, 64, 8)
        >>> FlatMemories(8, heads=2)(torch.randn(2, 3, 8), [text, image]).shape
        torch.Size([2, 3, 8])

    Source: Helcl, Libovicky, Varis, "CUNI System for the WMT18 Multimodal Translation Task", WMT 2018.
    """

    def build(self) -> None:
        if len(set(self.head_counts)) > 1:
            raise InputError(f"heads: one attention reads all memories, so it has one number, got {self.head_counts}")
        self.norm = self.norm_layer()
        self.joint_attention = self.attention(self.head_counts[0])

    def readers(self) -> Sequence[MemoryAttention]:
        return [self.joint_attention]

    def seen(self, memories: Sequence[PaddedTokens]) -> Sequence[PaddedTokens]:
        real = [real_tokens(tokens.values, tokens.mask) for tokens in memories]
        return [PaddedTokens(torch.cat([tokens.values for tokens in memories], 1), torch.cat(real, 1))]

    def combine(
        self, queries: Float[Tensor, "batch queries dim"], memories: Sequence[Seen], sizes: Sequence[int]
    ) -> MemoriesAttended:
        found, weights = self.joint_attention.read(self.norm(queries), memories[0])
        by_memory = weights.split(list(sizes), -1)
        return MemoriesAttended(queries + self.dropout(found), tuple(by_memory))


class HierarchicalMemories(ParallelMemories):
    """All memories asked by the same queries, then a second attention chooses among what was found.

    `C_i = dropout(attention_i(LN(q), M_i))`, `y = q + dropout(attention_h(LN(q), [C_1; C_2; ...]))`, the second attention for
    each query on its own.

    Args:
        dim, memories, heads, bias, eps: as of `SerialMemories`.
        hierarchical_heads: heads of the second attention; default the first of `heads`. With 1 it has no maps.
        dropout: of the weights, of the `C_i` and of what is added.

    Example:
        >>> text, image = torch.randn(2, 7, 8), torch.randn(2, 64, 8)
        >>> HierarchicalMemories(8, heads=2).attend(torch.randn(2, 3, 8), [text, image]).shares.shape
        torch.Size([2, 2, 3, 2])

    Source: Helcl, Libovicky, Varis, "CUNI System for the WMT18 Multimodal Translation Task", WMT 2018.

    Note:
        A memory without real slots takes no part in the second attention; in the authors' code all take part.
    """

    def __init__(
        self,
        dim: int,
        memories: int = 2,
        heads: int | Sequence[int] = 16,
        hierarchical_heads: int | None = None,
        bias: bool = False,
        dropout: float = 0.0,
        eps: float = 1e-6,
    ) -> None:
        super().__init__(dim, memories, heads, bias, dropout, eps)
        self.choice = self.attention(self.head_counts[0] if hierarchical_heads is None else hierarchical_heads)

    def combine(
        self, queries: Float[Tensor, "batch queries dim"], memories: Sequence[Seen], sizes: Sequence[int]
    ) -> MemoriesAttended:
        n, found, weights, seen = self.norm(queries), [], [], []
        for attention, memory, size in zip(self.readers(), memories, sizes, strict=True):
            c, w = attention.read(n, memory)
            found.append(self.dropout(c))
            weights.append(w)
            real = torch.full((queries.shape[0],), size > 0, device=queries.device)
            seen.append(real if memory.mask is None else memory.mask.any(1))
        batch, positions, _ = queries.shape
        # every query is a set of its own, whose tokens are its contexts
        contexts = torch.stack(found, 2).flatten(0, 1)
        present = torch.stack(seen, 1).repeat_interleave(positions, 0)
        chosen, shares = self.choice(n.flatten(0, 1).unsqueeze(1), contexts, present)
        y = queries + self.dropout(chosen.squeeze(1).unflatten(0, (batch, positions)))
        return MemoriesAttended(y, tuple(weights), shares.squeeze(2).unflatten(0, (batch, positions)).transpose(1, 2))


class ImageMemory(nn.Module):
    """A map of image features as a memory: its positions row by row, brought to the width of the text; all of them real.

    `m_n = W_2 relu(W_1 x_n + b_1) + b_2`

    Args:
        channels: of the map, 2048 for the last convolution of a ResNet-50.
        dim: width of the memory.
        hidden: width between the two maps; default `dim`.

    Example:
        >>> ImageMemory(2048, 16)(torch.randn(2, 2048, 8, 8)).shape
        torch.Size([2, 64, 16])

    Source: Helcl, Libovicky, Varis, "CUNI System for the WMT18 Multimodal Translation Task", WMT 2018.
    """

    def __init__(self, channels: int, dim: int, hidden: int | None = None) -> None:
        super().__init__()
        self.channels = channels
        self.fc1 = nn.Linear(channels, dim if hidden is None else hidden)
        self.fc2 = nn.Linear(self.fc1.out_features, dim)

    def forward(
        self, image: Float[Tensor, "batch channels height width"] | Float[Tensor, "batch tokens channels"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """The memory of a map `[batch, channels, height, width]`, or of patches `[batch, tokens, channels]`."""
        patches = image.flatten(2).transpose(1, 2) if image.dim() == 4 else image
        if patches.dim() != 3 or patches.shape[-1] != self.channels:
            raise InputError(
                f"image: expected [batch, {self.channels}, height, width] or [batch, tokens, {self.channels}], "
                f"got shape {tuple(image.shape)}"
            )
        return self.fc2(F.relu(self.fc1(patches)))


class Imagination(nn.Module):
    """Predicts the vector of the image from the text alone: an auxiliary task in training, left out at test time.

    `v = W_2 tanh(W_1 mean_n h_n + b_1) + b_2`; trained with `imagination_loss` beside the main one.

    Args:
        dim: width of the states of the text encoder.
        image_dim: width of the image vector.
        hidden: width between the two maps; default `image_dim`.
        activation: `"tanh"` or `"relu"`.

    Example:
        >>> Imagination(16, 2048)(torch.randn(2, 7, 16)).shape
        torch.Size([2, 2048])

    Source: Elliott, Kadar, "Imagination Improves Multimodal Translation", IJCNLP 2017; as in Helcl, Libovicky, Varis, "CUNI
    System for the WMT18 Multimodal Translation Task", WMT 2018.

    Note:
        The head's depth and activation are not published with the system's code; these are a reading of Elliott and Kadar.
    """

    def __init__(
        self, dim: int, image_dim: int = 2048, hidden: int | None = None, activation: Literal["tanh", "relu"] = "tanh"
    ) -> None:
        super().__init__()
        require_one_of(("tanh", "relu"), activation=activation)
        self.dim = dim
        self.out_dim = image_dim
        self.activation = activation
        self.fc1 = nn.Linear(dim, image_dim if hidden is None else hidden)
        self.fc2 = nn.Linear(self.fc1.out_features, image_dim)

    def forward(
        self, states: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch image_dim"]:
        """The predicted image vector; `mask` is True on real states."""
        hidden = self.fc1(PaddedTokens(states, mask).mean())
        return self.fc2(torch.tanh(hidden) if self.activation == "tanh" else F.relu(hidden))


def imagination_loss(
    predicted: Float[Tensor, "batch image_dim"],
    image: Float[Tensor, "batch image_dim"],
    margin: float = 0.1,
    reduction: Literal["sum", "mean"] = "sum",
) -> Float[Tensor, ""]:
    """Margin loss: a predicted vector shall be nearer to its own image than to the other images of the batch.

    `L = mean_b sum_{c != b} max(0, margin - cos(p_b, v_b) + cos(p_b, v_c))`, `"mean"`: the mean over `c`.

    Args:
        predicted: `p`, from `Imagination`.
        image: `v`, the vectors of the images.
        margin: by how much nearer.
        reduction: over the other images of the batch.

    Returns:
        The loss; 0 for a batch of one, which has no other images.

    Raises:
        InputError: where shapes differ.

    Example:
        >>> imagination_loss(torch.eye(3), torch.eye(3)).item()
        0.0

    Source: Elliott, Kadar, "Imagination Improves Multimodal Translation", IJCNLP 2017.
    """
    if predicted.dim() != 2 or predicted.shape != image.shape:
        raise InputError(
            f"image: expected [batch, image_dim] as predicted, got {tuple(image.shape)} for {tuple(predicted.shape)}"
        )
    require_one_of(("sum", "mean"), reduction=reduction)
    cosines = F.normalize(predicted, dim=-1) @ F.normalize(image, dim=-1).T
    others = ~torch.eye(len(image), dtype=torch.bool, device=image.device)
    hinge = (margin - cosines.diagonal().unsqueeze(1) + cosines).clamp(min=0) * others
    negatives = max(len(image) - 1, 1) if reduction == "mean" else 1
    return hinge.sum() / (negatives * max(len(image), 1))
