"""Attentive encoders for the attitude of one entity towards another: weights from key terms, or from the text alone.

Source: Rusnachenko, Loukachevitch, "Studying Attention Models in Sentiment Attitude Extraction Task", NLDB 2020.

Note:
    None of the authors' code paths masks padding in its softmax; here a mask does, and without one all slots count.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.masks import real_tokens
from cenote.core.requirements import require_at_least, require_one_of
from cenote.core.sets import PaddedTokens, Tokens, as_tokens
from cenote.core.tokenwise import tokenwise
from cenote.pool.base import Pool, Pooled

Average = Literal["real", "padded", "last"]


class ZhouAttention(Pool):
    """Self-based attention of an encoder's states, one learned vector.

    `a = softmax_n(u . tanh(h_n))`, `y = tanh(sum_n a_n h_n)`

    Args:
        dim: width of a token.

    Example:
        >>> ZhouAttention(8)(torch.randn(2, 5, 8)).shape
        torch.Size([2, 8])

    Source: Zhou et al., "Attention-Based Bidirectional Long Short-Term Memory Networks for Relation Classification", ACL
    2016; as in Rusnachenko, Loukachevitch, "Studying Attention Models in Sentiment Attitude Extraction Task", NLDB 2020.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.u = nn.Parameter(torch.empty(1, dim))
        nn.init.xavier_normal_(self.u)

    def pool(self, tokens: Tokens) -> Pooled:
        weights = tokens.softmax(torch.tanh(tokens.values) @ self.u.T)
        return Pooled(torch.tanh(tokens.weighted_sum(weights).squeeze(1)), weights)


class YangAttention(Pool):
    """Self-based attention of an encoder's states, a small network and a learned context vector.

    `a = softmax_n(u . tanh(W h_n + b))`, `y = sum_n a_n h_n`

    Args:
        dim: width of a token.
        hidden: width of `u`.

    Example:
        >>> YangAttention(8)(torch.randn(2, 5, 8)).shape
        torch.Size([2, 8])

    Source: Yang et al., "Hierarchical Attention Networks for Document Classification", NAACL 2016; as in Rusnachenko,
    Loukachevitch, "Studying Attention Models in Sentiment Attitude Extraction Task", NLDB 2020.
    """

    def __init__(self, dim: int, hidden: int = 100) -> None:
        super().__init__(dim)
        self.map = nn.Linear(dim, hidden)
        self.u = nn.Parameter(torch.empty(1, hidden))
        for p in self.parameters():
            nn.init.normal_(p, std=0.1)

    def pool(self, tokens: Tokens) -> Pooled:
        weights = tokens.softmax(tokenwise(self.scores, tokens.values))
        return Pooled(tokens.weighted_sum(weights).squeeze(1), weights)

    def scores(self, h: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows 1"]:
        """`u . tanh(W h_n + b)`."""
        return torch.tanh(self.map(h)) @ self.u.T


class LinAttention(Pool):
    """Self-based attention of an encoder's states, several rows of weights that a penalty keeps apart.

    `A = softmax_n(W_2 tanh(W_1 h_n))`, `y_r = sum_n A_rn h_n`; in training `attention_penalty(A)` is added to the loss.
    With `joined`: `y = ReLU(W_3 [y_1 ; ... ; y_R] + b)`.

    Args:
        dim: width of a token.
        rows: number of rows of weights, the vectors that come out.
        hidden: width of `W_1`.
        joined: width of a layer that makes one vector of the rows, 200 in the authors' model; `None`: no such layer.

    Example:
        >>> LinAttention(8, rows=3)(torch.randn(2, 5, 8)).shape
        torch.Size([2, 3, 8])

    Source: Lin et al., "A Structured Self-attentive Sentence Embedding", ICLR 2017; as in Rusnachenko, Loukachevitch,
    "Studying Attention Models in Sentiment Attitude Extraction Task", NLDB 2020.

    Note:
        Of the layer behind the rows only the width is known to us; the ReLU is ours.
    """

    def __init__(self, dim: int, rows: int = 30, hidden: int = 350, joined: int | None = None) -> None:
        super().__init__(dim, joined)
        require_at_least(1, rows=rows, hidden=hidden)
        self.vectors = rows if joined is None else 1
        self.map = nn.Linear(dim, hidden, bias=False)
        self.score = nn.Linear(hidden, rows, bias=False)
        self.joined = None if joined is None else nn.Linear(rows * dim, joined)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # pickled by a version without the layer; a default of the class would hide the layer where there is one
        if "joined" not in state["_modules"]:
            state.setdefault("joined", None)
        super().__setstate__(state)  # type: ignore[no-untyped-call]

    def pool(self, tokens: Tokens) -> Pooled:
        weights = tokens.softmax(tokenwise(self.scores, tokens.values))
        y = tokens.weighted_sum(weights)
        if self.joined is not None:
            return Pooled(torch.relu(self.joined(y.flatten(1))), weights)
        return Pooled(y if self.vectors > 1 else y.squeeze(1), weights)

    def scores(self, h: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows heads"]:
        """`W_2 tanh(W_1 h_n)`."""
        return self.score(torch.tanh(self.map(h)))


def attention_penalty(weights: Float[Tensor, "batch rows tokens"]) -> Float[Tensor, ""]:
    """`mean_b ||A A^T - I||_F^2`: 0 where every row looks at one token of its own.

    Args:
        weights: `A`, as `LinAttention.attend` gives them.

    Example:
        >>> attention_penalty(torch.eye(3).unsqueeze(0)).item()
        0.0

    Source: Lin et al., "A Structured Self-attentive Sentence Embedding", ICLR 2017.
    """
    overlap = weights @ weights.transpose(1, 2)
    return (
        (overlap - torch.eye(weights.shape[1], dtype=overlap.dtype, device=overlap.device)).square().sum((1, 2)).mean()
    )


class KeyedPooled(NamedTuple):
    """What a pool with key terms returns.

    Attributes:
        output: `[batch, out_dim]`.
        weights: of each term for each key, `[batch, keys, tokens]`, 0 for keys that are padding; one row, the mean over
            the keys, where the pool averages over them.
    """

    output: Float[Tensor, "batch out_dim"]
    weights: Float[Tensor, "batch keys tokens"]


class MLPAttention(nn.Module):
    """Feature-based attention: each key term, the two entities for instance, asks for the terms that matter to it.

    `s_nk = w . tanh(W [x_n ; x_k] + b) + c` with `x_k` the vector of the term that key `k` points at,
    `a_k = softmax_n(s_nk)`, `y = [sum_n a_n1 x_n ; ... ; sum_n a_nK x_n]`

    Args:
        dim: width of a term vector.
        keys: number of keys, 2 for subject and object.
        hidden: width of `W`.

    Attributes:
        out_dim: `keys * dim`.
        inert_parameters: `c` drops out of the softmax.

    Example:
        >>> pool = MLPAttention(8, keys=2)
        >>> subject_object = torch.tensor([[0, 3], [4, 1]])
        >>> pool(torch.randn(2, 5, 8), subject_object).shape
        torch.Size([2, 16])

    Source: Shen, Huang, "Attention-Based Convolutional Neural Network for Semantic Relation Extraction", COLING 2016; as in
    Rusnachenko, Loukachevitch, "Studying Attention Models in Sentiment Attitude Extraction Task", NLDB 2020.

    Note:
        A key that is padding (-1), or that points at a padded slot, gives zeros.
    """

    inert_parameters = ("score.bias",)

    def __init__(self, dim: int, keys: int = 2, hidden: int = 10) -> None:
        super().__init__()
        require_at_least(1, dim=dim, keys=keys, hidden=hidden)
        self.dim = dim
        self.keys = keys
        self.out_dim = keys * dim
        self.map = nn.Linear(2 * dim, hidden)
        self.score = nn.Linear(hidden, 1)

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        keys: Int[Tensor, "batch keys"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch out_dim"]:
        """Pool the terms `x`; `keys` are indices of terms, -1 where there is no key."""
        return self.attend(x, keys, mask).output

    def attend(
        self,
        x: Float[Tensor, "batch tokens dim"],
        keys: Int[Tensor, "batch keys"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> KeyedPooled:
        """As calling the pool, and also the weights of each key."""
        if keys.dim() == 2 and keys.shape[1] != self.keys:
            raise InputError(
                f"keys: this pool was built for {self.keys} keys, got {keys.shape[1]}; build it with keys={keys.shape[1]}"
            )
        by_key, weights, _ = self.look(x, keys, mask)
        return KeyedPooled(by_key.flatten(1), weights)

    def look(
        self,
        x: Float[Tensor, "batch tokens dim"],
        keys: Int[Tensor, "batch keys"],
        mask: Bool[Tensor, "batch tokens"] | None,
    ) -> tuple[Float[Tensor, "batch keys dim"], Float[Tensor, "batch keys tokens"], Bool[Tensor, "batch keys"]]:
        """`(a_k, weights, which keys are real)`; zeros for the others."""
        tokens = as_tokens(x, mask, self.dim)
        assert isinstance(tokens, PaddedTokens)
        terms, real = terms_at(tokens, keys)
        # W [x ; e] = W_x x + W_e e: neither is mapped more than once
        of_terms, of_keys = self.map.weight.split(self.dim, 1)
        hidden = (tokens.values @ of_terms.T + self.map.bias).unsqueeze(2) + (terms @ of_keys.T).unsqueeze(1)
        weights = tokens.softmax(self.score(torch.tanh(hidden)).squeeze(-1)) * real.unsqueeze(1)
        return tokens.weighted_sum(weights), tokens.heads_first(weights), real


class IMLPAttention(MLPAttention):
    """Feature-based attention averaged over any number of keys: frames, synonyms of the entities, and the entities.

    As `MLPAttention`, with `y = (1/K) sum_k sum_n a_nk x_n` over the real keys; without any, zeros.

    Args:
        dim: width of a term vector.
        hidden: width of the score network.

    Example:
        >>> pool = IMLPAttention(8)
        >>> frames = torch.tensor([[3, -1, -1], [4, 1, -1]])
        >>> pool(torch.randn(2, 5, 8), frames).shape
        torch.Size([2, 8])

    Source: Rusnachenko, Loukachevitch, "Studying Attention Models in Sentiment Attitude Extraction Task", NLDB 2020.

    Note:
        The weights returned are the mean over the real keys, as in the authors' code.
    """

    def __init__(self, dim: int, hidden: int = 10) -> None:
        super().__init__(dim, 1, hidden)

    def attend(
        self,
        x: Float[Tensor, "batch tokens dim"],
        keys: Int[Tensor, "batch keys"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> KeyedPooled:
        """As calling the pool, and also the weights, their mean over the real keys."""
        by_key, weights, real = self.look(x, keys, mask)
        count = real.sum(1).clamp(min=1)
        return KeyedPooled(by_key.sum(1) / count.unsqueeze(1), weights.sum(1, keepdim=True) / count.view(-1, 1, 1))


class InteractiveAttention(nn.Module):
    """IAN: the mean of the aspect terms decides what counts in the context, and the mean of the context what among them.

    `b = softmax_n(tanh(h_n . W_c mean_j s_j + p_n))`, `g = softmax_j(tanh(s_j . W_a mean_n h_n + r_j))`,
    `y = [sum_n b_n h_n ; sum_j g_j s_j]`, with `h` the states of an encoder of the context, `s` those of the aspects.

    Args:
        dim: width of the states of context and of aspects.
        tokens: number of slots of a context, each with a bias `p_n` of its own; `None`: no such biases.
        aspects: number of slots of aspects, each with a bias `r_j`; `None`: no such biases.
        average: what stands for the other side: `"real"`, the mean of its real slots; `"padded"`, the sum of these over the
            number of all slots; `"last"`, its last real state.

    Attributes:
        out_dim: `2 * dim`.

    Example:
        >>> y, of_context, of_aspects = InteractiveAttention(8).attend(torch.randn(2, 5, 8), torch.randn(2, 3, 8))
        >>> y.shape, of_context.shape, of_aspects.shape
        (torch.Size([2, 16]), torch.Size([2, 1, 5]), torch.Size([2, 1, 3]))

    Source: Ma et al., "Interactive Attention Networks for Aspect-Level Sentiment Classification", IJCAI 2017; as in
    Rusnachenko, Loukachevitch, "Studying Attention Models in Sentiment Attitude Extraction Task", NLDB 2020.

    Note:
        By default means run over real slots; those of the authors' code include the zeros of padding (`"padded"`), or are
        the last state (`"last"`). The biases per position are theirs.
    """

    def __init__(
        self, dim: int, tokens: int | None = None, aspects: int | None = None, average: Average = "real"
    ) -> None:
        super().__init__()
        require_one_of(get_args(Average), average=average)
        self.average = average
        self.dim = dim
        self.out_dim = 2 * dim
        self.of_context = nn.Parameter(torch.empty(dim, dim))
        self.of_aspects = nn.Parameter(torch.empty(dim, dim))
        self.context_bias = None if tokens is None else nn.Parameter(torch.zeros(tokens))
        self.aspect_bias = None if aspects is None else nn.Parameter(torch.zeros(aspects))
        for p in (self.of_context, self.of_aspects):
            nn.init.xavier_uniform_(p)

    def forward(
        self,
        context: Float[Tensor, "batch tokens dim"],
        aspects: Float[Tensor, "batch aspects dim"],
        context_mask: Bool[Tensor, "batch tokens"] | None = None,
        aspect_mask: Bool[Tensor, "batch aspects"] | None = None,
    ) -> Float[Tensor, "batch out_dim"]:
        """Pool both sequences; the masks are True on real slots."""
        return self.attend(context, aspects, context_mask, aspect_mask)[0]

    def attend(
        self,
        context: Float[Tensor, "batch tokens dim"],
        aspects: Float[Tensor, "batch aspects dim"],
        context_mask: Bool[Tensor, "batch tokens"] | None = None,
        aspect_mask: Bool[Tensor, "batch aspects"] | None = None,
    ) -> tuple[Float[Tensor, "batch out_dim"], Float[Tensor, "batch one tokens"], Float[Tensor, "batch one aspects"]]:
        """`(y, weights of the context, weights of the aspects)`."""
        h, s = as_tokens(context, context_mask, self.dim), as_tokens(aspects, aspect_mask, self.dim)
        if h.batch != s.batch:
            raise InputError(f"aspects: expected {h.batch} sets to match the contexts, got {s.batch}")
        sides = (
            ("context", h, self._stands_for(s) @ self.of_context.T, self.context_bias),
            ("aspects", s, self._stands_for(h) @ self.of_aspects.T, self.aspect_bias),
        )
        pooled, weights = [], []
        for name, tokens, query, bias in sides:
            scores = tokens.scores(query.unsqueeze(1))
            if bias is not None:
                if bias.shape[0] != scores.shape[1]:
                    raise InputError(f"{name}: this pool has {bias.shape[0]} biases, got {scores.shape[1]} slots")
                scores = scores + bias.unsqueeze(-1)
            w = tokens.softmax(torch.tanh(scores))
            pooled.append(tokens.weighted_sum(w).squeeze(1))
            weights.append(tokens.heads_first(w))
        return torch.cat(pooled, -1), weights[0], weights[1]

    def _stands_for(self, side: Tokens) -> Float[Tensor, "batch dim"]:
        if self.average == "last":
            return side.token(-1)
        return side.sum() / side.values.shape[1] if self.average == "padded" else side.mean()


class InteractiveEncoder(nn.Module):
    """IAN whole: one LSTM reads the context, one the aspect terms, and `InteractiveAttention` pools both.

    Args:
        dim: width of a term vector.
        hidden: width of the LSTMs' states.
        tokens, aspects, average: see `InteractiveAttention`.

    Attributes:
        out_dim: `2 * hidden`.

    Example:
        >>> InteractiveEncoder(8, hidden=4)(torch.randn(2, 5, 8), torch.randn(2, 3, 8)).shape
        torch.Size([2, 8])

    Source: as `InteractiveAttention`.

    Note:
        Padding must stand behind the real terms: an LSTM reads what stands before.
    """

    def __init__(
        self,
        dim: int,
        hidden: int = 128,
        tokens: int | None = None,
        aspects: int | None = None,
        average: Average = "real",
    ) -> None:
        super().__init__()
        self.context = nn.LSTM(dim, hidden, batch_first=True)
        self.aspects = nn.LSTM(dim, hidden, batch_first=True)
        self.attention = InteractiveAttention(hidden, tokens, aspects, average)
        self.out_dim = self.attention.out_dim

    def forward(
        self,
        context: Float[Tensor, "batch tokens dim"],
        aspects: Float[Tensor, "batch aspects dim"],
        context_mask: Bool[Tensor, "batch tokens"] | None = None,
        aspect_mask: Bool[Tensor, "batch aspects"] | None = None,
    ) -> Float[Tensor, "batch out_dim"]:
        """Read and pool both sequences; the masks are True on real slots."""
        h, _ = self.context(as_tokens(context, context_mask).values)
        s, _ = self.aspects(as_tokens(aspects, aspect_mask).values)
        return self.attention(h, s, context_mask, aspect_mask)


class PiecewiseMaxPool(nn.Module):
    """PCNN's pooling: the sequence is cut at the two entities, and each of the three pieces gives its maximum.

    `y = tanh([max_{n <= i} x_n ; max_{i < n <= j} x_n ; max_{n > j} x_n])` with `i <= j` the positions of the entities;
    an empty piece gives zeros.

    Args:
        dim: width of a token.
        tanh: whether the tanh is there.
        entities: whether each entity is the last token of its piece, `"close"`, or the first of the next, `"open"`.

    Attributes:
        out_dim: `3 * dim`.

    Example:
        >>> x = torch.tensor([[[0.0], [2.0], [1.0], [5.0]]])
        >>> PiecewiseMaxPool(1, tanh=False)(x, torch.tensor([[0, 2]])).tolist()
        [[0.0, 2.0, 5.0]]

    Source: Zeng et al., "Distant Supervision for Relation Extraction via Piecewise Convolutional Neural Networks", EMNLP
    2015; as in Rusnachenko, Loukachevitch, "Studying Attention Models in Sentiment Attitude Extraction Task", NLDB 2020.

    Note:
        By default each entity closes its piece, as in Zeng et al. The authors' code fills an empty piece with the lowest float.
    """

    def __init__(self, dim: int, tanh: bool = True, entities: Literal["close", "open"] = "close") -> None:
        super().__init__()
        require_one_of(("close", "open"), entities=entities)
        self.opened = entities == "open"
        self.dim = dim
        self.out_dim = 3 * dim
        self.tanh = tanh

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        entities: Int[Tensor, "batch 2"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch out_dim"]:
        """Pool `x` around the positions of the two entities, in either order."""
        tokens = as_tokens(x, mask, self.dim)
        assert isinstance(tokens, PaddedTokens)
        _require_indices("entities", entities, tokens, 2)
        first, second = entities.amin(1, keepdim=True), entities.amax(1, keepdim=True)
        slots = torch.arange(x.shape[1], device=x.device) + int(self.opened)
        real = real_tokens(x, mask)
        pieces = (slots <= first, (slots > first) & (slots <= second), slots > second)
        y = torch.cat([PaddedTokens(tokens.values, piece & real).max() for piece in pieces], -1)
        return torch.tanh(y) if self.tanh else y


def terms_at(
    tokens: PaddedTokens, keys: Int[Tensor, "batch keys"]
) -> tuple[Float[Tensor, "batch keys dim"], Bool[Tensor, "batch keys"]]:
    """`(vectors, real)`: the terms that keys point at; a key of -1 or at a padded slot is not real and gives zeros."""
    _require_indices("keys", keys, tokens, None)
    real = keys >= 0
    slots = keys.clamp(min=0)
    if tokens.mask is not None:
        real = real & tokens.mask.gather(1, slots)
    if tokens.values.shape[1] == 0:
        return tokens.values.new_zeros((*keys.shape, tokens.dim)), torch.zeros_like(real)
    terms = tokens.values.gather(1, slots.unsqueeze(-1).expand(-1, -1, tokens.dim))
    return terms.masked_fill(~real.unsqueeze(-1), 0), real


def combined_keys(*keys: Int[Tensor, "batch _"]) -> Int[Tensor, "batch keys"]:
    """Several lists of keys as one, without order: entities and frames for instance; -1, where there is none, comes last.

    >>> combined_keys(torch.tensor([[3, -1]]), torch.tensor([[0, 5]])).tolist()
    [[5, 3, 0, -1]]
    """
    if not keys:
        raise InputError("keys: expected at least one list of keys, got none")
    return torch.cat(keys, 1).sort(1, descending=True).values


class MassDifference(NamedTuple):
    """Whether the weights of one kind of contexts fall on terms of some type more than those of another.

    Attributes:
        difference: of the means, first minus second.
        p: of the Mann-Whitney test of both samples, two-sided.
    """

    difference: float
    p: float


def mass_difference(
    first: Float[Tensor, "contexts types"], second: Float[Tensor, "others types"]
) -> tuple[MassDifference, ...]:
    """Compare `mass_by_type` of contexts with sentiment and of neutral ones: one comparison per type of terms.

    Args:
        first, second: a context per line.

    Raises:
        InputError: where a kind has no context, or both have other types.

    Source: Rusnachenko, Loukachevitch, "Studying Attention Models in Sentiment Attitude Extraction Task", NLDB 2020; the test
    is ours.
    """
    from scipy.stats import mannwhitneyu

    if not len(first) or not len(second) or first.shape[1] != second.shape[1]:
        raise InputError(
            f"first, second: expected contexts of both kinds and the same types, got {tuple(first.shape)} and "
            f"{tuple(second.shape)}"
        )
    means = (first.mean(0) - second.mean(0)).tolist()
    samples = (side.detach().cpu().double().numpy() for side in (first, second))
    return tuple(map(MassDifference, means, mannwhitneyu(*samples).pvalue.tolist()))


def mass_by_type(
    weights: Float[Tensor, "batch rows tokens"],
    types: Int[Tensor, "batch tokens"],
    number: int,
    mask: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch rows types"]:
    """How much of each row of weights falls on the terms of each type: on frames, entities, prepositions and so on.

    Args:
        weights: `[batch, rows, tokens]`, as `attend` gives them.
        types: the type of each term, from 0 to `number - 1`.
        number: number of types.
        mask: True on real terms.

    Raises:
        InputError: where shapes do not match or a type is out of range.

    Example:
        >>> mass_by_type(torch.tensor([[[0.2, 0.5, 0.3]]]), torch.tensor([[0, 1, 0]]), 2).tolist()
        [[[0.5, 0.5]]]

    Source: Rusnachenko, Loukachevitch, "Studying Attention Models in Sentiment Attitude Extraction Task", NLDB 2020.
    """
    if types.shape != (weights.shape[0], weights.shape[-1]):
        raise InputError(
            f"types: expected shape {(weights.shape[0], weights.shape[-1])} to match the weights, got {tuple(types.shape)}"
        )
    if types.numel() and (int(types.min()) < 0 or int(types.max()) >= number):
        raise InputError(
            f"types: expected numbers from 0 to {number - 1}, got {int(types.min())} to {int(types.max())}"
        )
    if mask is not None:
        weights = weights.masked_fill(~mask.unsqueeze(1), 0)
    return weights @ nn.functional.one_hot(types, number).to(weights.dtype)


def _require_indices(name: str, indices: Tensor, tokens: PaddedTokens, count: int | None) -> None:
    if indices.dim() != 2 or indices.shape[0] != tokens.batch or count not in (None, indices.shape[1]):
        expected = f"[{tokens.batch}, {'keys' if count is None else count}]"
        raise InputError(f"{name}: expected indices of shape {expected}, got shape {tuple(indices.shape)}")
    if indices.is_floating_point() or indices.dtype == torch.bool:
        raise InputError(f"{name}: expected integer positions, got {indices.dtype}; use .long()")
    if torch.compiler.is_compiling() or not indices.numel():
        return
    slots, lowest = tokens.values.shape[1], 0 if count else -1
    if int(indices.max()) >= slots or int(indices.min()) < lowest:
        raise InputError(
            f"{name}: expected positions from {lowest} to {slots - 1}, got {int(indices.min())} to {int(indices.max())}"
        )
