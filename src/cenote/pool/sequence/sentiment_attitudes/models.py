"""The whole models by name: vectors of terms, an encoder, attention from the text or from key terms, linear.

Source: Rusnachenko, Loukachevitch, "Studying Attention Models in Sentiment Attitude Extraction Task", NLDB 2020.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_one_of, require_rate
from cenote.core.sets import PaddedTokens
from cenote.pool.sequence.sentiment_attitudes.attention import (
    IMLPAttention,
    InteractiveEncoder,
    LinAttention,
    MLPAttention,
    PiecewiseMaxPool,
    YangAttention,
    ZhouAttention,
    attention_penalty,
    terms_at,
)
from cenote.pool.sequence.sentiment_attitudes.documents import AttitudeScores, attitude_f1, document_attitudes
from cenote.pool.sequence.sentiment_attitudes.terms import (
    NEUTRAL,
    TERMS,
    AttitudeBatch,
    Context,
    TermVectors,
    batch_of,
)
from cenote.pool.sequence.vocabulary import Vocabulary
from cenote.pool.sequence.word_encoders import ConvolutionEncoder, RecurrentEncoder
from cenote.pool.training import History, in_batches, train

Name = Literal[
    "cnn", "pcnn", "bilstm", "att-cnn", "att-pcnn", "att-blstm", "ian", "bilstm-zhou", "bilstm-yang", "bilstm-lin"
]
Keys = Literal["e", "f", "ef", "se", "sef"]
ATTITUDES = ("positive", "negative", NEUTRAL)
SELF = ("bilstm-zhou", "bilstm-yang", "bilstm-lin")
KEYED = ("att-cnn", "att-pcnn", "att-blstm")


class Attended(NamedTuple):
    """What a model says of contexts.

    Attributes:
        logits: `[batch, classes]`.
        weights: `[batch, rows, terms]`, what each row of attention took from each term; `None` of a model without attention.
    """

    logits: Float[Tensor, "batch classes"]
    weights: Float[Tensor, "batch rows terms"] | None


class AttitudeModel(nn.Module):
    """One of the paper's models: `s = W dropout(y) + b`, with `y` what the model of that name makes of a context.

    `cnn`: maxima of convolutions; `pcnn`: maxima of their pieces; `bilstm`: the last states of both directions.
    `att-cnn`, `att-pcnn`, `att-blstm`: the same beside what attention from key terms takes of the vectors of terms.
    `bilstm-zhou`, `bilstm-yang`, `bilstm-lin`: attention of the states from the text alone. `ian`: context and key terms, read
    by an LSTM each, weighted by each other.

    Args:
        name: of the model.
        vectors: of the terms.
        keys: the terms that attention asks from: `e` entities, `f` frames, `s` synonyms, and combinations. From the entities
            alone the answers stand side by side; else they are averaged.
        classes: number of attitudes.
        filters, window: of the convolutions.
        hidden: width of the LSTM's states, of one direction; default 300, of `ian` 128.
        key_hidden: width of the scores that ask from keys.
        attention_hidden: width of the scores of `bilstm-yang` and `bilstm-lin`; default 100, 350.
        rows, joined: of `bilstm-lin`, see `LinAttention`.
        dropout: of `y`; the authors keep 0.5.
        dropout_states: of the LSTM's states; the authors keep 0.8.
        position_biases: of `ian`, whether each of 50 terms has a bias, as the authors'.

    Attributes:
        encoder: convolutions or LSTM, `None` of `ian`.
        attention: of the states, from the text alone, or `None`.
        keyed: attention from key terms, or `None`.

    Example:
        >>> model = AttitudeModel("att-pcnn", TermVectors(20, 8), keys="e", filters=6)
        >>> batch = AttitudeBatch(torch.zeros(2, 9, dtype=torch.long), torch.tensor([[0, 3], [4, 1]]))
        >>> found = model.attend(batch)
        >>> found.logits.shape, found.weights.shape
        (torch.Size([2, 3]), torch.Size([2, 2, 9]))

    Source: Rusnachenko, Loukachevitch, "Studying Attention Models in Sentiment Attitude Extraction Task", NLDB 2020.

    Note:
        The authors' softmax runs over padding too; a batch without a mask does that here.
    """

    def __init__(
        self,
        name: Name,
        vectors: TermVectors,
        keys: Keys = "e",
        classes: int = len(ATTITUDES),
        filters: int = 300,
        window: int = 3,
        hidden: int | None = None,
        key_hidden: int = 10,
        attention_hidden: int | None = None,
        rows: int = 30,
        joined: int | None = 200,
        dropout: float = 0.5,
        dropout_states: float = 0.2,
        position_biases: bool = False,
    ) -> None:
        super().__init__()
        require_one_of(get_args(Name), name=name)
        require_one_of(get_args(Keys), keys=keys)
        require_rate(dropout=dropout, dropout_states=dropout_states)
        self.name: Name = name
        self.keys: Keys = keys
        self.vectors = vectors
        width = vectors.out_dim
        hidden = (128 if name == "ian" else 300) if hidden is None else hidden
        self.encoder: ConvolutionEncoder | RecurrentEncoder | None = None
        if name.endswith("cnn"):
            self.encoder = ConvolutionEncoder(width, filters, (window,))
        elif name != "ian":
            self.encoder = RecurrentEncoder(width, hidden)
        states = 0 if self.encoder is None else self.encoder.out_dim
        self.attention: ZhouAttention | YangAttention | LinAttention | None = None
        if name == "bilstm-zhou":
            self.attention = ZhouAttention(states)
        elif name == "bilstm-yang":
            self.attention = YangAttention(states, 100 if attention_hidden is None else attention_hidden)
        elif name == "bilstm-lin":
            self.attention = LinAttention(states, rows, 350 if attention_hidden is None else attention_hidden, joined)
        self.keyed: MLPAttention | None = None
        if name in KEYED:
            self.keyed = MLPAttention(width, 2, key_hidden) if keys == "e" else IMLPAttention(width, key_hidden)
        self.pieces = PiecewiseMaxPool(states) if name.endswith("pcnn") else None
        biases = (TERMS, _count(keys)) if position_biases else (None, None)
        self.interactive = InteractiveEncoder(width, hidden, *biases) if name == "ian" else None
        self.dropout, self.dropout_states = nn.Dropout(dropout), nn.Dropout(dropout_states)
        self.classifier = nn.Linear(self._pooled_width(states), classes)

    def forward(self, batch: AttitudeBatch) -> Float[Tensor, "batch classes"]:
        """Scores of the attitudes."""
        return self.attend(batch).logits

    def attend(self, batch: AttitudeBatch) -> Attended:
        """As calling the model, and also what its attention took from each term."""
        x = self.embed(batch)
        if self.interactive is not None:
            aspects, real = terms_at(PaddedTokens(x, batch.mask), batch.keys(self.keys))
            tokens = PaddedTokens(x, batch.mask).values
            context, asked_by = self.interactive.context(tokens)[0], self.interactive.aspects(aspects)[0]
            y, weights, _ = self.interactive.attention.attend(context, asked_by, batch.mask, real)
            return Attended(self.classifier(self.dropout(y)), weights)
        states = self.states(x, batch.mask)
        if self.attention is not None:
            pooled = self.attention.attend(states, batch.mask)
            return Attended(self.classifier(self.dropout(pooled.output.flatten(1))), pooled.weights)
        if isinstance(self.encoder, RecurrentEncoder):
            y = self.encoder.ends(states, batch.mask)
        elif self.pieces is not None:
            y = self.pieces(states, batch.entities, batch.mask)
        else:
            y = PaddedTokens(states, batch.mask).max()
        if self.keyed is None:
            return Attended(self.classifier(self.dropout(y)), None)
        asked = self.keyed.attend(x, batch.keys(self.keys), batch.mask)
        return Attended(self.classifier(self.dropout(torch.cat([y, asked.output], -1))), asked.weights)

    def embed(self, batch: AttitudeBatch) -> Float[Tensor, "batch terms width"]:
        """Vectors of the terms."""
        return self.vectors(batch)

    def states(
        self, x: Float[Tensor, "batch terms width"], mask: Bool[Tensor, "batch terms"] | None = None
    ) -> Float[Tensor, "batch terms hidden"]:
        """What the encoder makes of them.

        Raises:
            InputError: of `ian`, whose encoders also read the keys.
        """
        if self.encoder is None:
            raise InputError("states: ian has two encoders; its weights are in attend")
        states = self.encoder(x, mask)
        return self.dropout_states(states) if isinstance(self.encoder, RecurrentEncoder) else states

    def _pooled_width(self, states: int) -> int:
        if self.interactive is not None:
            return self.interactive.out_dim
        if self.attention is not None:
            return self.attention.out_dim * self.attention.vectors if self.name == "bilstm-lin" else states
        pooled = states if self.pieces is None else self.pieces.out_dim
        return pooled + (0 if self.keyed is None else self.keyed.out_dim)


def train_attitudes(
    model: AttitudeModel,
    contexts: Sequence[Context],
    vocabulary: Vocabulary,
    development: Sequence[Context] | None = None,
    *,
    passes: int = 150,
    score_every: int = 10,
    bags: int | None = None,
    lr: float = 0.1,
    penalty: float = 1.0,
    seed: int = 0,
) -> History:
    """Train with Adadelta on bags of one context, each class counting the same; the state with the best document F1 is kept.

    Args:
        model: of any name.
        contexts: with labels.
        vocabulary: of their terms.
        development: with labels, of other documents; `None`: the last state is kept.
        passes: over the contexts.
        score_every: passes between two scores.
        bags: in a step; default 2 of a model with attention, 8 of one without.
        lr: rate of Adadelta.
        penalty: on rows of `bilstm-lin` that look at the same terms.
        seed: of the order and of dropout.

    Raises:
        InputError: where there is no context, or a label is missing or unknown.

    Example:
        >>> frames = {"praises": "positive", "attacks": "negative", "meets": "neutral"}
        >>> def contexts(verb):
        ...     words = ["Alice", verb, "Bob"]
        ...     attitudes = {("a", "b"): frames[verb], ("b", "a"): "neutral"}
        ...     entities = [Entity(0, 1, "a"), Entity(2, 3, "b")]
        ...     return contexts_of(words, entities, frames, attitudes=attitudes, document=verb)[:1]
        >>> from cenote.pool import Entity, contexts_of
        >>> given = [context for verb in frames for context in contexts(verb)] * 4
        >>> vocabulary = Vocabulary.learn([term.lower() for term in c.terms] for c in given)
        >>> _ = torch.manual_seed(0)
        >>> model = AttitudeModel("att-cnn", TermVectors(len(vocabulary), 8), filters=8, dropout=0.0)
        >>> history = train_attitudes(model, given, vocabulary, given, passes=60, score_every=20, lr=1.0)
        >>> predicted(model, contexts("attacks"), vocabulary), history.scores[-1]
        (['negative'], 1.0)

    Source: Rusnachenko, Loukachevitch, "Studying Attention Models in Sentiment Attitude Extraction Task", NLDB 2020.
    """
    y = _classes(contexts)
    weight = len(y) / (len(ATTITUDES) * y.bincount(minlength=len(ATTITUDES)).clamp(min=1).float())
    size = (2 if model.name in (*KEYED, *SELF, "ian") else 8) if bags is None else bags
    generator = torch.Generator().manual_seed(seed)

    def loss(chosen: Int[Tensor, "chosen"]) -> Tensor:
        found = model.attend(batch_of([contexts[i] for i in chosen.tolist()], vocabulary, _terms_of(model)))
        value = F.cross_entropy(found.logits, y[chosen], weight.to(found.logits))
        if isinstance(model.attention, LinAttention) and found.weights is not None:
            value = value + penalty * attention_penalty(found.weights)
        return value

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return train(
            model,
            lambda: in_batches(len(contexts), size, generator),
            loss,
            torch.optim.Adadelta(model.parameters(), lr=lr),
            passes=passes,
            score=None if development is None else lambda: scored(model, development, vocabulary).f1,
            score_every=score_every,
        )


def predicted(model: AttitudeModel, contexts: Sequence[Context], vocabulary: Vocabulary, batch: int = 64) -> list[str]:
    """The likeliest attitude of each context."""
    training = model.training
    model.eval()
    found: list[str] = []
    with torch.no_grad():
        for start in range(0, len(contexts), batch):
            numbers = batch_of(contexts[start : start + batch], vocabulary, _terms_of(model))
            found += [ATTITUDES[i] for i in model(numbers).argmax(-1).tolist()]
    model.train(training)
    return found


def shown(model: AttitudeModel, context: Context, vocabulary: Vocabulary) -> list[tuple[str, str, float]]:
    """Each term of a context with its kind and what attention took from it, the mean over the rows.

    Raises:
        InputError: where the model has no attention.
    """
    training = model.training
    model.eval()
    with torch.no_grad():
        weights = model.attend(batch_of([context], vocabulary, _terms_of(model))).weights
    model.train(training)
    if weights is None:
        raise InputError(f"model: {model.name} has no attention to show")
    return list(zip(context.terms, context.kinds, weights[0].mean(0).tolist(), strict=False))


def scored(model: AttitudeModel, contexts: Sequence[Context], vocabulary: Vocabulary) -> AttitudeScores:
    """F1 of the attitudes of documents, by vote over their contexts, against the labels of the contexts."""
    found = document_attitudes(contexts, predicted(model, contexts, vocabulary))
    truth = document_attitudes(contexts, [ATTITUDES[i] for i in _classes(contexts).tolist()])
    return attitude_f1(found, truth)


def _classes(contexts: Sequence[Context]) -> Int[Tensor, "contexts"]:
    unknown = sorted({str(c.label) for c in contexts} - set(ATTITUDES))
    if unknown or not contexts:
        raise InputError(
            f"contexts: expected labels {', '.join(ATTITUDES)}, at least one, got {', '.join(unknown) or 'none'}"
        )
    return torch.tensor([ATTITUDES.index(str(c.label)) for c in contexts])


def _terms_of(model: AttitudeModel) -> int | None:
    biased = model.interactive is not None and model.interactive.attention.context_bias is not None
    return TERMS if biased else None


def _count(keys: str) -> int:
    return sum({"e": 2, "s": 6, "f": 5}[letter] for letter in keys)
