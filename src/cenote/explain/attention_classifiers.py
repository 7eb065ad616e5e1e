"""A text classifier that pools its states with one attention vector: what papers on attention as explanation train.

Source: Bahdanau et al. (2015), arXiv 1409.0473; as a classifier Jain and Wallace (2019), arXiv 1902.10186.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from cenote.core import InputError
from cenote.core.masks import first_tokens, real_tokens
from cenote.core.requirements import require_at_least, require_one_of

Pooling = Literal["attention", "uniform", "ends"]
Scorer = Literal["linear", "additive", "dot"]


class Classified(NamedTuple):
    """What an `AttentionClassifier` gives: `logits [batch, classes]`, `weights [batch, tokens]` (zero in padding)."""

    logits: Float[Tensor, "batch classes"]
    weights: Float[Tensor, "batch tokens"]


class BiLSTM(nn.Module):
    """States of an LSTM in both directions, side by side; padding, on either side, reaches nothing.

    Args:
        dim: width of what it reads.
        hidden: width per direction.

    Example:
        >>> BiLSTM(4, 3)(torch.zeros(2, 5, 4)).shape
        torch.Size([2, 5, 6])
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        require_at_least(1, dim=dim, hidden=hidden)
        self.lstm = nn.LSTM(dim, hidden, batch_first=True, bidirectional=True)

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch tokens both"]:
        """The states of real tokens, zeros in padding."""
        if mask is None or bool(mask.all()):
            return self.lstm(x)[0]
        order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)
        packed = pack_padded_sequence(
            _rows(x, order), mask.sum(1).cpu().clamp(min=1), batch_first=True, enforce_sorted=False
        )
        h, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=x.shape[1])
        return _rows(h, order.argsort(1)).masked_fill(~mask[..., None], 0.0)

    def ends(
        self, h: Float[Tensor, "batch tokens both"], mask: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch both"]:
        """Of its states the last of each direction."""
        first, last = first_tokens(mask), first_tokens(mask.flip(1)).flip(1)
        forwards, backwards = h.chunk(2, -1)
        return torch.cat([(forwards * last[..., None]).sum(1), (backwards * first[..., None]).sum(1)], -1)


class LinearScorer(nn.Module):
    """`s_t = w . h_t + b`.

    Args:
        dim: width of a state.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Linear(dim, 1)

    def forward(
        self,
        h: Float[Tensor, "batch tokens dim"],
        condition: Float[Tensor, "batch other"] | None = None,  # noqa: ARG002
    ) -> Float[Tensor, "batch tokens"]:
        return self.weight(h).squeeze(-1)


class DotScorer(nn.Module):
    """`s_t = w . h_t / sqrt(dim)`, or `c . h_t / sqrt(dim)` with a second text `c` in the place of `w`.

    Args:
        dim: width of a state.
        conditioned: whether a second text, of the same width, takes the place of the learned vector.
    """

    def __init__(self, dim: int, conditioned: bool = False) -> None:
        super().__init__()
        self.dim = dim
        self.weight = None if conditioned else nn.Linear(dim, 1, bias=False)

    def forward(
        self, h: Float[Tensor, "batch tokens dim"], condition: Float[Tensor, "batch other"] | None = None
    ) -> Float[Tensor, "batch tokens"]:
        if self.weight is not None:
            return self.weight(h).squeeze(-1) * self.dim**-0.5
        return (h @ _required(condition)[..., None]).squeeze(-1) * self.dim**-0.5


class AdditiveScorer(nn.Module):
    """`s_t = w_2 . tanh(W_1 h_t + b_1)`, with a second text `c`: `w_2 . tanh(W_1 h_t + b_1 + W_q c)`.

    Args:
        dim: width of a state.
        hidden: width inside; half of `dim` by default.
        condition: width of the second text; `None`: there is none.
    """

    def __init__(self, dim: int, hidden: int | None = None, condition: int | None = None) -> None:
        super().__init__()
        hidden = max(1, dim // 2) if hidden is None else hidden
        self.inner = nn.Linear(dim, hidden)
        self.query = None if condition is None else nn.Linear(condition, hidden, bias=False)
        self.outer = nn.Linear(hidden, 1, bias=False)

    def forward(
        self, h: Float[Tensor, "batch tokens dim"], condition: Float[Tensor, "batch other"] | None = None
    ) -> Float[Tensor, "batch tokens"]:
        inside = self.inner(h)
        if self.query is not None:
            inside = inside + self.query(_required(condition))[:, None]
        return self.outer(inside.tanh()).squeeze(-1)


class AttentionClassifier(nn.Module):
    """`logits = W sum_t a_t h_t + b`, `a = softmax_t s(h_t)` over the real tokens, `h` the states of an encoder.

    It is called as models of transformers are (`input_ids`, `attention_mask`, `inputs_embeds`), so that explainers of those
    explain it; what it returns also holds the attention.

    Args:
        embedding: of the tokens.
        output: linear map from a state to the classes; one output is a logit of the second of two classes.
        scorer: from states `[batch, tokens, dim]`, and the second text where there is one, to scores `[batch, tokens]`.
        encoder: `(x, mask) -> states`, such as `BiLSTM`; `None`: the embeddings are the states.
        pooling: `"attention"`; `"uniform"`, which has no scorer; `"ends"`: no attention, the last state of each direction of
            the encoder.
        condition: of a second text, `(x, mask) -> states`, whose mean over the real tokens the scorer is given; `None`:
            there is none.

    Example:
        >>> model = attention_classifier(vocabulary=20, classes=2, dim=8)
        >>> found = model(torch.tensor([[3, 4, 0]]), torch.tensor([[1, 1, 0]]))
        >>> found.logits.shape, float(found.weights[0, 2])
        (torch.Size([1, 2]), 0.0)

    Source: Jain and Wallace (2019), arXiv 1902.10186; Pruthi et al. (2020), arXiv 1909.07913.
    """

    def __init__(
        self,
        embedding: nn.Embedding,
        output: nn.Linear,
        scorer: nn.Module | None = None,
        encoder: nn.Module | None = None,
        pooling: Pooling = "attention",
        condition: nn.Module | None = None,
    ) -> None:
        super().__init__()
        require_one_of(get_args(Pooling), pooling=pooling)
        if (scorer is None) == (pooling == "attention"):
            raise InputError(f"scorer: expected {'one' if scorer is None else 'none'} with pooling={pooling!r}")
        if pooling == "ends" and not hasattr(encoder, "ends"):
            raise InputError("encoder: expected one with ends (BiLSTM), as pooling='ends' takes its last states")
        self.embedding, self.encoder, self.scorer, self.output = embedding, encoder, scorer, output
        self.condition, self.pooling = condition, pooling

    def get_input_embeddings(self) -> nn.Embedding:
        """As models of transformers have it."""
        return self.embedding

    def forward(
        self,
        input_ids: Int[Tensor, "batch tokens"] | None = None,
        attention_mask: Shaped[Tensor, "batch tokens"] | None = None,
        *,
        inputs_embeds: Float[Tensor, "batch tokens dim"] | None = None,
        delta: Float[Tensor, "batch tokens"] | None = None,
        blocked: Bool[Tensor, "batch tokens"] | None = None,
        condition_ids: Int[Tensor, "batch others"] | None = None,
        condition_mask: Shaped[Tensor, "batch others"] | None = None,
        position_ids: Int[Tensor, "batch tokens"] | None = None,  # noqa: ARG002
    ) -> Classified:
        """Classify.

        Args:
            input_ids: of the tokens; or `inputs_embeds`, their embeddings.
            attention_mask: not 0 on real tokens.
            delta: added to the scores before the softmax.
            blocked: tokens whose weight is set to 0, and what is left not made to sum to 1: what the model does without what
                it reads there.
            condition_ids, condition_mask: the second text.
            position_ids: taken as models of transformers take it; only the order of real tokens counts here.

        Raises:
            InputError: where there are not exactly one of `input_ids` and `inputs_embeds`, or an item has no token.
        """
        h, mask = self.states(input_ids, attention_mask, inputs_embeds=inputs_embeds)
        scores = self.scores(h, condition_ids, condition_mask)
        return self.from_scores(h, scores if delta is None else scores + delta, mask, blocked)

    def states(
        self,
        input_ids: Int[Tensor, "batch tokens"] | None = None,
        attention_mask: Shaped[Tensor, "batch tokens"] | None = None,
        *,
        inputs_embeds: Float[Tensor, "batch tokens dim"] | None = None,
    ) -> tuple[Float[Tensor, "batch tokens states"], Bool[Tensor, "batch tokens"]]:
        """What is pooled, and which of it is real."""
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("input_ids: expected either these or inputs_embeds")
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        mask = real_tokens(x, None if attention_mask is None else attention_mask != 0)
        if mask.shape != x.shape[:2]:
            raise InputError(f"attention_mask: expected {list(x.shape[:2])} as the tokens, got {list(mask.shape)}")
        if not bool(mask.any(1).all()):
            raise InputError("attention_mask: an item has no token")
        return (x if self.encoder is None else self.encoder(x, mask)), mask

    def scores(
        self,
        h: Float[Tensor, "batch tokens states"],
        condition_ids: Int[Tensor, "batch others"] | None = None,
        condition_mask: Shaped[Tensor, "batch others"] | None = None,
    ) -> Float[Tensor, "batch tokens"]:
        """Before the softmax; zeros without a scorer."""
        if self.scorer is None:
            return h.new_zeros(h.shape[:2])
        if self.condition is None:
            return self.scorer(h)
        if condition_ids is None:
            raise InputError("condition_ids: expected the second text, on which the attention of this model depends")
        x = self.embedding(condition_ids)
        mask = real_tokens(x, None if condition_mask is None else condition_mask != 0)
        read = self.condition(x, mask).masked_fill(~mask[..., None], 0.0)
        return self.scorer(h, read.sum(1) / mask.sum(1, keepdim=True).clamp(min=1))

    def from_scores(
        self,
        h: Float[Tensor, "batch tokens states"],
        scores: Float[Tensor, "batch tokens"],
        mask: Bool[Tensor, "batch tokens"],
        blocked: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Classified:
        """What follows from states and scores."""
        weights = scores.masked_fill(~mask, -torch.inf).softmax(1)
        if blocked is not None:
            weights = weights.masked_fill(blocked, 0.0)
        if self.pooling == "ends":
            real = mask if blocked is None else mask & ~blocked
            return Classified(self.output(self.encoder.ends(h, real)), weights)  # type: ignore[union-attr, operator]
        # what stands in padding, NaN included, reaches nothing
        pooled = (weights[..., None] * h.masked_fill(~mask[..., None], 0.0)).sum(1)
        return Classified(self.output(pooled), weights)


def attention_classifier(
    vocabulary: int,
    classes: int,
    dim: int = 128,
    hidden: int | None = None,
    scorer: Scorer = "linear",
    pooling: Pooling = "attention",
    vectors: Float[Tensor, "vocabulary dim"] | None = None,
    conditioned: bool = False,
    random_state: int | None = None,
) -> AttentionClassifier:
    """An `AttentionClassifier` of these sizes.

    Args:
        vocabulary: number of tokens.
        classes: of the output.
        dim: width of the embeddings.
        hidden: per direction of a `BiLSTM`; `None`: the embeddings are the states.
        scorer: `"linear"`, `"additive"` or `"dot"`.
        pooling: see `AttentionClassifier`.
        vectors: pretrained embeddings, trained further.
        conditioned: whether the attention depends on a second text, read by an encoder of its own; not of `"linear"`.
        random_state: of the first parameters; `None`: torch's global generator.
    """
    require_one_of(get_args(Scorer), scorer=scorer)
    require_at_least(1, vocabulary=vocabulary, classes=classes, dim=dim)
    if conditioned and scorer == "linear":
        raise InputError("scorer: expected 'additive' or 'dot' with conditioned=True, got 'linear'")
    if vectors is not None and vectors.shape != (vocabulary, dim):
        raise InputError(f"vectors: expected [{vocabulary}, {dim}], got {list(vectors.shape)}")
    with torch.random.fork_rng(enabled=random_state is not None):
        if random_state is not None:
            torch.manual_seed(random_state)
        states = dim if hidden is None else 2 * hidden
        embedding = nn.Embedding(vocabulary, dim)
        if vectors is not None:
            with torch.no_grad():
                embedding.weight.copy_(vectors)
        encoder = None if hidden is None else BiLSTM(dim, hidden)
        scored: nn.Module | None = None
        if pooling == "attention":
            makers: dict[str, Callable[[], nn.Module]] = {
                "linear": lambda: LinearScorer(states),
                "dot": lambda: DotScorer(states, conditioned),
                "additive": lambda: AdditiveScorer(states, condition=states if conditioned else None),
            }
            scored = makers[scorer]()
        read: nn.Module | None = None
        if conditioned:
            read = Plain() if hidden is None else BiLSTM(dim, hidden)
        return AttentionClassifier(embedding, nn.Linear(states, classes), scored, encoder, pooling, read)


class Plain(nn.Module):
    """The embeddings as they are, for an encoder."""

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"] | None = None,  # noqa: ARG002
    ) -> Float[Tensor, "batch tokens dim"]:
        return x


def _rows(x: Float[Tensor, "batch tokens dim"], order: Int[Tensor, "batch tokens"]) -> Tensor:
    return x.gather(1, order[..., None].expand(-1, -1, x.shape[2]))


def _required(condition: Tensor | None) -> Tensor:
    if condition is None:
        raise InputError("condition: this scorer depends on a second text, and none was given")
    return condition
