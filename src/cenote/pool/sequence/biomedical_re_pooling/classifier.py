"""The whole classifier of relations: features of words, an encoder, a pooling, and its use on sentences.

Source: "On the Effectiveness of the Pooling Methods for Biomedical Relation Extraction with Deep Learning", LOUHI 2019.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.catalog import create, method
from cenote.compare.metrics import f1, precision_recall_f1
from cenote.core.errors import InputError
from cenote.core.requirements import require_one_of, require_rate
from cenote.pool.sequence.biomedical_re_pooling.corpora import NEGATIVE, RelationExample
from cenote.pool.sequence.biomedical_re_pooling.pools import IndexSetPool, RelationPooled
from cenote.pool.sequence.dependency_trees import pad_heads
from cenote.pool.sequence.vocabulary import Vocabulary
from cenote.pool.sequence.word_encoders import ConvolutionEncoder, PlaceEmbedding, RecurrentEncoder, TreeEncoder
from cenote.pool.training import History, in_batches, train

Encoder = Literal["cnn", "lstm", "tree", "none"]
Vectors = Callable[[Sequence[Sequence[str]]], Sequence[Float[Tensor, "_words dim"]]]
"""From sentences, each its words, to the vectors of the words of each: states of a language model, say."""


class RelationBatch(NamedTuple):
    """Sentences as numbers.

    Attributes:
        words: `[batch, tokens]`, numbers of words, or `[batch, tokens, dim]`, their vectors.
        mask: True on real words; padding stands behind them.
        subject, object_: `[batch, 2]`, spans of the mentions.
        heads: `[batch, tokens]`, or `None`.
        types, relations, tags: `[batch, tokens]`, of each word the type of the mention that it is part of, its relation to its
            head, its tag; 0 where there is none, `None` where the classifier does not read them.
    """

    words: Tensor
    mask: Bool[Tensor, "batch tokens"]
    subject: Int[Tensor, "batch 2"]
    object_: Int[Tensor, "batch 2"]
    heads: Int[Tensor, "batch tokens"] | None = None
    types: Int[Tensor, "batch tokens"] | None = None
    relations: Int[Tensor, "batch tokens"] | None = None
    tags: Int[Tensor, "batch tokens"] | None = None


class RelationClassifier(nn.Module):
    """Words with their places and types, an encoder, a pooling, a hidden layer, one score per relation.

    `x_n = [word ; distance to subject ; distance to object ; type ; relation ; tag]`, `h = encoder(x)`, `y = pool(h)`,
    `s = W_2 dropout(ReLU(W_1 y + b_1)) + b_2`

    Args:
        pool: name of a pooling of this system, or one built for the width that `encoder` gives.
        classes: number of relations, the negative class included.
        words: number of words; `None`: words come as vectors of width `dim`.
        dim: width of a word's vector.
        encoder: `"cnn"`, windows of 2 to 5 words; `"lstm"`, both directions; `"tree"`, convolutions over the tree on those;
            `"none"`.
        hidden: width of a direction of the LSTM, of a filter bank, and of the hidden layer.
        reach: of the distances that are told apart.
        feature_width: of distances, types, relations and tags.
        types, relations, tags: number of each; 0: not read.
        dropout: of the words' features and of the hidden layer.

    Example:
        >>> model = RelationClassifier("ent-dep0", classes=3, words=50, hidden=8)
        >>> batch = RelationBatch(
        ...     torch.randint(2, 50, (1, 4)), torch.ones(1, 4).bool(), torch.tensor([[0, 1]]), torch.tensor([[3, 4]]),
        ...     heads=torch.tensor([[1, -1, 1, 2]]),
        ... )
        >>> model(batch).shape, model.attend(batch)[1].sets[0, 2].tolist()
        (torch.Size([1, 3]), [True, True, True, True])

    Source: "On the Effectiveness of the Pooling Methods for Biomedical Relation Extraction with Deep Learning", LOUHI 2019.

    Note:
        The paper's body was not available to us; features, widths and the hidden layer are those usual in its field.
    """

    def __init__(
        self,
        pool: str | IndexSetPool,
        classes: int,
        words: int | None = None,
        dim: int = 100,
        encoder: Encoder = "lstm",
        hidden: int = 100,
        reach: int = 50,
        feature_width: int = 10,
        types: int = 0,
        relations: int = 0,
        tags: int = 0,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        require_one_of(("cnn", "lstm", "tree", "none"), encoder=encoder)
        require_rate(dropout=dropout)
        self.words = None if words is None else nn.Embedding(words, dim, 0)
        self.dim = dim
        self.near = nn.ModuleList(PlaceEmbedding(reach, feature_width) for _ in range(2))
        self.features = nn.ModuleDict(
            {
                name: nn.Embedding(number, feature_width, 0)
                for name, number in (("types", types), ("relations", relations), ("tags", tags))
                if number
            }
        )
        width = dim + feature_width * (2 + len(self.features))
        self.encoder: ConvolutionEncoder | RecurrentEncoder | TreeEncoder | None = None
        if encoder == "cnn":
            self.encoder = ConvolutionEncoder(width, hidden)
        elif encoder == "lstm":
            self.encoder = RecurrentEncoder(width, hidden)
        elif encoder == "tree":
            self.encoder = TreeEncoder(width, hidden)
        read = width if self.encoder is None else self.encoder.out_dim
        self.pool = named_pool(pool, read) if isinstance(pool, str) else pool
        if self.pool.dim != read:
            raise InputError(f"pool: reads words of width {self.pool.dim}, but the encoder gives {read}")
        self.hidden = nn.Linear(self.pool.out_dim, hidden)
        self.classifier = nn.Linear(hidden, classes)
        self.dropout = nn.Dropout(dropout)

    def forward(self, batch: RelationBatch) -> Float[Tensor, "batch classes"]:
        """Scores of the relations."""
        states = self.states(batch)
        return self._classified(self.pool(states, batch.subject, batch.object_, batch.heads, batch.mask))

    def attend(self, batch: RelationBatch) -> tuple[Float[Tensor, "batch classes"], RelationPooled]:
        """As calling the classifier, and also what each part of the pooling took from each word."""
        pooled = self.pool.attend(self.states(batch), batch.subject, batch.object_, batch.heads, batch.mask)
        return self._classified(pooled.output), pooled

    def states(self, batch: RelationBatch) -> Float[Tensor, "batch tokens dim"]:
        """A vector per word, what the pooling reads.

        Raises:
            InputError: where words are numbers and should be vectors or the other way round, or a feature is missing.
        """
        if (self.words is None) != batch.words.is_floating_point():
            wanted = f"vectors of width {self.dim}" if self.words is None else "numbers of words"
            raise InputError(f"words: this classifier reads {wanted}, got {batch.words.dtype}")
        words = batch.words if self.words is None else self.words(batch.words)
        if words.shape[-1] != self.dim:
            raise InputError(f"words: this classifier reads vectors of width {self.dim}, got {words.shape[-1]}")
        count = words.shape[1]
        spans = (batch.subject, batch.object_)
        parts = [words, *(near(span[:, :1], count) for near, span in zip(self.near, spans, strict=True))]
        for name, table in self.features.items():
            numbers = getattr(batch, name)
            if numbers is None:
                raise InputError(f"{name}: this classifier reads them; give {name} of each word")
            parts.append(table(numbers))
        x = self.dropout(torch.cat(parts, -1))
        if self.encoder is None:
            return x
        if isinstance(self.encoder, TreeEncoder):
            return self.encoder(x, batch.mask, batch.heads)
        return self.encoder(x, batch.mask)

    def _classified(self, pooled: Float[Tensor, "batch width"]) -> Float[Tensor, "batch classes"]:
        return self.classifier(self.dropout(torch.relu(self.hidden(self.dropout(pooled)))))


def named_pool(name: str, dim: int) -> IndexSetPool:
    """A pooling of this system by its name in the catalog.

    Raises:
        InputError: where it is none of them.

    >>> named_pool("ent-dym", 8).out_dim
    24
    """
    pool = create(name, dim=dim) if method(name).kind == "relations" else None
    if not isinstance(pool, IndexSetPool):
        raise InputError(
            f"pool: {name} does not pool words around two mentions; name one of kind relations (cenote list)"
        )
    return pool


class Prediction(NamedTuple):
    """What is said of a sentence.

    Attributes:
        label: the likeliest relation.
        probabilities: of all, by name.
        words: for each part of the pooling the words that it took something from, with how much.
        fallback: whether the tree could not be used, and the whole sentence stood in for it.
    """

    label: str
    probabilities: dict[str, float]
    words: tuple[tuple[tuple[str, float], ...], ...]
    fallback: bool


class RelationScores(NamedTuple):
    """How well relations are found.

    Attributes:
        micro_f1: over the relations without the negative class.
        precision, recall, f1: of each relation, the negative one included.
    """

    micro_f1: float
    precision: dict[str, float]
    recall: dict[str, float]
    f1: dict[str, float]


class RelationExtractor:
    """A classifier of relations for sentences with mentions: learnt from examples, used on others.

    Args:
        pool: name of a pooling, such as `"ent-dep0"`.
        encoder: see `RelationClassifier`.
        vectors: gives the vectors of words, in place of an embedding that is learnt: states of a language model.
        seed: of initialisation, order and dropout.
        settings: further arguments of `RelationClassifier`.

    Attributes:
        labels: names of the relations, once it has learnt.
        model: the classifier, once it has learnt.

    Example:
        >>> def example(verb: str, label: str) -> RelationExample:
        ...     return RelationExample(("aspirin", verb, "warfarin"), (0, 1), (2, 3), label, heads=(1, -1, 1))
        >>> examples = [example("raises", "effect"), example("and", "none")] * 4
        >>> extractor = RelationExtractor("ent-dep0", hidden=8, dropout=0.0)
        >>> history = extractor.fit(examples, examples, passes=20, lr=0.02)
        >>> extractor.predict([example("raises", None)])[0].label, extractor.score(examples).micro_f1
        ('effect', 1.0)

    Source: "On the Effectiveness of the Pooling Methods for Biomedical Relation Extraction with Deep Learning", LOUHI 2019.
    """

    def __init__(
        self,
        pool: str = "ent-dep0",
        encoder: Encoder = "lstm",
        vectors: Vectors | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        self.pool = pool
        self.encoder: Encoder = encoder
        self.vectors = vectors
        self.seed = seed
        self.settings = settings
        self.labels: tuple[str, ...] = ()
        self.model: RelationClassifier | None = None

    def fit(
        self,
        examples: Sequence[RelationExample],
        development: Sequence[RelationExample],
        *,
        passes: int = 100,
        batch: int = 32,
        lr: float = 1e-3,
        patience: int | None = 10,
        clip: float | None = 5.0,
        class_weights: bool = False,
    ) -> History:
        """Learn by cross-entropy and Adam; the state with the best micro F1 on the development examples is kept.

        Args:
            examples: with labels.
            development: with labels, not among the others.
            passes: at most.
            batch: sentences in a step.
            lr: rate of Adam.
            patience: passes without a better F1 after which it stops.
            clip: largest norm of the gradient.
            class_weights: whether each relation counts the same, however many examples it has.

        Raises:
            InputError: where there are no examples, a label is missing, or some have trees, types or tags and others do not.
        """
        if not examples or not development or any(e.label is None for e in (*examples, *development)):
            raise InputError("examples, development: expected sentences, at least one each, all with a label")
        given = {e.label for e in examples if e.label is not None}
        self.labels = (NEGATIVE, *sorted(given - {NEGATIVE}))
        self._learn_names(examples)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            self.model = self._built(examples)
            y = self._classes(examples)
            counts = y.bincount(minlength=len(self.labels)).clamp(min=1)
            weight = counts.sum() / (len(self.labels) * counts.float()) if class_weights else None
            model = self.model

            def loss(chosen: Int[Tensor, "chosen"]) -> Tensor:
                numbers = chosen.tolist()
                return F.cross_entropy(model(self.batch([examples[i] for i in numbers])), y[chosen], weight)

            return train(
                model,
                lambda: in_batches(len(examples), batch),
                loss,
                torch.optim.Adam(model.parameters(), lr=lr),
                passes=passes,
                clip=clip,
                score=lambda: self.score(development).micro_f1,
                patience=patience,
            )

    def predict(self, examples: Sequence[RelationExample]) -> list[Prediction]:
        """The relation of each sentence, and the words that each part of the pooling took.

        Raises:
            InputError: before it has learnt.
        """
        if not examples:
            return []
        model = self._learnt()
        with torch.no_grad():
            logits, pooled = model.eval().attend(self.batch(examples))
        found = []
        for i, (example, likely) in enumerate(zip(examples, logits.softmax(-1).tolist(), strict=True)):
            by_name = dict(zip(self.labels, likely, strict=True))
            words = tuple(
                tuple((w, share) for w, share in zip(example.words, row, strict=False) if share > 0)
                for row in pooled.weights[i].tolist()
            )
            found.append(Prediction(max(by_name, key=by_name.__getitem__), by_name, words, bool(pooled.fallback[i])))
        return found

    def score(self, examples: Sequence[RelationExample]) -> RelationScores:
        """Micro F1 of the relations without the negative class, and precision, recall and F1 of each."""
        model = self._learnt()
        with torch.no_grad():
            logits = model.eval()(self.batch(examples)).double().numpy()
        y, once = self._classes(examples).numpy(), np.ones((1, len(examples)))
        micro = f1("micro", tuple(range(1, len(self.labels))))(logits, y, once)[0]
        each = precision_recall_f1(logits, y, once)[:, 0]
        return RelationScores(float(micro), *(dict(zip(self.labels, row.tolist(), strict=True)) for row in each))

    def batch(self, examples: Sequence[RelationExample]) -> RelationBatch:
        """Sentences as the classifier reads them.

        Raises:
            InputError: where some have trees, types or tags and others do not.
        """
        words = [e.words for e in examples]
        ids, mask = self._names["words"].batch(words)
        read: Tensor = ids
        if self.vectors is not None:
            rows = self.vectors(words)
            if [len(row) for row in rows] != [len(w) for w in words]:
                raise InputError("vectors: expected one vector for each word of each sentence")
            read = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        numbers = {
            name: self._names[name].batch(self._named(name, examples))[0] for name in self._names if name != "words"
        }
        heads = self._all("heads", examples)
        subject, object_ = (torch.tensor([list(getattr(e, side)) for e in examples]) for side in ("subject", "object_"))
        return RelationBatch(
            read,
            mask,
            subject,
            object_,
            None if heads is None else pad_heads(heads)[0],
            numbers.get("types"),
            numbers.get("relations"),
            numbers.get("tags"),
        )

    def _built(self, examples: Sequence[RelationExample]) -> RelationClassifier:
        numbers = {name: len(names) for name, names in self._names.items() if name != "words"}
        settings = {**numbers, **self.settings}
        if self.vectors is None:
            settings.setdefault("words", len(self._names["words"]))
        else:
            settings["dim"] = self.vectors([examples[0].words])[0].shape[-1]
        return RelationClassifier(self.pool, len(self.labels), encoder=self.encoder, **settings)

    def _learn_names(self, examples: Sequence[RelationExample]) -> None:
        self._names = {"words": Vocabulary.learn(e.words for e in examples)}
        for name in ("types", "relations", "tags"):
            if self._all(name, examples) is not None:
                self._names[name] = Vocabulary.learn(self._named(name, examples))

    def _named(self, name: str, examples: Sequence[RelationExample]) -> list[Sequence[str]]:
        """A name for each word; of types that of the mention that it is part of, or none."""
        rows = self._all(name, examples)
        if rows is None:
            raise InputError(f"{name}: were there when this extractor learnt; give {name} of each sentence")
        if name != "types":
            return list(rows)
        found: list[Sequence[str]] = []
        for e, (subject, object_) in zip(examples, rows, strict=True):
            kinds = ["O"] * len(e.words)
            for (start, end), kind in ((e.subject, subject), (e.object_, object_)):
                kinds[start:end] = [kind] * (end - start)
            found.append(kinds)
        return found

    def _all(self, name: str, examples: Sequence[RelationExample]) -> list[Any] | None:
        rows = [getattr(e, name) for e in examples]
        given = [row for row in rows if row is not None]
        if given and len(given) != len(rows):
            raise InputError(f"{name}: {len(given)} of {len(rows)} sentences have them; give all or none")
        return given or None

    def _classes(self, examples: Sequence[RelationExample]) -> Int[Tensor, "examples"]:
        unknown = {str(e.label) for e in examples} - set(self.labels)
        if unknown:
            raise InputError(f"label: {', '.join(sorted(unknown))} was not among the labels that were learnt")
        return torch.tensor([self.labels.index(str(e.label)) for e in examples])

    def _learnt(self) -> RelationClassifier:
        if self.model is None:
            raise InputError("model: this extractor has not learnt yet; call fit first")
        return self.model
