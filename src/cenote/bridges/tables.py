"""Models of tables in scikit-learn's manners."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy import ndarray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.model_selection import StratifiedShuffleSplit
from sklearn.utils.validation import check_is_fitted

from cenote.core import InputError, files
from cenote.core.seeded import seeded
from cenote.mix.autoint.model import AutoInt
from cenote.mix.autoint.table import Scaling, TableEncoder, is_missing
from cenote.mix.autoint.training import interaction_maps, logits_of, train_autoint

FORMAT = 1
CARD, STATE = "autoint.json", "autoint.safetensors"
REMEDY = "save the model again"


class AutoIntClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """AutoInt on the columns of a table: numbers, categories, several categories at once, missing and unseen values.

    A table is a data frame, a table of pyarrow, a mapping of columns or an array `[rows, columns]`. Columns may come in another
    order than when it was fitted, and others beside them.

    Args:
        dim, blocks, heads, residual, paper_form, deep, dropout, embedding_dropout: see `cenote.mix.AutoInt`.
        categorical: columns whose numbers are names.
        scaling, min_count: see `cenote.mix.TableEncoder`.
        epochs, batch_size, learning_rate, weight_decay: of Adam. The paper's 3 epochs of batches of 1,024 are for millions of
            rows.
        patience: epochs without a better log loss on held-out rows behind which it ends.
        validation_fraction: share of the rows that are held out for this; 0 for none.
        random_state: seed of initialisation, held-out rows and batches.

    Attributes:
        classes_: the classes, sorted.
        model_, encoder_: what was fitted.
        feature_names_in_: the columns, in the order of the interaction map.
        validation_score_: less the best log loss; None without held-out rows.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> table = {"colour": rng.choice(["red", "blue"], 200), "shape": rng.choice(["round", "flat"], 200)}
        >>> y = (table["colour"] == "red") ^ (table["shape"] == "round")
        >>> model = AutoIntClassifier().fit(table, y)
        >>> model.score(table, y), model.interactions(table).shape
        (1.0, (2, 2))

    Source: Song et al. (2019), arXiv 1810.11921.
    """

    def __init__(
        self,
        *,
        dim: int = 16,
        blocks: Sequence[int] = (16, 16),
        heads: int = 2,
        residual: bool = True,
        paper_form: bool = False,
        deep: Sequence[int] | None = None,
        dropout: float = 0.0,
        embedding_dropout: float = 0.0,
        categorical: Collection[str] = (),
        scaling: Scaling = "standard",
        min_count: int = 2,
        epochs: int = 60,
        batch_size: int = 128,
        learning_rate: float = 3e-3,
        weight_decay: float = 0.0,
        patience: int = 10,
        validation_fraction: float = 0.2,
        random_state: int = 0,
    ) -> None:
        self.dim = dim
        self.blocks = blocks
        self.heads = heads
        self.residual = residual
        self.paper_form = paper_form
        self.deep = deep
        self.dropout = dropout
        self.embedding_dropout = embedding_dropout
        self.categorical = categorical
        self.scaling = scaling
        self.min_count = min_count
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.patience = patience
        self.validation_fraction = validation_fraction
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> Self:
        """Fit to classes `y` `[rows]`.

        Raises:
            InputError: where rows and targets do not fit, the target is missing somewhere, has fractions, or is one class.
        """
        if not 0 <= self.validation_fraction < 1:
            raise InputError(f"validation_fraction: expected a share from 0 to below 1, got {self.validation_fraction}")
        labels = _labels(y)
        self.classes_, numbers = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise InputError(f"y: is {self.classes_.tolist()[0]!r} in every row; a classifier needs two classes")
        target = torch.as_tensor(numbers)
        held = self._held_out(numbers)
        self.encoder_ = TableEncoder(self.categorical, scaling=self.scaling, min_count=self.min_count).fit(X)
        rows = self.encoder_.transform(X)
        if len(rows.features) != len(target):
            raise InputError(f"y: has {len(target)} targets for {len(rows.features)} rows of X")
        self.feature_names_in_ = np.array(self.encoder_.names, dtype=object)
        self.n_features_in_ = len(self.encoder_.names)
        with seeded(self.random_state):
            self.model_ = self._built()
        kept = torch.as_tensor(~held).nonzero().squeeze(1)
        aside = torch.as_tensor(held).nonzero().squeeze(1)
        fitted = train_autoint(
            self.model_,
            rows.select(kept),
            target[kept],
            (rows.select(aside), target[aside]) if len(aside) else None,
            epochs=self.epochs,
            batch=self.batch_size,
            lr=self.learning_rate,
            weight_decay=self.weight_decay,
            patience=self.patience,
            keep="log_loss",
            random_state=self.random_state,
        )
        self.validation_score_ = max(fitted.scores) if fitted.scores else None
        return self

    def predict_proba(self, X: Any) -> ndarray:
        """Probabilities `[rows, classes]`, in the order of `classes_`."""
        check_is_fitted(self, "model_")
        logits = logits_of(self.model_, self.encoder_.transform(X))
        if logits.shape[1] == 1:
            p = logits.double().sigmoid()
            return torch.cat([1 - p, p], 1).numpy()
        return logits.double().softmax(1).numpy()

    def predict(self, X: Any) -> ndarray:
        """Most probable class of each row."""
        return self.classes_[self.predict_proba(X).argmax(1)]

    def interactions(self, X: Any) -> ndarray:
        """What each column takes of each, mean over rows, heads and layers, `[columns, columns]`; rows sum to 1."""
        check_is_fitted(self, "model_")
        return interaction_maps(self.model_, self.encoder_.transform(X)).mean(0).numpy()

    def explain(self, X: Any) -> ndarray:
        """The same of each row and layer, mean over heads, `[rows, layers, columns, columns]`."""
        check_is_fitted(self, "model_")
        with torch.no_grad():
            found = self.model_.explain(*self.encoder_.transform(X)).weights
        if not found:
            raise InputError("blocks: the model has no interacting layer, and so no map")
        return torch.stack([w.mean(1) for w in found], 1).numpy()

    def save(self, folder: str | Path) -> None:
        """Write it to a folder; `load` makes the same again. Nothing is pickled."""
        check_is_fitted(self, "model_")
        where = Path(folder)
        where.mkdir(parents=True, exist_ok=True)
        settings = {
            name: list(value) if isinstance(value, (tuple, set, frozenset)) else value
            for name, value in self.get_params().items()
        }
        card = {
            "format": FORMAT,
            "settings": settings,
            "classes": self.classes_.tolist(),
            "encoder": self.encoder_.state(),
            "validation_score": self.validation_score_,
        }
        files.write_saved(where / CARD, where / STATE, card, self.model_.state_dict())

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            InputError: naming the file, where it is none of these, or damaged.
        """
        where = Path(folder)
        try:
            card, state = files.read_saved(
                where / CARD, where / STATE, REMEDY, format=int, settings=dict, classes=list, encoder=dict
            )
        except OSError as error:
            raise InputError(
                f"{where}: cannot read it ({error.strerror or error}); name a folder that save wrote"
            ) from None
        files.require_format(where, card, FORMAT)
        made = cls(**card["settings"])
        made.classes_ = np.array(card["classes"])
        made.encoder_ = TableEncoder.of_state(card["encoder"])
        made.feature_names_in_ = np.array(made.encoder_.names, dtype=object)
        made.n_features_in_ = len(made.encoder_.names)
        made.validation_score_ = card.get("validation_score")
        made.model_ = made._built().eval()
        made.model_.load_state_dict(state)
        return made

    def _built(self) -> AutoInt:
        return AutoInt(
            self.encoder_.features,
            len(self.encoder_.names),
            dim=self.dim,
            blocks=self.blocks,
            heads=self.heads,
            residual=self.residual,
            paper_form=self.paper_form,
            deep=self.deep,
            outputs=1 if len(self.classes_) == 2 else len(self.classes_),
            dropout=self.dropout,
            embedding_dropout=self.embedding_dropout,
        )

    def _held_out(self, numbers: ndarray) -> ndarray:
        """True on rows by which the epoch is chosen: of each class as many as its share; none where that cannot be."""
        held = np.zeros(len(numbers), dtype=bool)
        count, classes = round(self.validation_fraction * len(numbers)), len(self.classes_)
        if np.bincount(numbers).min() < 2 or not classes <= count <= len(numbers) - classes:
            return held
        splitter = StratifiedShuffleSplit(1, test_size=count, random_state=self.random_state)
        held[next(splitter.split(numbers, numbers))[1]] = True
        return held


def _labels(y: Any) -> ndarray:
    labels = np.asarray(y)
    if labels.ndim != 1 or not len(labels):
        raise InputError(f"y: expected [rows] labels, got shape {labels.shape}")
    if labels.dtype == object:
        if any(map(is_missing, labels)):
            raise InputError("y: is missing in some rows; leave these out")
        labels = np.array(labels.tolist())
    if labels.dtype.kind == "f":
        if not np.isfinite(labels).all():
            raise InputError("y: is missing or infinite in some rows; leave these out")
        if (labels != np.round(labels)).any():
            raise InputError("y: holds fractions; this is a classifier")
    return labels
