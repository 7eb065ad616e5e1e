"""The whole translator: an encoder of the text, a decoder that attends to text and picture, and imagination beside it.

Source: Helcl, Libovicky, Varis, "CUNI System for the WMT18 Multimodal Translation Task", WMT 2018.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least, require_one_of, require_rate
from cenote.pool.sequence.cuni_multimodal.memories import (
    FlatMemories,
    HierarchicalMemories,
    ImageMemory,
    Imagination,
    KeptMemories,
    Memories,
    MemoryAttention,
    ParallelMemories,
    SerialMemories,
    split_heads,
)
from cenote.pool.sequence.subwords import END, PAD

Rule = Literal["text only", "serial", "parallel", "flat", "hierarchical"]
RULES: dict[Rule, type[Memories]] = {
    "text only": SerialMemories,
    "serial": SerialMemories,
    "parallel": ParallelMemories,
    "flat": FlatMemories,
    "hierarchical": HierarchicalMemories,
}


@dataclass(frozen=True)
class TranslatorConfig:
    """What a translator is built from; the defaults are the sizes of the submission, as far as they are known.

    Attributes:
        vocabulary: number of subwords, shared by both languages.
        rule: how the decoder attends to the picture; `"text only"`: it does not.
        dim: width of all states.
        layers: of the encoder, and of the decoder.
        hidden: width of the feed-forward layers.
        heads: attention heads; must divide `dim`.
        dropout: of embeddings, of weights and of what each sub-layer adds.
        image_channels: width of the vectors of a picture's map; read by the rules that attend to it.
        imagination: width of the vector of a picture that the encoder's states shall predict; `None`: none.
    """

    vocabulary: int
    rule: Rule = "serial"
    dim: int = 512
    layers: int = 6
    hidden: int = 4096
    heads: int = 16
    dropout: float = 0.1
    image_channels: int = 2048
    imagination: int | None = None

    def __post_init__(self) -> None:
        require_one_of(get_args(Rule), rule=self.rule)
        require_at_least(END + 2, vocabulary=self.vocabulary)
        require_at_least(1, dim=self.dim, layers=self.layers, hidden=self.hidden, image_channels=self.image_channels)
        require_rate(dropout=self.dropout)

    @property
    def sees(self) -> bool:
        """Whether the decoder attends to a picture."""
        return self.rule != "text only"


class Encoded(NamedTuple):
    """A source text, read, and the picture that belongs to it.

    Attributes:
        states: `[batch, tokens, dim]`.
        mask: `[batch, tokens]`, True on real subwords.
        image: the memory of the picture, `[batch, patches, dim]`, or `None`.
    """

    states: Float[Tensor, "batch tokens dim"]
    mask: Bool[Tensor, "batch tokens"]
    image: Float[Tensor, "batch patches dim"] | None

    @property
    def memories(self) -> list[Tensor]:
        """The text first, then the picture."""
        return [self.states] if self.image is None else [self.states, self.image]

    @property
    def masks(self) -> list[Tensor | None]:
        """Of each memory; patches are all real."""
        return [self.mask] if self.image is None else [self.mask, None]


class Decoded(NamedTuple):
    """What a decoder makes of a beginning of the target.

    Attributes:
        logits: `[batch, words, vocabulary]`, of the word that follows each.
        text_weights: `[batch, layers, heads, words, tokens]`.
        image_weights: `[batch, layers, heads, words, patches]`, or `None` where no picture is attended to.
    """

    logits: Float[Tensor, "batch words vocabulary"]
    text_weights: Float[Tensor, "batch layers heads words tokens"]
    image_weights: Float[Tensor, "batch layers heads words patches"] | None


class Translator(nn.Module, ABC):
    """Base of translators: shared subword embeddings, an image memory, imagination; encoder and decoder are the subclass's.

    Args:
        config: sizes and rule.

    Attributes:
        imagination: predicts the vector of the picture from the states of the encoder, or `None`.
    """

    def __init__(self, config: TranslatorConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.dim, PAD)
        nn.init.normal_(self.embedding.weight, std=config.dim**-0.5)
        self.image = ImageMemory(config.image_channels, config.dim) if config.sees else None
        self.imagination = None if config.imagination is None else Imagination(config.dim, config.imagination)
        self.dropout = nn.Dropout(config.dropout)
        self.build(config)

    @abstractmethod
    def build(self, config: TranslatorConfig) -> None:
        """Make encoder and decoder."""

    @abstractmethod
    def read(self, source: Int[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"]) -> Tensor:
        """States of the encoder, `[batch, tokens, dim]`."""

    @abstractmethod
    def decode(self, target: Int[Tensor, "batch words"], encoded: Encoded) -> Decoded:
        """Logits of the word that follows each of `target`, which begins with START, and where each looked."""

    @abstractmethod
    def start(self, encoded: Encoded, beam: int) -> Any:
        """What the decoder keeps from word to word, for `beam` hypotheses of each item."""

    @abstractmethod
    def step(self, words: Int[Tensor, "rows"], kept: Any) -> tuple[Float[Tensor, "rows vocabulary"], Any]:
        """Logits of the word that follows, and what to keep."""

    @abstractmethod
    def chosen(self, kept: Any, rows: Int[Tensor, "rows"]) -> Any:
        """What is kept, of these rows."""

    def encode(self, source: Int[Tensor, "batch tokens"], image: Tensor | None = None) -> Encoded:
        """Read the source.

        Args:
            source: subwords, 0 behind the end of a text.
            image: maps `[batch, channels, height, width]` or patches `[batch, patches, channels]`; where the rule is
                `"text only"` there is none.

        Raises:
            InputError: where the picture is missing, or not wanted.
        """
        if source.dim() != 2 or source.is_floating_point():
            raise InputError(f"source: expected subwords [batch, tokens], got {source.dtype} {tuple(source.shape)}")
        if (image is None) == self.config.sees:
            needed = "a picture for each text" if self.config.sees else "no picture"
            raise InputError(f"image: a translator with rule {self.config.rule!r} takes {needed}")
        if image is not None and len(image) != len(source):
            raise InputError(f"image: expected {len(source)} pictures, one for each text, got {len(image)}")
        mask = source != PAD
        memory = None if image is None or self.image is None else self.image(image)
        return Encoded(self.read(source, mask), mask, memory)

    def forward(
        self, source: Int[Tensor, "batch tokens"], target: Int[Tensor, "batch words"], image: Tensor | None = None
    ) -> Float[Tensor, "batch words vocabulary"]:
        """Logits of the word that follows each word of `target`, which begins with START."""
        return self.decode(target, self.encode(source, image)).logits

    def imagined(self, encoded: Encoded) -> Float[Tensor, "batch image_dim"]:
        """The vector of the picture, as the text alone predicts it.

        Raises:
            InputError: where the translator has no imagination.
        """
        if self.imagination is None:
            raise InputError(
                "imagination: this translator has none; give TranslatorConfig(imagination=width of the vector)"
            )
        return self.imagination(encoded.states, encoded.mask)

    def logits(self, states: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows vocabulary"]:
        """Scores of the subwords, by the embeddings themselves."""
        return F.linear(states, self.embedding.weight)


class SelfAttention(MemoryAttention):
    """Attention of words to themselves and to those before, which can be kept from word to word."""

    def so_far(self, x: Float[Tensor, "batch words dim"]) -> Float[Tensor, "batch words dim"]:
        """Every word reads those up to itself."""
        q, k, v = self._mapped(x)
        p = self.dropout.p if self.training else 0.0
        return self._out(F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p))

    def next(self, x: Float[Tensor, "rows 1 dim"], kept: Words) -> tuple[Float[Tensor, "rows 1 dim"], Words]:
        """One more word reads all before it and itself."""
        q, k, v = self._mapped(x)
        kept = Words(torch.cat([kept.keys, k], 2), torch.cat([kept.values, v], 2))
        return self._out(F.scaled_dot_product_attention(q, kept.keys, kept.values)), kept

    def none(self, rows: int, like: Tensor) -> Words:
        """What is kept before the first word."""
        dim = like.shape[-1] // self.heads
        return Words(*(like.new_zeros((rows, self.heads, 0, dim)) for _ in range(2)))

    def _mapped(self, x: Tensor) -> list[Tensor]:
        return [split_heads(x if m is None else m(x), self.heads) for m in (self.to_q, self.to_k, self.to_v)]

    def _out(self, found: Tensor) -> Tensor:
        found = found.transpose(1, 2).flatten(2)
        return found if self.to_out is None else self.to_out(found)


class Words(NamedTuple):
    """Keys and values of the words so far."""

    keys: Float[Tensor, "rows heads words head_dim"]
    values: Float[Tensor, "rows heads words head_dim"]


class Added(nn.Module):
    """A sub-layer `x + dropout(f(LN(x)))`.

    Args:
        dim: width.
        dropout: of what is added.
    """

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "*rows dim"], f: Callable[[Tensor], Tensor]) -> Float[Tensor, "*rows dim"]:
        """What `f` makes of the normalised `x`, added to it."""
        return x + self.dropout(f(self.norm(x)))


def feed_forward(config: TranslatorConfig) -> nn.Sequential:
    """`W_2 relu(W_1 x + b_1) + b_2`."""
    return nn.Sequential(
        nn.Linear(config.dim, config.hidden),
        nn.ReLU(),
        nn.Dropout(config.dropout),
        nn.Linear(config.hidden, config.dim),
    )


def waves(first: int, count: int, dim: int, like: Tensor) -> Float[Tensor, "count dim"]:
    """Sines and cosines of the positions from `first` on, as Vaswani et al.

    >>> waves(0, 2, 4, torch.zeros(1))[0].tolist()
    [0.0, 0.0, 1.0, 1.0]
    """
    half = (dim + 1) // 2
    rates = torch.exp(torch.arange(half, device=like.device) * (-math.log(10_000.0) / max(half - 1, 1)))
    angles = torch.arange(first, first + count, device=like.device).unsqueeze(1) * rates
    return torch.cat([angles.sin(), angles.cos()], 1)[:, :dim].to(like.dtype)


class EncoderLayer(nn.Module):
    """Attention of the words of the source to each other, then feed-forward."""

    def __init__(self, config: TranslatorConfig) -> None:
        super().__init__()
        self.attention = MemoryAttention(config.dim, config.heads, dropout=config.dropout)
        self.forward_layer = feed_forward(config)
        self.attended, self.fed = (Added(config.dim, config.dropout) for _ in range(2))

    def forward(self, x: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"]) -> Tensor:
        """`[batch, tokens, dim]`."""
        return self.fed(self.attended(x, lambda x: self.attention(x, x, mask)[0]), self.forward_layer)


class DecoderLayer(nn.Module):
    """Attention to the words so far, to the memories, then feed-forward."""

    def __init__(self, config: TranslatorConfig) -> None:
        super().__init__()
        self.attention = SelfAttention(config.dim, config.heads, dropout=config.dropout)
        self.memories = memory_attention(config)
        self.forward_layer = feed_forward(config)
        self.attended, self.fed = (Added(config.dim, config.dropout) for _ in range(2))

    def forward(self, x: Float[Tensor, "batch words dim"], encoded: Encoded) -> tuple[Tensor, Sequence[Tensor]]:
        """`([batch, words, dim], weights on each memory)`."""
        found = self.memories.attend(self.attended(x, self.attention.so_far), encoded.memories, encoded.masks)
        return self.fed(found.output, self.forward_layer), found.weights

    def next(self, x: Float[Tensor, "rows 1 dim"], kept: KeptLayer) -> tuple[Tensor, KeptLayer]:
        """The same for one more word."""
        found, words = self.attention.next(self.attended.norm(x), kept.words)
        x = self.memories.attend(x + self.attended.dropout(found), kept.memories).output
        return self.fed(x, self.forward_layer), kept._replace(words=words)


def memory_attention(config: TranslatorConfig) -> Memories:
    """The attention to text and picture that a rule means."""
    memories = 2 if config.sees else 1
    return RULES[config.rule](config.dim, memories=memories, heads=config.heads, dropout=config.dropout)


class KeptLayer(NamedTuple):
    """What a layer of the decoder keeps from word to word.

    Attributes:
        words: keys and values of the words so far, one row per hypothesis.
        memories: keys and values of the memories, the same for all words.
    """

    words: Words
    memories: KeptMemories


class KeptDecoder(NamedTuple):
    """What the decoder keeps from word to word.

    Attributes:
        layers: of each layer.
        length: number of words so far.
    """

    layers: tuple[KeptLayer, ...]
    length: int


class MultimodalTransformer(Translator):
    """A Transformer that translates a text with its picture: pre-norm, subword embeddings tied with the output.

    Encoder: layers of self-attention and feed-forward, a final LayerNorm. Decoder: layers of masked self-attention, attention
    to text and picture by one of four rules, feed-forward, a final LayerNorm; `p = softmax(E y)` with `E` the embeddings.

    Args:
        config: sizes and rule; with `imagination` the states of the encoder shall also predict the vector of the picture.

    Example:
        >>> config = TranslatorConfig(vocabulary=12, dim=16, layers=1, hidden=32, heads=2, image_channels=6)
        >>> model = MultimodalTransformer(config)
        >>> source, target = torch.tensor([[4, 5, 2]]), torch.tensor([[1, 6, 7]])
        >>> model(source, target, torch.randn(1, 6, 8, 8)).shape
        torch.Size([1, 3, 12])

    Source: Helcl, Libovicky, Varis, "CUNI System for the WMT18 Multimodal Translation Task", WMT 2018.

    Note:
        The sizes of the submission are not published with the authors' code; the defaults are what is said elsewhere of it.
        Embeddings are scaled by the root of their width, and positions are waves, as in Vaswani et al.
    """

    def build(self, config: TranslatorConfig) -> None:
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.layers))
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.encoder_norm, self.decoder_norm = (nn.LayerNorm(config.dim, eps=1e-6) for _ in range(2))

    def read(self, source: Int[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"]) -> Tensor:
        x = self._embedded(source, 0)
        for layer in self.encoder:
            x = layer(x, mask)
        return self.encoder_norm(x)

    def decode(self, target: Int[Tensor, "batch words"], encoded: Encoded) -> Decoded:
        x, weights = self._embedded(target, 0), []
        for layer in self.decoder:
            x, seen = layer(x, encoded)
            weights.append(seen)
        text, *image = (torch.stack(of_memory, 1) for of_memory in zip(*weights, strict=True))
        return Decoded(self.logits(self.decoder_norm(x)), text, image[0] if image else None)

    def start(self, encoded: Encoded, beam: int) -> KeptDecoder:
        rows = len(encoded.states) * beam
        layers = (
            KeptLayer(
                layer.attention.none(rows, encoded.states),
                layer.memories.keep(encoded.memories, encoded.masks).repeated(beam),
            )
            for layer in self._decoder_layers()
        )
        return KeptDecoder(tuple(layers), 0)

    def step(
        self, words: Int[Tensor, "rows"], kept: KeptDecoder
    ) -> tuple[Float[Tensor, "rows vocabulary"], KeptDecoder]:
        x, layers = self._embedded(words.unsqueeze(1), kept.length), []
        for layer, of_layer in zip(self._decoder_layers(), kept.layers, strict=True):
            x, of_layer = layer.next(x, of_layer)
            layers.append(of_layer)
        return self.logits(self.decoder_norm(x)).squeeze(1), KeptDecoder(tuple(layers), kept.length + 1)

    def chosen(self, kept: KeptDecoder, rows: Int[Tensor, "rows"]) -> KeptDecoder:
        # hypotheses of an item read the same memories, so that only their words change places
        layers = (layer._replace(words=Words(*(t[rows] for t in layer.words))) for layer in kept.layers)
        return kept._replace(layers=tuple(layers))

    def _embedded(self, words: Int[Tensor, "batch words"], first: int) -> Float[Tensor, "batch words dim"]:
        x = self.embedding(words) * self.config.dim**0.5
        return self.dropout(x + waves(first, words.shape[1], self.config.dim, x))

    def _decoder_layers(self) -> list[DecoderLayer]:
        return [layer for layer in self.decoder if isinstance(layer, DecoderLayer)]


class KeptRecurrence(NamedTuple):
    """What the recurrent decoder keeps from word to word.

    Attributes:
        state: `[rows, dim]`.
        memories: keys and values of the memories.
    """

    state: Float[Tensor, "rows dim"]
    memories: KeptMemories


class RecurrentTranslator(Translator):
    """The recurrent baseline: a bidirectional GRU reads, a GRU whose state asks the same memories writes.

    `s_t = GRU([e(y_{t-1})], s_{t-1})`, `c_t = memories(s_t)`, `p = softmax(E W c_t)` with `E` the embeddings; `s_0` is a map of
    the mean of the encoder's states.

    Args:
        config: sizes and rule, as of `MultimodalTransformer`; there is one layer, and no feed-forward one.

    Example:
        >>> config = TranslatorConfig(vocabulary=12, dim=16, heads=2, image_channels=6)
        >>> source, target = torch.tensor([[4, 5, 2]]), torch.tensor([[1, 6, 7]])
        >>> RecurrentTranslator(config)(source, target, torch.randn(1, 6, 8, 8)).shape
        torch.Size([1, 3, 12])

    Source: the baseline of Helcl, Libovicky, Varis, "CUNI System for the WMT18 Multimodal Translation Task", WMT 2018.

    Note:
        Its exact cells are not known to us; attention to the memories is that of the Transformer.
    """

    def build(self, config: TranslatorConfig) -> None:
        if config.dim % 2:
            raise InputError(f"dim: two directions share it, so it must be even, got {config.dim}")
        self.encoder = nn.GRU(config.dim, config.dim // 2, batch_first=True, bidirectional=True)
        self.first = nn.Linear(config.dim, config.dim)
        self.cell = nn.GRUCell(config.dim, config.dim)
        self.memories = memory_attention(config)
        self.out = nn.Linear(config.dim, config.dim)

    def read(self, source: Int[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"]) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(
            self.dropout(self.embedding(source)), mask.sum(1).clamp(min=1).cpu(), batch_first=True, enforce_sorted=False
        )
        return nn.utils.rnn.pad_packed_sequence(self.encoder(packed)[0], True, total_length=source.shape[1])[0]

    def decode(self, target: Int[Tensor, "batch words"], encoded: Encoded) -> Decoded:
        state, states = self._first(encoded), []
        for x in self.dropout(self.embedding(target)).unbind(1):
            state = self.cell(x, state)
            states.append(state)
        found = self.memories.attend(torch.stack(states, 1), encoded.memories, encoded.masks)
        text, *image = (w.unsqueeze(1) for w in found.weights)
        return Decoded(self.logits(torch.tanh(self.out(found.output))), text, image[0] if image else None)

    def start(self, encoded: Encoded, beam: int) -> KeptRecurrence:
        memories = self.memories.keep(encoded.memories, encoded.masks).repeated(beam)
        return KeptRecurrence(self._first(encoded).repeat_interleave(beam, 0), memories)

    def step(
        self, words: Int[Tensor, "rows"], kept: KeptRecurrence
    ) -> tuple[Float[Tensor, "rows vocabulary"], KeptRecurrence]:
        state = self.cell(self.embedding(words), kept.state)
        found = self.memories.attend(state.unsqueeze(1), kept.memories).output.squeeze(1)
        return self.logits(torch.tanh(self.out(found))), kept._replace(state=state)

    def chosen(self, kept: KeptRecurrence, rows: Int[Tensor, "rows"]) -> KeptRecurrence:
        return kept._replace(state=kept.state[rows])

    def _first(self, encoded: Encoded) -> Float[Tensor, "batch dim"]:
        count = encoded.mask.sum(1, keepdim=True).clamp(min=1)
        mean = encoded.states.masked_fill(~encoded.mask.unsqueeze(-1), 0).sum(1) / count
        return torch.tanh(self.first(mean))
