"""The whole classifier: embeddings, LSTM, attention conditioned on a lexicon, linear; and its use on sentences.

Source: Margatina, Baziotis, Potamianos, "Attention-based Conditioning Methods for External Knowledge Integration", ACL 2019.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.compare.metrics import Metric, accuracy, balanced_accuracy, f1
from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least, require_one_of, require_rate
from cenote.pool.sequence.attention_conditioning.attention import (
    AttentionalAffine,
    AttentionalConcat,
    AttentionalGate,
    BaselineAttention,
    ConditionedAttention,
    Lexicon,
)
from cenote.pool.sequence.vocabulary import UNKNOWN, Vocabulary
from cenote.pool.sequence.word_encoders import RecurrentEncoder
from cenote.pool.training import History, in_batches, train

Way = Literal["none", "concat", "gate", "affine", "nonlinear affine"]
Joined = Literal["nowhere", "embeddings", "states"]
WAYS: dict[str, Callable[[int, int], ConditionedAttention]] = {
    "concat": AttentionalConcat,
    "gate": AttentionalGate,
    "affine": AttentionalAffine,
    "nonlinear affine": lambda dim, features: AttentionalAffine(dim, features, tanh=True),
}
SCORES: dict[str, Metric] = {"accuracy": accuracy, "macro F1": f1("macro"), "macro recall": balanced_accuracy}
"""What the benchmarks are scored by."""


class AffectiveClassifier(nn.Module):
    """Sentences by a lexicon in one of many ways: embeddings, LSTM, attention, linear.

    `e_n = dropout(E_n + noise)`, `h = LSTM([e ; c])` or `LSTM(e)` or, without LSTM, `e`; `r = attention([h ; c], c)` or
    `attention(h, c)`; `s = W r + b`, with `c` what the lexicon says of each word.

    Args:
        features: numbers that the lexicon says of a word.
        classes: number of classes.
        words: number of words; `None`: words come as vectors of width `dim`.
        dim: width of a word's vector.
        way: how the attention is conditioned; `"none"`: not at all. Or what makes an attention of the widths of states and
            features.
        joined: whether the features are also joined to the embeddings, or to the states, or `"nowhere"`.
        hidden: width of the LSTM, which reads from the left.
        layers: of the LSTM, 1 or 2; 0: none.
        noise: deviation of the noise on the embeddings in training.
        dropout: of the embeddings.
        dropout_states: of the states, and between layers.
        scorer: layers that score a word without conditioning, see `BaselineAttention`.

    Example:
        >>> model = AffectiveClassifier(features=3, classes=2, words=50, dim=8, hidden=6)
        >>> ids, lexicon = torch.randint(2, 50, (4, 7)), torch.zeros(4, 7, 3)
        >>> logits, weights = model.attend(ids, lexicon)
        >>> logits.shape, weights.shape
        (torch.Size([4, 2]), torch.Size([4, 7]))

    Source: Margatina, Baziotis, Potamianos, "Attention-based Conditioning Methods for External Knowledge Integration",
    ACL 2019.
    """

    def __init__(
        self,
        features: int,
        classes: int,
        words: int | None = None,
        dim: int = 300,
        way: Way | Callable[[int, int], ConditionedAttention] = "affine",
        joined: Joined = "nowhere",
        hidden: int = 150,
        layers: int = 1,
        noise: float = 0.1,
        dropout: float = 0.2,
        dropout_states: float = 0.3,
        scorer: Literal[1, 2] = 1,
    ) -> None:
        super().__init__()
        if isinstance(way, str):
            require_one_of(get_args(Way), way=way)
        require_one_of(get_args(Joined), joined=joined)
        require_at_least(0, noise=noise, layers=layers)
        require_rate(dropout=dropout, dropout_states=dropout_states)
        self.dim = dim
        self.features = features
        self.joined = joined
        self.noise = noise
        self.words = None if words is None else nn.Embedding(words, dim, 0)
        self.dropout, self.dropout_states = nn.Dropout(dropout), nn.Dropout(dropout_states)
        width = dim + features * (joined == "embeddings")
        self.encoder = (
            RecurrentEncoder(width, hidden, bidirectional=False, layers=layers, dropout=dropout_states)
            if layers
            else None
        )
        width = (width if self.encoder is None else hidden) + features * (joined == "states")
        self.attention: ConditionedAttention | BaselineAttention
        if way == "none":
            self.attention = BaselineAttention(width, scorer, dropout_states)
        else:
            build = WAYS[way] if isinstance(way, str) else way
            self.attention = build(width, features)
        self.classifier = nn.Linear(width, classes)

    def forward(
        self,
        words: Tensor,
        features: Float[Tensor, "batch tokens features"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch classes"]:
        """Scores of the classes; `words` are numbers `[batch, tokens]` or vectors `[batch, tokens, dim]`."""
        return self.attend(words, features, mask)[0]

    def attend(
        self,
        words: Tensor,
        features: Float[Tensor, "batch tokens features"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> tuple[Float[Tensor, "batch classes"], Float[Tensor, "batch tokens"]]:
        """As calling the classifier, and also the weight of each word."""
        h = self.states(words, features, mask)
        pooled = (
            self.attention.attend(h, mask)
            if isinstance(self.attention, BaselineAttention)
            else self.attention.attend(h, features, mask)
        )
        assert pooled.weights is not None
        return self.classifier(pooled.output), pooled.weights.squeeze(1)

    def states(
        self,
        words: Tensor,
        features: Float[Tensor, "batch tokens features"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        """What the attention pools.

        Raises:
            InputError: where words are numbers and should be vectors or the other way round.
        """
        if (self.words is None) != words.is_floating_point() or (self.words is None and words.shape[-1] != self.dim):
            wanted = f"vectors of width {self.dim}" if self.words is None else "numbers of words"
            raise InputError(f"words: this classifier reads {wanted}, got {words.dtype} {tuple(words.shape)}")
        x = words if self.words is None else self.words(words)
        if self.training and self.noise:
            x = x + self.noise * torch.randn_like(x)
        x = self.dropout(x)
        if self.joined == "embeddings":
            x = torch.cat([x, features.to(x)], -1)
        h = x if self.encoder is None else self.dropout_states(self.encoder(x, mask))
        return torch.cat([h, features.to(h)], -1) if self.joined == "states" else h


class Affect(NamedTuple):
    """What is said of a sentence.

    Attributes:
        label: the likeliest class.
        probabilities: of all, by name.
        weights: of each word.
        entries: of each word that the lexicon has, its numbers by their names.
    """

    label: str
    probabilities: dict[str, float]
    weights: tuple[tuple[str, float], ...]
    entries: dict[str, dict[str, float]]


class AffectiveReader:
    """A classifier of sentences with a lexicon: learnt from examples, used on others.

    Args:
        lexicon: what is known of words.
        vectors: of words, trained elsewhere; they stay as they are. `None`: they are learnt with the rest.
        seed: of initialisation, order, noise and dropout.
        settings: further arguments of `AffectiveClassifier`.

    Attributes:
        labels: the classes, once it has learnt.
        model: the classifier, once it has learnt.

    Example:
        >>> lexicon = Lexicon({"afinn": {"good": [3.0], "bad": [-3.0]}})
        >>> sentences, labels = [["a", "good", "film"], ["a", "bad", "film"]] * 4, ["positive", "negative"] * 4
        >>> reader = AffectiveReader(lexicon, dim=8, hidden=8, way="affine")
        >>> history = reader.fit(sentences, labels, sentences, labels, passes=30, lr=0.02)
        >>> found = reader.predict([["a", "good", "day"]])[0]
        >>> found.label, found.entries
        ('positive', {'good': {'afinn': 3.0}})

    Source: Margatina, Baziotis, Potamianos, "Attention-based Conditioning Methods for External Knowledge Integration",
    ACL 2019.
    """

    def __init__(
        self, lexicon: Lexicon, vectors: Mapping[str, Sequence[float]] | None = None, seed: int = 0, **settings: Any
    ) -> None:
        self.lexicon = lexicon
        self.vectors = vectors
        self.seed = seed
        self.settings = settings
        self.labels: tuple[str, ...] = ()
        self.model: AffectiveClassifier | None = None
        self.vocabulary = Vocabulary(())

    def fit(
        self,
        sentences: Sequence[Sequence[str]],
        labels: Sequence[str],
        development: Sequence[Sequence[str]],
        development_labels: Sequence[str],
        *,
        score: Literal["accuracy", "macro F1", "macro recall"] = "accuracy",
        passes: int = 50,
        batch: int = 64,
        lr: float = 1e-3,
        clip: float = 5.0,
        patience: int | None = 10,
    ) -> History:
        """Learn by cross-entropy and Adam without weight decay; the state with the best score on development is kept.

        Args:
            sentences, labels: to learn from; sentences are words.
            development, development_labels: others.
            score: what the benchmark is scored by.
            passes: at most.
            batch: sentences in a step.
            lr: rate of Adam.
            clip: largest norm of the gradient.
            patience: passes without a better score after which it stops; 10 to 15 in the authors' code.

        Raises:
            InputError: where there are not as many labels as sentences, or none, or a class is in development alone.
        """
        for name, xs, ys in (("labels", sentences, labels), ("development_labels", development, development_labels)):
            if len(xs) != len(ys) or not xs:
                raise InputError(f"{name}: expected one for each of {len(xs)} sentences, at least one, got {len(ys)}")
        require_one_of(SCORES, score=score)
        self.labels = tuple(sorted(set(labels)))
        known = None if self.vectors is None else [[word for word in s if word in self.vectors] for s in sentences]
        self.vocabulary = Vocabulary.learn(sentences if known is None else [*known, list(self.vectors or ())])
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            self.model = model = self._built()
            y = self._classes(labels)

            def loss(chosen: Int[Tensor, "chosen"]) -> Tensor:
                return F.cross_entropy(model(*self.batch([sentences[i] for i in chosen.tolist()])), y[chosen])

            return train(
                model,
                lambda: in_batches(len(sentences), batch),
                loss,
                torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr),
                passes=passes,
                clip=clip,
                score=lambda: self.score(development, development_labels)[score],
                patience=patience,
            )

    def predict(self, sentences: Sequence[Sequence[str]]) -> list[Affect]:
        """The class of each sentence, the weight of each word, and what the lexicon says of those that it has.

        Raises:
            InputError: before it has learnt.
        """
        if not sentences:
            return []
        model = self._learnt()
        with torch.no_grad():
            logits, weights = model.eval().attend(*self.batch(sentences))
        found = []
        for sentence, likely, row in zip(sentences, logits.softmax(-1).tolist(), weights.tolist(), strict=True):
            by_name = dict(zip(self.labels, likely, strict=True))
            entries = {
                word: dict(zip(self.lexicon.names, self.lexicon.lookup([word])[0].tolist(), strict=True))
                for word in sentence
                if word in self.lexicon
            }
            looked = tuple(zip(sentence, row[: len(sentence)], strict=True))
            found.append(Affect(max(by_name, key=by_name.__getitem__), by_name, looked, entries))
        return found

    def score(self, sentences: Sequence[Sequence[str]], labels: Sequence[str]) -> dict[str, float]:
        """Accuracy, macro F1 and macro recall."""
        model = self._learnt()
        with torch.no_grad():
            logits = model.eval()(*self.batch(sentences)).double().numpy()
        y, once = self._classes(labels).numpy(), np.ones((1, len(sentences)))
        return {name: float(metric(logits, y, once)[0]) for name, metric in SCORES.items()}

    def batch(
        self, sentences: Sequence[Sequence[str]]
    ) -> tuple[Int[Tensor, "batch tokens"], Float[Tensor, "batch tokens features"], Bool[Tensor, "batch tokens"]]:
        """`(numbers of words, what the lexicon says of them, mask)`."""
        ids, mask = self.vocabulary.batch(sentences)
        return ids, self.lexicon.lookup_batch(sentences)[0], mask

    def _built(self) -> AffectiveClassifier:
        settings = dict(self.settings)
        if self.vectors is not None:
            settings["dim"] = len(next(iter(self.vectors.values())))
        model = AffectiveClassifier(self.lexicon.features, len(self.labels), len(self.vocabulary), **settings)
        if self.vectors is not None and model.words is not None:
            with torch.no_grad():
                for number, word in enumerate(self.vocabulary.names, UNKNOWN + 1):
                    model.words.weight[number] = torch.tensor(list(self.vectors[word]))
            model.words.weight.requires_grad_(False)
        return model

    def _classes(self, labels: Sequence[str]) -> Int[Tensor, "sentences"]:
        if unknown := set(labels) - set(self.labels):
            raise InputError(f"labels: {', '.join(sorted(unknown))} was not among the labels that were learnt")
        return torch.tensor([self.labels.index(label) for label in labels])

    def _learnt(self) -> AffectiveClassifier:
        if self.model is None:
            raise InputError("model: this reader has not learnt yet; call fit first")
        return self.model
