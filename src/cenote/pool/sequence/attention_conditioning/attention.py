"""Attention pooling whose scores are conditioned on what a lexicon knows of each word.

`s_n = v . f(h_n, c_n) + b`, `a = softmax_n(s)`, `y = sum_n a_n h_n`: the knowledge `c_n` decides where to look, and what is
pooled stays the plain `h_n`. The methods differ in `f`.

Source: Margatina, Baziotis, Potamianos, "Attention-based Conditioning Methods for External Knowledge Integration", ACL 2019.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least, require_one_of, require_rate, require_several
from cenote.core.sets import Tokens, as_tokens
from cenote.pool.base import Pool, Pooled


class ConditionedAttention(nn.Module, ABC):
    """Base of the pools `(x, features, mask) -> [batch, dim]` whose scores see `features` of each token besides `x`.

    Args:
        dim: width of a token.
        features: width `F` of the features of a token.
        scored: width of `f(h_n, c_n)`.

    Attributes:
        dim: width of a token.
        features: width of the features of a token.
        out_dim: width of the output, `dim`.
        inert_parameters: parameters that add the same to every score and so drop out of the softmax.
    """

    inert_parameters: tuple[str, ...] = ("score.bias",)

    def __init__(self, dim: int, features: int, scored: int) -> None:
        super().__init__()
        require_at_least(1, dim=dim, features=features)
        self.dim = self.out_dim = dim
        self.features = features
        self.score = nn.Linear(scored, 1)

    @abstractmethod
    def condition(
        self, h: Float[Tensor, "*rows dim"], c: Float[Tensor, "*rows features"]
    ) -> Float[Tensor, "*rows scored"]:
        """`f(h_n, c_n)`."""

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"] | Tokens,
        features: Float[Tensor, "*rows features"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch dim"]:
        """Pool `x`; `features` is `[batch, tokens, F]` (`[total, F]` for `Bags`), zeros for words that no lexicon has."""
        return self._attended(x, features, mask)[1].output

    def attend(
        self,
        x: Float[Tensor, "batch tokens dim"] | Tokens,
        features: Float[Tensor, "*rows features"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Pooled:
        """As calling the pool, and also the weights, `[batch, 1, tokens]`."""
        tokens, (output, weights) = self._attended(x, features, mask)
        assert weights is not None
        return Pooled(output, tokens.heads_first(weights))

    def _attended(
        self,
        x: Float[Tensor, "batch tokens dim"] | Tokens,
        features: Float[Tensor, "*rows features"],
        mask: Bool[Tensor, "batch tokens"] | None,
    ) -> tuple[Tokens, Pooled]:
        tokens = as_tokens(x, mask, self.dim)
        expected = (*tokens.values.shape[:-1], self.features)
        if features.shape != expected:
            raise InputError(f"features: expected shape {expected} to match x, got {tuple(features.shape)}")
        c = tokens.replace(features.to(tokens.values.dtype)).values
        weights = tokens.softmax(self.score(self.condition(tokens.values, c)))
        return tokens, Pooled(tokens.weighted_sum(weights).squeeze(1), weights)


class AttentionalConcat(ConditionedAttention):
    """Attention pooling whose scores see the token and its features side by side.

    `f(h, c) = [h ; c]`, with `tanh` `tanh(W [h ; c] + b)`. Where all features are 0 it is plain attention pooling.

    Args:
        dim: width of a token.
        features: width of the features of a token.
        tanh: whether a map of the same width and a tanh come before the scores.

    Example:
        >>> pool = AttentionalConcat(8, features=3)
        >>> pool(torch.randn(2, 5, 8), torch.zeros(2, 5, 3)).shape
        torch.Size([2, 8])

    Source: Margatina, Baziotis, Potamianos, "Attention-based Conditioning Methods for External Knowledge Integration",
    ACL 2019.

    Note:
        The default is the authors' code, a linear score; `tanh=True` is the form that the paper is said to give.
    """

    def __init__(self, dim: int, features: int, tanh: bool = False) -> None:
        super().__init__(dim, features, dim + features)
        self.map = nn.Linear(dim + features, dim + features) if tanh else None

    def condition(
        self, h: Float[Tensor, "*rows dim"], c: Float[Tensor, "*rows features"]
    ) -> Float[Tensor, "*rows scored"]:
        both = torch.cat([h, c], -1)
        return both if self.map is None else torch.tanh(self.map(both))


class AttentionalGate(ConditionedAttention):
    """Attention pooling whose scores see the token through a gate that its features open.

    `f(h, c) = sigmoid(W c + b) * h`. A gate only rescales: the scores must find a direction in which what matters is always
    positive.

    Args:
        dim: width of a token.
        features: width of the features of a token.

    Example:
        >>> pool = AttentionalGate(8, features=3)
        >>> pool(torch.randn(2, 5, 8), torch.zeros(2, 5, 3)).shape
        torch.Size([2, 8])

    Source: Margatina, Baziotis, Potamianos, "Attention-based Conditioning Methods for External Knowledge Integration",
    ACL 2019.
    """

    def __init__(self, dim: int, features: int) -> None:
        super().__init__(dim, features, dim)
        self.gate = nn.Linear(features, dim)

    def condition(
        self, h: Float[Tensor, "*rows dim"], c: Float[Tensor, "*rows features"]
    ) -> Float[Tensor, "*rows scored"]:
        return torch.sigmoid(self.gate(c)) * h


class AttentionalAffine(ConditionedAttention):
    """Attention pooling whose scores see the token scaled and shifted by its features.

    `f(h, c) = (W_s c + b_s) * h + (W_t c + b_t)`, with `tanh` its tanh.

    Args:
        dim: width of a token.
        features: width of the features of a token.
        tanh: whether a tanh follows, as an option of the authors' code has it.

    Example:
        >>> pool = AttentionalAffine(8, features=3)
        >>> pool(torch.randn(2, 5, 8), torch.zeros(2, 5, 3)).shape
        torch.Size([2, 8])

    Source: Margatina, Baziotis, Potamianos, "Attention-based Conditioning Methods for External Knowledge Integration",
    ACL 2019.
    """

    def __init__(self, dim: int, features: int, tanh: bool = False) -> None:
        super().__init__(dim, features, dim)
        self.scale = nn.Linear(features, dim)
        self.shift = nn.Linear(features, dim)
        self.tanh = tanh
        self.inert_parameters = ("score.bias",) if tanh else ("score.bias", "shift.bias")

    def condition(
        self, h: Float[Tensor, "*rows dim"], c: Float[Tensor, "*rows features"]
    ) -> Float[Tensor, "*rows scored"]:
        conditioned = self.scale(c) * h + self.shift(c)
        return torch.tanh(conditioned) if self.tanh else conditioned


class BaselineAttention(Pool):
    """Attention pooling without a lexicon, whose scores come from one linear layer or from two.

    `s_n = v . h_n + b`, or `s_n = v . dropout(tanh(W h_n + c)) + b`; `a = softmax_n(s)`, `y = sum_n a_n h_n`.

    Args:
        dim: width of a token.
        layers: 1 or 2, with the authors' code an option of this baseline alone.
        dropout: between the two layers.

    Example:
        >>> BaselineAttention(8, layers=2, dropout=0.3)(torch.randn(2, 5, 8)).shape
        torch.Size([2, 8])

    Source: Margatina, Baziotis, Potamianos, "Attention-based Conditioning Methods for External Knowledge Integration",
    ACL 2019.
    """

    inert_parameters = ("score.bias",)

    def __init__(self, dim: int, layers: int = 1, dropout: float = 0.0) -> None:
        super().__init__(dim)
        require_one_of((1, 2), layers=layers)
        require_rate(dropout=dropout)
        self.hidden = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Dropout(dropout)) if layers == 2 else None
        self.score = nn.Linear(dim, 1)

    def pool(self, tokens: Tokens) -> Pooled:
        h = tokens.values if self.hidden is None else self.hidden(tokens.values)
        weights = tokens.softmax(self.score(h))
        return Pooled(tokens.weighted_sum(weights).squeeze(1), weights)


class Lexicon:
    """What several lexicons say of a word, side by side; zeros where one of them does not have it.

    Args:
        lexicons: by name, each a map from a word to its annotations, a list of numbers of one length per lexicon.
        lower: whether words are looked up in lower case where they are not there as written.

    Attributes:
        features: total width `F`.
        names: one name per feature, `lexicon` or `lexicon:index`.

    Raises:
        InputError: where a lexicon is empty or its words have annotations of different lengths.

    Example:
        >>> lexicon = Lexicon({"afinn": {"good": [3.0]}, "emotion": {"good": [1.0, 0.0], "fear": [0.0, 1.0]}})
        >>> lexicon.lookup(["Good", "old", "fear"]).tolist()
        [[3.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]

    Source: Margatina, Baziotis, Potamianos, "Attention-based Conditioning Methods for External Knowledge Integration",
    ACL 2019.
    """

    def __init__(self, lexicons: Mapping[str, Mapping[str, Sequence[float]]], lower: bool = True) -> None:
        self.lower = lower
        self.names: list[str] = []
        self._parts: list[tuple[Mapping[str, Sequence[float]], int]] = []
        for name, words in lexicons.items():
            widths = {len(annotations) for annotations in words.values()}
            if len(widths) != 1 or 0 in widths:
                raise InputError(
                    f"lexicons: {name!r} must give every word the same number of annotations, at least one, "
                    f"got lengths {sorted(widths)}"
                )
            (width,) = widths
            self._parts.append((words, width))
            self.names += [name] if width == 1 else [f"{name}:{i}" for i in range(width)]
        if not self._parts:
            raise InputError("lexicons: expected at least one lexicon, got none")
        self.features = len(self.names)

    def __contains__(self, word: str) -> bool:
        return any(self._found(words, word) is not None for words, _ in self._parts)

    def lookup(self, words: Sequence[str]) -> Float[Tensor, "words features"]:
        """The features of each word."""
        require_several(words=words)
        rows = [
            [number for known, width in self._parts for number in (self._found(known, word) or (0.0,) * width)]
            for word in words
        ]
        return torch.tensor(rows, dtype=torch.float32).reshape(len(words), self.features)

    def lookup_batch(
        self, sentences: Sequence[Sequence[str]]
    ) -> tuple[Float[Tensor, "batch tokens features"], Bool[Tensor, "batch tokens"]]:
        """`(features, mask)` of sentences padded on the right to the longest."""
        longest = max((len(s) for s in sentences), default=0)
        features = torch.zeros(len(sentences), longest, self.features)
        mask = torch.zeros(len(sentences), longest, dtype=torch.bool)
        for i, sentence in enumerate(sentences):
            features[i, : len(sentence)] = self.lookup(sentence)
            mask[i, : len(sentence)] = True
        return features, mask

    def _found(self, words: Mapping[str, Sequence[float]], word: str) -> Sequence[float] | None:
        if word in words:
            return words[word]
        return words.get(word.lower()) if self.lower else None
